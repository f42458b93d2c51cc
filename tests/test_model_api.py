"""What one does with a Keras model works with the wrapper: compile, fit, evaluate, predict."""

import copy
import csv
import warnings

import keras
import numpy as np
import pytest
from keras import layers

from keras_sharp import SharpnessAwareModel, methods
from tests import models
from tests.models import BACKEND, assert_close, assert_same, values

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
NO_STEPS_PER_EXECUTION = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras has no steps_per_execution on PyTorch"
)
FIT = {"batch_size": 4, "shuffle": False, "verbose": 0}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def classifier(method="sam", model=None, metrics=("accuracy",), optimizer=None, **kwargs):
    wrapper = SharpnessAwareModel(model or models.mlp(outputs=3), method)
    wrapper.compile(optimizer or keras.optimizers.SGD(0.1), LOSS, metrics=list(metrics), **kwargs)
    return wrapper


class Trained:
    """One compiled wrapper for many tests: `fresh` takes it back to the start."""

    def __init__(self):
        self.wrapper = classifier()
        self.wrapper.fit(*models.classification(12), **FIT)
        self.variables = [*self.wrapper.variables, *self.wrapper.optimizer.variables]
        self.start = values(self.variables)

    def fresh(self):
        models.assign(self.variables, self.start)
        return self.wrapper


@pytest.fixture(scope="module")
def trained():
    return Trained()


# Kinds of models


class Plain(keras.Model):
    """Its `call` knows no `training`."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)


def functional():
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(4, "tanh")(inputs)))


def subclassed_built():
    model = models.Subclassed(outputs=3)
    model(np.ones((1, 3), "float32"))
    return model


KINDS = {
    "sequential": lambda: models.mlp(outputs=3),
    "sequential_not_built": lambda: keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(3)]),
    "functional": functional,
    "subclassed": subclassed_built,
    "subclassed_not_built": lambda: models.Subclassed(outputs=3),
    "without_training_argument": Plain,
    "nested": lambda: keras.Sequential([keras.Input((3,)), functional()]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_trains_as_by_hand(kind):
    inner = KINDS[kind]()
    wrapper = classifier(model=inner)
    x, y = models.classification()
    wrapper.predict(x, verbose=0)  # Builds what is not built, so that it can be copied.
    copy = KINDS[kind]()
    copy(x)
    models.assign(copy.variables, values(inner.variables))
    copy.compile(keras.optimizers.SGD(0.1), LOSS)
    wrapper.train_on_batch(x, y)
    models.step_by_hand(copy, x, y)
    assert_close(inner.variables, copy.variables)


@pytest.mark.parametrize("kind", ["sequential_not_built", "subclassed_not_built"])
@pytest.mark.parametrize("method", ["sam", slow("bsam")])
def test_a_model_that_is_not_built_is_built_by_fit(kind, method):
    wrapper = classifier(method, KINDS[kind]())
    history = wrapper.fit(*models.classification(12), epochs=2, **FIT).history
    assert history["loss"][1] < history["loss"][0]
    assert wrapper.built
    assert wrapper.model.built
    assert int(wrapper.optimizer.iterations) == 6


def test_the_wrapper_has_the_weights_of_the_model_and_no_others():
    inner = models.batchnorm_net()
    wrapper = SharpnessAwareModel(inner, "gsam")
    assert [v.path for v in wrapper.trainable_variables] == [
        v.path for v in inner.trainable_variables
    ]
    assert [v.path for v in wrapper.weights] == [v.path for v in inner.weights]
    assert wrapper.count_params() == inner.count_params()
    # What else it has belongs to the training, as the variables of an optimizer do.
    assert len(wrapper.variables) - len(inner.variables) == len(
        [wrapper.skipped_steps, wrapper.highest_learning_rate, *wrapper.method.settings]
    )


# fit, evaluate, predict


def test_fit_reports_loss_metrics_and_rho(trained):
    history = trained.fresh().fit(*models.classification(12), epochs=2, **FIT)
    assert set(history.history) == {"loss", "accuracy", "rho"}
    assert all(len(numbers) == 2 for numbers in history.history.values())
    np.testing.assert_allclose(history.history["rho"], [0.05, 0.05])


def test_fit_takes_positional_arguments(trained):
    x, y = models.classification(12)
    assert len(trained.fresh().fit(x, y, 4, 3, 0).history["loss"]) == 3


def test_fit_twice_goes_on_where_it_stopped(trained):
    data = models.classification(12)
    wrapper = trained.fresh()
    wrapper.fit(*data, epochs=4, **FIT)
    together = values(wrapper.model.variables)
    wrapper = trained.fresh()
    for _ in range(2):
        wrapper.fit(*data, epochs=2, **FIT)
    assert_same(wrapper.model.variables, together, bits=True)


def test_evaluate_and_predict_are_those_of_the_wrapped_model(trained):
    wrapper = trained.fresh()
    inner = wrapper.model
    x, y = models.classification(10)
    logs = wrapper.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
    assert set(logs) == {"loss", "accuracy"}
    assert_close(
        list(logs.values()), list(inner.evaluate(x, y, 4, verbose=0, return_dict=True).values())
    )
    assert_close(wrapper.evaluate(x, y, verbose=0), inner.evaluate(x, y, verbose=0))
    assert_close(wrapper.test_on_batch(x, y), inner.test_on_batch(x, y))
    assert_same([wrapper.predict(x, verbose=0)], [inner.predict(x, verbose=0)])
    assert_same([wrapper.predict_on_batch(x)], [inner.predict_on_batch(x)])
    assert_close([wrapper(x)], [inner.predict(x, verbose=0)])


def test_evaluate_weights_examples(trained):
    wrapper = trained.fresh()
    x, y = models.classification(10)
    weights = np.linspace(0, 2, 10)
    got = wrapper.evaluate(x, y, sample_weight=weights, verbose=0)
    assert_close(got, wrapper.model.evaluate(x, y, sample_weight=weights, verbose=0))


def test_predict_needs_no_compile():
    inner = models.mlp()
    x, _ = models.regression()
    assert_close([SharpnessAwareModel(inner).predict(x, verbose=0)], [inner.predict(x, verbose=0)])


def test_the_training_argument_is_passed_on():
    inner = models.dropout_net()
    wrapper = SharpnessAwareModel(inner)
    x, _ = models.regression()
    calm = keras.ops.convert_to_numpy(wrapper(x, training=False))
    assert_same([calm], [inner(x, training=False)])
    noisy = keras.ops.convert_to_numpy(keras.ops.stop_gradient(wrapper(x, training=True)))
    assert np.any(noisy != calm)


def test_train_on_batch_returns_rho_and_extra_logs_in_a_dict():
    wrapper = SharpnessAwareModel(models.mlp(), extra_logs=["sharpness", "skipped_steps"])
    wrapper.compile("sgd", "mse")
    logs = wrapper.train_on_batch(*models.regression(), return_dict=True)
    assert set(logs) == {"loss", "rho", "sharpness", "skipped_steps"}


def two_outputs():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    return keras.Model(inputs, [layers.Dense(1, name=name)(inputs) for name in ("b", "a")])


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (models.mlp, {"loss": "mse"}),
        (models.mlp, {"loss": "mse", "metrics": ["mae"], "weighted_metrics": ["mse"]}),
        (two_outputs, {"loss": ["mse", "mae"], "metrics": {"a": ["mae"], "b": ["mse"]}}),
    ],
    ids=["loss", "metrics", "outputs"],
)
def test_train_on_batch_returns_what_plain_keras_returns(make, kwargs):
    """The same numbers in the same order, or a single one; `rho` is none of them."""
    x, y = models.regression()
    y = [y, 2 * y] if make is two_outputs else y
    values = []
    for wrap in (False, True):
        model = make()
        if wrap:
            model = SharpnessAwareModel(model, extra_logs=["sharpness", "skipped_steps"])
        model.compile("sgd", **kwargs, run_eagerly=True)
        values.append(model.train_on_batch(x, y, class_weight=None))
    assert np.ndim(values[1]) == np.ndim(values[0])
    np.testing.assert_allclose(values[1], values[0], rtol=1e-5)


def test_metrics_are_listed_once(trained):
    metrics = trained.fresh().metrics
    assert len({id(m) for m in metrics}) == len(metrics)
    assert len(trained.wrapper.metrics_variables) == len(
        {id(v) for v in trained.wrapper.metrics_variables}
    )


def test_validation_data_is_evaluated_after_each_epoch(trained):
    wrapper = trained.fresh()
    validation = models.classification(6, seed=1)
    history = wrapper.fit(
        *models.classification(12), validation_data=validation, epochs=2, **FIT
    ).history
    assert set(history) == {"loss", "accuracy", "rho", "val_loss", "val_accuracy"}
    expected = wrapper.model.evaluate(*validation, verbose=0)
    assert_close([history["val_loss"][-1], history["val_accuracy"][-1]], expected)


def test_validation_split_keeps_the_last_examples_out(trained):
    x, y = models.classification(12)
    wrapper = trained.fresh()
    history = wrapper.fit(x, y, validation_split=1 / 3, **FIT).history
    split = values(wrapper.model.variables)
    trained.fresh().fit(x[:8], y[:8], **FIT)
    assert_same(split, trained.wrapper.model.variables, bits=True)
    expected = wrapper.model.evaluate(x[8:], y[8:], verbose=0)
    assert_close([history["val_loss"][0], history["val_accuracy"][0]], expected)


# Kinds of data


class Batches(keras.utils.PyDataset):
    """The twelve examples in batches of four."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        x, y = models.classification(12)
        return x[4 * index : 4 * index + 4], y[4 * index : 4 * index + 4]


def tf_data():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(models.classification(12)).batch(4)


def generator():
    while True:
        yield from (Batches()[i] for i in range(3))


def data_loader():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(*map(torch.as_tensor, models.classification(12)))
    return torch.utils.data.DataLoader(data, batch_size=4)


SOURCES = {
    "tf.data": (tf_data, {}),
    "PyDataset": (Batches, {"shuffle": False}),
    "generator": (generator, {"steps_per_epoch": 3}),
    "DataLoader": (data_loader, {"shuffle": False}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_any_source_of_data_gives_the_same_training(trained, source):
    make, kwargs = SOURCES[source]
    trained.fresh().fit(*models.classification(12), epochs=2, **FIT)
    expected = values(trained.wrapper.model.variables)
    trained.fresh().fit(make(), epochs=2, verbose=0, **kwargs)
    assert_close(trained.wrapper.model.variables, expected, rtol=1e-6)


# How a step is run


@pytest.mark.parametrize(
    "options",
    [
        {"jit_compile": False},
        {"run_eagerly": True},
        pytest.param({"jit_compile": True}, marks=[pytest.mark.slow] if BACKEND == "torch" else []),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["sam", slow("gsam"), slow("bsam")])
def test_compiled_and_eager_steps_agree(method, options):
    inner, copy = models.twins(models.mlp, outputs=3)
    wrapper = classifier(method, inner, metrics=(), **options)
    copy.compile(keras.optimizers.SGD(0.1), LOSS)
    for seed in range(2):
        batch = models.classification(seed=seed)
        wrapper.train_on_batch(*batch)
        models.step_by_hand(copy, *batch, method=method)
    assert_close(inner.variables, copy.variables)


@NO_STEPS_PER_EXECUTION
@pytest.mark.parametrize("steps", [3, slow(2)])
def test_several_steps_per_execution_are_several_steps(trained, steps):
    x, y = models.classification(20)
    wrapper = classifier(steps_per_execution=steps)
    models.assign(wrapper.model.variables, values(trained.fresh().model.variables))
    history = wrapper.fit(x, y, epochs=2, **FIT).history
    expected = trained.fresh().fit(x, y, epochs=2, **FIT).history
    assert_close(wrapper.model.variables, trained.wrapper.model.variables)
    assert_close([history[k] for k in expected], list(expected.values()))
    assert int(wrapper.optimizer.iterations) == 10


@pytest.fixture
def traces(monkeypatch):
    """How often the step was run as a Python function."""
    count = []
    step = SharpnessAwareModel.sharpness_aware_step

    def counting(self, data):
        count.append(1)
        return step(self, data)

    monkeypatch.setattr(SharpnessAwareModel, "sharpness_aware_step", counting)
    return count


@pytest.mark.skipif(BACKEND == "torch", reason="Keras compiles nothing on PyTorch by default")
def test_nothing_is_compiled_after_the_first_step(traces):
    wrapper = classifier(methods.BSAM(rho=0.05, rho_min=0.02))
    x, y = models.classification(12)
    wrapper.train_on_batch(x, y)
    first = len(traces)
    for value in (0.1, 0.0, 0.2):
        wrapper.method.rho = value
        logs = wrapper.train_on_batch(x, y, return_dict=True)
        np.testing.assert_allclose(logs["rho"], value)
    wrapper.optimizer.learning_rate = 0.01
    wrapper.train_on_batch(x, y)
    assert len(traces) == first


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="see the test before")
def test_torch_compiles_nothing_after_the_second_step():
    from torch._dynamo.utils import counters

    wrapper = classifier(methods.SAM(), jit_compile=True)
    x, y = models.classification(12)
    for _ in range(2):  # In the second step, the variables are no longer those of the build.
        wrapper.train_on_batch(x, y)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for value in (0.1, 0.2, 0.3):
        wrapper.method.rho = value
        wrapper.train_on_batch(x + value, y)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.skipif(BACKEND == "torch", reason="Keras compiles nothing on PyTorch by default")
def test_fit_compiles_once_for_equal_batches(traces):
    wrapper = classifier()
    wrapper.fit(*models.classification(12), epochs=1, **FIT)
    first = len(traces)
    wrapper.fit(*models.classification(12), epochs=2, **FIT)
    assert len(traces) == first


def test_a_new_rho_takes_effect_in_the_next_step():
    wrapper, copy = SharpnessAwareModel(models.mlp()), models.mlp()
    wrapper.compile(keras.optimizers.SGD(0.1), "mse")
    copy.compile(keras.optimizers.SGD(0.1), "mse")
    for seed, rho in enumerate((0.05, 0.5)):
        wrapper.method.rho = rho
        wrapper.train_on_batch(*models.regression(seed=seed))
        models.step_by_hand(copy, *models.regression(seed=seed), rho=rho)
    assert_close(wrapper.model.variables, copy.variables)


# Compiling


def test_the_default_optimizer_is_that_of_keras():
    wrapper = SharpnessAwareModel(models.mlp())
    wrapper.compile(loss="mse")
    assert isinstance(wrapper.optimizer, keras.optimizers.RMSprop)
    assert wrapper.model.optimizer is wrapper.optimizer


def test_compiling_again_after_freezing_a_layer():
    wrapper = classifier(optimizer=keras.optimizers.Adam(0.1))
    x, y = models.classification(8)
    wrapper.train_on_batch(x, y)
    frozen = wrapper.model.get_layer("first")
    frozen.trainable = False
    wrapper.compile(keras.optimizers.Adam(0.1), LOSS, metrics=["accuracy"])
    before = values(frozen.variables)
    last = values(wrapper.model.get_layer("last").variables)
    wrapper.train_on_batch(x, y)
    assert_same(frozen.variables, before, bits=True)
    assert np.all(values(wrapper.model.get_layer("last").variables)[0] != last[0])
    frozen.trainable = True
    wrapper.compile(keras.optimizers.Adam(0.1), LOSS)
    wrapper.train_on_batch(x, y)
    assert np.any(values(frozen.variables)[0] != before[0])


def test_freezing_after_compiling_is_told(trained):
    """What it then does is as in plain Keras, and differs from backend to backend."""
    wrapper = trained.fresh()
    layer = wrapper.get_layer("first")
    layer.trainable = False
    try:
        if BACKEND == "jax":  # The weights would be lost in the step.
            with pytest.raises(ValueError, match=r"`trainable` of a layer was set after"):
                wrapper.train_on_batch(*models.classification(12))
            return
        with pytest.warns(UserWarning, match=r"`trainable` of a layer was set after.*`compile`"):
            wrapper.train_on_batch(*models.classification(12))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*trainable")
            wrapper.train_on_batch(*models.classification(12))
    finally:
        layer.trainable = True
        trained.wrapper.compile(keras.optimizers.SGD(0.1), LOSS, metrics=["accuracy"])
        trained.__init__()


class Momentum(methods.SAM):
    """Remembers something for each weight."""

    def initial_state(self, variables):
        return [np.zeros(v.shape, "float32") for v in variables]

    def step(self, objective, w, state, rho):
        g = objective(w).gradient
        new = [
            0.9 * m + t for m, t in zip(state, self.direction(objective, w, g, rho), strict=True)
        ]
        return new, new


def test_the_memory_of_a_method_follows_the_weights_that_are_trained():
    wrapper = SharpnessAwareModel(models.mlp(), Momentum())
    layer = wrapper.get_layer("first")
    layer.trainable = False  # Before it is compiled,
    for trainable in (False, True, False):  # and between two times.
        layer.trainable = trainable
        wrapper.compile("sgd", "mse", run_eagerly=True)
        wrapper.train_on_batch(*models.regression())
        assert [m.shape for m in wrapper.method_state] == [
            v.shape for v in wrapper.trainable_variables
        ]


def test_compiling_again_replaces_loss_and_metrics():
    wrapper = classifier(model=models.mlp(outputs=1))
    wrapper.compile("sgd", "mae", metrics=["mse"])
    x, y = models.regression()
    logs = wrapper.train_on_batch(x, y, return_dict=True)
    assert set(logs) == {"loss", "mse", "rho"}
    assert set(wrapper.model.evaluate(x, y, verbose=0, return_dict=True)) == {"loss", "mse"}


def test_the_wrapped_model_trains_plainly_by_itself():
    inner, plain = models.twins(models.mlp)
    wrapper = SharpnessAwareModel(inner)
    wrapper.compile(keras.optimizers.SGD(0.1), "mse")
    plain.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = models.regression()
    inner.fit(x, y, **FIT)
    plain.fit(x, y, **FIT)
    assert_same(inner.variables, plain.variables)
    wrapper.fit(x, y, **FIT)
    for start in (0, 4):
        models.step_by_hand(plain, x[start : start + 4], y[start : start + 4])
    assert_close(inner.variables, plain.variables)


@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_training_the_wrapped_model_by_itself_is_told_once(how):
    inner = models.mlp()
    wrapper = SharpnessAwareModel(inner, name="outer")
    x, y = models.regression()
    wrapper.compile("sgd", "mse", run_eagerly=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without an adversary")
        wrapper.train_on_batch(x, y)
        inner.evaluate(x, y, verbose=0)
        inner.predict(x, verbose=0)
        wrapper.train_on_batch(x, y)
    with pytest.warns(
        UserWarning, match=r"without an adversary.*'outer'.*`wrapper\.fit\(\.\.\.\)`"
    ):
        getattr(inner, how)(x, y)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without an adversary")
        getattr(inner, how)(x, y)


def test_training_the_wrapped_model_by_itself_is_meant_if_it_is_compiled_by_itself(tmp_path):
    inner = models.mlp()
    wrapper = SharpnessAwareModel(inner)
    x, y = models.regression()
    wrapper.compile("sgd", "mse", run_eagerly=True)
    inner.save(tmp_path / "m.keras")
    others = [keras.saving.load_model(tmp_path / "m.keras"), copy.deepcopy(inner)]
    inner.compile("sgd", "mse", run_eagerly=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without an adversary")
        for model in (inner, *others):
            model.fit(x, y, verbose=0)
    for do in (wrapper.fit, wrapper.evaluate, wrapper.train_on_batch, wrapper.test_on_batch):
        with pytest.raises(ValueError, match=r"compiled by itself.*`compile` of the wrapper"):
            do(x, y)
    wrapper.compile("sgd", "mse", run_eagerly=True)
    wrapper.train_on_batch(x, y)


def test_two_wrappers_may_take_turns_with_one_model():
    inner, copy = models.twins(models.mlp)
    copy.compile(keras.optimizers.SGD(0.1), "mse")
    batch = models.regression()
    for method in ("sam", "gsam"):
        wrapper = SharpnessAwareModel(inner, method)
        wrapper.compile(keras.optimizers.SGD(0.1), "mse")
        wrapper.train_on_batch(*batch)
        models.step_by_hand(copy, *batch, method=method)
    assert_close(inner.variables, copy.variables)


# Callbacks


class Spoiler(keras.callbacks.Callback):
    """Doubles the weights after an epoch, to make the model worse."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            model = self.model
            model.set_weights([w if w.dtype.kind == "i" else 10 * w for w in model.get_weights()])


def test_early_stopping_restores_the_best_weights(trained):
    wrapper = trained.fresh()
    rho = float(wrapper.method.rho)
    best = []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                best.extend(values(self.model.model.variables))

    stopping = keras.callbacks.EarlyStopping("loss", patience=1, restore_best_weights=True)
    history = wrapper.fit(
        *models.classification(12), epochs=6, callbacks=[Keep(), Spoiler(1), stopping], **FIT
    )
    assert len(history.epoch) == 2
    assert_same(wrapper.model.variables, best, bits=True)
    np.testing.assert_allclose(float(wrapper.method.rho), rho)


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_model_checkpoint_keeps_the_best(trained, tmp_path, ending):
    wrapper = trained.fresh()
    data = models.classification(12)
    path = str(tmp_path / f"best{ending}")
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, "loss", save_best_only=True, save_weights_only=ending != ".keras"
    )
    wrapper.fit(*data, epochs=3, callbacks=[Spoiler(2), checkpoint], **FIT)
    trained.fresh().fit(*data, epochs=2, **FIT)
    expected = values(wrapper.model.variables)
    if ending == ".keras":
        wrapper = keras.saving.load_model(path)
    else:
        trained.fresh().load_weights(path)
    assert_same(wrapper.model.variables, expected, bits=True)


def test_reduce_on_plateau_lowers_the_learning_rate(trained):
    wrapper = trained.fresh()
    x, y = models.classification(12)
    # An improvement as large as that is none: the rate falls after each epoch but the first.
    plateau = keras.callbacks.ReduceLROnPlateau("loss", 0.5, patience=1, min_delta=100)
    history = wrapper.fit(x, y, epochs=3, callbacks=[plateau], **FIT).history
    np.testing.assert_allclose(history["learning_rate"], [0.1, 0.1, 0.05])
    np.testing.assert_allclose(float(wrapper.optimizer.learning_rate), 0.025)


def test_csv_logger_writes_rho(trained, tmp_path):
    path = tmp_path / "log.csv"
    logger = keras.callbacks.CSVLogger(path)
    trained.fresh().fit(*models.classification(12), epochs=2, callbacks=[logger], **FIT)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"epoch", "loss", "accuracy", "rho"} <= set(rows[0])
    np.testing.assert_allclose([float(row["rho"]) for row in rows], [0.05, 0.05])


def test_a_callback_may_set_rho(trained):
    class Rho(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.method.rho = 0.1 * (epoch + 1)

    history = (
        trained.fresh().fit(*models.classification(12), epochs=3, callbacks=[Rho()], **FIT).history
    )
    np.testing.assert_allclose(history["rho"], [0.1, 0.2, 0.3], rtol=1e-6)


# To what end


@pytest.mark.parametrize(
    "method", ["sam", slow("asam"), slow("gsam"), slow("adaptive_gsam"), slow("bsam")]
)
def test_a_separable_problem_is_learned(method):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 120)
    x = (np.eye(3)[y] * 3 + rng.normal(size=(120, 3)) * 0.4).astype("float32")
    wrapper = classifier(method, models.batchnorm_net(outputs=3, units=8))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*skipped")
        wrapper.fit(x[:90], y[:90], batch_size=30, epochs=25, verbose=0)
    assert wrapper.evaluate(x[90:], y[90:], verbose=0, return_dict=True)["accuracy"] > 0.95


# Compiling as the wrapped model does


class OwnCompile(keras.Model):
    """A model with defaults of its own, and one more argument."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, x):
        return self.dense(x)

    def compile(self, optimizer="auto", loss="mse", *, metrics=None, factor=1, **kwargs):
        self.factor = factor
        optimizer = "adam" if optimizer == "auto" else optimizer
        super().compile(optimizer, loss, metrics=metrics or ["mae"], **kwargs)


def test_a_model_with_a_compile_of_its_own_is_compiled_by_it():
    inner = OwnCompile()
    model = SharpnessAwareModel(inner)
    model.compile(factor=3, run_eagerly=True)
    assert isinstance(model.optimizer, keras.optimizers.Adam)
    assert model.optimizer is inner.optimizer
    assert (model.loss, inner.factor, model.run_eagerly) == ("mse", 3, True)
    x, y = models.regression()
    assert sorted(model.fit(x, y, verbose=0).history) == ["loss", "mae", "rho"]
    config = model.get_compile_config()
    assert config["metrics"] == ["mae"]


def test_outputs_are_known_by_their_names():
    """As in the plain model: losses and metrics of a list of outputs, by the names."""

    def make():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        return keras.Model(inputs, [layers.Dense(1, name=name)(inputs) for name in ("a", "b")])

    x, y = models.regression()
    histories = []
    for model in (make(), SharpnessAwareModel(make(), None)):
        model.compile(
            "sgd",
            loss={"a": "mse", "b": "mae"},
            loss_weights={"a": 1.0, "b": 3.0},
            metrics={"b": ["mse"]},
        )
        histories.append(model.fit(x, [y, 2 * y], shuffle=False, verbose=0).history)
    plain, wrapped = histories
    assert sorted(wrapped) == sorted(plain)
    for name, expected in plain.items():
        assert wrapped[name] == pytest.approx(expected, rel=1e-5)

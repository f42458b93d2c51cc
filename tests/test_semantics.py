"""A step changes the loss surface it looks at, and nothing else about training.

Statistics, random numbers, losses, masks, optimizers, skipped steps, frozen and special
weights: each is compared with a step by hand on a copy, or with plain Keras.
"""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sharp
from keras_sharp import SharpnessAwareModel, engine, methods
from keras_sharp.engine._keras import global_seed
from tests import models
from tests.models import BACKEND, assert_close, assert_same, twins, values

THREE = ["sam", "gsam", "bsam"]
#: Where the way from a gradient to the direction makes little difference.
SAM_AND_SLOW = ["sam", *map(models.slow, ("gsam", "bsam"))]

#: What is run compiled in the quick tests as well, in place of the fixture's two modes.
COMPILED = pytest.mark.parametrize("mode", ["compiled"], indirect=True)

NO_GLOBAL_SEED = pytest.mark.skipif(
    BACKEND == "jax", reason="Keras refuses unseeded random numbers in a traced function on JAX"
)


@pytest.fixture(autouse=True, params=models.MODES)
def mode(request):
    """Whether functions are compiled in a test. Only if they are not, equality is to the bit."""
    with models.running(request.param):
        yield request.param


def at_rho_zero(method):
    if method == "bsam":
        return methods.BSAM(rho=0.0, rho_min=0.0)
    return {"sam": methods.SAM, "gsam": methods.GSAM}[method](rho=0.0)


def pair(build, optimizer=None, loss="mse", method="sam", compile_kwargs=None, **kwargs):
    """A compiled wrapper, and a compiled copy of the model inside it."""
    inner, copy = twins(build)
    wrapper = SharpnessAwareModel(inner, method, **kwargs)
    optimizer = optimizer or (lambda: keras.optimizers.SGD(0.1))
    wrapper.compile(optimizer(), loss, **(compile_kwargs or {}))
    copy.compile(optimizer(), loss, **(compile_kwargs or {}))
    return wrapper, copy


def batches(steps=3, make=models.regression, **kwargs):
    return [make(seed=seed, **kwargs) for seed in range(steps)]


def check_steps(wrapper, copy, data, method="sam", **kwargs):
    """Train the wrapper with Keras and the copy by hand; weights, state, optimizer agree."""
    for batch in data:
        logs = wrapper.train_on_batch(*batch, return_dict=True)
        loss = models.step_by_hand(copy, *batch, method=method, **kwargs)
        np.testing.assert_allclose(logs["loss"], loss, rtol=1e-5)
        wrapper.reset_metrics()
    assert_close(wrapper.model.variables, copy.variables)
    assert_close(wrapper.optimizer.variables, copy.optimizer.variables)


# The step


@COMPILED
@pytest.mark.parametrize("method", sorted(models.BY_HAND))
def test_steps_equal_steps_by_hand(method):
    wrapper, copy = pair(models.mlp, method=method)
    check_steps(wrapper, copy, batches(), method=method)


def test_the_wrapped_model_holds_the_trained_weights():
    inner = models.mlp()
    before = values(inner.variables)
    wrapper = SharpnessAwareModel(inner)
    wrapper.compile("sgd", "mse")
    x, y = models.regression()
    wrapper.fit(x, y, verbose=0)
    assert all(np.any(a != b) for a, b in zip(values(inner.variables), before, strict=True))
    assert_same([inner.predict(x, verbose=0)], [wrapper.predict(x, verbose=0)])
    assert all(v is w for v, w in zip(inner.weights, wrapper.trainable_variables, strict=True))


# Statistics of BatchNormalization


@pytest.mark.parametrize("method", THREE)
def test_batchnorm_statistics_move_as_in_plain_training(method, mode):
    wrapper, plain = pair(models.batchnorm_net, lambda: keras.optimizers.SGD(0.0), method=method)
    x, y = models.regression(12)
    for model in (wrapper, plain):
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert_same(wrapper.model.variables, plain.variables, bits=mode == "as_written")
    assert np.any(values(plain.get_layer("bn").non_trainable_variables)[0] != 0)


@pytest.mark.parametrize("method", THREE)
def test_batchnorm_statistics_come_from_the_clean_pass(method):
    wrapper, copy = pair(models.batchnorm_net, method=method)
    check_steps(wrapper, copy, batches(), method=method)


class NotToldOfTraining(keras.Model):
    """Its `call` has no argument `training`: Keras then tells the layers nothing either."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4, activation="tanh")
        self.norm = layers.BatchNormalization()
        self.dropout = layers.Dropout(0.5, seed=0)
        self.out = layers.Dense(2)
        self(np.zeros((1, 3)))

    def call(self, inputs):
        return self.out(self.dropout(self.norm(self.dense(inputs))))


def test_a_model_that_is_not_told_of_training_trains_as_in_plain_keras():
    wrapper, plain = pair(NotToldOfTraining, method=methods.SAM(rho=0.0))
    x, y = models.regression(12)
    for model in (wrapper, plain):
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert_close(wrapper.model.variables, plain.variables)
    assert_same(wrapper.model.norm.non_trainable_variables, NotToldOfTraining().norm.weights[2:])


def test_a_frozen_batchnorm_keeps_its_statistics():
    def build():
        model = models.batchnorm_net()
        model.get_layer("bn").trainable = False
        return model

    wrapper, copy = pair(build)
    check_steps(wrapper, copy, batches(1))
    mean, variance = values(wrapper.model.get_layer("bn").non_trainable_variables)[-2:]
    assert np.all(mean == 0)
    assert np.all(variance == 1)


# Random numbers


def recorded_masks(steps, **kwargs):
    masks = []
    keras.utils.set_random_seed(3)
    inner = keras.Sequential(
        [keras.Input((3,)), layers.Dense(16), models.Recorder((8, 16), masks), layers.Dense(1)]
    )
    wrapper = SharpnessAwareModel(inner, **kwargs)
    wrapper.compile("sgd", "mse", run_eagerly=True)  # To see the masks.
    x, y = models.regression()
    for _ in range(steps):
        wrapper.train_on_batch(x, y)
    return masks, inner


def test_all_passes_of_a_step_see_the_same_masks():
    masks, _ = recorded_masks(2, method="bsam")
    assert len(masks) == 6
    for first in (0, 3):
        assert_same(masks[first + 1 : first + 3], [masks[first]] * 2, bits=True)
    assert np.any(masks[0] != masks[3])


def test_fresh_noise_draws_every_mask_once():
    masks, _ = recorded_masks(2, method="bsam", fresh_noise=True)
    assert len(masks) == 6
    assert len({m.tobytes() for m in masks}) == 6


@pytest.mark.parametrize("fresh_noise", [False, True])
def test_the_seed_advances_once_per_step_or_once_per_pass(fresh_noise):
    wrapper = SharpnessAwareModel(models.dropout_net(dropout_seed=5), fresh_noise=fresh_noise)
    wrapper.compile("sgd", "mse")
    state = wrapper.model.get_layer("dropout").seed_generator.state
    before = values([state])[0].astype("int64")
    x, y = models.regression()
    for _ in range(3):
        wrapper.train_on_batch(x, y)
    advanced = values([state])[0].astype("int64") - before
    assert_same([advanced], [[0, 6 if fresh_noise else 3]], bits=True)


@pytest.mark.parametrize("dropout_seed", [None, 5])
@pytest.mark.parametrize("method", THREE)
def test_at_rho_zero_dropout_training_is_plain_training(method, dropout_seed, mode):
    def build():
        return models.dropout_net(dropout_seed=dropout_seed)

    wrapper, plain = pair(build, method=at_rho_zero(method))
    x, y = models.regression(16)
    # By itself, plain Keras on PyTorch draws unseeded masks from a generator of the process.
    engine.own_random_numbers(plain)
    for model in (wrapper, plain):
        keras.utils.set_random_seed(11)
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert_same(wrapper.model.variables, plain.variables, bits=mode == "as_written")


def test_with_dropout_steps_equal_steps_by_hand():
    wrapper, copy = pair(lambda: models.dropout_net(dropout_seed=5))
    check_steps(wrapper, copy, batches())


@NO_GLOBAL_SEED
def test_unseeded_random_numbers_are_the_same_in_all_passes_and_new_in_each_step(mode):
    def build():
        keras.utils.set_random_seed(1)
        return keras.Sequential([keras.Input((3,)), models.Noise(), layers.Dense(1)])

    wrapper, plain = pair(build, method=at_rho_zero("sam"))
    x, y = models.regression()
    losses = []
    for model in (wrapper, plain):
        keras.utils.set_random_seed(11)
        if models.KERAS < (3, 13):  # There, the line above leaves the global seed as it is.
            global_seed().assign([11, 0])
        losses.append([])
        for _ in range(3):
            losses[-1].append(model.train_on_batch(x, y, return_dict=True)["loss"])
            model.reset_metrics()
    assert_same(wrapper.model.variables, plain.variables, bits=mode == "as_written")
    assert_close(losses[0], losses[1])
    assert len({float(loss) for loss in losses[0]}) == 3


@models.on("jax")
@COMPILED
def test_unseeded_random_numbers_on_jax_are_refused_as_keras_refuses_them():
    wrapper = SharpnessAwareModel(keras.Sequential([models.Noise(), layers.Dense(1)]))
    wrapper.compile("sgd", "mse")
    with pytest.raises(ValueError, match="SeedGenerator"):
        wrapper.train_on_batch(*models.regression())


# What belongs to the loss


@pytest.mark.parametrize("method", THREE)
def test_regularizers_count_in_every_pass(method):
    def build():
        return models.linear(kernel_regularizer=keras.regularizers.L2(1.0))

    wrapper, _ = pair(build, method=method)
    x, y = models.regression()
    w = flat_weights(wrapper.model)

    def gradient(w):
        return 2 / len(x) * x.T.astype("float64") @ (x @ w - y[:, 0]) + 2 * w

    g = gradient(w)
    direction = models.BY_HAND[method][0](
        lambda e: gradient(w + e), lambda rho: models.euclidean(g, w, None, rho), g
    )
    wrapper.train_on_batch(x, y)
    np.testing.assert_allclose(flat_weights(wrapper.model), w - 0.1 * direction, rtol=1e-5)


def flat_weights(model):
    return models.flat(values(model.trainable_variables))


@keras.saving.register_keras_serializable(package="tests")
class AddLoss(layers.Layer):
    """A penalty on the activations by `add_loss`."""

    def call(self, x):
        self.add_loss(0.3 * ops.mean(ops.square(x)))
        return x


def penalized():
    keras.utils.set_random_seed(1)
    dense = layers.Dense(
        4,
        "tanh",
        kernel_regularizer=keras.regularizers.L1L2(0.01, 0.1),
        bias_initializer="random_normal",
        bias_regularizer="l2",
        activity_regularizer=keras.regularizers.L2(0.2),
    )
    return keras.Sequential([keras.Input((3,)), dense, AddLoss(), layers.Dense(1)])


@pytest.mark.parametrize("method", SAM_AND_SLOW)
def test_activity_regularizers_and_add_loss_count_in_every_pass(method):
    wrapper, copy = pair(penalized, method=method)
    check_steps(wrapper, copy, batches(2), method=method)


def test_penalties_count_in_evaluate():
    wrapper, plain = pair(penalized, compile_kwargs={"metrics": ["mae"]})
    x, y = models.regression(10)
    expected = plain.evaluate(x, y, batch_size=4, verbose=0)
    assert_close(wrapper.evaluate(x, y, batch_size=4, verbose=0), expected)
    assert_close(wrapper.test_on_batch(x, y), plain.test_on_batch(x, y))


@pytest.mark.parametrize("method", SAM_AND_SLOW)
def test_sample_weights_of_zero_give_no_step(method):
    wrapper, plain = pair(models.mlp, method=method)
    x, y = models.regression()
    wrapper.train_on_batch(x, y, sample_weight=np.zeros(8, "float32"))
    assert_same(wrapper.model.variables, plain.variables, bits=True)


def test_sample_weights_count_in_every_pass():
    wrapper, copy = pair(models.mlp)
    x, y = models.regression()
    weights = np.linspace(0, 2, 8).astype("float32")
    check_steps(wrapper, copy, [(x, y, weights)] * 2)


def test_class_weights_count_in_every_pass():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    wrapper, copy = pair(lambda: models.mlp(outputs=3), loss=loss)
    x, y = models.classification()
    class_weight = {0: 1.0, 1: 3.0, 2: 0.5}
    wrapper.fit(x, y, class_weight=class_weight, batch_size=8, shuffle=False, verbose=0)
    weights = np.array([class_weight[c] for c in y], "float32")
    models.step_by_hand(copy, x, y, weights)
    assert_close(wrapper.model.variables, copy.variables)


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("recurrent", [layers.LSTM, layers.GRU])
def test_masks_reach_every_pass(recurrent):
    def build():
        keras.utils.set_random_seed(1)
        return keras.Sequential(
            [
                keras.Input((4,), dtype="int32"),
                layers.Embedding(6, 3, mask_zero=True),
                recurrent(3),
                layers.Dense(1),
            ]
        )

    wrapper, copy = pair(build)
    x = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [1, 1, 1, 5]], "int32")
    y = np.array([[0.5], [-1.0], [2.0]], "float32")
    check_steps(wrapper, copy, [(x, y)])
    assert_close([wrapper.predict(x, verbose=0)[1]], [wrapper.predict(x[1:2], verbose=0)[0]])


@pytest.mark.parametrize("layout", ["dict", "list", pytest.param("tuple", marks=pytest.mark.slow)])
def test_nested_inputs_and_outputs(layout):
    def build():
        model = models.two_in_two_out()
        if layout == "dict":
            return model
        inputs = [keras.Input((3,)), keras.Input((2,))]
        outputs = model({"a": inputs[0], "b": {"c": inputs[1]}})
        outputs = [outputs["small"], outputs["big"]]
        if layout == "list":
            return keras.Model(inputs, outputs)
        return keras.Model(tuple(inputs), tuple(outputs))

    losses = {"small": "mse", "big": "mae"} if layout == "dict" else ["mse", "mae"]
    weights = {"small": 1.0, "big": 0.5} if layout == "dict" else [1.0, 0.5]
    wrapper, copy = pair(build, loss=losses, compile_kwargs={"loss_weights": weights})
    rng = np.random.default_rng(0)
    a, c, small, big = (rng.normal(size=(8, n)).astype("float32") for n in (3, 2, 1, 2))
    if layout == "dict":
        x, y = {"a": a, "b": {"c": c}}, {"small": small, "big": big}
    else:
        x, y = (a, c), (small, big)
        x, y = (list(x), list(y)) if layout == "list" else (x, y)
    check_steps(wrapper, copy, [(x, y)])


@pytest.mark.parametrize("method", SAM_AND_SLOW)
def test_logs_equal_those_of_plain_training_at_the_same_weights(method, mode):
    kwargs = {
        "loss_weights": {"small": 1.0, "big": 0.5},
        "metrics": {"small": ["mae"], "big": ["mse", "mae"]},
        "weighted_metrics": {"small": ["mse"], "big": []},
    }
    wrapper, plain = pair(
        models.two_in_two_out,
        lambda: keras.optimizers.SGD(0.0),
        loss={"small": "mse", "big": "mae"},
        method=method,
        compile_kwargs=kwargs,
    )
    rng = np.random.default_rng(0)
    a, c, small, big = (rng.normal(size=(10, n)).astype("float32") for n in (3, 2, 1, 2))
    x, y = {"a": a, "b": {"c": c}}, {"small": small, "big": big}
    weight = {"small": np.linspace(0, 2, 10), "big": np.ones(10)}
    fit = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
    logs = wrapper.fit(x, y, sample_weight=weight, **fit).history
    expected = plain.fit(x, y, sample_weight=weight, **fit).history
    assert set(logs) == {*expected, "rho"}
    for name, numbers in expected.items():
        assert_same([logs[name]], [numbers], bits=mode == "as_written")


@pytest.mark.parametrize("model", [models.Autoencoder, models.OldAutoencoder])
def test_a_custom_loss_and_custom_metrics_are_kept(model):
    def build():
        keras.utils.set_random_seed(1)
        return model()

    wrapper, plain = pair(build, lambda: keras.optimizers.SGD(0.0), loss=None)
    x, _ = models.regression(12)
    fit = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
    build_both(wrapper, plain, x)
    logs, expected = wrapper.fit(x, **fit).history, plain.fit(x, **fit).history
    assert set(logs) == {"loss", "code_loss", "worst", "rho"}
    assert_close([logs[name] for name in expected], list(expected.values()))
    assert_close(
        [wrapper.evaluate(x, verbose=0, return_dict=True)[name] for name in ("loss", "code_loss")],
        [plain.evaluate(x, verbose=0, return_dict=True)[name] for name in ("loss", "code_loss")],
    )


def build_both(wrapper, plain, x):
    wrapper.predict(x, verbose=0)
    plain.predict(x, verbose=0)
    models.assign(plain.variables, values(wrapper.model.variables))


def test_with_a_custom_loss_steps_equal_steps_by_hand():
    def build():
        keras.utils.set_random_seed(1)
        return models.Autoencoder()

    wrapper, copy = pair(build, loss=None)
    x, _ = models.regression()
    build_both(wrapper, copy, x)
    wrapper.train_on_batch(x)
    models.step_by_hand(copy, x)
    assert_close(wrapper.model.trainable_variables, copy.trainable_variables)


# Special weights


class HalfUsed(keras.Model):
    """One of the two layers is built, but the loss does not depend on it."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = layers.Dense(1, name="used"), layers.Dense(2, name="unused")

    def build(self, shape):
        self.used.build(shape)
        self.unused.build(shape)
        self.built = True

    def call(self, x):
        return self.used(x)


@pytest.mark.parametrize("method", SAM_AND_SLOW)
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_weights_that_the_loss_does_not_use_are_left_alone(method):
    def build():
        keras.utils.set_random_seed(1)
        model = HalfUsed()
        model.build((None, 3))
        return model

    wrapper, copy = pair(build, method=method)
    unused = values(wrapper.model.unused.variables)
    check_steps(wrapper, copy, batches(2), method=method)
    assert_same(wrapper.model.unused.variables, unused, bits=True)


def test_rows_of_an_embedding_that_occur_twice_are_added_up():
    def build():
        keras.utils.set_random_seed(1)
        return keras.Sequential(
            [
                keras.Input((3,), dtype="int32"),
                layers.Embedding(5, 2, embeddings_initializer="random_normal"),
                layers.GlobalAveragePooling1D(),
            ]
        )

    wrapper, _ = pair(build)
    x = np.array([[0, 0, 1], [1, 2, 2], [0, 1, 0]], "int32")
    y = np.array([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]], "float32")
    counts = np.stack([np.bincount(row, minlength=5) for row in x]) / 3
    (w,) = values(wrapper.model.trainable_variables)

    def gradient(w):  # of mean((counts @ w - y)²)
        return 2 / y.size * counts.T @ (counts @ w - y)

    g = gradient(w.astype("float64"))
    expected = w - 0.1 * gradient(w + 0.05 * g / np.linalg.norm(g))
    wrapper.train_on_batch(x, y)
    assert_close(wrapper.model.trainable_variables, [expected])
    assert_same([values(wrapper.model.trainable_variables)[0][3:]], [w[3:]], bits=True)


@pytest.mark.parametrize("method", SAM_AND_SLOW)
def test_frozen_layers_are_neither_perturbed_nor_trained(method):
    def build():
        model = models.mlp()
        model.get_layer("first").trainable = False
        return model

    wrapper, copy = pair(build, method=method)
    frozen = values(wrapper.model.get_layer("first").variables)
    check_steps(wrapper, copy, batches(2), method=method)
    assert_same(wrapper.model.get_layer("first").variables, frozen, bits=True)


def float8():
    model = models.mlp()
    model.get_layer("first").quantize("float8")
    return model


@COMPILED  # On TensorFlow, Keras has float8 in compiled functions only.
@pytest.mark.parametrize("method", SAM_AND_SLOW)
def test_float8_scales_take_the_value_of_the_clean_pass(method):
    wrapper, copy = pair(float8, method=method)
    check_steps(wrapper, copy, batches(3), method=method)
    history = next(v for v in wrapper.model.trainable_variables if v.name == "inputs_amax_history")
    clean = np.abs(models.regression(seed=2)[0]).max()
    np.testing.assert_allclose(values([history])[0].max(), clean, rtol=1e-6)


@COMPILED
def test_float8_scales_are_not_in_the_norm():
    wrapper, copy = pair(float8, extra_logs="grad_norm")
    x, y = models.regression()
    gradient = models.loss_and_gradient(copy, x, y)[1]
    weights = [
        g
        for g, v in zip(gradient, copy.trainable_variables, strict=True)
        if v.name in ("kernel", "bias")
    ]
    assert len(weights) < len(gradient)
    norm = wrapper.train_on_batch(x, y, return_dict=True)["grad_norm"]
    np.testing.assert_allclose(norm, np.linalg.norm(models.flat(weights)), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_lora_trains_the_adapter_only(quantized):
    def build():
        model = models.mlp()
        layer = model.get_layer("first")
        if quantized:
            layer.quantize("int8")
        layer.enable_lora(2)
        return model

    wrapper, copy = pair(build)
    layer = wrapper.model.get_layer("first")
    kernel = values([layer._kernel])
    check_steps(wrapper, copy, batches(3))
    assert_same([layer._kernel], kernel, bits=True)
    assert any("lora" in v.path for v in wrapper.trainable_variables)
    assert np.any(values([layer.lora_kernel_b])[0] != 0)


@pytest.mark.parametrize("method", SAM_AND_SLOW)
def test_states_of_recurrent_layers_are_those_of_the_clean_pass(method):
    def build():
        keras.utils.set_random_seed(1)
        return keras.Sequential(
            [keras.Input(batch_shape=(4, 5, 3)), layers.LSTM(3, stateful=True), layers.Dense(1)]
        )

    wrapper, plain = pair(build, lambda: keras.optimizers.SGD(0.0), method=method)
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype("float32")
    for _ in range(2):
        wrapper.train_on_batch(x, x[:, 0, :1])
        plain.predict_on_batch(x)  # On PyTorch plain Keras cannot train a stateful layer.
    state = wrapper.model.layers[0].non_trainable_variables
    assert_close(state, plain.layers[0].non_trainable_variables)
    assert np.any(values(state)[0] != 0)


# Batches that are not finite


def adam():
    return keras.optimizers.Adam(0.01)


def with_bad_batch(bad=np.nan):
    x, y = models.regression(12)
    x = x.copy()
    x[5, 1] = bad
    return x, y


def full_net(seed=1):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((3,)),
            # No bias: its gradient would be rounding, which Adam makes a step of full size.
            layers.Dense(4, use_bias=False),
            layers.BatchNormalization(momentum=0.7),
            layers.Dropout(0.2, seed=5),
            layers.Dense(1),
        ]
    )


@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", THREE)
def test_a_batch_that_is_not_finite_is_skipped_as_a_whole(method, bad):
    wrapper, copy = pair(full_net, adam, method=method)
    x, y = with_bad_batch(bad)
    with pytest.warns(UserWarning, match="1 training steps were skipped"):
        history = wrapper.fit(x, y, batch_size=4, shuffle=False, verbose=0).history
    for start in (0, 8):
        models.step_by_hand(copy, x[start : start + 4], y[start : start + 4], method=method)
    assert_close(wrapper.model.variables, copy.variables)
    assert_close(wrapper.optimizer.variables, copy.optimizer.variables)
    assert int(wrapper.skipped_steps) == 1
    assert int(wrapper.optimizer.iterations) == 2
    assert not np.isfinite(history["loss"][0])


@pytest.mark.parametrize("jit_compile", ["auto", False])
def test_a_loss_that_is_not_finite_in_the_perturbed_pass_is_skipped(jit_compile):
    @keras.saving.register_keras_serializable(package="tests")
    class Cliff(layers.Layer):
        """Infinite where any activation is above 1."""

        def call(self, x):
            return ops.where(x > 1.0, ops.full_like(x, np.inf), x)

    inner = keras.Sequential(
        [keras.Input((1,)), layers.Dense(1, use_bias=False, kernel_initializer="ones"), Cliff()]
    )
    before = values(inner.variables)
    wrapper = SharpnessAwareModel(inner)
    wrapper.compile("sgd", "mse", jit_compile=jit_compile)
    x = np.ones((4, 1), "float32")
    # Downhill is up here, so the adversary goes to w = 1.05, over the cliff.
    loss = wrapper.train_on_batch(x, 0 * x)
    assert np.isfinite(np.ravel(loss)[0])
    assert int(wrapper.skipped_steps) == 1
    assert_same(inner.variables, before, bits=True)


def test_terminate_on_nan_stops_at_the_first_bad_batch():
    wrapper, _ = pair(models.mlp)
    x, y = with_bad_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper.fit(
            x,
            y,
            batch_size=4,
            epochs=3,
            shuffle=False,
            verbose=0,
            callbacks=[keras.callbacks.TerminateOnNaN()],
        )
    assert int(wrapper.optimizer.iterations) == 1
    assert int(wrapper.skipped_steps) == 1


def test_finite_training_does_not_warn():
    wrapper, _ = pair(models.mlp)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*skipped")
        wrapper.fit(*models.regression(), verbose=0)
    assert int(wrapper.skipped_steps) == 0


# The base optimizer receives the direction in place of the gradient


def sgd(**kwargs):
    return lambda: keras.optimizers.SGD(0.1, momentum=0.9, **kwargs)


OPTIMIZERS = {
    "momentum": sgd(),
    "gradient_accumulation": sgd(gradient_accumulation_steps=2),
    "clipnorm": sgd(clipnorm=0.1),
    "global_clipnorm": sgd(global_clipnorm=0.1),
    "clipvalue": sgd(clipvalue=0.05),
    "weight_decay": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "ema": sgd(use_ema=True, ema_momentum=0.9),
    "ema_overwrite": sgd(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2),
    "schedule": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_base_optimizer_receives_the_direction(name):
    wrapper, copy = pair(models.mlp, OPTIMIZERS[name])
    check_steps(wrapper, copy, batches(4))


@pytest.mark.parametrize("method", ["gsam", "bsam"])
def test_clipping_sees_the_final_direction(method):
    wrapper, copy = pair(models.mlp, OPTIMIZERS["global_clipnorm"], method=method)
    check_steps(wrapper, copy, batches(2), method=method)


def test_the_averaged_weights_replace_the_others_after_fit():
    wrapper, copy = pair(models.mlp, OPTIMIZERS["ema"])
    x, y = models.regression(12)
    wrapper.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    for start in (0, 4, 8):
        models.step_by_hand(copy, x[start : start + 4], y[start : start + 4])
    copy.optimizer.finalize_variable_values(copy.trainable_variables)
    assert_close(wrapper.model.variables, copy.variables)


def test_constraints_hold_after_each_step():
    def build():
        return models.linear(kernel_constraint=keras.constraints.MaxNorm(0.1))

    wrapper, copy = pair(build)
    check_steps(wrapper, copy, batches(2))
    np.testing.assert_allclose(np.linalg.norm(flat_weights(wrapper.model)), 0.1, rtol=1e-4)


# Which weights are perturbed


RULES = {
    "no_bias_no_norm": ("no_bias_no_norm", lambda v: v.name == "kernel"),
    "norm_only": ("norm_only", lambda v: v.name in ("gamma", "beta")),
    "callable": (lambda v: v.path.endswith("first/kernel"),) * 2,
}


@pytest.mark.parametrize("method", SAM_AND_SLOW)
@pytest.mark.parametrize("rule", RULES)
def test_only_the_selected_weights_are_perturbed_and_all_are_trained(rule, method):
    def build():
        model = models.batchnorm_net()
        # Off their symmetric start, where some gradients vanish.
        for v in model.trainable_variables:
            v.assign(v + 0.1 * keras.random.normal(v.shape, seed=3))
        return model

    perturb, takes_part = RULES[rule]
    wrapper, copy = pair(build, method=method, perturb=perturb)
    before = values(wrapper.model.trainable_variables)
    check_steps(wrapper, copy, batches(1), method=method, takes_part=takes_part)
    moved = [
        np.any(np.abs(a - b) > 1e-6)
        for a, b in zip(values(wrapper.model.trainable_variables), before, strict=True)
    ]
    # The bias before a BatchNormalization has no influence on the loss.
    names = [v.path for v in wrapper.model.trainable_variables]
    assert [name for name, m in zip(names, moved, strict=True) if not m] in (
        [],
        [name for name in names if name.endswith("first/bias")],
    )


# Logs


def test_extra_logs_equal_those_by_hand():
    names = ["perturbed_loss", "sharpness", "grad_norm", "grad_cosine", "skipped_steps"]
    wrapper, _ = pair(models.linear, lambda: keras.optimizers.SGD(0.0), extra_logs=names)
    x, y = models.regression(12)
    logs = wrapper.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
    w = flat_weights(wrapper.model)

    def by_hand(x, y):
        def loss(w):
            return np.mean((x @ w - y[:, 0]) ** 2)

        def gradient(w):
            return 2 / len(x) * x.T.astype("float64") @ (x @ w - y[:, 0])

        g = gradient(w)
        w_adv = w + 0.05 * g / np.linalg.norm(g)
        g_adv = gradient(w_adv)
        cosine = g @ g_adv / np.linalg.norm(g) / np.linalg.norm(g_adv)
        return [loss(w_adv), loss(w_adv) - loss(w), np.linalg.norm(g), cosine]

    # The mean over examples: of 8 in the first batch and 4 in the second.
    expected = 2 / 3 * np.array(by_hand(x[:8], y[:8])) + 1 / 3 * np.array(by_hand(x[8:], y[8:]))
    assert_close([logs[name][0] for name in names[:4]], expected)
    assert logs["skipped_steps"] == [0]


def test_rho_is_logged_as_it_was_in_the_step():
    method = methods.SAM(rho=lambda step: 0.1 * (ops.cast(step, "float32") + 1))
    wrapper, _ = pair(models.linear, method=method)
    x, y = models.regression()
    seen = [wrapper.train_on_batch(x, y, return_dict=True)["rho"] for _ in range(3)]
    assert_close(seen, [0.1, 0.2, 0.3])
    assert "rho" not in wrapper.evaluate(x, y, verbose=0, return_dict=True)


def test_the_package_root_has_the_wrapper():
    assert keras_sharp.SharpnessAwareModel is SharpnessAwareModel


@pytest.mark.parametrize(
    "jit_compile",
    # torch.compile has nothing to do with it.
    [False, pytest.param(True, marks=models.on("tensorflow", "jax"))],
)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_the_gradient_of_an_embedding_is_summed_by_row(num_micro_batches, jit_compile):
    """Of a token that occurs twice, Adam squares the sum; plain Keras on TensorFlow does not."""
    model = keras.Sequential([keras.Input((2,), dtype="int32"), keras.layers.Embedding(4, 1)])
    (start,) = model.get_weights()
    x, y = np.array([[1, 1], [1, 2]]), np.array([[[3.0], [5.0]], [[-1.0], [2.0]]], "float32")
    wrapper = keras_sharp.SharpnessAwareModel(model, None, num_micro_batches)
    wrapper.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=jit_compile)
    wrapper.train_on_batch(x, y)
    gradient = np.zeros_like(start)
    np.add.at(gradient, x, 2 * (start[x] - y) / y.size)
    _, _, moment, velocity = values(wrapper.optimizer.variables)
    np.testing.assert_allclose(moment, 0.1 * gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(velocity, 0.001 * gradient**2, rtol=1e-4, atol=1e-9)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere each gradient has a known shape")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_dense_layer_on_sequences_of_an_unknown_batch_size(jit_compile):
    import tensorflow as tf

    x, y = np.ones((6, 3, 2), "float32"), np.ones((6, 3, 1), "float32")
    wrapper = SharpnessAwareModel(keras.Sequential([keras.Input((3, 2)), layers.Dense(1)]))
    wrapper.compile("sgd", "mse", jit_compile=jit_compile)
    logs = wrapper.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(4), verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    assert int(wrapper.optimizer.iterations) == 2

"""The loss over fixed data as a function of the weights: right, repeatable, and free of traces."""

import logging

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sharp
from keras_sharp.surface import LossSurface
from tests import models
from tests.models import BACKEND

# TensorFlow has this to say about data sets while nothing else is compiled.
pytestmark = pytest.mark.filterwarnings("ignore:Even though the `tf.config")


@pytest.fixture(params=models.MODES, autouse=True)
def mode(request):
    with models.running(request.param):
        yield request.param


def compiled(model, loss="mse", **kwargs):
    model.compile("sgd", loss, **kwargs)
    return model


def evaluate(model, x, y=None, sample_weight=None):
    """The loss that Keras reports for all data in one batch."""
    n = len(keras.tree.flatten(x)[0])
    logs = model.evaluate(
        x, y, batch_size=n, sample_weight=sample_weight, verbose=0, return_dict=True
    )
    return logs["loss"]


def regularized(**kwargs):
    return models.linear(kernel_regularizer=keras.regularizers.L2(0.1), **kwargs)


def masked():
    keras.utils.set_random_seed(0)
    inner = [keras.Input((4, 3)), layers.Masking(), layers.Dense(1)]
    return keras.Sequential(inner)


# The value


SMALL = models.regression(n=11)
NESTED = (
    {"a": SMALL[0], "b": {"c": SMALL[0][:, :2]}},
    {"small": SMALL[1], "big": SMALL[0][:, :2]},
)
CASES = {
    "mlp": lambda: (compiled(models.mlp()), *SMALL),
    "statistics": lambda: (compiled(models.batchnorm_net(), metrics=["mae"]), *SMALL),
    "dropout": lambda: (compiled(models.dropout_net()), *SMALL),
    "regularizer": lambda: (compiled(regularized()), *SMALL),
    "two outputs": lambda: (
        compiled(models.two_in_two_out(), {"small": "mse", "big": "mae"}, loss_weights=[2.0, 0.5]),
        *NESTED,
    ),
    "own loss": lambda: (compiled(built(models.Autoencoder()), None), SMALL[0]),
    "old own loss": lambda: (compiled(built(models.OldAutoencoder()), None), SMALL[0]),
}


def built(model):
    model(np.zeros((1, 3), "float32"))
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_evaluate_however_the_data_are_split(case):
    model, *data = CASES[case]()
    expected = evaluate(model, *data)
    for batch_size in (11, 4):
        surface = LossSurface(model, *data, batch_size=batch_size)
        loss, gradient = surface.loss_and_gradient(surface.weights)
        np.testing.assert_allclose(surface.loss(surface.weights), expected, rtol=1e-5)
        np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
        if batch_size == 11:
            whole = gradient
        models.assert_close(gradient, whole, rtol=1e-4)
    assert surface.num_examples == 11


@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "mean", "sum", "mean_with_sample_weight"]
)
@pytest.mark.parametrize("weighted", [True, False])
def test_each_reduction_of_the_loss_is_put_together_as_it_must_be(reduction, weighted):
    model = compiled(models.mlp(), keras.losses.MeanSquaredError(reduction=reduction))
    x, y = SMALL
    sample_weight = np.linspace(0.0, 2.0, 11, dtype="float32") if weighted else None
    expected = evaluate(model, x, y, sample_weight)
    for batch_size in (11, 4):
        surface = LossSurface(model, x, y, sample_weight, batch_size=batch_size)
        np.testing.assert_allclose(surface.loss(surface.weights), expected, rtol=1e-5)


def test_many_batches_add_no_rounding_of_their_own():
    """Losses in float32, of which the last are small beside the first."""
    model = compiled(models.linear())
    x = np.ones((150, 3), "float32")
    y = np.where(np.arange(150) < 10, 3e3, 1e-2)[:, None].astype("float32")
    surface = LossSurface(model, x, y, batch_size=1)
    w = surface.weights
    losses = surface.scalars(lambda batch: [surface.batch_loss(w, surface.state, batch)[0]])
    for loss in (surface.loss(w), surface.loss_and_gradient(w).loss):
        assert loss == pytest.approx(np.mean(losses), rel=1e-14)
        assert isinstance(loss, float)


def test_what_rounding_adds_is_known_to_a_factor():
    """Measured against float64, at random weights: regression, with a batch and with many."""
    rng = np.random.default_rng(0)
    model = compiled(models.linear())
    x = rng.normal(size=(64, 3)).astype("float32")
    for size, batch_size in [(1.0, 64), (1e3, 64), (1e3, 4)]:
        y = (size * rng.normal(size=(64, 1))).astype("float32")
        surface, ratios = LossSurface(model, x, y, batch_size=batch_size), []
        for _ in range(30):
            w = rng.normal(size=(3, 1)).astype("float32")
            exact = np.mean((x.astype("float64") @ w - y) ** 2)
            ratios.append((surface.loss([ops.convert_to_tensor(w)]) - exact) / surface.rounding)
        # About a standard deviation: 1.14 of it was seen with the sums of XLA, less elsewhere.
        assert 0.02 < np.sqrt(np.mean(np.square(ratios))) < 2.0


def test_the_gradient_is_that_of_the_loss():
    model = compiled(models.mlp())
    _, expected = models.loss_and_gradient(model, *SMALL)
    surface = LossSurface(model, *SMALL, batch_size=4)
    models.assert_close(surface.loss_and_gradient(surface.weights).gradient, expected)


def test_the_slope_is_the_gradient_along_a_direction():
    model = compiled(models.mlp())
    _, gradient = models.loss_and_gradient(model, *SMALL)
    surface = LossSurface(model, *SMALL, batch_size=4)
    direction = [np.sin(np.arange(g.size)).reshape(g.shape) for g in map(np.asarray, gradient)]
    expected = sum(np.sum(g * d) for g, d in zip(gradient, direction, strict=True))
    tensors = [ops.convert_to_tensor(d, "float32") for d in direction]
    assert surface.slope(surface.weights, tensors) == pytest.approx(expected, rel=1e-4)


def test_the_loss_at_other_weights_is_that_of_a_model_with_those_weights():
    model, other = models.twins(models.batchnorm_net)
    compiled(model), compiled(other)
    shifted = [ops.convert_to_tensor(v + 0.1) for v in models.values(model.trainable_variables)]
    models.assign(other.trainable_variables, shifted)
    surface = LossSurface(model, *SMALL)
    np.testing.assert_allclose(surface.loss(shifted), evaluate(other, *SMALL), rtol=1e-5)


def test_the_weights_and_the_state_are_those_of_now():
    model = compiled(models.batchnorm_net())
    surface = LossSurface(model, *SMALL)
    before = surface.loss(surface.weights)
    w, state = surface.weights, surface.state
    model.fit(*SMALL, epochs=2, verbose=0)
    np.testing.assert_allclose(surface.loss(surface.weights), evaluate(model, *SMALL), rtol=1e-5)
    assert surface.loss(surface.weights) != before
    assert surface.loss(w, state) == before


def test_of_a_wrapped_model_it_is_the_loss_of_the_model_inside():
    inner = models.batchnorm_net()
    wrapper = keras_sharp.SharpnessAwareModel(inner)
    wrapper.compile("sgd", "mse")
    wrapper.fit(*SMALL, verbose=0)
    surface = LossSurface(wrapper, *SMALL)
    assert surface.model is inner
    np.testing.assert_allclose(surface.loss(surface.weights), evaluate(wrapper, *SMALL), rtol=1e-5)


def test_a_model_with_an_attribute_called_model_is_not_taken_for_a_wrapper():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.model = models.mlp()

        def call(self, x):
            return 2.0 * self.model(x)

    own = compiled(Own())
    own(SMALL[0])
    surface = LossSurface(own, *SMALL)
    np.testing.assert_allclose(surface.loss(surface.weights), evaluate(own, *SMALL), rtol=1e-5)


# Some of the variables


def test_variables_restrict_the_weights():
    model = compiled(models.mlp())
    _, expected = models.loss_and_gradient(model, *SMALL)
    last = model.layers[-1].trainable_variables
    surface = LossSurface(model, *SMALL, variables=last[::-1])
    assert [v is w for v, w in zip(surface.variables, last, strict=True)] == [True, True]
    models.assert_close(surface.loss_and_gradient(surface.weights).gradient, expected[2:])


def test_frozen_weights_are_not_among_them():
    model = models.mlp()
    model.layers[0].trainable = False
    surface = LossSurface(compiled(model), *SMALL)
    assert len(surface.variables) == 2
    np.testing.assert_allclose(surface.loss(surface.weights), evaluate(model, *SMALL), rtol=1e-5)


def test_scales_of_float8_layers_which_have_no_gradient_are_not_among_them():
    model = models.mlp()
    scale = model.layers[0].bias
    scale.overwrite_with_gradient = True
    surface = LossSurface(compiled(model), *SMALL)
    assert len(surface.variables) == 3
    assert all(v is not scale for v in surface.variables)


# The data


class Batches(keras.utils.PyDataset):
    """Four examples at a time; it counts how often it is read."""

    def __init__(self, x, y, *extra, **kwargs):
        super().__init__(**kwargs)
        self.arrays, self.reads = (x, y, *extra), 0

    def __len__(self):
        return -(-len(self.arrays[0]) // 4)

    def __getitem__(self, i):
        self.reads += 1
        return tuple(a[4 * i : 4 * i + 4] for a in self.arrays)


def tf_dataset(*arrays):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays).batch(4)


def torch_loader(*arrays):
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(*map(torch.tensor, arrays))
    return torch.utils.data.DataLoader(data, batch_size=4)


def unknown_length(*arrays):
    return tf_dataset(*arrays).filter(lambda *_: True)


@pytest.mark.parametrize("kind", [Batches, tf_dataset, torch_loader, unknown_length])
@pytest.mark.parametrize("weighted", [True, False])
def test_data_sets_give_what_arrays_give(kind, weighted):
    model = compiled(models.mlp())
    arrays = (*SMALL, np.linspace(0.5, 2.0, 11, dtype="float32")) if weighted else SMALL
    expected = LossSurface(model, *arrays)
    surface = LossSurface(model, kind(*arrays))
    w = surface.weights
    for _ in range(2):  # They are read anew each time.
        np.testing.assert_allclose(surface.loss(w), expected.loss(w), rtol=1e-5)
    models.assert_close(
        surface.loss_and_gradient(w).gradient, expected.loss_and_gradient(w).gradient
    )
    assert surface.num_batches == 3


def test_data_sets_are_read_batch_by_batch_and_not_kept():
    data = Batches(*SMALL)
    surface = LossSurface(compiled(models.mlp()), data)
    surface.loss(surface.weights)
    surface.loss_and_gradient(surface.weights)
    assert data.reads == 6


def test_a_data_set_with_workers_is_read_whole_each_time():
    surface = LossSurface(compiled(models.mlp()), Batches(*SMALL, workers=2))
    w = surface.weights
    assert surface.loss(w) == surface.loss(w)
    assert surface.num_batches == 3


# No traces


def test_nothing_of_the_model_changes():
    model = compiled(models.batchnorm_net(), metrics=["mae"])
    model.fit(*SMALL, verbose=0)
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    before = models.values(variables)
    surface = LossSurface(model, *SMALL, batch_size=4)
    surface.check()
    surface.loss_and_gradient(surface.weights)
    models.assert_same(models.values(variables), before, bits=True)
    assert model.trainable
    assert all(layer.trainable for layer in model.layers)


def test_trackers_of_the_losses_of_several_outputs_do_not_move():
    model = compiled(models.two_in_two_out(), {"small": "mse", "big": "mae"})
    surface = LossSurface(model, *NESTED)
    surface.loss(surface.weights)
    assert all(float(ops.sum(v)) == 0.0 for v in model.metrics_variables)


@models.on("tensorflow", "jax")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compiled"], indirect=True)
def test_it_compiles_once_per_shape_of_a_batch(mode):
    traces = []

    class Counting(layers.Layer):
        def call(self, x):
            traces.append(x.shape)
            return x

    model = compiled(keras.Sequential([keras.Input((3,)), Counting(), layers.Dense(1)]))
    surface = LossSurface(model, *SMALL, batch_size=4)
    surface.loss(surface.weights)
    traces.clear()
    for _ in range(3):
        model.fit(*SMALL, verbose=0)
        traces.clear()
        surface.loss(surface.weights)
        assert not traces


# Refused


def noisy(seeded):
    class AlwaysNoisy(models.Noise):
        def call(self, x):
            return super().call(x, training=True)

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

    return keras.Sequential([keras.Input((3,)), AlwaysNoisy(seeded=seeded), layers.Dense(1)])


@pytest.mark.parametrize("seeded", [True, False] if BACKEND != "jax" else [True])
def test_random_numbers_in_the_loss_are_refused(seeded):
    with pytest.raises(ValueError, match=r"not deterministic.*training=False"):
        LossSurface(compiled(noisy(seeded)), *SMALL).check()


def test_data_that_change_are_refused():
    data = Batches(*SMALL)
    data.arrays = (_Growing(SMALL[0]), SMALL[1])
    with pytest.raises(ValueError, match="not deterministic"):
        LossSurface(compiled(models.mlp()), data).check()


class _Growing:
    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def __getitem__(self, part):
        self.array = self.array + 0.1
        return self.array[part]


def test_what_is_deterministic_passes_the_check():
    model = compiled(models.dropout_net(dropout_seed=3))
    LossSurface(model, *SMALL, batch_size=4).check()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_refused(bad):
    x, y = SMALL
    with pytest.raises(ValueError, match=r"not finite. Received: loss=.*Look for NaN"):
        LossSurface(compiled(models.mlp()), np.full_like(x, bad), np.full_like(y, bad)).check()


def unbuilt():
    return compiled(models.Subclassed())


def frozen():
    model = models.mlp()
    model.trainable = False
    return compiled(model)


BAD_MODELS = {
    "not compiled": (models.mlp, r"model.compiled=False.*Call `compile`"),
    "not built": (unbuilt, r"model.built=False"),
    "no weights": (frozen, r"no trainable weights.*trainable = True"),
    "no model": (lambda: "mlp", r"Expected a compiled keras.Model. Received: 'mlp'"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_without_a_loss_are_refused(name):
    build, message = BAD_MODELS[name]
    with pytest.raises(ValueError, match=message):
        LossSurface(build(), *SMALL)


BAD_DATA = {
    "empty": (lambda x, y: (x[:0], y[:0]), r"no data"),
    "none": (lambda x, y: (None,), r"no data"),
    "empty list": (lambda x, y: ([],), r"no data"),
    "generator": (lambda x, y: (iter([(x, y)]),), r"read only once.*Expected arrays"),
    "endless tf.data": (lambda x, y: (tf_dataset(x, y).repeat(),), r"no end.*Use `take`"),
    "lengths": (lambda x, y: (x, y[:3]), r"cardinality"),
    "y twice": (lambda x, y: (Batches(x, y), y), r"should not be passed"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_cannot_be_averaged_over_are_refused(name):
    change, message = BAD_DATA[name]
    with pytest.raises(ValueError, match=message):
        LossSurface(compiled(models.mlp()), *change(*SMALL))


def test_an_endless_py_dataset_is_refused():
    class Endless(Batches):
        num_batches = None

    with pytest.raises(ValueError, match="no end"):
        LossSurface(compiled(models.mlp()), Endless(*SMALL))


def test_a_data_set_without_batches_is_refused():
    surface = LossSurface(compiled(models.mlp()), tf_dataset(*SMALL).take(0))
    with pytest.raises(ValueError, match="yields no batch"):
        surface.loss(surface.weights)


@pytest.mark.parametrize("batch_size", [0, 2.0, True, None])
def test_batch_sizes_are_integers(batch_size):
    with pytest.raises(ValueError, match=r"`batch_size` must be an integer >= 1\. Received"):
        LossSurface(compiled(models.mlp()), *SMALL, batch_size=batch_size)


@pytest.mark.parametrize("variables", ["foreign", "none at all"])
def test_variables_of_another_model_are_refused(variables):
    foreign = models.linear().trainable_variables if variables == "foreign" else []
    with pytest.raises(ValueError, match="`variables` must list trainable variables of the model"):
        LossSurface(compiled(models.mlp()), *SMALL, variables=foreign)


def test_data_that_do_not_fit_the_model_are_refused():
    wrong = models.regression(features=7)
    surface = LossSurface(compiled(models.mlp()), *wrong)
    with pytest.raises(ValueError, match=r"cannot be computed on these data.*8, 7.*The cause"):
        surface.loss(surface.weights)


def test_a_loss_that_is_not_one_number_is_refused():
    model = compiled(models.mlp(), keras.losses.MeanSquaredError(reduction="none"))
    surface = LossSurface(model, *SMALL)
    with pytest.raises(ValueError, match="must be one number"):
        surface.loss(surface.weights)


MSE = keras.losses.MeanSquaredError
DEPENDS_ON_SPLIT = {
    "reductions": lambda: (
        compiled(models.two_in_two_out(), {"small": MSE(reduction="sum"), "big": "mse"}),
        *NESTED,
    ),
    "weights per output": lambda: (
        compiled(models.two_in_two_out(), MSE(reduction="mean_with_sample_weight")),
        *NESTED,
        {"small": np.ones(11), "big": np.arange(11.0)},
    ),
    "sum": lambda: (compiled(regularized(), MSE(reduction="sum")), *SMALL),
    "mask": lambda: (compiled(masked()), np.ones((11, 4, 3)), np.ones((11, 4, 1))),
    "activity": lambda: (
        compiled(models.linear(activity_regularizer=keras.regularizers.L2(0.1))),
        *SMALL,
    ),
}


@pytest.mark.parametrize("case", DEPENDS_ON_SPLIT)
def test_a_loss_that_depends_on_the_split_is_refused_with_several_batches(case):
    model, *data = DEPENDS_ON_SPLIT[case]()
    one = LossSurface(model, *data)
    np.testing.assert_allclose(one.loss(one.weights), evaluate(model, *data), rtol=1e-5)
    several = LossSurface(model, *data, batch_size=4)
    with pytest.raises(ValueError, match=r"depends on how the data are split.*set `batch_size`"):
        several.loss(several.weights)


@models.on("tensorflow")  # It is a warning of TensorFlow.
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compiled"], indirect=True)
def test_many_surfaces_are_not_taken_for_one_that_is_traced_too_often(mode):
    import tensorflow as tf

    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    tf.get_logger().addHandler(handler)
    try:
        for _ in range(6):
            surface = LossSurface(compiled(models.mlp()), *SMALL)
            surface.loss(surface.weights)
    finally:
        tf.get_logger().removeHandler(handler)
    assert not [message for message in messages if "retracing" in message]

"""Slices of the loss: a linear model under mean squared error is a parabola in every direction."""

import re
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import pytest

from keras_sharp import SharpnessAwareModel, landscape
from keras_sharp.surface import LossSurface
from tests import models
from tests.models import assert_same, values

AS_WRITTEN = pytest.mark.usefixtures("as_written")


def setting(build=models.linear, **kwargs):
    model = build(**kwargs)
    model.compile("sgd", "mse")
    return model, *models.regression()


def parabola(model, x, y):
    """The loss of a linear model in float64, as a function of its weights."""
    w = values(model.trainable_variables)[0].astype("float64")
    return w, lambda v: np.mean((x @ v - y) ** 2)


# Values


@AS_WRITTEN
def test_the_loss_along_a_line():
    model, x, y = setting()
    w, loss = parabola(model, x, y)
    d = np.array([[1.0], [-2.0], [0.5]])
    for direction in ([d], np.ravel(d)):
        line = landscape.line(model, x, y, direction=direction, span=(-0.5, 1), num_points=4)
        np.testing.assert_allclose(line.coordinates, [-0.5, 0, 0.5, 1])
        np.testing.assert_allclose(line.losses, [loss(w + t * d) for t in line.coordinates], 1e-5)


@AS_WRITTEN
def test_the_loss_in_a_plane():
    model, x, y = setting()
    w, loss = parabola(model, x, y)
    d = np.eye(3)[:, :2]
    for directions in (d, [d[:, 0], d[:, 1]], ([d[:, :1]], [d[:, 1:]])):
        plane = landscape.plane(model, x, y, directions=directions, span=(-1, 2), num_points=3)
        for i, s in enumerate(plane.first):
            for j, t in enumerate(plane.second):
                expected = loss(w + s * d[:, :1] + t * d[:, 1:])
                assert plane.losses[i, j] == pytest.approx(expected, rel=1e-5)
    assert plane.losses.shape == (3, 3)


@AS_WRITTEN
def test_between_two_models_the_ends_are_the_models():
    """With BatchNormalization, whose statistics are part of the models."""
    one, x, y = setting(models.batchnorm_net)
    other, _, _ = setting(models.batchnorm_net, seed=2)
    for model in (one, other):
        model.fit(x, y, epochs=3, verbose=0)
    line = landscape.between(one, other, x, y, num_points=3)
    expected = [model.evaluate(x, y, verbose=0) for model in (one, other)]
    np.testing.assert_allclose(line.losses[[0, 2]], expected, rtol=1e-5)
    middle, _, _ = setting(models.batchnorm_net)
    halves = [(a + b) / 2 for a, b in zip(one.get_weights(), other.get_weights(), strict=True)]
    middle.set_weights(halves)
    assert line.losses[1] == pytest.approx(middle.evaluate(x, y, verbose=0), rel=1e-5)


@AS_WRITTEN
def test_a_slice_is_of_the_loss_that_evaluate_reports():
    model, x, y = setting(models.dropout_net)
    weights = np.linspace(0, 2, 8).astype("float32")
    line = landscape.line(model, x, y, weights, num_points=3, batch_size=3)
    expected = model.evaluate(x, y, sample_weight=weights, verbose=0)
    assert line.losses[1] == pytest.approx(expected, rel=1e-5)


@AS_WRITTEN
def test_a_slice_leaves_the_model_as_it_is_and_sees_through_the_wrapper():
    inner = models.batchnorm_net()
    model = SharpnessAwareModel(inner, "sam")
    model.compile("sgd", "mse", metrics=["mae"])
    x, y = models.regression()
    model.train_on_batch(x, y)
    state = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    before = values(state)
    wrapped = landscape.line(model, x, y, num_points=3)
    plain = landscape.line(inner, x, y, num_points=3)
    from_surface = landscape.line(LossSurface(model, x, y), num_points=3)
    landscape.plane(model, x, y, num_points=2)
    landscape.between(model, inner, x, y, num_points=2)
    np.testing.assert_array_equal(wrapped.losses, plain.losses)
    np.testing.assert_array_equal(wrapped.losses, from_surface.losses)
    assert_same(state, before, bits=True)


@AS_WRITTEN
def test_a_loss_that_overflows_far_away_leaves_the_rest_of_the_slice():
    model, x, y = setting()
    line = landscape.line(model, x, y, direction=np.full(3, 1e30), num_points=3)
    assert np.isfinite(line.losses).tolist() == [False, True, False]


# Random directions


def convolution():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            keras.layers.Conv2D(3, 2, bias_initializer="ones"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(2, bias_initializer="ones"),
        ]
    )


def test_each_filter_of_a_random_direction_is_as_long_as_its_weights():
    model = convolution()
    direction = landscape.random_direction(model)
    lengths = [np.linalg.norm(d.reshape(-1, d.shape[-1]), axis=0) for d in direction]
    weights = values(model.trainable_variables)
    kernels = [0, 4]
    for i, (length, w) in enumerate(zip(lengths, weights, strict=True)):
        expected = np.linalg.norm(w.reshape(-1, w.shape[-1]), axis=0)
        np.testing.assert_allclose(length, expected if i in kernels else 0, rtol=1e-5)
    assert [d.shape for d in direction] == [w.shape for w in weights]


def test_a_filter_of_zeros_has_a_direction_of_zeros():
    model = models.linear(kernel_initializer="zeros", outputs=2)
    np.testing.assert_array_equal(landscape.random_direction(model)[0], np.zeros((3, 2)))


def test_a_seed_gives_the_same_direction_again():
    model = convolution()
    one, again, other = (landscape.random_direction(model, seed=s)[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)


@AS_WRITTEN
def test_random_slices_follow_their_seed():
    model, x, y = setting(models.mlp)
    direction = landscape.random_direction(model, seed=3)
    given = landscape.line(model, x, y, direction=direction, num_points=3)
    drawn = landscape.line(model, x, y, num_points=3, seed=3)
    np.testing.assert_array_equal(given.losses, drawn.losses)
    plane = landscape.plane(model, x, y, num_points=3, seed=3)
    np.testing.assert_allclose(plane.losses[:, 1], drawn.losses, rtol=1e-6)
    assert np.any(np.abs(plane.losses - plane.losses.T) > 1e-3)  # The second is another one.


@AS_WRITTEN
def test_a_filter_normalised_slice_does_not_depend_on_the_scale_of_the_layers():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, "relu", use_bias=False),
            keras.layers.Dense(1, use_bias=False),
        ]
    )
    model.compile("sgd", "mse")
    x, y = models.regression()
    before = landscape.line(model, x, y, num_points=5).losses
    first, second = model.trainable_variables
    first.assign(first * 10.0)
    second.assign(second / 10.0)
    np.testing.assert_allclose(landscape.line(model, x, y, num_points=5).losses, before, rtol=1e-4)


# What a filter is, by the layer: all that makes one output


def einsum(equation, output, **kwargs):
    return lambda: keras.layers.EinsumDense(equation, output, **kwargs)


class Filters(NamedTuple):
    """A layer without bias, and what scaling its filters by `c` does to its output."""

    make: Callable
    shape: tuple  # of the input, without the batch
    axes: tuple = (-1,)  # of the filters
    weight: str = "kernel"
    scaled: Callable = lambda y, c: y * np.ravel(c)


def without_bias(cls, *args, **kwargs):
    return lambda: cls(*args, use_bias=False, **kwargs)


L = keras.layers
LINEAR = {
    "Dense": Filters(without_bias(L.Dense, 4), (3,)),
    "Conv1D": Filters(without_bias(L.Conv1D, 4, 2), (4, 3)),
    "Conv2D": Filters(without_bias(L.Conv2D, 6, 2, groups=3), (4, 4, 3)),
    "Conv3D": Filters(without_bias(L.Conv3D, 3, 2), (3, 3, 3, 2)),
    "DepthwiseConv1D": Filters(
        without_bias(L.DepthwiseConv1D, 2, depth_multiplier=2), (4, 3), (-2, -1)
    ),
    "DepthwiseConv2D": Filters(
        without_bias(L.DepthwiseConv2D, 2, depth_multiplier=2), (4, 4, 3), (-2, -1)
    ),
    "SeparableConv1D": Filters(
        without_bias(L.SeparableConv1D, 4, 2), (4, 3), weight="pointwise_kernel"
    ),
    "SeparableConv2D": Filters(
        without_bias(L.SeparableConv2D, 4, 2), (4, 4, 3), weight="pointwise_kernel"
    ),
    "Conv1DTranspose": Filters(without_bias(L.Conv1DTranspose, 4, 2), (4, 3), (-2,)),
    "Conv2DTranspose": Filters(without_bias(L.Conv2DTranspose, 4, 2), (4, 4, 3), (-2,)),
    "Conv3DTranspose": Filters(without_bias(L.Conv3DTranspose, 3, 2), (3, 3, 3, 2), (-2,)),
    # Into heads, out of heads, one kernel for each position.
    "EinsumDense": Filters(
        einsum("abc,cde->abde", (None, 2, 3)), (4, 5), (-2, -1), scaled=lambda y, c: y * c
    ),
    "EinsumDense out": Filters(einsum("abcd,cde->abe", (None, 4)), (3, 2, 5)),
    "EinsumDense each": Filters(
        einsum("abc,bcd->abd", (3, 4)), (3, 2), (0, -1), scaled=lambda y, c: y * c[:, 0]
    ),
    "EinsumDense dots": Filters(einsum("...x,yx->...y", 4), (2, 3), (0,)),
    "Embedding": Filters(
        lambda: L.Embedding(5, 3), (4,), (0,), "embeddings", lambda y, c: y * c[TOKENS % 5]
    ),
    "ReversibleEmbedding": Filters(
        lambda: L.ReversibleEmbedding(5, 3),
        (4,),
        (0,),
        "embeddings",
        lambda y, c: y * c[TOKENS % 5],
    ),
}
TOKENS = np.arange(8).reshape(2, 4)

#: Layers whose kernels have their filters last: one for each unit of each gate.
RECURRENT = ["SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"]
RECURRENT += ["SimpleRNNCell", "LSTMCell", "GRUCell"]

#: Layers that have kernels only in other layers, which are asked themselves.
COMPOSED = ["MultiHeadAttention", "GroupQueryAttention", "RNN"]
COMPOSED += ["StackedRNNCells", "Bidirectional", "TimeDistributed", "Wrapper"]
COMPOSED += ["SpectralNormalization", "Pipeline"]

#: Layers without a trainable weight of two axes, but for what counts as a scale.
WITHOUT = """
Activation ActivityRegularization AdaptiveAveragePooling AdaptiveMaxPooling Add
AdditiveAttention AlphaDropout Attention AugMix AutoContrast Average AveragePooling AvgPool
BatchNormalization CategoryEncoding CenterCrop Concatenate
ContrastLimitedAdaptiveHistogramEqualization Cropping CutMix Discretization Dot Dropout ELU
Equalization Flatten FlaxLayer GaussianDropout GaussianNoise GlobalAveragePooling
GlobalAvgPool GlobalMaxPool GlobalMaxPooling GroupNormalization HashedCrossing Hashing
Identity InputLayer IntegerLookup JaxLayer Lambda Layer LayerNormalization LeakyReLU Masking
MaxNumBoundingBoxes MaxPool MaxPooling Maximum MelSpectrogram Minimum MixUp Multiply
Normalization PReLU Permute RMSNormalization RandAugment RandomBrightness
RandomColorDegeneration RandomColorJitter RandomContrast RandomCrop RandomElasticTransform
RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHeight RandomHue
RandomInvert RandomPerspective RandomPosterization RandomRotation RandomSaturation
RandomSharpness RandomShear RandomTranslation RandomWidth RandomZoom ReLU RepeatVector
Rescaling Reshape Resizing STFTSpectrogram Softmax Solarization SpatialDropout StringLookup
Subtract TFSMLayer TextVectorization TorchModuleWrapper UnitNormalization UpSampling
ZeroPadding
""".split()  # noqa: SIM905


def test_every_layer_of_keras_is_classified():
    """A new one belongs into one of the tables above, and perhaps into that of `landscape`."""
    known = {re.sub(r"( .*)$", "", name) for name in LINEAR} | {*RECURRENT, *COMPOSED, *WITHOUT}
    found = {
        name
        for name, value in vars(keras.layers).items()
        if isinstance(value, type) and issubclass(value, keras.layers.Layer)
    }
    unknown = {name for name in found if not {name, re.sub(r"\dD$", "", name)} & known}
    assert not {name for name in unknown if not is_alias(name)}


def is_alias(name):
    """Whether a class has another name, by which it is known."""
    return getattr(keras.layers, name).__name__ != name


def built(case):
    keras.utils.set_random_seed(1)
    tokens = case.weight == "embeddings"
    x = TOKENS % 5 if tokens else np.random.default_rng(0).normal(size=(2, *case.shape))
    inputs = keras.Input(case.shape, dtype="int32" if tokens else "float32")
    model = keras.Model(inputs, case.make()(inputs))
    (kernel,) = [v for v in model.trainable_variables if v.name == case.weight]
    return model, kernel, x


@pytest.mark.parametrize("name", LINEAR)
def test_a_filter_is_what_makes_one_output_and_its_direction_goes_along_with_it(name):
    if name == "ReversibleEmbedding" and models.KERAS < (3, 12):
        pytest.skip("Keras has it from 3.12 on")
    case = LINEAR[name]
    model, kernel, x = built(case)
    axes = [axis % len(kernel.shape) for axis in case.axes]
    shape = [n if axis in axes else 1 for axis, n in enumerate(kernel.shape)]
    c = np.random.default_rng(1).uniform(0.2, 5.0, size=shape)

    def look():
        index = [v is kernel for v in model.trainable_variables].index(True)
        return values([model(x)])[0], landscape.random_direction(model)[index]

    output, direction = look()
    kernel.assign(values([kernel])[0] * c)
    scaled, scaled_direction = look()
    np.testing.assert_allclose(scaled, case.scaled(output, c), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scaled_direction, direction * c, rtol=1e-4)


@pytest.mark.parametrize("layer", [L.SeparableConv1D, L.SeparableConv2D])
def test_the_depthwise_part_of_a_separable_convolution_has_a_filter_for_each_channel(layer):
    case = Filters(without_bias(layer, 4, 3), (5, 5, 3)[-1 - int(layer.__name__[-2]) :])
    model, _, _ = built(case._replace(weight="pointwise_kernel"))
    depthwise = model.trainable_variables[0]
    before = landscape.random_direction(model)[0]
    c = np.array([[0.1], [1.0], [10.0]])
    depthwise.assign(values([depthwise])[0] * c)
    np.testing.assert_allclose(landscape.random_direction(model)[0], before * c, rtol=1e-4)


@AS_WRITTEN
@pytest.mark.parametrize("grouped", [False, True])
def test_a_slice_of_an_attention_does_not_depend_on_how_queries_and_keys_are_scaled(grouped):
    """Each of the products of a head may be scaled by itself."""
    keras.utils.set_random_seed(0)
    if grouped:
        attention, heads = L.GroupQueryAttention(4, 4, 2, use_bias=False), 2
    else:
        attention, heads = L.MultiHeadAttention(2, 4, use_bias=False), 2
    inputs = keras.Input((3, 5))
    outputs = keras.layers.Dense(1)(keras.layers.Flatten()(attention(inputs, inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    x, y = np.random.default_rng(0).normal(size=(8, 3, 5)), np.ones((8, 1))
    before = landscape.line(model, x, y, num_points=3).losses
    by_path = {v.path.split("/")[-2]: v for v in model.trainable_variables}
    query, key = by_path["query"], by_path["key"]
    c = np.random.default_rng(1).uniform(0.1, 10.0, size=(heads, 4))
    key.assign(values([key])[0] / c)
    query.assign(values([query])[0] * np.repeat(c, query.shape[1] // heads, axis=0))
    after = landscape.line(model, x, y, num_points=3).losses
    np.testing.assert_allclose(after, before, rtol=1e-4)
    assert np.ptp(before) > 1e-2


def test_a_slice_does_not_depend_on_the_scale_of_filters_before_a_batchnormalization():
    keras.utils.set_random_seed(0)
    depthwise, normalization = L.DepthwiseConv1D(2, use_bias=False), L.BatchNormalization(epsilon=0)
    inner = [depthwise, normalization, L.Activation("tanh"), L.Flatten(), L.Dense(1)]
    model = keras.Sequential([keras.Input((4, 3)), *inner])
    model.compile("sgd", "mse")
    x, y = np.random.default_rng(0).normal(size=(8, 4, 3)), np.ones((8, 1))
    before = landscape.line(model, x, y, num_points=3).losses
    c = np.array([10.0, 0.1, 3.0])
    for variable, factor in [
        (depthwise.kernel, c[:, None]),
        (normalization.moving_mean, c),
        (normalization.moving_variance, c**2),
    ]:
        variable.assign(values([variable])[0] * factor)
    after = landscape.line(model, x, y, num_points=3).losses
    np.testing.assert_allclose(after, before, rtol=1e-4)
    assert np.ptp(before) > 1e-2


def test_the_slopes_of_a_prelu_are_no_filters():
    model = keras.Sequential([keras.Input((4, 3)), L.PReLU(), L.Flatten(), L.Dense(1)])
    assert not np.any(landscape.random_direction(model)[0])


def test_a_layer_within_a_layer_is_asked_itself():
    """A model holds the weights of all; the innermost layer knows what they are."""

    class Outer(L.DepthwiseConv2D):
        def build(self, shape):
            self.inner = L.Dense(2)
            self.inner.build((None, 3))
            super().build(shape)

    layer = Outer(2)
    model = keras.Sequential([keras.Input((4, 4, 3)), L.TimeDistributed(L.Dense(3)), layer])
    lengths = {
        v.path: np.linalg.norm(d, axis=0)
        for v, d in zip(model.trainable_variables, landscape.random_direction(model), strict=True)
    }
    kernel = values([layer.inner.kernel])[0]
    np.testing.assert_allclose(
        lengths[layer.inner.kernel.path], np.linalg.norm(kernel, axis=0), rtol=1e-5
    )


# Bad input


@AS_WRITTEN
@pytest.mark.parametrize(
    ("direction", "match"),
    [
        ("rndm", "must be 'random', a list"),
        (np.ones(4), r"vector of the length 3"),
        ([np.ones((3, 1)), np.ones(1)], r"Received: \[\(3, 1\), \(1,\)\]"),
        ([np.ones((1, 3))], r"of the shapes \[\(3, 1\)\]"),
    ],
)
def test_a_direction_must_fit_the_weights(direction, match):
    model, x, y = setting()
    with pytest.raises(ValueError, match=match):
        landscape.line(model, x, y, direction=direction)


@AS_WRITTEN
@pytest.mark.parametrize("directions", [np.eye(3), [np.ones(3)]], ids=["three", "one"])
def test_a_plane_has_two_directions(directions):
    model, x, y = setting()
    with pytest.raises(ValueError, match=r"A plane has 2 directions\. Received"):
        landscape.plane(model, x, y, directions=directions)


@pytest.mark.parametrize("span", [1.0, (1, 1), (1, -1), (0, np.inf), (0, np.nan), "ab", (0, 1, 2)])
def test_a_span_is_a_pair_of_numbers(span):
    model, x, y = setting()
    with pytest.raises(ValueError, match="`span` must be a pair"):
        landscape.line(model, x, y, span=span)


@pytest.mark.parametrize("num_points", [1, 2.5, "3", None, True])
def test_points_are_counted_by_integers(num_points):
    model, x, y = setting()
    with pytest.raises(ValueError, match="`num_points` must be an integer >= 2"):
        landscape.plane(model, x, y, num_points=num_points)


@AS_WRITTEN
def test_there_is_no_line_between_different_architectures():
    one, x, y = setting(models.mlp)
    other, _, _ = setting(models.mlp, units=5)
    with pytest.raises(ValueError, match=r"same architecture only.*\(3, 4\).*\(3, 5\)"):
        landscape.between(one, other, x, y)


@AS_WRITTEN
def test_data_and_loss_must_be_there():
    model, x, y = setting()
    with pytest.raises(ValueError, match="There are no data"):
        landscape.line(model, x[:0], y[:0])
    with pytest.raises(ValueError, match=r"model\.compiled=False"):
        landscape.line(models.linear(), x, y)
    x[0] = np.nan
    with pytest.raises(ValueError, match="is not finite"):
        landscape.plane(model, x, y)

"""Slices of the loss: a linear model under mean squared error is a parabola in every direction."""

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

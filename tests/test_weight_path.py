"""The path of training: which weights are kept, and the plane that they are seen in."""

import keras
import numpy as np
import pytest

from keras_sharp import SharpnessAwareModel, landscape, snapshots
from keras_sharp.callbacks import WeightPath
from keras_sharp.snapshots import Snapshots, principal_directions
from tests import models
from tests.models import assert_same, values

AS_WRITTEN = pytest.mark.usefixtures("as_written")

X, Y = models.regression(8)


def compiled(model, optimizer=None):
    model.compile(optimizer or keras.optimizers.SGD(0.05), "mse")
    return model


def fit(model, epochs, callbacks, **kwargs):
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    return model.fit(X, Y, epochs=epochs, callbacks=callbacks, **{**options, **kwargs}).history


class Spy(keras.callbacks.Callback):
    """The weights at the beginning and after each epoch, or each step."""

    def __init__(self):
        super().__init__()
        self.epochs, self.steps = [], []

    def on_train_begin(self, logs=None):
        self.epochs.append(values(self.model.trainable_variables))
        self.steps.append(self.epochs[0])

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(values(self.model.trainable_variables))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(values(self.model.trainable_variables))


# What is kept


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_the_weights_are_those_of_each_moment(unit, wrapped, tmp_path):
    """Compiled: on JAX, `fit` keeps the weights to itself for as long as an epoch lasts."""
    model, spy = models.batchnorm_net(), Spy()
    model = compiled(SharpnessAwareModel(model, "sam") if wrapped else model)
    path, stored = WeightPath(unit=unit), WeightPath(unit=unit, directory=tmp_path / "path")
    fit(model, 3, [path, stored, spy])
    expected = spy.epochs if unit == "epoch" else spy.steps
    for kept in (path.snapshots, stored.snapshots, Snapshots(tmp_path / "path")):
        assert kept.positions == list(range(len(expected)))
        for snapshot, weights in zip(kept, expected, strict=True):
            assert_same(list(snapshot), weights, bits=True)
    assert not np.array_equal(path.snapshots[0][0], path.snapshots[-1][0])


@AS_WRITTEN
def test_a_path_does_not_change_the_training():
    one, other = (compiled(SharpnessAwareModel(models.dropout_net(), "bsam")) for _ in range(2))
    for model, callbacks in ((one, [WeightPath(unit="step")]), (other, [])):
        keras.utils.set_random_seed(3)
        fit(model, 2, callbacks)
    assert_same(one.variables, values(other.variables), bits=True)


class Moves(keras.callbacks.Callback):
    """Sets the weight to the number of epochs so far, so that it tells them."""

    def on_epoch_end(self, epoch, logs=None):
        v = self.model.trainable_variables[0]
        v.assign(np.full(v.shape, epoch + 1.0))


@AS_WRITTEN
@pytest.mark.parametrize(
    ("epochs", "every", "most", "expected"),
    [
        (5, 1, 50, [0, 1, 2, 3, 4, 5]),
        (5, 2, 50, [0, 2, 4, 5]),
        (5, 1, 6, [0, 1, 2, 3, 4, 5]),
        (6, 1, 6, [0, 2, 4, 6]),
        (6, 1, 5, [0, 2, 4, 6]),
        (7, 1, 5, [0, 2, 4, 6, 7]),
        (9, 1, 5, [0, 4, 8, 9]),
        (17, 2, 3, [0, 16, 17]),
        (3, 9, 50, [0, 3]),
    ],
)
@pytest.mark.parametrize("on_disk", [True, False])
def test_where_there_would_be_too_many_every_second_one_goes(
    epochs, every, most, expected, on_disk, tmp_path
):
    path = WeightPath(every, max_snapshots=most, directory=tmp_path if on_disk else None)
    fit(compiled(models.linear()), epochs, [Moves(), path], batch_size=8)
    assert path.snapshots.positions == expected
    assert [snapshot[0][0, 0] for snapshot in path.snapshots][1:] == expected[1:]
    assert len(list(tmp_path.iterdir())) == (len(expected) if on_disk else 0)


@AS_WRITTEN
def test_the_last_weights_are_those_that_training_ends_with():
    """Here, the averages that Keras puts in their place when training ends."""
    optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9)
    model, path, spy = compiled(models.linear(), optimizer), WeightPath(), Spy()
    fit(model, 2, [path, spy])
    assert path.snapshots.positions == [0, 1, 2]
    assert_same(path.snapshots[-1], values(model.trainable_variables), bits=True)
    assert np.any(path.snapshots[-1][0] != spy.epochs[-1][0])


@AS_WRITTEN
def test_a_second_training_has_a_path_of_its_own():
    model, path = compiled(models.linear()), WeightPath()
    fit(model, 2, [path])
    fit(model, 5, [path], initial_epoch=2)
    assert path.snapshots.positions == [0, 1, 2, 3]


@models.on("tensorflow", "jax")  # On PyTorch, Keras refuses `steps_per_execution`.
def test_several_steps_at_once_are_counted():
    model, path = models.linear(), WeightPath(3, unit="step")
    model.compile("sgd", "mse", steps_per_execution=2)
    fit(model, 2, [path], batch_size=2)
    assert path.snapshots.positions == [0, 4, 8]


@AS_WRITTEN
def test_weights_of_half_precision_are_kept_in_full():
    keras.config.set_dtype_policy("bfloat16")
    model, path = compiled(models.linear()), WeightPath()
    fit(model, 1, [path])
    assert path.snapshots[0][0].dtype == np.float32


# Bad input, of the callback


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"every": 0}, "`every` must be an integer >= 1. Received: every=0"),
        ({"max_snapshots": 2}, "`max_snapshots` must be an integer >= 3"),
        ({"unit": "steps"}, r"one of \['epoch', 'step'\].*'steps'.*Did you mean 'step'"),
    ],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        WeightPath(**arguments)


@AS_WRITTEN
def test_a_directory_with_another_path_is_refused_before_the_first_epoch(tmp_path):
    model = compiled(models.linear())
    fit(model, 1, [WeightPath(directory=tmp_path)])
    before = values(model.variables)
    with pytest.raises(ValueError, match=r"for one training alone.*with 2 snapshots"):
        fit(model, 1, [WeightPath(directory=tmp_path)])
    assert_same(model.variables, before, bits=True)


def test_a_model_without_weights_is_refused():
    path = WeightPath()
    path.set_model(keras.Sequential([keras.layers.Dense(1)]))
    with pytest.raises(ValueError, match=r"needs a model that has some.*keras\.Input"):
        path.on_train_begin()


# The directions


@pytest.mark.parametrize("at_once", [2**20, 3])
def test_the_directions_are_the_principal_components(at_once, monkeypatch):
    monkeypatch.setattr(snapshots, "_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 14)) * np.geomspace(1, 0.01, 14) + 5.0
    given = [[row[:4].reshape(2, 2), row[4:]] for row in rows]
    found = principal_directions(given, origin=3)
    directions = np.stack([np.r_[np.ravel(a), b] for a, b in found.directions])
    _, s, v = np.linalg.svd(rows - rows.mean(axis=0))
    np.testing.assert_allclose(np.abs(np.sum(directions * v[:2], axis=1)), 1.0, rtol=1e-10)
    np.testing.assert_allclose(directions @ directions.T, np.eye(2), atol=1e-10)
    np.testing.assert_allclose(found.shares, s[:2] ** 2 / np.sum(s**2), rtol=1e-10)
    np.testing.assert_allclose(found.coordinates, (rows - rows[3]) @ directions.T, atol=1e-10)
    assert [a.shape for a in found.directions[0]] == [(2, 2), (10,)]
    assert np.all(found.coordinates[0] <= 0)


def test_a_random_walk_has_the_shares_that_the_documentation_warns_of():
    walk = np.random.default_rng(0).normal(size=(200, 20_000)).cumsum(axis=0)
    shares = principal_directions([[row] for row in walk], origin=-1).shares
    np.testing.assert_allclose(shares, [0.61, 0.15], atol=0.01)


# The loss in their plane


@AS_WRITTEN
def test_the_loss_around_a_path():
    model = compiled(models.linear())
    path = WeightPath()
    fit(model, 4, [path])
    model.trainable_variables[0].assign(np.zeros((3, 1)))  # The plane is that of the path.
    plane = landscape.around_path(model, path, X, Y, num_points=4)
    found = principal_directions(list(path.snapshots), origin=-1)
    w, (d, e) = path.snapshots[-1][0], (direction[0] for direction in found.directions)
    for i, s in enumerate(plane.first):
        for j, t in enumerate(plane.second):
            expected = np.mean((X @ (w + s * d + t * e) - Y) ** 2)
            assert plane.losses[i, j] == pytest.approx(expected, rel=1e-5)
    points = plane.paths["path"]
    np.testing.assert_allclose(points, found.coordinates)
    np.testing.assert_array_equal(points[-1], [0, 0])
    extent = np.ptp(points, axis=0)
    for axis, k in ((plane.first, 0), (plane.second, 1)):
        assert axis[0] == pytest.approx(points[:, k].min() - 0.25 * extent[k])
        assert axis[-1] == pytest.approx(points[:, k].max() + 0.25 * extent[k])


@AS_WRITTEN
def test_two_paths_in_one_plane_and_from_the_disk(tmp_path):
    paths = {}
    for name, method in (("sgd", None), ("sam", "sam")):
        model = compiled(SharpnessAwareModel(models.mlp(), method))
        if method:
            model.method.rho = 0.5
        paths[name] = WeightPath(directory=tmp_path / name)
        fit(model, 3, [paths[name]])
    before = values(model.variables)
    plane = landscape.around_path(model, paths, X, Y, num_points=3, margin=0)
    stored = {name: str(tmp_path / name) for name in paths}
    again = landscape.around_path(model.model, stored, X, Y, num_points=3, margin=0)
    assert_same(model.variables, before, bits=True)
    assert list(plane.paths) == ["sgd", "sam"]
    assert [len(points) for points in plane.paths.values()] == [4, 4]
    for name in paths:
        np.testing.assert_array_equal(plane.paths[name], again.paths[name])
    np.testing.assert_array_equal(plane.losses, again.losses)
    # The same start, another end; the origin is the end of the first.
    np.testing.assert_allclose(plane.paths["sgd"][0], plane.paths["sam"][0], atol=1e-6)
    np.testing.assert_array_equal(plane.paths["sgd"][-1], [0, 0])
    assert np.any(plane.paths["sam"][-1] != 0)
    assert 0.9 < plane.shares.sum() <= 1


def test_three_snapshots_are_in_the_plane_and_have_their_own_losses():
    model = compiled(models.mlp())
    path = WeightPath()
    fit(model, 2, [path])
    plane = landscape.around_path(model, path, X, Y, num_points=2, margin=0)
    assert plane.shares.sum() == pytest.approx(1)
    # A corner of the plane, by hand: in float32, and from the snapshots alone.
    a, b, c = (np.concatenate([np.ravel(t) for t in s]) for s in path.snapshots)
    points = plane.paths["path"]
    corner = np.array([plane.first[0], plane.second[-1]])
    s, t = np.linalg.solve((points[:2] - points[2]).T, corner)
    model.set_weights(list(models.like(c + s * (a - c) + t * (b - c), model.get_weights())))
    assert plane.losses[0, 1] == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-3)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ([], "has no snapshots.*empty one"),
        ({}, "empty dictionary"),
        (WeightPath(), "has no snapshots"),
        ("no/such/folder", "has no snapshots.*snapshot-"),
        ([[np.ones((2, 1))]], r"shapes \[\(2, 1\)\].*Expected.*\[\(3, 1\)\]"),
        ([[np.full((3, 1), t)] for t in (0.0, 1.0, 3.0)], "3 snapshots, which lie on one line"),
        ([[np.ones((3, 1))]], "1 snapshots, which lie on one line or at one point"),
        ([[np.full((3, 1), t)] for t in (0.0, np.nan)], "not finite.*the training diverged"),
    ],
)
def test_what_is_no_path_is_refused(path, match):
    with pytest.raises(ValueError, match=match):
        landscape.around_path(compiled(models.linear()), path, X, Y)


@pytest.mark.parametrize("margin", [-0.1, "0.2", float("inf"), float("nan")])
def test_the_margin_is_a_number(margin):
    with pytest.raises(ValueError, match="`margin` must be a finite number >= 0"):
        landscape.around_path(compiled(models.linear()), [], X, Y, margin=margin)

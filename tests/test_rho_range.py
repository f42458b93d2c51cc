"""The range test of rho: what it reports, what it recommends, and that it leaves no trace."""

import math

import keras
import numpy as np
import pytest

from keras_sharp import SharpnessAwareModel, methods, rho_range_test
from keras_sharp.rho_range import _recommend
from tests import models
from tests.models import assert_same, values

pytestmark = pytest.mark.usefixtures("as_written")

X, Y = models.regression(16)
HELD_OUT = models.regression(8, seed=5)
RHOS = [0.1, 0.01]


def compiled(network, method="sam", optimizer=None, **kwargs):
    model = SharpnessAwareModel(network, method, **kwargs)
    model.compile(optimizer or keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model


def find(model, x=X, y=Y, **kwargs):
    options = {"validation_data": HELD_OUT, "rhos": RHOS, "epochs": 1, "batch_size": 8}
    return rho_range_test(model, x, y, **{**options, "verbose": 0, **kwargs})


def table(found):
    """All arrays: without the two numbers at the end."""
    return np.array(found[:-2])


# What it reports


def test_the_first_entry_is_plain_training():
    found = find(compiled(models.mlp()))
    np.testing.assert_allclose(found.rho, [0.0, 0.01, 0.1])
    assert found.gain[0] == found.predicted_gain[0] == 0
    assert found.cosine[0] == pytest.approx(1, abs=1e-5)
    plain = find(compiled(models.mlp(), method=methods.SAM(rho=3.0)), rhos=[1e-12, 1.0])
    for name in ("val_loss", "loss"):
        assert getattr(plain, name)[1] == pytest.approx(getattr(found, name)[0], rel=1e-5)


def test_on_a_quadratic_the_steps_are_the_closed_form():
    """With a learning rate of 0 each training ends where it began."""
    model = compiled(models.linear(features=3), optimizer=keras.optimizers.SGD(0.0))
    with pytest.warns(UserWarning, match="falls with no rho"):
        found = find(model, batch_size=16)
    w = values(model.trainable_variables)[0].astype("float64")
    x, y = X.astype("float64"), Y.astype("float64")
    g, hessian = 2 * x.T @ (x @ w - y) / len(x), 2 * x.T @ x / len(x)
    unit = g / np.linalg.norm(g)
    predicted = found.rho * np.linalg.norm(g)
    bend = 0.5 * (unit.T @ hessian @ unit).item()
    np.testing.assert_allclose(found.predicted_gain, predicted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.gain, predicted + bend * found.rho**2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sharpness, found.gain[1], rtol=1e-4)
    moved = g + np.multiply.outer(found.rho, hessian @ unit)
    cosine = [(g.T @ m).item() / np.linalg.norm(g) / np.linalg.norm(m) for m in moved]
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-4)
    assert np.all(np.diff(found.cosine) < 0)
    np.testing.assert_allclose(found.val_loss, found.initial_val_loss)


@pytest.mark.filterwarnings("ignore:The validation loss falls with no rho")
def test_gains_far_below_the_rounding_of_the_loss_are_right():
    """The loss is about 1e10, in steps of 1024."""
    model = compiled(models.linear(features=3), optimizer=keras.optimizers.SGD(0.0))
    y = np.float32(1e5) * np.sign(Y)
    found = find(model, y=y, batch_size=16, rhos=[1e-5, 1e-4])
    w, x = values(model.trainable_variables)[0].astype("float64"), X.astype("float64")
    length = np.linalg.norm(2 * x.T @ (x @ w - y) / len(x))
    np.testing.assert_allclose(found.gain, length * found.rho, rtol=1e-4)
    np.testing.assert_allclose(found.sharpness, found.gain[1], rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The validation loss falls with no rho")
def test_where_a_gain_is_nothing_but_rounding_a_warning_says_so():
    """Here the gradient is made up, so that the slope does not help."""

    def loss(y, y_pred):
        wrong = 300.0 * y_pred
        return 1e4 + y_pred**2 + wrong - keras.ops.stop_gradient(wrong)

    model = compiled(models.linear(features=3), optimizer=keras.optimizers.SGD(0.0))
    model.compile(keras.optimizers.SGD(0.0), loss)
    with pytest.warns(UserWarning, match="`sharpness` and `gain` may be rounding.*larger rho"):
        find(model, batch_size=16, rhos=[1e-4, 1e-3])


def test_the_step_is_that_of_the_neighborhood():
    model = compiled(models.linear(), methods.ASAM(rho=0.5), keras.optimizers.SGD(0.0))
    with pytest.warns(UserWarning, match="falls with no rho"):
        found = find(model, rhos=None, batch_size=16)
    np.testing.assert_allclose(found.rho[1:], 0.5 * np.geomspace(0.1, 10, 9), rtol=1e-6)
    w = values(model.trainable_variables)[0].astype("float64")
    g = 2 * X.T @ (X @ w - Y) / len(X)
    scaled = np.linalg.norm((abs(w) + 0.01) * g)
    np.testing.assert_allclose(found.predicted_gain, found.rho * scaled, rtol=1e-4, atol=1e-6)


def test_only_the_perturbed_weights_take_part():
    def bias_only(variable):
        return variable.path.endswith("bias")

    rhos = [0.1, 1.0]
    found = table(find(compiled(models.mlp(), "asam", perturb=bias_only), rhos=rhos))
    # ASAM does not scale biases: a Euclidean step.
    euclidean = table(find(compiled(models.mlp(), "sam", perturb=bias_only), rhos=rhos))
    np.testing.assert_allclose(found, euclidean, rtol=1e-4, atol=1e-6)
    assert np.any(found != table(find(compiled(models.mlp(), "sam"), rhos=rhos)))


def test_an_adversary_as_strong_as_this_is_seen():
    found = find(compiled(models.mlp()), rhos=[0.01, 50.0], epochs=4)
    assert found.val_loss[2] > 2 * found.val_loss[1]
    assert found.recommended == pytest.approx(0.01)


# What it recommends


def test_the_largest_rho_that_costs_no_more_than_the_tolerance():
    rho = np.array([0.0, 0.01, 0.1, 1.0])
    losses = np.array([1.0, 0.9, 0.99, 5.0])  # falls of 1.0, 1.1, 1.01
    assert _recommend(rho, losses, 2.0, 0.1) == 0.1
    assert _recommend(rho, losses, 2.0, 0.05) == 0.01
    assert _recommend(rho, losses, 1.1, 0.1) == 0.01
    assert _recommend(rho, losses - 3, 2.0 - 3, 0.1) == 0.1  # losses may be negative
    assert _recommend(rho, np.array([1.0, 2.0, 1.05, math.nan]), 3.0, 0.1) == 0.1


def test_where_no_rho_is_cheap_a_warning_says_so():
    rho, losses = np.array([0.0, 0.01, 0.1]), np.array([1.0, 1.2, 1.3])
    with pytest.warns(UserWarning, match=r"each rho from 0\.01 up.*smaller `rhos`"):
        assert _recommend(rho, losses, 2.0, 0.1) == 0
    with pytest.warns(UserWarning, match=r"falls with no rho.*more `epochs`"):
        assert _recommend(rho, losses, 1.0, 0.1) == 0
    with pytest.warns(UserWarning, match="falls with no rho"):
        assert _recommend(rho, np.full(3, math.nan), 1.0, 0.1) == 0


def test_where_the_loss_hardly_falls_no_rho_is_recommended():
    rho, losses = np.array([0.0, 0.01, 0.1]), np.array([0.995, 0.991, 0.993])
    with pytest.warns(
        UserWarning, match=r"hardly falls, from 1 to 0\.991 .*more to learn"
    ) as caught:
        assert _recommend(rho, losses, 1.0, 0.1) == 0
    assert str(caught[0].message).endswith("from weights that have more to learn.")
    with pytest.warns(UserWarning, match="hardly falls, from -2 to"):
        assert _recommend(rho, losses - 3, -2.0, 0.1) == 0  # Losses may be negative.
    with pytest.warns(UserWarning, match="largest rho"):
        assert _recommend(rho, losses - 0.005, 1.0, 1.0) == 0.1  # It falls by 1.4 %.


def test_where_all_rhos_are_cheap_a_warning_says_that_the_range_ends_too_early():
    rho, losses = np.array([0.0, 0.01, 0.1]), np.array([1.0, 0.9, 0.95])
    with pytest.warns(UserWarning, match=r"largest rho of the test, 0\.1, .*larger `rhos`"):
        assert _recommend(rho, losses, 2.0, 0.1) == 0.1


# That it leaves no trace


def everything(model):
    return values([*model.variables, *model.optimizer.variables, *model.metrics_variables])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "method"), [(models.batchnorm_net, "bsam"), (models.dropout_net, "sam")]
)
def test_the_model_is_as_it_was(network, method):
    tested, other = (compiled(network(), method) for _ in range(2))
    for model in (tested, other):
        keras.utils.set_random_seed(3)
        model.fit(X, Y, batch_size=8, verbose=0, shuffle=False)
    before, history = everything(tested), tested.history
    find(tested)
    assert_same(everything(tested), before, bits=True)
    assert tested.history is history
    assert not tested.stop_training
    keras.utils.set_random_seed(4)
    find(other)  # Must not move the random numbers of the next step.
    other.fit(X, Y, batch_size=8, verbose=0, shuffle=False)
    keras.utils.set_random_seed(4)
    tested.fit(X, Y, batch_size=8, verbose=0, shuffle=False)
    assert_same(everything(tested), everything(other))


def test_the_same_test_gives_the_same_numbers():
    model = compiled(models.dropout_net())
    found = table(find(model))
    np.testing.assert_array_equal(found, table(find(model)))
    assert np.any(found != table(find(model, seed=1)))


def test_the_model_is_as_it_was_after_an_error(monkeypatch):
    model = compiled(models.mlp())
    before = everything(model)
    monkeypatch.setattr(model, "evaluate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find(model)
    assert_same(everything(model)[: len(before)], before, bits=True)


# Data


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]


def test_data_sets_are_taken_as_they_come():
    found = find(compiled(models.mlp()), Batches(), None, validation_data=Batches())
    assert np.all(np.isfinite(table(found)))


def test_nested_inputs_and_sample_weights():
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(8, 3)), "b": {"c": rng.normal(size=(8, 2))}}
    x = keras.tree.map_structure(lambda a: a.astype("float32"), x)
    weights = np.array([1.0] * 4 + [0.0] * 4, "float32")

    def found(y):
        network = models.two_in_two_out()
        network = keras.Model(network.input, network.get_layer("small").output)
        held_out = (x, Y[:8])
        return table(find(compiled(network), x, y, sample_weight=weights, validation_data=held_out))

    changed = Y[:8].copy()
    changed[4:] = 9.0  # These examples count for nothing.
    np.testing.assert_allclose(found(Y[:8]), found(changed), rtol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rhos": [0.1]}, "at least two different radii"),
        ({"rhos": [0.0, 0.1, 0.1]}, "at least two different radii"),
        ({"rhos": [0.1, -1.0]}, "finite number >= 0"),
        ({"rhos": 0.1}, "must be a list of floats"),
        ({"epochs": 0}, "`epochs` must be an integer >= 1"),
        ({"tolerance": 1.0}, r"`tolerance` must be a number in \[0, 1\)"),
        ({"verbose": 2}, "`verbose` must be 0 or 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        find(compiled(models.linear()), **arguments)


def test_models_that_it_cannot_test():
    with pytest.raises(ValueError, match="needs a compiled SharpnessAwareModel"):
        find(models.linear())
    with pytest.raises(ValueError, match=r"model\.compiled=False"):
        find(SharpnessAwareModel(models.linear()))
    with pytest.raises(ValueError, match=r"model\.built=False"):
        find(compiled(keras.Sequential([keras.layers.Dense(1)])))
    with pytest.raises(ValueError, match="Plain has no `rho`"):
        find(compiled(models.linear(), None))
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    with pytest.raises(ValueError, match="a schedule"):
        find(compiled(models.linear(), methods.SAM(schedule)))


def test_data_that_do_not_fit_are_an_error_before_the_first_training():
    model = compiled(models.linear())
    with pytest.raises(ValueError, match="not finite"):
        find(model, X * np.inf)

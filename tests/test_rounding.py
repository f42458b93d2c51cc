"""What rounding leaves of a small change, in the logs of training and by itself."""

import keras
import numpy as np
import pytest

from keras_sharp import SharpnessAwareModel, methods, rounding
from tests import models

AS_WRITTEN = pytest.mark.usefixtures("as_written")


def fit(size, rho=0.05, **kwargs):
    """Train one epoch on targets of about `size`."""
    x, y = models.regression(16)
    model = SharpnessAwareModel(models.mlp(), methods.SAM(rho=rho), **kwargs)
    model.compile(keras.optimizers.SGD(1e-12), "mse")
    return model.fit(x, size * np.sign(y), epochs=2, verbose=0).history


@AS_WRITTEN
def test_a_log_of_sharpness_that_is_rounding_is_reported_once():
    expected = r"log `sharpness` is rounding in 2 of 2 epochs.*beside a loss of 1e\+12"
    with pytest.warns(UserWarning, match=expected) as said:
        fit(1e6, rho=1e-7, extra_logs=["sharpness"])
    ours = [w for w in said if issubclass(w.category, UserWarning)]
    assert [w.filename for w in ours] == [__file__]


@AS_WRITTEN
@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("size", "rho", "logs"),
    [(1.0, 0.05, ["sharpness"]), (1e2, 0.05, ["sharpness"]), (1e6, 0.0, ["sharpness"])],
    ids=["scaled", "steep", "no adversary"],
)
def test_a_log_of_sharpness_that_stands_out_is_not(size, rho, logs):
    fit(size, rho, extra_logs=logs)
    fit(1e6, 1e-7)  # Not logged.


QUARTIC = np.polynomial.Polynomial([1.0, -2.0, 3.0, 0.5, -0.7])


def test_simpsons_rule_is_exact_for_a_polynomial_of_degree_four():
    slopes = QUARTIC.deriv()(np.array([0.0, 0.5, 1.0]))
    change = rounding.simpson(slopes, 1.0, 1e-8)
    assert change.value == pytest.approx(QUARTIC(1.0) - QUARTIC(0.0), rel=1e-12)
    assert change.error == pytest.approx(abs(change.value - (slopes[0] + slopes[2]) / 2))


def test_slopes_that_are_rounded_alike_are_not_taken_for_exact():
    assert rounding.simpson([0.1, 0.1, 0.1], 1e16, 1e9).is_rounding
    assert rounding.simpson([[0, 0.1, 0.1], [0, -0.1, -0.1]], 1e16, 1e9).is_rounding
    assert not rounding.simpson([0.1, 0.1, 0.1], 1.0, 1e-7).is_rounding
    assert not rounding.simpson([0.0, 0.0, 0.0], 1.0, 1e-7).is_rounding


def settle(difference, error, integral):
    return rounding.settle(rounding.Change(difference, error), lambda: integral)


def test_the_better_of_two_ways_counts():
    def never():
        raise AssertionError

    for value in (1.0, -1.0, np.inf, np.nan):
        clear = rounding.Change(value, 1e-3)
        assert rounding.settle(clear, never) is clear
    integral = rounding.Change(0.012, 1e-4)
    assert settle(0.01, 1e-3, integral) is integral
    assert settle(0.01, 1e-5, integral).value == 0.01


def test_two_ways_that_disagree_are_reported():
    found = settle(0.01, 1e-3, rounding.Change(0.5, 1e-4))
    assert found.value == 0.01
    assert found.is_rounding
    assert found.error == pytest.approx(0.49)
    assert settle(0.01, 1e-3, rounding.Change(np.nan, np.nan)).value == 0.01


def test_the_spread_of_samples_may_be_as_large_as_it_is():
    assert rounding.Change(0.01, 0.005).is_rounding
    assert not rounding.Change(0.01, 0.005, spread=0.1).is_rounding


def test_a_coarse_dtype_is_seen():
    fine, coarse = models.mlp(), keras.Sequential([keras.layers.Dense(1, dtype="mixed_bfloat16")])
    assert rounding.coarsest_unit(fine) == 2.0**-24
    assert rounding.coarsest_unit(coarse) == 2.0**-8
    assert rounding.unit("int8") == rounding.unit("float32")

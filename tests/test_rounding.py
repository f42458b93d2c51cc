"""What rounding leaves of a small change, in the logs of training and by itself."""

import math

import keras
import numpy as np
import pytest

from keras_sharp import SharpnessAwareModel, methods, rounding
from tests import models


def logs(sharpness, loss, rho=0.05):
    return {"sharpness": [sharpness, sharpness], "loss": [loss, loss], "rho": [0.0, rho]}


def test_a_log_of_sharpness_that_is_rounding_is_reported():
    with pytest.warns(
        UserWarning, match=r"rounding in 1 of 2 epochs.*\n?.*loss of 1e\+12.*1.2e\+05"
    ):
        rounding.warn_of_logs(logs(2e5, 1e12))
    with pytest.warns(UserWarning, match="rounding"):
        rounding.warn_of_logs(logs(-1e-9, 0.3))


@pytest.mark.filterwarnings("error::UserWarning")
def test_one_that_stands_out_or_has_no_adversary_or_is_not_logged_is_not():
    for history in (logs(1e-3, 0.3), logs(0.0, 1e12, rho=0.0), logs(math.nan, math.nan)):
        rounding.warn_of_logs(history)
    rounding.warn_of_logs({"loss": [1e12], "rho": [0.05]})
    rounding.warn_of_logs({"loss": [1e12], "sharpness": [0.0]})  # Plain training has no rho.


@pytest.mark.usefixtures("as_written")
def test_fit_reports_it_once():
    x, y = models.regression()
    model = SharpnessAwareModel(models.linear(), methods.SAM(rho=1e-7), extra_logs=["sharpness"])
    model.compile(keras.optimizers.SGD(1e-12), "mse")
    with pytest.warns(UserWarning, match="log `sharpness` is rounding in 2 of 2") as said:
        model.fit(x, 1e6 * np.sign(y), epochs=2, verbose=0)
    ours = [w for w in said if "sharpness" in str(w.message)]
    assert [w.filename for w in ours] == [__file__]


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
    assert rounding.Change(0.01, 0.005, spread=0.001).is_rounding
    assert not rounding.Change(0.01, 0.005, spread=0.005).is_rounding


def test_a_coarse_dtype_is_seen():
    fine, coarse = models.mlp(), keras.Sequential([keras.layers.Dense(1, dtype="mixed_bfloat16")])
    assert rounding.coarsest_unit(fine) == 2.0**-24
    assert rounding.coarsest_unit(coarse) == 2.0**-8
    assert rounding.unit("int8") == rounding.unit("float32")

"""A training that does not get off the ground is recognized, and others are not."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers
from sklearn.datasets import load_digits

from keras_sharp import SharpnessAwareModel, cold_start, methods, schedules


def compiled(method):
    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [keras.Input((64,)), layers.Dense(32, "relu"), layers.Dense(32, "relu"), layers.Dense(10)]
    )
    model = SharpnessAwareModel(network, method)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
    return model


def train(model):
    x, y = load_digits(return_X_y=True)
    x, y = (x[:600] / 16).astype("float32"), y[:600]
    return model.fit(x, y, epochs=6, shuffle=False, verbose=0).history["loss"]


def test_too_large_a_rho_from_a_cold_start_is_named_and_a_warm_up_mends_it():
    with pytest.warns(UserWarning, match=r"does not seem to learn.*WarmUp\(1, steps=") as caught:
        cold = train(compiled(methods.SAM(1.0)))
    assert sum("does not seem to learn" in str(w.message) for w in caught) == 1
    assert cold[-1] > 2.2  # That of one answer to all is log(10) = 2.3.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warm = train(compiled(methods.SAM(schedules.WarmUp(1.0, 100))))
    assert min(warm) < 1.5


def logs(*losses, rho=0.1):
    rhos = rho if isinstance(rho, list) else [rho] * len(losses)
    return {"loss": list(losses), "rho": rhos}


@pytest.mark.parametrize(
    "history",
    [
        logs(2.4, 2.3, 2.29, 2.2, 2.0),  # slow
        logs(2.3, 0.2, 0.21, 0.2),  # has converged in one epoch
        logs(2.4, 2.3, 2.31),  # too early to say
        logs(2.4, 2.3, 2.31, 2.3, rho=0.0),  # not the adversary
        logs(2.4, 2.3, 2.31, 2.3, rho=[0.1, 0.1, 0.0, 0.0]),  # nor in the end
        {"loss": [2.4, 2.3, 2.31, 2.3]},  # there is none
        logs(2.4, np.nan, np.nan, np.nan),  # another warning's
        logs(-1.0, -2.0, -2.0, -2.0),  # no loss that has a scale
    ],
)
def test_what_learns_and_what_cannot_be_told_is_let_pass(history):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cold_start.warn_of_logs(history)


def test_after_a_warm_up_another_one_is_not_what_helps():
    with pytest.warns(UserWarning, match="has risen to 2, is too large") as caught:
        cold_start.warn_of_logs(logs(2.0, 1.3, 1.7, 2.2, rho=[0.4, 1.0, 2.0, 2.0]))
    assert "WarmUp" not in str(caught[0].message)


def test_plain_epochs_before_are_no_warm_up():
    with pytest.warns(UserWarning, match=r"WarmUp\(0\.4, steps="):
        cold_start.warn_of_logs(logs(2.4, 2.3, 2.31, 2.3, rho=[0.0, 0.4, 0.4, 0.4]))


def test_it_is_said_once():
    model = compiled(methods.SAM(3.0))
    with pytest.warns(UserWarning, match="does not seem to learn"):
        train(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(model)  # No cold start: there may be other reasons.

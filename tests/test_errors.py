"""Bad input is refused before training starts: what was received, what to do."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from keras_sharp import SharpnessAwareModel, methods

X, Y = np.ones((8, 3), "float32"), np.ones((8, 1), "float32")


def network(built=True):
    first = [keras.Input((3,))] if built else []
    return keras.Sequential([*first, layers.Dense(4, "relu"), layers.Dense(1)])


def weights_of(model):
    return [keras.ops.convert_to_numpy(v).copy() for v in model.trainable_variables]


class OwnStep(keras.Model):
    """A model with a method of its own that the wrapper would bypass."""

    def call(self, x):
        return x


@pytest.mark.parametrize(
    "name", ["train_step", "test_step", "predict_step", "fit", "evaluate", "predict"]
)
def test_a_model_with_a_step_of_its_own_is_refused(name):
    cls = type("Custom", (OwnStep,), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match=rf"`{name}` of its own.*the class Custom"):
        SharpnessAwareModel(cls())


def test_a_wrapper_around_a_wrapper_is_refused():
    with pytest.raises(ValueError, match=r"cannot be wrapped.*`model\.model`"):
        SharpnessAwareModel(SharpnessAwareModel(network()))


@pytest.mark.parametrize("thing", [None, "sam", layers.Dense(1), keras.Sequential], ids=str)
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(ValueError, match=r"wraps a keras\.Model.*Received"):
        SharpnessAwareModel(thing)


@pytest.mark.parametrize("number", [0, -1, True, 2.5, "2", None])
def test_num_micro_batches_is_a_positive_integer(number):
    with pytest.raises(ValueError, match=rf">= 1\. Received: num_micro_batches={number!r}"):
        SharpnessAwareModel(network(), num_micro_batches=number)


@pytest.mark.parametrize(
    ("name", "near"), [("sma", "sam"), ("adaptive-gsan", "adaptive_gsam"), ("bsamm", "bsam")]
)
def test_an_unknown_method_is_answered_with_the_nearest_spelling(name, near):
    with pytest.raises(ValueError, match=rf"no method named '{name}'\. Did you mean '{near}'\?"):
        SharpnessAwareModel(network(), name)


def test_a_method_class_is_answered_with_its_instance():
    with pytest.raises(ValueError, match=r"Pass an instance of the class: GSAM\(\)"):
        SharpnessAwareModel(network(), methods.GSAM)


def test_an_unknown_perturb_is_answered_with_the_nearest_spelling():
    with pytest.raises(ValueError, match=r"perturb='norms_only'.*Did you mean 'norm_only'\?"):
        SharpnessAwareModel(network(), perturb="norms_only")


def test_an_unknown_log_is_answered_with_the_nearest_spelling():
    with pytest.raises(ValueError, match=r"'sharpnes'\. Did you mean 'sharpness'\?"):
        SharpnessAwareModel(network(), extra_logs=["sharpnes"])


def test_fresh_noise_is_a_boolean():
    with pytest.raises(ValueError, match="fresh_noise=1"):
        SharpnessAwareModel(network(), fresh_noise=1)


def test_fit_before_compile_is_refused():
    model = SharpnessAwareModel(network())
    with pytest.raises(ValueError, match="compile"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("built", [True, False])
def test_a_model_without_trainable_weights_is_refused(built):
    inner = network(built)
    inner.trainable = False
    model = SharpnessAwareModel(inner)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="has no trainable weights"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("built", [True, False])
def test_a_perturbation_of_nothing_is_refused(built):
    inner = network(built)
    model = SharpnessAwareModel(inner, perturb="norm_only")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"`perturb` selects none of the 4 trainable weights"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_more_micro_batches_than_examples_are_refused_and_nothing_changes(how):
    inner = network()
    model = SharpnessAwareModel(inner, num_micro_batches=9)
    model.compile("sgd", "mse")
    before = weights_of(inner)
    with pytest.raises(ValueError, match=r"num_micro_batches=9 and a batch of 8 examples"):
        getattr(model, how)(X, Y)
    for old, new in zip(before, weights_of(inner), strict=True):
        np.testing.assert_array_equal(old, new)


def test_micro_batches_of_a_summed_loss_are_refused():
    model = SharpnessAwareModel(network(), num_micro_batches=2)
    with pytest.raises(ValueError, match="reduction='sum'"):
        model.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="a layer of the PyTorch backend")
def test_a_wrapped_torch_module_is_refused():
    import torch

    module = keras.layers.TorchModuleWrapper(torch.nn.Linear(3, 1))
    model = SharpnessAwareModel(keras.Sequential([keras.Input((3,)), module]))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"wraps a torch\.nn\.Module"):
        model.fit(X, Y, verbose=0)


def test_a_backend_that_cannot_train_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import keras_sharp"],
        env={**os.environ, "KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "'tensorflow', 'jax' or 'torch'" in done.stderr
    assert "'numpy'" in done.stderr

"""Bad input is refused before training starts: what was received, what to do."""

import importlib.util
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


@pytest.mark.parametrize(
    "optimizer", ["sgd", keras.optimizers.SGD, keras.optimizers.SGD(0.1)], ids=["name", "cls", "it"]
)
def test_an_optimizer_in_place_of_a_method_is_sent_to_compile(optimizer):
    with pytest.raises(ValueError, match=r"Give the optimizer to `compile`"):
        SharpnessAwareModel(network(), optimizer)


def test_a_radius_in_place_of_a_method_is_answered_with_the_method():
    with pytest.raises(ValueError, match=r"keras_sharp\.methods\.SAM\(rho=0\.05\)\.$"):
        SharpnessAwareModel(network(), 0.05)


@pytest.mark.parametrize("method", ["sam", methods.GSAM()], ids=["name", "instance"])
def test_model_and_method_swapped_are_told_apart(method):
    with pytest.raises(ValueError, match=r"comes first: SharpnessAwareModel\(model, method\)"):
        SharpnessAwareModel(method, network())


def test_a_model_in_place_of_a_method_is_told_where_models_stand():
    with pytest.raises(ValueError, match=r"The model is the first argument"):
        SharpnessAwareModel(network(), network())


def test_an_unknown_perturb_is_answered_with_the_nearest_spelling():
    with pytest.raises(ValueError, match=r"perturb='norms_only'.*Did you mean 'norm_only'\?"):
        SharpnessAwareModel(network(), perturb="norms_only")


def test_an_unknown_log_is_answered_with_the_nearest_spelling():
    with pytest.raises(ValueError, match=r"'sharpnes'\. Did you mean 'sharpness'\?"):
        SharpnessAwareModel(network(), extra_logs=["sharpnes"])


def test_fresh_noise_is_a_boolean():
    with pytest.raises(ValueError, match="fresh_noise=1"):
        SharpnessAwareModel(network(), fresh_noise=1)


@pytest.mark.parametrize("how", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
@pytest.mark.parametrize("inside", [False, True])
def test_use_before_compile_is_refused(how, inside):
    inner = network()
    if inside:
        inner.compile("sgd", "mse")
    words = r"`compile` of the wrapper"
    words = rf"compiled by itself.*not take over\. .*{words}" if inside else words
    with pytest.raises(ValueError, match=rf"`{how}`.*{words}"):
        getattr(SharpnessAwareModel(inner), how)(X, Y)


# Slips that would be taken and do nothing


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rho", r"Received: rho=0\.5.*`model\.method\.rho = 0\.5`"),
        ("alpha", r"`model\.method\.alpha = 0\.5`"),
        ("roh", r"Did you mean `method\.rho`"),
        ("metod", r"Did you mean `method`"),
        ("pertrub", r"Did you mean `perturb`"),
        ("model", r"`model` of a SharpnessAwareModel is fixed"),
        ("num_micro_batches", r"is fixed.*SharpnessAwareModel\(model\.model"),
        ("perturb", r"is fixed"),
        ("perturbation_scope", r"is fixed"),
        ("fresh_noise", r"is fixed"),
        ("extra_logs", r"is fixed"),
    ],
)
def test_an_attribute_of_the_wrapper_that_would_do_nothing_is_refused(name, words):
    model = SharpnessAwareModel(network(), "gsam")
    with pytest.raises(AttributeError, match=words):
        setattr(model, name, 0.5)


def test_other_attributes_of_the_wrapper_are_free():
    model = SharpnessAwareModel(network())
    model.note, model.stop_training, model.jit_compile = "mine", True, False
    assert (model.note, model.stop_training, model.jit_compile) == ("mine", True, False)


@pytest.mark.parametrize("name", ["roh", "radius", "Rho", "ascent_step"])
def test_an_unknown_attribute_of_a_method_is_refused(name):
    with pytest.raises(AttributeError, match=rf"SAM has no attribute `{name}`.*\['rho', "):
        setattr(methods.SAM(), name, 0.5)


@pytest.mark.parametrize("name", ["neighborhood", "ascent_steps", "second_order"])
def test_what_a_step_was_made_of_is_fixed(name):
    model = SharpnessAwareModel(network())
    setattr(model.method, name, getattr(model.method, name))
    model.compile("sgd", "mse")
    model.make_train_function()
    with pytest.raises(
        AttributeError, match=rf"`{name}`.*fixed.*`model\.method = SAM\({name}=2\)`"
    ):
        setattr(model.method, name, 2)


class OwnMethod(methods.SAM):
    def __init__(self, rho=0.1, **kwargs):
        self.rhos = []  # One slip away from `rho`, and meant.
        super().__init__(rho, **kwargs)
        self.second_order = False


def test_a_method_of_ones_own_may_have_attributes_but_no_slips():
    model = SharpnessAwareModel(network(), OwnMethod())
    method = model.method
    model.compile("sgd", "mse")
    model.make_train_function()
    method.rhos, method.rho_max, method._cache, method.rho = [1], 0.3, {}, 0.2
    assert (method.rhos, method.rho_max) == ([1], 0.3)
    with pytest.raises(AttributeError, match=r"OwnMethod has no attribute `roh`.*'rho'"):
        method.roh = 0.5


@pytest.mark.parametrize("where", ["constructor", "setter"])
@pytest.mark.parametrize(
    "make",
    [lambda: layers.Dense(1), network, lambda: keras.optimizers.SGD(), lambda: "adam"],
    ids=["layer", "model", "optimizer", "name of an optimizer"],
)
def test_what_is_no_method_is_refused(make, where):
    """On PyTorch a layer is a module, which would go past the setter."""
    model, thing = SharpnessAwareModel(network()), make()
    advice = "`compile`" if thing == "adam" or hasattr(thing, "iterations") else "names"
    give = {
        "constructor": lambda: SharpnessAwareModel(network(), thing),
        "setter": lambda: setattr(model, "method", thing),
    }
    with pytest.raises(ValueError, match=rf"method.*{advice}"):
        give[where]()
    assert type(model.method) is methods.SAM


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SharpnessAwareModel(network(), rho=0.1), r"methods\.SAM\(rho=0\.1\)"),
        (lambda: SharpnessAwareModel(network(), metod="sam"), r"Did you mean 'method'\?"),
        (lambda: methods.SAM(roh=0.1), r"SAM has no argument `roh`\. Did you mean 'rho'\?"),
        (lambda: methods.BSAM(rhomin=0.1), r"Did you mean 'rho_min'\?"),
    ],
)
def test_a_misspelt_argument_is_answered_with_what_to_write(make, words):
    with pytest.raises(TypeError, match=words):
        make()


class Failing(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        raise KeyError("lost")


class OnlyFromPython:
    def __call__(self, step):
        return 0.1 if step < 10 else 0.01


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (lambda: 0.05, r"one argument.*It raised TypeError"),
        (lambda step: None, r"a number or a scalar tensor.*It returned None"),
        (lambda step: "a", r"It returned 'a'"),
        (lambda step: keras.ops.ones((2,)), r"a scalar tensor.*It returned"),
        (Failing(), r"It raised KeyError: 'lost'"),
        (lambda step: -0.1, r"finite number >= 0 at every step.*gives -0\.1.* at step 0"),
        (lambda step: float("nan"), r"gives nan at step 0"),
        (OnlyFromPython(), r"`keras\.ops\.where`, not with `if`.*OnlyFromPython"),
    ],
    ids=["signature", "None", "string", "vector", "raises", "negative", "NaN", "if"],
)
def test_a_bad_function_of_the_step_is_refused_before_the_first_step(schedule, words):
    inner = network()
    model = SharpnessAwareModel(inner, methods.SAM(rho=schedule))
    python_if = isinstance(schedule, OnlyFromPython)
    model.compile("sgd", "mse", run_eagerly=python_if)
    if python_if:  # Eager steps take it, and those of PyTorch are.
        model.train_on_batch(X, Y)
        if keras.backend.backend() == "torch":
            return
        model.compile("sgd", "mse")
    before = weights_of(inner)
    with pytest.raises(ValueError, match=rf"(?s)`rho`.*{words}"):
        model.fit(X, Y, verbose=0)
    for old, new in zip(before, weights_of(inner), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_a_step_whose_rho_becomes_invalid_is_skipped_and_told(bad):
    inner = network()
    rho = lambda step: keras.ops.where(step < 2, 0.1, bad)  # noqa: E731
    model = SharpnessAwareModel(inner, methods.SAM(rho=rho), extra_logs=["skipped_steps"])
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match=r"2 training steps were skipped.*negative number or NaN"):
        model.fit(X, Y, batch_size=2, verbose=0)
    assert int(model.optimizer.iterations) == 2


def test_a_metric_with_the_name_of_a_log_is_refused():
    model = SharpnessAwareModel(network())
    model.compile("sgd", "mse", metrics=[keras.metrics.MeanAbsoluteError(name="rho")])
    with pytest.raises(ValueError, match=r"metrics named \['rho'\]"):
        model.train_on_batch(X, Y)


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


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="the NumPy backend of Keras imports JAX"
)
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

"""What is refused before the first step: models, arguments and losses that would go wrong."""

import warnings

import keras
import numpy as np

from keras_sharp import engine, methods
from keras_sharp.delegation import Delegation
from keras_sharp.identifiers import did_you_mean
from keras_sharp.preprocessing import only_preprocesses
from keras_sharp.training.step import scales_loss_dynamically
from keras_sharp.weights import is_overwritten

_OVERRIDDEN = (
    "The wrapped model has a `{name}` of its own, which SharpnessAwareModel would bypass. "
    "Received: a model of the class {cls}. Expected a model that leaves `{name}` to keras.Model. "
    "{advice}"
)
_ADVICE = {
    "train_step": (
        "A custom loss belongs in `compute_loss` and custom metrics in `compute_metrics`: both are "
        "kept. A model whose step is more than loss and gradient (a GAN, say) cannot be "
        "wrapped: in its step, call `keras_sharp.sharpness_aware_gradient`."
    ),
    "test_step": "Custom evaluation belongs in `compute_loss` and `compute_metrics`, both kept.",
    "predict_step": "Let `call` return what `predict` is to return.",
    "fit": "Do what it adds, such as preprocessing, to the data before `fit`.",
    "evaluate": "Do what it adds, such as preprocessing, to the data before `evaluate`.",
    "predict": "Do what it adds, such as preprocessing, to the data before `predict`.",
}


def check_arguments(given, parameters):
    """Say what to write in place of an argument that does not exist."""
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return  # A subclass that passes on what it does not know.
    for name, value in given.items():
        if name in parameters:
            continue
        if name in methods.hyperparameters():
            advice = (
                f" `{name}` is an argument of the method. Write SharpnessAwareModel(model, "
                f"keras_sharp.methods.SAM({name}={value!r})), say."
            )
        else:
            known = [p for p in parameters if p != "self"]
            advice = f"{did_you_mean(name, known)} Expected arguments from {known}."
        raise TypeError(
            f"SharpnessAwareModel has no argument `{name}`.{advice} Received: {name}={value!r}"
        )


def check_model(model):
    """Refuse what cannot be wrapped."""
    if isinstance(model, Delegation):
        raise ValueError(
            f"The model {model.name!r} is a SharpnessAwareModel already: a wrapper cannot be "
            "wrapped. Wrap `model.model`, the plain Keras model inside, instead."
        )
    if not isinstance(model, keras.Model):
        hint = ""
        if isinstance(model, (str, methods.Method)):
            hint = " The model comes first: SharpnessAwareModel(model, method)."
        elif isinstance(model, type):
            hint = " Pass an instance of the class."
        raise ValueError(
            "SharpnessAwareModel wraps a keras.Model (Sequential, Functional or subclassed). "
            f"Received: {model!r} (of type {type(model).__name__}).{hint}"
        )
    for name, advice in _ADVICE.items():
        if not (_is_from_keras(getattr(type(model), name)) or only_preprocesses(type(model), name)):
            raise ValueError(_OVERRIDDEN.format(name=name, cls=type(model).__name__, advice=advice))


def _is_from_keras(function):
    """Whether a method is the one that keras.Model has."""
    return getattr(function, "__module__", "").split(".")[0] == "keras"


def check_state(method, arrays):
    """The memory that a method starts with, as arrays."""
    if not isinstance(arrays, (list, tuple)) or not all(hasattr(a, "dtype") for a in arrays):
        raise ValueError(
            f"`initial_state` of the method {type(method).__name__} must return a list of NumPy "
            f"arrays, what the method remembers before the first step. Received: {arrays!r}"
        )
    arrays = [np.asarray(a) for a in arrays]
    if any(a.dtype.kind in "OSUM" for a in arrays):
        raise ValueError(
            f"`initial_state` of the method {type(method).__name__} must return arrays of "
            f"numbers. Received arrays of the dtypes {[str(a.dtype) for a in arrays]}."
        )
    return arrays


def check_compiled(wrapper, name):
    """Refuse to train or evaluate unless this wrapper was compiled, and last."""
    if not wrapper.compiled:
        before = (
            "The model inside was compiled by itself, which the wrapper does not take over. "
            if wrapper.model.compiled
            else ""
        )
        raise ValueError(
            f"A SharpnessAwareModel must be compiled before `{name}`, and this one, "
            f"{wrapper.name!r}, is not. {before}Call `compile` of the wrapper, with optimizer, "
            "loss and metrics: the model inside is compiled along."
        )
    if engine.loss_tracker(wrapper.model) is not engine.loss_tracker(wrapper):
        raise ValueError(
            f"The model inside the SharpnessAwareModel {wrapper.name!r} was compiled by itself, "
            "or by another wrapper, after the wrapper: losses and metrics are no longer those "
            f"that the wrapper was compiled with. Call `compile` of the wrapper before "
            f"`{name}`."
        )


def check_trainable(wrapper, takes_part, averages_parts):
    """Refuse a model whose weights cannot be trained, or not be perturbed."""
    variables = wrapper.model.trainable_variables
    if not variables:
        raise ValueError(
            f"The model {wrapper.model.name!r} has no trainable weights: there is nothing to "
            "train or to perturb. Set `trainable = True` on some layer, and compile again."
        )
    if not any(takes_part(v) for v in variables):
        raise ValueError(
            f"`perturb` selects none of the {len(variables)} trainable weights of the model "
            f"{wrapper.model.name!r}. Received: perturb={wrapper.perturb!r}. Expected at least one "
            f"weight; the model has {[v.path for v in variables[:5]]} ..."
        )
    others = {id(v) for v in wrapper.trainable_variables} - {id(v) for v in variables}
    if others:
        names = [v.path for v in wrapper.trainable_variables if id(v) in others]
        raise ValueError(
            "The SharpnessAwareModel has trainable weights beside those of the model inside, "
            f"which it does not train: {names}. Make them part of the model that is wrapped."
        )
    if averages_parts and any(is_overwritten(v) for v in variables):
        raise ValueError(
            "Weights of a float8 layer that are overwritten with their gradient cannot be "
            "averaged over micro-batches or replicas. Received: num_micro_batches="
            f"{wrapper.num_micro_batches}. Set num_micro_batches=1, and train on one device."
        )
    if any(keras.backend.standardize_dtype(v.dtype) == "bfloat16" for v in variables):
        warnings.warn(
            "The model has bfloat16 weights, in whose rounding a perturbation of usual size "
            "drowns: a change of 5e-4 survives in about one weight of eight. Use the dtype "
            "policy 'mixed_bfloat16', which keeps float32 weights.",
            stacklevel=3,
        )
    engine.check_layers(wrapper.model)


def check_reduction(wrapper, averages_parts):
    """Refuse a loss that is a sum, if parts of a batch are averaged."""
    reductions = [getattr(part, "reduction", None) for part in keras.tree.flatten(wrapper.loss)]
    if averages_parts and "sum" in reductions:
        raise ValueError(
            "A loss that is summed over the batch cannot be averaged over micro-batches or "
            "replicas: the step would shrink with their number. Received: a loss with "
            f"reduction='sum', num_micro_batches={wrapper.num_micro_batches} and "
            f"perturbation_scope={wrapper.perturbation_scope!r}. Use "
            "reduction='sum_over_batch_size'."
        )


def check_by_pass(method, optimizer):
    """Refuse an optimizer that would not know of what by-passes it."""
    if not method.by_passes_optimizer:
        return
    problems = {
        "accumulates gradients over several steps": optimizer.gradient_accumulation_steps,
        "averages the weights, in its own step": optimizer.use_ema,
        "skips steps by itself": scales_loss_dynamically(optimizer),
    }
    for problem, present in problems.items():
        if present:
            raise ValueError(
                f"A part of the step of the method {type(method).__name__} by-passes the "
                f"optimizer, which must not be one that {problem}. Received: "
                f"{type(optimizer).__name__}. Use the coupled form, `decoupled=False`, or another "
                "optimizer."
            )

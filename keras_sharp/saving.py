"""What a file says of a training beside its variables: the method, and how it is run.

A hyperparameter or the memory of a method is a variable, which Keras saves and
loads. Which method they belong to is not; a file that does not say so is loaded
into another method in silence, or not at all. So every file holds a record, as
JSON in an array of bytes: configs only, never code.
"""

import json
import os
import warnings

import keras
import numpy as np

from keras_sharp import methods
from keras_sharp.methods import Method

#: Where the record lies among the variables of the wrapper.
RECORD = "training"

#: Arguments of the constructor that change the training, and that a script gives anew.
_ARGUMENTS = ("num_micro_batches", "perturbation_scope", "perturb", "fresh_noise")

#: Objects of Keras that a config may hold, with what may be made of them from a file.
_OF_KERAS = ("keras.optimizers.schedules",)
_ARRAYS = ("__numpy__", "__tensor__")


class Progress:
    """What callbacks have set, and for which epoch; so that a restart repeats nothing.

    Attributes:
        epochs: dictionary from `"method"` or the name of a hyperparameter to
            the epoch for which it was set last. It is saved.
        methods: dictionary from epochs to those methods that a callback sets
            there: a file may have been saved under one of them.
    """

    def __init__(self):
        self.epochs = {}
        self.methods = {}


def record(wrapper):
    """What a file says of the training of a wrapper, as an array of bytes."""
    content = {
        "method": _describe_method(wrapper.method),
        "arguments": {name: _describe(getattr(wrapper, name)) for name in _ARGUMENTS},
        "epochs": dict(wrapper.progress.epochs),
    }
    return np.frombuffer(json.dumps(content).encode(), "uint8")


def read(store):
    """The record in the variables that a wrapper saved, or `None` in a file of version 0.1.0.

    Raises:
        ValueError: if the variables are not those of a wrapper.
    """
    keys = list(store.keys())
    if RECORD in keys:
        return json.loads(np.asarray(store[RECORD], "uint8").tobytes())
    # In 0.1.0 all had the two counters.
    if not {"0", "1"} <= set(keys) or any(np.shape(store[key]) for key in ("0", "1")):
        raise ValueError(
            "Expected a file that a SharpnessAwareModel saved, with the state of its training. "
            "Received: a file of another model, such as the plain one that it wraps. Load that "
            "into the wrapped model: `model.model.load_weights(filepath)`."
        )
    return None


def saved_method(wrapper, saved):
    """The method under which a file was saved.

    Those that the script has are taken first: with them come functions, which
    no file holds, and classes that are not registered.

    Args:
        wrapper: the `SharpnessAwareModel` into which the file is loaded.
        saved: the record, from `read`.

    Returns:
        A `Method`.

    Raises:
        ValueError: if the script does not have it, and it cannot be made.
    """
    known = dict(wrapper.progress.methods)
    at_its_epoch = known.pop(saved["epochs"].get("method"), None)
    for method in (at_its_epoch, wrapper.method, *known.values()):
        if method is not None and _agrees(method, saved["method"]):
            return method
    return _make(saved["method"], wrapper.method)


def warn_of_other_arguments(wrapper, saved):
    """Tell of arguments with which training will not go on as it was.

    They are the script's to choose, and to load weights for another training
    is common: no reason to refuse, but none for silence either.
    """
    now = {name: _describe(getattr(wrapper, name)) for name in _ARGUMENTS}
    other = [n for n in _ARGUMENTS if n in saved["arguments"] and saved["arguments"][n] != now[n]]
    if other:
        was = ", ".join(f"{name}={_name(saved['arguments'][name])}" for name in other)
        is_now = ", ".join(f"{name}={_name(now[name])}" for name in other)
        warnings.warn(
            f"The file was saved by a model with {was}. This one has {is_now}, and keeps it: its "
            "training differs from the one that was saved. To go on with that, make the model "
            "with the same arguments.",
            stacklevel=2,
        )


def refuse_legacy(filepath, verb):
    """Refuse the HDF5 format of Keras 2, which leaves the state of the training out."""
    path = os.fspath(filepath) if isinstance(filepath, (str, os.PathLike)) else ""
    if path.endswith((".h5", ".hdf5")) and (verb == "save" or not path.endswith(".weights.h5")):
        advice = {
            "save": "Save as '.keras', the weights alone by `save_weights` as '.weights.h5', or "
            "the plain model: `model.model.save(filepath)`.",
            "load_weights": "If it holds the weights of the plain model, load them into that: "
            "`model.model.load_weights(filepath)`.",
        }
        raise ValueError(
            f"A SharpnessAwareModel cannot `{verb}` the legacy HDF5 format, which has no place "
            f"for the state of its training. Received: filepath={path!r}. {advice[verb]}"
        )


def check_callbacks(callbacks):
    """Refuse a checkpoint that could not be written, before the first epoch."""
    callbacks = getattr(callbacks, "callbacks", callbacks)  # A CallbackList has them inside.
    for callback in keras.tree.flatten(callbacks):
        if isinstance(callback, keras.callbacks.ModelCheckpoint) and not callback.save_weights_only:
            refuse_legacy(callback.filepath, "save")


# Configs


def _describe(thing):
    """The config of an object or a function, as JSON knows it, without code."""
    with warnings.catch_warnings():  # Keras warns of the code of a lambda, which is left out.
        warnings.simplefilter("ignore")
        config = keras.saving.serialize_keras_object(thing)
    return json.loads(json.dumps(_without_code(config)))


def _describe_method(method):
    try:
        return _describe(method)
    except Exception:  # A `get_config` of the user, or a function without a name: anything goes.
        cls = type(method)
        registered_name = keras.saving.get_registered_name(cls)
        return {"class_name": cls.__name__, "registered_name": registered_name, "config": None}


def _without_code(config):
    if isinstance(config, dict):
        if config.get("class_name") == "__lambda__":
            return {"class_name": "__lambda__"}
        return {key: _without_code(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_without_code(value) for value in config]
    return config


def _agrees(method, saved):
    """Whether a method is the one that was saved, but for the numbers in its variables."""
    now = _describe_method(method)
    if any(now[key] != saved[key] for key in ("class_name", "registered_name")):
        return False
    if now["config"] is None or saved["config"] is None:
        return True  # There is no more to compare.
    return now["config"].keys() == saved["config"].keys() and all(
        _without_module(value) == _without_module(saved["config"][name])
        or (name in method.settings and method.settings[name].agrees_with(saved["config"][name]))
        or (name == "method" and _agrees(method.method, saved["config"][name]))
        for name, value in now["config"].items()
    )


def _without_module(config):
    """A config without the modules: a script has another name where it is imported."""
    if isinstance(config, dict):
        return {k: _without_module(v) for k, v in config.items() if k != "module"}
    if isinstance(config, list):
        return [_without_module(value) for value in config]
    return config


def _make(saved, current):
    """A method from its config: of registered classes only, since weights must be safe to load."""
    problem, error = _cannot_be_made(saved), None
    if problem is None:
        try:
            return methods.deserialize(saved)
        except Exception as raised:  # A constructor of the user.
            problem, error = f"{type(raised).__name__}: {raised}", raised
    raise ValueError(
        f"The file was saved while the method {saved['class_name']} trained the model, and it "
        f"cannot be made from the file: {problem}. The model has {type(current).__name__}. Set "
        f"`model.method` to the {saved['class_name']} that it was before the file is loaded, or "
        "save methods of classes and functions that are decorated with "
        "`keras.saving.register_keras_serializable()`."
    ) from error


def _cannot_be_made(saved):
    """Why a method may not be made from a config, or `None` if it may."""
    cls = keras.saving.get_registered_object(saved["registered_name"])
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        return f"there is no registered class {saved['registered_name']!r} of methods"
    if saved["config"] is None:
        return "its `get_config` failed when the file was saved"
    for part in _parts(saved["config"]):
        name = part.get("config") if part["class_name"] == "function" else None
        registered = keras.saving.get_registered_object(name or part.get("registered_name"))
        if (
            registered is None
            and part["class_name"] not in _ARRAYS
            and part.get("module") not in _OF_KERAS
        ):
            return f"{_name(part)} is not registered"
    return None


def _parts(config):
    """Every object in a config, at any depth."""
    if isinstance(config, dict):
        if "class_name" in config:
            yield config
        for value in config.values():
            yield from _parts(value)
    elif isinstance(config, list):
        for value in config:
            yield from _parts(value)


def _name(config):
    """A config in a few words."""
    if not isinstance(config, dict):
        return repr(config)
    if config["class_name"] == "__lambda__":
        return "a lambda"
    if config["class_name"] == "function":
        return f"the function {config['config']!r}"
    return f"{config['class_name']}(...)"

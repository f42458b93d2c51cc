"""The sharpness-aware methods, one file per paper."""

import keras

from keras_sharp.identifiers import look_up
from keras_sharp.methods.adaptive_gsam import AdaptiveGSAM
from keras_sharp.methods.asam import ASAM
from keras_sharp.methods.async_sam import AsyncSAM
from keras_sharp.methods.bsam import BSAM
from keras_sharp.methods.esam import ESAM
from keras_sharp.methods.friendly_sam import FriendlySAM
from keras_sharp.methods.gsam import GSAM
from keras_sharp.methods.looksam import LookSAM
from keras_sharp.methods.method import Method
from keras_sharp.methods.momentum_sam import MomentumSAM
from keras_sharp.methods.plain import Plain
from keras_sharp.methods.sam import SAM
from keras_sharp.methods.wsam import WSAM

__all__ = [
    "ASAM",
    "BSAM",
    "ESAM",
    "GSAM",
    "METHODS",
    "SAM",
    "WSAM",
    "AdaptiveGSAM",
    "AsyncSAM",
    "FriendlySAM",
    "LookSAM",
    "Method",
    "MomentumSAM",
    "Plain",
    "deserialize",
    "get",
    "serialize",
]

#: Every method by its name. The property tests run over this table.
METHODS: dict[str, type[Method]] = {
    "sam": SAM,
    "asam": ASAM,
    "gsam": GSAM,
    "adaptive_gsam": AdaptiveGSAM,
    "bsam": BSAM,
    "looksam": LookSAM,
    "momentum_sam": MomentumSAM,
    "async_sam": AsyncSAM,
    "friendly_sam": FriendlySAM,
    "wsam": WSAM,
    "esam": ESAM,
}


def get(identifier):
    """A method, from its name, its config or itself.

    Args:
        identifier: a name such as `"sam"` or `"adaptive_gsam"`, the name of
            a class such as `"AdaptiveGSAM"`, the config that `serialize`
            returned, or a `Method`. `None` is plain training.

    Returns:
        A `Method`.

    Raises:
        ValueError: if there is no such method; the error names the nearest
            spelling.

    Example:

    >>> keras_sharp.methods.get("gsam").get_config()["alpha"]
    0.4
    """
    if identifier is None:
        return Plain()
    if _is_optimizer(identifier):
        raise ValueError(
            "A method gives its direction to an optimizer, and is none itself. Received: "
            f"method={identifier!r}. Give the optimizer to `compile`: "
            "`SharpnessAwareModel(model, 'sam').compile(optimizer, loss)`, say."
        )
    hint = ""
    if isinstance(identifier, float):
        hint = f" A radius is an argument of the method: keras_sharp.methods.SAM(rho={identifier})."
    elif isinstance(identifier, keras.Model):
        hint = " The model is the first argument of a SharpnessAwareModel, the method the second."
    return look_up(identifier, Method, METHODS, "method", hint)


def _is_optimizer(identifier):
    if isinstance(identifier, str):
        identifier = next(
            (v for k, v in vars(keras.optimizers).items() if k.lower() == identifier.lower()), None
        )
    if isinstance(identifier, type):
        return issubclass(identifier, keras.optimizers.Optimizer)
    return isinstance(identifier, keras.optimizers.Optimizer)


def hyperparameters():
    """The names of the numbers of all methods of the package, a set."""
    return {name for method in METHODS.values() for name in method.hyperparameters()}


def serialize(method):
    """The config of a method, as a dictionary that JSON can hold.

    Args:
        method: a `Method`.

    Returns:
        A dictionary.
    """
    return keras.saving.serialize_keras_object(method)


def deserialize(config):
    """A method from what `serialize` returned.

    Args:
        config: a dictionary.

    Returns:
        A `Method`.

    Raises:
        ValueError: if the config is not that of a method.
    """
    return look_up(dict(config), Method, METHODS, "method")

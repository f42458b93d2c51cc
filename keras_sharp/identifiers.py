"""Looking things up by name, and checking numbers, with a helpful error where that fails."""

import difflib

import keras
import numpy as np


def look_up(identifier, base, table, kind, hint=""):
    """An instance of `base`: from a name in `table`, a config, or the instance itself.

    The name of a class in the table will do as well, as it does in Keras. The
    error for what is none of these ends with `hint`.
    """
    if isinstance(identifier, base):
        return identifier
    if isinstance(identifier, dict):
        found = keras.saving.deserialize_keras_object(identifier)
        if isinstance(found, base):
            return found
    if isinstance(identifier, str):
        name = identifier.lower().replace("-", "_")
        names = {**{cls.__name__.lower(): cls for cls in table.values()}, **table}
        if name in names:
            return names[name]()
        raise ValueError(
            f"There is no {kind} named {identifier!r}.{did_you_mean(name, table)} "
            f"Expected one of {sorted(table)}, or an instance of "
            f"{base.__module__}.{base.__name__}."
        )
    if isinstance(identifier, type) and issubclass(identifier, base):
        hint = f" Pass an instance of the class: {identifier.__name__}()."
    raise ValueError(
        f"A {kind} must be one of the names {sorted(table)} or an instance of "
        f"{base.__module__}.{base.__name__}. Received: {identifier!r} "
        f"(of type {type(identifier).__name__}).{hint}"
    )


def check_count(name, value, at_least, meaning=""):
    """Refuse a number of something that is not an integer of some size."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < at_least:
        what = f"`{name}`, {meaning}," if meaning else f"`{name}`"
        raise ValueError(f"{what} must be an integer >= {at_least}. Received: {name}={value!r}")


def check_boolean(name, value):
    """Refuse what is neither `True` nor `False`."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")


def check_fraction(name, value):
    """Refuse what is not a number in [0, 1), and return it as a float."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be a number in [0, 1). Received: {name}={value!r}")
    return float(value)


def check_share(name, value):
    """Refuse what is not a number in (0, 1], and return it as a float."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be a number in (0, 1]. Received: {name}={value!r}")
    return float(value)


def did_you_mean(name, names):
    """A question that names the nearest spelling, or nothing."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def meant(name, names):
    """The one of `names` that `name` is up to one slip of the fingers, or `None`.

    Stricter than `did_you_mean`, to tell a slip from a name of its own: a
    letter more, less or another one, or two that are swapped.
    """
    return next((known for known in names if name != known and _is_slip(name, known)), None)


def _is_slip(name, known):
    short, long = sorted((name.lower(), known.lower()), key=len)
    same = next(
        (i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short)
    )
    short, long = short[same:], long[same:]
    return (
        short == long[1:]
        or short[1:] == long[1:]
        or (short[:2] == long[1::-1] and short[2:] == long[2:])
    )

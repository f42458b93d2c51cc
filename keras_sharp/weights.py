"""Which weights take part in the perturbation, and which of them are biases."""

from keras_sharp.identifiers import did_you_mean


def is_bias(variable):
    """Whether a variable is a bias, which ASAM leaves unscaled: by its name in Keras."""
    return variable.name in ("bias", "beta") or variable.name.endswith("_bias")


def is_norm(variable):
    """Whether a variable belongs to a normalization layer: by its name and that of its layer."""
    layer = variable.path.split("/")[-2] if "/" in variable.path else ""
    return variable.name in ("gamma", "beta") or "norm" in layer


def is_overwritten(variable):
    """Whether a float8 layer puts the next value of a variable in place of its gradient."""
    return getattr(variable, "overwrite_with_gradient", False)


#: The choices of `perturb`, by name.
CHOICES = {
    "all": lambda variable: True,
    "no_bias_no_norm": lambda variable: not (is_bias(variable) or is_norm(variable)),
    "norm_only": is_norm,
}


def get_choice(perturb):
    """The function of a variable that `perturb` stands for: one of `CHOICES`, or itself."""
    if callable(perturb):
        return perturb
    if isinstance(perturb, str) and perturb in CHOICES:
        return CHOICES[perturb]
    hint = did_you_mean(perturb, CHOICES) if isinstance(perturb, str) else ""
    raise ValueError(
        f"`perturb` must be one of {list(CHOICES)} or a function that receives a variable and "
        f"returns a Boolean. Received: perturb={perturb!r}.{hint}"
    )

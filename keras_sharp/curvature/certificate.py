"""Is a product with a matrix of second derivatives right? Differences of gradients tell."""

import warnings
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_sharp import engine

#: The spacing of the numbers next to 1.
_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
#: How many times the noise of the differences an error must be: to be told, and to be refused.
WEAK, STRONG = 3.0, 6.0
#: How many examples stand for all: see `few_examples`.
EXAMPLES = 2


class Certificate(NamedTuple):
    """How well the products of an operator agree with differences of gradients.

    The numbers are relative to the length of the product. They are taken
    for random vectors, at the weights of the last `refresh`, on a few
    examples.

    Attributes:
        verified: Boolean, whether `error` and `asymmetry` are below
            `tolerance`. If not, the differences cannot tell: kinks of the loss
            (ReLU, max pooling) or rounding disturb them more than that, or
            all of them are zero. That is no sign of a mistake: a product that
            is seen to be wrong is refused.
        error: Float, the difference of product and difference quotient. Of all
            layers, the largest counts.
        noise: Float, how far the difference quotients on either side are from
            each other in that layer: errors that are smaller cannot be seen.
            NaN where it did not matter.
        asymmetry: Float, by how much `u' H v` and `v' H u` differ.
        tolerance: Float, the error that passes. It depends on the dtypes in
            which the model computes: `1e-2` in float32, `5e-7` in float64, `0.1` in
            half precision.
    """

    verified: bool
    error: float
    noise: float
    asymmetry: float
    tolerance: float


def few_examples(batch):
    """A batch of the same shapes in which a few examples take turns.

    A kink, such as that of a ReLU, adds to the differences of gradients what
    is not in the Hessian. On few examples this is rare, or differs so much
    from one side to the other that it is seen to be noise. On many it would
    average to a second derivative: the one of the mean, which no product has.
    The shapes stay as they are, such that nothing is compiled again.

    Args:
        batch: nested structure of NumPy arrays.

    Returns:
        A nested structure like it, or `batch` itself if it has other leaves.
    """
    leaves = [a for a in keras.tree.flatten(batch) if a is not None]
    sizes = {len(a) if isinstance(a, np.ndarray) and a.ndim else 0 for a in leaves}
    if len(sizes) != 1 or 0 in sizes:
        return batch
    (size,) = sizes
    spread = np.linspace(0, size - 1, min(EXAMPLES, size)).astype(int)
    turns = spread[np.arange(size) % len(spread)]
    return keras.tree.map_structure(lambda a: None if a is None else a[turns], batch)


def certify(product, gradient, response, w, variables, model, factor):
    """Compare products with differences of gradients, and refuse what is wrong.

    ```
    H v = (g(w + h v) - g(w - h v)) / 2h        u' H v = v' H u
    ```

    Takes two products and two gradients; a third one where the two differ, to
    learn how much of that is noise. Where there is more than noise, the
    gradient of the outputs tells how they are rounded, and a second direction
    must confirm it.

    Args:
        product: function of an array, `v -> H v`.
        gradient: function of an array, `v -> g(w + v)`, of which the product
            is the derivative at zero.
        response: function without arguments that returns an array, the
            gradient where the loss pulls each output by about 1. Of a
            cross-entropy, no output is pulled by more; and what is pulled by
            almost nothing, since its example is known by heart, is so by the
            difference of two numbers of about 1, rounded as these are.
        w: array, the weights.
        variables: the variables of the model that the entries stand for.
        model: the `keras.Model`.
        factor: Float, the step `h` relative to the weights, in roots of the
            precision.

    Returns:
        A `Certificate`.

    Raises:
        ValueError: if the product is wrong.
    """
    eps = _precision(model, variables, w)
    tolerance, step = min(32 * eps**0.5, 0.1), min(factor * eps**0.5, 0.1)
    h = step * (float(np.sqrt(np.mean(np.square(w, dtype="float64")))) or 1.0)
    layers = _Layers(variables)
    u, v = np.random.default_rng(0).standard_normal((2, w.size))
    hu, hv = product(u), product(v)
    size = (np.linalg.norm(hu) + np.linalg.norm(hv)) / 2

    def compare(v, hv):
        """What layers are off by, and what noise is, relative to their part of the product."""
        plus, minus = gradient(h * v), gradient(-h * v)
        quotient = (plus - minus) / (2 * h)
        scale = np.maximum(layers.floored_norms(hv), layers.floored_norms(quotient))
        scale = np.where(scale > 0, scale, 1.0)
        error = layers.norms(hv - quotient) / scale
        noise = np.full(error.shape, np.nan)
        if not np.all(error <= tolerance):
            here = gradient(0 * v)
            # For a smooth loss the first term is of the order of h. Where a gradient does not move
            # by as much as its last digit, the differences are zero, and so is that term.
            noise = layers.floored_norms(plus - 2 * here + minus) + eps * layers.norms(here)
            noise = noise / (h * scale)
            if np.any(_excess(error, noise, tolerance) > WEAK):
                noise = noise + eps * layers.norms(response()) / (h * scale)
        return error, noise

    error, noise = compare(v, hv)
    asymmetry = float(abs(u @ hv - v @ hu) / size) if size else 0.0
    worst = int(np.nanargmax(error)) if np.any(error == error) else 0
    passed = bool(np.all(error <= tolerance) and asymmetry <= tolerance and size > 0)
    result = Certificate(
        passed, float(error[worst]), float(noise[worst]), asymmetry, float(tolerance)
    )
    if passed or not np.isfinite(size):
        return result

    crooked = asymmetry > tolerance
    if crooked:  # A rounding error of the products is no asymmetry.
        rounding = np.linalg.norm(product(u - v) - (hu - hv)) / size
        crooked = asymmetry > STRONG * rounding
    excess = _excess(error, noise, tolerance)
    if np.any(excess > WEAK):
        again, disturbed = compare(u, hu)
        excess = np.minimum(excess, _excess(again, disturbed, tolerance))
    if crooked or np.any(excess > STRONG):
        raise ValueError(_refusal(result, layers, error, excess, crooked, model))
    if np.any(excess > WEAK):
        warnings.warn(
            f"{_refusal(result, layers, error, excess, crooked, model)} The evidence is weak: "
            f"the difference is {np.max(excess):.0f} times what rounding and kinks explain.",
            stacklevel=2,
        )
    return result


def _excess(error, noise, tolerance):
    """How many times the noise an error is; zero for those within the tolerance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.where(error > tolerance, error / noise, 0.0), posinf=np.inf)


def _precision(model, variables, w):
    """The coarsest spacing of the numbers that the model computes with."""
    names = {keras.backend.standardize_dtype(v.dtype) for v in variables}
    names.add(str(w.dtype))  # JAX has float32 in place of float64, unless told otherwise.
    names |= {layer.compute_dtype for layer in [model, *engine.all_layers(model)]}
    if names == {"float64"}:
        # On JAX and PyTorch, some operations of Keras return float32 all the same, from 3.12 on.
        ones = ops.convert_to_tensor(np.ones((1, 1)), dtype="float64")
        names |= {keras.backend.standardize_dtype(op(ones).dtype) for op in (ops.mean, _squared)}
    return max(_EPS.get(name, 0.0) for name in names)


def _squared(matrix):
    return ops.matmul(matrix, matrix)


class _Layers:
    """The layers that the entries of a vector belong to."""

    def __init__(self, variables):
        owners = [v.path.rpartition("/")[0] or v.path for v in variables]
        #: The names of the layers, each with those of its parents.
        self.names = list(dict.fromkeys(owners))
        sizes = [int(np.prod(v.shape)) for v in variables]
        self._index = np.repeat([self.names.index(owner) for owner in owners], sizes)
        self._share = np.bincount(self._index, minlength=len(self.names)) / sum(sizes)

    def norms(self, x):
        """The norm of the part of each layer."""
        return np.sqrt(np.bincount(self._index, x**2, minlength=len(self.names)))

    def floored_norms(self, x):
        """The norm of the part of each layer, or what its share would be, if that is more.

        What is small beside the rest is no measure: it may be all rounding, and a few numbers may
        be small by chance.
        """
        return np.maximum(self.norms(x), np.sqrt(self._share * np.sum(x**2)))


def _refusal(result, layers, error, excess, crooked, model):
    wrong = [i for i in np.argsort(-error) if excess[i] > WEAK]
    parts = ", ".join(f"{layers.names[i]!r} by {error[i]:.2g}" for i in wrong[:5])
    findings = []
    if wrong:
        suspects = _suspects([layers.names[i] for i in wrong], layers.names, model)
        findings.append(
            f"Relative to differences of gradients, it is off in the rows of the layers {parts}. "
            "Suspect are layers that the weights of these act through; first of all: "
            f"{', '.join(suspects)}."
        )
    if crooked:
        findings.append(
            f"`u' H v` and `v' H u` differ by {result.asymmetry:.2g} of their size"
            + ("." if wrong else ", and the differences show in no layer.")
        )
    return (
        f"A product with the matrix of second derivatives of the model {model.name!r} is wrong. "
        f"Received: {' '.join(findings)} Expected errors of up to {result.tolerance:.1g}. Look for "
        "custom gradients, `stop_gradient`, and operations of the backend whose gradient cannot be "
        "differentiated. `certify=False` turns this check off."
    )


def _suspects(wrong, known, model):
    """The last layer with a wrong part of the product, and what follows up to one that is right.

    The second derivative of a layer enters the rows of its own weights and of those before it.
    """
    ordered = engine.all_layers(model)
    owners = {
        v.path.rpartition("/")[0]: i
        for i, layer in enumerate(ordered)
        for v in layer.trainable_variables
    }
    last = max((owners[name] for name in wrong if name in owners), default=0)
    right = [owners[name] for name in known if name in owners and name not in wrong]
    end = min((i for i in right if i > last), default=len(ordered))
    names = [f"{layer.name!r} ({type(layer).__name__})" for layer in ordered[last : end + 1]]
    return names[:8] + ["the loss"] * (end == len(ordered))

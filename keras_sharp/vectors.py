"""Arithmetic on lists of tensors: weights, gradients, perturbations.

A *vector* here is a list with one tensor per weight of the model. An entry
may be `None`: this weight has no gradient, or takes no part in the
perturbation. Two decisions that every sharpness-aware method needs are made
in this file and nowhere else: what `None` means (nothing: it adds nothing,
and counts nowhere) and what dividing by the norm of a zero vector gives
(zero).
"""

from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_sharp import engine

__all__ = [
    "add",
    "add_scaled",
    "cosine",
    "dot",
    "norm",
    "quotient",
    "recall",
    "reject",
    "remember",
    "scale",
    "zeros",
]


class _Range(NamedTuple):
    """Where a sum of squares is as good as any, in one dtype.

    Below `low` it may have lost terms to underflow, above `high` be about to
    overflow. That of the vector times `factor`, or divided by it, is right:
    for all that the dtype can hold, but for the last bits of subnormals. A
    power of two rounds nothing. A larger one would make the derivative of the
    norm underflow.
    """

    low: float
    high: float
    factor: float

    def holds(self, squared):
        """Whether a sum of squares is inside."""
        return (squared > self.low) & (squared < self.high)


_RANGES = {
    "float32": _Range(1e-25, 1e30, 2.0**80),
    "float64": _Range(1e-250, 1e300, 2.0**600),
}


class Vector(list):
    """A list of tensors that knows its Euclidean norm.

    The norm of a gradient is needed more than once, by the check that it is
    finite and by the perturbation; this spares the second pass over it. Treat
    it as immutable. All functions of this module take plain lists as well.
    """

    def __init__(self, entries):
        super().__init__(entries)
        self.squared_norm = dot(self, self)
        self.norm = _norm(self, self.squared_norm)


def present(x):
    """The entries that are not `None`."""
    return [t for t in x if t is not None]


def map_present(fn, x):
    """Apply `fn` to each entry that is not `None`."""
    return [None if t is None else fn(t) for t in x]


def like_present(values, x):
    """Put `values`, one for each entry that is present, where `x` has one."""
    values = iter(values)
    return [None if t is None else next(values) for t in x]


def scale(a, x):
    """`a * x` for a scalar `a`; every entry keeps its dtype."""
    return like_present(engine.scale(a, present(x)), x)


def add(x, y):
    """`x + y`; where one of the two has no entry, the other one stands."""
    both = [i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a is not None and b is not None]
    total = [b if a is None else a for a, b in zip(x, y, strict=True)]
    for i, t in zip(both, engine.add([x[i] for i in both], [y[i] for i in both]), strict=True):
        total[i] = t
    return total


def add_scaled(x, a, y):
    """`x + a * y` for a scalar `a`; where only one of the two has an entry, that part alone."""
    both = [i for i, (s, t) in enumerate(zip(x, y, strict=True)) if s is not None and t is not None]
    alone = [t if s is None else None for s, t in zip(x, y, strict=True)]
    total = [s if t is None else t for s, t in zip(x, scale(a, alone), strict=True)]
    sums = engine.add_scaled([x[i] for i in both], a, [y[i] for i in both])
    for i, t in zip(both, sums, strict=True):
        total[i] = t
    return total


def dot(x, y):
    """The inner product of `x` and `y`, a scalar of at least float32."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    if not pairs:
        return widen(ops.zeros(()))
    return engine.dot([a for a, _ in pairs], [b for _, b in pairs])


def norm(x):
    """The Euclidean norm of `x`, right also where the squares over- or underflow."""
    return x.norm if isinstance(x, Vector) else _norm(x, dot(x, x))


def _norm(x, squared):
    safe = _range(squared)

    def rescaled():
        one = ops.ones_like(squared)
        factor = ops.where(squared < safe.low, safe.factor * one, one / safe.factor)
        again = map_present(lambda t: _times(factor, ops.cast(t, factor.dtype)), x)
        square = dot(again, again)
        # The inner `where` keeps the derivative of the root finite at zero.
        root = ops.sqrt(ops.where(square == 0, one, square))
        return ops.where(square == 0, ops.zeros_like(root), root / factor)

    return engine.cond(safe.holds(squared), lambda: ops.sqrt(squared), rescaled)


def _times(factor, t):
    """`factor * t`, also of zeros that XLA knows when it compiles.

    It would multiply them with the square of the factor, which is infinite.
    """
    return ops.where(t == 0, ops.zeros_like(t), t * factor)


def _range(squared):
    """The range in which a sum of squares of this dtype is safe."""
    return _RANGES[keras.backend.standardize_dtype(squared.dtype)]


def scaled_to_one(x):
    """A scalar `a`, and `x / a` with a largest entry of about 1, whose powers are harmless.

    Returns:
        The pair `(a, x / a)`. For a zero vector `a` is 1.
    """
    a = ops.stop_gradient(max_abs(x))
    a = ops.where(a == 0, ops.ones_like(a), a)
    # XLA divides by multiplying with 1 / a, which above 8e37 it takes for 0.
    a = ops.where(a > 1e37, 1e37 * ops.ones_like(a), a)
    return a, map_present(lambda t: ops.cast(widen(t) / ops.cast(a, widen(t).dtype), t.dtype), x)


def max_abs(x):
    """The largest absolute entry; 0 for a vector without entries."""
    largest = ops.zeros(())
    for t in present(x):
        if 0 not in t.shape:
            candidate = widen(ops.max(ops.abs(t)))
            largest = maximum(candidate, ops.cast(largest, candidate.dtype))
    return largest


def maximum(a, b):
    """The larger of two scalars; unlike `ops.maximum` it keeps float64 everywhere."""
    return ops.where(a > b, a, b)


def widen(t):
    """A tensor in the dtype in which sums are taken: float32, or float64."""
    return ops.cast(t, "float64" if "float64" in str(t.dtype) else "float32")


def zeros(variables):
    """Zeros for a method to remember, in the shapes of `variables`; NumPy, of at least float32."""
    dtypes = ["float64" if "float64" in str(v.dtype) else "float32" for v in variables]
    return [np.zeros(v.shape, dtype) for v, dtype in zip(variables, dtypes, strict=True)]


def remember(x, memory):
    """`x` in the dtypes of `memory`, which stands where `x` has no entry."""
    return [m if t is None else ops.cast(t, m.dtype) for t, m in zip(x, memory, strict=True)]


def recall(memory, x):
    """`memory` in the dtypes of `x`, with no entry where `x` has none."""
    return [None if t is None else ops.cast(m, t.dtype) for m, t in zip(memory, x, strict=True)]


def quotient(a, b):
    """`a / b` for scalars, and 0 where `b` is 0; so is the derivative."""
    return engine.quotient(a, b)


def reject(x, onto):
    """The part of `x` that is perpendicular to `onto`; `x` itself if that is 0."""
    squared = onto.squared_norm if isinstance(onto, Vector) else dot(onto, onto)
    product = dot(x, onto)

    def by_largest():
        largest_x, largest = max_abs(x), max_abs(onto)
        a = scale(quotient(ops.ones_like(largest_x), largest_x), x)
        b = scale(quotient(ops.ones_like(largest), largest), onto)
        return quotient(dot(a, b), dot(b, b)) * quotient(largest_x, largest)

    # Dividing the two products, not the vectors, makes the rejection of a
    # vector from itself exactly zero: GSAM at rho 0 is then plain training.
    coefficient = engine.cond(
        _range(squared).holds(squared),
        lambda: product / squared,
        by_largest,
    )
    return add_scaled(x, -coefficient, onto)


def cosine(x, y):
    """The cosine of the angle between `x` and `y`; 0 if one of them is 0."""
    (_, x), (_, y) = scaled_to_one(x), scaled_to_one(y)
    return quotient(dot(x, y), norm(x) * norm(y))

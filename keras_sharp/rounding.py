"""Changes of a loss that are small beside the loss: how far they are rounding, and a way around.

The difference of two losses in float32 is a multiple of the rounding step of
the losses: at a loss of 1e6 that is 0.06. What a batch has lost in its sum, no
later sum brings back. But the change is also the integral of the slope along
the way, and a slope is not the difference of two large numbers:

```
L(w + e) - L(w) = ∫₀¹ ∇L(w + t e)·e dt ≈ (s(0) + 4 s(½) + s(1)) / 6,   s(t) = ∇L(w + t e)·e
```

So a change that stands out of the rounding is the difference of two losses;
one that does not is this integral, by Simpson's rule, which is exact for a
polynomial of degree four.
"""

import math
import warnings
from typing import NamedTuple

import keras
import numpy as np

from keras_sharp import engine

#: By how much of itself a number of this dtype is rounded at most.
_UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}

#: A change of so many times its rounding is right to one percent.
_STANDS_OUT = 100.0

#: If a change may be wrong by more than this share of itself, a warning says so.
_TOLERANCE = 0.1


class Change(NamedTuple):
    """How far a loss goes, and how far that may be off.

    Attributes:
        value: Float, the change.
        error: Float, about one standard deviation of what rounding, and the
            rule of an integral, have added.
        spread: Float, the standard error of a mean over samples, in which
            their own rounding is contained.
    """

    value: float
    error: float
    spread: float = 0.0

    @property
    def is_rounding(self):
        """Whether it may be wrong by more than a tenth, and its spread does not tell."""
        # What is independent from sample to sample is in the spread.
        return self.error > max(_TOLERANCE * abs(self.value), 3 * self.spread)


def unit(dtype):
    """The unit roundoff of a dtype; of one that is no float, that of float32."""
    return _UNITS.get(keras.backend.standardize_dtype(dtype), _UNITS["float32"])


def coarsest_unit(model):
    """The unit roundoff of the coarsest dtype in which a layer of the model computes."""
    return max(unit(layer.compute_dtype or "float32") for layer in engine.all_layers(model))


def of_losses(losses, sizes, final, inner, summed=False):
    """What rounding has added to the losses of batches, in standard deviations.

    The noise of each example goes down in their mean, that of the mean itself
    does not. The first is not less than if the example had a loss of 1:
    logits and probabilities are rounded in such units, however small a loss
    they make.

    Args:
        losses: array, the loss of each batch.
        sizes: array, how many examples it is a mean, or a sum, of.
        final: Float, the unit roundoff of the loss.
        inner: Float, that of the predictions.
        summed: Boolean, whether the losses are sums over the examples.

    Returns:
        An array.
    """
    losses, sizes = np.abs(losses), np.maximum(sizes, 1.0)
    examples = np.maximum(losses, sizes if summed else 1.0) / np.sqrt(sizes)
    return np.hypot(final * losses, 2.0 * max(final, inner) * examples)


def simpson(slopes, loss, noise):
    """The integral over the slopes at 0, 1/2 and 1 as a `Change`.

    Its error is the difference from the trapezoid rule, which slopes that are
    nothing but noise make as large as the integral is off. Unless all three
    are rounded alike: residuals of 1e8 do not see that predictions move by
    1. So it is not less than what rounding residuals adds to a slope of a
    squared error, `sqrt(2 * slope / loss)` of what it adds to the loss.

    Args:
        slopes: array of the shape `(3,)`; or `(k, 3)`, of which the mean is
            taken.
        loss: Float, the loss at 0.
        noise: Float, the rounding of that loss.
    """
    start, middle, end = np.mean(np.atleast_2d(slopes), axis=0)
    steepest = float(np.max(np.abs(slopes)))
    rounded = noise * math.sqrt(2 * steepest / abs(loss)) if loss else 0.0
    value = float(start + 4 * middle + end) / 6
    return Change(value, max(float(abs(start - 2 * middle + end)) / 3, rounded))


def settle(by_losses, by_slopes):
    """A change by the better one of two ways.

    Args:
        by_losses: a `Change`, the difference of losses.
        by_slopes: function without arguments that returns the same as an
            integral. Only called if the first may be rounding.

    Returns:
        A `Change`.
    """
    if not math.isfinite(by_losses.value) or abs(by_losses.value) > _STANDS_OUT * by_losses.error:
        return by_losses
    integral = by_slopes()
    apart = abs(integral.value - by_losses.value)
    if not apart <= 5 * (by_losses.error + integral.error):
        # The gradient is not that of the loss (a quantized layer, say), or there is more noise
        # in the loss than its dtype tells.
        return by_losses._replace(error=max(apart, by_losses.error))
    return min(by_losses, integral, key=lambda change: change.error)


def warn(name, change, loss, stacklevel=2):
    """Say so if a change may be nothing but rounding; return its value.

    Args:
        name: String, what was measured.
        change: a `Change`.
        loss: Float, the loss beside which it is small.
        stacklevel: Integer, that of `warnings.warn`, as if the caller called it.
    """
    if change.is_rounding:
        warnings.warn(
            f"`{name}` may be rounding: it is {change.value:.3g}, of which about "
            f"{change.error:.2g} is noise, beside a loss of {loss:.3g}. {ADVICE}",
            stacklevel=stacklevel + 1,
        )
    return change.value


def warn_of_logs(history, stacklevel=3):
    """Say so if the log `sharpness` of a training is nothing but rounding.

    Args:
        history: dictionary of logs, each a list with an entry per epoch.
        stacklevel: Integer, that of `warnings.warn`.
    """
    logs = [history.get(name, []) for name in ("sharpness", "loss", "rho")]
    small = [
        (value, loss)
        for value, loss, rho in zip(*logs, strict=False)
        if rho > 0 and abs(value) < 10 * _UNITS["float32"] * abs(loss)
    ]
    if small:
        value, loss = small[-1]
        warnings.warn(
            f"The log `sharpness` is rounding in {len(small)} of {len(logs[0])} epochs, in the "
            f"last of them {value:.3g} beside a loss of {loss:.3g}: in float32 these differ by "
            f"multiples of about {2 * _UNITS['float32'] * abs(loss):.2g}. {ADVICE}",
            stacklevel=stacklevel,
        )


#: What to do where a change is rounding.
ADVICE = (
    "Take a larger rho, scale the targets so that the loss is about 1, or compute in a finer dtype "
    "(float32 for float16 and bfloat16; float64, which Keras keeps on TensorFlow)."
)

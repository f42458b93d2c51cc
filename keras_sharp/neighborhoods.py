"""The regions that the adversary may search, and the step each one takes.

A neighborhood turns the gradient `g` at the weights `w` into a perturbation
`e` that climbs the loss. Any method may be combined with any neighborhood:

```python
keras_sharp.methods.GSAM(rho=0.05, neighborhood=keras_sharp.neighborhoods.Ball(p=float("inf")))
```

| neighborhood | perturbation `e` | region |
|---|---|---|
| `Ball(p=2)` | `rho g / ‖g‖` | `‖e‖₂ <= rho` |
| `Ball(p)` | `rho sign(g) abs(g)^(q-1) / (‖g‖_q^q)^(1/p)`, `1/p + 1/q = 1` | `‖e‖_p <= rho` |
| `AdaptiveBall(eta)` | `rho T²g / ‖Tg‖`, `T = abs(w) + eta` (biases: 1) | `‖e / T‖ <= rho` |
| `WeightScaledBall(gamma)` | `rho T g / ‖g‖`, `T = abs(w) + gamma` | `‖e / T‖ <= rho` |
| `Unnormalized()` | `rho g` | none |
"""

import math

import keras
from keras import ops

from keras_sharp import vectors
from keras_sharp.identifiers import check_boolean, look_up

__all__ = [
    "AdaptiveBall",
    "Ball",
    "Neighborhood",
    "Unnormalized",
    "WeightScaledBall",
    "get",
]


class Neighborhood:
    """Base class: a region around the weights, and a step to its border.

    Subclasses write `climb`, `norm`, and `get_config`. All vector arguments
    are lists with one tensor per weight, where `None` marks a weight that is
    not perturbed.
    """

    #: The order of the norm in which the region is a ball.
    p = 2.0

    def scales(self, w, biases=None):
        """What counts as a change of 1, one tensor per weight; `None` stands for 1."""
        return [None] * len(w)

    def climb(self, g, w, rho, biases=None):
        """The perturbation of size `rho` that climbs the loss, as a product.

        The factor is kept apart so that `w + factor * direction` can be had in
        one pass over the weights.

        Args:
            g: the gradient, a list of tensors of any shapes, or `None`.
            w: the weights around which the region lies, a list of tensors of
                the same shapes and dtypes.
            rho: the radius, a scalar.
            biases: list of Booleans, `True` for a bias vector. Only
                `AdaptiveBall` reads it. Defaults to no biases.

        Returns:
            A pair: a scalar, and a list like `g` (same shapes, dtypes and
            `None`s). Their product is the perturbation.
        """
        raise NotImplementedError

    def perturbation(self, g, w, rho, biases=None):
        """The perturbation of size `rho` that climbs the loss; see `climb`."""
        return vectors.scale(*self.climb(g, w, rho, biases))

    def norm(self, e, w, biases=None):
        """The size of a perturbation as this neighborhood measures it."""
        raise NotImplementedError

    def project(self, e, w, rho, biases=None):
        """The point of the region that is nearest to `e`, in its own norm."""
        # Dividing by at least rho leaves points inside the region where they are.
        rho = _like(rho, size := self.norm(e, w, biases))
        return vectors.scale(vectors.quotient(rho, vectors.maximum(size, rho)), e)

    def ascend(self, e, g, w, rho, biases=None):
        """The perturbation after one more step of an ascent, projected back to the region.

        Args:
            e: the perturbation so far, a list like `g`; `None` at the start.
            g: the gradient at `w + e`, a list of tensors, or `None`.
            w: see `climb`.
            rho: the radius, a scalar. With a negative one the steps descend.
            biases: see `climb`.

        Returns:
            A list like `g`.
        """
        step = self.perturbation(g, w, rho, biases)
        return step if e is None else self.project(vectors.add(e, step), w, abs(rho), biases)

    def get_config(self):
        """The arguments of the constructor, as plain values."""
        return {}

    @classmethod
    def from_config(cls, config):
        """Make a neighborhood from what `get_config` returned."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_sharp")
class Ball(Neighborhood):
    """The ball of a p-norm; with `p=2` the Euclidean ball of the SAM paper.

    ```
    e = rho * g / ‖g‖                                             # p = 2
    e = rho * sign(g) * abs(g)**(q - 1) / sum(abs(g)**q)**(1 / p)   # 1/p + 1/q = 1
    e = rho * sign(g)                                             # p = inf
    ```

    Args:
        p: Float in (1, inf], the order of the norm. Defaults to `2.0`, which
            the paper found to be the best.

    Raises:
        ValueError: if `p` is not a number greater than 1.

    Example:

    >>> method = keras_sharp.methods.SAM(neighborhood=keras_sharp.neighborhoods.Ball(p=4))

    Reference:
        - [Foret et al., 2021](https://arxiv.org/abs/2010.01412), section 2, equation 2.
    """

    def __init__(self, p=2.0):
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not p > 1:
            raise ValueError(
                f"`p`, the order of the norm, must be a number in (1, inf]. Received: p={p!r}. "
                "Pass 2 for the Euclidean ball or float('inf') for the maximum norm; the ball of "
                "p=1 would change a single weight and is not offered."
            )
        self.p = float(p)

    def climb(self, g, w, rho, biases=None):
        if self.p == 2.0:
            return _over(rho, vectors.norm(g)), g
        if math.isinf(self.p):
            return rho, vectors.map_present(_sign, g)
        q = self.p / (self.p - 1.0)
        # The rule does not depend on the scale of g; largest entry 1 is safe.
        _, g = vectors.scaled_to_one(g)
        length = _power(_sum_of_powers(g, q), 1.0 / self.p)
        direction = vectors.map_present(lambda t: _sign(t) * _power(ops.abs(t), q - 1.0), g)
        return _over(rho, length), direction

    def norm(self, e, w, biases=None):
        if self.p == 2.0:
            return vectors.norm(e)
        if math.isinf(self.p):
            return vectors.max_abs(e)
        unit, e = vectors.scaled_to_one(e)
        return unit * _power(_sum_of_powers(e, self.p), 1.0 / self.p)

    def project(self, e, w, rho, biases=None):
        if math.isinf(self.p):  # Of all nearest points the one that moves each entry least.
            return vectors.map_present(lambda t: _clip(t, _like(rho, t)), e)
        return super().project(e, w, rho, biases)

    def get_config(self):
        return {"p": self.p}


@keras.saving.register_keras_serializable(package="keras_sharp")
class AdaptiveBall(Neighborhood):
    """ASAM's region: a ball in coordinates in which every weight has size 1.

    ```
    T = abs(w) + eta          # biases: T = 1
    e = T * Ball(p).perturbation(T * g)       # p = 2: rho * T²g / ‖Tg‖
    ```

    The size of a perturbation is `‖e / T‖`. With `eta=0` and
    `scale_biases=True` the region goes along with any rescaling of the
    weights: let `D` be diagonal and positive, and `L(D w)` be the old loss
    (the weights and the bias of a ReLU unit times c and its outgoing weights
    divided by c, say), then `e` becomes `D e`. A weight of exactly 0 does not
    move. The defaults are those of training: with them it is so for large
    weights only, and for networks without biases.

    Args:
        eta: Float >= 0, keeps the scale of small weights from vanishing.
            Defaults to `0.01`, the paper's value.
        p: Float in (1, inf], the order of the norm. Defaults to `2.0`.
        scale_biases: Boolean, whether biases have the scale of other weights,
            in place of 1. Defaults to `False`.

    Raises:
        ValueError: if `eta` is negative or not a finite number, if `p` is
            not greater than 1, or if `scale_biases` is no Boolean.

    Example:

    >>> region = keras_sharp.neighborhoods.AdaptiveBall(eta=0.01)
    >>> method = keras_sharp.methods.GSAM(rho=0.5, neighborhood=region)

    Reference:
        - [Kwon et al., 2021](https://arxiv.org/abs/2102.11600), equations 3 and 8. As in the
          authors' code, scales of normalization layers are scaled and biases are not.
    """

    def __init__(self, eta=0.01, p=2.0, scale_biases=False):
        check_boolean("scale_biases", scale_biases)
        self.eta = _non_negative("eta", eta)
        self.ball = Ball(p)
        self.p = self.ball.p
        self.scale_biases = scale_biases

    def scales(self, w, biases=None):
        """The operator `T`, one tensor per weight; `None` for a bias stands for 1."""
        if biases is None or self.scale_biases:
            biases = [False] * len(w)
        return [None if bias else _size(t, self.eta) for t, bias in zip(w, biases, strict=True)]

    def climb(self, g, w, rho, biases=None):
        scales = self.scales(w, biases)
        factor, direction = self.ball.climb(_times(scales, g), w, rho)
        return factor, _times(scales, direction)

    def norm(self, e, w, biases=None):
        return self.ball.norm(_divided(e, self.scales(w, biases)), w)

    def project(self, e, w, rho, biases=None):
        scales = self.scales(w, biases)
        return _times(scales, self.ball.project(_divided(e, scales), w, rho))

    def get_config(self):
        return {"eta": self.eta, "p": self.p, "scale_biases": self.scale_biases}


@keras.saving.register_keras_serializable(package="keras_sharp")
class WeightScaledBall(Neighborhood):
    """The region of Adaptive-GSAM and of the "adaptive" official GSAM code.

    ```
    T = abs(w) + gamma
    e = rho * T * g / ‖g‖
    ```

    It has one factor `T` where ASAM has two, and the norm is that of the bare
    gradient: `‖e / T‖ = rho`. It is not the steepest direction in that norm.
    All weights are scaled, biases too.

    Args:
        gamma: Float >= 0, keeps the scale of small weights from vanishing.
            Defaults to `0.01`, as in Adaptive-GSAM; the official GSAM code
            has `0`.

    Raises:
        ValueError: if `gamma` is negative or not a finite number.

    Example:

    >>> method = keras_sharp.methods.SAM(neighborhood=keras_sharp.neighborhoods.WeightScaledBall())

    Reference:
        - [Zhuang et al., 2022](https://arxiv.org/abs/2203.08065), the option
          `adaptive_perturbation` of the authors' code.
    """

    def __init__(self, gamma=0.01):
        self.gamma = _non_negative("gamma", gamma)

    def scales(self, w, biases=None):
        """The factor `T`, one tensor per weight."""
        return [_size(t, self.gamma) for t in w]

    def climb(self, g, w, rho, biases=None):
        return _over(rho, vectors.norm(g)), _times(self.scales(w), g)

    def norm(self, e, w, biases=None):
        return vectors.norm(_divided(e, self.scales(w)))

    def get_config(self):
        return {"gamma": self.gamma}


@keras.saving.register_keras_serializable(package="keras_sharp")
class Unnormalized(Neighborhood):
    """No region: a step along the gradient itself, `e = rho * g`.

    The perturbation shrinks with the gradient, so `rho` has another unit than
    elsewhere and has to be chosen anew.

    Example:

    >>> method = keras_sharp.methods.SAM(rho=0.1, neighborhood="unnormalized")

    Reference:
        - [Andriushchenko and Flammarion, 2022](https://arxiv.org/abs/2206.06232).
    """

    def climb(self, g, w, rho, biases=None):
        return rho, g

    def norm(self, e, w, biases=None):
        return vectors.norm(e)

    def project(self, e, w, rho, biases=None):
        return e


NEIGHBORHOODS = {
    "euclidean": Ball,
    "adaptive": AdaptiveBall,
    "weight_scaled": WeightScaledBall,
    "unnormalized": Unnormalized,
}


def get(identifier):
    """A neighborhood, from its name, its config or itself.

    Args:
        identifier: one of the names `"euclidean"`, `"adaptive"`,
            `"weight_scaled"` and `"unnormalized"`, the name of a class such
            as `"AdaptiveBall"`, the config that `serialize` returned, or a
            `Neighborhood`.

    Returns:
        A `Neighborhood`.

    Raises:
        ValueError: if there is no such neighborhood.
    """
    return look_up(identifier, Neighborhood, NEIGHBORHOODS, "neighborhood")


def _over(rho, length):
    """`rho / length`, finite also for a length of 0, which it then multiplies."""
    smallest = 2e-38 * ops.ones_like(length)
    return _like(rho, length) / vectors.maximum(length, smallest)


def _sum_of_powers(x, exponent):
    powers = [ops.sum(_power(ops.abs(vectors.widen(t)), exponent)) for t in vectors.present(x)]
    return sum(powers) if powers else ops.zeros(())


def _size(t, offset):
    """`abs(t) + offset`."""
    size = abs(t)
    size += offset  # On PyTorch in place, without fresh memory.
    return size


def _times(scales, x):
    """`T x`; a factor of `None` stands for 1."""
    return [t if t is None or s is None else s * t for s, t in zip(scales, x, strict=True)]


def _divided(x, scales):
    """`x / T`, and zero where `T` is: there the perturbation is zero as well."""
    return [
        t if t is None or s is None else t / ops.where(s == 0, ops.ones_like(s), s)
        for t, s in zip(x, scales, strict=True)
    ]


def _sign(t):
    return ops.cast(ops.sign(t), t.dtype)


def _power(t, exponent):
    """`t ** exponent` for t >= 0, with a finite derivative at 0."""
    zero = t == 0
    return ops.where(zero, ops.zeros_like(t), ops.where(zero, ops.ones_like(t), t) ** exponent)


def _clip(t, limit):
    """`t` within +-limit; unlike `ops.clip` it keeps float64 everywhere."""
    return ops.where(t > limit, limit, ops.where(t < -limit, -limit, t))


def _like(scalar, tensor):
    # Not through `ops.cast`, where a Python float would pass through float32.
    if isinstance(scalar, (int, float)):
        return scalar * ops.ones((), dtype=tensor.dtype)
    return ops.cast(scalar, tensor.dtype)


def _non_negative(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be a finite number >= 0. Received: {name}={value!r}")
    return float(value)

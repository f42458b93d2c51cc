"""How sharp the loss is around the weights of a model, on given data.

| measure | meaning |
|---|---|
| `max_sharpness` | how much the loss rises at most within `rho` |
| `min_sharpness` | how much it falls at most |
| `bilateral_sharpness` | the difference between its highest and its lowest value |
| `surrogate_gap` | the rise after SAM's one step |
| `gap_curvature` | the largest eigenvalue of the Hessian, as that rise tells it |
| `average_sharpness` | the rise in random directions |
| `m_sharpness` | the rise where each group of m examples has an adversary of its own |
| `gradient_angle` | how much the gradient turns on SAM's step |

All of them take the loss that `evaluate` reports, in inference mode, and leave
the model as it is.

Each but `gap_curvature` takes any of `keras_sharp.neighborhoods`. With
`"adaptive"` a measure does not change when weights are rescaled by positive
numbers such that the network computes the same: the weights and the bias of a
ReLU unit, or scale and offset of a BatchNormalization before it, times c, and
what the unit goes into divided by c. By that name it is
`AdaptiveBall(eta=0.0, scale_biases=True)`; a weight of exactly 0, such as a
bias that was not trained, does not move. Training takes `AdaptiveBall()` by
that name, ASAM's, which has a size of its own: pass that one to measure what
ASAM sees. `gradient_angle` is an angle between gradients as they are, and does
change.

A change that is small beside the loss, as in a regression whose targets are
not scaled, drowns in the rounding of float32. Where it does, it is computed
from the slope on the way, not from the difference of two losses; that takes
two more gradients for each loss (`keras_sharp/rounding.py`). A warning says so
where rounding is left all the same.
"""

import copy
import math
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_sharp import neighborhoods, rounding, vectors
from keras_sharp.docstrings import filled_in
from keras_sharp.identifiers import check_count
from keras_sharp.rounding import Change
from keras_sharp.surface import as_surface
from keras_sharp.weights import is_bias

__all__ = [
    "Average",
    "average_sharpness",
    "bilateral_sharpness",
    "gap_curvature",
    "gradient_angle",
    "m_sharpness",
    "max_sharpness",
    "min_sharpness",
    "surrogate_gap",
]


class Average(NamedTuple):
    """A mean over random samples.

    Attributes:
        value: Float, the mean.
        standard_error: Float, the standard deviation of the mean, with what
            rounding adds to it.
    """

    value: float
    standard_error: float


def max_sharpness(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    rho=0.05,
    neighborhood="euclidean",
    steps=1,
    restarts=0,
    seed=0,
    batch_size=256,
):
    """How much the loss rises at most within a distance of rho.

    ```
    g = ∇L(w)
    max_sharpness = L(w + e(g)) - L(w)      # Euclidean ball: e = rho * g / ‖g‖
    ```

    This is the quantity that SAM holds down. By default it is measured in one
    step, as SAM sees it. More steps climb on from there, each projected back
    to the region, and the highest loss on the way counts; it is a lower bound
    of the true maximum.

    Args:
        model: a compiled and built `keras.Model`, wrapped or not. Or a
            `keras_sharp.surface.LossSurface`, without the data: several
            measures of one surface compile once.
        x: the inputs: an array or a nested structure of arrays; or all the
            data, as a `tf.data.Dataset`, a `keras.utils.PyDataset` or a
            `torch.utils.data.DataLoader`.
        y: the targets, likewise.
        sample_weight: the weights of the examples, likewise.
        rho: Float >= 0, the radius of the neighborhood. Defaults to `0.05`.
        neighborhood: a `keras_sharp.neighborhoods.Neighborhood` or its name,
            where `"adaptive"` is the region that goes along with rescaled
            weights, `AdaptiveBall(eta=0.0, scale_biases=True)`. Defaults to
            `"euclidean"`.
        steps: Integer >= 1, the steps of an ascent. Each costs a gradient
            over all the data, the last one a loss. Defaults to `1`.
        restarts: Integer >= 0, further ascents of as many steps, which start
            at random points of the border. At a minimum, where the gradient
            tells nothing, they find what one ascent misses. Defaults to `0`.
        seed: Integer, the seed of the restarts. Defaults to `0`.
        batch_size: Integer, how many examples of an array are in memory at
            once. The result does not depend on it. Defaults to `256`.

    Returns:
        Float, in the units of the loss.

    Raises:
        ValueError: if the model is not compiled or not built, or has no
            trainable weights; if there are no data, or the loss on them is
            not finite; if a number is not what it should be.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((8, 4)), np.zeros((8, 1))
    >>> one_step = keras_sharp.sharpness.max_sharpness(model, x, y, rho=0.1)
    >>> one_step > 0
    True
    >>> keras_sharp.sharpness.max_sharpness(model, x, y, rho=0.1, steps=5, restarts=2) >= one_step
    True

    References:
        - [Foret et al., 2021](https://arxiv.org/abs/2010.01412), equation 1.
        - [Andriushchenko et al., 2023](https://arxiv.org/abs/2302.07011), on which of the
          measures tell of generalization.
    """
    surface = as_surface(model, x, y, sample_weight, batch_size)
    adversary = _Adversary(as_radius(rho), neighborhood, steps, restarts, seed)
    return _measured("max_sharpness", surface, [adversary])


@filled_in(max_sharpness)
def min_sharpness(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    rho=0.05,
    neighborhood="euclidean",
    steps=1,
    restarts=0,
    seed=0,
    batch_size=256,
):
    """How much the loss falls at most within a distance of rho.

    ```
    min_sharpness = L(w) - L(w - e(g))
    ```

    Args:
        model: see `max_sharpness`.
        x: see `max_sharpness`.
        y: see `max_sharpness`.
        sample_weight: see `max_sharpness`.
        rho: see `max_sharpness`.
        neighborhood: see `max_sharpness`.
        steps: see `max_sharpness`.
        restarts: see `max_sharpness`.
        seed: see `max_sharpness`.
        batch_size: see `max_sharpness`.

    Returns:
        Float, in the units of the loss: positive if there is a lower loss
        nearby.

    Raises:
        ValueError: see `max_sharpness`.

    Reference:
        - [Deng et al., 2024](https://arxiv.org/abs/2409.13173)
    """
    surface = as_surface(model, x, y, sample_weight, batch_size)
    adversary = _Adversary(-as_radius(rho), neighborhood, steps, restarts, seed)
    return -_measured("min_sharpness", surface, [adversary])


@filled_in(max_sharpness)
def bilateral_sharpness(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    rho=0.05,
    neighborhood="euclidean",
    steps=1,
    restarts=0,
    seed=0,
    batch_size=256,
):
    """The difference between the highest and the lowest loss within a distance of rho.

    ```
    bilateral_sharpness = max_sharpness + min_sharpness = L(w + e(g)) - L(w - e(g))
    ```

    This is the quantity that BSAM holds down.

    Args:
        model: see `max_sharpness`.
        x: see `max_sharpness`.
        y: see `max_sharpness`.
        sample_weight: see `max_sharpness`.
        rho: see `max_sharpness`.
        neighborhood: see `max_sharpness`.
        steps: see `max_sharpness`.
        restarts: see `max_sharpness`.
        seed: see `max_sharpness`.
        batch_size: see `max_sharpness`.

    Returns:
        Float, in the units of the loss.

    Raises:
        ValueError: see `max_sharpness`.

    Reference:
        - [Deng et al., 2024](https://arxiv.org/abs/2409.13173)
    """
    surface, rho = as_surface(model, x, y, sample_weight, batch_size), as_radius(rho)
    both = [_Adversary(r, neighborhood, steps, restarts, seed) for r in (rho, -rho)]
    return _measured("bilateral_sharpness", surface, both)


@filled_in(max_sharpness)
def surrogate_gap(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    rho=0.05,
    neighborhood="euclidean",
    batch_size=256,
):
    """The gap between the perturbed loss and the loss, which GSAM closes.

    ```
    h = L(w + e(g)) - L(w)
    ```

    It is `max_sharpness` in one step.

    Args:
        model: see `max_sharpness`.
        x: see `max_sharpness`.
        y: see `max_sharpness`.
        sample_weight: see `max_sharpness`.
        rho: see `max_sharpness`.
        neighborhood: see `max_sharpness`.
        batch_size: see `max_sharpness`.

    Returns:
        Float, in the units of the loss.

    Raises:
        ValueError: see `max_sharpness`.

    Reference:
        - [Zhuang et al., 2022](https://arxiv.org/abs/2203.08065), section 3.
    """
    surface = as_surface(model, x, y, sample_weight, batch_size)
    return _measured("surrogate_gap", surface, [_Adversary(as_radius(rho), neighborhood)])


@filled_in(max_sharpness)
def gap_curvature(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    rho=0.05,
    steps=1,
    restarts=0,
    seed=0,
    batch_size=256,
):
    """The largest eigenvalue of the Hessian, estimated from the surrogate gap.

    ```
    sigma_max ≈ 2 * h / rho²
    ```

    That holds at a minimum, for a small rho, and if the ascent finds the
    sharpest direction, for which several `steps` are better than one. Away
    from a minimum the slope adds `2 * ‖g‖ / rho`.
    `keras_sharp.curvature.eigenvalues` measures it anywhere.

    Args:
        model: see `max_sharpness`.
        x: see `max_sharpness`.
        y: see `max_sharpness`.
        sample_weight: see `max_sharpness`.
        rho: Float > 0, the radius of the Euclidean ball. Defaults to `0.05`.
        steps: see `max_sharpness`.
        restarts: see `max_sharpness`.
        seed: see `max_sharpness`.
        batch_size: see `max_sharpness`.

    Returns:
        Float.

    Raises:
        ValueError: see `max_sharpness`.

    Reference:
        - [Zhuang et al., 2022](https://arxiv.org/abs/2203.08065), lemma 3.3.
    """
    surface, rho = as_surface(model, x, y, sample_weight, batch_size), as_radius(rho)
    if rho == 0:
        raise ValueError("`rho` must be > 0: the gap is divided by its square. Received: rho=0")
    adversary = _Adversary(rho, "euclidean", steps, restarts, seed)
    return _measured("gap_curvature", surface, [adversary], factor=2 / rho**2)


@filled_in(max_sharpness)
def average_sharpness(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    rho=0.05,
    neighborhood="euclidean",
    samples=10,
    seed=0,
    batch_size=256,
):
    """How much the loss rises on average in random directions.

    ```
    average_sharpness = E[L(w + e) - L(w)],   e ~ N(0, (rho * T / n**(1 / p))²)
    ```

    `n` is the number of weights, `T` the scale of the neighborhood (1, or the
    size of each weight), and `p` the order of its norm. So in a Euclidean ball
    the perturbations have about the length rho, and on a quadratic the average
    is `0.5 * rho² * trace(H) / n`; in the maximum norm each weight moves by
    about rho. Each sample is a pair of opposite perturbations, so that the
    slope of the loss cancels.

    Args:
        model: see `max_sharpness`.
        x: see `max_sharpness`.
        y: see `max_sharpness`.
        sample_weight: see `max_sharpness`.
        rho: Float >= 0, the size of the perturbations. Defaults to `0.05`.
        neighborhood: see `max_sharpness`.
        samples: Integer >= 2, the number of pairs. Each costs two losses over
            all the data. Defaults to `10`.
        seed: Integer, the seed of the perturbations. Defaults to `0`.
        batch_size: see `max_sharpness`.

    Returns:
        An `Average`, the pair of floats `(value, standard_error)`.

    Raises:
        ValueError: see `max_sharpness`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((8, 4)), np.zeros((8, 1))
    >>> value, standard_error = keras_sharp.sharpness.average_sharpness(model, x, y)
    >>> value > standard_error > 0
    True

    Reference:
        - [Andriushchenko et al., 2023](https://arxiv.org/abs/2302.07011)
    """
    surface, rho = as_surface(model, x, y, sample_weight, batch_size), as_radius(rho)
    check_count("samples", samples, 2)
    start = _start(surface, gradient=False)
    pairs = _RandomPairs(surface, rho, as_region(neighborhood), samples, seed)
    change = rounding.settle(pairs.by_losses(start), lambda: pairs.by_slopes(start))
    value = rounding.warn("average_sharpness", change, start.loss)
    return Average(value, math.hypot(change.spread, change.error))


@filled_in(max_sharpness)
def m_sharpness(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    m=128,
    rho=0.05,
    neighborhood="euclidean",
    steps=1,
    restarts=0,
    seed=0,
):
    """Max-sharpness where each group of m examples has an adversary of its own.

    ```
    m_sharpness = mean over groups S of:  max L_S(w + e) - L_S(w)
    ```

    Many adversaries find more than a single one, and for small groups the
    measure tells more about generalization. The groups are consecutive
    examples; of a data set, and of a `LossSurface`, they are its batches.

    Args:
        model: see `max_sharpness`.
        x: see `max_sharpness`.
        y: see `max_sharpness`.
        sample_weight: see `max_sharpness`.
        m: Integer >= 1, how many examples of an array are in a group.
            Defaults to `128`.
        rho: see `max_sharpness`.
        neighborhood: see `max_sharpness`.
        steps: see `max_sharpness`.
        restarts: see `max_sharpness`.
        seed: see `max_sharpness`.

    Returns:
        Float, in the units of the loss.

    Raises:
        ValueError: see `max_sharpness`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.random.normal(size=(8, 4)), np.zeros((8, 1))
    >>> together = keras_sharp.sharpness.max_sharpness(model, x, y, rho=0.01)
    >>> keras_sharp.sharpness.m_sharpness(model, x, y, m=1, rho=0.01) > together
    True

    Reference:
        - [Foret et al., 2021](https://arxiv.org/abs/2010.01412), section 4.1.
    """
    check_count("m", m, 1)
    surface, rho = as_surface(model, x, y, sample_weight, batch_size=m), as_radius(rho)

    adversary, start = _Adversary(rho, neighborhood, steps, restarts, seed), []

    def together(way):
        """The mean over groups of what one way to measure gives for each."""

        def of_group(batch):
            alone = _alone(surface, batch)
            begin = _start(alone)
            start.append(begin.loss)
            change = way(adversary, alone, begin)
            return [change.value, change.error]

        values, errors = surface.scalars(of_group).T
        return Change(surface.total(values), surface.error_of_total(errors))

    change = rounding.settle(together(_Adversary.by_losses), lambda: together(_Adversary.by_slopes))
    return rounding.warn("m_sharpness", change, float(np.mean(start)))


@filled_in(max_sharpness)
def gradient_angle(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    rho=0.05,
    neighborhood="euclidean",
    batch_size=256,
):
    """The angle between the gradients at the weights and at SAM's adversary.

    Near 0 the loss is as good as linear on the way, near 180 degrees the
    gradients are in conflict: the step across the valley has met the other
    slope.

    Args:
        model: see `max_sharpness`.
        x: see `max_sharpness`.
        y: see `max_sharpness`.
        sample_weight: see `max_sharpness`.
        rho: Float, the radius of the neighborhood. A negative one is a step
            down, as BSAM takes one. Defaults to `0.05`.
        neighborhood: see `max_sharpness`.
        batch_size: see `max_sharpness`.

    Returns:
        Float, in degrees; 0 at a minimum, where there is no gradient.

    Raises:
        ValueError: see `max_sharpness`.

    Reference:
        - [Deng et al., 2024](https://arxiv.org/abs/2409.13173)
    """
    surface = as_surface(model, x, y, sample_weight, batch_size)
    rho, g = as_radius(rho, minimum=-math.inf), _start(surface).gradient
    w, biases = surface.weights, [is_bias(v) for v in surface.variables]
    e = as_region(neighborhood).perturbation(g, w, rho, biases)
    u, v = (_unit(t) for t in (g, surface.loss_and_gradient(vectors.add(w, e)).gradient))
    # Unlike the arc cosine, accurate for small angles as well.
    apart, together = vectors.norm(vectors.add_scaled(u, -1.0, v)), vectors.norm(vectors.add(u, v))
    return 2 * math.degrees(math.atan2(float(apart), float(together)))


def as_region(neighborhood):
    """The neighborhood of a measure: by the name "adaptive", the one that rescaling leaves alone.

    Training has `AdaptiveBall()` by that name, whose `eta` and unscaled biases keep small
    weights moving, but set a scale of their own.
    """
    if isinstance(neighborhood, str) and neighborhood.lower() == "adaptive":
        return neighborhoods.AdaptiveBall(eta=0.0, scale_biases=True)
    return neighborhoods.get(neighborhood)


def as_radius(rho, minimum=0.0):
    """The radius as a float, if it is one."""
    is_number = isinstance(rho, (int, float, np.number)) and not isinstance(rho, bool)
    if not is_number or not math.isfinite(rho) or rho < minimum:
        at_least = "" if minimum < 0 else f" >= {minimum:g}"
        raise ValueError(
            f"`rho`, the radius of the neighborhood, must be a finite number{at_least}. Received: "
            f"rho={rho!r}"
        )
    return float(rho)


def _alone(surface, batch):
    """The surface of one of its batches, which shares all that is compiled."""
    alone = copy.copy(surface)
    vars(alone)["batches"] = lambda: [batch]
    return alone


class _Start(NamedTuple):
    """Loss, its rounding, and gradient at the weights of the model."""

    loss: float
    rounding: float
    gradient: list | None


def _start(surface, gradient=True):
    w, g = surface.weights, None
    if gradient:
        loss, g = surface.loss_and_gradient(w)
    else:
        loss = surface.loss(w)
    if not math.isfinite(loss):
        surface.check()  # Raises, and says what to look for.
    return _Start(loss, surface.rounding, g)


def _slopes(surface, w, e):
    """How fast the loss rises along `e`, half the way and at its end."""
    return [surface.slope(vectors.add_scaled(w, t, e), e) for t in (0.5, 1.0)]


class _Adversary:
    """Projected ascents in a neighborhood; descents, if rho is negative."""

    def __init__(self, rho, neighborhood, steps=1, restarts=0, seed=0):
        check_count("steps", steps, 1)
        check_count("restarts", restarts, 0)
        self.rho, self.region = rho, as_region(neighborhood)
        self.steps, self.restarts, self.seed = steps, restarts, seed

    def by_losses(self, surface, start):
        """The farthest that the loss goes, as the difference of two losses."""
        changes = [
            Change(loss - start.loss, math.hypot(noise, start.rounding))
            for _, loss, noise in self._points(surface, start.gradient)
        ]
        return self._farthest(changes)

    def by_slopes(self, surface, start):
        """The same, as the integral of the slope: two more gradients for each point."""
        w, g, changes = surface.weights, start.gradient, []
        for e, _, _ in self._points(surface, g):
            slopes = [float(ops.convert_to_numpy(vectors.dot(g, e))), *_slopes(surface, w, e)]
            changes.append(rounding.simpson(slopes, start.loss, start.rounding))
        return self._farthest(changes)

    def _farthest(self, changes):
        return (max if self.rho >= 0 else min)(changes, key=lambda change: change.value)

    def _points(self, surface, g):
        """Yields each perturbation on the way, the loss there and its rounding."""
        w, biases = surface.weights, [is_bias(v) for v in surface.variables]
        random, region = np.random.default_rng(self.seed), self.region
        for direction in [g, *(_gaussian(random, w) for _ in range(self.restarts))]:
            e = region.ascend(None, direction, w, self.rho, biases)
            for _ in range(self.steps - 1):
                loss, slope = surface.loss_and_gradient(vectors.add(w, e))
                yield e, loss, surface.rounding
                e = region.ascend(e, slope, w, self.rho, biases)
            loss = surface.loss(vectors.add(w, e))
            yield e, loss, surface.rounding


def _measured(name, surface, adversaries, factor=1.0):
    """How far apart the first adversary and the second, or the start, are in their losses."""
    start = _start(surface)

    def total(changes):
        signs = (1, -1)[: len(changes)]
        value = sum(s * change.value for s, change in zip(signs, changes, strict=True))
        return Change(factor * value, factor * math.hypot(*(change.error for change in changes)))

    change = rounding.settle(
        total([adversary.by_losses(surface, start) for adversary in adversaries]),
        lambda: total([adversary.by_slopes(surface, start) for adversary in adversaries]),
    )
    return rounding.warn(name, change, start.loss, stacklevel=3)


class _RandomPairs:
    """Pairs of opposite random perturbations, and how far the loss rises on their average."""

    def __init__(self, surface, rho, region, samples, seed):
        self.surface, self.samples, self.seed = surface, samples, seed
        w = surface.weights
        scales = region.scales(w, [is_bias(v) for v in surface.variables])
        size = rho / sum(math.prod(t.shape) for t in w) ** (1 / region.p)
        self._scales = [size * (1.0 if s is None else s) for s in scales]

    def by_losses(self, start):
        """As the mean of differences of losses, which have the first loss in common."""
        w, noise = self.surface.weights, [0.0]

        def loss(e):
            value = self.surface.loss(vectors.add(w, e))
            noise.append(self.surface.rounding)
            return value

        rises = [(loss(e) + loss(opposite)) / 2 - start.loss for e, opposite in self._pairs()]
        error = math.hypot(start.rounding, max(noise) / math.sqrt(2 * self.samples))
        return Change(float(np.mean(rises)), error, _standard_error(rises))

    def by_slopes(self, start):
        """As the mean of integrals of the slope: four gradients each."""
        w, rises = self.surface.weights, []
        for pair in self._pairs():
            # Those at the weights themselves cancel.
            slopes = [[0.0, *_slopes(self.surface, w, e)] for e in pair]
            rises.append(rounding.simpson(slopes, start.loss, start.rounding))
        values, errors = np.array([(rise.value, rise.error) for rise in rises]).T
        error = float(np.linalg.norm(errors)) / self.samples
        return Change(float(np.mean(values)), error, _standard_error(values))

    def _pairs(self):
        random = np.random.default_rng(self.seed)
        for _ in range(self.samples):
            noise = _gaussian(random, self.surface.weights)
            e = [s * z for s, z in zip(self._scales, noise, strict=True)]
            yield e, vectors.scale(-1.0, e)


def _standard_error(samples):
    return float(np.std(samples, ddof=1) / math.sqrt(len(samples)))


def _gaussian(random, w):
    """Normal random numbers in the shapes and dtypes of `w`, the same on all backends."""
    return [
        ops.cast(ops.convert_to_tensor(random.normal(size=t.shape).astype("float32")), t.dtype)
        for t in w
    ]


def _unit(x):
    length = vectors.norm(x)
    return vectors.scale(vectors.quotient(ops.ones_like(length), length), x)

"""The formulas of the papers in NumPy, float64. Nothing here imports keras_sharp.

All weights of a model stand in one long vector, `w`; `bias` marks the entries
that belong to a bias. `rho < 0` makes an adversary descend.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Losses with a gradient known on paper


class Quadratic:
    """`0.5 w'Hw` with a symmetric, positive definite `H`; its gradient is `Hw`."""

    shapes = ((2, 3), (2,))
    biases = (False, True)

    def __init__(self, seed=0):
        root = np.random.default_rng(seed).normal(size=(8, 8))
        self.hessian = root @ root.T / 8 + 0.1 * np.eye(8)
        self.start = np.random.default_rng(seed + 1).normal(size=8)

    def value(self, w):
        return 0.5 * w @ self.hessian @ w

    def gradient(self, w):
        return self.hessian @ w


class TanhNet:
    """Mean squared error of `tanh(x A + b) C`: two layers, one bias, no kinks."""

    shapes = ((2, 3), (3,), (3, 1))
    biases = (False, True, False)

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.x, self.y = rng.normal(size=(5, 2)), rng.normal(size=(5, 1))
        self.start = rng.normal(size=12)

    def value(self, w):
        _, output = self._forward(w)
        return np.mean((output - self.y) ** 2)

    def gradient(self, w):
        hidden, output = self._forward(w)
        c = split(w, self.shapes)[2]
        d_output = 2 * (output - self.y) / len(self.y)
        d_hidden = (d_output @ c.T) * (1 - hidden**2)  # tanh' = 1 - tanh²
        return join([self.x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_output])

    def _forward(self, w):
        a, b, c = split(w, self.shapes)
        hidden = np.tanh(self.x @ a + b)
        return hidden, hidden @ c


class Classifier:
    """Cross-entropy of `softmax(mean over places of tanh(features) C + d)`; the features differ."""

    head = ((5, 3), (3,))
    feature_shapes: tuple = ()

    def __init__(self, seed=0, n=11, sample_weight=None):
        rng = np.random.default_rng(seed)
        self.images = rng.normal(size=(n, 6, 6, 1))
        self.y = rng.integers(0, 3, n)
        self.sample_weight = np.ones(n) if sample_weight is None else np.asarray(sample_weight)
        self.shapes = self.feature_shapes + self.head
        self.start = 0.7 * rng.normal(size=sum(np.prod(s, dtype=int) for s in self.shapes))

    def value(self, w):
        z = self.logits(w)
        z = z - z.max(axis=1, keepdims=True)
        losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), self.y]
        return np.mean(self.sample_weight * losses)

    def logits(self, w):
        return self._forward(w)[-1]

    def gradient(self, w):
        *features, c, _ = split(w, self.shapes)
        hidden, pooled, z = self._forward(w)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        d_z = (p - np.eye(3)[self.y]) * self.sample_weight[:, None] / len(p)
        d_hidden = (d_z @ c.T)[:, None] / hidden.shape[1] * (1 - hidden**2)
        return join([*self.pull(features, d_hidden), pooled.T @ d_z, d_z.sum(0)])

    def hessian(self):
        """At `start`."""
        h = differentiate(self.gradient, self.start)
        return (h + h.T) / 2

    def _forward(self, w):
        *features, c, d = split(w, self.shapes)
        hidden = np.tanh(self.push(features))  # (example, place, unit)
        pooled = hidden.mean(axis=1)
        return hidden, pooled, pooled @ c + d


class Mlp(Classifier):
    """Features `x A + b`, of the first three pixels."""

    feature_shapes = ((3, 5), (5,))

    @property
    def x(self):
        return self.images[:, 0, :3, 0]

    def push(self, features):
        a, b = features
        return (self.x @ a + b)[:, None]

    def pull(self, features, d):
        return self.x.T @ d[:, 0], d[:, 0].sum(0)


class ConvNet(Classifier):
    """Features `gamma * (conv(x) - mean) / sqrt(variance + 1e-3) + beta`, 3x3 without padding."""

    feature_shapes = ((3, 3, 1, 5), (5,), (5,))
    mean, variance = np.linspace(-1, 1, 5), np.linspace(0.5, 2, 5)

    @property
    def x(self):
        return self.images

    @property
    def patches(self):
        windows = np.lib.stride_tricks.sliding_window_view(self.images[..., 0], (3, 3), (1, 2))
        return windows.reshape(len(self.images), 16, 9)

    def push(self, features):
        kernel, gamma, beta = features
        return gamma * self._normalized(kernel) + beta

    def pull(self, features, d):
        kernel, gamma, _ = features
        d_kernel = np.einsum("npi,npo->io", self.patches, d * gamma / np.sqrt(self.variance + 1e-3))
        return d_kernel, (d * self._normalized(kernel)).sum((0, 1)), d.sum((0, 1))

    def _normalized(self, kernel):
        a = self.patches @ kernel.reshape(9, 5)
        return (a - self.mean) / np.sqrt(self.variance + 1e-3)


def split(w, shapes):
    """One long vector as arrays of these shapes."""
    ends = np.cumsum([np.prod(s, dtype=int) for s in shapes])
    return [part.reshape(s) for part, s in zip(np.split(w, ends[:-1]), shapes, strict=True)]


def join(arrays):
    """Arrays as one long vector, float64."""
    return np.concatenate([np.ravel(np.asarray(a, "float64")) for a in arrays])


def mask(booleans, shapes):
    """One Boolean per weight as one Boolean per entry."""
    return np.repeat(np.asarray(booleans), [np.prod(s, dtype=int) for s in shapes])


# Neighborhoods: the adversary's step, the size of a perturbation, the way back


def euclidean(g, w, bias, rho):
    """Foret et al., section 2: rho g / ‖g‖₂."""
    return rho * g / np.sqrt(np.sum(g**2))


def p_ball(p):
    """Foret et al., equation 2: rho sign(g) |g|^(q-1) / (‖g‖_q^q)^(1/p), 1/p + 1/q = 1."""
    q = p / (p - 1)

    def step(g, w, bias, rho):
        return rho * np.sign(g) * np.abs(g) ** (q - 1) / np.sum(np.abs(g) ** q) ** (1 / p)

    return step


def maximum(g, w, bias, rho):
    """The limit of equation 2 for p = inf, q = 1."""
    return rho * np.sign(g)


def adaptive_scale(w, bias, eta):
    """Kwon et al., section 4: |w| + eta for weights, 1 for biases."""
    return np.where(bias, 1.0, np.abs(w) + eta)


def adaptive(eta):
    """Kwon et al., equation 8: rho T²g / ‖Tg‖₂."""

    def step(g, w, bias, rho):
        scale = adaptive_scale(w, bias, eta)
        return rho * scale**2 * g / np.sqrt(np.sum((scale * g) ** 2))

    return step


def adaptive_maximum(eta):
    """Kwon et al., section 3, the maximum norm: rho T sign(g)."""

    def step(g, w, bias, rho):
        return rho * adaptive_scale(w, bias, eta) * np.sign(g)

    return step


def weight_scaled(gamma):
    """Adaptive-GSAM: (rho g / ‖g‖₂) ⊙ (|w| + gamma), biases too."""

    def step(g, w, bias, rho):
        return euclidean(g, w, bias, rho) * (np.abs(w) + gamma)

    return step


def unnormalized(g, w, bias, rho):
    """Andriushchenko and Flammarion: rho g."""
    return rho * g


def p_norm(p):
    return lambda e, w, bias: np.sum(np.abs(e) ** p) ** (1 / p)


def largest(e, w, bias):
    return np.max(np.abs(e))


class Region(NamedTuple):
    """What is known of one neighborhood of keras_sharp, named by class and arguments."""

    of: str
    arguments: dict
    step: Callable
    size: Callable
    #: `None`: radial, towards the center, as far as the size asks for.
    project: Callable | None = None


REGIONS = {
    "ball_2": Region("Ball", {"p": 2.0}, euclidean, p_norm(2)),
    "ball_1.5": Region("Ball", {"p": 1.5}, p_ball(1.5), p_norm(1.5)),
    "ball_4": Region("Ball", {"p": 4.0}, p_ball(4.0), p_norm(4)),
    "ball_inf": Region(
        "Ball",
        {"p": float("inf")},
        maximum,
        largest,
        lambda e, w, bias, rho: np.clip(e, -rho, rho),
    ),
    "adaptive": Region(
        "AdaptiveBall",
        {"eta": 0.01},
        adaptive(0.01),
        lambda e, w, bias: p_norm(2)(e / adaptive_scale(w, bias, 0.01), w, bias),
    ),
    "adaptive_inf": Region(
        "AdaptiveBall",
        {"eta": 0.2, "p": float("inf")},
        adaptive_maximum(0.2),
        lambda e, w, bias: largest(e / adaptive_scale(w, bias, 0.2), w, bias),
        lambda e, w, bias, rho: np.clip(
            e, -rho * adaptive_scale(w, bias, 0.2), rho * adaptive_scale(w, bias, 0.2)
        ),
    ),
    "weight_scaled": Region(
        "WeightScaledBall",
        {"gamma": 0.01},
        weight_scaled(0.01),
        lambda e, w, bias: p_norm(2)(e / (np.abs(w) + 0.01), w, bias),
    ),
    "unnormalized": Region("Unnormalized", {}, unnormalized, p_norm(2), lambda e, w, bias, rho: e),
}


def project(region, e, w, bias, rho):
    """The nearest point of a region, in its own norm."""
    if region.project is not None:
        return region.project(e, w, bias, rho)
    size = region.size(e, w, bias)
    return e if size <= rho else e * rho / size


def ascend(region, gradient, w, bias, rho, steps):
    """Repeated ascent: e <- project(e + step(gradient(w + e))), the region that of `w`."""
    e = region.step(gradient(w), w, bias, rho)
    for _ in range(steps - 1):
        e = e + region.step(gradient(w + e), w, bias, rho)
        e = project(region, e, w, bias, abs(rho))
    return e


def at_adversary(loss, w, ascent, second_order):
    """The function `rho -> ∇L(w + e)`, or `rho -> ∇[L(w + e(w))]`.

    Args:
        loss: has `value` and `gradient`.
        w: the weights.
        ascent: function `(w, rho) -> e`.
        second_order: whether `e` depends on `w` in the differentiation.
    """
    if second_order:
        return lambda rho: differentiate(lambda v: loss.value(v + ascent(v, rho)), w)
    return lambda rho: loss.gradient(w + ascent(w, rho))


def differentiate(fn, w, h=1e-4):
    """The derivative, row by row, by central differences of order 4: right to about 1e-11.

    With a larger `h`, a difference may reach over a point where `sign(g)` jumps.
    """

    def by(direction):
        near = fn(w + h * direction) - fn(w - h * direction)
        far = fn(w + 2 * h * direction) - fn(w - 2 * h * direction)
        return (8 * near - far) / (12 * h)

    return np.stack([by(unit) for unit in np.eye(len(w))])


# Methods: `at(rho)` is the gradient at the adversary, `g` the one at the weights


def sam(at, g, rho):
    """Foret et al., algorithm 1; with another region ASAM, Kwon et al., algorithm 1."""
    return at(rho)


def gsam(at, g, rho, alpha):
    """Zhuang et al., algorithm 1: descend g_adv, ascend what of g is orthogonal to it."""
    g_adv = at(rho)
    unit = g_adv / np.linalg.norm(g_adv)
    g_orthogonal = g - (g @ unit) * unit
    return g_adv - alpha * g_orthogonal


def looksam(at, g, v, rho, alpha):
    """Liu et al., algorithm 1, where it looks: SAM. What it remembers, and alpha, have no part."""
    return at(rho)


def momentum_sam(at, g, v, rho):
    """Becker et al., algorithm 1: at the weights moved along the momentum, which goes downhill."""
    return at(-rho, along=lambda g: v)


def async_sam(at, g, m, rho):
    """The gradient at the weights moved along the gradient of the step before."""
    return at(rho, along=lambda g: m)


def friendly_sam(at, g, m, rho, sigma):
    """Li et al., algorithm 1: climb along the part of the gradient that the average lacks."""
    return at(rho, along=lambda g: g - sigma * m)


def wsam(at, g, rho, gamma):
    """Yue et al., equation 5: `(1 - 2 gamma) / (1 - gamma) g + gamma / (1 - gamma) g_adv`."""
    return ((1 - 2 * gamma) * g + gamma * at(rho)) / (1 - gamma)


def bsam(at, g, rho, rho_min):
    """Deng et al., algorithm 1: the gradients of max-sharpness and of min-sharpness."""
    g_up, g_down = at(rho), at(-rho_min)
    return g_up + (g - np.linalg.norm(g_up) / np.linalg.norm(g_down) * g_down)

"""The distribution of all eigenvalues of a matrix of second derivatives."""

from typing import NamedTuple

import numpy as np

from keras_sharp.curvature.certificate import Certificate
from keras_sharp.curvature.estimates import trace
from keras_sharp.curvature.lanczos import Lanczos
from keras_sharp.curvature.products import Products
from keras_sharp.docstrings import filled_in
from keras_sharp.identifiers import check_count


class _SpectralDensity(NamedTuple):
    nodes: np.ndarray
    weights: np.ndarray
    products: int


class SpectralDensity(_SpectralDensity):
    """The distribution of the eigenvalues, as masses at points.

    A tuple of the first three attributes. The last one is no part of it.

    Attributes:
        nodes: array, the points, ascending.
        weights: array, the share of the eigenvalues that each stands for. The
            sum is 1.
        products: Integer, how many products it took.
        certificate: the `Certificate` of the products, or `None` if they have
            none.
    """

    certificate: Certificate | None = None

    def grid(self, sigma=None, points=1000):
        """Points at which to plot the density, a little wider than the spectrum."""
        sigma = self._sigma(sigma)
        return np.linspace(self.nodes[0] - 4 * sigma, self.nodes[-1] + 4 * sigma, points)

    def density(self, grid=None, sigma=None):
        """The density, with each mass spread to a Gaussian.

        Args:
            grid: array of eigenvalues. Defaults to `None`: those of `grid`.
            sigma: Float > 0, the standard deviation of the Gaussian. Defaults
                to `None`: a hundredth of the width of the spectrum.

        Returns:
            An array like `grid`, whose integral over all eigenvalues is 1.
        """
        sigma = self._sigma(sigma)
        grid = self.grid(sigma) if grid is None else np.asarray(grid)
        distance = (grid[..., None] - self.nodes) / sigma
        return np.exp(-0.5 * distance**2) @ self.weights / (sigma * np.sqrt(2 * np.pi))

    def moment(self, power):
        """The mean of the eigenvalues to some power."""
        return float(self.weights @ self.nodes**power)

    def _sigma(self, sigma):
        if sigma is None:
            width = self.nodes[-1] - self.nodes[0]
            return 0.01 * (width or abs(self.nodes[0]) or 1.0)
        if not sigma > 0:
            raise ValueError(f"`sigma` must be a number > 0. Received: sigma={sigma!r}")
        return sigma


@filled_in(trace)
def spectral_density(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    steps=40,
    num_vectors=1,
    seed=0,
    verbose="auto",
    **kwargs,
):
    """The distribution of the eigenvalues of the Hessian, by stochastic Lanczos quadrature.

    For each random vector, the Lanczos process gives a Gaussian quadrature:
    its nodes are the Ritz values, its weights the squares of the first entries
    of the eigenvectors of the tridiagonal matrix. It has the right `v' H**p v`
    for all powers p < 2 * steps; the mean over the vectors, which are
    perpendicular to each other, has the right moments of the spectrum, but
    for chance.

    Args:
        model: see `trace`.
        x: see `trace`.
        y: see `trace`.
        sample_weight: see `trace`.
        steps: Integer >= 1, the number of products per vector. More of them
            show finer detail. Defaults to `40`.
        num_vectors: Integer >= 1, the number of random vectors. One is enough
            for a network with many weights. Defaults to `1`.
        seed: see `trace`.
        verbose: see `trace`.
        **kwargs: `batch_size`, `variables` and `certify`, see `trace`.

    Returns:
        A `SpectralDensity`; `density()` smooths it for a plot.

    Raises:
        ValueError: see `trace`.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.diag([1.0, 3.0]), np.ones((2, 1))
    >>> spectrum = keras_sharp.curvature.spectral_density(model, x, y, num_vectors=2)
    >>> round(spectrum.moment(1), 3)
    5.0

    References:
        - [Ubaru et al., 2017](https://doi.org/10.1137/16M1104974)
        - [Ghorbani et al., 2019](https://arxiv.org/abs/1901.10159)
    """
    check_count("steps", steps, at_least=1)
    check_count("num_vectors", num_vectors, at_least=1)
    data, expected = (x, y, sample_weight), steps * num_vectors
    with Products(model, data, kwargs, expected, verbose) as operator:
        rng = np.random.default_rng(seed)
        starts = rng.standard_normal((operator.size, min(num_vectors, operator.size)))
        starts, _ = np.linalg.qr(starts)
        nodes, weights = [], []
        for start in starts.T:
            lanczos = Lanczos(operator, start, rng, min(steps, operator.size))
            for _ in range(min(steps, operator.size)):
                lanczos.step()
                if lanczos.broke_down:
                    break
            values, _, s = lanczos.ritz()
            nodes.append(values)
            weights.append(s[0] ** 2 / starts.shape[1])
    order = np.argsort(np.concatenate(nodes))
    return operator.certified(
        SpectralDensity(
            np.concatenate(nodes)[order], np.concatenate(weights)[order], operator.count
        )
    )

"""Trace and Frobenius norm of a matrix of second derivatives, from random vectors."""

from typing import NamedTuple

import numpy as np

from keras_sharp.curvature.certificate import Certificate
from keras_sharp.curvature.operators import HessianOperator
from keras_sharp.curvature.products import Products
from keras_sharp.docstrings import filled_in
from keras_sharp.identifiers import check_count


class _Estimate(NamedTuple):
    value: float
    standard_error: float
    products: int


class Estimate(_Estimate):
    """A number that was estimated from random vectors.

    A tuple of the first three attributes. The last one is no part of it.

    Attributes:
        value: Float, the mean over the vectors.
        standard_error: Float, the standard deviation of that mean.
        products: Integer, how many products it took.
        certificate: the `Certificate` of the products, or `None` if they have
            none.
    """

    certificate: Certificate | None = None


@filled_in(HessianOperator)
def trace(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    num_products=100,
    seed=0,
    verbose="auto",
    **kwargs,
):
    """The trace of the Hessian, the sum of its eigenvalues, by Hutchinson's estimator.

    ```
    trace = mean of v' H v      # v with random entries of +1 and -1
    ```

    The standard error is at most `‖H‖ * sqrt(2 / num_products)`, with the
    Frobenius norm. `hutch_plus_plus` is more exact where a few large
    eigenvalues make up most of that norm, as in most trained networks.

    Args:
        model: a compiled and built `keras.Model`, wrapped or not. Or an
            operator instead of model and data: a `HessianOperator`, a
            `GaussNewtonOperator` or any object with `size` and `matvec`.
        x: see `HessianOperator`.
        y: see `HessianOperator`.
        sample_weight: see `HessianOperator`.
        num_products: Integer >= 2, the number of random vectors, and of
            products. Defaults to `100`.
        seed: Integer, the seed of the random vectors. Defaults to `0`.
        verbose: 0, 1 or `"auto"`: whether progress is shown: never, always,
            or when it takes longer than five seconds. Defaults to `"auto"`.
        **kwargs: `batch_size`, `variables` and `certify`, see
            `HessianOperator`.

    Returns:
        An `Estimate`.

    Raises:
        ValueError: see `HessianOperator`; or if an argument is not one of
            these.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.diag([1.0, 3.0]), np.ones((2, 1))
    >>> keras_sharp.curvature.trace(model, x, y, num_products=4)
    Estimate(value=10.0, standard_error=0.0, products=4)

    Reference:
        - [Hutchinson, 1990](https://doi.org/10.1080/03610919008812866)
    """
    check_count("num_products", num_products, at_least=2)
    data = (x, y, sample_weight)
    with Products(model, data, kwargs, num_products, verbose) as operator:
        rng = np.random.default_rng(seed)
        samples = []
        for _ in range(num_products):
            v = random_signs(rng, operator)
            samples.append(_dot(v, operator.matvec(v)))
    mean, standard_error = mean_and_error(samples)
    return operator.certified(Estimate(mean, standard_error, operator.count))


@filled_in(trace)
def hutch_plus_plus(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    num_products=99,
    seed=0,
    verbose="auto",
    **kwargs,
):
    """The trace of the Hessian, the sum of its eigenvalues, by the estimator Hutch++.

    ```
    Q = orthonormal basis of the columns of H S      # S, G: random entries of +1 and -1
    P = I - Q Q'
    trace = trace(Q' H Q) + mean of g' P H P g       # over the columns g of G
    ```

    The part of `H` with the large eigenvalues is taken exactly, and only the
    rest is estimated: the error falls like `1 / num_products`, and that of
    `trace` like its root. `S`, `Q` and `G` have a third of the products each.
    Needs memory for `size * num_products / 3` numbers.

    Args:
        model: see `trace`.
        x: see `trace`.
        y: see `trace`.
        sample_weight: see `trace`.
        num_products: Integer >= 6, of which a multiple of three is used.
            Defaults to `99`.
        seed: see `trace`.
        verbose: see `trace`.
        **kwargs: `batch_size`, `variables` and `certify`, see `trace`.

    Returns:
        An `Estimate`, with the standard error of the second term: the first
        one is not left to chance.

    Raises:
        ValueError: see `trace`.

    Reference:
        - [Meyer et al., 2021](https://arxiv.org/abs/2010.09649)
    """
    check_count("num_products", num_products, at_least=6)
    data, count = (x, y, sample_weight), num_products // 3
    with Products(model, data, kwargs, 3 * count, verbose) as operator:
        rng = np.random.default_rng(seed)
        columns = [operator.matvec(random_signs(rng, operator)) for _ in range(count)]
        q, _ = np.linalg.qr(np.stack(columns, axis=1))
        exact = sum(_dot(column, operator.matvec(column)) for column in q.T)
        samples = []
        for _ in range(count):
            g = random_signs(rng, operator)
            g = g - q @ (q.T @ g)
            samples.append(_dot(g, operator.matvec(g)))
    rest, standard_error = mean_and_error(samples)
    return operator.certified(Estimate(exact + rest, standard_error, operator.count))


@filled_in(trace)
def frobenius_norm(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    num_products=100,
    seed=0,
    verbose="auto",
    **kwargs,
):
    """The Frobenius norm of the Hessian, the root of the sum of its squared eigenvalues.

    ```
    ‖H‖² = mean of ‖H v‖²      # v with random entries of +1 and -1
    ```

    Args:
        model: see `trace`.
        x: see `trace`.
        y: see `trace`.
        sample_weight: see `trace`.
        num_products: see `trace`.
        seed: see `trace`.
        verbose: see `trace`.
        **kwargs: `batch_size`, `variables` and `certify`, see `trace`.

    Returns:
        An `Estimate`.

    Raises:
        ValueError: see `trace`.
    """
    check_count("num_products", num_products, at_least=2)
    data = (x, y, sample_weight)
    with Products(model, data, kwargs, num_products, verbose) as operator:
        rng = np.random.default_rng(seed)
        products = [operator.matvec(random_signs(rng, operator)) for _ in range(num_products)]
    squared, error = mean_and_error([_dot(p, p) for p in products])
    norm = float(np.sqrt(squared))
    # The derivative of the root hands the error on.
    standard_error = error / (2 * norm) if norm else 0.0
    return operator.certified(Estimate(norm, standard_error, operator.count))


def random_signs(rng, operator):
    """A vector with random entries of +1 and -1, for products with the operator."""
    return rng.choice([-1.0, 1.0], operator.size).astype(operator.dtype)


def _dot(u, v):
    return float(u.astype("float64") @ v.astype("float64"))


def mean_and_error(samples):
    """The mean of the samples, and its standard error."""
    return float(np.mean(samples)), float(np.std(samples, ddof=1) / np.sqrt(len(samples)))

"""The largest and smallest eigenvalues of a matrix of second derivatives."""

import warnings
from typing import NamedTuple

import numpy as np

from keras_sharp.curvature.lanczos import Lanczos
from keras_sharp.curvature.products import Products, check_count

#: Which of the ascending values are meant, by the name in SciPy's `eigsh`.
WHICH = {
    "LA": lambda values, k: np.arange(len(values))[-k:],
    "SA": lambda values, k: np.arange(len(values))[:k],
    "LM": lambda values, k: np.sort(np.argsort(-np.abs(values))[:k]),
    "BE": lambda values, k: np.r_[: k // 2, len(values) - (k - k // 2) : len(values)],
}


class Eigenvalues(NamedTuple):
    """Some eigenvalues of a symmetric matrix.

    Attributes:
        values: array of shape `(k,)`, descending.
        residuals: array of shape `(k,)`: within this distance of each value
            there is an eigenvalue of the matrix. For an eigenvalue that lies
            by itself, at a distance `gap` from the next one, the error is far
            smaller: at most `residual**2 / gap`.
        vectors: array of shape `(size, k)` with the eigenvectors as columns,
            or `None` if they were not asked for.
        products: Integer, how many products it took.
        converged: Boolean, whether all residuals are as small as asked for.
    """

    values: np.ndarray
    residuals: np.ndarray
    vectors: np.ndarray | None
    products: int
    converged: bool


def eigenvalues(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    k=5,
    which="LA",
    tol=1e-2,
    max_products=None,
    seed=0,
    return_vectors=False,
    verbose="auto",
    **kwargs,
):
    """The largest or smallest eigenvalues of the Hessian, by the Lanczos process.

    It stops when all residuals `‖H v - value * v‖` are below `tol * |value|`.
    An eigenvalue that occurs several times may be found fewer times, as by
    any method of this kind, but not if `max_products` is as large as the
    matrix. Needs memory for `size` numbers per product.

    Args:
        model: a compiled and built `keras.Model`, wrapped or not. Or an
            operator instead of model and data: a `HessianOperator`, a
            `GaussNewtonOperator` or any object with `size` and `matvec`.
        x: the data, see `HessianOperator`.
        y: the targets, likewise.
        sample_weight: the weights of the examples, likewise.
        k: Integer >= 1, how many eigenvalues. Defaults to `5`.
        which: `"LA"`, the largest; `"SA"`, the smallest, which may be
            negative; `"LM"`, the largest in absolute value; or `"BE"`, half
            of them from each end. Defaults to `"LA"`.
        tol: Float >= 0, the residual to stop at, relative to the eigenvalue, or
            to a hundredth of the largest one where that is more. Defaults to
            `1e-2`; the errors are then usually below `1e-3`.
        max_products: Integer >= k, when to stop at the latest. Defaults to
            `None`: ten per eigenvalue, and at least 100.
        seed: Integer, the seed of the random vector to start from. Defaults
            to `0`.
        return_vectors: Boolean, whether to return the eigenvectors as well.
            Defaults to `False`.
        verbose: 0, 1 or `"auto"`: whether progress is shown: never, always,
            or when it takes longer than five seconds. Defaults to `"auto"`.
        **kwargs: `batch_size` and `variables`, see `HessianOperator`.

    Returns:
        `Eigenvalues`. A warning says so if `max_products` came first.

    Raises:
        ValueError: as `HessianOperator`, or if an argument is not one of
            these, such as a `k` that is larger than the number of weights.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.diag([1.0, 3.0]), np.ones((2, 1))
    >>> keras_sharp.curvature.eigenvalues(model, x, y, k=2).values.round(3)
    array([9., 1.])

    Reference:
        - [Lanczos, 1950](https://doi.org/10.6028/jres.045.026)
    """
    check_count("k", k, at_least=1)
    if which not in WHICH:
        raise ValueError(f"`which` must be one of {list(WHICH)}. Received: which={which!r}")
    if not tol >= 0:
        raise ValueError(f"`tol` must be a number >= 0. Received: tol={tol!r}")
    if max_products is None:
        max_products = max(100, 10 * k)
    check_count("max_products", max_products, at_least=k)
    with Products(model, (x, y, sample_weight), kwargs, max_products, verbose) as operator:
        if k > operator.size:
            raise ValueError(
                f"A matrix of {operator.size} rows has no more than {operator.size} eigenvalues. "
                f"Received: k={k}. Expected a `k` up to the number of weights."
            )
        rng = np.random.default_rng(seed)
        room = min(max_products, operator.size)
        lanczos = Lanczos(operator, rng.standard_normal(operator.size), rng, room)
        degenerate = False
        while True:
            lanczos.step()
            full = lanczos.steps == room
            # On an invariant subspace all residuals are zero, and say nothing of what is outside:
            # the same eigenvalues once more, or larger ones. Such matrices are small, or rare.
            degenerate = degenerate or lanczos.broke_down
            if not full and (degenerate or lanczos.steps < k):
                continue
            values, residuals, s = lanczos.ritz()
            chosen = WHICH[which](values, k)[::-1]
            # Of an eigenvalue near zero no relative accuracy can be had.
            floor = 0.01 * np.max(np.abs(values))
            small = residuals[chosen] <= tol * np.maximum(np.abs(values[chosen]), floor)
            if full or np.all(small):
                break
    converged = bool(np.all(small)) or lanczos.steps == operator.size
    if not converged:
        warnings.warn(
            f"{np.sum(small)} of {k} eigenvalues are as accurate as asked for, and the "
            f"{max_products} products of `max_products` are used up. Look at the residuals; raise "
            "`max_products` or `tol`.",
            stacklevel=2,
        )
    vectors = lanczos.vectors(s[:, chosen]) if return_vectors else None
    return Eigenvalues(values[chosen], residuals[chosen], vectors, operator.count, converged)


def sharpness_ratio(model, x=None, y=None, sample_weight=None, *, k=5, **kwargs):
    """The largest eigenvalue of the Hessian over the fifth largest.

    A published measure of sharpness, which does not change with the scale of
    the loss: `lambda_1 / lambda_5` is large where few directions are far
    steeper than the others.

    Args:
        model: see `eigenvalues`.
        x: see `eigenvalues`.
        y: see `eigenvalues`.
        sample_weight: see `eigenvalues`.
        k: Integer >= 2, the eigenvalue to compare with. Defaults to `5`.
        **kwargs: `tol`, `max_products`, `seed` and `verbose`, see
            `eigenvalues`; `batch_size` and `variables`, see `HessianOperator`.

    Returns:
        Float.

    Raises:
        ValueError: see `eigenvalues`; and if that eigenvalue is not positive.

    Reference:
        - [Jastrzebski et al., 2020](https://arxiv.org/abs/2002.09572)
    """
    check_count("k", k, at_least=2)
    values = eigenvalues(model, x, y, sample_weight, k=k, **kwargs).values
    if values[-1] <= 0:
        raise ValueError(
            f"The ratio of the largest eigenvalue and eigenvalue {k} says nothing: that one is not "
            f"positive. Received: a Hessian with the eigenvalues {values}. Use a smaller `k`."
        )
    return float(values[0] / values[-1])

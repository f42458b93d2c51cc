"""The largest and smallest eigenvalues of a matrix of second derivatives."""

import warnings
from typing import NamedTuple

import numpy as np

from keras_sharp.curvature.certificate import Certificate
from keras_sharp.curvature.lanczos import Lanczos
from keras_sharp.curvature.operators import HessianOperator
from keras_sharp.curvature.products import Products
from keras_sharp.docstrings import filled_in
from keras_sharp.identifiers import check_count

#: The names of the ends of the spectrum, as in SciPy's `eigsh`.
WHICH = ["LA", "SA", "LM", "BE"]


def _ascending(values, k, which):
    """The indices of the `k` values that are meant, by the name in SciPy's `eigsh`, ascending."""
    order = np.argsort(values, kind="stable")
    if which == "LA":
        return order[-k:]
    if which == "SA":
        return order[:k]
    if which == "BE":
        return np.r_[order[: k // 2], order[len(order) - (k - k // 2) :]]
    largest = np.argsort(-np.abs(values), kind="stable")[:k]
    return largest[np.argsort(values[largest], kind="stable")]


class _Eigenvalues(NamedTuple):
    values: np.ndarray
    residuals: np.ndarray
    vectors: np.ndarray | None
    products: int
    converged: bool


class Eigenvalues(_Eigenvalues):
    """Some eigenvalues of a symmetric matrix.

    A tuple of the first five attributes. The others are no part of it.

    Attributes:
        values: array of shape `(k,)`, descending.
        residuals: array of shape `(k,)`: within this distance of each value
            there is an eigenvalue of the matrix, what rounding does to the
            products included, as far as it is seen. For an eigenvalue that
            lies by itself, at a distance `gap` from the next one, the error is
            far smaller: at most `residual**2 / gap`.
        vectors: array of shape `(size, k)` with the eigenvectors as columns,
            or `None` if they were not asked for.
        products: Integer, how many products it took.
        converged: Boolean, whether each value is as accurate as asked for,
            relative to itself, or zero within rounding: all of `limits` are
            `"tol"` or `"zero"`.
        limits: tuple of `k` strings, what the residual of each value is
            limited by. `"tol"`: it is at most `tol * |value|`. `"zero"`: it is
            more, but all of it is rounding, and so is the value: nothing is
            known but that it is zero or of that size. `"rounding"`: it is
            more, all of it is rounding, and the value is not zero. Or
            `"products"`: there were not enough products.
        certificate: the `Certificate` of the products, or `None` if they have
            none.
    """

    limits: tuple = ()
    certificate: Certificate | None = None


@filled_in(HessianOperator)
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

    It stops when all residuals `‖H v - value * v‖` are below half of
    `tol * |value|`, or down to rounding, if two more products have not changed
    the values by more than that and no other can still become one of them. An
    eigenvalue that occurs several times, or several that are within `tol` of
    each other, may be found fewer times, as by any method of this kind. Needs
    memory for `size` numbers per product.

    Args:
        model: a compiled and built `keras.Model`, wrapped or not. Or an
            operator instead of model and data: a `HessianOperator`, a
            `GaussNewtonOperator` or any object with `size` and `matvec`.
        x: see `HessianOperator`.
        y: see `HessianOperator`.
        sample_weight: see `HessianOperator`.
        k: Integer >= 1, how many eigenvalues. Defaults to `5`.
        which: `"LA"`, the largest; `"SA"`, the smallest, which may be
            negative; `"LM"`, the largest in absolute value; or `"BE"`, half
            of them from each end. Defaults to `"LA"`.
        tol: Float >= 0, the residual to stop at, relative to the eigenvalue
            itself; at least what the dtype can hold, `2e-6` in float32.
            Defaults to `1e-2`; the errors are then usually below `1e-3`.
        max_products: Integer >= k, when to stop at the latest. Defaults to
            `None`: ten per eigenvalue, and at least 100.
        seed: Integer, the seed of the random vector to start from. Defaults
            to `0`.
        return_vectors: Boolean, whether to return the eigenvectors as well.
            Defaults to `False`.
        verbose: 0, 1 or `"auto"`: whether progress is shown: never, always,
            or when it takes longer than five seconds. Defaults to `"auto"`.
        **kwargs: `batch_size`, `variables` and `certify`, see
            `HessianOperator`.

    Returns:
        `Eigenvalues`. A warning says so if `max_products` came first, or if
        rounding hides what was asked for.

    Raises:
        ValueError: see `HessianOperator`; or if an argument is not one of
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
        raise ValueError(f"`which` must be one of {WHICH}. Received: which={which!r}")
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
        tol = max(tol, 20 * float(np.finfo(operator.dtype).eps))
        history: list[np.ndarray] = []
        while True:
            lanczos.step()
            full = lanczos.steps == room
            if lanczos.steps < k:
                continue
            values, residuals, s = lanczos.ritz()
            chosen = _ascending(values, k, which)[::-1]
            history.append(values[chosen])
            if full or _is_settled(lanczos, values, residuals, history, tol, which):
                break
    limits = _limits(values[chosen], residuals[chosen], lanczos.rounding, tol)
    _warn(values[chosen], residuals[chosen], limits, operator.dtype, max_products)
    vectors = lanczos.vectors(s[:, chosen]) if return_vectors else None
    result = Eigenvalues(
        values[chosen],
        residuals[chosen],
        vectors,
        operator.count,
        all(limit in ("tol", "zero") for limit in limits),
    )
    result.limits = limits
    return operator.certified(result)


def _is_settled(lanczos, values, residuals, history, tol, which):
    """Whether more products would change nothing of what is wanted, as far as can be told."""
    k, wanted = len(history[-1]), history[-1]
    slack = np.maximum(tol * np.abs(values), 2 * lanczos.rounding)
    chosen = _ascending(values, k, which)[::-1]
    # A residual may be small because the value passes an eigenvalue on its way to another one: the
    # closer the residual is to the distance of eigenvalues, the more often. Half of it costs less
    # than one product.
    if np.any(residuals[chosen] > np.maximum(slack[chosen] / 2, 2 * lanczos.rounding)):
        return False
    if len(history) < 3 or np.any(np.abs(wanted - history[-3]) > slack[chosen]):
        return False
    # Nor must one that is on its way be able to overtake those.
    reach = np.where(residuals > slack, residuals, 0.0)
    reach[chosen] = 0.0
    for moved in (values + reach, values - reach):
        if set(_ascending(moved, k, which)) != set(chosen):
            return False
    if not lanczos.restarted:
        return True
    # On an invariant subspace all residuals are zero, and say nothing of what is outside: the same
    # eigenvalues once more, or others. A whole block from there must have nothing that is wanted.
    if not lanczos.broke_down:
        return False
    more = np.concatenate([values, lanczos.last_block()])
    again = more[_ascending(more, k, which)[::-1]]
    return bool(np.all(np.abs(again - wanted) <= slack[chosen]))


def _limits(values, residuals, rounding, tol):
    """What limits the accuracy of each value: see `Eigenvalues`."""
    size = np.abs(values)
    cases = [residuals <= tol * size, residuals > 2 * rounding, size <= residuals]
    return tuple(map(str, np.select(cases, ["tol", "products", "zero"], "rounding")))


def _warn(values, residuals, limits, dtype, max_products):
    """Say which values are not as accurate as asked for, and what to do."""
    if "products" in limits:
        count = sum(limit != "products" for limit in limits)
        warnings.warn(
            f"{count} of {len(limits)} eigenvalues are as accurate as asked for, and the "
            f"{max_products} products of `max_products` are used up. Look at the residuals; raise "
            "`max_products` or `tol`.",
            stacklevel=3,
        )
    if "rounding" in limits:
        pairs = zip(values, residuals, limits, strict=True)
        lost = ", ".join(f"{v:.3g} +- {r:.1g}" for v, r, limit in pairs if limit == "rounding")
        warnings.warn(
            f"Rounding of products in {dtype} hides more of the eigenvalues {lost} than `tol` "
            "allows: they are too small beside the largest one. More products would not help. "
            "Compute in float64 if the backend can (TensorFlow), raise `tol`, or ask for fewer.",
            stacklevel=3,
        )


@filled_in(eigenvalues)
def sharpness_ratio(model, x=None, y=None, sample_weight=None, *, k=5, tol=1e-2, **kwargs):
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
        tol: Float >= 0, the sum of the residuals of the two eigenvalues to
            stop at, each relative to its own. Defaults to `1e-2`.
        **kwargs: `max_products`, `seed`, `verbose`, `batch_size`, `variables`
            and `certify`, see `eigenvalues`.

    Returns:
        Float. The same warnings as of `eigenvalues`.

    Raises:
        ValueError: see `eigenvalues`; and if that eigenvalue is not positive,
            or zero within rounding.

    Reference:
        - [Jastrzebski et al., 2020](https://arxiv.org/abs/2002.09572)
    """
    check_count("k", k, at_least=2)
    found = eigenvalues(model, x, y, sample_weight, k=k, tol=tol / 2, **kwargs)
    values, last = found.values, found.limits[-1]
    if values[-1] <= 0 or last == "zero":
        zero = ", or zero within rounding" if last == "zero" else ""
        raise ValueError(
            f"The ratio of the largest eigenvalue and eigenvalue {k} says nothing: that one is not "
            f"positive{zero}. Received: a Hessian with the eigenvalues {values}. Use a smaller `k`."
        )
    return float(values[0] / values[-1])

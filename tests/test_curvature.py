"""Products with the Hessian, and what is made of them, against dense matrices in float64."""

import functools
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sharp
from keras_sharp import curvature, engine, vectors
from keras_sharp.curvature import products
from keras_sharp.curvature.eigen import _is_settled
from keras_sharp.curvature.lanczos import Lanczos
from keras_sharp.surface import LossSurface
from tests import models, oracles
from tests.models import BACKEND
from tests.test_surface import Batches, tf_dataset, torch_loader

# Algorithms: on matrices of NumPy, in float64


class Matrix:
    """An operator from a matrix."""

    dtype = np.dtype("float64")

    def __init__(self, matrix):
        self.matrix, self.size, self.products = np.asarray(matrix, "float64"), len(matrix), 0

    def matvec(self, v):
        self.products += 1
        return self.matrix @ v


def with_eigenvalues(values):
    """A matrix with these eigenvalues, in random directions."""
    values = np.asarray(values, "float64")
    q = random_rotation(len(values))
    matrix = Matrix((q * values) @ q.T)
    matrix.eigenvalues = np.sort(values)
    return matrix


@functools.cache
def random_rotation(n):
    q, _ = np.linalg.qr(np.random.default_rng(12345).standard_normal((n, n)))
    return q


def like_a_network(n=200):
    """A few large eigenvalues, most of them near zero, some of them negative."""
    large, rest = [53, 27.5, 20.6, 15.3, 12.2, 10.3], 8 * 0.9 ** np.arange(n - 14)
    return with_eigenvalues(np.r_[large, rest, -np.linspace(0.2, 3, 8)])


def extreme(values, k, which):
    """The eigenvalues that `which` names, descending, as sentences and not as indices."""
    values = sorted(values, reverse=True)
    if which == "LA":
        return values[:k]
    if which == "SA":
        return values[-k:]
    if which == "LM":
        return sorted(sorted(values, key=abs)[-k:], reverse=True)
    return values[: k - k // 2] + (values[-(k // 2) :] if k // 2 else [])


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_eigenvalues_are_those_of_the_dense_matrix(which, k):
    matrix = like_a_network()
    found = curvature.eigenvalues(matrix, k=k, which=which, tol=1e-6, max_products=200)
    expected = extreme(matrix.eigenvalues, k, which)
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)
    assert found.converged
    assert found.vectors is None


@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
def test_residuals_bound_the_errors_and_are_as_small_as_asked_for(tol, which):
    matrix = like_a_network()
    true = matrix.eigenvalues
    for seed in range(5):
        found = curvature.eigenvalues(
            matrix, k=5, which=which, tol=tol, max_products=200, seed=seed, return_vectors=True
        )
        distance = np.min(np.abs(found.values[:, None] - true), axis=1)
        assert np.all(distance <= found.residuals)
        assert np.all(found.residuals <= tol * np.maximum(np.abs(found.values), 0.53))
        left = matrix.matrix @ found.vectors - found.vectors * found.values
        np.testing.assert_allclose(
            np.linalg.norm(left, axis=0), found.residuals, rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize("largest", [1e2, 1e3, 1e5])
@pytest.mark.parametrize("tol", [1e-2, 1e-3])
def test_beside_an_outlier_each_value_is_right_relative_to_itself(largest, tol):
    values = np.r_[largest, np.linspace(1, 0.05, 100) ** 2]
    matrix = with_eigenvalues(np.r_[values, -values[:5] / 3])
    for which in ("LA", "SA", "LM", "BE"):
        found = curvature.eigenvalues(matrix, k=5, which=which, tol=tol, max_products=106)
        expected = extreme(matrix.eigenvalues, 5, which)
        np.testing.assert_allclose(found.values, expected, rtol=tol)
        assert np.all(found.residuals <= tol * np.abs(found.values))
        assert found.converged
        assert found.limits == ("tol",) * 5
    ratio = curvature.sharpness_ratio(matrix, tol=tol)
    np.testing.assert_allclose(ratio, largest / matrix.eigenvalues[-5], rtol=tol)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_small_residual_alone_does_not_end_the_search(k):
    """In the middle of many eigenvalues there is always one within a small distance."""
    for seed in range(8):
        values = np.random.default_rng(seed).uniform(0, 1, 300) ** 0.5
        found = curvature.eigenvalues(with_eigenvalues(values), k=k, seed=seed)
        np.testing.assert_allclose(found.values, np.sort(values)[::-1][:k], rtol=1e-2)


class Diagonal:
    """A diagonal matrix."""

    dtype = np.dtype("float64")

    def __init__(self, values):
        self.values, self.size = values, len(values)

    def matvec(self, v):
        return self.values * v


@pytest.mark.parametrize(
    "values",
    [0.9 ** np.arange(300), np.r_[3, 2.9, np.linspace(0, 0.1, 1000)]],
    ids=["geometric", "two"],
)
def test_a_value_on_its_way_to_another_one_is_not_taken_for_it(values):
    """By chance, a vector to start from has little of the first eigenvector."""
    for seed in range(60):
        found = curvature.eigenvalues(Diagonal(values), k=1, seed=seed)
        np.testing.assert_allclose(found.values, values[:1], rtol=1e-2)


def test_an_invariant_subspace_with_wanted_values_does_not_end_the_search():
    matrix, start = Matrix(np.diag([5.0, 4, 0, 5, 4] + [0.0] * 30)), np.r_[1, 1, 1, np.zeros(32)]
    lanczos = Lanczos(matrix, start, np.random.default_rng(0), 35)
    for _ in range(3):
        lanczos.step()
    assert lanczos.broke_down
    settled = []
    while lanczos.steps < 8:
        values, residuals, _ = lanczos.ritz()
        history = [values[::-1][:2]] * 3
        settled.append(_is_settled(lanczos, values, residuals, history, 1e-2, "LA"))
        lanczos.step()
    assert settled == [False, False, False, True, True]  # After a block with 5, 4 and 0 of its own.


class Float32(Matrix):
    """A matrix whose products are rounded to float32."""

    dtype = np.dtype("float32")

    def matvec(self, v):
        self.products += 1
        return (self.matrix.astype("float32") @ v).astype("float32")


def test_what_rounding_hides_is_told_and_ends_the_search():
    values = np.r_[1e4, 5e3, np.linspace(0.1, 0, 198)]
    matrix = Float32(with_eigenvalues(values).matrix)
    with pytest.warns(UserWarning, match=r"Rounding of products in float32 hides.*float64"):
        found = curvature.eigenvalues(matrix, k=3, tol=1e-2)
    assert found.limits == ("tol", "tol", "rounding")
    assert not found.converged
    assert found.products < 20
    assert abs(found.values[2] - 0.1) <= found.residuals[2]


def test_a_tolerance_that_rounding_does_not_allow_does_not_use_up_the_products():
    for tol in (0.0, 1e-12):
        matrix = Float32(like_a_network().matrix)
        with pytest.warns(UserWarning, match="Rounding"):
            found = curvature.eigenvalues(matrix, k=3, tol=tol)
        assert found.limits == ("tol", "tol", "rounding")  # The largest are as exact as can be.
        assert found.products < 60
        np.testing.assert_allclose(found.values, [53, 27.5, 20.6], rtol=1e-6)


def test_products_in_half_precision_are_seen_in_the_residuals():
    dense, rng = like_a_network().matrix, np.random.default_rng(0)

    class Noisy(Matrix):
        def matvec(self, v):
            exact = super().matvec(v)
            return exact + 1e-2 * np.linalg.norm(exact) * rng.normal(size=v.size) / v.size**0.5

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = curvature.eigenvalues(Noisy(dense), k=5, tol=1e-3)
    true = np.linalg.eigvalsh(dense)[::-1][:5]
    assert np.all(np.abs(found.values - true) <= found.residuals)
    assert set(found.limits) == {"rounding"}
    assert found.products < 50


@pytest.mark.parametrize("matrix", [Matrix, Float32])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_eigenvalues_of_zero_are_no_alarm_and_take_few_products(matrix, rank):
    matrix = matrix(with_eigenvalues(np.r_[[9.0, 4, 1][:rank], np.zeros(300 - rank)]).matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = curvature.eigenvalues(matrix, k=5)
    np.testing.assert_allclose(
        found.values, np.r_[[9.0, 4, 1, 0, 0, 0][:rank], [0] * 5][:5], atol=1e-4
    )
    if rank:  # Otherwise, all is exact.
        assert found.limits == ("tol",) * rank + ("zero",) * (5 - rank)
    assert found.converged
    assert found.products <= 10
    with pytest.raises(ValueError, match="not positive"):
        curvature.sharpness_ratio(matrix)


@pytest.mark.parametrize(
    ("values", "k"),
    [
        ([5.0] * 300, 6),
        ([5.0] * 4 + [2.0] * 3 + [0.0] * 293, 6),
        ([5.0, 5.0, 4.0] + [0.0] * 297, 2),
    ],
)
def test_equal_eigenvalues_are_all_found_and_end_the_search(values, k):
    found = curvature.eigenvalues(with_eigenvalues(values), k=k)
    np.testing.assert_allclose(found.values, values[:k], rtol=1e-9)
    assert found.products <= 20


def test_eigenvectors_are_orthonormal():
    matrix = with_eigenvalues(10.0 ** -np.linspace(0, 8, 50))
    found = curvature.eigenvalues(matrix, k=50, return_vectors=True)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(50), atol=1e-13)


def test_a_direction_that_is_dropped_counts_as_an_error():
    matrix = Matrix([[1.0, 1e-14, 0.0], [1e-14, 2.0, 0.0], [0.0, 0.0, 3.0]])
    lanczos = Lanczos(matrix, np.eye(3)[0], np.random.default_rng(0), 3)
    lanczos.step()
    assert lanczos.broke_down
    values, residuals, _ = lanczos.ritz()
    assert values == [1.0]
    assert 1e-14 <= residuals[0] < 2e-14


@pytest.mark.parametrize("seed", range(5))
def test_top_five_to_a_thousandth_take_17_products_and_the_top_one_8(seed):
    matrix = like_a_network()
    true = matrix.eigenvalues[::-1]
    for k, budget in ((5, 17), (1, 8)):
        matrix.products = 0
        found = curvature.eigenvalues(matrix, k=k, seed=seed)
        assert found.products == matrix.products <= budget
        np.testing.assert_allclose(found.values, true[:k], rtol=1e-3)


@pytest.mark.parametrize("k", [1, 7, 8])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_as_many_eigenvalues_as_there_are_rows(k, which):
    matrix = with_eigenvalues(np.array([3, 2, 1, 0.5, 0.1, -0.2, -1, -2]))
    found = curvature.eigenvalues(matrix, k=k, which=which, tol=1e-9)
    expected = extreme([3, 2, 1, 0.5, 0.1, -0.2, -1, -2], k, which)
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)
    assert found.products <= 8


@pytest.mark.parametrize("values", [[5.0] * 6, [0.0] * 6, [5, 5, 5, 1, 0, 0]])
def test_eigenvalues_that_occur_more_than_once(values):
    matrix = with_eigenvalues(np.array(values))
    found = curvature.eigenvalues(matrix, k=4, tol=1e-9)
    np.testing.assert_allclose(found.values, values[:4], atol=1e-12)
    np.testing.assert_allclose(curvature.eigenvalues(matrix, k=6).values, values, atol=1e-12)


def test_a_matrix_of_one_row():
    found = curvature.eigenvalues(Matrix([[-2.0]]), k=1, return_vectors=True)
    np.testing.assert_allclose(found.values, [-2.0])
    np.testing.assert_allclose(np.abs(found.vectors), [[1.0]])
    np.testing.assert_allclose(curvature.trace(Matrix([[-2.0]]), num_products=2).value, -2.0)
    assert curvature.hutch_plus_plus(Matrix([[-2.0]]), num_products=6).value == -2.0
    assert curvature.spectral_density(Matrix([[-2.0]])).nodes == [-2.0]


def test_the_end_of_the_budget_is_told():
    matrix = like_a_network()
    with pytest.warns(UserWarning, match=r"[0-4] of 5 eigenvalues.*9 products.*raise `max_prod"):
        found = curvature.eigenvalues(matrix, k=5, max_products=9)
    assert not found.converged
    assert found.products == matrix.products == 9
    true = matrix.eigenvalues
    assert np.all(np.min(np.abs(found.values[:, None] - true), axis=1) <= found.residuals)


def test_the_ratio_of_the_first_and_the_fifth_eigenvalue():
    matrix = like_a_network()
    np.testing.assert_allclose(curvature.sharpness_ratio(matrix), 53 / 12.2, rtol=1e-3)
    np.testing.assert_allclose(curvature.sharpness_ratio(matrix, k=2), 53 / 27.5, rtol=1e-3)


def test_a_ratio_with_a_negative_eigenvalue_is_refused():
    with pytest.raises(ValueError, match="not positive"):
        curvature.sharpness_ratio(Matrix(np.diag([3.0, 2, 1, -1, -2, -3])))


@pytest.mark.parametrize("estimator", [curvature.trace, curvature.hutch_plus_plus])
def test_the_trace_is_within_three_standard_errors(estimator):
    matrix = like_a_network()
    true = np.trace(matrix.matrix)
    for seed in range(20):
        matrix.products = 0
        found = estimator(matrix, num_products=99, seed=seed)
        assert abs(found.value - true) <= 3 * found.standard_error
        assert found.products == matrix.products == 99
        assert found.standard_error < 0.2 * true


def test_standard_errors_are_neither_too_small_nor_too_large():
    matrix = like_a_network()
    true = {"trace": np.trace(matrix.matrix), "frobenius_norm": np.linalg.norm(matrix.matrix)}
    for name, value in true.items():
        found = [getattr(curvature, name)(matrix, num_products=60, seed=s) for s in range(100)]
        scores = np.array([(f.value - value) / f.standard_error for f in found])
        assert 0.8 < np.sqrt(np.mean(scores**2)) < 1.25


def test_the_trace_of_a_diagonal_matrix_is_exact():
    found = curvature.trace(Matrix(np.diag([1.0, 2.0, -7.0])), num_products=2)
    assert found == (-4.0, 0.0, 2)


def test_hutch_plus_plus_is_exact_where_the_rank_is_low():
    matrix = with_eigenvalues(np.r_[[9, 4, -2, 1], np.zeros(96)])
    found = curvature.hutch_plus_plus(matrix, num_products=15)
    np.testing.assert_allclose(found.value, 12.0, rtol=1e-10)
    assert found.standard_error < 1e-10


def test_hutch_plus_plus_beats_hutchinson_on_the_spectrum_of_a_network():
    matrix = like_a_network()
    true = np.trace(matrix.matrix)

    def error(estimator):
        return np.mean(
            [abs(estimator(matrix, num_products=99, seed=s).value - true) for s in range(20)]
        )

    assert error(curvature.hutch_plus_plus) < 0.5 * error(curvature.trace)


def test_the_frobenius_norm():
    matrix = like_a_network()
    true = np.linalg.norm(matrix.matrix)
    for seed in range(20):
        matrix.products = 0
        found = curvature.frobenius_norm(matrix, num_products=100, seed=seed)
        assert abs(found.value - true) <= 3 * found.standard_error
        assert found.products == matrix.products == 100
    assert curvature.frobenius_norm(Matrix(np.zeros((3, 3)))).value == 0.0


def test_with_all_vectors_the_density_has_the_moments_of_the_spectrum():
    matrix = with_eigenvalues(np.linspace(-1, 3, 12) ** 3)
    true = matrix.eigenvalues
    found = curvature.spectral_density(matrix, steps=4, num_vectors=12)
    for power in range(8):  # Four nodes are right up to the power of seven.
        np.testing.assert_allclose(found.moment(power), np.mean(true**power), rtol=1e-9)
    assert found.products == matrix.products == 48


def test_each_vector_of_the_density_has_the_right_moments_of_its_own():
    matrix = like_a_network()
    found = curvature.spectral_density(matrix, steps=10, num_vectors=1, seed=3)
    v, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((200, 1)))
    u, powers = v[:, 0], []
    for _ in range(20):
        powers.append(v[:, 0] @ u)
        u = matrix.matrix @ u
    np.testing.assert_allclose([found.moment(p) for p in range(20)], powers, rtol=1e-8)
    assert found.products == matrix.products == 10


def test_the_density_is_that_of_the_spectrum():
    values = np.r_[np.full(150, -1.0), np.full(250, 2.0)]
    matrix = with_eigenvalues(values)
    found = curvature.spectral_density(matrix, num_vectors=4)
    assert found.products <= 4 * 3  # The process ends with two eigenvalues.
    grid = found.grid()
    density = found.density()
    assert density.shape == grid.shape
    np.testing.assert_allclose(np.trapezoid(density, grid), 1.0, atol=1e-4)
    np.testing.assert_allclose(
        np.trapezoid(density[grid < 0.5], grid[grid < 0.5]), 3 / 8, atol=0.05
    )
    wide = found.density(np.array([0.5]), sigma=1.0)
    height = np.exp(-0.5 * 1.5**2) / np.sqrt(2 * np.pi)  # Both are 1.5 away.
    np.testing.assert_allclose(wide, [height], rtol=1e-6)


ESTIMATORS = {
    "eigenvalues": lambda *m, **kwargs: curvature.eigenvalues(*m, k=3, **kwargs).residuals,
    "trace": lambda *m, **kwargs: curvature.trace(*m, **kwargs)[:2],
    "hutch_plus_plus": lambda *m, **kwargs: curvature.hutch_plus_plus(*m, **kwargs)[:2],
    "frobenius_norm": lambda *m, **kwargs: curvature.frobenius_norm(*m, **kwargs)[:2],
    "spectral_density": lambda *m, **kwargs: curvature.spectral_density(*m, **kwargs).nodes,
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_seed_decides(name):
    matrix, estimate = like_a_network(60), ESTIMATORS[name]
    np.random.seed(1)
    first = estimate(matrix, seed=1)
    np.random.seed(2)
    np.testing.assert_array_equal(estimate(matrix, seed=1), first)
    assert not np.array_equal(estimate(matrix, seed=2), first)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_progress_is_shown_when_it_takes_long(name, capsys, monkeypatch):
    matrix, estimate = like_a_network(60), ESTIMATORS[name]
    estimate(matrix, verbose=0)
    estimate(matrix)  # It takes no five seconds.
    assert capsys.readouterr().out == ""
    estimate(matrix, verbose=1)
    assert "product" in capsys.readouterr().out
    monkeypatch.setattr(products, "LONG", 0.0)
    estimate(matrix)
    assert capsys.readouterr().out.endswith("\n")


# Algorithms: bad input


class Untouchable(Matrix):
    def matvec(self, v):
        raise AssertionError("a product was taken")


BAD = {
    "k": (lambda m: curvature.eigenvalues(m, k=0), r"`k` must be an integer >= 1. Received: k=0"),
    "float k": (lambda m: curvature.eigenvalues(m, k=2.0), r"Received: k=2\.0"),
    "k too large": (lambda m: curvature.eigenvalues(m, k=7), r"6 rows.*Received: k=7"),
    "which": (lambda m: curvature.eigenvalues(m, which="SM"), r"one of \['LA', 'SA'.*'SM'"),
    "tol": (lambda m: curvature.eigenvalues(m, tol=-1.0), r"`tol`.*Received: tol=-1\.0"),
    "NaN tol": (lambda m: curvature.eigenvalues(m, tol=np.nan), r"`tol`.*Received: tol=nan"),
    "budget": (lambda m: curvature.eigenvalues(m, max_products=4), r"`max_products`.*>= 5"),
    "ratio": (lambda m: curvature.sharpness_ratio(m, k=1), r"`k` must be an integer >= 2"),
    "trace": (lambda m: curvature.trace(m, num_products=1), r"`num_products`.*>= 2"),
    "hutch++": (lambda m: curvature.hutch_plus_plus(m, num_products=5), r"`num_products`.*>= 6"),
    "norm": (lambda m: curvature.frobenius_norm(m, num_products=True), r"Received: num_pro.*True"),
    "steps": (lambda m: curvature.spectral_density(m, steps=0), r"`steps`.*>= 1"),
    "vectors": (lambda m: curvature.spectral_density(m, num_vectors=0), r"`num_vectors`.*>= 1"),
    "verbose": (lambda m: curvature.trace(m, verbose=3), r"`verbose` must be 0, 1 or 'auto'"),
    "data twice": (lambda m: curvature.trace(m, np.ones(3)), r"data and options already"),
    "options twice": (lambda m: curvature.trace(m, batch_size=3), r"\['batch_size'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_the_first_product(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(Untouchable(np.eye(6)))


def test_a_product_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        curvature.eigenvalues(Matrix(np.full((6, 6), np.nan)))


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan])
def test_the_width_of_the_gaussian_is_positive(sigma):
    found = curvature.spectral_density(Matrix(np.eye(6)))
    with pytest.raises(ValueError, match="`sigma` must be a number > 0"):
        found.density(sigma=sigma)


# The Hessian of pure functions, in float64

NETWORKS = [oracles.Mlp, oracles.ConvNet]


def loss_in_ops(net, tensor):
    """The loss of a `Classifier` in operations that keep float64."""
    one_hot = tensor(np.eye(3)[net.y])
    if isinstance(net, oracles.Mlp):
        x = tensor(net.x)
    else:
        x = tensor(net.patches)
        shift, factor = tensor(net.mean), tensor(1 / np.sqrt(net.variance + 1e-3))

    def loss(w):
        *features, c, d = w
        if isinstance(net, oracles.Mlp):
            a = x @ features[0] + features[1]
        else:
            kernel, gamma, beta = features
            a = gamma * ((x @ ops.reshape(kernel, (9, 5)) - shift) * factor) + beta
        hidden = 1 - 2 / (ops.exp(2 * a) + 1)
        if len(a.shape) == 3:
            hidden = ops.sum(hidden, axis=1) / a.shape[1]
        z = hidden @ c + d
        return ops.sum(ops.log(ops.sum(ops.exp(z), axis=1)) - ops.sum(z * one_hot, axis=1)) / len(z)

    return loss


class Product64:
    """The Hessian of a function in float64, through the engine."""

    dtype = np.dtype("float64")

    def __init__(self, net, float64):
        self._float64, self._net, self.size = float64, net, net.start.size
        w = float64.tensors(oracles.split(net.start, net.shapes))
        self._product = engine.hessian(loss_in_ops(net, float64.tensor), w)

    def matvec(self, v):
        v = self._float64.tensors(oracles.split(v, self._net.shapes))
        return oracles.join(self._float64.arrays(self._product(v)))


@pytest.mark.parametrize("network", NETWORKS)
def test_in_float64_all_is_as_exact_as_the_dense_matrix(network, float64):
    net = network()
    dense, operator = net.hessian(), Product64(net, float64)
    true = np.linalg.eigvalsh(dense)[::-1]
    top = curvature.eigenvalues(operator, k=10, tol=1e-8)
    bottom = curvature.eigenvalues(operator, k=5, which="SA", tol=1e-8)
    np.testing.assert_allclose(top.values, true[:10], rtol=1e-6)
    np.testing.assert_allclose(bottom.values, true[-5:], rtol=1e-6)
    # The rest of the test need not go through the backend.
    operator = Matrix(np.stack([operator.matvec(v) for v in np.eye(operator.size)]))
    np.testing.assert_allclose(operator.matrix, dense, atol=1e-10)
    for seed in range(20):
        found = curvature.trace(operator, num_products=30, seed=seed)
        assert abs(found.value - np.trace(dense)) <= 3 * found.standard_error
    spectrum = curvature.spectral_density(operator, steps=4, num_vectors=operator.size)
    for power in range(8):
        np.testing.assert_allclose(spectrum.moment(power), np.mean(true**power), rtol=1e-8)


# The Hessian of models, in float32


@pytest.fixture(autouse=True)
def _uncertified(monkeypatch):
    """`test_certificate.py` is about that. It would take more time than the rest of this file."""
    monkeypatch.setattr(curvature.HessianOperator, "_check_product", lambda *_: None)
    monkeypatch.setattr(curvature.GaussNewtonOperator, "_check_product", lambda *_: None)


@pytest.fixture(params=models.MODES)
def mode(request):
    with models.running(request.param):
        yield request.param


def twin(net):
    """The Keras model of a `Classifier`, with its weights."""
    if isinstance(net, oracles.Mlp):
        body = [keras.Input((3,)), layers.Dense(5, "tanh")]
    else:
        body = [
            keras.Input((6, 6, 1)),
            layers.Conv2D(5, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.Activation("tanh"),
            layers.GlobalAveragePooling2D(),
        ]
    model = keras.Sequential([*body, layers.Dense(3)])
    models.assign(model.trainable_variables, oracles.split(net.start, net.shapes))
    if isinstance(net, oracles.ConvNet):
        models.assign(model.non_trainable_variables, [net.mean, net.variance])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def data(net):
    return net.x.astype("float32"), net.y


def assert_products(operator, matrix):
    """The products with some vectors are those of a dense matrix."""
    assert operator.shape == matrix.shape
    v = np.random.default_rng(0).standard_normal((operator.size, 2))
    np.testing.assert_allclose(operator @ v, matrix @ v, atol=2e-5)


def dense(operator):
    return operator @ np.eye(operator.size)


@pytest.mark.parametrize("network", NETWORKS)
def test_products_are_those_of_the_dense_hessian(network, mode):
    net = network()
    operator = curvature.HessianOperator(twin(net), *data(net))
    assert_products(operator, net.hessian())
    assert operator.products == 2


@pytest.mark.parametrize("network", NETWORKS)
def test_in_float32_eigenvalues_are_right_to_a_thousandth(network, mode):
    net = network()
    true = np.linalg.eigvalsh(net.hessian())[::-1]
    operator = curvature.HessianOperator(twin(net), *data(net))
    top = curvature.eigenvalues(operator, k=10, tol=1e-4)
    bottom = curvature.eigenvalues(operator, k=5, which="SA", tol=1e-4)
    np.testing.assert_allclose(top.values, true[:10], rtol=1e-3)
    np.testing.assert_allclose(bottom.values, true[-5:], rtol=1e-3)
    for found in (top, bottom):
        assert found.converged
        distance = np.min(np.abs(found.values[:, None] - true), axis=1)
        assert np.all(distance <= found.residuals)
        assert np.all(found.residuals < 2e-4 * np.maximum(np.abs(found.values), 0.01 * true[0]))


def test_the_result_does_not_depend_on_the_split(mode):
    net = oracles.ConvNet()
    x, y = data(net)
    model = twin(net)
    for batch_size in (11, 4):
        operator = curvature.HessianOperator(model, x, y, batch_size=batch_size)
        assert_products(operator, net.hessian())


@pytest.mark.parametrize("kind", [Batches, tf_dataset, torch_loader])
def test_data_sets_give_what_arrays_give(kind):
    net = oracles.Mlp()
    operator = curvature.HessianOperator(twin(net), kind(*data(net)))
    assert_products(operator, net.hessian())


@pytest.mark.parametrize("batch_size", [11, 4])
def test_sample_weights_count(batch_size, mode):
    net = oracles.Mlp(sample_weight=np.linspace(0, 2, 11))
    operator = curvature.HessianOperator(
        twin(net), *data(net), net.sample_weight, batch_size=batch_size
    )
    assert_products(operator, net.hessian())


def test_regularizers_count_once(mode):
    x, y = models.regression(n=11)
    model = models.linear(kernel_regularizer=keras.regularizers.L2(0.5))
    model.compile("sgd", "mse")
    expected = 2 * x.T @ x / 11 + np.eye(3)
    for batch_size in (11, 4):
        operator = curvature.HessianOperator(model, x, y, batch_size=batch_size)
        assert_products(operator, expected)


def test_products_are_symmetric_and_differences_of_gradients(mode):
    model = models.batchnorm_net()
    model.compile("sgd", "mse")
    x, y = models.regression()
    operator = curvature.HessianOperator(model, x, y)
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((2, operator.size))
    np.testing.assert_allclose(u @ (operator @ v), v @ (operator @ u), rtol=1e-4)

    surface, h = LossSurface(model, x, y), 1e-2

    def gradient(step):
        w = [a + step * b for a, b in zip(surface.weights, operator.as_weights(v), strict=True)]
        return models.flat(map(ops.convert_to_numpy, surface.loss_and_gradient(w).gradient))

    difference = (gradient(h) - gradient(-h)) / (2 * h)
    np.testing.assert_allclose(operator @ v, difference, atol=1e-2 * np.abs(difference).max())


def test_some_of_the_variables_give_a_block():
    net = oracles.ConvNet()
    model = twin(net)
    operator = curvature.HessianOperator(
        model, *data(net), variables=model.layers[-1].trainable_variables
    )
    assert_products(operator, net.hessian()[-18:, -18:])
    found = curvature.eigenvalues(
        model, *data(net), k=1, variables=model.layers[0].trainable_variables
    )
    assert found.values[0] <= np.linalg.eigvalsh(net.hessian()[:45, :45])[-1] * 1.0001


def test_weights_without_a_part_in_the_loss_have_no_curvature(mode):
    inputs = keras.Input((3,))
    used = layers.Dense(1, use_bias=False)(inputs)
    unused = layers.Dense(1, use_bias=False)(inputs)
    model = keras.Model(inputs, [used, unused])
    model.compile("sgd", ["mse", None])
    x, y = models.regression()
    for batch_size in (8, 4):
        matrix = dense(curvature.HessianOperator(model, x, [y, y], batch_size=batch_size))
        np.testing.assert_allclose(matrix[:3, :3], 2 * x.T @ x / 8, rtol=1e-5)
        np.testing.assert_array_equal(matrix[3:], 0.0)
        np.testing.assert_array_equal(matrix[:, 3:], 0.0)


def test_an_operator_stays_where_it_was_until_it_is_refreshed(mode):
    net = oracles.ConvNet()
    x, y = data(net)
    model = twin(net)
    for batch_size in (11, 4):
        models.assign(model.trainable_variables, oracles.split(net.start, net.shapes))
        models.assign(model.non_trainable_variables, [net.mean, net.variance])
        operator = curvature.HessianOperator(model, x, y, batch_size=batch_size)
        v = np.ones(operator.size, "float32")
        before = operator @ v
        model.fit(x, y, verbose=0)
        np.testing.assert_array_equal(operator @ v, before)
        operator.refresh()
        after = operator @ v
        assert np.max(np.abs(after - before)) > 1e-4
        np.testing.assert_allclose(after, curvature.HessianOperator(model, x, y) @ v, atol=1e-5)


@models.on("tensorflow", "jax")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compiled"], indirect=True)
@pytest.mark.parametrize("batch_size", [11, 4])
def test_nothing_is_compiled_again(batch_size, mode):
    calls = []

    class Counting(layers.Layer):
        def call(self, x):
            calls.append(x)
            return x

    net = oracles.Mlp()
    model = keras.Sequential([keras.Input((3,)), Counting(), layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    operator = curvature.HessianOperator(model, *data(net), batch_size=batch_size)
    operator @ np.ones(operator.size)
    model.fit(*data(net), verbose=0)
    calls.clear()
    operator.refresh()
    operator @ np.ones(operator.size)
    assert not calls


def test_nothing_of_the_model_changes(mode):
    net = oracles.ConvNet()
    model = twin(net)
    model.fit(*data(net), verbose=0)
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    before = models.values(variables)
    for operator in (curvature.HessianOperator, curvature.GaussNewtonOperator):
        for batch_size in (11, 4):
            operator(model, *data(net), batch_size=batch_size) @ np.ones(net.start.size)
    models.assert_same(models.values(variables), before, bits=True)
    assert all(layer.trainable for layer in model.layers)


def test_of_a_wrapped_model_it_is_the_hessian_of_the_model_inside(mode):
    net = oracles.Mlp()
    wrapper = keras_sharp.SharpnessAwareModel(twin(net))
    wrapper.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    operator = curvature.HessianOperator(wrapper, *data(net))
    assert_products(operator, net.hessian())


def test_a_model_that_runs_eagerly_is_not_compiled():
    seen = []

    class Eager(layers.Layer):
        def call(self, x):
            if BACKEND == "tensorflow":
                import tensorflow as tf

                seen.append(tf.executing_eagerly())
            return x

    net = oracles.Mlp()
    model = keras.Sequential([twin(net), Eager()])
    model.compile("sgd", twin(net).loss, run_eagerly=True)
    model.evaluate(*data(net), verbose=0)
    seen.clear()
    operator = curvature.HessianOperator(model, *data(net))
    assert_products(operator, net.hessian())
    assert all(seen)


def test_columns_are_taken_one_by_one_and_wrong_shapes_refused():
    net = oracles.Mlp()
    operator = curvature.HessianOperator(twin(net), *data(net))
    u, v = np.eye(operator.size)[:2]
    np.testing.assert_array_equal(
        operator @ np.stack([u, v], 1), np.stack([operator @ u, operator @ v], 1)
    )
    for wrong in (np.ones(3), np.ones((3, 2)), np.float32(1)):
        with pytest.raises(ValueError, match=r"of the shape \(38,\)\. Received: an array"):
            operator @ wrong


def test_a_vector_as_weights_has_their_shapes():
    net = oracles.ConvNet()
    operator = curvature.HessianOperator(twin(net), *data(net))
    tensors = operator.as_weights(net.start)
    assert [tuple(t.shape) for t in tensors] == list(net.shapes)
    np.testing.assert_allclose(
        models.flat(map(ops.convert_to_numpy, tensors)), net.start, rtol=1e-6
    )


def test_scipy_takes_the_operator():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    net = oracles.Mlp()
    operator = linalg.aslinearoperator(curvature.HessianOperator(twin(net), *data(net)))
    values = linalg.eigsh(operator, 2, which="LA", return_eigenvectors=False, v0=np.ones(38, "f"))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(net.hessian())[-2:], rtol=1e-4)


def test_from_model_and_data_in_one_call():
    net = oracles.Mlp()
    arguments = (twin(net), *data(net))
    operator = curvature.HessianOperator(*arguments)
    for estimate in ESTIMATORS.values():
        np.testing.assert_allclose(estimate(*arguments), estimate(operator), rtol=1e-3, atol=1e-5)
    ratio = curvature.sharpness_ratio(*arguments, batch_size=4)
    np.testing.assert_allclose(ratio, curvature.sharpness_ratio(operator), rtol=1e-4)


# The Gauss-Newton matrix


def gauss_newton(net):
    """`J' H J`, with the Hessian of the cross-entropy by the logits, `diag(p) - p p'`."""
    jacobian = oracles.differentiate(net.logits, net.start)  # (weight, example, class)
    p = np.exp(net.logits(net.start))
    p /= p.sum(axis=1, keepdims=True)
    middle = np.stack([np.diag(q) - np.outer(q, q) for q in p]) / len(p)
    middle *= net.sample_weight[:, None, None]
    return np.einsum("inc,ncd,jnd->ij", jacobian, middle, jacobian)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("batch_size", [11, 4])
def test_the_gauss_newton_matrix_is_that_of_the_formula(network, batch_size, mode):
    net = network(sample_weight=np.linspace(0.5, 2, 11))
    operator = curvature.GaussNewtonOperator(
        twin(net), *data(net), net.sample_weight, batch_size=batch_size
    )
    assert_products(operator, gauss_newton(net))


def test_for_a_linear_model_gauss_newton_is_the_hessian(mode):
    x = {"a": np.ones((4, 3)), "b": {"c": np.eye(4)[:, :2]}}
    y = {"small": np.ones((4, 1)), "big": np.ones((4, 2))}
    inputs = {"a": keras.Input((3,), name="a"), "b": {"c": keras.Input((2,), name="c")}}
    outputs = {
        "small": layers.Dense(1, name="small")(inputs["a"]),
        "big": layers.Dense(2, name="big")(inputs["b"]["c"]),
    }
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"small": "mse", "big": "mse"}, loss_weights={"small": 2.0, "big": 1.0})
    hessian = dense(curvature.HessianOperator(model, x, y))
    trackers = models.values(model.metrics_variables)
    np.testing.assert_allclose(
        dense(curvature.GaussNewtonOperator(model, x, y)), hessian, atol=1e-6
    )
    models.assert_same(models.values(model.metrics_variables), trackers, bits=True)


def masked():
    model = keras.Sequential([keras.Input((4, 3)), layers.Masking(), layers.Dense(1)])
    model.compile("sgd", "mse")
    return model, np.ones((8, 4, 3)), np.ones((8, 4, 1))


def regularized():
    model = models.linear(kernel_regularizer="l2")
    model.compile("sgd", "mse")
    return model, *models.regression()


def own_loss():
    model = models.Autoencoder()
    model(np.ones((1, 3), "float32"))
    model.compile("sgd")
    return model, models.regression()[0]


@pytest.mark.parametrize("build", [masked, regularized, own_loss])
@pytest.mark.parametrize("batch_size", [8, 512])
def test_a_loss_of_more_than_the_outputs_has_no_gauss_newton_matrix(build, batch_size):
    with pytest.raises(ValueError, match=r"more than.*outputs.*Use HessianOperator"):
        curvature.GaussNewtonOperator(*build(), batch_size=batch_size)


# Models: bad input


def bad_model(change):
    net = oracles.Mlp()
    model, (x, y) = twin(net), data(net)
    return {
        "not compiled": lambda: (models.mlp(), x, y),
        "empty": lambda: (model, x[:0], y[:0]),
        "NaN": lambda: (model, np.full_like(x, np.nan), y),
        "no fit": lambda: (model, np.ones((11, 7)), y),
        "no data": lambda: (model,),
    }[change]()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not compiled", "Call `compile`"),
        ("empty", "no data"),
        ("NaN", "not finite"),
        ("no fit", "cannot be computed on these data"),
        ("no data", "no data"),
    ],
)
def test_models_and_data_that_do_not_do_are_refused(change, message, monkeypatch):
    monkeypatch.setattr(curvature.HessianOperator, "matvec", Untouchable.matvec)
    for function in (curvature.eigenvalues, curvature.trace, curvature.spectral_density):
        with pytest.raises(ValueError, match=message):
            function(*bad_model(change))


def test_more_eigenvalues_than_weights_are_refused(monkeypatch):
    monkeypatch.setattr(curvature.HessianOperator, "matvec", Untouchable.matvec)
    net = oracles.Mlp()
    with pytest.raises(ValueError, match=r"Received: k=39\. Expected a `k` up to"):
        curvature.eigenvalues(twin(net), *data(net), k=39)


def test_attention_is_differentiated_twice():
    """The fast kernels of PyTorch are not: its own ones must be asked for."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 3))
    attended = layers.MultiHeadAttention(num_heads=1, key_dim=2)(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(1)(attended[:, 0]))
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4, 3)).astype("float32"), rng.normal(size=(6, 1))
    hessian = curvature.HessianOperator(model, x, y)
    v = rng.normal(size=hessian.size)
    surface, direction = LossSurface(model, x, y), hessian.as_weights(v)
    plus, minus = (
        surface.loss_and_gradient(vectors.add_scaled(surface.weights, h, direction)).gradient
        for h in (1e-2, -1e-2)
    )
    difference = [
        ops.convert_to_numpy(p - m).ravel() / 2e-2 for p, m in zip(plus, minus, strict=True)
    ]
    np.testing.assert_allclose(hessian @ v, np.concatenate(difference), rtol=1e-2, atol=1e-2)

"""Arithmetic on lists of tensors: what `None` means, and numbers at the ends of floats."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_sharp import engine, vectors
from keras_sharp.engine import value_and_gradient
from tests import models
from tests.models import BACKEND

#: Compilers rearrange products, which is safe only if no intermediate result can overflow.
HOW = ["as_written"] if BACKEND == "torch" else ["as_written", "compiled"]
BOTH_WAYS = pytest.mark.parametrize("how", HOW)
ANY_SIZE = pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-20, 1e-15, 1.0, 1e15, 1e30, 1e37])
#: Sizes of two vectors whose quotient is a float32 as well.
TWO_SIZES = pytest.mark.parametrize(
    ("size_x", "size_y"), [(1e-30, 1e-30), (1.0, 1e-30), (1.0, 1.0), (1e30, 1.0), (1e30, 1e30)]
)


@pytest.fixture(autouse=True)
def _as_written(request):
    """Unless a test says otherwise."""
    how = request.node.callspec.params.get("how") if hasattr(request.node, "callspec") else None
    with models.running(how or "as_written"):
        yield


def run(how, fn, *arguments):
    """The result in NumPy; a function of lists of tensors may be compiled."""
    result = (fn if how == "as_written" else engine.compiled(fn))(*arguments)
    if isinstance(result, list):
        return [ops.convert_to_numpy(t) for t in result]
    return float(ops.convert_to_numpy(result))


def tensors(*arrays, dtype="float32"):
    return [None if a is None else ops.cast(ops.convert_to_tensor(a), dtype) for a in arrays]


def arrays(x):
    return [None if t is None else ops.convert_to_numpy(t) for t in x]


def assert_equal(actual, expected):
    for a, e in zip(arrays(actual), expected, strict=True):
        if e is None:
            assert a is None
        else:
            np.testing.assert_array_equal(a, e)


# None adds nothing and counts nowhere


def test_where_one_has_no_entry_the_sum_is_the_other():
    x, y = tensors([1.0, 2.0], None, [3.0], None), tensors([10.0, 20.0], [5.0], None, None)
    assert_equal(vectors.add(x, y), [[11.0, 22.0], [5.0], [3.0], None])
    scaled = [[-19.0, -38.0], [-10.0], [3.0], None]
    assert_equal(vectors.add_scaled(x, -2.0, y), scaled)
    assert_equal(vectors.add_scaled(x, ops.convert_to_tensor(-2.0), y), scaled)


def test_multiples_of_nothing_are_nothing():
    x = tensors([1.0, 2.0], None)
    for factor in (3.0, ops.convert_to_tensor(3.0)):
        assert_equal(vectors.scale(factor, x), [[3.0, 6.0], None])
    assert vectors.scale(3.0, [None, None]) == [None, None]
    assert vectors.scale(3.0, []) == []
    assert_equal(vectors.map_present(lambda t: t + 1, x), [[2.0, 3.0], None])
    assert vectors.like_present([7], [None, 0, None]) == [None, 7, None]


def test_weights_without_a_direction_stay_as_they_are():
    w, factor = tensors([1.0, 2.0], [3.0]), ops.convert_to_tensor(2.0)
    moved = vectors.add_scaled(w, factor, tensors([10.0, 20.0], None))
    assert_equal(moved, [[21.0, 42.0], [3.0]])
    assert moved[1] is w[1]


def test_products_and_lengths_count_what_both_have():
    x, y = tensors([1.0, 2.0], None, [3.0]), tensors([4.0, 5.0], [6.0], None)
    assert float(vectors.dot(x, y)) == 14.0
    assert float(vectors.norm(tensors([3.0], None, [4.0]))) == 5.0
    assert float(vectors.max_abs(tensors([3.0], None, [-4.0]))) == 4.0
    assert_equal(
        vectors.reject(tensors([1.0, 2.0], None), tensors([1.0, 0.0], None)), [[0, 2], None]
    )
    assert float(vectors.cosine(tensors([2.0], None), tensors([-3.0], [4.0]))) == pytest.approx(
        -0.6
    )


@pytest.mark.parametrize("nothing", [[], [None], [None, None]], ids=str)
def test_a_vector_without_entries_is_zero(nothing):
    assert float(vectors.dot(nothing, nothing)) == 0
    assert float(vectors.norm(nothing)) == 0
    assert float(vectors.max_abs(nothing)) == 0
    assert float(vectors.cosine(nothing, nothing)) == 0
    assert vectors.add(nothing, nothing) == nothing
    assert vectors.reject(nothing, nothing) == nothing


@pytest.mark.parametrize("floatx", ["float16", "bfloat16"])
def test_sums_over_nothing_are_in_float32_as_well(floatx):
    before = keras.config.floatx()
    keras.config.set_floatx(floatx)
    try:
        found = [vectors.dot([None], [None]), vectors.norm([None]), vectors.Vector([]).norm]
    finally:
        keras.config.set_floatx(before)
    assert [keras.backend.standardize_dtype(t.dtype) for t in found] == ["float32"] * 3
    assert [float(t) for t in found] == [0.0] * 3


def test_a_tensor_without_entries_counts_nowhere():
    x = tensors(np.zeros((0, 3)), [3.0, 4.0])
    assert float(vectors.norm(x)) == 5.0
    assert float(vectors.max_abs(x)) == 4.0


def test_vectors_of_different_lengths_are_an_error():
    for function in (vectors.add, vectors.dot):
        with pytest.raises(ValueError, match="zip"):
            function(tensors([1.0]), tensors([1.0], [2.0]))


# Dtypes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(2,), ()], ids=["vector", "scalar"])
def test_every_entry_keeps_its_dtype(dtype, shape):
    x = [ops.ones(shape, dtype), ops.ones((3,), "float32")]
    y = [ops.ones_like(t) for t in x]
    wanted = [t.dtype for t in x]
    assert [t.dtype for t in vectors.scale(ops.convert_to_tensor(0.5), x)] == wanted
    assert [t.dtype for t in vectors.scale(0.5, x)] == wanted
    assert [t.dtype for t in vectors.add(x, y)] == wanted
    assert [t.dtype for t in vectors.reject(x, onto=y)] == wanted
    for factor in (0.5, ops.convert_to_tensor(0.5)):
        assert [t.dtype for t in vectors.add_scaled(x, factor, y)] == wanted


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_sum_of_two_dtypes_has_that_of_the_first(dtype):
    x = [ops.ones((2,), dtype), ops.ones((2,), "float32")]
    assert [t.dtype for t in vectors.add(x, x[::-1])] == [t.dtype for t in x]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_over_half_precision_are_taken_in_float32(dtype):
    x = [ops.ones((70_000,), dtype)]  # float16 ends at 65504; bfloat16 counts to 256.
    assert float(vectors.dot(x, x)) == 70_000
    np.testing.assert_allclose(float(vectors.norm(x)), np.sqrt(70_000), rtol=1e-6)


def test_float64_stays_float64(float64):
    x, y = float64.tensors([[1 / 3, 2 / 3], 0.1]), float64.tensors([[1 / 7, -0.3], 0.7])
    flat_x, flat_y = np.array([1 / 3, 2 / 3, 0.1]), np.array([1 / 7, -0.3, 0.7])
    product, length = flat_x @ flat_y, np.linalg.norm(flat_y)
    scalars = [vectors.dot(x, y), vectors.norm(y), vectors.cosine(x, y), vectors.max_abs(y)]
    cosine = product / length / np.linalg.norm(flat_x)
    float64.assert_close(scalars, [product, length, cosine, 0.7])
    rejected = flat_x - product / length**2 * flat_y
    float64.assert_close(vectors.reject(x, y), [rejected[:2], rejected[2]])


# The norm


@BOTH_WAYS
@ANY_SIZE
def test_norm_does_not_overflow_or_underflow(size, how):
    x = tensors([3 * size, 0.0], [-4 * size])
    np.testing.assert_allclose(run(how, vectors.norm, x), 5 * size, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-7, 1e-4, 1.0, 1e4])
def test_norm_of_float16_does_not_overflow_or_underflow(size):
    x = tensors([3 * size, 0.0], [-4 * size], dtype="float16")
    exact = np.linalg.norm(np.concatenate([a.astype("float64") for a in arrays(x)]))
    np.testing.assert_allclose(float(vectors.norm(x)), exact, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e-20, 1e20, 1e160, 1e300])
def test_norm_of_float64_does_not_overflow_or_underflow(size, float64):
    x = float64.tensors([[3 * size, 0.0], -4 * size])
    float64.assert_close([vectors.norm(x) / size], [5.0])


@BOTH_WAYS
def test_norm_of_zero_is_zero(how):
    assert run(how, vectors.norm, tensors([0.0, 0.0], [0.0])) == 0


@BOTH_WAYS
def test_norm_of_a_zero_that_the_compiler_knows_is_zero(how):
    """The gradient by a weight that the loss does not depend on, on JAX."""
    known = [ops.zeros((2,)), ops.zeros((3, 1))]
    assert run(how, lambda x: vectors.norm([*known, *x]), tensors([0.0])) == 0
    assert run(how, lambda: vectors.norm(known)) == 0


@BOTH_WAYS
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_norm_of_what_is_not_finite_is_not_finite(poison, how):
    """On this the check of every gradient rests."""
    for others in (0.0, 1.0, 1e30):
        assert not np.isfinite(run(how, vectors.norm, tensors([others, poison], [others])))


@BOTH_WAYS
def test_norm_of_a_large_vector_is_right(how):
    """Where a sum in one go could lose a digit or two."""
    x = np.random.default_rng(0).normal(size=100_000).astype("float32")
    expected = np.linalg.norm(x.astype("float64"))
    np.testing.assert_allclose(run(how, vectors.norm, tensors(x)), expected, rtol=1e-5)


def test_a_vector_knows_its_norm():
    x = tensors([3.0], None, [4.0])
    known = vectors.Vector(x)
    assert float(known.norm) == 5.0
    assert vectors.norm(known) is known.norm
    assert list(known) == x


def gradient_of_norm(entries):
    (value, _), gradient = value_and_gradient(lambda x: (vectors.norm(x), None), tensors(entries))
    return float(value), arrays(gradient)[0]


def test_gradient_through_the_norm_of_zero_is_zero():
    value, gradient = gradient_of_norm([0.0, 0.0])
    assert value == 0
    np.testing.assert_array_equal(gradient, [0.0, 0.0])


@ANY_SIZE
def test_gradient_through_the_norm_is_the_unit_vector(size):
    _, gradient = gradient_of_norm([3 * size, -4 * size])
    np.testing.assert_allclose(gradient, [0.6, -0.8], rtol=1e-5)


def test_gradient_through_the_unit_vector_of_zero_is_finite():
    """What the second order needs: `x / ‖x‖` in the way of the methods."""

    def value(x):
        length = vectors.norm(x)
        unit = vectors.scale(vectors.quotient(ops.ones_like(length), length), x)
        return ops.sum(unit[0]), None

    (result, _), gradient = value_and_gradient(value, tensors([0.0, 0.0]))
    assert float(result) == 0
    assert np.all(np.isfinite(arrays(gradient)[0]))


# Quotients


def test_a_quotient_by_zero_is_zero():
    zero, two = ops.convert_to_tensor(0.0), ops.convert_to_tensor(2.0)
    assert float(vectors.quotient(two, zero)) == 0
    assert float(vectors.quotient(zero, zero)) == 0
    assert float(vectors.quotient(two, two)) == 1


def test_the_derivative_of_a_quotient_by_zero_is_finite():
    def value(x):
        return vectors.quotient(ops.sum(x[0]), ops.sum(x[1])), None

    _, gradient = value_and_gradient(value, tensors([2.0], [0.0]))
    for part in arrays(gradient):
        assert np.all(np.isfinite(part))


# Rejection


@BOTH_WAYS
@ANY_SIZE
def test_the_rejection_of_a_vector_from_itself_is_nothing(size, how):
    """Exactly so where no compiler rearranges: GSAM at rho = 0 is then plain training."""
    entries = np.random.default_rng(0).normal(size=9).astype("float32") * np.float32(size)
    x = tensors(entries[:4], entries[4:])
    rest = np.concatenate(run(how, lambda x: vectors.reject(x, onto=x), x))
    np.testing.assert_allclose(rest, np.zeros(9), atol=0 if how == "as_written" else 1e-6 * size)


@BOTH_WAYS
@TWO_SIZES
def test_the_rejection_is_perpendicular_and_the_rest_is_parallel(size_x, size_y, how):
    x, onto = np.array([1.0, 2.0, -1.0]), np.array([2.0, 1.0, 0.5])
    expected = x - (x @ onto) / (onto @ onto) * onto
    rejected = run(how, vectors.reject, tensors(x * size_x), tensors(onto * size_y))[0]
    np.testing.assert_allclose(rejected / size_x, expected, rtol=1e-5)


@BOTH_WAYS
def test_the_rejection_from_zero_is_the_vector_itself(how):
    x, zero = tensors([1.0, 2.0], [3.0]), tensors([0.0, 0.0], [0.0])
    for a, e in zip(run(how, vectors.reject, x, zero), arrays(x), strict=True):
        np.testing.assert_array_equal(a, e)
    assert all(np.all(a == 0) for a in run(how, vectors.reject, zero, x))
    assert all(np.all(a == 0) for a in run(how, vectors.reject, zero, zero))


# The cosine


@BOTH_WAYS
@TWO_SIZES
@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 2.0, 2.0], [-1.0, -2.0, -2.0], -1.0),
        ([1.0, 2.0, 2.0], [2.0, -1.0, 0.0], 0.0),
        ([3.0, 0.0, 4.0], [4.0, 0.0, 3.0], 0.96),
    ],
    ids=["opposite", "perpendicular", "oblique"],
)
def test_the_cosine_does_not_depend_on_lengths(x, y, expected, size_x, size_y, how):
    x, y = np.array(x) * size_x, np.array(y) * size_y
    cosine = run(how, vectors.cosine, tensors(x[:1], x[1:]), tensors(y[:1], y[1:]))
    assert cosine == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_cosine_with_zero_is_zero():
    x, zero = tensors([1.0, 2.0]), tensors([0.0, 0.0])
    assert float(vectors.cosine(x, zero)) == 0
    assert float(vectors.cosine(zero, x)) == 0
    assert float(vectors.cosine(zero, zero)) == 0


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a detour of the TensorFlow engine")
@pytest.mark.parametrize("length", [0, 1, 7, 8, 23])
def test_a_sum_in_parts_forgets_no_entry(length):
    from keras_sharp.engine import _tensorflow

    entries = ops.convert_to_tensor(2.0 ** np.arange(length), dtype="float32")
    assert float(_tensorflow._sum_in_parts(entries)) == 2.0**length - 1


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a detour of the TensorFlow engine")
@pytest.mark.parametrize("length", [100, 5003])
def test_with_xla_long_sums_are_taken_in_parts_and_all_are_right(length, monkeypatch):
    from keras_sharp.engine import _tensorflow

    lengths, sum_in_parts = [], _tensorflow._sum_in_parts
    monkeypatch.setattr(
        _tensorflow, "_sum_in_parts", lambda x: lengths.append(len(x)) or sum_in_parts(x)
    )
    x, y = np.random.default_rng(0).normal(size=(2, length)).astype("float32")
    token = _tensorflow._xla.set("step")
    try:
        found = _tensorflow.dot([ops.convert_to_tensor(x)], [ops.convert_to_tensor(y)])
    finally:
        _tensorflow._xla.reset(token)
    assert float(found) == pytest.approx(float(x.astype("float64") @ y), rel=1e-4)
    assert lengths == ([length] if length >= 4096 else [])

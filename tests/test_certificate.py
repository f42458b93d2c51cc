"""Operators check their products themselves: right ones pass, wrong ones are refused."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sharp
from keras_sharp import curvature
from keras_sharp.callbacks import HessianProbe
from keras_sharp.curvature.certificate import certify, few_examples
from tests import models
from tests.models import BACKEND

OPERATORS = [curvature.HessianOperator, curvature.GaussNewtonOperator]
both = pytest.mark.parametrize("operator", OPERATORS)


@pytest.fixture(autouse=True)
def _as_written(as_written):
    """Nothing is compiled, but where a test says so."""


def tanh(second):
    """The function tanh, with a right derivative, and `second(g, h)` in place of `-2 g h h'`.

    `g` is the incoming gradient, `h` the value and `h' = 1 - h**2`.
    """
    if BACKEND == "torch":
        import torch

        class Derivative(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return 1 - torch.tanh(x) ** 2

            @staticmethod
            def backward(ctx, g):
                return second(g, torch.tanh(*ctx.saved_tensors))

        class Tanh(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return torch.tanh(x)

            @staticmethod
            def backward(ctx, g):
                return g * Derivative.apply(*ctx.saved_tensors)

        return Tanh.apply
    if BACKEND == "jax":
        import jax

        @jax.custom_jvp
        def derivative(x):
            return 1 - jax.numpy.tanh(x) ** 2

        @derivative.defjvp
        def _(x, g):
            return derivative(*x), second(*g, jax.numpy.tanh(*x))

        @jax.custom_jvp
        def function(x):
            return jax.numpy.tanh(x)

        @function.defjvp
        def _(x, g):
            return function(*x), g[0] * derivative(*x)

        return function
    import tensorflow as tf

    @tf.custom_gradient
    def derivative(x):
        h = tf.tanh(x)
        return 1 - h**2, lambda g: second(g, h)

    @tf.custom_gradient
    def function(x):
        return tf.tanh(x), lambda g: g * derivative(x)

    return function


def right(g, h):
    return -2 * g * h * (1 - h**2)


#: Second derivatives that are wrong; with all but the last one, the matrix stays symmetric.
MISTAKES = {
    "none at all": lambda g, h: 0.0 * right(g, h),
    "sign": lambda g, h: -right(g, h),
    "30 %": lambda g, h: 0.7 * right(g, h),
    "crooked": lambda g, h: right(ops.roll(g, 1, axis=-1), h),
}


def model_with(function, activation="gelu"):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation, name="first"),
            layers.Dense(5, name="second", bias_initializer="ones"),
            layers.Lambda(function, (5,), name="mine"),
            layers.Dense(2, name="last"),
        ]
    )
    model.compile("sgd", "mse")
    return model


def data(n=16):
    return models.regression(n, features=4, outputs=2)


# Wrong products


@pytest.mark.parametrize(
    ("mistake", "batch_size"),
    [("none at all", 16), ("sign", 16), ("30 %", 16), ("crooked", 16), ("sign", 6)],
)
def test_a_wrong_second_derivative_is_refused_with_the_layers_that_are_suspect(mistake, batch_size):
    function = tanh(MISTAKES[mistake])
    with pytest.raises(ValueError, match=r"is wrong.*first of all:.*'mine' \(Lambda\)") as error:
        curvature.HessianOperator(model_with(function), *data(), batch_size=batch_size)
    assert "second' by" in str(error.value)
    assert "last' by" not in str(error.value)  # Its rows are right.


def test_the_same_function_with_a_right_one_passes():
    operator = curvature.HessianOperator(model_with(tanh(right)), *data())
    assert operator.certificate.verified


def test_compiled_products_are_checked_as_well():
    with models.running("compiled"), pytest.raises(ValueError, match="'mine'"):
        curvature.HessianOperator(model_with(tanh(MISTAKES["sign"])), *data())


def test_where_kinks_hide_a_mistake_symmetry_shows_it():
    """Inputs of zero put all ReLUs on their kinks: differences on either side have no limit."""
    x, y = data()
    model = model_with(tanh(MISTAKES["crooked"]), activation="relu")
    with pytest.raises(ValueError, match=r"`u' H v` and `v' H u` differ by 0\.\d+ of their size"):
        curvature.HessianOperator(model, 0 * x, y)
    model = model_with(tanh(right), activation="relu")
    certificate = curvature.HessianOperator(model, 0 * x, y).certificate
    assert not certificate.verified
    assert certificate.noise > 1.5
    assert certificate.asymmetry < 1e-4


def test_a_wrong_second_derivative_of_the_loss_is_refused():
    """By both: of the rest, the Gauss-Newton matrix has first derivatives only."""
    wrong = tanh(MISTAKES["sign"])
    model = model_with(ops.tanh)
    model.compile("sgd", lambda y, y_pred: ops.mean(wrong(y_pred - y) * y_pred, axis=-1))
    for operator in OPERATORS:
        with pytest.raises(ValueError, match=r"'last' \(Dense\), the loss"):
            operator(model, *data())
    inside = model_with(wrong)
    assert curvature.GaussNewtonOperator(inside, *data()).certificate.verified


def test_each_refresh_checks_since_weights_may_hide_a_mistake():
    model = model_with(tanh(MISTAKES["sign"]))
    last = model.layers[-1].kernel
    start = ops.convert_to_numpy(last)
    last.assign(0 * start)  # Nothing before this layer has a gradient.
    operator = curvature.HessianOperator(model, *data())
    last.assign(start)
    with pytest.raises(ValueError, match="'mine'"):
        operator.refresh()


def test_estimates_and_the_probe_refuse_and_certify_false_turns_that_off():
    model = model_with(tanh(MISTAKES["none at all"]))
    for estimate, few in (
        (curvature.eigenvalues, {"k": 1}),
        (curvature.trace, {"num_products": 2}),
    ):
        with pytest.raises(ValueError, match="'mine'"):
            estimate(model, *data(), **few)
        found = estimate(model, *data(), certify=False, **few)
        assert found.certificate is None
    with pytest.raises(ValueError, match="'mine'"):
        model.fit(*data(), verbose=0, callbacks=[HessianProbe(*data(), k=1)])
    probe = HessianProbe(*data(), k=1, certify=False)
    model.fit(*data(), verbose=0, callbacks=[probe])
    assert probe.history["certificate"] == [None]
    with pytest.raises(ValueError, match=r"`certify` must be True or False\. Received: certify=1"):
        curvature.trace(model, *data(), certify=1)


# Right products


def smooth():
    return model_with(ops.tanh)


def kinks():
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(8, "relu"),
            layers.Dense(2),
        ]
    )
    model.compile("sgd", "mae")
    return model


@both
def test_kinks_are_no_mistake(operator):
    """ReLU, max pooling and absolute values: on many examples some are crossed with any step."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 6, 6, 1)), rng.normal(size=(200, 2)) + 10
    model = kinks()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="A product")
        certificate = operator(model, x, y).certificate
    assert certificate.asymmetry < 1e-4


@both
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_no_dtype_raises_a_false_alarm(operator, policy):
    keras.config.set_dtype_policy(policy)
    model = model_with(ops.tanh)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="A product")
        certificate = operator(model, *data()).certificate
    # From Keras 3.12 on, float64 is computed in float32 here and there, but for TensorFlow; on
    # JAX always.
    double = BACKEND == "tensorflow" or (BACKEND == "torch" and models.KERAS < (3, 12))
    float64 = 4.8e-7 if double else 1.1e-2
    expected = {"float64": float64, "mixed_bfloat16": 0.1}[policy]
    assert certificate.tolerance == pytest.approx(expected, rel=0.1)


@both
def test_what_is_certified(operator):
    """All that an operator takes: a wrapped model, a block, several batches, no gradient at all."""
    inputs = keras.Input((4,))
    used, unused = (layers.Dense(2, "tanh")(layers.Dense(3)(inputs)) for _ in range(2))
    model = keras_sharp.SharpnessAwareModel(keras.Model(inputs, [used, unused]))
    model.compile("sgd", ["mse", None])
    x, y = data()
    block = model.model.layers[1].trainable_variables
    for options in ({}, {"batch_size": 5}, {"variables": block}):
        found = operator(model, x, [y, y], **options)
        assert found.certificate.verified
        assert found.products == 0


def test_the_certificate_is_an_attribute_of_all_results():
    """And no part of the tuples: programs that unpack them go on."""
    operator = curvature.HessianOperator(model_with(ops.tanh), *data())
    assert len(curvature.eigenvalues(operator, k=2)) == 5
    assert len(curvature.trace(operator, num_products=2)) == 3
    assert len(curvature.spectral_density(operator, steps=2)) == 3
    for found in (
        curvature.eigenvalues(operator, k=2),
        curvature.trace(operator, num_products=2),
        curvature.hutch_plus_plus(operator, num_products=6),
        curvature.frobenius_norm(operator, num_products=2),
        curvature.spectral_density(operator, steps=2),
    ):
        assert found.certificate is operator.certificate
    assert operator.certificate.verified


def test_the_probe_keeps_a_certificate_of_each_look():
    probe = HessianProbe(*data(), k=1)
    model_with(ops.tanh).fit(*data(), epochs=2, verbose=0, callbacks=[probe])
    assert [c.verified for c in probe.history["certificate"]] == [True, True]


@both
@pytest.mark.parametrize("build", [smooth, kinks])
def test_it_takes_two_gradients_and_three_in_doubt(operator, build):
    model = build()
    x, y = np.zeros((8, *model.input_shape[1:])), np.ones((8, 2))  # On the kinks.
    found = operator(model, x, y)
    calls, gradient = [], found._gradient

    def counted(*args):
        calls.append(1)
        return gradient(*args)

    found._gradient = counted
    found._response = lambda *args: pytest.fail("what is explained needs no more gradients")
    found.refresh()
    hessian_with_kinks = build is kinks and operator is curvature.HessianOperator
    assert len(calls) == (3 if hessian_with_kinks else 2)


# The evidence


def evidence(product, noise=0.0, move=1.0, pulled=0.0):
    """`certify` of a product with a matrix of 7 rows, by gradients in float32 with some noise."""
    model = models.mlp(features=1, units=2)
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(7, 7))
    matrix += matrix.T

    def gradient(v):
        return 0.01 + move * (matrix @ v) + noise * rng.normal(size=7)

    return certify(
        lambda v: product(matrix, v),
        gradient,
        lambda: np.full(7, pulled),
        np.ones(7),
        model.trainable_variables,
        model,
        4.0,
    )


def test_strong_evidence_refuses_weak_evidence_warns_and_noise_is_none():
    def wrong(matrix, v):
        return 1.1 * matrix @ v

    with pytest.raises(ValueError, match="is wrong"):
        evidence(wrong)
    h = 4 * 2.0**-11.5
    with pytest.warns(UserWarning, match="The evidence is weak: the difference is [3-5] times"):
        evidence(wrong, noise=0.03 * h)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="A product")
        for noise in (0.3, 1.0, 3.0):
            assert not evidence(wrong, noise=noise * h).verified
            assert not evidence(np.matmul, noise=noise * h).verified
    assert evidence(np.matmul).verified


def test_a_gradient_that_does_not_move_by_its_last_digit_is_no_evidence():
    assert not evidence(lambda matrix, v: 1e-8 * matrix @ v, move=0.0).verified


def test_nothing_is_verified_where_all_is_zero():
    assert not evidence(lambda matrix, v: np.full(7, np.nan)).verified
    model = models.linear()
    model.compile("sgd", lambda y, y_pred: ops.mean(y_pred, axis=-1))
    x, y = models.regression()
    assert not curvature.HessianOperator(model, x, y).certificate.verified


def test_a_few_examples_take_turns_in_a_batch_of_the_same_shape():
    batch = ({"a": np.arange(5), "b": np.arange(10).reshape(5, 2)}, np.arange(5.0), None)
    x, y, sample_weight = few_examples(batch)
    np.testing.assert_array_equal(x["a"], [0, 4, 0, 4, 0])
    np.testing.assert_array_equal(x["b"], [[0, 1], [8, 9], [0, 1], [8, 9], [0, 1]])
    np.testing.assert_array_equal(y, x["a"])
    assert sample_weight is None
    odd = (np.arange(5), np.arange(4), None)
    assert few_examples(odd) is odd


def test_what_is_known_by_heart_is_no_evidence():
    """There a gradient is the difference of two numbers of about 1, and moves by their last digit.

    The right product is much smaller than that digit over h, as with a ReLU network that knew
    500 images by heart.
    """
    with pytest.raises(ValueError, match="is wrong"):
        evidence(np.matmul, move=0.0)
    assert not evidence(np.matmul, move=0.0, pulled=1e6).verified
    with pytest.raises(ValueError, match="is wrong"):
        evidence(lambda matrix, v: 1.1 * matrix @ v, pulled=0.01)

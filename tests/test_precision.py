"""Training in less than float32, or in more: scaled losses, float16, bfloat16, float64."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

from keras_sharp import SharpnessAwareModel, methods
from tests import models
from tests.models import BACKEND, assert_close, assert_same, twins, values


@pytest.fixture(autouse=True, params=models.MODES)
def mode(request):
    """Whether functions are compiled in a test."""
    with models.running(request.param):
        yield request.param


@pytest.fixture
def dtype_policy(request):
    """The global dtype policy, for one test."""
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


def policy(name):
    return pytest.mark.parametrize("dtype_policy", [name], indirect=True)


METHODS = {
    "sam": lambda: methods.SAM(),
    "gsam": lambda: methods.GSAM(),
    "bsam": lambda: methods.BSAM(),
    "unnormalized": lambda: methods.SAM(rho=0.1, neighborhood="unnormalized"),
    "adaptive": lambda: methods.GSAM(neighborhood="adaptive"),
}


def wrap(model, optimizer, method="sam", **kwargs):
    wrapper = SharpnessAwareModel(model, METHODS[method](), **kwargs)
    wrapper.compile(optimizer, "mse")
    return wrapper


def sgd(**kwargs):
    return keras.optimizers.SGD(0.1, **kwargs)


def scaled(initial_scale, **kwargs):
    return keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=initial_scale, **kwargs)


# Scaled losses


@pytest.mark.parametrize("method", METHODS)
def test_a_dynamic_loss_scale_changes_nothing_in_float32(method):
    """Norms, inner products, and steps along the bare gradient are taken after unscaling."""
    one, other = twins(models.mlp)
    plain, wrapper = wrap(one, sgd(), method), wrap(other, scaled(2**14), method)
    for seed in range(2):
        batch = models.regression(seed=seed)
        plain.train_on_batch(*batch)
        wrapper.train_on_batch(*batch)
    # A power of two scales without rounding.
    assert_close(other.variables, one.variables, rtol=1e-6, atol=1e-7)
    assert_same([wrapper.optimizer.dynamic_scale], [2.0**14], bits=True)


@pytest.mark.parametrize("method", ["gsam", "unnormalized"])
def test_a_fixed_loss_scale_changes_nothing_in_float32(method):
    one, other = twins(models.mlp)
    plain = wrap(one, sgd(), method)
    wrapper = wrap(other, sgd(loss_scale_factor=2**10), method)
    for seed in range(2):
        batch = models.regression(seed=seed)
        plain.train_on_batch(*batch)
        wrapper.train_on_batch(*batch)
    assert_close(other.variables, one.variables, rtol=1e-6, atol=1e-7)


def test_the_loss_in_the_logs_is_not_scaled():
    one, other = twins(models.mlp)
    plain, wrapper = wrap(one, sgd()), wrap(other, scaled(2**14))
    batch = models.regression()
    expected = plain.train_on_batch(*batch, return_dict=True)
    logs = wrapper.train_on_batch(*batch, return_dict=True)
    assert_close([logs["loss"], logs["rho"]], [expected["loss"], expected["rho"]])


def test_extra_logs_are_not_scaled():
    names = ["perturbed_loss", "sharpness", "grad_norm", "grad_cosine"]
    one, other = twins(models.mlp)
    plain = wrap(one, sgd(), extra_logs=names)
    wrapper = wrap(other, scaled(2**14), extra_logs=names)
    batch = models.regression()
    expected = plain.train_on_batch(*batch, return_dict=True)
    logs = wrapper.train_on_batch(*batch, return_dict=True)
    assert_close([logs[n] for n in names], [expected[n] for n in names], rtol=1e-4, atol=1e-6)


def test_the_scale_grows_after_enough_finite_steps():
    wrapper = wrap(models.mlp(), scaled(2.0**4, dynamic_growth_steps=2))
    for _ in range(4):
        wrapper.train_on_batch(*models.regression())
    assert float(wrapper.optimizer.dynamic_scale) == 2.0**6


# float16 and bfloat16


@policy("mixed_float16")
def test_mixed_float16_scales_the_loss_by_itself(dtype_policy):
    wrapper = wrap(models.mlp(), "sgd")
    assert isinstance(wrapper.optimizer, keras.optimizers.LossScaleOptimizer)
    assert wrapper.model.optimizer is wrapper.optimizer


@pytest.mark.parametrize("method", ["sam", "gsam", "bsam"])
@policy("mixed_float16")
def test_mixed_float16_is_close_to_float32(dtype_policy, method):
    half = models.batchnorm_net()
    keras.config.set_dtype_policy("float32")
    full = models.batchnorm_net()
    models.assign(full.variables, values(half.variables))
    # At the scale that Keras starts with, this gradient overflows on JAX.
    wrapper, reference = wrap(half, scaled(2.0**8), method), wrap(full, sgd(), method)
    before = values(full.trainable_variables)
    for seed in range(2):
        batch = models.regression(seed=seed)
        wrapper.train_on_batch(*batch)
        reference.train_on_batch(*batch)
    assert int(wrapper.skipped_steps) == 0
    for v, got, expected, start in zip(
        full.trainable_variables,
        values(half.trainable_variables),
        values(full.trainable_variables),
        before,
        strict=True,
    ):
        if v.path.endswith("first/bias"):
            continue  # Before a BatchNormalization the gradient of a bias is rounding only.
        step = np.linalg.norm(expected - start)
        np.testing.assert_allclose(got, expected, atol=0.03 * step + 1e-4)
    assert_close(half.non_trainable_variables, full.non_trainable_variables, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("method", ["sam", "gsam"])
@policy("mixed_float16")
def test_a_step_that_overflows_lowers_the_scale_and_is_skipped(dtype_policy, method):
    inner = models.batchnorm_net()
    wrapper = wrap(inner, scaled(2.0**30), method)
    x, y = models.regression()
    wrapper.predict(x, verbose=0)
    before = values(inner.variables)
    with warnings.catch_warnings():
        # Looking for the right scale is no cause for alarm.
        warnings.filterwarnings("error", message=".*skipped")
        wrapper.fit(x, y, epochs=3, verbose=0)
    assert float(wrapper.optimizer.dynamic_scale) == 2.0**27
    assert int(wrapper.skipped_steps) == 3
    assert int(wrapper.optimizer.iterations) == 0
    assert_same(inner.variables, before, bits=True)


@policy("mixed_float16")
def test_training_goes_on_once_the_scale_is_low_enough(dtype_policy):
    inner = models.batchnorm_net()
    wrapper = wrap(inner, scaled(2.0**30))
    x, y = models.regression()
    while int(wrapper.optimizer.iterations) == 0 and int(wrapper.skipped_steps) < 30:
        wrapper.train_on_batch(x, y)
    assert 0 < int(wrapper.skipped_steps) < 30
    assert all(np.all(np.isfinite(v)) for v in values(inner.variables))


@policy("mixed_float16")
def test_a_nan_in_the_data_is_skipped_with_a_scaled_loss(dtype_policy):
    inner = models.batchnorm_net()
    wrapper = wrap(inner, scaled(2.0**4))
    x, y = models.regression()
    before = values(inner.variables)
    wrapper.train_on_batch(np.full_like(x, np.nan), y)
    assert int(wrapper.skipped_steps) == 1
    assert_same(inner.variables, before, bits=True)
    wrapper.train_on_batch(x, y)
    assert int(wrapper.optimizer.iterations) == 1


@pytest.mark.parametrize("method", ["sam", "gsam"])
@policy("mixed_bfloat16")
def test_mixed_bfloat16_is_close_to_float32_and_does_not_warn(dtype_policy, method):
    half = models.mlp()
    keras.config.set_dtype_policy("float32")
    full = models.mlp()
    models.assign(full.variables, values(half.variables))
    wrapper, reference = wrap(half, sgd(), method), wrap(full, sgd(), method)
    before = models.flat(values(full.trainable_variables))
    batch = models.regression()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*bfloat16 weights")
        wrapper.train_on_batch(*batch)
    reference.train_on_batch(*batch)
    got = models.flat(values(half.trainable_variables)) - before
    expected = models.flat(values(full.trainable_variables)) - before
    assert np.linalg.norm(got - expected) < 0.1 * np.linalg.norm(expected)


@policy("bfloat16")
def test_bfloat16_weights_warn(dtype_policy):
    wrapper = wrap(models.mlp(), "sgd")
    with pytest.warns(UserWarning, match="bfloat16 weights.*'mixed_bfloat16'"):
        wrapper.train_on_batch(*models.regression())


def cast(variables):
    return [v.astype("float32") for v in values(variables)]


@pytest.mark.parametrize("method", ["sam", "gsam", "unnormalized"])
def test_norms_of_float16_gradients_do_not_overflow(method):
    """The gradient is 400, its square more than float16 can hold."""
    keras.config.set_dtype_policy("float16")
    inner = keras.Sequential(
        [keras.Input((1,)), layers.Dense(1, use_bias=False, kernel_initializer="ones")]
    )
    keras.config.set_dtype_policy("float32")
    wrapper = SharpnessAwareModel(inner, METHODS[method](), extra_logs="grad_norm")
    wrapper.compile(keras.optimizers.SGD(2**-10), "mse")
    x = np.full((4, 1), 10.0, "float16")
    logs = wrapper.train_on_batch(x, np.full((4, 1), -10.0, "float16"), return_dict=True)
    np.testing.assert_allclose(logs["grad_norm"], 400, rtol=1e-2)  # 2 * 10 * (10 w + 10)
    w = 1 + {"sam": 0.05, "gsam": 0.05, "unnormalized": 0.1 * 400}[method]
    # In one dimension g_perp is 0.
    expected = 1 - 2**-10 * 20 * (10 * w + 10)
    np.testing.assert_allclose(cast(inner.variables)[0], [[expected]], rtol=5e-3)


# float64


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="Keras promotes float64 to float32 on JAX and PyTorch"
)
@pytest.mark.parametrize("method", ["sam", "asam", "gsam", "bsam"])
def test_float64_models_train_in_float64(method):
    keras.config.set_floatx("float64")
    try:
        inner = models.linear(dtype="float64")
        wrapper = SharpnessAwareModel(inner, method)
        wrapper.compile(keras.optimizers.SGD(0.1), "mse")
        x, y = (a.astype("float64") for a in models.regression())
        w = models.flat(values(inner.variables))

        def gradient(w):
            return 2 / len(x) * x.T @ (x @ w - y[:, 0])

        g = gradient(w)
        rule, perturb, defaults = models.BY_HAND[method]
        direction = rule(
            lambda e: gradient(w + e),
            lambda rho: perturb(g, w, np.zeros(3, bool), rho),
            g,
            **defaults,
        )
        wrapper.train_on_batch(x, y)
        assert inner.variables[0].dtype == "float64"
        np.testing.assert_allclose(
            models.flat(values(inner.variables)), w - 0.1 * direction, rtol=1e-12
        )
    finally:
        keras.config.set_floatx("float32")

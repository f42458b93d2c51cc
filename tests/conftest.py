"""What every test starts from: known seeds, Keras as it comes, full precision; and float64."""

import contextlib
import gc

import keras
import numpy as np
import pytest
from keras import ops

from tests import models
from tests.models import BACKEND


def pytest_collection_modifyitems(items):
    """Tests stay on their backends."""
    for item in items:
        for mark in item.iter_markers("backends"):
            if BACKEND not in mark.args:
                item.add_marker(pytest.mark.skip(reason=f"on {' and '.join(mark.args)} only"))


@pytest.fixture(autouse=True, scope="session")
def _no_tensor_float_32():
    """On some GPUs float32 products keep 10 bits of the mantissa only, unless told not to."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)
    elif BACKEND == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
    else:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True, scope="module")
def _memory():
    """What a module has compiled is of no use to the next: a run would come to hold gigabytes."""
    yield
    if BACKEND == "jax":
        import jax

        jax.clear_caches()
    keras.utils.clear_session()  # It collects the garbage, too.
    # What is left, millions of objects in the end, need not be looked through by each collection.
    gc.freeze()


@pytest.fixture(autouse=True)
def _as_keras_comes():
    """Each test sees the same random numbers, and none sees the settings of another."""
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


class Float64:
    """Tensors of float64 from NumPy arrays, and back: see the fixture `float64`."""

    #: To what accuracy a few dozen operations agree with NumPy.
    tolerance = {"rtol": 1e-12, "atol": 1e-13}  # noqa: RUF012

    @staticmethod
    def tensor(value):
        # From a NumPy array: a Python float passes through float32 on TensorFlow.
        return ops.convert_to_tensor(np.asarray(value, "float64"), dtype="float64")

    def tensors(self, arrays):
        return [None if a is None else self.tensor(a) for a in arrays]

    @staticmethod
    def arrays(tensors):
        """NumPy arrays; a tensor that lost its float64 on the way is an error."""
        arrays = [None if t is None else np.array(ops.convert_to_numpy(t)) for t in tensors]
        assert all(a is None or a.dtype == np.float64 for a in arrays), [t.dtype for t in tensors]
        return arrays

    def assert_close(self, actual, expected, **tolerance):
        for a, e in zip(self.arrays(actual), expected, strict=True):
            np.testing.assert_allclose(a, e, **{**self.tolerance, **tolerance})


@pytest.fixture
def float64():
    """How all tests in float64 are done, on every backend.

    Methods, neighborhoods and objectives are pure functions of tensors, and
    most of keras.ops keep the dtype of tensors: float64 in, float64 out. Not
    so matmul, mean, minimum, clip and stack on PyTorch, nor mean and tanh on
    JAX (Keras 3.15): tests write `a @ b` and `ops.sum`. Training a model in
    float64 is another matter: Keras promotes to float32 on these two whatever
    `floatx` says, so the tests of models are in float32.
    JAX has no float64 unless told so; it is told for this one test. Neither
    does it compile here: each `ops.cond` of an eager function, nested a few
    times, would take seconds. The tests of models compile.
    """
    with contextlib.ExitStack() as stack:
        if BACKEND == "jax":
            import jax

            stack.enter_context(models.enable_x64())
            stack.enter_context(jax.disable_jit())
        yield Float64()


@pytest.fixture
def as_written():
    """Runs each operation as it is written, by itself: nothing is compiled in this test.

    What is equal on paper is then equal to the bit, on all backends. Compilers rearrange:
    XLA contracts a product and a sum in one of two programs and not in the other;
    TensorFlow's graph optimizer moves scalar factors, as in the gradient of a
    BatchNormalization's scale. It also spares the compilation of dozens of tiny models.
    """
    with models.running("as_written"):
        yield

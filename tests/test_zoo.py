"""Second derivatives through everything that Keras exports, against differences of first ones.

In inference mode a product with the Hessian is compared with central differences of the
gradient; in training mode, the gradient of `second_order=True` with those of the perturbed loss.
"""

import contextlib
import inspect

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sharp
from keras_sharp import engine, vectors
from keras_sharp.objective import Objective
from keras_sharp.surface import LossSurface
from keras_sharp.training.loss import TrainingLoss
from tests import models, zoo
from tests.models import BACKEND


@contextlib.contextmanager
def precision(dtype):
    """Within, Keras computes in float64 where it is told to.

    On JAX and PyTorch, Keras 3.15 makes float32 of each float64 that meets another dtype, whatever
    `floatx` says. It looks the smaller dtype up in a table.
    """
    with contextlib.ExitStack() as stack:
        keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)
        if dtype == "float64" and BACKEND != "tensorflow":
            from keras.src.backend.common.dtypes import BIT64_TO_BIT32_DTYPE as smaller

            stack.enter_context(pytest.MonkeyPatch.context()).setitem(smaller, dtype, dtype)
        if dtype == "float64" and BACKEND == "jax":
            import jax

            stack.enter_context(models.enable_x64())
            # Half of the time is spent on compiling, and half of that on optimizing.
            jax.config.update("jax_disable_most_optimizations", True)
            stack.callback(jax.config.update, "jax_disable_most_optimizations", False)
        yield


@pytest.fixture(autouse=True)
def _no_random_initial_weights(monkeypatch):
    """They are overwritten, and JAX compiles a program for each shape of them."""

    def zeros(shape, dtype=None):
        return ops.convert_to_tensor(np.zeros(shape, dtype))

    for name in ("VarianceScaling", "RandomUniform", "RandomNormal", "Orthogonal"):
        cls = getattr(keras.initializers, name)
        monkeypatch.setattr(cls, "__call__", lambda _, *args, **kwargs: zeros(*args, **kwargs))


def run(fn, *args):
    """`fn(*args)`; on JAX one compiled program is quicker than each operation by itself."""
    return engine.compiled(fn)(*args) if BACKEND == "jax" else fn(*args)


def prepared(model, loss, dtype, x, y):
    """The model with random weights, its wrapper and the data, all of one dtype."""
    rng = np.random.default_rng(1)
    for v in model.trainable_variables:
        v.assign(0.5 * rng.normal(size=v.shape) + 0.8 * (v.name in ("gamma", "scale")))
    wrapper = keras_sharp.SharpnessAwareModel(model)
    wrapper.compile("sgd", loss, run_eagerly=True)
    model.compile("sgd", loss, run_eagerly=True)
    x, y = (a.astype(dtype) if a.dtype.kind == "f" else a for a in (x, y))
    return wrapper, x, y


def unit(w, seed):
    rng = np.random.default_rng(seed)
    v = [rng.normal(size=t.shape) for t in w]
    norm = np.linalg.norm(models.flat(v))
    return [ops.convert_to_tensor(t / norm, dtype=u.dtype) for t, u in zip(v, w, strict=True)]


def tensors(variables):
    return [ops.convert_to_tensor(value) for value in models.values(variables)]


def flat(values):
    return models.flat([ops.convert_to_numpy(t) for t in values])


def error_of_product(wrapper, x, y, h):
    """Of a product with the Hessian, relative to its length."""
    surface = LossSurface(wrapper, x, y)
    (batch,) = surface.batches()
    w = tensors(surface.variables)
    state = surface.state
    engine.build_symbolically(wrapper.model, batch)

    def evaluate(w, v):
        def loss(u):
            return surface.batch_loss(u, state, batch)[0]

        def gradient(t):
            at = vectors.add(w, vectors.scale(t, v))
            _, g = engine.value_and_gradient(lambda u: (loss(u), None), at)
            return [ops.zeros_like(u) if t is None else t for t, u in zip(g, w, strict=True)]

        return list(engine.hessian(loss, w)(v)), gradient(h), gradient(-h)

    product, above, below = map(flat, run(evaluate, w, unit(w, 2)))
    difference = (above - below) / (2 * h)
    assert np.linalg.norm(difference) > 0
    return np.linalg.norm(product - difference) / np.linalg.norm(difference)


def error_of_second_order(wrapper, x, y, h):
    """Of the derivative of the perturbed loss along a line, relative to the gradient's length."""
    batch = engine.as_tensors((x, y, None))
    engine.build_symbolically(wrapper, batch)
    training = TrainingLoss(wrapper)
    state = training.current_state()
    w = tensors(training.weights)

    def evaluate(w, v):
        objective = Objective(lambda u: training(u, state, batch)[0])

        def ascent(objective, u):
            g = objective(u).gradient
            return vectors.add(u, vectors.scale(0.2 / vectors.norm(start), g))

        def loss(t):
            return objective(ascent(objective, vectors.add(w, vectors.scale(t, v)))).loss

        start = objective(w).gradient
        gradient = objective.through(ascent, w).gradient
        direct = vectors.dot(gradient, v)
        return direct, vectors.norm(gradient), loss(h), loss(-h)

    direct, norm, above, below = (
        float(ops.convert_to_numpy(t)) for t in run(evaluate, w, unit(w, 2))
    )
    return abs(direct - (above - below) / (2 * h)) / norm


def check(name, build, loss, x, y, modes):
    float32 = name.split(",")[0] in zoo.FLOAT32[BACKEND]
    dtype, h, tolerance = ("float32", 1e-2, 2e-2) if float32 else ("float64", 1e-5, 1e-6)
    with precision(dtype):
        for error in modes:
            model = build()
            wrapper, *data = prepared(model, loss(), dtype, x, y)
            assert error(wrapper, *data, h) < tolerance, error.__name__


#: What has been wrong, or is computed otherwise where it is differentiated twice; the rest is slow.
QUICK = (
    "BatchNormalization",
    "CTC",
    "GroupNormalization",
    "LayerNormalization",
    "MaxPooling2D",
    "MultiHeadAttention",
    "Resizing",
    "UpSampling2D",
    "hard_sigmoid",
    "softsign",
)


def selected(table):
    """The cases that the backend has."""
    seen = set()
    for name, value in table.items():
        first, is_variant = name.split(",")[0], name.split(",")[0] in seen
        seen.add(first)
        if BACKEND == "torch" and "lanczos" in name:
            continue  # Keras 3.15 has none there.
        if BACKEND == "jax" and (is_variant or first.endswith(("1D", "3D"))):
            continue  # Each takes seconds to compile; JAX runs one operation for all ranks.
        quick = first in QUICK and not is_variant
        # The repaired derivatives are those of TensorFlow; the others' have been right as they are.
        slow = pytest.mark.slow(everywhere=BACKEND == "tensorflow")
        yield pytest.param(name, value, id=name, marks=() if quick else slow)


def differs_in_training(name):
    cls = getattr(layers, name.split(",")[0])
    recurrent = issubclass(cls, (layers.RNN, layers.Bidirectional)) and "dropout" not in name
    takes = "training" in inspect.signature(cls.call).parameters
    return takes and not recurrent and name not in zoo.STOPS_GRADIENTS


@pytest.mark.parametrize(("name", "case"), selected(zoo.LAYERS))
def test_layers_are_differentiated_twice(name, case):
    rng = np.random.default_rng(0)
    shape = (4, *case.shape)
    x = rng.integers(0, 5, shape) if "mbedding" in name else rng.normal(size=shape)
    modes = [error_of_product]
    if differs_in_training(name):
        modes = [error_of_second_order] if BACKEND == "jax" else [*modes, error_of_second_order]
    check(name, lambda: zoo.network(case), lambda: "mse", x, rng.normal(size=(4, 2)), modes)


@pytest.mark.parametrize(("name", "fn"), selected(zoo.ACTIVATIONS))
def test_activations_are_differentiated_twice(name, fn):
    rng = np.random.default_rng(0)
    case = zoo.Case(lambda: layers.Activation(fn), zoo.FEATURES)
    x, y = rng.normal(size=(4, *zoo.FEATURES)), rng.normal(size=(4, 2))
    check(name, lambda: zoo.network(case), lambda: "mse", x, y, [error_of_product])


@pytest.mark.parametrize(("name", "case"), selected(zoo.LOSSES))
def test_losses_are_differentiated_twice(name, case):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, *case.shape)), case.targets(rng)
    check(name, lambda: zoo.loss_network(case), case.make, x, y, [error_of_product])


# That none is forgotten


def exported(module, base):
    found = {name: getattr(module, name) for name in dir(module)}
    return {name: c for name, c in found.items() if isinstance(c, type) and issubclass(c, base)}


def test_each_layer_of_keras_is_tested_or_left_out_with_its_reason():
    found = exported(layers, layers.Layer)
    tested = {found[name.split(",")[0]] for name in zoo.LAYERS}
    missing = {name for name, cls in found.items() if cls not in tested} - set(zoo.LEFT_OUT)
    assert missing == set(), "Put them into tests/zoo.py, or leave them out with the reason there."
    assert {name for name in zoo.LEFT_OUT if found.get(name) in tested} == set()
    if models.KERAS >= (3, 15):  # An older one did not have all of them yet.
        assert set(zoo.LEFT_OUT) <= set(found), "Keras has lost some of these."
        assert all(name in zoo.LAYERS for name in zoo.STOPS_GRADIENTS)


def test_each_loss_of_keras_is_tested():
    found = set(exported(keras.losses, keras.losses.Loss)) - {"Loss"}
    assert found == {name.split(",")[0] for name in zoo.LOSSES}
    functions = {n for n, f in vars(keras.losses).items() if inspect.isfunction(f)}
    tested = {case.make().fn.__name__ for case in zoo.LOSSES.values()}
    assert functions - tested == {"deserialize", "get", "serialize"}


def test_a_wrong_second_derivative_would_be_seen():
    def square(x):  # Right once, wrong twice.
        return x * ops.stop_gradient(2 * x) + ops.stop_gradient(-ops.square(x))

    with pytest.raises(AssertionError, match="error_of_product"):
        test_activations_are_differentiated_twice("square", square)

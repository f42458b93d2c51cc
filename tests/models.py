"""Tiny models, and a slow step by hand, that the tests compare keras_sharp with.

Nothing here imports keras_sharp. The step by hand assigns the perturbed weights
to the variables of a copy of the model, takes the gradient with the backend's own
tools, and puts everything back; the formulas are NumPy on one long vector.
"""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops

BACKEND = keras.backend.backend()

#: The version of Keras, as a pair: some tests need what an older one does not have.
KERAS = tuple(int(number) for number in keras.__version__.split(".")[:2])

BACKENDS = ("tensorflow", "jax", "torch")

# Which tests run where


def slow(*values, id=None, marks=()):
    """Parameters of a test that is slow with them."""
    return pytest.param(*values, id=id, marks=[pytest.mark.slow, *marks])


def on(*backends):
    """A decorator: the test, or the parameter, is there on these backends only."""
    return pytest.mark.backends(*backends)


# Compiled or not

#: For the fixture of a test module: quick tests run each operation as it is written, by
#: itself, which spares the compilation of dozens of tiny models; the slow ones compile.
MODES = ["as_written"]
if BACKEND != "torch":
    MODES += [slow("compiled", marks=[on("tensorflow", "jax")])]


@contextlib.contextmanager
def running(mode):
    """Within, Keras compiles nothing on any backend, if `mode` is "as_written"."""
    if mode == "compiled" or BACKEND == "torch":
        yield
    elif BACKEND == "jax":
        import jax

        with jax.disable_jit():
            yield
    else:
        import tensorflow as tf

        tf.config.run_functions_eagerly(True)
        try:
            yield
        finally:
            tf.config.run_functions_eagerly(False)


def enable_x64():
    """Within, JAX has float64. The name was an experimental one before JAX 0.8."""
    import jax

    return (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True)


# Data


def regression(n=8, features=3, outputs=1, seed=0):
    """Inputs and targets of a regression, float32."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, features)).astype("float32")
    y = rng.normal(size=(n, outputs)).astype("float32")
    return x, y


def classification(n=8, features=3, classes=3, seed=0):
    """Inputs and integer classes."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, features)).astype("float32"), rng.integers(0, classes, n)


# Models. Each function makes the same weights every time.


def linear(features=3, outputs=1, use_bias=False, seed=1, **kwargs):
    """`y = x @ w (+ b)`."""
    keras.utils.set_random_seed(seed)
    dense = layers.Dense(outputs, use_bias=use_bias, name="dense", **kwargs)
    return keras.Sequential([keras.Input((features,)), dense])


def mlp(features=3, outputs=1, units=4, seed=1):
    """Two layers with tanh, so that the Hessian matters and there are no kinks."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((features,)),
            layers.Dense(units, "tanh", bias_initializer="random_normal", name="first"),
            layers.Dense(outputs, bias_initializer="random_normal", name="last"),
        ]
    )


def batchnorm_net(features=3, outputs=1, units=4, seed=1):
    """A network with a BatchNormalization whose statistics move fast."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((features,)),
            layers.Dense(units, name="first"),
            layers.BatchNormalization(momentum=0.7, name="bn"),
            layers.Activation("tanh"),
            layers.Dense(outputs, name="last"),
        ]
    )


def dropout_net(features=3, outputs=1, units=16, seed=1, dropout_seed=None):
    """A network with dropout; on PyTorch the seed decides which generator it draws from."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((features,)),
            layers.Dense(units, "tanh", name="first"),
            layers.Dropout(0.5, seed=dropout_seed, name="dropout"),
            layers.Dense(outputs, name="last"),
        ]
    )


def two_in_two_out(seed=1):
    """Nested inputs `{"a", "b": {"c"}}`; outputs `{"small", "big": [...]}` from a shared trunk."""
    keras.utils.set_random_seed(seed)
    inputs = {"a": keras.Input((3,), name="a"), "b": {"c": keras.Input((2,), name="c")}}
    trunk = layers.Concatenate()([inputs["a"], inputs["b"]["c"]])
    trunk = layers.Dense(4, "tanh", name="trunk")(trunk)
    # Before 3.12, Keras knows the outputs by the names of their layers only.
    outputs = {name: layers.Dense(n, name=name)(trunk) for name, n in (("small", 1), ("big", 2))}
    return keras.Model(inputs, outputs)


class Subclassed(keras.Model):
    """A subclassed model, which is not built until it is called."""

    def __init__(self, units=4, outputs=1, **kwargs):
        super().__init__(**kwargs)
        self.units, self.outputs_ = units, outputs
        self.first = layers.Dense(units, "tanh", name="first")
        self.last = layers.Dense(outputs, name="last")

    def call(self, x, training=None):
        return self.last(self.first(x))

    def get_config(self):
        return {"units": self.units, "outputs": self.outputs_, **super().get_config()}


class Autoencoder(keras.Model):
    """VAE-like: a loss of its own, with trackers of its own, in `compute_loss`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.encode = layers.Dense(2, name="encode")
        self.decode = layers.Dense(3, name="decode")
        self.code_tracker = keras.metrics.Mean(name="code_loss")

    def call(self, x, training=None):
        return self.decode(ops.tanh(self.encode(x)))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        code = ops.mean(ops.square(self.encode(x)))
        self.code_tracker.update_state(code)
        return ops.mean(ops.square(ops.subtract(y_pred, x))) + 0.1 * code

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**logs, "worst": ops.max(ops.abs(ops.subtract(y_pred, x)))}


class OldAutoencoder(Autoencoder):
    """As written before Keras 3.3: `compute_loss` has no `training` argument."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return super().compute_loss(x, y, y_pred, sample_weight)


# Layers that watch or disturb


@keras.saving.register_keras_serializable(package="tests")
class Noise(layers.Layer):
    """Adds noise in training, from the global generator (`seeded=False`) or one of its own."""

    def __init__(self, seeded=False, **kwargs):
        super().__init__(**kwargs)
        self.seeded = seeded
        self.generator = keras.random.SeedGenerator(7) if seeded else None

    def call(self, x, training=None):
        if not training:
            return x
        return x + keras.random.normal(ops.shape(x), seed=self.generator)


class Recorder(layers.Layer):
    """Multiplies by a random mask and writes each mask down. For `run_eagerly=True`."""

    def __init__(self, shape, masks, **kwargs):
        super().__init__(**kwargs)
        # A closure, since an attribute that is a list would become one of Keras' own.
        self._draw = lambda: keras.random.dropout(ops.ones(shape), 0.5, seed=self.generator)
        self._write = masks.append
        self.generator = keras.random.SeedGenerator(7)

    def call(self, x, training=None):
        if not training:
            return x
        mask = self._draw()
        if not _is_abstract(mask):
            self._write(ops.convert_to_numpy(mask).copy())
        return x * mask


def _is_abstract(tensor):
    """Whether JAX only looks for shapes here."""
    if BACKEND != "jax":
        return False
    import jax

    return isinstance(tensor, jax.core.Tracer)


# Variables


def values(variables):
    """Copies of the values, as NumPy arrays."""
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def assign(variables, new):
    """Write values back."""
    for variable, value in zip(variables, new, strict=True):
        variable.assign(value)


def twins(build, *args, **kwargs):
    """Two models with equal weights, statistics and seeds."""
    one, other = build(*args, **kwargs), build(*args, **kwargs)
    assign(other.variables, values(one.variables))
    return one, other


def flat(tensors):
    """One float64 vector of all entries."""
    return np.concatenate([np.zeros(0), *(np.ravel(np.asarray(t, "float64")) for t in tensors)])


def like(vector, tensors):
    """The entries of a vector in the shapes of `tensors`."""
    parts = np.split(vector, np.cumsum([np.size(t) for t in tensors])[:-1])
    return [p.reshape(np.shape(t)) for p, t in zip(parts, tensors, strict=True)]


def assert_same(actual, expected, bits=None, **tolerance):
    """Lists of arrays are equal: to the bit where eager or graph kernels are the same.

    XLA may fuse the two programs differently, so on JAX `bits` is a matter of rounding.
    """
    bits = BACKEND != "jax" if bits is None else bits
    actual = [np.asarray(ops.convert_to_numpy(a)) for a in actual]
    expected = [np.asarray(ops.convert_to_numpy(e)) for e in expected]
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        if bits:
            np.testing.assert_array_equal(a, e)
        else:
            np.testing.assert_allclose(a, e, **{"rtol": 2e-5, "atol": 2e-6, **tolerance})


def assert_close(actual, expected, **tolerance):
    """Lists of arrays are equal up to float32 rounding."""
    assert_same(actual, expected, bits=False, **tolerance)


# A step by hand


def tensors(structure):
    """NumPy arrays in a nested structure as tensors."""
    return keras.tree.map_structure(
        lambda a: None if a is None else ops.convert_to_tensor(a), structure
    )


def loss_and_gradient(model, x, y=None, sample_weight=None):
    """Loss and gradient in training mode, and the state of the model moves on as in a pass.

    Returns:
        The loss, a float; and a list of NumPy arrays, `None` without a gradient.
    """
    x, y, sample_weight = tensors((x, y, sample_weight))
    if BACKEND == "jax":
        return _loss_and_gradient_jax(model, x, y, sample_weight)

    def loss():
        y_pred = model(x, training=True)
        return model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)

    gradient_of = _gradient_tensorflow if BACKEND == "tensorflow" else _gradient_torch
    value, gradient = gradient_of(loss, model.trainable_variables)
    arrays = [None if g is None else ops.convert_to_numpy(g).copy() for g in gradient]
    return float(ops.convert_to_numpy(value)), arrays


def _gradient_tensorflow(loss, weights):
    import tensorflow as tf

    def run():
        with tf.GradientTape() as tape:
            value = loss()
        gradient = tape.gradient(value, [v.value for v in weights])
        return value, [None if g is None else tf.convert_to_tensor(g) for g in gradient]

    # Float8 layers of Keras have no gradient in eager mode.
    if any(getattr(v, "overwrite_with_gradient", False) for v in weights):
        run = tf.function(run)
    return run()


def _gradient_torch(loss, weights):
    import torch

    value = loss()
    return value, torch.autograd.grad(value, [v.value for v in weights], allow_unused=True)


def _loss_and_gradient_jax(model, x, y, sample_weight):
    import jax

    (_, (loss, _, state, metrics)), gradient = jax.value_and_grad(
        model.compute_loss_and_updates, has_aux=True
    )(
        [v.value for v in model.trainable_variables],
        [v.value for v in model.non_trainable_variables],
        [v.value for v in model.metrics_variables],
        x,
        y,
        sample_weight,
        training=True,
        optimizer_variables=[v.value for v in model.optimizer.variables],
    )
    assign(model.non_trainable_variables, state)
    assign(model.metrics_variables, metrics)
    return float(loss), [np.array(g) for g in gradient]


def euclidean(g, w, biases, rho):
    """SAM's perturbation."""
    return rho * _unit(g)


def adaptive(g, w, biases, rho, eta=0.01):
    """ASAM's perturbation."""
    scale = np.where(biases, 1.0, np.abs(w) + eta)
    return rho * scale * _unit(scale * g)


def weight_scaled(g, w, biases, rho, gamma=0.01):
    """Adaptive-GSAM's perturbation."""
    return rho * (np.abs(w) + gamma) * _unit(g)


def _unit(g):
    length = np.linalg.norm(g)
    return g / length if length else g


def sam(gradient_at, perturbation, g, rho=0.05):
    return gradient_at(perturbation(rho))


def gsam(gradient_at, perturbation, g, rho=0.05, alpha=0.4):
    g_adv = gradient_at(perturbation(rho))
    g_perp = g - (g @ g_adv) / (g_adv @ g_adv) * g_adv
    return g_adv - alpha * g_perp


def bsam(gradient_at, perturbation, g, rho=0.05):
    g_down = gradient_at(perturbation(-rho))
    g_up = gradient_at(perturbation(rho))
    return g_up + g - np.linalg.norm(g_up) / np.linalg.norm(g_down) * g_down


#: The rule and the perturbation of each method, with the defaults of its paper.
BY_HAND = {
    "sam": (sam, euclidean, {"rho": 0.05}),
    "asam": (sam, adaptive, {"rho": 0.5}),
    "gsam": (gsam, euclidean, {"rho": 0.05, "alpha": 0.4}),
    "adaptive_gsam": (gsam, weight_scaled, {"rho": 0.05, "alpha": 0.4}),
    "bsam": (bsam, euclidean, {"rho": 0.05}),
}


def direction_by_hand(
    model, x, y=None, sample_weight=None, method="sam", takes_part=None, **hyperparameters
):
    """The update direction. Weights are put back; the rest is as the clean pass left it.

    Returns:
        The clean loss and the direction, a list of arrays or `None`.
    """
    rule, perturb, defaults = BY_HAND[method]
    weights, others = model.trainable_variables, model.non_trainable_variables
    w, state, noise = values(weights), values(others), _torch_noise()
    loss, gradient = loss_and_gradient(model, x, y, sample_weight)
    state_after, noise_after = values(others), _torch_noise()

    # What stands in place of the gradient of a float8 scale is its next value.
    given = [None if getattr(v, "overwrite_with_gradient", False) else g
             for v, g in zip(weights, gradient, strict=True)]  # fmt: skip
    kept = [i for i, g in enumerate(given) if g is not None]
    part = [takes_part is None or bool(takes_part(weights[i])) for i in kept]
    part = flat([np.full(np.shape(w[i]), p) for i, p in zip(kept, part, strict=True)]) > 0
    biases = flat([np.full(np.shape(w[i]), weights[i].name in ("bias", "beta")) for i in kept]) > 0
    start, g = flat([w[i] for i in kept]), flat([given[i] for i in kept])

    def perturbation(rho):
        e = np.zeros_like(g)
        e[part] = perturb(g[part], start[part], biases[part], rho)
        return e

    def gradient_at(e):
        assign(others, state)
        _set_torch_noise(noise)
        assign([weights[i] for i in kept], like(start + e, [w[i] for i in kept]))
        perturbed = loss_and_gradient(model, x, y, sample_weight)[1]
        assign(weights, w)
        return flat([perturbed[i] for i in kept])

    d = rule(gradient_at, perturbation, g, **{**defaults, **hyperparameters})
    assign(others, state_after)
    _set_torch_noise(noise_after)
    direction = list(gradient)
    for i, part in zip(kept, like(d, [w[i] for i in kept]), strict=True):
        direction[i] = part.astype(w[i].dtype)
    return loss, direction


def step_by_hand(model, x, y=None, sample_weight=None, **kwargs):
    """One step: the direction by hand, applied by the optimizer of the model. The loss."""
    loss, direction = direction_by_hand(model, x, y, sample_weight, **kwargs)
    apply(model, direction)
    return loss


def apply(model, direction):
    """Hand a direction, a list of arrays or `None`, to the optimizer of the model."""
    direction, weights = tensors(direction), model.trainable_variables
    if BACKEND != "torch":
        return model.optimizer.apply(direction, weights)
    import torch

    with torch.no_grad():
        return model.optimizer.apply(direction, weights)


def _torch_noise():
    """PyTorch draws dropout masks without a seed from a generator that no variable holds."""
    if BACKEND != "torch":
        return None
    import torch

    return torch.get_rng_state()


def _set_torch_noise(state):
    if BACKEND == "torch":
        import torch

        torch.set_rng_state(state)

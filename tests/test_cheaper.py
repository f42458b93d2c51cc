"""Methods and policies that ask the adversary less often, or for less: right, and cheaper."""

import re

import keras
import numpy as np
import pytest
import scipy.sparse
from keras import ops

from keras_sharp import Objective, SharpnessAwareModel, callbacks, methods, policies, rho_range_test
from tests import models
from tests.models import BACKEND, assert_same, values

COMPILED = models.on("tensorflow", "jax")  # PyTorch is eager in any case.


# Convolutions in a conditional, which XLA on CPUs compiles to slow loops if nobody cares


@pytest.mark.skipif(BACKEND != "jax", reason="the layout is what the engine of JAX cares for")
@pytest.mark.parametrize("kind", ["Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose", "grouped"])
def test_convolutions_in_a_conditional_are_in_the_layout_that_is_fast(kind):
    """And compute the same. Transposed and grouped ones XLA turns around once more, by itself."""
    import jax

    from keras_sharp import engine

    kwargs = {"strides": 2, "padding": "same", "activation": "relu"}
    name = kind
    if kind == "grouped":
        name, kwargs["groups"] = "Conv2D", 2
    space = {"1": (9,), "2": (9, 8), "3": (5, 6, 5)}[name[4]]
    layer = getattr(keras.layers, name)(4, 3, **kwargs)
    layer.build((None, *space, 2))
    random = np.random.default_rng(0)
    x = random.normal(size=(3, *space, 2)).astype("float32")
    w = [random.normal(size=v.shape).astype("float32") for v in layer.trainable_variables]

    def loss(w, x):
        y, _ = layer.stateless_call(w, [], x)
        return ops.sum(ops.sin(y))

    gradients = jax.grad(loss, argnums=(0, 1))

    def chosen(condition, w, x):
        zeros = jax.tree.map(ops.zeros_like, (w, x))
        return engine.cond(condition, lambda: gradients(w, x), lambda: zeros)

    compiled = jax.jit(chosen).lower(True, w, x).compile()
    program = compiled.as_text()
    assert "conditional(" in program
    dims = {1: "b0f_0io->b0f", 2: "b01f_01io->b01f", 3: "b012f_012io->b012f"}[len(space)]
    layouts = re.findall(r"dim_labels=(\S+?),", program)
    assert len(layouts) >= 3
    assert dims in layouts
    if kind in ("Conv1D", "Conv2D", "Conv3D"):
        assert set(layouts) == {dims}
    found, expected = (jax.tree.leaves(g) for g in (compiled(True, w, x), gradients(w, x)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere there are no two ways to compile")
@pytest.mark.parametrize(
    ("method", "expected"),
    [("sam", "step"), ("looksam", "passes"), (policies.From("gsam", 2), "passes")],
    ids=["sam", "looksam", "policy"],
)
def test_conditionals_are_left_out_of_what_xla_compiles_on_cpus(method, expected):
    from keras_sharp.engine import _tensorflow

    seen = []

    class Seer(keras.layers.Dense):
        def call(self, x):
            seen.append(_tensorflow._xla.get())
            return super().call(x)

    inner = keras.Sequential([keras.Input((3,)), Seer(1)])
    seen.clear()
    model = SharpnessAwareModel(inner, method)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=True)
    for seed in range(3):
        model.train_on_batch(*models.regression(8, seed=seed))
    assert {"step", "passes"} & set(seen) == {expected}
    assert all(np.isfinite(v).all() for v in values(inner.variables))


# Trajectories, against the papers in NumPy and float64


class Simulation:
    """Training of a linear model with squared loss and SGD: what each step makes of each batch."""

    def __init__(self, steps=7, learning_rate=0.05):
        rng = np.random.default_rng(3)
        self.batches = [models.regression(8, seed=seed) for seed in range(steps)]
        self.start = rng.normal(size=(3, 1)).astype("float32")
        self.learning_rate = learning_rate

    def gradient(self, w, step, share=1.0):
        x, y = (a[: int(share * len(a))].astype("float64") for a in self.batches[step])
        return 2 * x.T @ (x @ w - y) / len(x)

    def run(self, rule):
        """The weights after each step; `rule(gradient, w, step)` gives the direction."""
        w, path = self.start.astype("float64"), []
        for step in range(len(self.batches)):

            def gradient(v, share=1.0, step=step):
                return self.gradient(v, step, share)

            w = w - self.learning_rate * rule(gradient, w, step)
            path.append(w)
        return path

    def train(self, method, **kwargs):
        """The same by the library, and the gradients that each step took."""
        inner = models.linear(3)
        inner.set_weights([self.start])
        model = SharpnessAwareModel(inner, method, extra_logs=["num_gradients"], **kwargs)
        model.compile(keras.optimizers.SGD(self.learning_rate), "mse")
        path, costs = [], []
        for batch in self.batches:
            model.reset_metrics()
            costs.append(float(model.train_on_batch(*batch, return_dict=True)["num_gradients"]))
            path.append(values(inner.trainable_variables)[0])
        return path, costs


def unit(g):
    norm = np.linalg.norm(g)
    return g / norm if norm else 0 * g


def sam(rho):
    return lambda gradient, w, step: gradient(w + rho * unit(gradient(w)))


def two_steps_on_a_part(gradient, w, step):
    e = 0.3 * unit(gradient(w, share=0.5))
    e = e + 0.3 * unit(gradient(w + e, share=0.5))
    return gradient(w + e * min(1.0, 0.3 / np.linalg.norm(e)))


def looksam(rho, alpha, k):
    v = None

    def rule(gradient, w, step):
        nonlocal v
        g = gradient(w)
        if step % k == 0:
            g_adv = gradient(w + rho * unit(g))
            v = g_adv - np.sum(unit(g) * g_adv) * unit(g)
            return g_adv
        return g + alpha * np.linalg.norm(g) * unit(v)

    return rule


def momentum_sam(rho, momentum):
    v = 0.0

    def rule(gradient, w, step):
        nonlocal v
        direction = gradient(w - rho * unit(v + 0 * w))
        v = momentum * v + direction
        return direction

    return rule


def async_sam(rho):
    m = 0.0

    def rule(gradient, w, step):
        nonlocal m
        m = gradient(w + rho * unit(m + 0 * w))
        return m

    return rule


def friendly_sam(rho, sigma, decay):
    m = 0.0

    def rule(gradient, w, step):
        nonlocal m
        g = gradient(w)
        direction = gradient(w + rho * unit(g - sigma * m))
        m = decay * m + (1 - decay) * g
        return direction

    return rule


def plainly(rule, asks):
    return lambda gradient, w, step: rule(gradient, w, step) if asks(step) else gradient(w)


def by_norm(rule, c, decay):
    mean = variance = None

    def of_step(gradient, w, step):
        nonlocal mean, variance
        squared = np.sum(gradient(w) ** 2)
        if mean is None:
            mean, variance = squared, 0.0
        else:
            mean = decay * mean + (1 - decay) * squared
            variance = decay * variance + (1 - decay) * (squared - mean) ** 2
        asks = squared >= mean + c * np.sqrt(variance)
        return rule(gradient, w, step) if asks else gradient(w)

    return of_step


M, P = methods, policies
#: The library's, the paper's, and how many gradients each of seven steps takes.
TRAJECTORIES = {
    "looksam": (
        lambda: M.LookSAM(0.3, alpha=0.6, k=3),
        lambda: looksam(0.3, 0.6, 3),
        [2, 1, 1] * 3,
    ),
    "momentum_sam": (lambda: M.MomentumSAM(0.3, 0.8), lambda: momentum_sam(0.3, 0.8), [1] * 7),
    "async_sam": (lambda: M.AsyncSAM(0.3), lambda: async_sam(0.3), [1] * 7),
    "friendly_sam": (
        lambda: M.FriendlySAM(0.3, sigma=0.7, decay=0.6),
        lambda: friendly_sam(0.3, 0.7, 0.6),
        [2] * 7,
    ),
    "ascent_share": (
        lambda: M.SAM(0.3, ascent_share=0.5),
        lambda: lambda gradient, w, step: gradient(w + 0.3 * unit(gradient(w, share=0.5))),
        [1.5] * 7,
    ),
    "ascent_share_two_steps": (
        lambda: M.SAM(0.3, ascent_share=0.5, ascent_steps=2),
        lambda: two_steps_on_a_part,
        [2] * 7,
    ),
    "every": (
        lambda: P.Every(M.SAM(0.3), 3),
        lambda: plainly(sam(0.3), lambda s: s % 3 == 0),
        [2, 1, 1] * 3,
    ),
    "from": (
        lambda: P.From(M.SAM(0.3), 3),
        lambda: plainly(sam(0.3), lambda s: s >= 3),
        [1] * 3 + [2] * 4,
    ),
    "until": (
        lambda: P.Until(M.SAM(0.3), 3),
        lambda: plainly(sam(0.3), lambda s: s < 3),
        [2] * 3 + [1] * 4,
    ),
    "from_every": (
        lambda: P.From(P.Every(M.SAM(0.3), 2), 3),
        lambda: plainly(sam(0.3), lambda s: s >= 3 and s % 2 == 0),
        [1, 1, 1, 1, 2, 1, 2],
    ),
    "norm": (
        lambda: P.WhenGradientNorm(M.SAM(0.3), c=-0.1, decay=0.5),
        lambda: by_norm(sam(0.3), -0.1, 0.5),
        None,
    ),
    "with_memory": (
        lambda: P.Until(M.FriendlySAM(0.3, decay=0.6), 4),
        lambda: plainly(friendly_sam(0.3, 1.0, 0.6), lambda s: s < 4),
        [2] * 4 + [1] * 3,
    ),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_a_training_is_that_of_the_paper(name):
    """Compiled, on TensorFlow and JAX."""
    make, rule, gradients = TRAJECTORIES[name]
    simulation = Simulation()
    path, costs = simulation.train(make())
    for actual, expected in zip(path, simulation.run(rule()), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    if gradients:
        assert costs == gradients[:7]
    assert len(set(costs)) > 1 or gradients  # The policy of the norm has asked, and has not.


# What is spared is really spared


class Counting(keras.layers.Layer):
    """Counts, where the computation comes by: a gradient that is skipped does not."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def call(self, x):
        def count(a):
            self.passes += 1
            return np.asarray(a)

        if BACKEND == "torch":
            count(0)
            return x
        if BACKEND == "jax":
            import jax

            jax.debug.callback(lambda: count(0))
            return x
        import tensorflow as tf

        @tf.custom_gradient
        def tap(x):
            y = tf.numpy_function(count, [x], x.dtype)
            y.set_shape(x.shape)
            return y, lambda g: g

        return tap(x)


@pytest.mark.parametrize("name", ["every", "looksam", "from_every"])
def test_what_is_not_asked_is_not_computed(name):
    make, _, gradients = TRAJECTORIES[name]
    counting = Counting()
    inner = keras.Sequential([keras.Input((3,)), counting, keras.layers.Dense(1)])
    model = SharpnessAwareModel(inner, make())
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=BACKEND == "jax")
    x, y = models.regression()
    taken = []
    for _ in range(7):
        before = counting.passes
        model.train_on_batch(x, y)
        if BACKEND == "jax":
            import jax

            jax.effects_barrier()
        taken.append(counting.passes - before)
    assert taken[1:] == gradients[1:7]  # In the first step, TensorFlow builds the model.


# Every policy, with every method


POLICIES = {
    "every": lambda method: P.Every(method, 2),
    "from": lambda method: P.From(method, 1),
    "until": lambda method: P.Until(method, 2),
    "probability": lambda method: P.WithProbability(method, 0.5),
    "norm": lambda method: P.WhenGradientNorm(method),
    "late_and_rare": lambda method: P.From(P.Every(method, 2), 1),
}


def train(method, build=models.batchnorm_net, steps=4, **kwargs):
    keras.utils.set_random_seed(0)
    model = SharpnessAwareModel(build(), method, **kwargs)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    for seed in range(steps):
        model.train_on_batch(*models.regression(seed=seed))
    return model


def check_policy(name, policy, tmp_path):
    """It trains, and once saved and loaded takes the next step as if it had gone on."""
    model = train(POLICIES[policy](methods.METHODS[name]()), steps=3)
    assert all(np.all(np.isfinite(v)) for v in values(model.model.variables))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.method.get_config() == model.method.get_config()
    for one in (model, loaded):
        one.train_on_batch(*models.regression(seed=9))
    assert_same(loaded.model.variables, model.model.variables, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("as_written")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", methods.METHODS)
def test_with_every_method_a_policy_trains_and_is_saved(name, policy, tmp_path):
    check_policy(name, policy, tmp_path)


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["sam", models.slow("looksam")])
def test_a_policy_trains_and_is_saved_compiled(name, policy, tmp_path):
    check_policy(name, policy, tmp_path)


@pytest.mark.slow
def test_asked_at_each_step_a_method_is_itself():
    expected = train("bsam").model.variables
    for policy in (P.Every("bsam", 1), P.From("bsam", 0), P.WithProbability("bsam", 1.0)):
        assert_same(train(policy).model.variables, expected, bits=BACKEND == "torch")


def test_never_asked_it_is_plain_training():
    plain = train(None).model.variables
    for policy in (P.Until("sam", 0), P.WithProbability("sam", 0.0)):
        assert_same(train(policy).model.variables, plain, bits=BACKEND == "torch")


def test_micro_batches_and_noise_of_its_own():
    """Statistics, seeds and counters move once per step, whether it looks or not."""
    for fresh_noise in (False, True):
        model = train(
            P.Every("sam", 2),
            lambda: models.dropout_net(dropout_seed=1),
            num_micro_batches=2,
            fresh_noise=fresh_noise,
        )
        plain = train(
            None,
            lambda: models.dropout_net(dropout_seed=1),
            num_micro_batches=2,
            fresh_noise=fresh_noise,
        )
        seeds = [int(values([v])[0][1]) for v in model.model.non_trainable_variables]
        plain_seeds = [int(values([v])[0][1]) for v in plain.model.non_trainable_variables]
        looked = 2 * 2 if fresh_noise else 0  # Two of the four steps, in two parts.
        assert seeds == [s + looked for s in plain_seeds]


@COMPILED  # And Keras refuses it there.
def test_several_steps_per_execution():
    expected = None
    for steps in (1, 2):
        keras.utils.set_random_seed(0)
        model = SharpnessAwareModel(models.mlp(), P.Every("sam", 3))
        model.compile(keras.optimizers.SGD(0.1), "mse", steps_per_execution=steps)
        x, y = models.regression(32)
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        expected = expected or values(model.model.variables)
    assert_same(model.model.variables, expected)


def test_in_float16_a_step_that_does_not_look_is_scaled_all_the_same():
    keras.config.set_dtype_policy("mixed_float16")
    model = SharpnessAwareModel(models.mlp(), P.Every("sam", 2), extra_logs=["num_gradients"])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    logs = []
    for _ in range(4):
        model.reset_metrics()
        logs.append(model.train_on_batch(*models.regression(), return_dict=True))
    assert [float(log["num_gradients"]) for log in logs] == [2, 1, 2, 1]
    assert all(np.isfinite(log["loss"]) for log in logs)
    assert int(model.skipped_steps) == 0


# WSAM, decoupled: the optimizer receives the gradient, and the rest by-passes it


def wsam_path(simulation, rho, gamma, momentum, asks=lambda step: True):
    """Yue et al., algorithm 2, around SGD with momentum."""
    w, v, path = simulation.start.astype("float64"), 0.0, []
    for step in range(len(simulation.batches)):
        learning_rate = 0.05 / (1 + step)
        g = simulation.gradient(w, step)
        rise = simulation.gradient(w + rho * unit(g), step) - g
        v = momentum * v - learning_rate * g
        w = w + v - asks(step) * learning_rate * gamma / (1 - gamma) * rise
        path.append(w)
    return path


@pytest.mark.parametrize("k", [1, 3])
def test_decoupled_wsam_is_that_of_the_paper(k):
    simulation, wsam = Simulation(), M.WSAM(0.3, gamma=0.8, decoupled=True)
    inner = models.linear(3)
    inner.set_weights([simulation.start])
    model = SharpnessAwareModel(inner, wsam if k == 1 else P.Every(wsam, k))
    falling = keras.optimizers.schedules.InverseTimeDecay(0.05, 1, 1.0)
    model.compile(keras.optimizers.SGD(falling, momentum=0.9), "mse")
    expected = wsam_path(simulation, 0.3, 0.8, 0.9, lambda step: step % k == 0)
    for batch, w in zip(simulation.batches, expected, strict=True):
        model.train_on_batch(*batch)
        np.testing.assert_allclose(values(inner.trainable_variables)[0], w, rtol=1e-4, atol=1e-5)


def test_without_memory_of_the_optimizer_both_forms_of_wsam_are_one():
    results = []
    for decoupled in (False, True):
        model = SharpnessAwareModel(
            models.mlp(), M.WSAM(0.1, decoupled=decoupled), num_micro_batches=2
        )
        model.compile(keras.optimizers.SGD(0.05), "mse")
        for seed in range(3):
            model.train_on_batch(*models.regression(8, seed=seed))
        results.append(values(model.model.variables))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_what_by_passes_the_optimizer_respects_constraints():
    dense = keras.layers.Dense(1, use_bias=False, kernel_constraint=keras.constraints.NonNeg())
    model = SharpnessAwareModel(
        keras.Sequential([keras.Input((3,)), dense]), M.WSAM(0.3, gamma=0.95, decoupled=True)
    )
    model.compile(keras.optimizers.SGD(0.2), "mse")
    model.fit(*models.regression(16), epochs=5, verbose=0)
    (kernel,) = values([dense.kernel])
    assert kernel.min() == 0.0  # It would have gone below.


def test_a_weight_of_nan_reaches_no_variable():
    model = SharpnessAwareModel(models.mlp(), M.WSAM(0.1, decoupled=True))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.method.gamma.assign(1.0)  # Its factor is infinite.
    before = values(model.model.variables)
    model.train_on_batch(*models.regression(8))
    assert_same(values(model.model.variables), before, bits=True)
    assert int(model.skipped_steps) == 1


@pytest.mark.parametrize(
    ("optimizer", "problem"),
    [
        (lambda: keras.optimizers.SGD(gradient_accumulation_steps=2), "accumulates gradients"),
        (lambda: keras.optimizers.SGD(use_ema=True), "averages the weights"),
        (
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
            "skips steps by itself",
        ),
    ],
)
def test_an_optimizer_that_must_not_be_by_passed_is_refused(optimizer, problem):
    model = SharpnessAwareModel(models.mlp(), M.WSAM(0.1, decoupled=True))
    model.compile(optimizer(), "mse")
    with pytest.raises(ValueError, match=f"{problem}.*decoupled=False"):
        model.train_on_batch(*models.regression(8))


# ESAM: some of the weights, some of the examples


def test_esam_asks_those_examples_whose_loss_rises_most():
    """Without masks: by hand, in NumPy."""
    x, y = models.regression(8)
    start = np.random.default_rng(3).normal(size=(3, 1)).astype("float32")
    inner = models.linear(3)
    inner.set_weights([start])
    model = SharpnessAwareModel(
        inner, M.ESAM(0.3, beta=1.0, gamma=0.4), extra_logs=["num_gradients"]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    logs = model.train_on_batch(x, y, return_dict=True)

    def residuals(w, rows):
        return x[rows].astype("float64") @ w - y[rows]

    everything, w = slice(None), start.astype("float64")
    w_adv = w + 0.3 * unit(2 * x.T @ residuals(w, everything) / 8)
    rise = (residuals(w_adv, everything) ** 2 - residuals(w, everything) ** 2)[:, 0]
    chosen = np.argsort(rise)[-3:]
    expected = w - 0.1 * 2 * x[chosen].T @ residuals(w_adv, chosen) / 3
    np.testing.assert_allclose(values(inner.trainable_variables)[0], expected, rtol=1e-5)
    assert float(logs["num_gradients"]) == pytest.approx(1.4)
    np.testing.assert_allclose(logs["loss"], np.mean(residuals(w, everything) ** 2), rtol=1e-5)


def test_esam_hears_all_examples_where_nothing_is_perturbed():
    """Two examples that pull in opposite ways: half of them alone would move the weight."""
    inner = models.linear(1)
    inner.set_weights([np.zeros((1, 1), "float32")])
    model = SharpnessAwareModel(inner, M.ESAM(0.3, gamma=0.5))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(np.ones((2, 1), "float32"), np.float32([[1], [-1]]))
    np.testing.assert_array_equal(values(inner.trainable_variables)[0], 0.0)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no sparse inputs on PyTorch")
@pytest.mark.parametrize("mode", ["as_written", "compiled"])
def test_esam_selects_sparse_examples_as_dense_ones(mode):
    x = scipy.sparse.random(12, 6, 0.4, format="csr", random_state=0, dtype="float32")
    y = np.random.default_rng(0).normal(size=(12, 1)).astype("float32")
    weights = []
    for is_sparse in (True, False):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,), sparse=is_sparse)
        inner = keras.Model(inputs, keras.layers.Dense(1)(inputs))
        model = SharpnessAwareModel(inner, M.ESAM(0.3, beta=1.0, gamma=0.5))
        model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=mode == "as_written")
        model.fit(x if is_sparse else x.toarray(), y, batch_size=5, shuffle=False, verbose=0)
        weights.append(values(inner.trainable_variables))
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class Shows(keras.layers.Dense):
    """Keeps the kernels of its passes."""

    def __init__(self):
        super().__init__(1, use_bias=False)
        self.seen = []

    def call(self, x):
        if BACKEND == "torch":
            self.seen.append(ops.convert_to_numpy(ops.stop_gradient(self.kernel + 0.0)))
        return super().call(x)


@pytest.mark.skipif(BACKEND != "torch", reason="what is traced has no values to look at")
def test_esam_perturbs_a_share_of_the_entries():
    size = 20000
    layer = Shows()
    model = SharpnessAwareModel(
        keras.Sequential([keras.Input((size,)), layer]), M.ESAM(0.5, beta=0.3, gamma=1.0)
    )
    # A linear loss: the gradient is the same everywhere, and in each entry.
    model.compile(keras.optimizers.SGD(0.0), lambda y, y_pred: y_pred, run_eagerly=True)
    model.train_on_batch(np.ones((2, size), "float32"), np.zeros((2, 1), "float32"))
    e = layer.seen[-1] - values([layer.kernel])[0]
    moved = np.abs(e) > 1e-6
    assert abs(moved.mean() - 0.3) < 0.02
    np.testing.assert_allclose(e[moved], 0.5 / 0.3 / np.sqrt(size), rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", keras.losses.Huber(), lambda y, p: ops.abs(y - p)[:, 0]])
def test_esam_takes_any_loss_of_one_output(loss):
    model = SharpnessAwareModel(models.mlp(), M.ESAM(0.1), num_micro_batches=2)
    model.compile(keras.optimizers.SGD(0.05), loss)
    x, y = models.regression(17)
    model.fit(x, y, batch_size=8, sample_weight=np.linspace(0, 1, 17), epochs=2, verbose=0)
    assert all(np.all(np.isfinite(v)) for v in values(model.model.variables))


def test_esam_refuses_several_outputs():
    model = SharpnessAwareModel(models.two_in_two_out(), M.ESAM(0.1))
    model.compile(keras.optimizers.SGD(0.05), ["mse", "mse"])
    with pytest.raises(ValueError, match=r"ESAM goes by the losses of single examples.*gamma=1.0"):
        model.train_on_batch(*two_in_two_out_data())


def two_in_two_out_data():
    model = models.two_in_two_out()
    x = keras.tree.map_structure(lambda t: np.ones((8, *t.shape[1:]), "float32"), model.input)
    y = keras.tree.map_structure(lambda t: np.ones((8, *t.shape[1:]), "float32"), model.output)
    return x, y


# Numbers and settings are seen through the policy


def test_the_numbers_of_the_method_are_those_of_the_policy():
    policy = P.From(P.Every(M.GSAM(rho=0.1, alpha=0.2), 2), 3)
    assert list(policy.settings) == ["start", "rho", "alpha"]
    assert float(policy.rho) == pytest.approx(0.1)
    policy.rho = 0.4
    assert float(policy.method.method.rho) == pytest.approx(0.4)
    with pytest.raises(AttributeError, match="roh"):
        policy.roh = 0.1
    assert isinstance(P.Every(M.ASAM()).neighborhood, type(M.ASAM().neighborhood))


def test_rho_may_be_scheduled_and_tested_through_a_policy():
    x, y = models.regression(16)
    model = SharpnessAwareModel(models.mlp(), P.Every("sam", 2))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    scheduler = callbacks.RhoScheduler(lambda epoch, rho: 0.1 * (epoch + 1))
    history = model.fit(x, y, epochs=2, callbacks=[scheduler], verbose=0).history
    np.testing.assert_allclose(history["rho"], [0.1, 0.2], rtol=1e-6)
    model.method.rho = 0.05
    found = rho_range_test(
        model, x, y, validation_data=(x, y), rhos=[0.01, 0.1], epochs=1, verbose=0
    )
    assert len(found.rho) == 3
    model.method = P.From("sam", 10)
    with pytest.raises(ValueError, match=r"From, which waits.*model.method.method"):
        rho_range_test(model, x, y, validation_data=(x, y), verbose=0)


def test_nothing_is_compiled_again_when_a_number_changes():
    runs = []

    def loss(y, y_pred):
        runs.append(1)
        return ops.mean((y - y_pred) ** 2)

    model = SharpnessAwareModel(models.mlp(), P.From("sam", 100))
    model.compile(keras.optimizers.SGD(0.1), loss)
    model.train_on_batch(*models.regression())
    runs.clear()
    model.method.start, model.method.rho = 0.0, 0.3
    model.train_on_batch(*models.regression())
    assert len(runs) == (2 if BACKEND == "torch" else 0)


def test_a_share_of_the_training_becomes_a_step_in_fit():
    x, y = models.regression(32)
    model = SharpnessAwareModel(models.mlp(), P.From("sam", 0.5), extra_logs=["num_gradients"])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    history = model.fit(x, y, batch_size=8, epochs=4, verbose=0).history
    assert history["num_gradients"] == [1, 1, 2, 2]
    assert float(model.method.start) == 8
    assert model.method.get_config()["start"] == 0.5


def test_a_second_fit_is_a_longer_training():
    """The share is that of all steps: of eight epochs, the last two, and not all of the second."""
    x, y = models.regression(32)
    model = SharpnessAwareModel(models.mlp(), P.From("sam", 0.75), extra_logs=["num_gradients"])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    first, second = (
        model.fit(x, y, batch_size=8, epochs=4, verbose=0).history["num_gradients"]
        for _ in range(2)
    )
    assert first == [1, 1, 1, 2]
    assert second == [1, 1, 2, 2]


def test_a_switched_policy_is_told_the_length_as_well():
    x, y = models.regression(32)
    model = SharpnessAwareModel(models.mlp(), None, extra_logs=["num_gradients"])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    switch = callbacks.SwitchMethod({1: P.From("sam", 0.75)})
    history = model.fit(x, y, batch_size=8, epochs=4, callbacks=[switch], verbose=0).history
    assert history["num_gradients"] == [1, 1, 1, 2]


def test_a_share_of_a_length_that_nobody_knows_is_refused():
    x, y = models.regression(8)

    def endless():
        while True:
            yield x, y

    model = SharpnessAwareModel(models.mlp(), P.Until("sam", 0.5))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    with pytest.raises(ValueError, match=r"`end` as a share of the training, 0.5.*Give `end` in"):
        model.train_on_batch(x, y)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        data = tf.data.Dataset.from_generator(
            endless, output_signature=(tf.TensorSpec((8, 3)), tf.TensorSpec((8, 1)))
        ).take(3)
        with pytest.raises(ValueError, match="assert_cardinality"):
            model.fit(data, verbose=0)


# Random numbers


class DrawsNumbers(methods.Method):
    """Plain training that remembers what it has drawn."""

    draws_random_numbers = True

    def initial_state(self, variables):
        return [np.zeros((3,), "float32")]

    def step(self, objective, w, state):
        first, second = objective.random((3,)), objective.random((3,))
        return objective(w).gradient, [ops.where(first == second, -1.0, first)]


def test_random_numbers_are_new_in_each_step_and_the_same_in_all_parts(tmp_path):
    drawn = []
    model = train(DrawsNumbers(), steps=1, num_micro_batches=2)
    for _ in range(4):
        drawn.append(values(model.method_state)[0])
        model.train_on_batch(*models.regression())
    # Those of two parts would be averaged: equal numbers stay as they are.
    alone = train(DrawsNumbers(), steps=1)
    np.testing.assert_array_equal(values(alone.method_state)[0], drawn[0])
    numbers = np.concatenate(drawn)
    assert len(set(numbers)) == len(numbers)
    assert np.all((numbers >= 0) & (numbers < 1))


def test_random_numbers_go_on_where_a_file_was_saved(tmp_path):
    model = train(DrawsNumbers(), steps=2)
    model.save_weights(tmp_path / "model.weights.h5")
    other = SharpnessAwareModel(models.batchnorm_net(), DrawsNumbers())
    other.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    for one in (model, other):
        one.train_on_batch(*models.regression())
    np.testing.assert_array_equal(values(other.method_state)[0], values(model.method_state)[0])


def test_the_numbers_are_spread_as_they_should():
    objective = Objective(None, step=ops.convert_to_tensor(5), seed=ops.convert_to_tensor(7))
    numbers = ops.convert_to_numpy(objective.random((20000,)))
    assert numbers.dtype == np.float32
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(numbers.var() - 1 / 12) < 0.002


def test_without_a_seed_there_are_no_random_numbers():
    with pytest.raises(ValueError, match="draws_random_numbers = True"):
        Objective(None).random(())


# Conditionals and parts


def quadratic(w):
    return ops.sum(w[0] ** 2)


def test_a_conditional_keeps_account_of_one_branch():
    for flag, passes in ((True, 3), (False, 1)):
        objective, w = Objective(quadratic), [ops.convert_to_tensor([1.0, 2.0])]
        objective(w)

        def ask(objective=objective, w=w):
            objective([2 * w[0]])
            return [objective([3 * w[0]]).gradient[0], None]

        (value, none) = objective.cond(ops.convert_to_tensor(flag), ask, lambda w=w: [w[0], None])
        assert none is None
        np.testing.assert_allclose(ops.convert_to_numpy(value), [6, 12] if flag else [1, 2])
        assert float(objective.record.num_gradients) == passes
        assert float(objective.record.perturbed_loss) == (45 if flag else 5)
        assert float(objective.record.is_perturbed) == flag


def test_not_finite_in_a_branch_is_not_finite():
    w = [ops.convert_to_tensor([1.0])]
    objective = Objective(lambda w: ops.sum(ops.sqrt(w[0])))
    g = objective(w).gradient
    objective.cond(
        ops.convert_to_tensor(True), lambda: objective([-w[0]]).gradient[0], lambda: w[0]
    )
    assert not bool(objective.is_finite(g))


@COMPILED
def test_branches_that_differ_are_refused():
    model = SharpnessAwareModel(models.mlp(), Differs())
    model.compile("sgd", "mse", run_eagerly=False)
    with pytest.raises(ValueError, match="must return the same structure"):
        model.train_on_batch(*models.regression())


class Differs(methods.Method):
    def step(self, objective, w, state):
        g = objective(w).gradient
        return objective.cond(objective.step > 3, lambda: (g, state), lambda: (g, state, None, g))


@pytest.mark.parametrize("share", [0, 0.0, 1.5, "half"])
def test_a_part_is_a_share(share):
    with pytest.raises(ValueError, match=r"a float in \(0, 1\]"):
        Objective(quadratic).part(share)
    with pytest.raises(ValueError, match="ascent_share"):
        M.SAM(ascent_share=share if share != 0 else -1)


def test_the_exact_gradient_is_not_that_of_a_part():
    with pytest.raises(ValueError, match=r"second_order=True, ascent_share=0\.5"):
        M.SAM(ascent_share=0.5, second_order=True)


def test_an_objective_without_a_batch_has_no_parts():
    with pytest.raises(ValueError, match="knows of no batch"):
        Objective(quadratic).part(0.5)


class NeverAsks(methods.Method):
    def step(self, objective, w, state):
        return objective.part(0.5)(w).gradient, state


def test_a_step_that_reports_no_pass_is_refused():
    model = SharpnessAwareModel(models.mlp(), NeverAsks())
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match="NeverAsks, which took none"):
        model.train_on_batch(*models.regression())


# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P.Every("sam", 0), "`k`.*>= 1"),
        (lambda: P.Every("sam", 2.0), "`k`.*>= 1"),
        (lambda: P.From("sam", -1), "`start` must be a step"),
        (lambda: P.From("sam", 1.0), "`start` must be a step"),
        (lambda: P.Until("sam", True), "`end` must be a step"),
        (lambda: P.WithProbability("sam", 1.5), "at most 1"),
        (lambda: P.WithProbability("sam", -0.5), "`p` must be a finite number >= 0"),
        (lambda: P.WhenGradientNorm("sam", decay=1.0), r"`decay`.*\[0, 1\)"),
        (lambda: P.Every("sma"), "Did you mean 'sam'"),
        (lambda: P.From(P.From("sam", 3), 2), r"a number of the same name, \['start'\]"),
        (lambda: M.LookSAM(k=0), "`k`.*>= 1"),
        (lambda: M.MomentumSAM(momentum=1.0), r"`momentum`.*\[0, 1\)"),
        (lambda: M.FriendlySAM(decay=-0.1), r"`decay`.*\[0, 1\)"),
        (lambda: M.ESAM(beta=0.0), r"`beta`.*\(0, 1\]"),
        (lambda: M.ESAM(gamma=1.5), r"`gamma`.*\(0, 1\]"),
        (lambda: M.WSAM(gamma=1.0), "`gamma` must be below 1"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Where some weights are perturbed only: right, and without the gradients that nobody asks for."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_sharp import Objective, SharpnessAwareModel, methods, policies, sharpness_aware_gradient
from tests import models
from tests.models import BACKEND, values

# What is not perturbed has no gradient in the first pass


class CountingDense(keras.layers.Dense):
    """Counts how often the gradient of its kernel is computed, in compiled programs as well."""

    computed = 0

    def call(self, x):
        kernel = ops.convert_to_tensor(self.kernel)
        return _product(ops.convert_to_tensor(x), kernel, self._gradient) + self.bias

    def _gradient(self, x, g):
        self.computed += 1
        return np.asarray(x).T @ np.asarray(g)


def _product(x, kernel, gradient):
    """`x @ kernel`, whose derivative by the kernel is `gradient(x, g)`, a function of arrays."""
    if BACKEND == "torch":
        import torch

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, kernel):
                ctx.save_for_backward(x, kernel)
                return x @ kernel

            @staticmethod
            def backward(ctx, g):
                x, kernel = ctx.saved_tensors
                by_kernel = torch.as_tensor(gradient(x, g)) if ctx.needs_input_grad[1] else None
                return g @ kernel.T, by_kernel

        return Product.apply(x, kernel)
    if BACKEND == "jax":
        import jax

        @jax.custom_vjp
        def product(x, kernel):
            return x @ kernel

        def backward(saved, g):
            x, kernel = saved
            # Pure: what is not used is not run.
            by_kernel = jax.pure_callback(
                lambda x, g: gradient(x, g).astype("float32"),
                jax.ShapeDtypeStruct(kernel.shape, kernel.dtype),
                x,
                g,
            )
            return g @ kernel.T, by_kernel

        product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), backward)
        return product(x, kernel)
    import tensorflow as tf

    @tf.custom_gradient
    def product(x, kernel):
        def backward(g):
            by_kernel = tf.numpy_function(gradient, [x, g], kernel.dtype, stateful=False)
            return g @ tf.transpose(kernel), tf.ensure_shape(by_kernel, kernel.shape)

        return x @ kernel, backward

    return product(x, kernel)


def norm_net(dense=keras.layers.Dense):
    """A network with a normalization layer behind a dense one."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((3,)),
            dense(4, name="first"),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Activation("tanh"),
            keras.layers.Dense(1, name="last"),
        ]
    )


M, P = methods, policies
#: A method, arguments of the wrapper, and how often each step computes a gradient of the kernel.
COUNTS = {
    "all": (M.SAM, {"perturb": "all"}, 2),
    "sam": (M.SAM, {}, 1),
    "asam": (M.ASAM, {}, 1),
    "esam": (lambda: M.ESAM(gamma=1.0), {}, 1),
    "gsam_needs_all": (M.GSAM, {}, 2),
    "friendly_sam_needs_all": (M.FriendlySAM, {}, 2),
    "climbs_twice": (lambda: M.SAM(ascent_steps=2), {}, 1),
    "gsam_climbs_twice": (lambda: M.GSAM(ascent_steps=2), {}, 2),
    "ascent_share": (lambda: M.SAM(ascent_share=0.5), {}, 1),
    "every": (lambda: P.Every("sam", 2), {}, 1),
    "function": (M.SAM, {"perturb": lambda v: "last" in v.path}, 1),
    "micro_batches": (M.SAM, {"num_micro_batches": 2}, 2),
    "noise_of_its_own": (M.SAM, {"fresh_noise": True}, 1),
    "logs": (M.SAM, {"extra_logs": ["perturbed_loss", "sharpness", "num_gradients"]}, 1),
    "grad_norm_is_of_all": (M.SAM, {"extra_logs": ["grad_norm"]}, 2),
    "grad_cosine_is_of_all": (M.SAM, {"extra_logs": ["grad_cosine"]}, 2),
}
#: One of each kind.
TYPICAL = ("all", "sam", "gsam_needs_all", "every", "micro_batches", "grad_norm_is_of_all")


@pytest.mark.parametrize("name", [n if n in TYPICAL else models.slow(n) for n in COUNTS])
def test_the_first_pass_takes_the_gradient_of_perturbed_weights_alone(name):
    """Counted in the compiled program on TensorFlow and JAX."""
    make, kwargs, expected = COUNTS[name]
    inner = norm_net(CountingDense)
    dense = inner.get_layer("first")
    model = SharpnessAwareModel(inner, make(), **{"perturb": "norm_only", **kwargs})
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=BACKEND == "jax")
    x, y = models.regression()
    model.train_on_batch(x, y)
    for _ in range(3):
        before = dense.computed
        model.train_on_batch(x, y)
        assert dense.computed - before == expected


# It is right all the same


class Line:
    """A linear model with squared loss, in NumPy and float64: the gradient by kernel and bias."""

    def __init__(self, seed):
        self.x, self.y = models.regression(8, seed=seed)

    def losses(self, w):
        return ((self.x @ w[:3] + w[3] - self.y) ** 2)[:, 0]

    def gradient(self, w, rows=slice(None)):
        x = np.concatenate([self.x, np.ones((8, 1))], axis=1)[rows]
        return 2 * x.T @ (x @ w - self.y[rows]) / len(x)


def unit(g):
    return g / np.linalg.norm(g)


def sam(line, w, part, steps=1, rows=slice(None)):
    e = 0.3 * unit(part * line.gradient(w, rows))
    for _ in range(steps - 1):
        e = e + 0.3 * unit(part * line.gradient(w + e))
        e = e * min(1.0, 0.3 / np.linalg.norm(e))
    return line.gradient(w + e)


def asam(line, w, part):
    scale = np.abs(w) + 0.01
    scale[3] = 1.0
    g = part * line.gradient(w)
    return line.gradient(w + 0.3 * scale * unit(scale * g))


def esam(line, w, part):
    w_adv = w + 0.3 * unit(part * line.gradient(w))
    rise = line.losses(w_adv) - line.losses(w)
    return line.gradient(w_adv, np.argsort(rise)[-4:])


def second_order(line, w, part):
    """Of a quadratic, by its Hessian: `(I + de/dw)' g_adv`."""
    x = np.concatenate([line.x, np.ones((8, 1))], axis=1).astype("float64")
    hessian, g = 2 * x.T @ x / 8, part * line.gradient(w)
    u, size = unit(g), np.linalg.norm(g)
    turn = 0.3 / size * (np.eye(4) - u @ u.T) @ (part * hessian)
    return (np.eye(4) + turn).T @ line.gradient(w + 0.3 * u)


RULES = {
    "sam": (lambda: M.SAM(0.3), sam),
    "asam": (lambda: M.ASAM(0.3), asam),
    "esam": (lambda: M.ESAM(0.3, beta=1.0, gamma=0.5), esam),
    "climbs_twice": (lambda: M.SAM(0.3, ascent_steps=2), lambda *a: sam(*a, steps=2)),
    "ascent_share": (
        lambda: M.SAM(0.3, ascent_share=0.5),
        lambda *a: sam(*a, rows=slice(0, 4)),
    ),
    "second_order": (lambda: M.SAM(0.3, second_order=True), second_order),
    "never": (lambda: P.From(M.SAM(0.3), 100), lambda line, w, part: line.gradient(w)),
    "zero": (lambda: M.SAM(0.0), lambda line, w, part: line.gradient(w)),
    "zero_esam": (
        lambda: M.ESAM(0.0, gamma=0.5),
        lambda line, w, part: line.gradient(w),
    ),
}


@pytest.mark.parametrize(
    ("name", "perturbed"),
    [
        (name, perturbed)
        for name in RULES
        for perturbed in ("kernel", "bias")
        # Of one number, the bias, to climb twice is to climb once.
        if (name, perturbed) != ("climbs_twice", "bias")
    ],
)
def test_a_training_is_that_of_the_formula(name, perturbed):
    make, rule = RULES[name]
    inner = models.linear(use_bias=True)
    w = np.random.default_rng(3).normal(size=(4, 1))
    part = np.float64([[perturbed == "kernel"]] * 3 + [[perturbed == "bias"]])
    inner.set_weights([w[:3].astype("float32"), w[3].astype("float32")])
    model = SharpnessAwareModel(inner, make(), perturb=lambda v: v.name == perturbed)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    for step in range(3):
        line = Line(step)
        model.train_on_batch(line.x, line.y)
        w = w - 0.05 * rule(line, w, part)
        kernel, bias = values(inner.trainable_variables)
        np.testing.assert_allclose([*kernel[:, 0], bias[0]], w[:, 0], rtol=1e-4, atol=1e-5)


def test_a_method_in_a_policy_is_itself_where_all_gradients_are_of_the_norms():
    """One branch takes the gradient by the norms at first, the other one by all weights."""
    x, y = models.regression()
    weights = []
    for method in (M.SAM(0.3), P.Every(M.SAM(0.3), 1)):
        inner = norm_net()
        model = SharpnessAwareModel(inner, method, perturb="norm_only")
        model.compile(keras.optimizers.SGD(0.05), "mse")
        for _ in range(3):
            model.train_on_batch(x, y)
        weights.append(values(inner.trainable_variables))
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_norm_in_the_logs_is_that_of_the_whole_gradient():
    x, y = models.regression()
    norms = []
    for perturb in ("all", "norm_only"):
        inner = norm_net()
        model = SharpnessAwareModel(inner, perturb=perturb, extra_logs=["grad_norm"])
        model.compile(keras.optimizers.SGD(0.0), "mse")
        norms.append(float(model.train_on_batch(x, y, return_dict=True)["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


class Idle(keras.layers.Layer):
    """Has a weight that it does not use."""

    def build(self, shape):
        self.spare = self.add_weight(shape=(2,), initializer="ones", name="spare")

    def call(self, x):
        return x


def test_where_the_loss_does_not_depend_on_what_is_perturbed_training_is_plain():
    x, y = models.regression()
    weights = []
    for method in ("sam", None):
        keras.utils.set_random_seed(1)
        inner = keras.Sequential([keras.Input((3,)), Idle(), keras.layers.Dense(1)])
        model = SharpnessAwareModel(inner, method, perturb=lambda v: v.name == "spare")
        model.compile(keras.optimizers.SGD(0.05), "mse")
        for _ in range(2):
            model.train_on_batch(x, y)
        assert int(model.skipped_steps) == 0
        weights.append(values(inner.trainable_variables))
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# The objective


def of_two(**kwargs):
    return Objective(lambda w: ops.sum(w[0] ** 2) + 3 * ops.sum(w[1]), **kwargs)


W = [np.float32([1.0, 2.0]), np.float32([3.0])]


def test_the_way_up_is_known_where_the_gradient_is_and_not_the_other_way_round():
    w = [ops.convert_to_tensor(t) for t in W]
    objective = of_two(perturbed=[False, True])
    up = objective.uphill(w)
    assert up.gradient[0] is None
    np.testing.assert_array_equal(ops.convert_to_numpy(up.gradient[1]), [3.0])
    assert float(up.loss) == 14.0
    assert objective.uphill(w) is up
    assert float(objective.record.num_gradients) == 1
    whole = objective(w)
    np.testing.assert_array_equal(ops.convert_to_numpy(whole.gradient[0]), [2.0, 4.0])
    assert float(objective.record.num_gradients) == 2
    assert objective(w) is whole
    assert float(objective.record.num_gradients) == 2

    objective = of_two(perturbed=[False, True])
    assert objective(w) is objective.uphill(w)
    assert float(objective.record.num_gradients) == 1


@pytest.mark.parametrize("perturbed", [None, [True, True], [False, False]])
def test_where_all_weights_or_none_are_perturbed_the_way_up_is_the_gradient(perturbed):
    w = [ops.convert_to_tensor(t) for t in W]
    objective = of_two(perturbed=perturbed)
    assert all(t is not None for t in objective.uphill(w).gradient)
    assert objective(w) is objective.uphill(w)


def test_gradients_of_frozen_weights_are_taken_all_the_same():
    """A float8 layer hands on its next scales in their place, of the pass that is reported."""
    w = [ops.convert_to_tensor(t) for t in [*W, np.float32([5.0])]]
    objective = Objective(
        lambda w: ops.sum(w[0]) + ops.sum(w[1]) + 7 * ops.sum(w[2]),
        perturbed=[False, True, False],
        frozen=[False, False, True],
    )
    gradient = objective.uphill(w).gradient
    assert [t is None for t in gradient] == [True, False, True]
    frozen = objective.record.report.frozen
    assert frozen[:2] == [None, None]
    np.testing.assert_array_equal(ops.convert_to_numpy(frozen[2]), [7.0])


@pytest.mark.parametrize("perturbed", [[False, True], [False, False]])
def test_a_loop_of_ones_own_saves_it_as_well(perturbed):
    w = [ops.convert_to_tensor(t) for t in W]
    result = sharpness_aware_gradient(
        lambda w: ops.sum(w[0] ** 2) + ops.sum(w[1] ** 2), w, M.SAM(0.5), perturbed=perturbed
    )
    direction = [ops.convert_to_numpy(t) for t in result.direction]
    np.testing.assert_allclose(direction[0], [2.0, 4.0])
    np.testing.assert_allclose(direction[1], [7.0] if perturbed[1] else [6.0])

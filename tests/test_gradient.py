"""`sharpness_aware_gradient`: the wrapper's step in a loop of one's own, pure, and compiled."""

import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_sharp import (
    SharpnessAwareModel,
    methods,
    neighborhoods,
    policies,
    sharpness_aware_gradient,
)
from keras_sharp.schedules import ProportionalToLearningRate, WarmUp
from tests import models
from tests.models import BACKEND, assert_close, values

AS_WRITTEN = pytest.mark.usefixtures("as_written")
X, Y = models.regression()


def loss_of(model, x, y):
    """Loss and new statistics of a Keras model as a pure function of its weights."""
    others = [ops.copy(v) for v in model.non_trainable_variables]

    def loss_fn(w):
        y_pred, state = model.stateless_call(w, others, x, training=True)
        return ops.mean(ops.square(y_pred - y)), state

    return loss_fn


def weights_of(model):
    """The weights of a model, in the form that this backend's users have at hand."""
    variables = model.trainable_variables
    return [v.value for v in variables] if BACKEND == "jax" else variables


def gradient_of(model, method, x=X, y=Y, **kwargs):
    if BACKEND == "jax":
        kwargs.setdefault("biases", [v.name in ("bias", "beta") for v in model.trainable_variables])
    loss_fn = loss_of(model, ops.convert_to_tensor(x), ops.convert_to_tensor(y))
    return sharpness_aware_gradient(loss_fn, weights_of(model), method, has_aux=True, **kwargs)


def quadratic(w):
    return 0.5 * ops.sum(w[0] ** 2)


def tensor(*entries):
    return ops.convert_to_tensor(np.array(entries, "float32"))


def dropout_net():
    return models.dropout_net(dropout_seed=7)


# The same step as the wrapper's


class Average(methods.Method):
    """SAM along a moving average of the gradients: a method with a memory."""

    rho = methods.SAM.rho

    def __init__(self, rho=0.05, **kwargs):
        super().__init__(**kwargs)
        self.rho = rho

    def initial_state(self, variables):
        return [np.zeros(v.shape, v.dtype) for v in variables]

    def step(self, objective, w, state, rho):
        g = objective(w).gradient
        average = [0.5 * a + 0.5 * t for a, t in zip(state, g, strict=True)]
        e = self.perturbation(objective, w, average, rho)
        return objective([t + d for t, d in zip(w, e, strict=True)]).gradient, average


#: Methods that need no more than a function of the weights.
NAMES = [name for name in methods.METHODS if name != "esam"]

CASES = {
    "plain": lambda: None,
    **{name: (lambda cls=methods.METHODS[name]: cls(rho=0.3)) for name in NAMES},
    "three steps": lambda: methods.SAM(0.3, ascent_steps=3),
    "second order": lambda: methods.GSAM(0.3, second_order=True),
    "three steps of second order": lambda: methods.ASAM(0.3, ascent_steps=3, second_order=True),
    "maximum": lambda: methods.BSAM(0.1, neighborhood=neighborhoods.Ball(np.inf)),
    "unnormalized": lambda: methods.SAM(0.1, neighborhood="unnormalized"),
    "schedule": lambda: methods.SAM(keras.optimizers.schedules.PolynomialDecay(0.3, 2, 0.1)),
    "warm-up": lambda: methods.BSAM(WarmUp(0.3, steps=3)),
    "memory": lambda: Average(0.3),
}
#: One of each kind.
TYPICAL = ("plain", "sam", "bsam", "looksam", "three steps of second order", "schedule", "memory")


@AS_WRITTEN
@pytest.mark.parametrize(
    ("case", "build"),
    [
        (pytest.param if case in TYPICAL else models.slow)(case, models.batchnorm_net)
        for case in CASES
    ]
    + [(case, dropout_net) for case in ("sam", "three steps", "second order")],
)
def test_a_loop_by_hand_takes_the_steps_of_the_wrapper(case, build):
    """Weights, statistics of BatchNormalization, dropout masks and memory, over three steps."""
    inner, own = models.twins(build)
    wrapper = SharpnessAwareModel(inner, CASES[case]())
    for model in (wrapper, own):
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    method, memory = CASES[case](), None
    for step in range(3):
        x, y = models.regression(seed=step)
        logs = wrapper.train_on_batch(x, y, return_dict=True)
        result = gradient_of(own, method, x, y, memory=memory, step=own.optimizer.iterations
                             if BACKEND != "jax" else step)  # fmt: skip
        memory = result.memory
        models.apply(own, values(result.direction))
        models.assign(own.non_trainable_variables, result.aux)
        np.testing.assert_allclose(float(result.loss), logs["loss"], rtol=1e-5)
        assert bool(result.finite)
        assert_close(own.variables[: len(inner.variables)], values(inner.variables))
        assert_close(memory, values(wrapper.method_state))
    assert len(memory) == len(wrapper.method_state)
    assert case != "memory" or memory != []


@AS_WRITTEN
def test_only_the_weights_that_are_marked_are_perturbed():
    inner, own = models.twins(models.batchnorm_net)
    marks = [v.name in ("gamma", "beta") for v in own.trainable_variables]
    assert any(marks)
    assert not all(marks)
    wrapper = SharpnessAwareModel(inner, methods.SAM(0.3), perturb="norm_only")
    for model in (wrapper, own):
        model.compile(keras.optimizers.SGD(0.1), "mse")
    wrapper.train_on_batch(X, Y)
    models.apply(own, values(gradient_of(own, methods.SAM(0.3), perturbed=marks).direction))
    assert_close(own.trainable_variables, values(inner.trainable_variables))


@AS_WRITTEN
def test_tensors_are_weights_like_variables():
    model = models.mlp()
    biases = [v.name == "bias" for v in model.trainable_variables]
    loss_fn = loss_of(model, ops.convert_to_tensor(X), ops.convert_to_tensor(Y))
    w = [ops.convert_to_tensor(a) for a in values(model.trainable_variables)]
    method = methods.ASAM(0.3)
    told = sharpness_aware_gradient(loss_fn, w, method, has_aux=True, biases=biases).direction
    assert_close(told, values(gradient_of(model, method).direction))
    untold = sharpness_aware_gradient(loss_fn, w, method, has_aux=True).direction
    assert not np.allclose(values(untold)[0], values(told)[0], rtol=1e-3)


@pytest.mark.skipif(BACKEND != "torch", reason="a module of PyTorch")
def test_parameters_of_a_torch_module():
    import torch

    module = torch.nn.Linear(3, 1)
    x, y = torch.as_tensor(X), torch.as_tensor(Y)

    def loss_fn(w):
        return ((torch.func.functional_call(module, w, x) - y) ** 2).mean()

    w = dict(module.named_parameters())
    result = sharpness_aware_gradient(loss_fn, w, methods.SAM(0.3))
    g = torch.autograd.grad(loss_fn(w), list(w.values()))
    norm = torch.sqrt(sum((t**2).sum() for t in g))
    moved = {k: (p + 0.3 * t / norm).detach() for (k, p), t in zip(w.items(), g, strict=True)}
    expected = torch.autograd.grad(
        loss_fn({k: p.requires_grad_() for k, p in moved.items()}), list(moved.values())
    )
    assert result.direction.keys() == w.keys()
    assert_close([result.direction[name] for name in w], values(expected))
    assert all(p.grad is None for p in module.parameters())
    assert not result.loss.requires_grad
    assert not any(d.requires_grad for d in result.direction.values())


# Structures, aux, weights without a gradient


@AS_WRITTEN
def test_the_direction_has_the_structure_of_the_weights():
    w = {"b": [tensor(3.0)], "a": (tensor(4.0), {"c": tensor(0.0)})}

    def loss_fn(w):
        return 0.5 * ops.sum(w["b"][0] ** 2 + w["a"][0] ** 2 + w["a"][1]["c"] ** 2)

    direction = sharpness_aware_gradient(loss_fn, w, methods.SAM(0.5)).direction
    found = keras.tree.map_structure(lambda t: pytest.approx(float(t[0])), direction)
    assert found == {"b": [3.3], "a": (4.4, {"c": 0.0})}


@AS_WRITTEN
def test_what_comes_beside_the_loss_is_that_of_the_weights():
    """And not that of a perturbed pass, of which BSAM has two."""
    result = sharpness_aware_gradient(
        lambda w: (quadratic(w), {"seen": w[0]}), [tensor(3.0, 4.0)], "bsam", has_aux=True
    )
    np.testing.assert_array_equal(values([result.aux["seen"]])[0], [3.0, 4.0])
    assert float(result.loss) == 12.5
    assert sharpness_aware_gradient(quadratic, [tensor(3.0, 4.0)], "bsam").aux is None


@AS_WRITTEN
def test_a_weight_that_takes_no_part_has_no_direction():
    used, unused = sharpness_aware_gradient(quadratic, [tensor(3.0), tensor(1.0)], "gsam").direction
    assert float(used[0]) == pytest.approx(3.05)
    if BACKEND == "jax":  # JAX does not tell the two apart.
        assert float(unused[0]) == 0.0
    else:
        assert unused is None


# Purity


@AS_WRITTEN
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written(name):
    model = models.batchnorm_net()
    method, before = methods.get(name), values(model.variables)
    settings = {k: float(s.variable) for k, s in method.settings.items()}
    first = gradient_of(model, method, rho=0.3, step=0)
    second = gradient_of(model, method, rho=0.3, step=0)
    models.assert_same(model.variables, before, bits=True)
    assert {k: float(s.variable) for k, s in method.settings.items()} == settings
    assert not method.in_training
    models.assert_same(second.direction, values(first.direction), bits=True)


@AS_WRITTEN
def test_the_memory_is_handed_in_and_out():
    method, w = Average(0.5), [tensor(3.0, 4.0)]
    first = sharpness_aware_gradient(quadratic, w, method)
    np.testing.assert_allclose(values(first.memory)[0], [1.5, 2.0])
    again = sharpness_aware_gradient(quadratic, w, method, first.memory)
    np.testing.assert_allclose(values(again.memory)[0], [2.25, 3.0])
    np.testing.assert_allclose(values(first.memory)[0], [1.5, 2.0])
    start = method.initial_state([np.zeros(2, "float32")])
    same = sharpness_aware_gradient(quadratic, w, method, start)
    np.testing.assert_array_equal(values(same.memory)[0], values(first.memory)[0])


# Compiled


def compiled(fn):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(fn, reduce_retracing=True)
    if BACKEND == "jax":
        import jax

        return jax.jit(fn)
    return fn


@pytest.mark.parametrize("make", [lambda: Average(0.3), lambda: methods.BSAM(0.3)])
def test_it_is_compiled_into_the_users_own_step(make):
    """Once for all steps, with the memory and the number of the step handed in."""
    method, traces = make(), []
    model = models.batchnorm_net()
    biases = [v.name in ("bias", "beta") for v in model.trainable_variables]

    def train_step(w, memory, x, y, rho):
        traces.append(1)
        return sharpness_aware_gradient(
            loss_of(model, x, y), w, method, memory, has_aux=True, biases=biases, rho=rho
        )[:3]

    fast = compiled(train_step)
    w = [ops.convert_to_tensor(a) for a in values(model.trainable_variables)]
    memory = [ops.convert_to_tensor(a) for a in method.initial_state(model.trainable_variables)]
    for rho in (0.1, 0.3):
        x, y = models.tensors(models.regression(seed=int(10 * rho)))
        loss, direction, new_memory = fast(w, memory, x, y, ops.convert_to_tensor(rho))
        expected = gradient_of(model, method, x, y, memory=memory, rho=rho)
        np.testing.assert_allclose(float(loss), float(expected.loss), rtol=1e-5)
        assert_close(direction, values(expected.direction))
        assert_close(new_memory, values(expected.memory))
        memory = new_memory
    if BACKEND != "torch":
        assert len(traces) == 1


@pytest.mark.skipif(BACKEND != "tensorflow", reason="variables in a graph")
def test_in_a_graph_the_present_values_of_variables_and_of_rho_are_read():
    method, v = methods.SAM(0.5), keras.Variable([3.0, 4.0])
    fast = compiled(lambda: sharpness_aware_gradient(quadratic, [v], method).direction)
    np.testing.assert_allclose(values(fast())[0], [3.3, 4.4], rtol=1e-6)
    v.assign([6.0, 8.0])
    method.rho = 1.0
    np.testing.assert_allclose(values(fast())[0], [6.6, 8.8], rtol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="variables in a graph")
def test_in_a_graph_a_method_must_have_been_made_outside():
    with pytest.raises(ValueError, match=r"created outside tf\.function"):
        compiled(lambda w: sharpness_aware_gradient(quadratic, [w], "sam").loss)(tensor(1.0))


# Hyperparameters


def rise(method, **kwargs):
    """How far SAM's adversary went: on this quadratic the direction is `w + rho * w / ‖w‖`."""
    result = sharpness_aware_gradient(quadratic, [tensor(3.0, 4.0)], method, **kwargs)
    return float(np.linalg.norm(values(result.direction)[0])) - 5.0


@AS_WRITTEN
def test_rho_of_one_step():
    method = methods.SAM(rho=0.5)
    assert rise(method) == pytest.approx(0.5, rel=1e-5)
    assert rise(method, rho=0.25) == pytest.approx(0.25, rel=1e-5)
    assert rise(method, rho=tensor(0.75)[0]) == pytest.approx(0.75, rel=1e-5)
    assert rise(method, rho=np.float32(0)) == 0.0


@AS_WRITTEN
def test_rho_follows_the_step():
    method = methods.SAM(rho=keras.optimizers.schedules.PolynomialDecay(0.5, 10, 0.0))
    assert rise(method, step=5) == pytest.approx(0.25, rel=1e-5)
    assert rise(method, step=ops.convert_to_tensor(10)) == pytest.approx(0.0, abs=1e-5)
    assert rise(methods.SAM(WarmUp(0.5, steps=4)), step=1) == pytest.approx(0.125, rel=1e-4)
    with pytest.raises(ValueError, match=r"schedule of the step.*step=optimizer.iterations"):
        rise(method)
    with pytest.raises(ValueError, match=r"step=optimizer\.iterations"):
        rise(methods.SAM(WarmUp(ProportionalToLearningRate(0.5), steps=4)))


@AS_WRITTEN
def test_rho_follows_the_learning_rate():
    method = methods.SAM(ProportionalToLearningRate(0.5, max_learning_rate=0.1))
    assert rise(method, learning_rate=0.02) == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(ValueError, match=r"follows the learning rate.*learning_rate=None"):
        rise(method)
    constant = methods.SAM(ProportionalToLearningRate(0.5))
    assert rise(constant) == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(ValueError, match=r"max_learning_rate=None, learning_rate=0\.02"):
        rise(constant, learning_rate=0.02)


@AS_WRITTEN
def test_bsam_looks_down_as_far_as_up_unless_told():
    """With `rho` of one step, too."""

    def loss(w):
        return ops.sum(ops.exp(w[0]))

    w = [tensor(0.3, -0.2)]
    expected = values(sharpness_aware_gradient(loss, w, methods.BSAM(0.2, 0.2)).direction)[0]
    found = sharpness_aware_gradient(loss, w, methods.BSAM(0.05), rho=0.2).direction
    np.testing.assert_allclose(values(found)[0], expected, rtol=1e-6)


# Not finite


@AS_WRITTEN
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_told(name):
    method, memory = methods.get(name), None
    if name in ("momentum_sam", "async_sam"):  # They go along their memory: up the loss.
        memory = [tensor(-1.0 if name == "momentum_sam" else 1.0)]

    def loss_fn(w):  # Finite at the weights; not at the adversary.
        return ops.sum(ops.where(w[0] > 1.0, np.nan, 1.0) * w[0])

    def ask(loss_fn, w, **kwargs):
        return sharpness_aware_gradient(loss_fn, [tensor(w)], method, memory, step=0, **kwargs)

    assert bool(ask(quadratic, 1.0).finite)
    at_adversary = ask(loss_fn, 1.0, rho=0.5)
    assert memory or float(at_adversary.loss) == 1.0
    assert not bool(at_adversary.finite)
    at_weights = ask(quadratic, np.inf)
    assert not bool(at_weights.finite)


@AS_WRITTEN
def test_a_direction_that_overflows_is_told():
    class Huge(methods.Method):
        def direction(self, objective, w, g):
            return [t * 1e30 for t in g]

    assert not bool(sharpness_aware_gradient(quadratic, [tensor(1e15)], Huge()).finite)
    assert bool(sharpness_aware_gradient(quadratic, [tensor(1.0)], Huge()).finite)


# Errors


W = [tensor(3.0, 4.0)]
LINEAR = keras.optimizers.schedules.PolynomialDecay(0.1, 10)
ERRORS = {
    "no such method": ((quadratic, W, "sma"), {}, ValueError, "no method named 'sma'"),
    "an optimizer": ((quadratic, W, "adam"), {}, ValueError, "is none itself"),
    "no weights": (
        (quadratic, [], "sam"),
        {},
        ValueError,
        "at least one weight. Received: .*built",
    ),
    "arrays": ((quadratic, [np.ones(2)], "sam"), {}, ValueError, "convert_to_tensor"),
    "None": ((quadratic, [*W, None], "sam"), {}, ValueError, "Received an entry None"),
    "integers": (
        (quadratic, [ops.convert_to_tensor([1, 2])], "sam"),
        {},
        ValueError,
        "must be float tensors",
    ),
    "a loss per example": (
        (lambda w: w[0] ** 2, W, "sam"),
        {},
        ValueError,
        r"scalar tensor, of shape \(\). Received: the shape \(2,\). Take the mean",
    ),
    "no loss": ((lambda w: None, W, "sam"), {}, ValueError, "scalar tensor.* Received: None"),
    "a pair": (
        (lambda w: (quadratic(w), 1), W, "sam"),
        {},
        ValueError,
        "Received: has_aux=False, and a `loss_fn` that returned",
    ),
    "no pair": ((quadratic, W, "sam"), {"has_aux": True}, ValueError, r"pair `\(loss, aux\)`"),
    "memory": ((quadratic, W, "sam", 3), {}, ValueError, "Received: memory=3"),
    "biases": (
        (quadratic, W, "asam"),
        {"biases": [True, False]},
        ValueError,
        "one Boolean for each of the 1 weights. Received: biases=",
    ),
    "perturbed": ((quadratic, W, "sam"), {"perturbed": ["w"]}, ValueError, "perturbed=.'w'"),
    "a misspelt number": ((quadratic, W, "sam"), {"roh": 1.0}, TypeError, "Did you mean 'rho'"),
    "a negative rho": ((quadratic, W, "sam"), {"rho": -1.0}, ValueError, "finite number >= 0"),
    "rho for each weight": ((quadratic, W, "sam"), {"rho": W[0]}, ValueError, "shape .2,"),
    "a schedule of one step": ((quadratic, W, "sam"), {"rho": LINEAR}, ValueError, "to the method"),
}


@AS_WRITTEN
@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    args, kwargs, error, message = ERRORS[case]
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        sharpness_aware_gradient(*args, **kwargs)


@AS_WRITTEN
@pytest.mark.skipif(BACKEND == "jax", reason="JAX does not tell 0 from no gradient")
def test_a_loss_of_other_weights_is_refused():
    """The usual slip: the model is called, and not the function of the weights."""
    model = models.mlp()
    with pytest.raises(ValueError, match=r"depends on none of them.*stateless_call"):
        sharpness_aware_gradient(
            lambda w: ops.mean(model(X, training=True)), model.trainable_variables, "sam"
        )
    with pytest.raises(ValueError, match="depends on none of them"):
        sharpness_aware_gradient(lambda w: ops.sum(tensor(1.0)), W, "sam")


@pytest.mark.skipif(BACKEND != "jax", reason="the others read a variable when the step runs")
def test_on_jax_variables_are_refused():
    model = models.mlp()
    with pytest.raises(ValueError, match=r"On JAX `weights` must be tensors.*variable.value"):
        sharpness_aware_gradient(quadratic, model.trainable_variables, "sam")
    with pytest.raises(ValueError, match="On JAX `step` must be tensors"):
        sharpness_aware_gradient(quadratic, W, "sam", step=keras.optimizers.SGD().iterations)


def test_a_method_that_goes_by_the_step_is_told_it():
    """Without, it would take each step for the first one, and always look."""
    w, memory = [tensor(3.0, 4.0)], None
    with pytest.raises(ValueError, match=r"goes by the number of steps.*step=optimizer.iterations"):
        sharpness_aware_gradient(quadratic, w, methods.LookSAM())
    losses = []
    for step in range(3):
        result = sharpness_aware_gradient(
            quadratic, w, policies.Every(methods.SAM(rho=1.0), 2), memory, step=step
        )
        memory = result.memory
        losses.append(values(result.direction)[0])
    np.testing.assert_array_equal(losses[0], losses[2])
    assert np.all(losses[0] > losses[1])  # Farther up, the quadratic is steeper.


def test_a_method_that_by_passes_the_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"WSAM by-passes the optimizer.*decoupled=False"):
        sharpness_aware_gradient(
            lambda w: ops.sum(w[0] ** 2), [ops.ones(2)], methods.WSAM(decoupled=True)
        )


def test_a_method_that_draws_random_numbers_is_refused():
    with pytest.raises(ValueError, match="WithProbability draws random numbers"):
        sharpness_aware_gradient(quadratic, [tensor(1.0)], policies.WithProbability("sam"))

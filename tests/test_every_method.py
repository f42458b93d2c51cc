"""The ten laws that `keras_sharp.methods.Method` promises, for every method in the table.

The laws of pure functions are tested in float64, on vectors of a dozen numbers; those of
training on a model with BatchNormalization.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import pytest
from keras import ops

from keras_sharp import Objective, SharpnessAwareModel, methods, neighborhoods
from keras_sharp.methods import METHODS
from tests import models, oracles
from tests.models import BACKEND, assert_same, values
from tests.oracles import REGIONS


class Case(NamedTuple):
    """What the tests know of a method.

    Args:
        oracle: its rule, from the paper.
        hyperparameters: the values that the tests use; those named rho... are radii.
        gradients: how many gradients one step takes.
        region: of a method with a neighborhood of its own, the name of that.
    """

    oracle: Callable
    hyperparameters: dict
    gradients: int = 2
    region: str | None = None


#: One entry for each method. A method without an entry fails in every test.
CASES = {
    "sam": Case(oracles.sam, {"rho": 0.3}),
    "asam": Case(oracles.sam, {"rho": 0.3}, region="adaptive"),
    "gsam": Case(oracles.gsam, {"rho": 0.3, "alpha": 0.7}),
    "adaptive_gsam": Case(oracles.gsam, {"rho": 0.3, "alpha": 0.7}, region="weight_scaled"),
    "bsam": Case(oracles.bsam, {"rho": 0.3, "rho_min": 0.2}, gradients=3),
}

EVERY_METHOD = pytest.mark.parametrize("name", METHODS)


def pairs(few):
    """Each method in each neighborhood that it can be combined with.

    A neighborhood is the same object in the hands of all methods. Where `few`, the others
    than SAM meet the Euclidean ball and one that is clipped; the rest is marked slow.
    """
    for name in METHODS:
        own = CASES[name].region if name in CASES else None
        for region in [own] if own else REGIONS:
            thin = few and not (own or name == "sam" or region in ("ball_2", "adaptive_inf"))
            marks = [pytest.mark.slow] if thin else []
            yield pytest.param(name, region, id=f"{name}-{region}", marks=marks)


EVERY_PAIR = pytest.mark.parametrize(("name", "region"), list(pairs(few=False)))
MOST_PAIRS = pytest.mark.parametrize(("name", "region"), list(pairs(few=True)))
FIRST_ORDER = {"ascent_steps": 1, "second_order": False}
VARIANTS = [
    pytest.param(FIRST_ORDER, id="one_step"),
    pytest.param({"ascent_steps": 3}, id="three_steps"),
    pytest.param({"second_order": True}, id="second_order"),
]
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def make(name, region=None, variant=FIRST_ORDER, **hyperparameters):
    """A method, in a region and with the hyperparameters of its case."""
    case = CASES[name]
    arguments = {**case.hyperparameters, **variant, **hyperparameters}
    if region is not None and case.region is None:
        arguments["neighborhood"] = make_region(region)
    method = METHODS[name](**arguments)
    if region is not None:
        expected = make_region(region)
        assert type(method.neighborhood) is type(expected)
        assert method.neighborhood.get_config() == expected.get_config()
    return method


def make_region(region):
    return getattr(neighborhoods, REGIONS[region].of)(**REGIONS[region].arguments)


def without_radius(name):
    """The hyperparameters of a case with all radii 0."""
    return {
        key: 0.0 if key.startswith("rho") else value
        for key, value in CASES[name].hyperparameters.items()
    }


def tanh_net(net, float64):
    """The loss of `oracles.TanhNet` in keras.ops."""
    x, y = float64.tensors([net.x, net.y])

    def loss(w):
        hidden = ops.tanh(ops.matmul(x, w[0]) + w[1])
        return ops.mean((ops.matmul(hidden, w[2]) - y) ** 2)

    return loss


def quadratic(form, float64):
    """The loss of `oracles.Quadratic` in keras.ops."""
    hessian = float64.tensor(form.hessian)

    def loss(w):
        flat = ops.concatenate([ops.reshape(t, (-1,)) for t in w])
        return 0.5 * ops.sum(flat * ops.matmul(hessian, flat))

    return loss


def start_of(loss, float64):
    return float64.tensors(oracles.split(loss.start, loss.shapes))


def take(method, objective, w, **hyperparameters):
    """One step of a method by itself: the gradient and the direction."""
    _, g = objective(w)
    state = [ops.convert_to_tensor(a) for a in method.initial_state(w)]
    settings = {
        key: setting.value_at(0, None) if setting.schedule is None else None
        for key, setting in method.settings.items()
    }
    direction, new_state = method.step(objective, w, g, state, **{**settings, **hyperparameters})
    assert len(new_state) == len(state)
    return g, direction


def in_float64(name, float64):
    """The hyperparameters of a case: those of a method are kept in float32."""
    return {key: float64.tensor(v) for key, v in CASES[name].hyperparameters.items()}


def expected_direction(name, region, loss, ascent_steps=1, second_order=False):
    """What the oracles say."""
    case, bias = CASES[name], oracles.mask(loss.biases, loss.shapes)

    def ascent(w, rho):
        return oracles.ascend(REGIONS[region], loss.gradient, w, bias, rho, ascent_steps)

    at = oracles.at_adversary(loss, loss.start, ascent, second_order)
    flat = case.oracle(at, loss.gradient(loss.start), **case.hyperparameters)
    return oracles.split(flat, loss.shapes)


class Spy(Objective):
    """An objective that writes down the points at which it is asked."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.points = []

    def __call__(self, w):
        self.points.append(w)
        return super().__call__(w)


def test_every_method_has_a_case():
    """Whoever adds a method says here what it promises: a rule, its numbers, its cost."""
    assert set(CASES) == set(METHODS)
    for name, case in CASES.items():
        assert set(case.hyperparameters) == set(METHODS[name]().settings)


def test_every_neighborhood_has_an_oracle():
    assert {r.of for r in REGIONS.values()} == {
        c.__name__ for c in neighborhoods.NEIGHBORHOODS.values()
    }


def test_every_public_method_is_in_the_table():
    public = [getattr(methods, name) for name in methods.__all__]
    classes = {c for c in public if isinstance(c, type) and issubclass(c, methods.Method)}
    assert set(METHODS.values()) == classes - {methods.Method}


# Law 1: with rho = 0 the direction is the gradient


@MOST_PAIRS
@EVERY_VARIANT
def test_rho_zero_gives_the_gradient(name, region, variant, float64):
    net = oracles.TanhNet()
    method = make(name, region, variant, **without_radius(name))
    objective = Objective(tanh_net(net, float64), biases=net.biases)
    g, direction = take(method, objective, start_of(net, float64))
    for a, e in zip(float64.arrays(direction), float64.arrays(g), strict=True):
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("size", [1e-15, 1e-3, 1e3, 1e18])
@EVERY_METHOD
def test_rho_zero_gives_the_gradient_also_in_float32_at_any_size(name, size):
    gradient = np.random.default_rng(0).normal(size=9).astype("float32") * np.float32(size)
    tensor = ops.convert_to_tensor(gradient)
    w = [ops.convert_to_tensor(np.ones(9, "float32"))]
    _, direction = take(
        make(name, **without_radius(name)), Objective(lambda w: ops.sum(tensor * w[0])), w
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(direction[0]), gradient)


def compiled(model, optimizer=None, **kwargs):
    model.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.9), "mse", **kwargs)
    return model


def wrap(inner, method, **kwargs):
    return compiled(SharpnessAwareModel(inner, method), **kwargs)


@EVERY_METHOD
def test_rho_zero_is_the_base_optimizer(name):
    inner, plain = models.twins(models.batchnorm_net)
    wrapped = wrap(inner, make(name, **without_radius(name)))
    compiled(plain)
    x, y = models.regression(10)  # The last batch is a partial one.
    for model in (wrapped, plain):
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert_same(inner.variables, plain.variables)
    assert_same(wrapped.optimizer.variables, plain.optimizer.variables)


# Law 2: nothing but the optimizer changes a weight


class Asks(methods.Method):
    """Asks all that another method asks, and then goes down the plain gradient."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    @property
    def settings(self):
        return self.method.settings

    def step(self, objective, w, g, state, **hyperparameters):
        self.method.step(objective, w, g, state, **hyperparameters)
        return g, state


@pytest.mark.parametrize("run_eagerly", [False, True], ids=["compiled", "eager"])
@EVERY_METHOD
def test_asking_leaves_no_trace(name, run_eagerly):
    """To the bit on every backend: what is asked and not used is not even in the program."""
    if run_eagerly and BACKEND == "torch":
        pytest.skip("PyTorch is eager in any case")
    inner, plain = models.twins(models.batchnorm_net)
    wrapped = wrap(inner, Asks(make(name, rho=3.0)), run_eagerly=run_eagerly)
    compiled(plain, run_eagerly=run_eagerly)
    for seed in range(2):
        batch = models.regression(seed=seed)
        wrapped.train_on_batch(*batch)
        plain.train_on_batch(*batch)
    assert_same(inner.variables, plain.variables)
    assert_same(wrapped.optimizer.variables, plain.optimizer.variables)


class Records(methods.Method):
    """Does what another method does, and writes its directions down."""

    def __init__(self, method, record):
        super().__init__()
        self.method, self.record = method, record

    @property
    def settings(self):
        return self.method.settings

    def step(self, objective, w, g, state, **hyperparameters):
        direction, state = self.method.step(objective, w, g, state, **hyperparameters)
        self.record.append([np.array(ops.convert_to_numpy(d)) for d in direction])
        return direction, state


@EVERY_METHOD
def test_weights_are_what_the_optimizer_makes_of_the_direction(name):
    inner, other = models.twins(models.mlp)
    directions = []
    wrapped = wrap(
        inner, Records(make(name), directions), optimizer=keras.optimizers.Adam(), run_eagerly=True
    )
    compiled(other, optimizer=keras.optimizers.Adam())
    for seed in range(2):
        wrapped.train_on_batch(*models.regression(seed=seed))
        models.apply(other, directions[-1])
    assert_same(inner.variables, other.variables)
    assert_same(wrapped.optimizer.variables, other.optimizer.variables)


@EVERY_METHOD
def test_learning_rate_zero_leaves_the_weights_to_the_bit(name):
    inner = models.mlp()
    before = values(inner.trainable_variables)
    wrapped = wrap(inner, make(name, rho=3.0), optimizer=keras.optimizers.SGD(0.0))
    wrapped.train_on_batch(*models.regression())
    for a, e in zip(values(inner.trainable_variables), before, strict=True):
        np.testing.assert_array_equal(a, e)


# Law 3: the perturbation has the size that the neighborhood states


@MOST_PAIRS
@pytest.mark.parametrize("ascent_steps", [1, 3])
def test_points_asked_for_lie_on_the_border(name, region, ascent_steps, float64):
    net = oracles.TanhNet()
    bias = oracles.mask(net.biases, net.shapes)
    method = make(name, region, {"ascent_steps": ascent_steps})
    objective = Spy(tanh_net(net, float64), biases=net.biases)
    take(method, objective, start_of(net, float64), **in_float64(name, float64))
    perturbations = [
        oracles.join(float64.arrays(point)) - net.start for point in objective.points[1:]
    ]
    sizes = np.array([REGIONS[region].size(e, net.start, bias) for e in perturbations])
    radii = [v for key, v in CASES[name].hyperparameters.items() if key.startswith("rho")]
    if region == "unnormalized":
        unit = np.linalg.norm(net.gradient(net.start))
        first = sizes[::ascent_steps]  # The first step of each ascent; the others go anywhere.
        np.testing.assert_allclose(sorted(first), sorted(unit * np.array(radii)), rtol=1e-12)
    else:
        expected = sorted(np.repeat(radii, ascent_steps))
        np.testing.assert_allclose(sorted(sizes), expected, rtol=1e-12)


# Law 4: on a quadratic the direction is the closed form


@MOST_PAIRS
@pytest.mark.parametrize("ascent_steps", [1, 3])
def test_direction_on_a_quadratic_is_the_closed_form(name, region, ascent_steps, float64):
    form = oracles.Quadratic()
    method = make(name, region, {"ascent_steps": ascent_steps})
    objective = Objective(quadratic(form, float64), biases=form.biases)
    w = start_of(form, float64)
    _, direction = take(method, objective, w, **in_float64(name, float64))
    float64.assert_close(direction, expected_direction(name, region, form, ascent_steps))


def jacobian(region, form, rho):
    """The derivative of `w + e(w)` on a quadratic, for the regions where it is short."""
    h, g, one = form.hessian, form.gradient(form.start), np.eye(len(form.start))
    length = np.linalg.norm(g)
    return {
        "ball_2": one + rho * (h / length - np.outer(g, g @ h) / length**3),
        "ball_inf": one,
        "unnormalized": one + rho * h,
    }[region]


@pytest.mark.parametrize("region", ["ball_2", "ball_inf", "unnormalized"])
@pytest.mark.parametrize("name", [n for n in METHODS if n in CASES and not CASES[n].region])
def test_second_order_on_a_quadratic_is_the_closed_form(name, region, float64):
    form = oracles.Quadratic()
    bias = oracles.mask(form.biases, form.shapes)

    def at(rho):
        g = form.gradient(form.start)
        w_adv = form.start + REGIONS[region].step(g, form.start, bias, rho)
        return jacobian(region, form, rho).T @ form.gradient(w_adv)

    case = CASES[name]
    expected = case.oracle(at, form.gradient(form.start), **case.hyperparameters)
    method = make(name, region, {"second_order": True})
    objective = Objective(quadratic(form, float64), biases=form.biases)
    w = start_of(form, float64)
    _, direction = take(method, objective, w, **in_float64(name, float64))
    float64.assert_close(direction, oracles.split(expected, form.shapes))


# Law 5: a zero gradient gives a zero direction


@MOST_PAIRS
@EVERY_VARIANT
def test_zero_gradient_gives_zero_direction(name, region, variant, float64):
    """At the minimum of a quadratic that lies in a corner of the adaptive scale, w = 0."""
    form = oracles.Quadratic()
    method = make(name, region, variant)
    objective = Spy(quadratic(form, float64), biases=form.biases)
    w = float64.tensors([np.zeros(s) for s in form.shapes])
    _, direction = take(method, objective, w)
    for point in [*objective.points, direction]:
        float64.assert_close(point, [np.zeros(s) for s in form.shapes], rtol=0, atol=0)


@MOST_PAIRS
def test_a_gradient_with_zeros_gives_a_finite_second_order_direction(name, region, float64):
    """Roots and absolute values have no derivative at 0: there it must be cut off."""
    method = make(name, region, {"second_order": True})
    x = float64.tensor([1.0, 0.0, 2.0])
    objective = Objective(lambda w: ops.sum((x * w[0]) ** 2) + ops.sum(w[1] ** 2))
    w = float64.tensors([[0.5, 1.0, 0.0], [0.0, -1.0]])
    _, direction = take(method, objective, w, **in_float64(name, float64))
    direction = oracles.join(float64.arrays(direction))
    assert np.all(np.isfinite(direction))
    np.testing.assert_array_equal(direction[[1, 2, 3]], 0)


# Law 6: what is not finite never reaches the weights


def state_of(model):
    """Everything that a skipped step has to leave as it was."""
    return [
        *model.model.trainable_variables,
        *(v for v in model.model.non_trainable_variables if "seed" not in v.path),
        *model.optimizer.variables,
        *model.method_state,
    ]


def assert_skips(model, x, y):
    """A step on this batch changes nothing but the count of skipped steps."""
    before, skipped = values(state_of(model)), int(model.skipped_steps)
    model.train_on_batch(x, y)
    assert int(model.skipped_steps) == skipped + 1
    for a, e in zip(values(state_of(model)), before, strict=True):
        np.testing.assert_array_equal(a, e)


def assert_trains(model, x, y):
    before, skipped = values(model.model.trainable_variables), int(model.skipped_steps)
    model.train_on_batch(x, y)
    assert int(model.skipped_steps) == skipped
    after = values(model.model.trainable_variables)
    assert all(np.all(np.isfinite(a)) for a in after)
    assert any(np.any(a != b) for a, b in zip(after, before, strict=True))


@EVERY_METHOD
def test_a_step_on_nan_or_inf_in_the_data_is_skipped(name):
    model = wrap(models.batchnorm_net(), make(name), optimizer=keras.optimizers.Adam(0.1))
    x, y = models.regression()
    assert_trains(model, x, y)
    for poison in (np.nan, np.inf):
        bad = x.copy()
        bad[3, 1] = poison
        assert_skips(model, bad, y)
        bad = y.copy()
        bad[3] = poison
        assert_skips(model, x, bad)
    assert_trains(model, x, y)


def positive(regions=("ball_2",)):
    """Every method with its own region, and where it is free with these."""
    for name in METHODS:
        free = name in CASES and CASES[name].region is None
        for region in regions if free else [None]:
            yield pytest.param(name, region, id=f"{name}-{region}" if free else name)


@pytest.mark.parametrize(("name", "region"), positive(["ball_2", "ball_inf"]))
def test_an_infinite_gradient_with_a_finite_loss_is_skipped(name, region):
    """In the maximum norm the perturbation is finite all the same: the sign of inf is 1."""

    def root(y, y_pred):
        return ops.sqrt(y_pred)

    inner = models.linear(features=2, kernel_initializer="ones")
    model = SharpnessAwareModel(inner, make(name, region))
    model.compile(keras.optimizers.Adam(0.1), root)
    x, y = np.ones((2, 2), "float32"), np.ones((2, 1), "float32")
    assert_trains(model, x, y)
    inner.trainable_variables[0].assign(np.zeros((2, 1), "float32"))
    assert_skips(model, x, y)
    assert int(inner.trainable_variables[0][0, 0]) == 0


@EVERY_METHOD
def test_nan_at_the_perturbed_point_alone_is_skipped(name):
    """The loss rises towards a cliff at 1 behind which there is no loss."""

    def cliff(y, y_pred):
        return -ops.log(1 - y_pred)

    inner = models.linear(features=1, kernel_initializer=keras.initializers.Constant(0.2))
    model = SharpnessAwareModel(inner, make(name, rho=0.5))
    model.compile(keras.optimizers.Adam(0.01), cliff)
    x, y = np.ones((2, 1), "float32"), np.ones((2, 1), "float32")
    assert_trains(model, x, y)
    inner.trainable_variables[0].assign([[0.9]])
    assert np.isfinite(model.evaluate(x, y, verbose=0))
    assert_skips(model, x, y)


@EVERY_METHOD
def test_a_direction_that_overflows_is_skipped(name):
    """All gradients are finite; their sum is not. No method may hand inf to the optimizer."""
    inner = models.linear(features=1, kernel_initializer="ones")
    model = SharpnessAwareModel(inner, make(name))
    # A linear loss: the gradient is the same everywhere, and clipped later.
    model.compile(keras.optimizers.SGD(0.1, clipvalue=1.0), lambda y, y_pred: y_pred * y)
    x, y = np.ones((1, 1), "float32"), np.full((1, 1), 2.5e38, "float32")
    model.train_on_batch(x, y)
    assert np.all(np.isfinite(values(inner.trainable_variables)[0]))
    model.train_on_batch(x, y)
    assert np.all(np.isfinite(values(inner.trainable_variables)[0]))


class Overflows(methods.Method):
    """A method whose arithmetic fails where its gradients do not."""

    def direction(self, objective, w, g):
        return [t / ops.zeros_like(t) for t in g]


def test_a_direction_that_is_not_finite_is_skipped():
    model = wrap(models.mlp(), Overflows())
    assert_skips(model, *models.regression())


@pytest.mark.parametrize("name", ["sam", "bsam"])
def test_a_loss_scale_optimizer_skips_and_halves_its_scale(name):
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=1024.0)
    model = wrap(models.batchnorm_net(), make(name), optimizer=optimizer)
    x, y = models.regression()
    assert_trains(model, x, y)
    before = values(model.model.variables)
    slots = values(optimizer.inner_optimizer.variables)
    x[0, 0] = np.inf
    model.train_on_batch(x, y)
    assert float(optimizer.dynamic_scale) == 512.0
    assert int(model.skipped_steps) == 1
    for a, e in zip(values(model.model.variables), before, strict=True):
        np.testing.assert_array_equal(a, e)
    for a, e in zip(values(optimizer.inner_optimizer.variables), slots, strict=True):
        np.testing.assert_array_equal(a, e)


# Law 7: shapes, dtypes and structure stay, and the second step does not compile again


@EVERY_METHOD
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@EVERY_VARIANT
def test_the_direction_has_the_dtypes_and_shapes_of_the_weights(name, dtype, variant):
    w = [ops.cast(np.random.default_rng(0).normal(size=s), dtype) for s in [(2, 3), (3,), ()]]
    objective = Objective(
        lambda w: sum(ops.sum(ops.cast(t, "float32") ** 2) for t in w), biases=[False, True, False]
    )
    _, direction = take(make(name, None, variant), objective, w)
    assert [d.dtype for d in direction] == [t.dtype for t in w]
    assert [tuple(d.shape) for d in direction] == [tuple(t.shape) for t in w]


@EVERY_METHOD
def test_the_second_step_does_not_compile_again(name):
    runs = []

    def loss(y, y_pred):
        runs.append(1)  # When the step is compiled; on PyTorch, in each pass.
        return ops.mean((y - y_pred) ** 2)

    model = SharpnessAwareModel(models.batchnorm_net(), make(name))
    model.compile(keras.optimizers.SGD(0.1), loss)
    model.train_on_batch(*models.regression())
    runs.clear()
    for seed in range(3):
        model.train_on_batch(*models.regression(seed=seed))
    assert len(runs) == (3 * CASES[name].gradients if BACKEND == "torch" else 0)


@EVERY_METHOD
def test_a_step_costs_as_many_gradients_as_documented(name, float64):
    form = oracles.Quadratic()
    for steps in (1, 3):
        objective = Spy(quadratic(form, float64), biases=form.biases)
        take(make(name, variant={"ascent_steps": steps}), objective, start_of(form, float64))
        assert len(objective.points) == 1 + (CASES[name].gradients - 1) * steps
    assert f"{['two', 'three'][CASES[name].gradients - 2]} gradients" in METHODS[name].__doc__


# Law 8: weights that are frozen, or without a gradient, are left alone


class PartlyUsed(keras.Model):
    """One layer is frozen, one has no part in the loss, one is trained."""

    def __init__(self):
        super().__init__()
        self.frozen = keras.layers.Dense(4, trainable=False)
        self.trained = keras.layers.Dense(1)
        self.unused = self.add_weight(shape=(3,), initializer="ones", name="unused")

    def call(self, x):
        return self.trained(ops.tanh(self.frozen(x)))


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@EVERY_METHOD
def test_frozen_and_unused_weights_are_left_alone(name):
    keras.utils.set_random_seed(0)
    inner = PartlyUsed()
    x, y = models.regression()
    inner(x)
    rest = [*inner.frozen.variables, inner.unused]
    before, trained = values(rest), values(inner.trained.variables)
    model = wrap(inner, make(name))
    model.train_on_batch(x, y)
    for a, e in zip(values(rest), before, strict=True):
        np.testing.assert_array_equal(a, e)
    for a, e in zip(values(inner.trained.variables), trained, strict=True):
        assert np.all(a != e)


@MOST_PAIRS
@pytest.mark.parametrize("second_order", [False, True], ids=["first_order", "second_order"])
def test_a_weight_without_gradient_is_as_if_it_were_not_there(name, region, second_order, float64):
    net = oracles.TanhNet()
    method = make(name, region, {"second_order": second_order})
    loss, w = tanh_net(net, float64), start_of(net, float64)
    unused = float64.tensor([7.0, -5.0])
    _, expected = take(method, Objective(loss, biases=net.biases), w)
    objective = Spy(lambda w: loss(w[1:]), biases=[False, *net.biases])
    _, (first, *others) = take(method, objective, [unused, *w])
    for a, e in zip(float64.arrays(others), float64.arrays(expected), strict=True):
        np.testing.assert_array_equal(a, e)
    # Where nothing flows back: `None` on TensorFlow and PyTorch, zeros on JAX.
    assert first is None or not np.any(float64.arrays([first])[0])
    for point in objective.points:
        np.testing.assert_array_equal(float64.arrays(point[:1])[0], [7.0, -5.0])


@EVERY_METHOD
def test_a_weight_that_takes_no_part_stays_where_it_is_in_all_passes(name, float64):
    net = oracles.TanhNet()
    objective = Spy(tanh_net(net, float64), biases=net.biases, perturbed=[True, False, True])
    w = start_of(net, float64)
    _, direction = take(make(name), objective, w)
    start = float64.arrays(w)
    for point in objective.points[1:]:
        moved = [np.any(a != b) for a, b in zip(float64.arrays(point), start, strict=True)]
        assert moved == [True, False, True]
    assert all(np.any(d != 0) for d in float64.arrays(direction))


# Law 9: the backends agree with an oracle, in every combination


@EVERY_PAIR
@pytest.mark.parametrize(
    "variant",
    [
        *VARIANTS,
        pytest.param(
            {"ascent_steps": 3, "second_order": True},
            id="three_steps_second_order",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_direction_agrees_with_the_oracle(name, region, variant, float64):
    net = oracles.TanhNet()
    method = make(name, region, variant)
    objective = Objective(tanh_net(net, float64), biases=net.biases)
    w = start_of(net, float64)
    _, direction = take(method, objective, w, **in_float64(name, float64))
    # The second order is checked with differences, which are right to 1e-11 or so.
    tolerance = {"rtol": 1e-7, "atol": 1e-8} if variant.get("second_order") else {}
    expected = expected_direction(name, region, net, **variant)
    float64.assert_close(direction, expected, **tolerance)


# Law 10: saving and loading reproduce the next step


def steps(model, seeds):
    for seed in seeds:
        model.train_on_batch(*models.regression(seed=seed))


def assert_equal_to_the_bit(actual, expected):
    for a, e in zip(values(actual), values(expected), strict=True):
        np.testing.assert_array_equal(a, e)


@EVERY_METHOD
def test_config_round_trip_gives_the_same_method(name, float64):
    net = oracles.TanhNet()
    method = make(name, variant={"ascent_steps": 2, "second_order": True})
    config = json.loads(json.dumps(methods.serialize(method)))
    copy = methods.deserialize(config)
    assert type(copy) is type(method)
    assert copy.get_config() == method.get_config()
    directions = []
    for m in (method, copy):
        objective = Objective(tanh_net(net, float64), biases=net.biases)
        _, direction = take(m, objective, start_of(net, float64))
        directions.append(float64.arrays(direction))
    for a, e in zip(*directions, strict=True):
        np.testing.assert_array_equal(a, e)


@EVERY_METHOD
def test_a_keras_file_reproduces_the_next_step(name, tmp_path):
    """With Adam's slots, BatchNormalization's statistics, and numbers changed by hand."""
    model = wrap(models.batchnorm_net(), METHODS[name](), optimizer=keras.optimizers.Adam(0.1))
    model.method.rho = 0.2
    steps(model, [0, 1])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.method) is METHODS[name]
    assert loaded.method.get_config() == model.method.get_config()
    assert_equal_to_the_bit(loaded.variables, model.variables)
    for m in (model, loaded):
        steps(m, [2, 3])
    assert_equal_to_the_bit(loaded.variables, model.variables)
    assert_equal_to_the_bit(loaded.optimizer.variables, model.optimizer.variables)


# Stateful methods


@keras.saving.register_keras_serializable(package="tests")
class ClimbsAlongAverage(methods.Method):
    """SAM that ascends along an exponential moving average of the gradients.

    Averages follow `decay * average + (1 - decay) * g`, from zero.
    """

    def __init__(self, rho=0.05, decay=0.5, **kwargs):
        super().__init__(**kwargs)
        self.rho, self.decay = rho, decay

    def initial_state(self, variables):
        return [np.zeros(v.shape, "float32") for v in variables]

    def step(self, objective, w, g, state, **hyperparameters):
        average = [self.decay * a + (1 - self.decay) * t for a, t in zip(state, g, strict=True)]
        e = self.neighborhood.perturbation(objective.perturbed(average), w, self.rho)
        return objective([t + d for t, d in zip(w, e, strict=True)]).gradient, average

    def get_config(self):
        return {**super().get_config(), "rho": self.rho, "decay": self.decay}


def gradients_of(model, x, y):
    """The gradient of the clean loss, as the backend takes it."""
    return models.loss_and_gradient(model, x, y)[1]


def test_the_state_of_a_method_moves_with_each_step():
    inner, copy = models.twins(models.mlp)
    model = wrap(inner, ClimbsAlongAverage())
    compiled(copy)
    assert all(not np.any(v) for v in values(model.method_state))
    average = [np.zeros(v.shape) for v in copy.trainable_variables]
    for seed in range(3):
        x, y = models.regression(seed=seed)
        models.assign(copy.trainable_variables, values(inner.trainable_variables))
        g = gradients_of(copy, x, y)
        model.train_on_batch(x, y)
        average = [0.5 * a + 0.5 * t for a, t in zip(average, g, strict=True)]
        models.assert_close(model.method_state, average)


def test_the_state_of_a_method_stays_put_on_a_skipped_step():
    model = wrap(models.mlp(), ClimbsAlongAverage())
    x, y = models.regression()
    assert_trains(model, x, y)
    assert all(np.any(v) for v in values(model.method_state))
    assert_skips(model, np.full_like(x, np.nan), y)
    assert_trains(model, x, y)


def test_the_state_of_a_method_is_in_a_keras_file(tmp_path):
    model = wrap(models.mlp(), ClimbsAlongAverage(rho=0.3, decay=0.8))
    steps(model, [0, 1])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.method.decay == 0.8
    assert_equal_to_the_bit(loaded.method_state, model.method_state)
    for m in (model, loaded):
        steps(m, [2])
    assert_equal_to_the_bit(loaded.variables, model.variables)


@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
def test_the_state_of_a_method_is_in_a_weights_file(tmp_path, built):
    """Also when the wrapped model had no weights yet when it was wrapped."""

    def fresh():
        inner = models.Subclassed()
        if built:
            inner(np.zeros((1, 3), "float32"))
        return wrap(inner, ClimbsAlongAverage())

    model, other = fresh(), fresh()
    steps(model, [0, 1])
    model.save_weights(tmp_path / "model.weights.h5")
    steps(other, [5])
    other.load_weights(tmp_path / "model.weights.h5")
    assert_equal_to_the_bit(other.method_state, model.method_state)
    for m in (model, other):
        steps(m, [2])
    assert_equal_to_the_bit(other.variables, model.variables)


@EVERY_METHOD
def test_a_weights_file_holds_the_radius(name, tmp_path):
    """What a callback has made of rho lives on, and so does the highest learning rate."""
    model, other = (wrap(models.mlp(), METHODS[name]()) for _ in range(2))
    model.method.rho = 0.2
    steps(model, [0])
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    assert float(other.method.rho) == pytest.approx(0.2)
    assert float(other.highest_learning_rate) == float(model.highest_learning_rate)
    for m in (model, other):
        steps(m, [1])
    assert_equal_to_the_bit(other.variables, model.variables)

"""The ten laws that `keras_sharp.methods.Method` promises, for every method in the table.

The laws of pure functions are tested in float64, on vectors of a dozen numbers; those of
training on tiny models, most of them with BatchNormalization.
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
        oracle: its rule, from the paper. If the method remembers a vector, it takes that as well.
        hyperparameters: the values that the tests use; those named rho... are radii.
        gradients: how many gradients one step takes.
        region: of a method with a neighborhood of its own, the name of that.
        arguments: further arguments of the constructor.
        remembers: whether the method remembers a vector in the shapes of the weights.
        climbs: whether it has the arguments `ascent_steps` and `second_order`.
    """

    oracle: Callable
    hyperparameters: dict
    gradients: int = 2
    region: str | None = None
    arguments: dict = {}  # noqa: RUF012
    remembers: bool = False
    climbs: bool = True


#: One entry for each method. A method without an entry fails in every test.
CASES = {
    "sam": Case(oracles.sam, {"rho": 0.3}),
    "asam": Case(oracles.sam, {"rho": 0.3}, region="adaptive"),
    "gsam": Case(oracles.gsam, {"rho": 0.3, "alpha": 0.7}),
    "adaptive_gsam": Case(oracles.gsam, {"rho": 0.3, "alpha": 0.7}, region="weight_scaled"),
    "bsam": Case(oracles.bsam, {"rho": 0.3, "rho_min": 0.2}, gradients=3),
    # Where it looks at each step it is SAM; the steps in between are in test_cheaper.py.
    "looksam": Case(
        oracles.looksam, {"rho": 0.3, "alpha": 0.7}, arguments={"k": 1}, remembers=True
    ),
    "momentum_sam": Case(
        oracles.momentum_sam, {"rho": 0.3}, gradients=1, remembers=True, climbs=False
    ),
    "async_sam": Case(oracles.async_sam, {"rho": 0.3}, gradients=1, remembers=True, climbs=False),
    # Which entries and which examples: in test_cheaper.py.
    "esam": Case(oracles.sam, {"rho": 0.3}, arguments={"beta": 1.0, "gamma": 1.0}, climbs=False),
    "friendly_sam": Case(oracles.friendly_sam, {"rho": 0.3, "sigma": 0.8}, remembers=True),
    "wsam": Case(oracles.wsam, {"rho": 0.3, "gamma": 0.8}),
}

EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
#: For what takes long, as compiling does: the method with the most passes stands for all.
MOST_METHODS = pytest.mark.parametrize(
    "name", [n if n == "bsam" else models.slow(n) for n in METHODS]
)
AS_WRITTEN = pytest.mark.usefixtures("as_written")
COMPILED = models.on("tensorflow", "jax")  # PyTorch is eager in any case.

VARIANTS = {
    "one_step": {},
    "three_steps": {"ascent_steps": 3},
    "second_order": {"second_order": True},
    "three_steps_second_order": {"ascent_steps": 3, "second_order": True},
}


def every_combination(*variants, typical=2):
    """A decorator: methods, in the neighborhoods that they go with, in some `VARIANTS`.

    A neighborhood is the same object in the hands of all methods, so that some combinations
    tell more than others. A combination is typical for its method (SAM stands for those that
    take any neighborhood), for its neighborhood (one radial and one clipped stand for the
    others), and for its variant (the first): two of three, or it is marked slow.
    """
    combinations = []
    for name in METHODS:
        own = CASES[name].region if name in CASES else None
        for region in [own] if own else REGIONS:
            for variant in variants:
                if VARIANTS[variant] and name in CASES and not CASES[name].climbs:
                    continue
                usual = bool(own) or region in ("ball_2", "adaptive_inf")
                slow = (name == "sam") + usual + (variant == variants[0]) < typical
                slow = slow or variant == "three_steps_second_order"
                parameters = models.slow if slow else pytest.param
                combinations.append(
                    parameters(name, region, VARIANTS[variant], id=f"{name}-{region}-{variant}")
                )
    return pytest.mark.parametrize(("name", "region", "variant"), combinations)


def make(name, region=None, variant=None, **hyperparameters):
    """A method, in a region and with the hyperparameters of its case."""
    case = CASES[name]
    arguments = {**case.arguments, **case.hyperparameters, **(variant or {}), **hyperparameters}
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


class Spy(Objective):
    """An objective that writes down the points at which it is asked."""

    def __init__(self, loss_fn, **kwargs):
        super().__init__(loss_fn, **kwargs)
        self.loss_fn, self.points, self.outer = loss_fn, [], self._log

    def __call__(self, w):  # Inside of `through`, JAX asks with tracers.
        if self._log is self.outer and not any(
            point is w for point in self.points
        ):  # It answers from memory.
            self.points.append(w)
        return super().__call__(w)


def of_tanh_net(float64, **kwargs):
    """The loss of `oracles.TanhNet`: the oracle, an objective, and the weights to start at."""
    net = oracles.TanhNet()
    x, y = float64.tensors([net.x, net.y])

    def loss(w):  # Of operations that keep float64: see the fixture.
        hidden = 1 - 2 / (ops.exp(2 * (x @ w[0] + w[1])) + 1)
        return ops.sum((hidden @ w[2] - y) ** 2) / len(net.y)

    objective = Spy(loss, **{"biases": net.biases, **kwargs})
    return net, objective, float64.tensors(oracles.split(net.start, net.shapes))


def of_quadratic(float64):
    """The loss of `oracles.Quadratic`, likewise."""
    form = oracles.Quadratic()
    hessian = float64.tensor(form.hessian)

    def loss(w):
        column = ops.concatenate([ops.reshape(t, (-1, 1)) for t in w])
        return 0.5 * ops.sum(column * (hessian @ column))

    objective = Spy(loss, biases=form.biases)
    return form, objective, float64.tensors(oracles.split(form.start, form.shapes))


def memory_of(name, w):
    """What a method remembers in these tests, flat: numbers like those of a gradient."""
    return np.random.default_rng(7).normal(size=w.shape)


def take(method, objective, w, float64=None, memory=None):
    """One step of a method by itself: the gradient and the direction.

    A method that remembers something begins with `memory`, or with nothing.
    """
    _, g = objective(w)
    hyperparameters = {key: s.value_at(0, None) for key, s in method.settings.items()}
    if float64:  # A method keeps its hyperparameters in float32, as they were given here.
        given = {key: setting.given for key, setting in method.settings.items()}
        hyperparameters = {key: float64.tensor(value) for key, value in given.items()}
    if memory is None:
        memory = method.initial_state(
            [keras.KerasTensor(t.shape, keras.backend.standardize_dtype(t.dtype)) for t in w]
        )
    memory = [float64.tensor(m) if float64 else ops.convert_to_tensor(m) for m in memory]
    direction, _ = method.step(objective, w, memory, **hyperparameters)
    return g, direction


def expected_direction(name, region, loss, ascent_steps=1, second_order=False):
    """What the oracles say."""
    case, bias = CASES[name], oracles.mask(loss.biases, loss.shapes)

    def at(rho, along=lambda g: g):
        def ascent(w, rho):
            def climb(v):
                return along(loss.gradient(v))

            return oracles.ascend(REGIONS[region], climb, w, bias, rho, ascent_steps)

        return oracles.at_adversary(loss, loss.start, ascent, second_order)(rho)

    remembered = [memory_of(name, loss.start)] if case.remembers else []
    flat = case.oracle(at, loss.gradient(loss.start), *remembered, **case.hyperparameters)
    return oracles.split(flat, loss.shapes)


def remembered(name, loss):
    """The memory that `expected_direction` takes into account, as the method has it."""
    if not CASES[name].remembers:
        return []
    return oracles.split(memory_of(name, loss.start), loss.shapes)


def compiled(model, optimizer=None):
    model.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


def wrap(inner, method, optimizer=None):
    return compiled(SharpnessAwareModel(inner, method), optimizer)


def train(model, seeds):
    for seed in seeds:
        model.train_on_batch(*models.regression(seed=seed))


def assert_equal_to_the_bit(actual, expected):
    assert_same(actual, expected, bits=True)


def test_every_method_has_a_case():
    """Whoever adds a method says here what it promises: a rule, its numbers, its cost."""
    assert set(CASES) == set(METHODS)
    for name, case in CASES.items():
        assert set(case.hyperparameters) == set(METHODS[name]().settings)


def test_every_neighborhood_has_an_oracle():
    classes = neighborhoods.NEIGHBORHOODS.values()
    assert {region.of for region in REGIONS.values()} == {c.__name__ for c in classes}


def test_every_public_method_is_in_the_table():
    public = [getattr(methods, name) for name in methods.__all__]
    classes = {c for c in public if isinstance(c, type) and issubclass(c, methods.Method)}
    assert set(METHODS.values()) == classes - {methods.Method, methods.Plain}


# Law 1: with rho = 0 the direction is the gradient


@every_combination("one_step", "three_steps", "second_order")
def test_rho_zero_gives_the_gradient(name, region, variant, float64):
    _, objective, w = of_tanh_net(float64)
    method = make(name, region, variant, **without_radius(name))
    g, direction = take(method, objective, w, float64)
    assert_equal_to_the_bit(float64.arrays(direction), float64.arrays(g))


@AS_WRITTEN
@EVERY_METHOD
@pytest.mark.parametrize("size", [1e-15, 1e-3, 1e18])
def test_rho_zero_gives_the_gradient_also_in_float32_at_any_size(name, size):
    """Also where the square of the norm, 1e-30 or 1e36, comes near the ends of float32."""
    gradient = np.random.default_rng(0).normal(size=9).astype("float32") * np.float32(size)
    slope = ops.convert_to_tensor(gradient)
    objective = Objective(lambda w: ops.sum(slope * w[0]))
    _, direction = take(make(name, **without_radius(name)), objective, [ops.ones((9,))])
    assert_equal_to_the_bit(direction, [gradient])


def compare_rho_zero_with_plain(build, name, **tolerance):
    inner, plain = models.twins(build)
    wrapped = wrap(inner, make(name, **without_radius(name)))
    compiled(plain)
    x, y = models.regression(10)
    for model in (wrapped, plain):
        model.fit(x, y, batch_size=5, shuffle=False, verbose=0)
    assert_same(inner.variables, plain.variables, **tolerance)
    assert_same(wrapped.optimizer.variables, plain.optimizer.variables, **tolerance)


@AS_WRITTEN
@EVERY_METHOD
def test_rho_zero_is_the_base_optimizer(name):
    """Weights, slots and statistics to the bit, on all backends."""
    compare_rho_zero_with_plain(models.batchnorm_net, name, bits=True)


@COMPILED
@MOST_METHODS
def test_rho_zero_is_the_base_optimizer_compiled(name):
    """To the bit in TensorFlow's graph, for this model; to rounding with JAX's XLA."""
    compare_rho_zero_with_plain(models.mlp, name)


# Law 2: nothing but the optimizer changes a weight


class Watched(methods.Method):
    """Another method, of whose steps something is made."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    @property
    def settings(self):
        return self.method.settings

    def initial_state(self, variables):
        return self.method.initial_state(variables)


class Asks(Watched):
    """Asks all that another method asks, and then goes down the plain gradient."""

    def step(self, objective, w, state, **hyperparameters):
        g = objective(w).gradient  # First: this is the pass that is reported.
        self.method.step(objective, w, state, **hyperparameters)
        return g, state


def compare_asking_with_plain(build, name, **tolerance):
    inner, plain = models.twins(build)
    wrapped = wrap(inner, Asks(make(name, rho=3.0)))
    compiled(plain)
    train(wrapped, [0, 1])
    train(plain, [0, 1])
    assert_same(inner.variables, plain.variables, **tolerance)
    assert_same(wrapped.optimizer.variables, plain.optimizer.variables, **tolerance)


@AS_WRITTEN
@EVERY_METHOD
def test_asking_leaves_no_trace(name):
    compare_asking_with_plain(models.batchnorm_net, name, bits=True)


@pytest.mark.slow
@COMPILED
@EVERY_METHOD
def test_asking_leaves_no_trace_compiled(name):
    compare_asking_with_plain(models.mlp, name)


class Records(Watched):
    """Does what another method does, and hands on each direction in NumPy."""

    def __init__(self, method, write):
        super().__init__(method)
        self.write = write

    def step(self, objective, w, state, **hyperparameters):
        direction, state = self.method.step(objective, w, state, **hyperparameters)
        self.write([np.array(ops.convert_to_numpy(d)) for d in direction])
        return direction, state


@AS_WRITTEN
@EVERY_METHOD
def test_weights_are_what_the_optimizer_makes_of_the_direction(name):
    inner, other = models.twins(models.mlp)
    directions = []
    method = Records(make(name), directions.append)
    wrapped = wrap(inner, method, keras.optimizers.Adam())
    compiled(other, keras.optimizers.Adam())
    for seed in range(2):
        train(wrapped, [seed])
        models.apply(other, directions[-1])
    assert_equal_to_the_bit(inner.variables, other.variables)
    assert_equal_to_the_bit(wrapped.optimizer.variables, other.optimizer.variables)


@AS_WRITTEN
@EVERY_METHOD
def test_learning_rate_zero_leaves_the_weights_to_the_bit(name):
    """No method puts a weight back by arithmetic, which would leave a rest."""
    inner = models.mlp()
    before = values(inner.trainable_variables)
    train(wrap(inner, make(name, rho=3.0), keras.optimizers.SGD(0.0)), [0])
    assert_equal_to_the_bit(inner.trainable_variables, before)


# Law 3: the perturbation has the size that the neighborhood states


@every_combination("one_step", "three_steps")
def test_points_asked_for_lie_on_the_border(name, region, variant, float64):
    net, objective, w = of_tanh_net(float64)
    take(make(name, region, variant), objective, w, float64, remembered(name, net))
    bias = oracles.mask(net.biases, net.shapes)
    perturbations = [oracles.join(float64.arrays(p)) - net.start for p in objective.points[1:]]
    sizes = [REGIONS[region].size(e, net.start, bias) for e in perturbations]
    radii = [v for key, v in CASES[name].hyperparameters.items() if key.startswith("rho")]
    steps = variant.get("ascent_steps", 1)
    if region == "unnormalized":  # No border: the first step of each ascent is rho * g.
        if CASES[name].remembers and name != "looksam":
            return  # It climbs along something else.
        sizes = sizes[::steps] / np.linalg.norm(net.gradient(net.start))
        steps = 1
    np.testing.assert_allclose(sorted(sizes), sorted(np.repeat(radii, steps)), rtol=1e-12)


# Law 4: on a quadratic the direction is the closed form


@every_combination("one_step", "three_steps")
def test_direction_on_a_quadratic_is_the_closed_form(name, region, variant, float64):
    form, objective, w = of_quadratic(float64)
    method, memory = make(name, region, variant), remembered(name, form)
    _, direction = take(method, objective, w, float64, memory)
    float64.assert_close(direction, expected_direction(name, region, form, **variant))


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
@pytest.mark.parametrize(
    "name",
    [n for n, c in CASES.items() if not c.region and c.climbs and n != "friendly_sam"],
)
def test_second_order_on_a_quadratic_is_the_closed_form(name, region, float64):
    form, objective, w = of_quadratic(float64)
    bias = oracles.mask(form.biases, form.shapes)
    g = form.gradient(form.start)

    def at(rho):
        w_adv = form.start + REGIONS[region].step(g, form.start, bias, rho)
        return jacobian(region, form, rho).T @ form.gradient(w_adv)

    memory = [memory_of(name, form.start)] if CASES[name].remembers else []
    expected = CASES[name].oracle(at, g, *memory, **CASES[name].hyperparameters)
    method = make(name, region, VARIANTS["second_order"])
    _, direction = take(method, objective, w, float64, remembered(name, form))
    float64.assert_close(direction, oracles.split(expected, form.shapes))


# Law 5: a zero gradient gives a zero direction


@every_combination("one_step", "three_steps", "second_order")
def test_zero_gradient_gives_zero_direction(name, region, variant, float64):
    """At the minimum of a quadratic, which lies where the adaptive scale has its kink."""
    form, objective, _ = of_quadratic(float64)
    zero = [np.zeros(shape) for shape in form.shapes]
    method = make(name, region, variant)
    _, direction = take(method, objective, float64.tensors(zero), float64)
    for point in [*objective.points, direction]:
        assert_equal_to_the_bit([abs(a) for a in float64.arrays(point)], zero)


@every_combination("second_order")
def test_zeros_in_a_gradient_give_a_finite_second_order(name, region, variant, float64):
    """Roots and absolute values have no derivative at 0: there it must be cut off."""
    x = float64.tensor([1.0, 0.0, 2.0])
    objective = Objective(lambda w: ops.sum((x * w[0]) ** 2) + ops.sum(w[1] ** 2))
    w = float64.tensors([[0.5, 1.0, 0.0], [0.0, -1.0]])
    _, direction = take(make(name, region, variant), objective, w, float64)
    direction = oracles.join(float64.arrays(direction))
    assert np.all(np.isfinite(direction))
    np.testing.assert_array_equal(direction == 0, [False, True, True, True, False])


# Law 6: what is not finite never reaches the weights


def state_of(model):
    """Everything that a skipped step has to leave as it was."""
    return [*model.model.variables, *model.optimizer.variables, *model.method_state]


def assert_skips(model, x, y):
    """A step on this batch changes nothing but the count of skipped steps."""
    before, skipped = values(state_of(model)), int(model.skipped_steps)
    model.train_on_batch(x, y)
    assert int(model.skipped_steps) == skipped + 1
    assert_equal_to_the_bit(state_of(model), before)


def assert_trains(model, x, y):
    before, skipped = values(model.model.trainable_variables), int(model.skipped_steps)
    model.train_on_batch(x, y)
    assert int(model.skipped_steps) == skipped
    after = values(model.model.trainable_variables)
    assert all(np.all(np.isfinite(a)) for a in after)
    assert any(np.any(a != b) for a, b in zip(after, before, strict=True))


def check_poisoned_data(name):
    model = wrap(models.batchnorm_net(), make(name), keras.optimizers.Adam(0.1))
    x, y = models.regression()
    assert_trains(model, x, y)
    bad_x, bad_y = x.copy(), y.copy()
    bad_x[3, 1], bad_y[3] = np.nan, np.inf
    assert_skips(model, bad_x, y)
    assert_skips(model, x, bad_y)
    assert_trains(model, x, y)


@AS_WRITTEN
@EVERY_METHOD
def test_a_step_on_nan_or_inf_in_the_data_is_skipped(name):
    check_poisoned_data(name)


@COMPILED
@MOST_METHODS
def test_a_step_on_nan_or_inf_in_the_data_is_skipped_compiled(name):
    check_poisoned_data(name)


def methods_in(*regions):
    """Every method that asks at the weights, in these regions where it is free to choose."""
    for name in METHODS:
        if name in CASES and CASES[name].gradients == 1:
            continue
        own = CASES[name].region if name in CASES else None
        for region in [own] if own else regions:
            yield pytest.param(name, region, id=f"{name}-{region}")


@AS_WRITTEN
@pytest.mark.parametrize(("name", "region"), methods_in("ball_2", "ball_inf"))
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


@AS_WRITTEN
@pytest.mark.parametrize("name", [n for n in METHODS if n != "momentum_sam"])  # It goes downhill.
def test_nan_at_the_perturbed_point_alone_is_skipped(name):
    """The loss rises towards a cliff at 1, behind which there is no loss."""

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


@MOST_METHODS
def test_a_direction_that_overflows_does_not_reach_the_weights(name):
    """All gradients are finite, but not what becomes of them: 2.5e38 twice is too much."""
    inner = models.linear(features=1, kernel_initializer="ones")
    model = SharpnessAwareModel(inner, make(name))
    # A linear loss: the gradient is the same everywhere.
    model.compile(keras.optimizers.SGD(1e-38), lambda y, y_pred: y_pred * y)
    x, y = np.ones((1, 1), "float32"), np.full((1, 1), 2.5e38, "float32")
    model.train_on_batch(x, y)
    assert np.all(np.isfinite(values(inner.trainable_variables)[0]))


class Overflows(methods.Method):
    """A method whose arithmetic fails where its gradients do not."""

    def direction(self, objective, w, g):
        return [t / ops.zeros_like(t) for t in g]


@AS_WRITTEN
def test_a_direction_that_is_not_finite_is_skipped():
    model = wrap(models.mlp(), Overflows())
    model.optimizer.build(model.trainable_variables)
    assert_skips(model, *models.regression())


@AS_WRITTEN
@pytest.mark.parametrize("name", ["sam", "bsam"])
def test_a_loss_scale_optimizer_skips_and_halves_its_scale(name):
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=1024.0)
    model = wrap(models.batchnorm_net(), make(name), optimizer)
    x, y = models.regression()
    assert_trains(model, x, y)
    state = [*model.model.variables, *optimizer.inner_optimizer.variables]
    before = values(state)
    x[0, 0] = np.inf
    model.train_on_batch(x, y)
    assert float(optimizer.dynamic_scale) == 512.0
    assert int(model.skipped_steps) == 1
    assert_equal_to_the_bit(state, before)


# Law 7: shapes, dtypes and structure stay, and the second step does not compile again


def assert_direction_is_like_weights(name, shapes, dtypes, variant="one_step"):
    w = [ops.ones(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    objective = Objective(lambda w: sum(ops.sum(ops.cast(t, "float32") ** 2) for t in w))
    _, direction = take(make(name, None, VARIANTS[variant]), objective, w)
    assert [d.dtype for d in direction] == [t.dtype for t in w]
    assert [tuple(d.shape) for d in direction] == [tuple(t.shape) for t in w]
    assert all(np.all(np.isfinite(ops.convert_to_numpy(ops.cast(d, "float32")))) for d in direction)


@AS_WRITTEN
@EVERY_METHOD
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_direction_has_the_dtypes_and_shapes_of_the_weights(name, dtype):
    assert_direction_is_like_weights(name, [(2, 3), (0, 4), (1,)], [dtype] * 3)


@AS_WRITTEN
@MOST_METHODS
@pytest.mark.parametrize("variant", ["three_steps", "second_order"])
def test_weights_of_several_dtypes_keep_their_own(name, variant):
    if not CASES[name].climbs:
        variant = "one_step"
    dtypes = ["float32", "float16"]
    assert_direction_is_like_weights(name, [(2, 3), (3,)], dtypes, variant)


@AS_WRITTEN
@EVERY_METHOD
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_scalar_weight_keeps_its_dtype(name, dtype):
    """On PyTorch the product of two scalar tensors is of the wider of the two dtypes."""
    assert_direction_is_like_weights(name, [(3,), ()], [dtype] * 2)


@MOST_METHODS
def test_the_second_step_does_not_compile_again(name):
    runs = []

    def loss(y, y_pred):
        runs.append(1)  # When the step is compiled; on PyTorch, in each pass.
        return ops.mean((y - y_pred) ** 2)

    model = SharpnessAwareModel(models.batchnorm_net(), make(name))
    model.compile(keras.optimizers.SGD(0.1), loss)
    train(model, [0])
    runs.clear()
    train(model, [1, 2, 3])
    assert len(runs) == (3 * CASES[name].gradients if BACKEND == "torch" else 0)


@EVERY_METHOD
def test_a_step_costs_as_many_gradients_as_documented(name, float64):
    case = CASES[name]
    for steps in (1, 3) if case.climbs else (1,):
        form, objective, w = of_quadratic(float64)
        method = make(name, variant={"ascent_steps": steps} if case.climbs else {})
        take(method, objective, w, float64, remembered(name, form))
        taken = 1 + (case.gradients - 1) * steps
        asked_here = 1 if case.gradients == 1 else 0  # `take` asks at the weights; all others, too.
        assert float(objective.record.num_gradients) == taken + asked_here
    cost = {1: "one gradient", 2: "two gradients", 3: "three gradients"}[case.gradients]
    assert f"Costs {cost} per step" in " ".join(METHODS[name].__doc__.split())


# Law 8: weights that are frozen, or without a gradient, are left alone


class PartlyUsed(keras.Model):
    """One layer is frozen, one weight has no part in the loss, one layer is trained."""

    def __init__(self):
        super().__init__()
        self.frozen = keras.layers.Dense(4, trainable=False)
        self.trained = keras.layers.Dense(1)
        self.unused = self.add_weight(shape=(3,), initializer="ones", name="unused")

    def call(self, x):
        return self.trained(ops.tanh(self.frozen(x)))


@AS_WRITTEN
@EVERY_METHOD
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_frozen_and_unused_weights_are_left_alone(name):
    inner = PartlyUsed()
    inner(models.regression()[0])
    rest = [*inner.frozen.variables, inner.unused]
    before, trained = values(rest), values(inner.trained.variables)
    train(wrap(inner, make(name)), [0])
    assert_equal_to_the_bit(rest, before)
    for a, b in zip(values(inner.trained.variables), trained, strict=True):
        assert np.all(a != b)


@every_combination("one_step", "second_order")
def test_a_weight_without_gradient_is_as_if_it_were_not_there(name, region, variant, float64):
    net, objective, w = of_tanh_net(float64)
    method = make(name, region, variant)
    _, expected = take(method, objective, w, float64)
    loss, unused = objective.loss_fn, float64.tensor([7.0, -5.0])
    objective = Spy(lambda w: loss(w[1:]), biases=[False, *net.biases])
    _, (first, *others) = take(method, objective, [unused, *w], float64)
    assert_equal_to_the_bit(float64.arrays(others), float64.arrays(expected))
    # Where nothing flows back: `None` on TensorFlow and PyTorch, zeros on JAX.
    assert first is None or not np.any(float64.arrays([first])[0])
    for point in objective.points:
        assert_equal_to_the_bit(float64.arrays(point[:1]), [[7.0, -5.0]])


@EVERY_METHOD
def test_a_weight_that_takes_no_part_stays_where_it_is_in_all_passes(name, float64):
    net, objective, w = of_tanh_net(float64, perturbed=[True, False, True])
    _, direction = take(make(name), objective, w, float64, remembered(name, net))
    start = float64.arrays(w)
    for point in objective.points[1:]:
        moved = [np.any(a != b) for a, b in zip(float64.arrays(point), start, strict=True)]
        assert moved == [True, False, True]
    assert all(np.any(d != 0) for d in float64.arrays(direction))


# Law 9: the backends agree with an oracle, in every combination


@every_combination(*VARIANTS, typical=1)
def test_direction_agrees_with_the_oracle(name, region, variant, float64):
    net, objective, w = of_tanh_net(float64)
    method, memory = make(name, region, variant), remembered(name, net)
    _, direction = take(method, objective, w, float64, memory)
    expected = expected_direction(name, region, net, **variant)
    # The oracle of the second order takes differences.
    tolerance = {"rtol": 1e-7, "atol": 1e-8} if variant.get("second_order") else {}
    float64.assert_close(direction, expected, **tolerance)


# Law 10: saving and loading reproduce the next step


@EVERY_METHOD
def test_config_round_trip_gives_the_same_method(name, float64):
    method = make(name, variant={"ascent_steps": 2} if CASES[name].climbs else {})
    copy = methods.deserialize(json.loads(json.dumps(methods.serialize(method))))
    assert type(copy) is type(method)
    assert copy.get_config() == method.get_config()
    directions = []
    for m in (method, copy):
        _, objective, w = of_tanh_net(float64)
        directions.append(float64.arrays(take(m, objective, w, float64)[1]))
    assert_equal_to_the_bit(*directions)


@AS_WRITTEN
@EVERY_METHOD
def test_a_keras_file_reproduces_the_next_step(name, tmp_path):
    """With Adam's slots, BatchNormalization's statistics, and a radius changed by hand."""
    model = wrap(models.batchnorm_net(), METHODS[name](), keras.optimizers.Adam(0.1))
    model.method.rho = 0.2
    train(model, [0, 1])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.method) is METHODS[name]
    assert loaded.method.get_config() == model.method.get_config()
    assert_equal_to_the_bit(loaded.variables, model.variables)
    train(model, [2])
    train(loaded, [2])
    assert_equal_to_the_bit(loaded.variables, model.variables)
    assert_equal_to_the_bit(loaded.optimizer.variables, model.optimizer.variables)


@AS_WRITTEN
@MOST_METHODS
def test_a_weights_file_holds_the_radius(name, tmp_path):
    """What a callback has made of rho lives on, and so does the highest learning rate."""
    model, other = (wrap(models.mlp(), METHODS[name]()) for _ in range(2))
    model.method.rho = 0.2
    train(model, [0])
    train(other, [5])
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    assert float(other.method.rho) == pytest.approx(0.2)
    assert float(other.highest_learning_rate) == float(model.highest_learning_rate)
    train(model, [1])
    train(other, [1])
    assert_equal_to_the_bit(other.variables, model.variables)


# Methods with a memory


@keras.saving.register_keras_serializable(package="tests")
class ClimbsAlongAverage(methods.Method):
    """SAM that ascends along an exponential moving average of the gradients.

    ```
    average = decay * average + (1 - decay) * g        # at first 0
    direction = ∇L(w + rho * average / ‖average‖)
    ```
    """

    def __init__(self, rho=0.05, decay=0.5, **kwargs):
        super().__init__(**kwargs)
        self.rho, self.decay = rho, decay

    def initial_state(self, variables):
        return [np.zeros(v.shape, "float32") for v in variables]

    def step(self, objective, w, state):
        g = objective(w).gradient
        average = [self.decay * a + (1 - self.decay) * t for a, t in zip(state, g, strict=True)]
        e = self.neighborhood.perturbation(objective.perturbed(average), w, self.rho)
        return objective([t + d for t, d in zip(w, e, strict=True)]).gradient, average

    def get_config(self):
        return {**super().get_config(), "rho": self.rho, "decay": self.decay}


@AS_WRITTEN
def test_the_memory_of_a_method_moves_with_each_step():
    inner, copy = models.twins(models.mlp)
    model = wrap(inner, ClimbsAlongAverage())
    compiled(copy)
    average = [np.zeros(v.shape) for v in copy.trainable_variables]
    assert_equal_to_the_bit(model.method_state, average)
    for seed in range(3):
        x, y = models.regression(seed=seed)
        models.assign(copy.trainable_variables, values(inner.trainable_variables))
        _, g = models.loss_and_gradient(copy, x, y)
        model.train_on_batch(x, y)
        average = [0.5 * a + 0.5 * t for a, t in zip(average, g, strict=True)]
        models.assert_close(model.method_state, average)


def check_memory_of_a_skipped_step():
    model = wrap(models.mlp(), ClimbsAlongAverage())
    x, y = models.regression()
    assert_trains(model, x, y)
    assert all(np.any(v) for v in values(model.method_state))
    assert_skips(model, np.full_like(x, np.nan), y)
    assert_trains(model, x, y)


@AS_WRITTEN
def test_the_memory_of_a_method_stays_put_on_a_skipped_step():
    check_memory_of_a_skipped_step()


@COMPILED
def test_the_memory_of_a_method_stays_put_on_a_skipped_step_compiled():
    check_memory_of_a_skipped_step()


@AS_WRITTEN
def test_the_memory_of_a_method_is_in_a_keras_file(tmp_path):
    model = wrap(models.mlp(), ClimbsAlongAverage(rho=0.3, decay=0.8))
    train(model, [0, 1])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.method.decay == 0.8
    assert_equal_to_the_bit(loaded.method_state, model.method_state)
    train(model, [2])
    train(loaded, [2])
    assert_equal_to_the_bit(loaded.variables, model.variables)


@AS_WRITTEN
@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
def test_the_memory_of_a_method_is_in_a_weights_file(tmp_path, built):
    """Also when the wrapped model had no weights yet when it was wrapped."""

    def fresh():
        inner = models.Subclassed()
        if built:
            inner(np.zeros((1, 3), "float32"))
        return wrap(inner, ClimbsAlongAverage())

    model, other = fresh(), fresh()
    train(model, [0, 1])
    train(other, [5])
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    assert_equal_to_the_bit(other.method_state, model.method_state)
    train(model, [2])
    train(other, [2])
    assert_equal_to_the_bit(other.variables, model.variables)

"""Measures of sharpness, against NumPy: a linear model under mean squared error is a quadratic."""

import itertools

import keras
import numpy as np
import pytest

from keras_sharp import SharpnessAwareModel, neighborhoods, sharpness
from keras_sharp.surface import LossSurface
from tests import models, oracles
from tests.models import BACKEND, assert_same, values
from tests.oracles import REGIONS

AS_WRITTEN = pytest.mark.usefixtures("as_written")
EXTREMES = ["max_sharpness", "min_sharpness", "bilateral_sharpness"]
MEASURES = [
    *EXTREMES,
    "surrogate_gap",
    "gap_curvature",
    "average_sharpness",
    "m_sharpness",
    "gradient_angle",
]


class Quadratic:
    """`mean((x @ w + b - y)²)` in float64, of one vector; each example has a weight."""

    def __init__(self, model, x, y, weights=None):
        self.x = np.concatenate([x, np.ones((len(x), 1))], axis=1).astype("float64")
        self.y = y.astype("float64")[:, 0]
        self.weights = np.ones(len(x)) if weights is None else weights
        self.w = oracles.join(values(model.trainable_variables))
        self.bias = np.arange(len(self.w)) == len(self.w) - 1
        self.hessian = 2 * (self.x * self.weights[:, None]).T @ self.x / len(x)

    def loss(self, w):
        return np.mean(self.weights * (self.x @ w - self.y) ** 2)

    def gradient(self, w):
        return 2 * self.x.T @ (self.weights * (self.x @ w - self.y)) / len(self.y)

    def change(self, e):
        return self.loss(self.w + e) - self.loss(self.w)


def setting(n=8, weights=None):
    """A linear model, its data and the oracle."""
    model = models.linear(use_bias=True, bias_initializer=keras.initializers.Constant(3.0))
    model.compile("sgd", "mse")
    x, y = models.regression(n)
    return model, x, y, Quadratic(model, x, y, weights)


def at_minimum(model, x):
    """Targets that the model predicts: the gradient and the loss are zero."""
    y = keras.ops.convert_to_numpy(model(x))
    return y, Quadratic(model, x, y)


def region_of(name):
    return getattr(neighborhoods, REGIONS[name].of)(**REGIONS[name].arguments)


# Values


@AS_WRITTEN
@pytest.mark.parametrize("region", REGIONS)
def test_one_step_is_the_formula_in_every_neighborhood(region):
    model, x, y, oracle = setting()
    step = REGIONS[region].step(oracle.gradient(oracle.w), oracle.w, oracle.bias, 0.3)
    up, down = oracle.change(step), -oracle.change(-step)
    arguments = {"rho": 0.3, "neighborhood": region_of(region)}
    for name, expected in zip(EXTREMES, [up, down, up + down], strict=True):
        actual = getattr(sharpness, name)(model, x, y, **arguments)
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert sharpness.surrogate_gap(model, x, y, **arguments) == pytest.approx(up, rel=1e-4)
    if region == "ball_2":
        curvature = sharpness.gap_curvature(model, x, y, rho=0.3)
        assert curvature == pytest.approx(2 * up / 0.3**2, rel=1e-4)


@AS_WRITTEN
def test_at_a_minimum_many_steps_find_the_largest_eigenvalue():
    """There the gradient is zero and one step finds nothing."""
    model, x, _, _ = setting()
    y, oracle = at_minimum(model, x)
    largest = np.linalg.eigvalsh(oracle.hessian)[-1]
    assert sharpness.max_sharpness(model, x, y, rho=0.1) < 1e-9
    found = sharpness.gap_curvature(model, x, y, rho=0.1, steps=30, restarts=1)
    assert found == pytest.approx(largest, rel=1e-2)
    found = sharpness.max_sharpness(model, x, y, rho=0.1, steps=30, restarts=1)
    assert found == pytest.approx(0.5 * 0.1**2 * largest, rel=1e-2)


@AS_WRITTEN
def test_at_a_saddle_the_ascent_is_not_led_astray_by_a_larger_negative_eigenvalue():
    model = models.linear(features=2, kernel_initializer="zeros")
    model.compile("sgd", lambda y, y_pred: y * y_pred**2)
    x, y = np.eye(2, dtype="float32"), np.array([[-10.0], [5.0]], "float32")  # The eigenvalues.
    found = sharpness.gap_curvature(model, x, y, rho=0.1, steps=20, restarts=1)
    assert found == pytest.approx(5.0, rel=1e-3)


@AS_WRITTEN
def test_restarts_find_the_worst_corner_of_a_cube():
    """A convex function is highest in a corner: sixteen of them, all tried here."""
    model, x, y, oracle = setting()
    corners = [0.5 * np.array(signs) for signs in itertools.product([-1, 1], repeat=4)]
    worst = max(map(oracle.change, corners))
    cube = {"rho": 0.5, "neighborhood": neighborhoods.Ball(float("inf"))}
    found = sharpness.max_sharpness(model, x, y, steps=3, restarts=10, **cube)
    assert found == pytest.approx(worst, rel=1e-4)


@AS_WRITTEN
@pytest.mark.parametrize("region", ["ball_2", "ball_inf", "adaptive"])
def test_descents_find_the_minimum_of_a_wide_region(region):
    """Which holds the minimum of all: min-sharpness is what is left to gain."""
    model, x, y, oracle = setting()
    best = np.linalg.lstsq(oracle.x, oracle.y, rcond=None)[0]
    distance = REGIONS[region].size(best - oracle.w, oracle.w, oracle.bias)
    found = sharpness.min_sharpness(
        model, x, y, rho=distance, neighborhood=region_of(region), steps=20, restarts=2
    )
    left = oracle.loss(oracle.w) - oracle.loss(best)
    assert 0 < found <= left * (1 + 1e-5)


@AS_WRITTEN
@pytest.mark.parametrize("name", EXTREMES)
def test_more_steps_and_restarts_find_no_less(name):
    model = models.mlp()
    model.compile("sgd", "mse")
    x, y = models.regression()
    measure = getattr(sharpness, name)
    found = [
        measure(model, x, y, rho=0.5, steps=s, restarts=r) for s, r in [(1, 0), (4, 0), (4, 3)]
    ]
    assert found[0] <= found[1] <= found[2]
    assert found[0] < found[2]


@AS_WRITTEN
@pytest.mark.parametrize(
    ("region", "size", "scaled"),
    [("ball_2", 4**-0.5, False), ("ball_inf", 1.0, False), ("adaptive_inf", 1.0, True)],
)
def test_average_sharpness_on_a_quadratic_is_half_the_weighted_trace(region, size, scaled):
    model, x, y, oracle = setting()
    neighborhood = region_of(region)
    mean, error = sharpness.average_sharpness(
        model, x, y, rho=0.2, neighborhood=neighborhood, samples=200
    )
    scale = np.ones(4)
    if scaled:
        scale = oracles.adaptive_scale(oracle.w, oracle.bias, neighborhood.eta)
    expected = 0.5 * (0.2 * size) ** 2 * scale**2 @ np.diag(oracle.hessian)
    assert abs(mean - expected) < 4 * error
    assert 0 < error < 0.15 * expected


@AS_WRITTEN
def test_the_standard_error_is_that_of_the_mean():
    model, x, y, _ = setting()
    runs = [sharpness.average_sharpness(model, x, y, samples=20, seed=i) for i in range(30)]
    spread = np.std([run.value for run in runs], ddof=1)
    assert np.mean([run.standard_error for run in runs]) == pytest.approx(spread, rel=0.4)


@AS_WRITTEN
@pytest.mark.parametrize("m", [1, 3, 8, 100])
def test_m_sharpness_is_the_mean_over_groups(m):
    """Of 8 examples in groups of 3, the last group has 2, and weighs as much as 2."""
    weights = np.linspace(0.5, 2, 8)
    model, x, y, _ = setting()
    total = 0.0
    for start in range(0, 8, m):
        group = slice(start, start + m)
        oracle = Quadratic(model, x[group], y[group], weights[group])
        g = oracle.gradient(oracle.w)
        total += len(x[group]) / 8 * oracle.change(0.3 * g / np.linalg.norm(g))
    found = sharpness.m_sharpness(model, x, y, weights.astype("float32"), m=m, rho=0.3)
    assert found == pytest.approx(total, rel=1e-4)


@AS_WRITTEN
@pytest.mark.parametrize("rho", [0.3, -0.3, 1e-3, 0.0])
def test_the_angle_is_that_of_the_two_gradients(rho):
    model, x, y, oracle = setting()
    g = oracle.gradient(oracle.w)
    other = oracle.gradient(oracle.w + rho * g / np.linalg.norm(g))
    expected = np.degrees(
        np.arccos(min(1.0, g @ other / np.linalg.norm(g) / np.linalg.norm(other)))
    )
    found = sharpness.gradient_angle(model, x, y, rho=rho)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


@AS_WRITTEN
def test_across_a_valley_the_gradients_are_opposite():
    model = models.linear(features=1, kernel_initializer="ones")
    model.compile("sgd", "mse")
    x, y = np.ones((2, 1), "float32"), np.full((2, 1), 0.9, "float32")
    assert sharpness.gradient_angle(model, x, y, rho=0.05) == pytest.approx(0, abs=0.01)
    assert sharpness.gradient_angle(model, x, y, rho=-0.5) == pytest.approx(180, abs=0.01)
    # At a minimum there is no gradient.
    assert sharpness.gradient_angle(model, x, np.ones((2, 1)), rho=0.5) == 0


def relu_net(use_bias=False, normalized=False):
    """Each hidden unit may be scaled by a number, and what it goes into by the inverse."""
    keras.utils.set_random_seed(0)
    first = keras.layers.Dense(4, use_bias=use_bias, bias_initializer="normal")
    second = keras.layers.Dense(1, use_bias=use_bias, bias_initializer="normal")
    between = [keras.layers.BatchNormalization(beta_initializer="normal")] if normalized else []
    model = keras.Sequential(
        [keras.Input((3,)), first, *between, keras.layers.Activation("relu"), second]
    )
    model.compile("sgd", "mse")
    return model, between[0].trainable_variables if normalized else first.weights, second.kernel


NETS = {
    "without biases": {},
    "with biases": {"use_bias": True},
    "scales of BatchNormalization": {"normalized": True},
}


@AS_WRITTEN
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ["bilateral_sharpness", "average_sharpness", "m_sharpness"])
def test_adaptive_sharpness_does_not_depend_on_how_the_units_are_scaled(name, net):
    x, y = models.regression()

    def found(c, neighborhood):
        model, incoming, outgoing = relu_net(**NETS[net])
        for variable in incoming:
            variable.assign(values([variable])[0] * c)
        outgoing.assign(values([outgoing])[0] / c[:, None])
        return measure(name, model, x, y, rho=0.1, neighborhood=neighborhood)

    one, other = np.ones(4), np.array([0.02, 0.3, 8.0, 50.0])
    adaptive = found(one, "adaptive")
    # A difference of two losses of about 1, in float32.
    assert found(other, "adaptive") == pytest.approx(adaptive, rel=1e-3, abs=3e-7)
    # The region of training has a size of its own, and the ball anyhow.
    for neighborhood in (neighborhoods.AdaptiveBall(), "euclidean"):
        before, after = (found(c, neighborhood) for c in (one, other))
        assert abs(after - before) > 0.01 * before  # Several times what passes above.


@AS_WRITTEN
def test_in_adaptive_sharpness_a_weight_of_zero_does_not_move():
    model, x, y, _ = setting()
    model.trainable_variables[1].assign([0.0])
    region = sharpness.as_region("adaptive")
    w = [keras.ops.convert_to_tensor(v) for v in values(model.trainable_variables)]
    e = region.perturbation([keras.ops.ones_like(t) for t in w], w, 0.1, [False, True])
    assert values(e)[1] == 0
    model.trainable_variables[0].assign(np.zeros((3, 1)))
    assert sharpness.max_sharpness(model, x, y, neighborhood="adaptive") == 0


# Rounding: a rise that is small beside the loss. These tests compile: they evaluate a lot.


def raw_targets(size, n=200):
    """A regression at its minimum: a loss of `size²`, curvatures of about 2."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3)).astype("float32")
    y = (x @ [[1.0], [2.0], [3.0]] + size * rng.normal(size=(n, 1))).astype("float32")
    model = models.linear()
    model.compile("sgd", "mse")
    model.set_weights([np.linalg.lstsq(x.astype("float64"), y.astype("float64"), rcond=None)[0]])
    return model, x, y


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(("size", "batch_size"), [(1e2, 200), (1e4, 70)])
def test_a_rise_below_the_rounding_of_the_loss_is_right(size, batch_size):
    """At 1e4 the loss is rounded to multiples of 8: of the rise nothing is left."""
    model, x, y = raw_targets(size)
    surface = LossSurface(model, x, y, batch_size=batch_size)
    hessian = 2 * x.T.astype("float64") @ x / len(x)
    # At a minimum the first direction is that of a gradient of rounding: one start may do badly.
    found = sharpness.gap_curvature(surface, steps=5, restarts=3)
    assert found == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=0.1)
    random = np.random.default_rng(0)
    e = [0.05 / np.sqrt(3) * random.normal(size=(3, 1)) for _ in range(5)]
    rises = [np.mean((x.astype("float64") @ d) ** 2) for d in e]
    average, error = sharpness.average_sharpness(surface, samples=5, seed=0)
    assert average == pytest.approx(np.mean(rises), rel=0.01)
    assert error == pytest.approx(np.std(rises, ddof=1) / np.sqrt(5), rel=0.01)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("m", [16, 200])
def test_in_groups_it_is_right_as_well(m):
    model, x, y = raw_targets(1e4)
    shifted = values(model.trainable_variables)[0] + 0.5
    model.set_weights([shifted])
    total = 0.0
    for start in range(0, 200, m):
        group = slice(start, start + m)
        oracle = Quadratic(model, x[group], y[group])
        oracle.w, oracle.x = oracle.w, x[group].astype("float64")
        g = oracle.gradient(oracle.w)
        step = 1e-4 * g / np.linalg.norm(g)
        total += len(x[group]) / 200 * (g @ step + step @ (oracle.x.T @ oracle.x) @ step / m)
    found = sharpness.m_sharpness(model, x, y, m=m, rho=1e-4)
    assert found == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("name", [*EXTREMES, "gap_curvature", "average_sharpness"])
def test_where_nothing_but_rounding_is_left_a_warning_says_so(name):
    """The slopes, too, are rounded, in units of the residuals."""
    model, x, y = raw_targets(1e8)
    expected = rf"`{name}` may be rounding: it is .* noise, beside a loss of .*Take a larger rho"
    with pytest.warns(UserWarning, match=expected) as said:
        measure(name, model, x, y)
    ours = [warning for warning in said if issubclass(warning.category, UserWarning)]
    assert [warning.filename for warning in ours] == [__file__]


@AS_WRITTEN
def test_where_the_gradient_is_not_that_of_the_loss_the_losses_count():
    """A quantized layer has a gradient that is made up."""

    def loss(y, y_pred):
        wrong = 30.0 * y_pred
        return 1e4 + y_pred**2 + wrong - keras.ops.stop_gradient(wrong)

    model, x, y, _ = setting()
    model.compile("sgd", loss)
    with pytest.warns(UserWarning, match="`max_sharpness` may be rounding"):
        found = sharpness.max_sharpness(model, x, y, rho=1e-3)
    assert found == pytest.approx(0, abs=0.05)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(("sure", "logits"), [(1.0, True), (30.0, True), (30.0, False)])
def test_ordinary_networks_give_no_false_alarm(sure, logits):
    keras.utils.set_random_seed(1)
    last = keras.layers.Dense(3, None if logits else "softmax")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(16, "relu"), last])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=logits))
    last.kernel.assign(values([last.kernel])[0] * sure)
    x, _ = models.classification(64)
    y = values([model(x)])[0].argmax(axis=1)  # Right everywhere: the loss of a trained network.
    surface = LossSurface(model, x, y, batch_size=32)
    names = ["bilateral_sharpness", "average_sharpness", "m_sharpness"]
    for name, rho in itertools.product(names, (1e-3, 0.5)):
        assert np.isfinite(measure(name, surface, rho=rho))


# Properties of all measures


def measure(name, *args, **kwargs):
    """A measure in one float."""
    return float(np.ravel(getattr(sharpness, name)(*args, **kwargs))[0])


@AS_WRITTEN
@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_changes_nothing_and_sees_through_the_wrapper(name):
    inner = models.batchnorm_net()
    model = SharpnessAwareModel(inner, "sam")
    model.compile("sgd", "mse", metrics=["mae"])
    x, y = models.regression()
    model.train_on_batch(x, y)
    state = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    before = values(state)
    assert measure(name, model, x, y) == measure(name, inner, x, y)
    assert_same(state, before, bits=True)


@AS_WRITTEN
@pytest.mark.parametrize("name", [m for m in MEASURES if m != "m_sharpness"])
def test_a_measure_does_not_depend_on_the_batch_size(name):
    model, x, y, _ = setting()
    weights = np.linspace(0, 2, 8).astype("float32")
    found = [measure(name, model, x, y, weights, batch_size=size) for size in (3, 8)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@AS_WRITTEN
@pytest.mark.parametrize("name", [m for m in MEASURES if m != "gap_curvature"])
def test_without_a_radius_nothing_is_sharp(name):
    model, x, y, _ = setting()
    assert measure(name, model, x, y, rho=0) == pytest.approx(0, abs=1e-6)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch is eager in any case")
def test_measures_of_one_surface_compile_once():
    runs = []

    def loss(y, y_pred):
        runs.append(1)
        return keras.ops.mean((y - y_pred) ** 2)

    model, x, y, _ = setting()
    model.compile("sgd", loss)
    surface = LossSurface(model, x, y, batch_size=4)
    first = sharpness.max_sharpness(surface, rho=0.3)
    runs.clear()
    for name in MEASURES:
        measure(name, surface, rho=0.3)
    assert runs == []
    # It follows the weights of the model.
    model.trainable_variables[0].assign(model.trainable_variables[0] * 3.0)
    found = sharpness.max_sharpness(surface, rho=0.3)
    assert found != first
    assert found == pytest.approx(sharpness.max_sharpness(model, x, y, rho=0.3), rel=1e-4)


@AS_WRITTEN
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("max_sharpness", {"restarts": 3, "rho": 0.5}), ("average_sharpness", {})],
)
def test_a_seed_gives_the_same_number_again(name, arguments):
    model = models.mlp()
    model.compile("sgd", "mse")
    data = models.regression()
    one, again, other = (measure(name, model, *data, seed=s, **arguments) for s in (1, 1, 2))
    assert one == again
    if name == "average_sharpness":
        assert one != other


# Bad input


@pytest.mark.parametrize(
    "rho", [-0.1, float("nan"), float("inf"), "0.1", None, True, [0.1]], ids=repr
)
@pytest.mark.parametrize("name", [m for m in MEASURES if m != "gradient_angle"])
def test_a_radius_is_a_finite_number(name, rho):
    model, x, y, _ = setting()
    with pytest.raises(ValueError, match=r"`rho`, the radius .* >= 0\. Received: rho="):
        measure(name, model, x, y, rho=rho)


@pytest.mark.parametrize("rho", [float("nan"), float("inf"), "0.1", None, True], ids=repr)
def test_the_radius_of_an_angle_may_be_negative_but_is_a_number(rho):
    model, x, y, _ = setting()
    with pytest.raises(ValueError, match=r"must be a finite number\. Received: rho="):
        sharpness.gradient_angle(model, x, y, rho=rho)


def test_a_curvature_needs_a_radius():
    model, x, y, _ = setting()
    with pytest.raises(ValueError, match=r"`rho` must be > 0.*Received: rho=0"):
        sharpness.gap_curvature(model, x, y, rho=0)


@AS_WRITTEN
@pytest.mark.parametrize(
    ("name", "argument", "lowest"),
    [
        ("max_sharpness", "steps", 1),
        ("min_sharpness", "restarts", 0),
        ("average_sharpness", "samples", 2),
        ("m_sharpness", "m", 1),
    ],
)
def test_counts_are_integers(name, argument, lowest):
    model, x, y, _ = setting()
    for wrong in (lowest - 1, 1.5, "2", None, True):
        expected = f"`{argument}` must be an integer >= {lowest}.*Received: {argument}={wrong!r}"
        with pytest.raises(ValueError, match=expected):
            measure(name, model, x, y, **{argument: wrong})


@AS_WRITTEN
@pytest.mark.parametrize("name", MEASURES)
def test_a_loss_that_is_not_finite_has_no_sharpness(name):
    model, x, y, _ = setting()
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"is not finite\. Received: loss=nan"):
        measure(name, model, x, y)


@pytest.mark.parametrize("name", MEASURES)
def test_data_and_model_must_be_there(name):
    model, x, y, _ = setting()
    with pytest.raises(ValueError, match="There are no data"):
        measure(name, model)
    with pytest.raises(ValueError, match="There are no data"):
        measure(name, model, x[:0], y[:0])
    with pytest.raises(ValueError, match=r"model\.compiled=False"):
        measure(name, models.linear(), x, y)
    with pytest.raises(ValueError, match="Received: a LossSurface, and data"):
        measure(name, LossSurface(model, x, y), x, y)


def test_neighborhoods_are_known_by_name():
    model, x, y, _ = setting()
    with pytest.raises(ValueError, match="Did you mean 'adaptive'"):
        sharpness.max_sharpness(model, x, y, neighborhood="adaptiv")

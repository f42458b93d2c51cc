"""The regions by themselves: steps, sizes, projections, and arithmetic at the ends of floats."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_sharp import neighborhoods
from keras_sharp.engine import value_and_gradient
from keras_sharp.neighborhoods import AdaptiveBall, Ball, Unnormalized, WeightScaledBall
from tests import oracles
from tests.oracles import REGIONS

EVERY_REGION = pytest.mark.parametrize("region", REGIONS)
#: Those whose step has the same size, whatever the gradient.
BOUNDED = pytest.mark.parametrize("region", [r for r in REGIONS if r != "unnormalized"])
AS_WRITTEN = pytest.mark.usefixtures("as_written")

SHAPES, BIASES = ((2, 3), (4,), (1, 2)), (False, True, False)
BIAS = oracles.mask(BIASES, SHAPES)


def make(region):
    return getattr(neighborhoods, REGIONS[region].of)(**REGIONS[region].arguments)


def vector(seed):
    return np.random.default_rng(seed).normal(size=12)


def shaped(flat, float64):
    return float64.tensors(oracles.split(flat, SHAPES))


def flat(tensors):
    return oracles.join([ops.convert_to_numpy(t) for t in tensors])


# Steps


@EVERY_REGION
@pytest.mark.parametrize("rho", [0.3, -0.3], ids=["up", "down"])
def test_perturbation_agrees_with_the_oracle(region, rho, float64):
    g, w = vector(0), vector(1)
    e = make(region).perturbation(
        shaped(g, float64), shaped(w, float64), float64.tensor(rho), BIASES
    )
    expected = REGIONS[region].step(g, w, BIAS, rho)
    float64.assert_close(e, oracles.split(expected, SHAPES))


@pytest.mark.parametrize("region", ["ball_2", "adaptive", "unnormalized"])
def test_a_python_float_is_a_radius_too(region, float64):
    g, w = vector(0), vector(1)
    e = make(region).perturbation(shaped(g, float64), shaped(w, float64), 0.3, BIASES)
    float64.assert_close(e, oracles.split(REGIONS[region].step(g, w, BIAS, 0.3), SHAPES))


@BOUNDED
@pytest.mark.parametrize("rho", [0.0, 1e-6, 0.3, 40.0])
def test_perturbation_lies_on_the_border(region, rho, float64):
    g, w = vector(0), vector(1)
    neighborhood, w_ = make(region), shaped(w, float64)
    e = neighborhood.perturbation(shaped(g, float64), w_, float64.tensor(rho), BIASES)
    size = REGIONS[region].size(flat(e), w, BIAS)
    np.testing.assert_allclose(size, rho, rtol=1e-12)
    np.testing.assert_allclose(float(neighborhood.norm(e, w_, BIASES)), size, rtol=1e-12)


@pytest.mark.parametrize("region", ["ball_2", "ball_1.5", "ball_4", "ball_inf", "adaptive"])
def test_no_other_point_of_the_region_is_steeper(region, float64):
    """What the formulas are for: `e` maximizes `g·e` over the region (Hölder's inequality)."""
    g, w = vector(0), vector(1)
    e = flat(make(region).perturbation(shaped(g, float64), shaped(w, float64), 0.3, BIASES))
    size, rng = REGIONS[region].size, np.random.default_rng(2)
    for _ in range(200):
        other = e + 0.1 * rng.normal(size=12)
        other *= 0.3 / size(other, w, BIAS)
        assert g @ other < g @ e


@BOUNDED
def test_the_size_of_the_gradient_makes_no_difference(region, float64):
    g, w = vector(0), shaped(vector(1), float64)
    steps = [
        make(region).perturbation(shaped(g * scale, float64), w, 0.3, BIASES)
        for scale in (1.0, 1e-8, 1e8)
    ]
    for step in steps[1:]:
        float64.assert_close(step, float64.arrays(steps[0]))


def test_ball_of_large_p_approaches_the_maximum_norm(float64):
    g, w = shaped(vector(0), float64), shaped(vector(1), float64)
    near = flat(Ball(1e6).perturbation(g, w, 0.3))
    np.testing.assert_allclose(near, flat(Ball(float("inf")).perturbation(g, w, 0.3)), rtol=1e-4)


def test_only_the_adaptive_ball_tells_biases_from_weights(float64):
    g, w = shaped(vector(0), float64), shaped(vector(1), float64)
    for region in REGIONS:
        with_biases = flat(make(region).perturbation(g, w, 0.3, BIASES))
        without = flat(make(region).perturbation(g, w, 0.3))
        assert np.any(with_biases != without) == region.startswith("adaptive")


def test_adaptive_ball_does_not_see_a_rescaling_of_layers(float64):
    """Kwon et al., section 3: `‖e / T‖` is that of the same network written in another way.

    A layer is multiplied by a and the next divided by it: gradients go the inverse way.
    With `eta = 0` the perturbations do as the weights, to the bit for powers of 2.
    """
    g, w, region = vector(0), vector(1), AdaptiveBall(eta=0.0)
    scale = np.repeat([4.0, 1.0, 0.25], [6, 4, 2])
    e = flat(region.perturbation(shaped(g, float64), shaped(w, float64), 0.3))
    rescaled = region.perturbation(shaped(g / scale, float64), shaped(w * scale, float64), 0.3)
    np.testing.assert_allclose(flat(rescaled), e * scale, rtol=1e-12)


# Projections


@EVERY_REGION
@pytest.mark.parametrize("far", [0.1, 3.0], ids=["inside", "outside"])
def test_projection_agrees_with_the_oracle(region, far, float64):
    w = vector(1)
    e = vector(2) * 0.3 * far / REGIONS[region].size(vector(2), w, BIAS)
    back = make(region).project(shaped(e, float64), shaped(w, float64), float64.tensor(0.3), BIASES)
    expected = oracles.project(REGIONS[region], e, w, BIAS, 0.3)
    float64.assert_close(back, oracles.split(expected, SHAPES))


@EVERY_REGION
def test_projection_leaves_points_inside_where_they_are(region, float64):
    """To the bit, but where the way leads into the coordinates of the region and back."""
    w = shaped(vector(1), float64)
    e = shaped(vector(2) * 1e-3, float64)
    back = make(region).project(e, w, float64.tensor(0.3), BIASES)
    rtol = 1e-15 if region.startswith("adaptive") else 0
    np.testing.assert_allclose(flat(back), flat(e), rtol=rtol)


@BOUNDED
def test_projection_is_within_the_region_and_repeats_itself(region, float64):
    w = shaped(vector(1), float64)
    back = make(region).project(shaped(vector(2) * 9, float64), w, float64.tensor(0.3), BIASES)
    assert REGIONS[region].size(flat(back), vector(1), BIAS) <= 0.3 * (1 + 1e-14)
    again = make(region).project(back, w, float64.tensor(0.3), BIASES)
    np.testing.assert_allclose(flat(again), flat(back), rtol=1e-14)


def test_projection_to_the_maximum_norm_moves_each_entry_least(float64):
    """A radial projection would shrink the entries that are inside already."""
    e, w = float64.tensors([[0.1, -2.0, 0.3]]), float64.tensors([[1.0, 1.0, 1.0]])
    back = Ball(float("inf")).project(e, w, float64.tensor(0.3))
    np.testing.assert_array_equal(flat(back), [0.1, -0.3, 0.3])


@EVERY_REGION
def test_projection_to_radius_zero_gives_zero(region, float64):
    w = shaped(vector(1), float64)
    for e in (vector(2), np.zeros(12)):
        back = flat(make(region).project(shaped(e, float64), w, float64.tensor(0.0), BIASES))
        expected = e if region == "unnormalized" else 0 * e
        np.testing.assert_array_equal(back, expected)


# Zero, tiny, huge


@EVERY_REGION
def test_zero_gradient_gives_zero_perturbation(region, float64):
    for w in (vector(1), np.zeros(12)):
        zero = shaped(np.zeros(12), float64)
        e = make(region).perturbation(zero, shaped(w, float64), float64.tensor(0.3), BIASES)
        np.testing.assert_array_equal(flat(e), np.zeros(12))
        assert float(make(region).norm(e, shaped(w, float64), BIASES)) == 0


@pytest.mark.parametrize("region", [AdaptiveBall(eta=0.0), WeightScaledBall(gamma=0.0)])
def test_weights_at_zero_are_not_perturbed_without_eta(region, float64):
    w = float64.tensors([[0.0, 2.0, 0.0, -1.0]])
    e = region.perturbation(float64.tensors([[5.0, 1.0, -2.0, 1.0]]), w, float64.tensor(0.3))
    moved = flat(e)
    np.testing.assert_array_equal(moved != 0, [False, True, False, True])
    for zero_weights in (w, float64.tensors([[0.0] * 4])):
        e = region.perturbation(float64.tensors([[5.0, 1.0, -2.0, 1.0]]), zero_weights, 0.3)
        assert np.all(np.isfinite(flat(e)))
        assert np.isfinite(float(region.norm(e, zero_weights)))


@EVERY_REGION
@pytest.mark.parametrize("zeros", [11, 12], ids=["all_but_one", "all"])
def test_the_derivative_of_the_perturbation_is_finite(region, zeros, float64):
    """Where the second order passes through it: at zero entries, too."""
    g, w = vector(0), vector(1)
    g[:zeros] = w[1 : 1 + zeros] = 0.0
    slope = shaped(vector(2), float64)

    def value(tensors):
        g_, w_ = tensors[:3], tensors[3:]
        e = make(region).perturbation(g_, w_, float64.tensor(0.3), BIASES)
        return sum(ops.sum(s * t) for s, t in zip(slope, e, strict=True)), None

    _, gradient = value_and_gradient(value, shaped(g, float64) + shaped(w, float64))
    for part in gradient:
        assert part is None or np.all(np.isfinite(ops.convert_to_numpy(part)))


@AS_WRITTEN
@BOUNDED
@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-8, 1e8, 1e30, 1e37])
def test_perturbation_has_its_size_for_any_float32_gradient(region, size):
    """Squares of these are 0 or inf in float32. Weights of 1, so that `T` is near 1."""
    check_size(region, "float32", size, 1e-5)


@AS_WRITTEN
@BOUNDED
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e4])
def test_perturbation_has_its_size_for_any_float16_gradient(region, size):
    """One over the norm of a small gradient, 1e6, is no float16 any more."""
    check_size(region, "float16", size, 2e-2)


@AS_WRITTEN
@BOUNDED
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_perturbation_has_its_size_for_any_bfloat16_gradient(region, size):
    check_size(region, "bfloat16", size, 3e-2)


def check_size(region, dtype, size, tolerance):
    entries = np.array([1.0, -0.5, 0.0, 0.75]) * size
    g = [ops.cast(ops.convert_to_tensor(part.astype("float32")), dtype) for part in [entries] * 2]
    w = [ops.ones_like(t) for t in g]
    e = make(region).perturbation(g, w, ops.convert_to_tensor(0.5))
    assert [t.dtype for t in e] == [t.dtype for t in g]
    measured = REGIONS[region].size(flat(e), np.ones(8), np.zeros(8, bool))
    np.testing.assert_allclose(measured, 0.5, rtol=tolerance)
    norm = float(make(region).norm(e, w))
    np.testing.assert_allclose(norm, 0.5, rtol=tolerance)


@AS_WRITTEN
@BOUNDED
@pytest.mark.parametrize("size", [1e-39, 1e-44, 2e38], ids=["subnormal", "smallest", "largest"])
def test_perturbation_is_finite_at_the_ends_of_float32(region, size):
    """Saturated networks have such gradients. Some machines take subnormal numbers for 0."""
    g = [ops.convert_to_tensor(np.array([size, 0.0], "float32"))]
    w = [ops.ones_like(g[0])]
    e = flat(make(region).perturbation(g, w, ops.convert_to_tensor(0.5)))
    assert np.all(np.isfinite(e))
    assert REGIONS[region].size(e, np.ones(2), np.zeros(2, bool)) <= 0.5001


# None


@EVERY_REGION
def test_a_weight_that_is_not_perturbed_counts_nowhere(region, float64):
    neighborhood, rho = make(region), float64.tensor(0.3)
    g, w = shaped(vector(0), float64), shaped(vector(1), float64)
    extra = float64.tensor([100.0, 200.0])
    expected = neighborhood.perturbation(g, w, rho, BIASES)
    e = neighborhood.perturbation([None, *g], [extra, *w], rho, [False, *BIASES])
    assert e[0] is None
    np.testing.assert_array_equal(flat(e[1:]), flat(expected))
    assert float(neighborhood.norm(e, [extra, *w], [False, *BIASES])) == float(
        neighborhood.norm(expected, w, BIASES)
    )
    back = neighborhood.project(e, [extra, *w], rho, [False, *BIASES])
    assert back[0] is None


@EVERY_REGION
def test_no_gradient_at_all_gives_no_perturbation(region, float64):
    w = shaped(vector(1), float64)
    none = [None] * 3
    assert make(region).perturbation(none, w, float64.tensor(0.3), BIASES) == none
    assert float(make(region).norm(none, w, BIASES)) == 0
    assert make(region).project(none, w, float64.tensor(0.3), BIASES) == none


# Constructors, configs, names


@pytest.mark.parametrize("p", [1, 0.5, 0, -2, float("nan"), "2", None, True, [2.0]])
def test_ball_refuses_orders_outside_its_range(p):
    with pytest.raises(ValueError, match=r"`p`.*\(1, inf\].*Received: p=") as error:
        Ball(p)
    assert repr(p) in str(error.value)
    with pytest.raises(ValueError, match="`p`"):
        AdaptiveBall(p=p)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.01", None, True])
def test_scales_refuse_what_is_no_finite_number(value):
    with pytest.raises(ValueError, match=r"`eta` must be a finite number >= 0. Received: eta="):
        AdaptiveBall(eta=value)
    with pytest.raises(ValueError, match=r"`gamma` must be a finite number >= 0. Received: gamma="):
        WeightScaledBall(gamma=value)


@pytest.mark.parametrize("value", [0, 1.0, "yes", None])
def test_whether_biases_are_scaled_is_a_boolean(value):
    with pytest.raises(
        ValueError, match=r"`scale_biases` must be True or False\. Received: scale_"
    ):
        AdaptiveBall(scale_biases=value)


def test_with_scaled_biases_all_weights_are_scaled(float64):
    w = float64.tensors([np.array([2.0, -3.0]), np.array([0.5])])
    for biases in (None, [False, True], [True, True]):
        scales = AdaptiveBall(eta=0.1, scale_biases=True).scales(w, biases)
        float64.assert_close(scales, [np.array([2.1, 3.1]), np.array([0.6])])


@EVERY_REGION
def test_config_round_trip(region):
    one = make(region)
    assert one.get_config().items() >= REGIONS[region].arguments.items()
    assert type(one).from_config(one.get_config()).get_config() == one.get_config()
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(one)))
    other = neighborhoods.get(config)
    assert type(other) is type(one)
    assert other.get_config() == one.get_config()


def test_an_integer_order_is_saved_as_the_float_it_is():
    assert Ball(3).get_config() == {"p": 3.0}
    assert AdaptiveBall(0).get_config() == {"eta": 0.0, "p": 2.0, "scale_biases": False}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("euclidean", Ball),
        ("adaptive", AdaptiveBall),
        ("weight_scaled", WeightScaledBall),
        ("Weight-Scaled", WeightScaledBall),
        ("unnormalized", Unnormalized),
        ("Ball", Ball),
        ("AdaptiveBall", AdaptiveBall),
        ("WeightScaledBall", WeightScaledBall),
        ("Unnormalized", Unnormalized),
    ],
)
def test_names(name, expected):
    assert type(neighborhoods.get(name)) is expected


def test_get_returns_an_instance_as_it_is():
    ball = Ball(3)
    assert neighborhoods.get(ball) is ball


def test_an_unknown_name_is_answered_with_the_nearest_spelling():
    with pytest.raises(ValueError, match=r"no neighborhood named 'euklidean'.*mean 'euclidean'"):
        neighborhoods.get("euklidean")


def test_a_class_in_place_of_an_instance_is_answered_with_a_hint():
    with pytest.raises(ValueError, match=r"Pass an instance of the class: Ball\(\)"):
        neighborhoods.get(Ball)


@pytest.mark.parametrize("wrong", [None, 2.0, [], {"class_name": "Dense"}])
def test_wrong_types_are_refused(wrong):
    with pytest.raises((ValueError, TypeError)):
        neighborhoods.get(wrong)

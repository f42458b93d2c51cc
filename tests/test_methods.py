"""The table of methods: names, configs, errors, defaults; and one example each, by hand."""

import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_sharp import Objective, SharpnessAwareModel, methods, schedules
from keras_sharp.methods import ASAM, BSAM, GSAM, METHODS, SAM, AdaptiveGSAM, Method
from keras_sharp.neighborhoods import AdaptiveBall, Ball, Unnormalized, WeightScaledBall
from keras_sharp.objective import Evaluation
from tests import models

AS_WRITTEN = pytest.mark.usefixtures("as_written")
INF = float("inf")

# Numbers by hand: the direction of one step with two weights


def direction(method, loss, *w, **kwargs):
    """What a method makes of a loss at a point. Each weight is a tensor of its own."""
    w = [ops.convert_to_tensor(np.array([a], "float32")) for a in w]
    objective = Objective(lambda w: ops.sum(loss(*w)), **kwargs)
    numbers = {key: setting.value_at(0, None) for key, setting in method.settings.items()}
    found, _ = method.step(objective, w, [], **numbers)
    return [float(d[0]) for d in found]


def product(a, b):
    """Its gradient at (a, b) is (b, a)."""
    return a * b


@AS_WRITTEN
def test_sam_by_hand():
    # L = 1.5 a² + b² at (1, 2): g = (3a, 2b) = (3, 4), ‖g‖ = 5.
    # e = 0.5 (3, 4) / 5 = (0.3, 0.4); at (1.3, 2.4) the gradient is (3.9, 4.8).
    found = direction(SAM(rho=0.5), lambda a, b: 1.5 * a**2 + b**2, 1.0, 2.0)
    assert found == pytest.approx([3.9, 4.8])


@AS_WRITTEN
@pytest.mark.parametrize(
    ("neighborhood", "expected"),
    [
        # Each time L = 1.5 a² + b² at (1, 2), g = (3, 4), rho = 0.5, and the direction is
        # (3 (1 + e_a), 2 (2 + e_b)).
        # Maximum norm: e = 0.5 (1, 1).
        (Ball(INF), [4.5, 5.0]),
        # p = 1.5, q = 3: g^(q-1) = (9, 16), ‖g‖_q^q = 27 + 64 = 91; e = 0.5 (9, 16) / 91^(2/3).
        (Ball(1.5), [3 * (1 + 4.5 / 91 ** (2 / 3)), 2 * (2 + 8 / 91 ** (2 / 3))]),
        # No normalization: e = 0.5 (3, 4).
        (Unnormalized(), [7.5, 8.0]),
        # T = (1, 2), one factor: e = 0.5 (1 * 3, 2 * 4) / 5 = (0.3, 0.8).
        (WeightScaledBall(gamma=0.0), [3.9, 5.6]),
        # T = (1, 2), in the maximum norm: e = 0.5 (1, 2).
        (AdaptiveBall(eta=0.0, p=INF), [4.5, 6.0]),
    ],
    ids=["maximum", "p=1.5", "unnormalized", "weight_scaled", "adaptive_maximum"],
)
def test_sam_in_other_neighborhoods_by_hand(neighborhood, expected):
    method = SAM(rho=0.5, neighborhood=neighborhood)
    assert direction(method, lambda a, b: 1.5 * a**2 + b**2, 1.0, 2.0) == pytest.approx(expected)


@AS_WRITTEN
def test_sam_in_two_steps_by_hand():
    # L = a - 0.8 a² + 4.8 ab at (0, 0), rho = 5: g = (1 - 1.6 a + 4.8 b, 4.8 a) = (1, 0).
    # e = (5, 0). There g = (-7, 24), ‖g‖ = 25: e = (5, 0) + 5 (-7, 24) / 25 = (3.6, 4.8).
    # Its norm is 6; projected back, e = (3, 4). There g = (15.4, 14.4).
    def loss(a, b):
        return a - 0.8 * a**2 + 4.8 * a * b

    found = direction(SAM(rho=5.0, ascent_steps=2), loss, 0.0, 0.0)
    assert found == pytest.approx([15.4, 14.4])


@AS_WRITTEN
def test_sam_of_second_order_by_hand():
    # Unnormalized on L = a b: w + rho g = (a + rho b, b + rho a). L there, with rho = 0.5, is
    # (a + b/2) (b + a/2) = 1.25 a b + (a² + b²) / 2; its gradient is (1.25 b + a, 1.25 a + b).
    method = SAM(rho=0.5, neighborhood="unnormalized", second_order=True)
    assert direction(method, product, 4.0, 3.0) == pytest.approx([7.75, 8.0])
    # The first order takes the gradient at (5.5, 5).
    method = SAM(rho=0.5, neighborhood="unnormalized")
    assert direction(method, product, 4.0, 3.0) == pytest.approx([5.0, 5.5])


@AS_WRITTEN
def test_asam_by_hand():
    # L = 3a + a² + b² at (0, 1), eta = 1: g = (3 + 2a, 2b) = (3, 2), T = (1, 2).
    # Tg = (3, 4), ‖Tg‖ = 5, T²g = (3, 8): e = 0.5 (3, 8) / 5 = (0.3, 0.8).
    # At (0.3, 1.8) the gradient is (3.6, 3.6).
    def loss(a, b):
        return 3 * a + a**2 + b**2

    assert direction(ASAM(rho=0.5, eta=1.0), loss, 0.0, 1.0) == pytest.approx([3.6, 3.6])
    # With b a bias, T = (1, 1): e = 0.5 (3, 2) / √13.
    # At (1.5, 1 + 1) / √13 the gradient is (3 + 3 / √13, 2 + 2 / √13).
    found = direction(ASAM(rho=0.5, eta=1.0), loss, 0.0, 1.0, biases=[False, True])
    assert found == pytest.approx([3 + 3 / 13**0.5, 2 + 2 / 13**0.5])


@AS_WRITTEN
def test_gsam_by_hand():
    # L = a b at (4, 3), rho = 5: g = (3, 4), e = (3, 4); at (7, 7): g_adv = (7, 7).
    # g·g_adv / ‖g_adv‖² = 49 / 98 = 0.5: g_perp = (3, 4) - (3.5, 3.5) = (-0.5, 0.5).
    # (7, 7) - 0.4 (-0.5, 0.5) = (7.2, 6.8).
    assert direction(GSAM(rho=5.0, alpha=0.4), product, 4.0, 3.0) == pytest.approx([7.2, 6.8])


@AS_WRITTEN
def test_adaptive_gsam_by_hand():
    # L = a b at (4, 3), gamma = 1: T = (5, 4), g = (3, 4), ‖g‖ = 5.
    # rho = 5: e = (5 * 3, 4 * 4) = (15, 16); at (19, 19): g_adv = (19, 19).
    # g_perp = (-0.5, 0.5) as above: (19, 19) - 0.4 (-0.5, 0.5) = (19.2, 18.8).
    method = AdaptiveGSAM(rho=5.0, alpha=0.4, gamma=1.0)
    assert direction(method, product, 4.0, 3.0) == pytest.approx([19.2, 18.8])


@AS_WRITTEN
def test_bsam_by_hand():
    # L = a b at (4, 3), both radii 5: g = (3, 4), ‖g‖ = 5.
    # Up, at (7, 7): g_up = (7, 7). Down, at (1, -1): g_down = (-1, 1).
    # ‖g_up‖ / ‖g_down‖ = 7: (7, 7) + (3, 4) - 7 (-1, 1) = (17, 4).
    assert direction(BSAM(rho=5.0, rho_min=5.0), product, 4.0, 3.0) == pytest.approx([17.0, 4.0])


@AS_WRITTEN
def test_bsam_with_nothing_below_by_hand():
    # As above with rho_min = 0: g_down = g, ratio = 7√2 / 5.
    ratio = 7 * 2**0.5 / 5
    expected = [7 + 3 - 3 * ratio, 7 + 4 - 4 * ratio]
    assert direction(BSAM(rho=5.0, rho_min=0.0), product, 4.0, 3.0) == pytest.approx(expected)


@AS_WRITTEN
def test_bsam_at_a_point_without_gradient_below_is_finite():
    # L = a² at 3, rho_min = 3: the lower point is the minimum, where g_down = 0.
    # What remains is g_up + g = 2 (3 + 1) + 6.
    found = direction(BSAM(rho=1.0, rho_min=3.0), lambda a: a**2, 3.0)
    assert found == pytest.approx([14.0])


@AS_WRITTEN
def test_gsam_at_an_adversary_without_gradient_is_finite():
    # L = -a² at -3, rho = 3: it climbs to the top, where g_adv = 0, and g_perp = g = 6.
    found = direction(GSAM(rho=3.0, alpha=0.5), lambda a: -(a**2), -3.0)
    assert found == pytest.approx([-3.0])


# Identities between methods


@AS_WRITTEN
def test_identities_between_methods():
    def same(one, other):
        w = (1.5, -0.5)
        found = [direction(m, lambda a, b: (a**2 + b - 1) ** 2 + b**4, *w) for m in (one, other)]
        assert found[0] == pytest.approx(found[1])

    same(GSAM(rho=0.2, alpha=0.0), SAM(rho=0.2))
    same(ASAM(rho=0.2, eta=0.1), SAM(rho=0.2, neighborhood=AdaptiveBall(eta=0.1)))
    same(ASAM(rho=0.2, p=INF), SAM(rho=0.2, neighborhood=AdaptiveBall(p=INF)))
    adaptive = GSAM(rho=0.2, alpha=0.3, neighborhood=WeightScaledBall(gamma=0.1))
    same(AdaptiveGSAM(rho=0.2, alpha=0.3, gamma=0.1), adaptive)
    same(AdaptiveGSAM(alpha=0.0), SAM(neighborhood="weight_scaled"))
    same(SAM(neighborhood=Ball(2)), SAM())


# Defaults of the papers


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("sam", {"rho": 0.05, "neighborhood": Ball}),
        ("asam", {"rho": 0.5, "eta": 0.01, "p": 2.0, "neighborhood": AdaptiveBall}),
        ("gsam", {"rho": 0.05, "alpha": 0.4, "neighborhood": Ball}),
        (
            "adaptive_gsam",
            {"rho": 0.05, "alpha": 0.4, "gamma": 0.01, "neighborhood": WeightScaledBall},
        ),
        ("bsam", {"rho": 0.05, "neighborhood": Ball}),
    ],
)
def test_defaults_are_those_of_the_papers(name, defaults):
    method = METHODS[name]()
    assert type(method.neighborhood) is defaults.pop("neighborhood")
    config = method.get_config()
    assert {key: config[key] for key in defaults} == defaults
    assert config["ascent_steps"] == 1
    assert config["second_order"] is False


# get


@pytest.mark.parametrize("name", METHODS)
def test_get_by_name(name):
    assert type(methods.get(name)) is METHODS[name]
    assert methods.get(name) is not methods.get(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("SAM", SAM), ("Adaptive-GSAM", AdaptiveGSAM), ("ADAPTIVE_GSAM", AdaptiveGSAM)],
)
def test_names_may_be_written_as_in_the_papers(name, expected):
    assert type(methods.get(name)) is expected


@pytest.mark.parametrize("cls", METHODS.values())
def test_get_by_the_name_of_the_class(cls):
    assert type(methods.get(cls.__name__)) is cls


def test_get_returns_an_instance_as_it_is():
    method = GSAM(rho=0.3)
    assert methods.get(method) is method


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("sma", "sam"), ("gsma", "gsam"), ("adaptivegsan", "adaptive_gsam"), ("b-sam", "bsam")],
)
def test_an_unknown_name_is_answered_with_the_nearest_spelling(name, nearest):
    with pytest.raises(ValueError, match=f"no method named '{name}'.*Did you mean '{nearest}'"):
        methods.get(name)


def test_a_name_like_none_is_answered_with_all_of_them():
    with pytest.raises(ValueError, match="no method named 'xyz'") as error:
        methods.get("xyz")
    assert "Did you mean" not in str(error.value)
    assert all(repr(name) in str(error.value) for name in METHODS)


@pytest.mark.parametrize("method", METHODS.values())
def test_a_class_in_place_of_an_instance_is_answered_with_a_hint(method):
    with pytest.raises(ValueError, match=rf"Pass an instance of the class: {method.__name__}\(\)"):
        methods.get(method)


@pytest.mark.parametrize("wrong", [0.05, ["sam"], Ball(), object()], ids=repr)
def test_wrong_types_are_refused_with_what_was_received(wrong):
    with pytest.raises(ValueError, match="A method must be one of the names") as error:
        methods.get(wrong)
    assert repr(wrong) in str(error.value)
    assert type(wrong).__name__ in str(error.value)


def test_the_model_takes_what_get_takes():
    assert type(SharpnessAwareModel(models.linear(), "gsam").method) is GSAM
    method = BSAM(rho=0.3)
    assert SharpnessAwareModel(models.linear(), method).method is method
    config = methods.serialize(method)
    assert SharpnessAwareModel(models.linear(), config).method.get_config() == method.get_config()
    with pytest.raises(ValueError, match="Did you mean 'sam'"):
        SharpnessAwareModel(models.linear(), "sma")


# serialize, deserialize

CONFIGURED = {
    "sam": lambda: SAM(rho=0.3, neighborhood=Ball(4), ascent_steps=2, second_order=True),
    "sam_maximum": lambda: SAM(neighborhood=Ball(INF)),
    "sam_unnormalized": lambda: SAM(neighborhood="unnormalized"),
    "asam": lambda: ASAM(rho=0.3, eta=0.1, p=INF, ascent_steps=2),
    "gsam": lambda: GSAM(rho=0.3, alpha=0.1, neighborhood=AdaptiveBall(eta=0.2, p=3)),
    "adaptive_gsam": lambda: AdaptiveGSAM(rho=0.3, alpha=0.1, gamma=0.0, second_order=True),
    "bsam": lambda: BSAM(rho=0.3, rho_min=0.1, neighborhood="weight_scaled"),
}


@pytest.mark.parametrize("which", CONFIGURED)
def test_round_trip_through_json(which):
    method = CONFIGURED[which]()
    text = json.dumps(methods.serialize(method))
    for restore in (methods.deserialize, methods.get):
        copy = restore(json.loads(text))
        assert type(copy) is type(method)
        assert copy.get_config() == method.get_config()
        assert type(copy.neighborhood) is type(method.neighborhood)
        assert copy.neighborhood.get_config() == method.neighborhood.get_config()
    again = type(method).from_config(method.get_config())
    assert again.get_config() == method.get_config()


#: They climb once, and that is that.
ONE_ASCENT = (methods.MomentumSAM, methods.AsyncSAM, methods.ESAM)


@pytest.mark.parametrize("name", METHODS)
def test_a_config_names_each_argument_of_the_constructor(name):
    arguments = set(inspect.signature(METHODS[name]).parameters) - {"kwargs"}
    common = set() if METHODS[name] in ONE_ASCENT else {"ascent_steps", "second_order"}
    if METHODS[name] not in (ASAM, AdaptiveGSAM):
        common |= {"neighborhood"}
    if METHODS[name] is ASAM:  # From SAM.
        common |= {"ascent_share"}
    assert set(METHODS[name]().get_config()) == arguments | common


def test_deserialize_refuses_the_config_of_something_else():
    config = keras.saving.serialize_keras_object(Ball())
    with pytest.raises(ValueError, match="A method must be"):
        methods.deserialize(config)


# Constructors


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m not in ONE_ASCENT])
@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None, True], ids=repr)
def test_ascent_steps_must_be_a_whole_number_from_one_up(method, value):
    with pytest.raises(ValueError, match="`ascent_steps` must be an integer >= 1") as error:
        method(ascent_steps=value)
    assert f"Received: ascent_steps={value!r}" in str(error.value)


@pytest.mark.parametrize("value", [1, 0, None, "yes"], ids=repr)
def test_second_order_must_be_true_or_false(value):
    with pytest.raises(ValueError, match="`second_order` must be True or False") as error:
        SAM(second_order=value)
    assert f"Received: second_order={value!r}" in str(error.value)


@pytest.mark.parametrize("method", [ASAM, AdaptiveGSAM])
def test_methods_with_a_neighborhood_of_their_own_take_no_other(method):
    with pytest.raises(TypeError, match="neighborhood"):
        method(neighborhood=Ball())


def test_a_neighborhood_may_be_given_by_name():
    assert type(SAM(neighborhood="adaptive").neighborhood) is AdaptiveBall
    with pytest.raises(ValueError, match="Did you mean 'adaptive'"):
        SAM(neighborhood="adaptiv")


def test_numbers_of_the_neighborhood_are_checked():
    with pytest.raises(ValueError, match=r"`eta`.*Received: eta=-1"):
        ASAM(eta=-1)
    with pytest.raises(ValueError, match=r"`p`.*Received: p=1"):
        ASAM(p=1)
    with pytest.raises(ValueError, match=r"`gamma`.*Received: gamma=-1"):
        AdaptiveGSAM(gamma=-1)


# The contract


def test_a_method_without_a_rule_says_what_is_missing():
    class Forgetful(Method):
        pass

    with pytest.raises(NotImplementedError, match="Forgetful must implement `direction` or `step`"):
        Forgetful().step(lambda w: Evaluation(0.0, []), [], [])


def test_a_method_remembers_nothing_unless_it_says_so():
    assert SAM().initial_state([]) == []
    assert SharpnessAwareModel(models.linear(), "sam").method_state == []


class Before(Method):
    """Written for version 0.1: the gradient is an argument of `step`."""

    rho = schedules.Hyperparameter()

    def __init__(self, rho=0.1):
        super().__init__()
        self.rho = rho

    def step(self, objective, w, g, state, rho):
        return self.gradient_at_adversary(objective, w, g, rho), state


class BeforeToo(Before):
    """Has the `step` of its base class."""


@pytest.mark.parametrize("method", [Before, BeforeToo])
def test_a_step_that_is_given_the_gradient_works_as_before(method):
    expected = direction(SAM(0.1), lambda a, b: a**2 + 3 * b**2, 1.0, 2.0)
    assert direction(method(0.1), lambda a, b: a**2 + 3 * b**2, 1.0, 2.0) == expected

"""Numbers that change during training: what they may be, how they move, how they are saved."""

import json
import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_sharp
from keras_sharp import SharpnessAwareModel, methods
from keras_sharp.methods import BSAM, GSAM, METHODS, SAM
from keras_sharp.schedules import Hyperparameter, ProportionalToLearningRate, WarmUp
from tests import models
from tests.models import BACKEND, assert_same, values

AS_WRITTEN = pytest.mark.usefixtures("as_written")
BAD_NUMBERS = [
    -0.1,
    -1e-9,
    math.nan,
    math.inf,
    -math.inf,
    "0.05",
    b"1",
    None,
    True,
    False,
    [0.1],
    {},
]
FLOAT32 = {"rtol": 1e-6}


@keras.saving.register_keras_serializable(package="tests")
def falling(step):
    """A function of the step: 0.1, 0.05, 0.033..."""
    return 0.1 / (1.0 + ops.cast(step, "float32"))


def decay():
    return keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=1, decay_rate=0.5)


def wrap(method, optimizer=None, **kwargs):
    model = SharpnessAwareModel(models.linear(), method, **kwargs)
    model.compile(optimizer or keras.optimizers.SGD(0.0), "mse")
    return model


def step(model):
    return model.train_on_batch(*models.regression(), return_dict=True)


def logged_rhos(model, steps):
    return [float(step(model)["rho"]) for _ in range(steps)]


# What a hyperparameter may be


@pytest.mark.parametrize("value", [0, 0.05, 3, np.float32(0.05), np.float64(0.05), np.array(0.05)])
def test_numbers_are_accepted(value):
    assert float(SAM(rho=value).rho) == pytest.approx(float(value))


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_finite_number_from_zero_up_is_refused(name, value):
    for key in METHODS[name]().settings:
        if key == "rho_min" and value is None:
            continue  # It stands for the default.
        expected = rf"`{key}` must be a finite number >= 0, .*Received: {key}="
        with pytest.raises(ValueError, match=expected) as error:
            METHODS[name](**{key: value})
        assert repr(value) in str(error.value)
        method = METHODS[name](**({"rho_min": 0.1} if key == "rho_min" else {}))
        before = float(getattr(method, key))
        with pytest.raises(ValueError, match=expected):
            setattr(method, key, value)
        assert float(getattr(method, key)) == before


def test_a_hyperparameter_is_a_variable_and_its_number():
    method = SAM(rho=0.1)
    assert isinstance(method.rho, keras.Variable)
    variable = method.rho
    method.rho = 0.3
    assert method.rho is variable
    assert float(variable) == pytest.approx(0.3)
    assert isinstance(SAM.rho, Hyperparameter)


def test_methods_of_one_class_have_numbers_of_their_own():
    one, other = SAM(rho=0.1), SAM(rho=0.1)
    one.rho = 0.3
    assert float(other.rho) == pytest.approx(0.1)


class AtLeastOne(methods.Method):
    strength = Hyperparameter(minimum=1.0)

    def __init__(self, strength=2.0):
        super().__init__()
        self.strength = strength


def test_a_hyperparameter_may_have_a_minimum():
    method = AtLeastOne(1.0)
    with pytest.raises(ValueError, match="`strength` must be a finite number >= 1"):
        method.strength = 0.5
    assert float(method.strength) == 1.0


@pytest.mark.parametrize("policy", ["bfloat16", "float16", "mixed_bfloat16", "mixed_float16"])
def test_radii_are_in_full_precision_whatever_the_model_is_in(policy):
    keras.config.set_dtype_policy(policy)
    method = GSAM(rho=0.05, alpha=0.4)
    assert method.rho.dtype == method.alpha.dtype == "float32"
    assert float(method.rho) == np.float32(0.05)


# Schedules


@pytest.mark.parametrize(
    "schedule", [decay, lambda: falling, lambda: ProportionalToLearningRate(0.1)]
)
def test_a_scheduled_number_is_not_set_by_hand(schedule):
    method = SAM(rho=schedule())
    with pytest.raises(TypeError, match=r"`rho` was given as a schedule.*Received: 0\.2.*float"):
        method.rho = 0.2


def test_a_number_does_not_become_a_schedule_later():
    """The compiled step knows it as a number."""
    method = SAM(rho=0.1)
    with pytest.raises(ValueError, match="Received: rho="):
        method.rho = decay()
    assert float(method.rho) == pytest.approx(0.1)


@AS_WRITTEN
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (0.1, [0.1, 0.1, 0.1]),
        (decay, [0.1, 0.05, 0.025]),
        (lambda: falling, [0.1, 0.05, 0.1 / 3]),
        (lambda: lambda step: 0.07, [0.07, 0.07, 0.07]),
        (lambda: lambda step: step, [0.0, 1.0, 2.0]),
    ],
    ids=["number", "schedule", "function", "constant_function", "integer_function"],
)
def test_rho_follows_its_schedule(schedule, expected):
    model = wrap(SAM(rho=schedule() if callable(schedule) else schedule))
    for wanted in expected:
        np.testing.assert_allclose(step(model)["rho"], wanted, **FLOAT32)
        np.testing.assert_allclose(float(model.method.rho), wanted, **FLOAT32)


@pytest.mark.parametrize("schedule", [decay, lambda: falling], ids=["schedule", "function"])
def test_rho_follows_its_schedule_compiled(schedule):
    """The step is a tensor there, and the variable is written inside of the program."""
    rhos = logged_rhos(wrap(SAM(rho=schedule())), 3)
    expected = [float(schedule()(ops.convert_to_tensor(i))) for i in range(3)]
    np.testing.assert_allclose(rhos, expected, **FLOAT32)


@AS_WRITTEN
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("PolynomialDecay", (0.1, 4, 0.02), [0.1, 0.08, 0.06, 0.04, 0.02, 0.02]),
        ("PolynomialDecay", (0.0, 4, 0.1), [0.0, 0.025, 0.05, 0.075, 0.1, 0.1]),
        ("CosineDecay", (0.1, 4), [0.1, 0.0853553, 0.05, 0.0146447, 0.0, 0.0]),
        # Initially 0, 2 steps of decay to a share of 0; warm-up to 0.1 in 2 steps.
        ("CosineDecay", (0.0, 2, 0.0, "c", 0.1, 2), [0.0, 0.05, 0.1, 0.05, 0.0, 0.0]),
        ("PiecewiseConstantDecay", ([1, 3], [0.0, 0.1, 0.2]), [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]),
    ],
    ids=["linear", "warm_up", "cosine", "warm_up_and_cosine", "stairs"],
)
def test_schedules_of_keras_serve_for_rho(name, arguments, expected):
    model = wrap(SAM(rho=getattr(keras.optimizers.schedules, name)(*arguments)))
    np.testing.assert_allclose(logged_rhos(model, 6), expected, rtol=1e-5, atol=1e-8)


@AS_WRITTEN
def test_each_hyperparameter_has_a_schedule_of_its_own():
    model = wrap(GSAM(rho=falling, alpha=decay()))
    for i in range(3):
        step(model)
        np.testing.assert_allclose(float(model.method.rho), 0.1 / (1 + i), **FLOAT32)
        np.testing.assert_allclose(float(model.method.alpha), 0.1 / 2**i, **FLOAT32)


@AS_WRITTEN
def test_a_schedule_goes_on_where_it_was_after_loading(tmp_path):
    model = wrap(SAM(rho=falling))
    logged_rhos(model, 2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(logged_rhos(loaded, 2), [0.1 / 3, 0.1 / 4], **FLOAT32)


@AS_WRITTEN
def test_a_skipped_step_does_not_move_a_schedule():
    """The schedule counts what the optimizer counts: steps taken."""
    model = wrap(SAM(rho=falling))
    x, y = models.regression()
    assert logged_rhos(model, 1) == [np.float32(0.1)]
    model.train_on_batch(np.full_like(x, np.nan), y)
    np.testing.assert_allclose(logged_rhos(model, 1), [0.05], **FLOAT32)


# Setting a number by hand


def test_a_changed_rho_takes_effect_without_compiling_again():
    runs = []

    def loss(y, y_pred):
        runs.append(1)  # When the step is compiled; on PyTorch, in each pass.
        return ops.mean((y - y_pred) ** 4)

    def fresh(rho):
        model = SharpnessAwareModel(models.linear(), SAM(rho=rho), extra_logs="perturbed_loss")
        model.compile(keras.optimizers.SGD(0.0), loss)
        return model

    model = fresh(0.1)
    logs = step(model)
    runs.clear()
    model.method.rho = 0.5
    model.reset_metrics()
    changed = step(model)
    assert len(runs) == (2 if BACKEND == "torch" else 0)
    assert logs["rho"] == np.float32(0.1)
    assert changed["rho"] == np.float32(0.5)
    expected = step(fresh(0.5))
    np.testing.assert_allclose(changed["perturbed_loss"], expected["perturbed_loss"], **FLOAT32)
    assert changed["perturbed_loss"] > logs["perturbed_loss"] * 1.1


@AS_WRITTEN
@pytest.mark.parametrize("name", METHODS)
def test_a_radius_set_to_zero_by_hand_switches_the_method_off(name):
    """As a callback does for the first epochs. BSAM's lower radius goes along with the upper."""
    inner, plain = models.twins(models.mlp)
    model = SharpnessAwareModel(inner, name)
    for m in (model, plain):
        m.compile(keras.optimizers.SGD(0.1), "mse")
    model.method.rho = 0.0
    step(model)
    plain.train_on_batch(*models.regression())
    models.assert_same(inner.variables, plain.variables, bits=True)


@AS_WRITTEN
def test_the_default_rho_min_of_bsam_is_rho_at_a_constant_learning_rate():
    model = wrap(BSAM(rho=0.1))
    step(model)
    np.testing.assert_allclose(float(model.method.rho_min), 0.1, **FLOAT32)
    model.method.rho = 0.3
    step(model)
    np.testing.assert_allclose(float(model.method.rho_min), 0.3, **FLOAT32)


# In proportion to the learning rate


def share(schedule, learning_rate, highest):
    numbers = (ops.convert_to_tensor(np.float32(x)) for x in (learning_rate, highest))
    return float(schedule(*numbers))


def test_proportional_is_the_formula_of_the_paper():
    """Zhuang et al., section 4: rho_min + (rho_max - rho_min) lr / lr_max, here for lr_min 0."""
    schedule = ProportionalToLearningRate(maximum=0.5, minimum=0.1)
    assert share(schedule, 0.2, 0.2) == pytest.approx(0.5)
    assert share(schedule, 0.1, 0.2) == pytest.approx(0.3)
    assert share(schedule, 0.05, 0.2) == pytest.approx(0.2)
    assert share(schedule, 0.0, 0.2) == pytest.approx(0.1)


def test_proportional_to_an_explicit_maximum_does_not_ask_for_the_highest_rate():
    schedule = ProportionalToLearningRate(maximum=0.5, max_learning_rate=0.4)
    assert share(schedule, 0.2, 0.2) == pytest.approx(0.25)
    assert share(schedule, 0.4, 0.7) == pytest.approx(0.5)


def test_proportional_at_learning_rate_zero_from_the_start_is_the_maximum():
    """It is the highest learning rate so far."""
    schedule = ProportionalToLearningRate(maximum=0.5, minimum=0.1)
    assert share(schedule, 0.0, 0.0) == pytest.approx(0.5)


def warm_up_and_decay():
    """The learning rates 0.1, 0.2, 0.4, 0.2, 0.1."""
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [0, 1, 2, 3], [0.1, 0.2, 0.4, 0.2, 0.1]
    )


@AS_WRITTEN
@pytest.mark.parametrize(
    ("max_learning_rate", "expected"),
    [
        # Without: the highest rate seen so far, so that warm-up has the maximum throughout.
        (None, [0.5, 0.5, 0.5, 0.3, 0.2]),
        (0.4, [0.2, 0.3, 0.5, 0.3, 0.2]),
    ],
    ids=["highest_seen", "given"],
)
def test_rho_follows_the_learning_rate(max_learning_rate, expected):
    schedule = ProportionalToLearningRate(0.5, 0.1, max_learning_rate)
    model = wrap(SAM(rho=schedule), keras.optimizers.SGD(warm_up_and_decay()))
    np.testing.assert_allclose(logged_rhos(model, 5), expected, **FLOAT32)


def test_rho_follows_the_learning_rate_compiled():
    schedule = ProportionalToLearningRate(0.5, 0.1)
    model = wrap(SAM(rho=schedule), keras.optimizers.SGD(warm_up_and_decay()))
    np.testing.assert_allclose(logged_rhos(model, 5), [0.5, 0.5, 0.5, 0.3, 0.2], **FLOAT32)


@AS_WRITTEN
def test_rho_follows_a_learning_rate_that_is_set_by_hand():
    """As ReduceLROnPlateau and LearningRateScheduler do."""
    model = wrap(SAM(rho=ProportionalToLearningRate(0.5)), keras.optimizers.SGD(0.4))
    assert logged_rhos(model, 1) == [0.5]
    model.optimizer.learning_rate = 0.1
    np.testing.assert_allclose(logged_rhos(model, 1), [0.125], **FLOAT32)


@AS_WRITTEN
def test_rho_follows_the_learning_rate_of_an_optimizer_that_scales_the_loss():
    inner = keras.optimizers.SGD(warm_up_and_decay())
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    model = wrap(SAM(rho=ProportionalToLearningRate(0.5, 0.1)), optimizer)
    np.testing.assert_allclose(logged_rhos(model, 5), [0.5, 0.5, 0.5, 0.3, 0.2], **FLOAT32)


@AS_WRITTEN
def test_the_highest_learning_rate_is_remembered_after_loading(tmp_path):
    """Else rho would jump up when training is resumed in the middle of a decay."""
    schedule = ProportionalToLearningRate(0.5, 0.1)
    model = wrap(SAM(rho=schedule), keras.optimizers.SGD(warm_up_and_decay()))
    logged_rhos(model, 4)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(logged_rhos(loaded, 1), [0.2], **FLOAT32)


@AS_WRITTEN
def test_rho_min_of_bsam_falls_with_the_learning_rate():
    """Deng et al.: from rho to 0; with a constant learning rate it stays."""
    model = wrap(BSAM(rho=0.1), keras.optimizers.SGD(warm_up_and_decay()))
    seen = []
    for _ in range(5):
        assert step(model)["rho"] == np.float32(0.1)
        seen.append(float(model.method.rho_min))
    np.testing.assert_allclose(seen, [0.1, 0.1, 0.1, 0.05, 0.025], **FLOAT32)


def test_only_what_follows_the_learning_rate_says_so():
    assert BSAM().follows_learning_rate
    assert SAM(rho=ProportionalToLearningRate(0.1)).follows_learning_rate
    assert not BSAM(rho_min=0.01).follows_learning_rate
    assert not SAM(rho=decay()).follows_learning_rate


def test_the_default_rho_min_of_bsam_follows_a_scheduled_rho():
    model = wrap(BSAM(rho=decay()))
    for _ in range(3):
        step(model)
        np.testing.assert_allclose(float(model.method.rho_min), float(model.method.rho), **FLOAT32)
    assert BSAM(rho=decay()).get_config()["rho_min"] is None
    assert BSAM(rho=decay(), rho_min=0.0).get_config()["rho_min"] == 0.0


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
def test_proportional_refuses_what_is_no_finite_number_from_zero_up(value):
    with pytest.raises(ValueError, match=r"`maximum`.*Received: maximum="):
        ProportionalToLearningRate(maximum=value)
    with pytest.raises(ValueError, match=r"`minimum`.*Received: minimum="):
        ProportionalToLearningRate(maximum=0.1, minimum=value)


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, "0.1", [0.1]], ids=repr)
def test_proportional_refuses_a_maximum_rate_that_is_no_positive_number(value):
    with pytest.raises(ValueError, match=r"`max_learning_rate` must be .*Received: max_learn"):
        ProportionalToLearningRate(0.1, max_learning_rate=value)


# Warm-up


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda: 0.4, [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]),
        (decay, [0.0, 0.0125, 0.0125, 0.009375, 0.00625, 0.003125]),
        (lambda: falling, [0.0, 0.0125, 0.1 / 6, 0.01875, 0.02, 0.1 / 6]),
    ],
    ids=["number", "schedule", "function"],
)
def test_a_warm_up_takes_a_growing_share_of_what_comes_after_it(value, expected):
    rhos = logged_rhos(wrap(SAM(rho=WarmUp(value(), steps=4))), 6)
    np.testing.assert_allclose(rhos, expected, rtol=1e-5, atol=1e-8)


@AS_WRITTEN
def test_a_warm_up_of_what_follows_the_learning_rate():
    rho = WarmUp(ProportionalToLearningRate(0.5, 0.1), steps=2)
    method = SAM(rho=rho)
    assert method.follows_learning_rate
    assert not SAM(rho=WarmUp(0.5, steps=2)).follows_learning_rate
    model = wrap(method, keras.optimizers.SGD(warm_up_and_decay()))
    np.testing.assert_allclose(logged_rhos(model, 5), [0.0, 0.25, 0.5, 0.3, 0.2], **FLOAT32)


@AS_WRITTEN
def test_rho_min_of_bsam_warms_up_with_rho():
    model = wrap(BSAM(rho=WarmUp(0.2, steps=2)))
    for expected in (0.0, 0.1, 0.2):
        step(model)
        np.testing.assert_allclose(float(model.method.rho_min), expected, **FLOAT32)


@AS_WRITTEN
def test_the_first_step_of_a_warm_up_is_plain_training():
    rate = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)
    model, plain = wrap(SAM(rho=WarmUp(0.3, steps=5)), rate[0]), wrap(None, rate[1])
    for m in (model, plain):
        m.model.set_weights([np.ones((3, 1))])
        step(m)
    assert_same(model.model.get_weights(), plain.model.get_weights())


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
def test_a_warm_up_to_what_is_no_finite_number_from_zero_up_is_refused(value):
    with pytest.raises(ValueError, match="`value` must be a finite number >= 0"):
        WarmUp(value, steps=4)


@pytest.mark.parametrize("steps", [0, -1, 0.1, True, None, "4"], ids=repr)
def test_the_length_of_a_warm_up_is_a_positive_integer(steps):
    with pytest.raises(ValueError, match=r"`steps`, .* must be an integer > 0.*steps="):
        WarmUp(0.1, steps=steps)


def test_a_warm_up_of_a_warm_up_is_refused():
    with pytest.raises(ValueError, match="cannot begin with another one"):
        WarmUp(WarmUp(0.1, steps=2), steps=4)


def test_a_function_behind_a_warm_up_is_checked_before_the_first_step():
    with pytest.raises(ValueError, match="as a function of the step takes one argument"):
        step(wrap(SAM(rho=WarmUp(lambda: 0.1, steps=4))))
    with pytest.raises(ValueError, match=r"finite number >= 0 at every step.*which gives -0\.1"):
        step(wrap(SAM(rho=WarmUp(lambda step: -0.1, steps=4))))


# Configs


GIVEN = {
    "number": (lambda: 0.05, 0.05),
    "integer": (lambda: 1, 1.0),
    "numpy": (lambda: np.float64(0.3), 0.3),
    "schedule": (decay, None),
    "function": (lambda: falling, None),
    "proportional": (lambda: ProportionalToLearningRate(0.5, 0.1, 0.4), None),
    "proportional_to_highest": (lambda: ProportionalToLearningRate(0.5), None),
    "warm_up": (lambda: WarmUp(0.1, 2), None),
    "warm_up_and_schedule": (lambda: WarmUp(decay(), 2), None),
    "warm_up_and_proportional": (lambda: WarmUp(ProportionalToLearningRate(0.5, 0.1), 2), None),
}


@pytest.mark.parametrize("given", GIVEN)
def test_config_round_trip_through_json(given):
    """Numbers come back as they were given, not as float32 has them."""
    make, number = GIVEN[given]
    method = GSAM(rho=make(), alpha=make())
    config = method.get_config()
    if number is not None:
        assert config["rho"] == number
        assert type(config["rho"]) is float
    copy = methods.deserialize(json.loads(json.dumps(methods.serialize(method))))
    assert copy.get_config() == config
    for key, setting in method.settings.items():
        assert type(copy.settings[key].schedule) is type(setting.schedule)
        for i in range(3):
            rates = [ops.convert_to_tensor(np.float32(x)) for x in (0.1, 0.2)]
            actual, expected = (
                float(s.value_at(ops.convert_to_tensor(i), lambda: rates))  # noqa: B023
                for s in (copy.settings[key], setting)
            )
            assert actual == expected


def test_a_number_changed_by_hand_is_saved_as_it_is_now():
    method = SAM(rho=0.05)
    method.rho = 0.25
    assert method.get_config()["rho"] == 0.25
    method.rho = 0.05
    assert method.get_config()["rho"] == 0.05


def test_bsam_round_trip_keeps_following_the_learning_rate():
    copy = methods.deserialize(methods.serialize(BSAM(rho=0.2)))
    assert copy.follows_learning_rate
    assert copy.get_config() == BSAM(rho=0.2).get_config()


def test_proportional_round_trip():
    schedule = keras_sharp.schedules.ProportionalToLearningRate(0.5, 0.1, 0.4)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(schedule)))
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is ProportionalToLearningRate
    expected = {"maximum": 0.5, "minimum": 0.1, "max_learning_rate": 0.4}
    assert copy.get_config() == schedule.get_config() == expected


@AS_WRITTEN
def test_variables_of_hyperparameters_are_state_of_the_model_and_not_trained():
    model = wrap(GSAM(rho=0.1, alpha=0.3))
    ids = {id(v) for v in model.non_trainable_variables}
    assert {id(model.method.rho), id(model.method.alpha)} <= ids
    step(model)
    numbers = values([model.method.rho, model.method.alpha])
    np.testing.assert_allclose(numbers, [0.1, 0.3], **FLOAT32)

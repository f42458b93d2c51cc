"""Callbacks that steer the method: RhoScheduler, SwitchMethod; and plain training by `None`."""

import csv

import keras
import numpy as np
import pytest
from keras import ops

from keras_sharp import SharpnessAwareModel, methods
from keras_sharp.callbacks import RhoScheduler, SwitchMethod
from keras_sharp.methods import ASAM, BSAM, GSAM, SAM, Plain
from keras_sharp.training import checks
from tests import models
from tests.models import assert_same, values

AS_WRITTEN = pytest.mark.usefixtures("as_written")
FLOAT32 = {"rtol": 1e-6}


class CountsSteps(methods.Method):
    """A method with a memory."""

    def initial_state(self, variables):
        return [np.zeros((2,), "float32")]

    def step(self, objective, w, state):
        return objective(w).gradient, [state[0] + 1]


@keras.saving.register_keras_serializable(package="tests")
class Counting(CountsSteps):
    def get_config(self):
        return {}


def wrap(method, build=models.linear, optimizer=None, **kwargs):
    model = SharpnessAwareModel(build(), method, **kwargs)
    model.compile(optimizer or keras.optimizers.SGD(0.01), "mse")
    return model


def fit(model, epochs, callbacks=(), **kwargs):
    x, y = models.regression(8)
    history = model.fit(
        x,
        y,
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **kwargs,
    )
    return history.history


# RhoScheduler


@AS_WRITTEN
@pytest.mark.parametrize(
    ("method", "name"),
    [(SAM, "rho"), (GSAM, "alpha"), (lambda: BSAM(rho_min=0.01), "rho_min")],
    ids=["rho", "alpha", "rho_min"],
)
def test_each_epoch_trains_with_the_value_of_the_schedule(method, name):
    model, seen = wrap(method()), []
    initial = float(getattr(model.method, name))

    def schedule(epoch, current):
        seen.append((epoch, current))
        return current / 2

    logs = fit(model, 3, [RhoScheduler(schedule, name=name)])
    expected = [initial / 2, initial / 4, initial / 8]
    np.testing.assert_allclose(logs[name], expected, **FLOAT32)
    np.testing.assert_allclose(seen, [(0, initial), (1, initial / 2), (2, initial / 4)], **FLOAT32)
    assert all(type(current) is float for _, current in seen)


def test_a_scheduled_rho_takes_effect_in_the_compiled_step():
    model = wrap(SAM(rho=0.0), models.mlp, extra_logs="sharpness")
    sharpness = fit(model, 2, [RhoScheduler(lambda epoch, rho: [0.0, 0.5][epoch])])["sharpness"]
    assert sharpness[0] == 0
    assert sharpness[1] > 0.01


@AS_WRITTEN
def test_loggers_see_the_scheduled_number(tmp_path):
    path = tmp_path / "log.csv"
    scheduler = RhoScheduler(lambda epoch, alpha: 0.25 * epoch, name="alpha")
    fit(wrap(GSAM()), 2, [scheduler, keras.callbacks.CSVLogger(path)])
    assert [row["alpha"] for row in csv.DictReader(path.open())] == ["0.0", "0.25"]


@AS_WRITTEN
def test_verbose_says_what_is_set(capsys):
    callbacks = [
        SwitchMethod({1: "gsam"}, verbose=1),
        RhoScheduler(lambda epoch, rho: 0.125, verbose=1),
    ]
    fit(wrap("sam"), 2, callbacks)
    assert capsys.readouterr().out.split("\n\n") == [
        "\nEpoch 1: RhoScheduler setting rho to 0.125.",
        "Epoch 2: SwitchMethod setting the method to GSAM.",
        "Epoch 2: RhoScheduler setting rho to 0.125.\n",
    ]


def refused(callback, model, match):
    """The callback refuses the model before anything is trained."""
    before = values(model.variables)
    with pytest.raises(ValueError, match=match):
        fit(model, 1, [callback])
    assert_same(model.variables, before, bits=True)


def plain_keras_model():
    model = models.linear()
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


@AS_WRITTEN
@pytest.mark.parametrize(
    "callback", [RhoScheduler(lambda epoch, rho: rho), SwitchMethod({0: "sam"})], ids=str
)
def test_a_model_that_is_not_wrapped_is_refused(callback):
    refused(callback, plain_keras_model(), r"SharpnessAwareModel\. Received: .* class Sequential")


@AS_WRITTEN
def test_a_hyperparameter_that_the_method_does_not_have_is_refused():
    scheduler = RhoScheduler(lambda epoch, alpha: alpha, name="alpah")
    refused(scheduler, wrap("gsam"), r"GSAM has no .*'alpah'\. Did you mean 'alpha'\?.*'rho'")
    refused(scheduler, wrap("sam"), r"SAM has no .*'alpah'.* Expected one of \['rho'\]")


@AS_WRITTEN
def test_a_hyperparameter_with_a_schedule_of_its_own_is_refused():
    scheduler = RhoScheduler(lambda epoch, rho: rho)
    refused(scheduler, wrap(SAM(rho=lambda step: 0.1)), r"`rho` .*SAM has a schedule of its own")
    scheduler = RhoScheduler(lambda epoch, rho: rho, name="rho_min")
    refused(scheduler, wrap(BSAM()), "`rho_min` .*BSAM has a schedule .*ProportionalToLearningRate")


@AS_WRITTEN
@pytest.mark.parametrize("value", [-0.1, float("nan"), None, "0.1"], ids=repr)
def test_a_schedule_that_returns_no_radius_is_refused(value):
    refused(RhoScheduler(lambda epoch, rho: value), wrap("sam"), "`rho` must be .* Received: rho=")


@pytest.mark.parametrize("schedule", [None, 0.1, [0.1]], ids=repr)
def test_a_schedule_that_is_no_function_is_refused(schedule):
    with pytest.raises(ValueError, match=r"`schedule` must be a function.*Received: schedule="):
        RhoScheduler(schedule)


# Plain training: `method=None`


def test_none_is_plain_training():
    assert type(methods.get(None)) is Plain
    assert type(methods.deserialize(methods.serialize(Plain()))) is Plain
    assert Plain().get_config() == {}


@AS_WRITTEN
def test_plain_training_is_the_base_optimizer():
    inner, other = models.twins(models.batchnorm_net)
    model = SharpnessAwareModel(inner, method=None)
    for m in (model, other):
        m.compile(keras.optimizers.Adam(), "mse")
        logs = fit(m, 2)
        assert list(logs) == ["loss"]
    assert_same(inner.variables, other.variables, bits=True)
    assert_same(model.optimizer.variables, other.optimizer.variables, bits=True)


def count_passes(model):
    """Compile with a loss that counts its calls, which on JAX and TensorFlow are eager here."""
    calls = []

    def loss(y, y_pred):
        calls.append(1)
        return ops.mean((y - y_pred) ** 2)

    model.compile(keras.optimizers.SGD(0.01), loss)
    return calls


@AS_WRITTEN
def test_plain_training_costs_one_gradient():
    model = SharpnessAwareModel(models.linear(), None)
    calls = count_passes(model)
    x, y = models.regression()
    model.train_on_batch(x, y)  # builds the loss, too
    calls.clear()
    model.train_on_batch(x, y)
    assert len(calls) == 1


@AS_WRITTEN
def test_plain_training_skips_what_is_not_finite_and_fills_the_extra_logs():
    model = wrap(None, extra_logs=("sharpness", "grad_cosine", "skipped_steps"))
    x, y = models.regression()
    logs = model.train_on_batch(x, y, return_dict=True)
    assert np.isnan(logs["sharpness"])  # There is no adversary that they could tell of.
    assert np.isnan(logs["grad_cosine"])
    before = values(model.model.variables)
    model.train_on_batch(np.full_like(x, np.nan), y)
    assert_same(model.model.variables, before, bits=True)
    assert int(model.skipped_steps) == 1


@AS_WRITTEN
def test_plain_training_in_micro_batches_with_fresh_noise():
    """Nothing of the wrapper relies on there being an adversary."""
    one, other = (
        wrap(None, models.mlp, num_micro_batches=parts, fresh_noise=parts > 1) for parts in (1, 2)
    )
    fit(one, 1)
    fit(other, 1)
    models.assert_close(other.model.variables, values(one.model.variables))


# Another method in the middle


SWITCHES = {
    "plain_to_sam": (lambda: None, lambda: SAM(rho=0.3)),
    "sam_to_plain": (lambda: SAM(rho=0.3), lambda: None),
    # With variables of the same shapes, which JAX does not compile anew by itself.
    "sam_to_asam": (lambda: SAM(rho=0.3), lambda: ASAM(rho=3.0)),
    "bsam_to_memory": (lambda: BSAM(rho=0.3), Counting),
    "memory_to_gsam": (Counting, lambda: GSAM(rho=0.3, alpha=0.3)),
}


def check_switch(first, second):
    """One run with a switch, and two runs of which the second starts where the first ended."""
    switched = wrap(first(), models.batchnorm_net, keras.optimizers.Adam(0.01))
    logs = fit(switched, 2, [SwitchMethod({1: second()})])
    alone = wrap(first(), models.batchnorm_net, keras.optimizers.Adam(0.01))
    first_loss = fit(alone, 1)["loss"]
    continued = wrap(second(), models.batchnorm_net, keras.optimizers.Adam(0.01))
    continued.optimizer.build(continued.trainable_variables)
    models.assign(continued.model.variables, values(alone.model.variables))
    models.assign(continued.optimizer.variables, values(alone.optimizer.variables))
    second_loss = fit(continued, 1)["loss"]

    np.testing.assert_allclose(logs["loss"], first_loss + second_loss, rtol=1e-5)
    for get in (lambda m: m.model.variables, lambda m: m.optimizer.variables):
        assert_same(get(switched), values(get(continued)))
    assert_same(switched.method_state, values(continued.method_state))
    kinds = [[(v.name, v.shape) for v in m.variables] for m in (switched, continued)]
    assert kinds[0] == kinds[1]
    # It made a difference.
    last = fit(alone, 1)["loss"]
    if Counting not in (first, second):
        assert abs(last[0] - second_loss[0]) > 1e-4 * second_loss[0]


@AS_WRITTEN
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_keeps_weights_optimizer_and_statistics(switch):
    check_switch(*SWITCHES[switch])


@models.on("tensorflow", "jax")  # PyTorch is eager in any case.
@pytest.mark.parametrize("switch", [s if s == "sam_to_asam" else models.slow(s) for s in SWITCHES])
def test_a_switch_keeps_weights_optimizer_and_statistics_compiled(switch):
    check_switch(*SWITCHES[switch])


@AS_WRITTEN
def test_both_switches_in_one_training():
    model = wrap("sam")
    calls = count_passes(model)
    model.train_on_batch(*models.regression())  # builds the loss, too
    counts = []
    count = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: calls.clear(),
        on_epoch_end=lambda epoch, logs: counts.append(len(calls)),
    )
    fit(model, 4, [SwitchMethod({0: None, 1: "sam", 2: "bsam", 3: None}), count])
    assert counts == [2, 4, 6, 2]


@AS_WRITTEN
def test_every_log_has_an_entry_per_epoch():
    alpha = RhoScheduler(lambda epoch, alpha: 0.1 * epoch, name="alpha")
    to_gsam, to_plain = (SwitchMethod({1: method}) for method in (GSAM(rho=0.3), None))
    logs = [
        fit(wrap(None, extra_logs=("sharpness",)), 2, [to_gsam, alpha]),
        fit(wrap(SAM(rho=0.3), extra_logs=("sharpness",)), 2, [to_plain]),
        fit(wrap(None), 2, [SwitchMethod({1: None})]),
    ]
    assert all(len(entries) == 2 for one in logs for entries in one.values())
    assert [np.float32(one["rho"]).tolist() for one in logs[:2]] == [
        [0.0, np.float32(0.3)],
        [np.float32(0.3), 0.0],
    ]
    assert np.isnan(logs[0]["sharpness"]).tolist() == [True, False]
    assert np.isnan(logs[1]["sharpness"]).tolist() == [False, True]
    assert np.isnan(logs[0]["alpha"]).tolist() == [True, False]
    assert "rho" not in logs[2]


@AS_WRITTEN
def test_training_that_goes_on_does_not_repeat_earlier_switches():
    model = wrap(SAM(rho=0.3))
    fit(model, 3, [SwitchMethod({1: "gsam"})], initial_epoch=2)
    assert type(model.method) is SAM


@AS_WRITTEN
def test_a_scheduler_passes_over_plain_epochs():
    model = wrap(None)
    callbacks = [SwitchMethod({1: "sam", 3: None}), RhoScheduler(lambda epoch, rho: epoch / 10)]
    logs = fit(model, 4, callbacks)
    np.testing.assert_allclose(logs["rho"], [0.0, 0.1, 0.2, 0.0], **FLOAT32)


@AS_WRITTEN
def test_a_scheduler_checks_the_method_that_comes_by_a_switch():
    callbacks = [SwitchMethod({1: "sam"}), RhoScheduler(lambda epoch, a: a, name="alpha")]
    with pytest.raises(ValueError, match="SAM has no hyperparameter named 'alpha'"):
        fit(wrap("gsam"), 2, callbacks)


@AS_WRITTEN
def test_the_method_may_be_set_between_steps():
    model = wrap(SAM(rho=0.1), models.mlp, extra_logs="sharpness")
    x, y = models.regression()
    assert model.train_on_batch(x, y, return_dict=True)["rho"] == np.float32(0.1)
    model.method = SAM(rho=0.2)
    assert model.train_on_batch(x, y, return_dict=True)["rho"] == np.float32(0.2)
    model.method = None
    assert "rho" not in model.train_on_batch(x, y, return_dict=True)


@pytest.mark.parametrize("built", [True, False])
def test_the_method_may_be_set_before_training(built):
    model = wrap("sam", models.linear if built else models.Subclassed)
    if built:
        model.build((None, 3))  # Keras locks the variables of a layer here.
    model.method = Counting()
    model.train_on_batch(*models.regression())
    np.testing.assert_array_equal(values(model.method_state), [[1, 1]])
    own = [v.name for v in model.variables[: -len(model.model.variables)]]
    assert own == ["skipped_steps", "max_lr", "method_state_0"]


def test_a_method_that_does_not_exist_leaves_the_old_one():
    model = wrap("gsam")
    before = model.method, [id(v) for v in model.variables]
    with pytest.raises(ValueError, match="Did you mean 'sam'"):
        model.method = "sma"
    assert (model.method, [id(v) for v in model.variables]) == before


class Raises(SAM):
    def initial_state(self, variables):
        raise RuntimeError("no memory for this model")


class Returns(SAM):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def initial_state(self, variables):
        return self.state


@AS_WRITTEN
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (Raises(), "no memory"),
        (Returns(None), r"must return a list of NumPy arrays.*Received: None"),
        (Returns({"a": np.zeros(2)}), "must return a list"),
        (Returns([np.zeros(2), "zeros"]), "must return a list"),
        (Returns([np.zeros(2), np.array(["a"])]), "arrays of numbers"),
        (Returns([np.zeros(2), np.array([None])]), "arrays of numbers"),
    ],
    ids=["raises", "none", "dict", "no_array", "text", "object"],
)
def test_a_method_without_a_memory_to_begin_with_leaves_the_old_one(bad, match):
    model = wrap(Counting())
    fit(model, 1)
    before = model.method, [id(v) for v in model.variables], values(model.variables)
    with pytest.raises((RuntimeError, ValueError), match=match):
        model.method = bad
    assert (model.method, [id(v) for v in model.variables]) == before[:2]
    assert_same(model.variables, before[2], bits=True)
    fit(model, 1)
    np.testing.assert_array_equal(values(model.method_state), [[4, 4]])


@AS_WRITTEN
def test_a_method_with_which_no_step_can_be_made_leaves_the_old_one(monkeypatch):
    model = wrap(Counting())
    fit(model, 1)
    before = model.method, [id(v) for v in model.variables]
    monkeypatch.setattr(checks, "check_reduction", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.method = "gsam"
    assert (model.method, [id(v) for v in model.variables]) == before


@AS_WRITTEN
@pytest.mark.parametrize("method", [None, "bsam", Counting()], ids=["plain", "bsam", "memory"])
def test_a_switched_model_is_saved_with_its_method(method, tmp_path):
    model = wrap("gsam", models.batchnorm_net)
    fit(model, 2, [SwitchMethod({1: method})])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.method) is type(model.method)
    assert fit(loaded, 1) == fit(model, 1)
    assert_same(loaded.variables, values(model.variables), bits=True)


@pytest.mark.parametrize("schedule", [None, "sam", {}, [(0, "sam")]], ids=repr)
def test_a_schedule_of_methods_is_a_dictionary(schedule):
    with pytest.raises(ValueError, match=r"`schedule` must be a dictionary.*Received: schedule="):
        SwitchMethod(schedule)


@pytest.mark.parametrize("epoch", [-1, 1.5, "1", None, True], ids=repr)
def test_the_keys_of_a_schedule_are_epochs(epoch):
    with pytest.raises(ValueError, match=r"epochs, integers >= 0\. Received: the key"):
        SwitchMethod({0: None, epoch: "sam"})


def test_the_values_of_a_schedule_are_methods():
    with pytest.raises(ValueError, match="Did you mean 'sam'"):
        SwitchMethod({3: "sma"})

"""What is saved and loaded trains on as if nothing had happened."""

import json
import re
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_sharp import SharpnessAwareModel, callbacks, methods, saving, schedules
from tests import models
from tests.models import BACKEND, assert_close, assert_same, slow

FIT = {"batch_size": 4, "shuffle": False, "verbose": 0}


def batchnorm_net(dropout_seed=None):
    keras.utils.set_random_seed(1)
    stack = [
        keras.Input((3,)),
        # No bias before the normalization: its gradient would be rounding only.
        layers.Dense(4, use_bias=False),
        layers.BatchNormalization(momentum=0.7),
        layers.Dense(1),
    ]
    if dropout_seed is not None:
        stack.insert(3, layers.Dropout(0.3, seed=dropout_seed))
    return keras.Sequential(stack)


def adam(**kwargs):
    """An optimizer with moments and a schedule."""
    return keras.optimizers.Adam(
        keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.8), **kwargs
    )


@keras.saving.register_keras_serializable(package="tests")
def rising(step):
    """A rho that tells its step."""
    return 0.01 * (ops.cast(step, "float32") + 1)


@keras.saving.register_keras_serializable(package="tests")
class Remembers(methods.SAM):
    """Climbs along a moving average of the gradients: a method with a memory."""

    def initial_state(self, variables):
        return [np.zeros(v.shape, "float32") for v in variables]

    def step(self, objective, w, state, rho):
        g = objective(w).gradient
        state = [0.9 * s + 0.1 * ops.convert_to_tensor(d) for s, d in zip(state, g, strict=True)]
        return self.direction(objective, w, state, rho), state


METHODS = {
    "sam": lambda: methods.SAM(rho=rising),
    "gsam": lambda: methods.GSAM(
        rho=schedules.ProportionalToLearningRate(maximum=0.1, minimum=0.01), alpha=0.7
    ),
    "bsam": lambda: methods.BSAM(rho=0.1),
    "remembers": lambda: Remembers(rho=0.1),
}


def make(method, optimizer=None, **kwargs):
    wrapper = SharpnessAwareModel(batchnorm_net(), METHODS[method](), **kwargs)
    wrapper.compile(optimizer or adam(), "mse", metrics=["mae"])
    return wrapper


def data():
    """Five batches, one of which is skipped."""
    x, y = models.regression(20)
    x[9, 0] = np.nan
    return x, y


def train(wrapper, epochs=1, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*skipped")
        return wrapper.fit(*data(), epochs=epochs, **FIT, **kwargs).history


def assert_equal_training(one, other):
    """Weights, statistics, counters, hyperparameters and optimizer, to the bit."""
    assert [v.path.split("/")[-1] for v in one.variables] == [
        v.path.split("/")[-1] for v in other.variables
    ]
    metrics = {id(v) for w in (one, other) for v in w.metrics_variables}
    assert_same(
        [v for v in one.variables if id(v) not in metrics],
        [v for v in other.variables if id(v) not in metrics],
        bits=True,
    )
    assert_same(one.optimizer.variables, other.optimizer.variables, bits=True)


# Trained, saved, loaded, trained on


@pytest.mark.parametrize("method", ["gsam", "remembers", slow("sam"), slow("bsam")])
def test_ten_steps_equal_five_steps_a_file_and_five_more(method, tmp_path):
    straight = make(method, extra_logs="skipped_steps")
    expected = train(straight, epochs=2)
    broken = make(method, extra_logs="skipped_steps")
    train(broken)
    broken.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal_training(loaded, broken)
    logs = train(loaded)
    assert_equal_training(loaded, straight)
    assert_same([logs[k][-1] for k in expected], [v[-1] for v in expected.values()], bits=True)
    assert logs["skipped_steps"] == [2]
    assert int(loaded.optimizer.iterations) == 8


def test_dropout_goes_on_with_the_masks_that_would_have_come(tmp_path):
    """Plain Keras does not save the state of its seeds."""

    def wrap():
        wrapper = SharpnessAwareModel(batchnorm_net(dropout_seed=5))
        wrapper.compile(adam(), "mse")
        return wrapper

    straight = wrap()
    train(straight, epochs=2)
    broken = wrap()
    train(broken)
    broken.save(tmp_path / "model.keras")
    broken = keras.saving.load_model(tmp_path / "model.keras")
    train(broken)
    assert_equal_training(broken, straight)


@pytest.mark.parametrize("method", ["gsam", slow("remembers")])
def test_weights_files_hold_the_whole_state(method, tmp_path):
    one, other = make(method), make(method)
    train(one)
    one.save_weights(tmp_path / "model.weights.h5")
    train(other, epochs=2)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_equal_training(other, one)


class Interrupt(keras.callbacks.Callback):
    """The power fails at the start of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["gsam", slow("sam"), slow("remembers")])
def test_backup_and_restore_goes_on_after_an_interruption(method, tmp_path):
    def wrap():  # With an average of the weights, which fit puts in their place at its end.
        return make(method, adam(use_ema=True, ema_momentum=0.9))

    straight = wrap()
    expected = train(straight, epochs=4)
    broken = wrap()
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(broken, epochs=4, callbacks=[backup, Interrupt(2)])
    again = wrap()
    logs = train(again, epochs=4, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)])
    assert len(logs["loss"]) == 2
    assert_equal_training(again, straight)
    assert_same(logs["rho"], expected["rho"][2:], bits=True)
    assert int(again.skipped_steps) == 4


# The method is the one of the file


class Mine(methods.SAM):
    """A class that Keras does not know."""


SWITCHES = {
    "asam": lambda: "asam",  # With variables like SAM's.
    "gsam": lambda: "gsam",
    "plain": lambda: None,
    "remembers": lambda: Remembers(rho=0.2),
    "not_registered": lambda: Mine(rho=lambda step: 0.3),
}
AS_WRITTEN = pytest.mark.usefixtures("as_written")


class Stop(keras.callbacks.Callback):
    """The power fails before a batch of an epoch."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at, self.epoch = (epoch, batch), None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt


def resumed(second, stop, tmp_path, **kwargs):
    """An undisturbed run of three epochs of three batches, and one that was stopped and goes on."""
    x, y = models.regression(12)

    def run(folder, *extra):
        wrapper = SharpnessAwareModel(batchnorm_net(), "sam")
        wrapper.compile(adam(), "mse")
        backup = keras.callbacks.BackupAndRestore(tmp_path / folder, **kwargs)
        extra = [backup, *second(), *extra]
        return wrapper, wrapper.fit(x, y, epochs=3, callbacks=extra, **FIT).history

    straight, expected = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("broken", Stop(*stop))
    again, logs = run("broken")
    return straight, again, expected, logs


def switch(method):
    return lambda: [callbacks.SwitchMethod({1: method()})]


@pytest.mark.slow
@AS_WRITTEN
@pytest.mark.parametrize(
    "second", ["asam", "not_registered", *map(slow, ("gsam", "plain", "remembers"))]
)
def test_a_run_that_is_resumed_has_the_method_that_it_had(second, tmp_path):
    straight, again, expected, logs = resumed(switch(SWITCHES[second]), (2, 0), tmp_path)
    assert type(again.method) is type(straight.method)
    assert_equal_training(again, straight)
    assert logs["loss"] == expected["loss"][2:]


@models.on("tensorflow", "jax")  # PyTorch is eager in any case.
def test_a_compiled_run_that_is_resumed_has_the_method_that_it_had(tmp_path):
    straight, again, _, _ = resumed(switch(SWITCHES["asam"]), (2, 0), tmp_path)
    assert type(again.method) is methods.ASAM
    assert_same(again.model.variables, values_of(straight), bits=True)


def values_of(wrapper):
    return models.values(wrapper.model.variables)


@AS_WRITTEN
def test_an_epoch_that_was_broken_off_is_not_switched_again(tmp_path):
    """Its first part has filled the memory of the method, which is not to be lost."""

    class Counts(methods.SAM):
        def initial_state(self, variables):
            return [np.zeros((), "float32")]

        def step(self, objective, w, state, rho):
            return objective(w).gradient, [state[0] + 1]

    _, again, _, logs = resumed(switch(Counts), (1, 2), tmp_path, save_freq=1)
    assert len(logs["loss"]) == 2
    assert int(again.method_state[0]) == 2 + 2 * 3


@AS_WRITTEN
@pytest.mark.parametrize("save_freq", ["epoch", 1])
def test_a_scheduled_rho_goes_on_from_where_it_was(save_freq, tmp_path):
    """In the middle of an epoch, too, which then is not scheduled twice."""

    def halve():
        return [callbacks.RhoScheduler(lambda epoch, rho: rho / 2)]

    _, again, expected, logs = resumed(halve, (2, 1), tmp_path, save_freq=save_freq)
    assert logs["rho"] == expected["rho"][2:]
    assert float(again.method.rho) == np.float32(0.05 / 8)


@AS_WRITTEN
@pytest.mark.parametrize("fresh", [True, slow(False)])
def test_a_weights_file_brings_its_method(fresh, tmp_path):
    one = make("gsam")
    train(one)
    one.save_weights(tmp_path / "model.weights.h5")
    other = SharpnessAwareModel(batchnorm_net(), "sam")
    other.compile(adam(), "mse", metrics=["mae"])
    if fresh:
        other.optimizer.build(other.trainable_variables)
    else:
        train(other)
    other.load_weights(tmp_path / "model.weights.h5")
    assert json.dumps(other.method.get_config()) == json.dumps(one.method.get_config())
    assert_same(*(list(train(m).values()) for m in (other, one)), bits=True)
    assert_equal_training(other, one)


@AS_WRITTEN
def test_a_method_that_is_the_same_stays_the_same_object(tmp_path):
    """Nothing is compiled again, and who holds it may set its rho."""
    one = SharpnessAwareModel(batchnorm_net(), methods.BSAM(rho=0.1))
    one.method.rho = 0.3
    one.save_weights(tmp_path / "model.weights.h5")
    method = methods.BSAM(rho=0.2)
    other = SharpnessAwareModel(batchnorm_net(), method)
    other.load_weights(tmp_path / "model.weights.h5")
    assert other.method is method
    np.testing.assert_allclose(float(method.rho), 0.3)


def test_a_linked_schedule_stays_linked(tmp_path):
    """A config holds the number of that moment, in place of what is followed."""

    def wrap(leader):
        follows = schedules.ProportionalToLearningRate(maximum=leader.rho)
        return SharpnessAwareModel(batchnorm_net(), methods.GSAM(rho=follows))

    leader = methods.SAM(rho=0.3)
    wrap(methods.SAM(rho=0.2)).save_weights(tmp_path / "model.weights.h5")
    wrapper = wrap(leader)
    wrapper.load_weights(tmp_path / "model.weights.h5")
    assert wrapper.method.settings["rho"].schedule.maximum is leader.rho


def test_a_function_of_the_step_is_the_one_of_the_script(tmp_path):
    one = SharpnessAwareModel(batchnorm_net(), methods.SAM(rho=lambda step: 0.1))
    one.save_weights(tmp_path / "model.weights.h5")
    method = methods.SAM(rho=lambda step: 0.2)
    other = SharpnessAwareModel(batchnorm_net(), method)
    other.load_weights(tmp_path / "model.weights.h5")
    assert other.method is method


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (lambda: Mine(), "no registered class 'Mine'"),
        (lambda: methods.SAM(rho=lambda step: 0.1), "a lambda is not registered"),
        (lambda: methods.SAM(rho=values_of), "the function 'values_of' is not registered"),
        (lambda: methods.SAM(rho=NoConfig()), "its `get_config` failed"),
    ],
    ids=["class", "lambda", "function", "no_config"],
)
def test_a_method_that_cannot_be_made_is_refused(method, reason, tmp_path):
    one = SharpnessAwareModel(batchnorm_net(), method())
    one.save_weights(tmp_path / "model.weights.h5")
    other = SharpnessAwareModel(batchnorm_net(), "gsam")
    with pytest.raises(ValueError, match=rf"{reason}.* The model has GSAM\. Set `model\.method`"):
        other.load_weights(tmp_path / "model.weights.h5")
    assert type(other.method) is methods.GSAM


class NoConfig:
    def __call__(self, step):
        return 0.1


def test_nothing_but_a_method_is_made_from_a_file():
    """Weights are safe to load: no class is looked up by its module, none but methods is made."""
    wrapper = SharpnessAwareModel(models.linear(), "sam")
    record = {"epochs": {}, "arguments": {}}
    for name in ("subprocess.Popen", "keras_sharp>SharpnessAwareModel", "tests>rising"):
        method = {"module": "os", "class_name": name, "registered_name": name, "config": {}}
        with pytest.raises(ValueError, match="no registered class"):
            saving.saved_method(wrapper, {**record, "method": method})
    inside = methods.serialize(methods.SAM())
    inside["config"]["rho"] = {"module": "os", "class_name": "function", "config": "system"}
    with pytest.raises(ValueError, match="'system' is not registered"):
        saving.saved_method(wrapper, {**record, "method": inside})


def without_record(monkeypatch):
    """Files as version 0.1.0 wrote them."""
    save = SharpnessAwareModel.save_own_variables

    def old(self, store):
        whole = {}
        save(self, whole)
        for key in whole.keys() - {saving.RECORD}:
            store[key] = whole[key]

    monkeypatch.setattr(SharpnessAwareModel, "save_own_variables", old)


@AS_WRITTEN
def test_a_file_of_the_first_version_is_loaded_with_a_warning(tmp_path, monkeypatch):
    without_record(monkeypatch)
    one, other = make("remembers"), make("remembers")
    train(one)
    one.save_weights(tmp_path / "model.weights.h5")
    other.optimizer.build(other.trainable_variables)
    with pytest.warns(UserWarning, match=r"0\.1\.0.* goes on with its own, Remembers"):
        other.load_weights(tmp_path / "model.weights.h5")
    assert_equal_training(other, one)


OTHER_ARGUMENTS = {
    "num_micro_batches": 2,
    "perturbation_scope": "replica",
    "perturb": "no_bias_no_norm",
    "fresh_noise": True,
}


def test_other_arguments_of_the_constructor_are_told(tmp_path):
    path = tmp_path / "model.weights.h5"
    SharpnessAwareModel(batchnorm_net(), **OTHER_ARGUMENTS).save_weights(path)
    with pytest.warns(UserWarning, match=r"saved by a model with") as caught:
        SharpnessAwareModel(batchnorm_net()).load_weights(path)
    (message,) = [str(w.message) for w in caught if "saved by" in str(w.message)]
    assert all(f"{name}={value!r}" in message for name, value in OTHER_ARGUMENTS.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SharpnessAwareModel(batchnorm_net(), **OTHER_ARGUMENTS).load_weights(path)


@AS_WRITTEN
@pytest.mark.parametrize("logs", [("sharpness",), ()], ids=["more", "fewer"])
def test_extra_logs_do_not_matter_to_a_file(logs, tmp_path):
    other = ("sharpness", "grad_norm") if not logs else ()
    one, two = make("gsam", extra_logs=logs), make("gsam", extra_logs=other)
    train(one)
    one.save_weights(tmp_path / "model.weights.h5")
    two.optimizer.build(two.trainable_variables)
    two.load_weights(tmp_path / "model.weights.h5")
    assert_equal_training(two, one)


# Before the first step, as plain Keras


class BuildsItself(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)


BUILT_BY_HAND = {
    "sequential": lambda: keras.Sequential([layers.Dense(4), layers.Dense(1)]),
    "subclassed": BuildsItself,
}


@AS_WRITTEN
@pytest.mark.parametrize("kind", BUILT_BY_HAND)
@pytest.mark.parametrize("method", ["sam", slow("remembers")])
def test_a_model_that_is_built_by_hand_loads(kind, method, tmp_path):
    """As KerasTuner does with the best model."""

    def fresh():
        method_ = Remembers() if method == "remembers" else method
        wrapper = SharpnessAwareModel(BUILT_BY_HAND[kind](), method_)
        wrapper.compile("sgd", "mse")
        return wrapper

    x, y = models.regression()
    best, path = fresh(), tmp_path / "best.weights.h5"
    best.fit(x, y, verbose=0)
    best.save_weights(path)
    for build in (
        lambda m: m.build((None, 3)),
        lambda m: m.build(input_shape=(None, 3)),
        lambda m: m.build_from_config(best.get_build_config()),
        lambda m: m.model.build((None, 3)),
    ):
        wrapper = fresh()
        with pytest.raises(ValueError, match="has not yet been built"):
            wrapper.load_weights(path)
        build(wrapper)
        assert wrapper.built
        assert wrapper.count_params() == best.model.count_params()
        wrapper.load_weights(path)
        assert_same(wrapper.variables, best.variables, bits=True)
    wrapper.fit(x, y, verbose=0)


def test_a_shape_that_the_model_refuses_is_refused():
    wrapper = SharpnessAwareModel(keras.Sequential([layers.Dense(1)]))
    wrapper.build((None, 3))
    with pytest.raises(ValueError, match="already been configured to use input shape"):
        wrapper.build((None, 4))


@AS_WRITTEN
def test_a_model_without_weights_loads_no_weights(tmp_path):
    """Plain Keras marks it as built, warns, and then loads nothing in silence."""
    wrapper = SharpnessAwareModel(models.Subclassed())
    with pytest.warns(UserWarning, match="does not have a `build"):
        wrapper.build((None, 3))
    with pytest.raises(ValueError, match=r"no weights into which .* Call it on a batch first"):
        wrapper.load_weights(tmp_path / "any.weights.h5")
    wrapper.compile("sgd", "mse")
    wrapper.fit(*models.regression(), verbose=0)
    assert len(wrapper.weights) > 0


# Weights of the plain model


def test_weights_are_those_of_the_plain_model():
    wrapper, plain = SharpnessAwareModel(batchnorm_net(), "gsam"), batchnorm_net()
    plain.set_weights([w + 1 for w in plain.get_weights()])
    wrapper.set_weights(plain.get_weights())
    assert_same(wrapper.model.variables, plain.variables, bits=True)
    assert_same(wrapper.get_weights(), plain.get_weights(), bits=True)


@AS_WRITTEN
def test_the_best_weights_come_back_after_a_switch():
    """Lists of weights do not depend on the method."""
    wrapper = make("gsam")
    stop = keras.callbacks.EarlyStopping("mae", mode="max", patience=9, restore_best_weights=True)
    train(wrapper, epochs=2, callbacks=[callbacks.SwitchMethod({1: "asam"}), stop])
    assert type(wrapper.method) is methods.ASAM


@pytest.mark.parametrize("ending", [".weights.h5", ".keras", ".h5"])
def test_a_file_of_the_plain_model_is_refused_with_the_line_to_write(ending, tmp_path):
    plain, wrapper = batchnorm_net(), SharpnessAwareModel(batchnorm_net())
    path = str(tmp_path / f"plain{ending}")
    (plain.save_weights if ending == ".weights.h5" else plain.save)(path)
    with pytest.raises(ValueError, match=r"`model\.model\.load_weights\(filepath\)`"):
        wrapper.load_weights(path)
    wrapper.model.load_weights(path)
    assert_same(wrapper.get_weights(), plain.get_weights(), bits=True)


def test_a_file_of_the_wrapper_reaches_a_plain_model_through_a_wrapper(tmp_path):
    wrapper, plain = SharpnessAwareModel(batchnorm_net(), "gsam"), batchnorm_net()
    wrapper.set_weights([w + 1 for w in wrapper.get_weights()])
    wrapper.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="could not be loaded"):
        plain.load_weights(tmp_path / "model.weights.h5")
    SharpnessAwareModel(plain).load_weights(tmp_path / "model.weights.h5")
    assert_same(plain.get_weights(), wrapper.get_weights(), bits=True)


# The legacy format


@pytest.mark.parametrize("name", ["model.h5", "model.hdf5", "model.weights.h5"])
def test_the_legacy_format_is_refused(name, tmp_path):
    wrapper = SharpnessAwareModel(models.linear())
    for save in (wrapper.save, lambda path: keras.saving.save_model(wrapper, path)):
        with pytest.raises(ValueError, match=r"cannot `save` the legacy HDF5 .*'\.keras'"):
            save(tmp_path / name)


@pytest.mark.parametrize("wrap", [list, keras.callbacks.CallbackList], ids=["list", "CallbackList"])
def test_a_checkpoint_in_the_legacy_format_is_refused_before_the_first_epoch(wrap, tmp_path):
    wrapper = make("gsam")
    before = values_of(wrapper)
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "best.h5"), "loss")
    with pytest.raises(ValueError, match="cannot `save` the legacy HDF5"):
        train(wrapper, callbacks=wrap([checkpoint]))
    assert_same(wrapper.model.variables, before, bits=True)


def test_a_dynamic_loss_scale_is_saved(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        wrapper = SharpnessAwareModel(batchnorm_net())
        wrapper.compile(
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**30),
            "mse",
        )
        wrapper.fit(*models.regression(), verbose=0)
        wrapper.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    assert float(loaded.optimizer.dynamic_scale) == 2.0**29
    assert_equal_training(loaded, wrapper)


# What a file holds


def test_a_loaded_model_is_compiled_and_reports_the_same(tmp_path):
    wrapper = make("gsam")
    train(wrapper)
    wrapper.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x, y = models.regression(10)
    assert loaded.compiled
    assert loaded.model.compiled
    assert loaded.model.optimizer is loaded.optimizer
    assert_same([loaded.predict(x, verbose=0)], [wrapper.predict(x, verbose=0)], bits=True)
    got = loaded.evaluate(x, y, verbose=0, return_dict=True)
    expected = wrapper.evaluate(x, y, verbose=0, return_dict=True)
    assert set(got) == {"loss", "mae"}
    assert_close([got[k] for k in expected], list(expected.values()))


def test_a_rho_set_by_hand_is_saved(tmp_path):
    wrapper = SharpnessAwareModel(models.mlp())
    wrapper.compile("sgd", "mse")
    wrapper.method.rho = 0.2
    wrapper.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(float(loaded.method.rho), 0.2)
    np.testing.assert_allclose(loaded.method.get_config()["rho"], 0.2, rtol=1e-6)


def test_a_model_that_was_never_compiled_can_be_saved(tmp_path):
    wrapper = SharpnessAwareModel(models.mlp())
    wrapper.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(loaded.variables, wrapper.variables, bits=True)
    assert not loaded.compiled


def test_a_subclassed_model_is_loaded_with_custom_objects(tmp_path):
    wrapper = SharpnessAwareModel(models.Subclassed(units=5))
    wrapper.compile("sgd", "mse")
    wrapper.fit(*models.regression(), verbose=0)
    wrapper.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects={"Subclassed": models.Subclassed}
    )
    assert isinstance(loaded.model, models.Subclassed)
    assert_same(loaded.variables, wrapper.variables, bits=True)


# The wrapped model by itself


def test_the_wrapped_model_is_saved_as_a_plain_keras_model(tmp_path):
    wrapper = make("gsam")
    train(wrapper)
    wrapper.model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is keras.Sequential
    assert "sharp" not in json.dumps(keras.saving.serialize_keras_object(loaded))
    assert_same(loaded.variables, wrapper.model.variables, bits=True)
    assert_same(loaded.optimizer.variables, wrapper.optimizer.variables, bits=True)
    x, y = models.regression()
    assert_close(loaded.evaluate(x, y, verbose=0), wrapper.evaluate(x, y, verbose=0))
    assert set(loaded.fit(x, y, verbose=0).history) == {"loss", "mae"}


LOAD_ALONE = """
import sys
import keras
model = keras.saving.load_model(sys.argv[1])
assert not any(name.startswith("keras_sharp") for name in sys.modules)
print(model.count_params())
"""


@pytest.mark.slow
def test_the_wrapped_model_is_loaded_where_keras_sharp_is_not(tmp_path):
    wrapper = make("gsam")
    train(wrapper)
    wrapper.model.save(tmp_path / "model.keras")
    command = [sys.executable, "-c", LOAD_ALONE, str(tmp_path / "model.keras")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) == wrapper.model.count_params()


# Configs


@keras.saving.register_keras_serializable(package="tests")
def kernels_only(variable):
    return variable.name == "kernel"


@pytest.mark.parametrize("method", [*methods.METHODS, *METHODS])
def test_the_config_of_a_wrapper_is_json_and_makes_its_like(method):
    method = METHODS.get(method, methods.METHODS.get(method))()
    wrapper = SharpnessAwareModel(models.mlp(), method, name="mine")
    config = json.loads(json.dumps(wrapper.get_config()))
    again = SharpnessAwareModel.from_config(config)
    assert type(again.method) is type(method)
    # As JSON, which knows no tuples.
    assert json.dumps(again.get_config()) == json.dumps(wrapper.get_config())
    assert again.name == "mine"


@pytest.mark.parametrize("perturb", ["all", "no_bias_no_norm", "norm_only", kernels_only])
def test_all_arguments_are_in_the_config(perturb):
    wrapper = SharpnessAwareModel(
        models.batchnorm_net(),
        num_micro_batches=3,
        perturb=perturb,
        fresh_noise=True,
        extra_logs=["grad_norm", "skipped_steps"],
    )
    again = SharpnessAwareModel.from_config(json.loads(json.dumps(wrapper.get_config())))
    assert again.num_micro_batches == 3
    assert again.perturb == perturb
    assert again.fresh_noise is True
    assert again.extra_logs == ("grad_norm", "skipped_steps")


def test_a_config_holds_every_argument_of_the_constructor():
    import inspect

    arguments = set(inspect.signature(SharpnessAwareModel.__init__).parameters) - {"self"}
    assert set(SharpnessAwareModel(models.mlp()).get_config()) == arguments


def test_from_config_does_not_change_the_config():
    config = SharpnessAwareModel(models.mlp()).get_config()
    before = json.dumps(config)
    SharpnessAwareModel.from_config(config)
    assert json.dumps(config) == before


# Export


def export_format():
    """What plain Keras can export to with what is installed here, or a skip."""
    formats = {"tensorflow": "tf_saved_model", "jax": "tf_saved_model", "torch": "onnx"}
    return formats[BACKEND]


def test_the_exported_model_predicts_the_same(tmp_path):
    wrapper = make("sam")
    train(wrapper)
    try:
        make("sam").model.export(tmp_path / "plain", format=export_format(), verbose=False)
    except Exception as error:
        pytest.skip(f"Keras cannot export a plain model here: {type(error).__name__}")
    wrapper.export(tmp_path / "model", format=export_format(), verbose=False)
    x, _ = models.regression()
    if BACKEND == "torch":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "model")
        (got,) = session.run(None, {session.get_inputs()[0].name: x})
    else:
        import tensorflow as tf

        loaded = tf.saved_model.load(str(tmp_path / "model"))
        got = loaded.serve(x).numpy()
    assert_close([got], [wrapper.predict(x, verbose=0)], rtol=1e-5)


# A process that has not imported keras_sharp


@pytest.mark.slow
@pytest.mark.parametrize("imported", [False, True])
def test_the_error_of_a_process_without_the_import_names_the_package(imported, tmp_path):
    path = str(tmp_path / "training.keras")
    model = SharpnessAwareModel(models.mlp(), "gsam")
    model.compile("sgd", "mse")
    model.save(path)
    code = f"import keras; print(type(keras.saving.load_model({path!r})).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", f"import keras_sharp; {code}" if imported else code],
        capture_output=True,
        text=True,
        check=False,
    )
    if imported:
        assert done.returncode == 0, done.stderr
        assert "SharpnessAwareModel" in done.stdout
    else:
        assert done.returncode != 0
        words = r"Could not locate class 'SharpnessAwareModel'.*imported.*'module': 'keras_sharp\."
        assert re.search(words, done.stderr, re.DOTALL)


@pytest.mark.slow
def test_the_network_alone_is_loaded_without_the_package(tmp_path):
    path = str(tmp_path / "network.keras")
    model = SharpnessAwareModel(models.mlp(), "gsam")
    model.compile("sgd", "mse")
    model.model.save(path)
    code = f"import keras, sys; keras.saving.load_model({path!r}); assert not any("
    code += "name.startswith('keras_sharp') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

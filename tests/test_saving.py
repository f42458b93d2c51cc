"""What is saved and loaded trains on as if nothing had happened."""

import json
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_sharp import SharpnessAwareModel, methods, schedules
from tests import models
from tests.models import BACKEND, assert_close, assert_same

FIT = {"batch_size": 4, "shuffle": False, "verbose": 0}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


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

    def step(self, objective, w, g, state, rho):
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

"""The private names of Keras that the engines lean on still do what is relied on.

A failure here means that Keras has changed: look at the function in
`keras_sharp/engine/_keras.py` that the message names.
"""

import pathlib
import re

import keras
import numpy as np
import pytest
from keras import layers

import keras_sharp
from keras_sharp.engine import _keras

PACKAGE = pathlib.Path(keras_sharp.__file__).parent


def compiled_model():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    return model


def test_share_compiled_state_makes_two_models_report_the_same_numbers():
    wrapper, model = compiled_model(), compiled_model()
    _keras.share_compiled_state(model, wrapper)
    for name in ("_compile_loss", "_compile_metrics", "_loss_tracker"):
        assert getattr(model, name) is getattr(wrapper, name), (
            f"Keras no longer keeps compiled state in {name}: see share_compiled_state"
        )
    assert [id(m) for m in model.metrics] == [id(m) for m in wrapper.metrics], (
        "the metrics are listed twice, or not at all: see share_compiled_state"
    )


def test_loss_tracker_is_the_metric_behind_the_loss_in_the_logs():
    model = compiled_model()
    assert _keras.loss_tracker(model) is model.metrics[0], "see loss_tracker"
    assert _keras.loss_tracker(model).name == "loss"


def test_losses_of_outputs_are_updated_with_the_loss():
    x = keras.Input((3,))
    model = keras.Model(x, {"a": layers.Dense(1)(x), "b": layers.Dense(1)(x)})
    model.compile("sgd", "mse")
    y = {"a": np.ones((4, 1), "float32"), "b": np.zeros((4, 1), "float32")}
    _keras.build_symbolically(model, (np.ones((4, 3), "float32"), y, None))
    metrics = _keras.losses_of_outputs(model)
    assert [m.name for m in metrics] == ["a_loss", "b_loss"], "see losses_of_outputs"
    zeros = {name: keras.ops.zeros((4, 1)) for name in y}
    _keras.update_losses_of_outputs(model, y, zeros, None)
    assert [float(m.result()) for m in metrics] == [1.0, 0.0], "see update_losses_of_outputs"


def test_in_order_gives_the_logs_as_train_on_batch_does():
    model = compiled_model()
    logs = model.train_on_batch(np.ones((4, 3)), np.ones((4, 1)), return_dict=True)
    assert _keras.in_order(model, logs) == [logs["loss"], logs["mae"]], "see in_order"
    assert _keras.in_order(model, {"loss": 1.0}) == 1.0, "see in_order"


def test_build_symbolically_builds_model_losses_metrics_and_optimizer():
    model = keras.Sequential([layers.Dense(2)])
    model.compile("adam", "mse", metrics=["mae"])
    _keras.build_symbolically(model, (np.ones((4, 3)), np.ones((4, 2)), None))
    assert model.built, "see build_symbolically"
    assert model.optimizer.built, "see build_symbolically"
    assert model.trainable_variables[0].shape == (3, 2)


def test_all_layers_finds_layers_at_any_depth():
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="deep")])
    model = keras.Sequential([inner, layers.Dense(1, name="top")])
    assert {"deep", "top"} <= {layer.name for layer in _keras.all_layers(model)}, "see all_layers"


def test_stateless_scope_gives_variables_other_values_and_collects_updates():
    variable = keras.Variable(np.array([1.0, 2.0], "float32"))
    value = keras.ops.convert_to_tensor(np.array([3.0, 4.0], "float32"))
    with _keras.stateless_scope([(variable, value)]) as scope:
        assert scope.get_current_value(variable) is value, "see stateless_scope"
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable + 0), [3.0, 4.0])
        variable.assign(value + 1)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(scope.get_current_value(variable)), [4.0, 5.0]
    )
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), [1.0, 2.0])


def test_exchanging_variables_works_on_a_layer_that_is_built():
    layer = layers.Dense(2)
    layer.build((None, 3))
    kernel, bias = layer.kernel, layer.bias
    with _keras.exchanging_variables(layer, [bias]):
        layer.other = layer.add_weight(shape=(4,), name="other")
    assert [id(v) for v in layer.variables] == [id(kernel), id(layer.other)], (
        "see exchanging_variables"
    )
    with pytest.raises(ValueError, match="already built"):
        layer.add_weight(shape=(4,))


def test_data_adapter_reads_arrays_in_batches_again_and_again():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    data = _keras.data_adapter(x, y, None, batch_size=4)
    assert data.num_batches == 2, "see data_adapter"
    for _ in range(2):
        batches = [keras.utils.unpack_x_y_sample_weight(b) for b in data.get_numpy_iterator()]
        np.testing.assert_array_equal(np.concatenate([b[0] for b in batches]), x)
        np.testing.assert_array_equal(np.concatenate([b[1] for b in batches]), y)
        assert [len(b[0]) for b in batches] == [4, 2], "see data_adapter"


def test_is_validation_of_fit_tells_who_calls_evaluate():
    calls = []

    class Model(keras.Sequential):
        def evaluate(self, *args, **kwargs):
            calls.append(_keras.is_validation_of_fit(kwargs))
            return super().evaluate(*args, **kwargs)

    model, x, y = Model([layers.Dense(1)]), np.ones((4, 3)), np.ones((4, 1))
    model.compile("sgd", "mse")
    model.fit(x, y, validation_data=(x, y), verbose=0)
    model.evaluate(x, y, verbose=0)
    assert calls == [True, False], "see is_validation_of_fit"


def test_training_scope_sees_what_a_layer_writes_into_a_weight():
    weight, other = (keras.Variable(np.ones(2, "float32")) for _ in range(2))
    value = keras.ops.convert_to_tensor(np.array([3.0, 4.0], "float32"))
    scope = _keras.TrainingScope(
        [(weight, value)],
        [(other, value)],
        lambda w, new: (new, new) if w is None else (new + 10 * w, new),
    )
    with scope:
        other.assign(value + 1)
        weight.assign(value + 1)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight + 0), [34.0, 45.0])
    assert list(scope.written) == [id(weight)], "see TrainingScope"
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(scope.written[id(weight)]), [4.0, 5.0])
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(scope.get_current_value(other)), [4.0, 5.0]
    )


def test_masks_can_be_taken_off_and_put_on():
    x = layers.Masking()(np.array([[[1.0], [0.0]]], "float32"))
    masks = _keras.masks_of({"a": x + 0, "b": x})
    assert list(masks) == [1], "see masks_of"
    copy = x + 0
    assert not _keras.has_mask(copy)
    _keras.set_masks([None, copy], masks)
    assert _keras.has_mask(copy), "see set_masks"


def test_draw_from_own_seeds_makes_dropout_move_its_seed():
    """On PyTorch Keras asks an attribute of the generator whether it was given a seed."""
    dropout = layers.Dropout(0.5)
    model = keras.Sequential([keras.Input((3,)), dropout])
    _keras.draw_from_own_seeds(model)
    before = keras.ops.convert_to_numpy(dropout.seed_generator.state).copy()
    model(np.ones((2, 3)), training=True)
    after = keras.ops.convert_to_numpy(dropout.seed_generator.state)
    assert after[1] == before[1] + 1, "see draw_from_own_seeds"
    assert dropout.get_config()["seed"] is None


def test_start_at_epoch_is_where_fit_starts():
    class Restores(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            _keras.start_at_epoch(self.model, 2)

    model, x, y = compiled_model(), np.ones((4, 3)), np.ones((4, 1))
    history = model.fit(x, y, epochs=3, callbacks=[Restores()], verbose=0)
    assert history.epoch == [2], "see start_at_epoch"
    _keras.start_at_epoch(model, None)
    assert model.fit(x, y, epochs=2, initial_epoch=1, verbose=0).epoch == [1]


def test_is_saving_legacy_h5_tells_which_format_asks_for_a_config(tmp_path):
    calls = []

    class Model(keras.Sequential):
        def get_config(self):
            calls.append(_keras.is_saving_legacy_h5())
            return super().get_config()

    model = Model([keras.Input((3,)), layers.Dense(1)])
    model.save(tmp_path / "model.h5")
    model.save(tmp_path / "model.keras")
    assert calls == [True, False], "see is_saving_legacy_h5"


def test_a_build_that_takes_anything_is_given_nothing_in_a_call():
    """So that the wrapper knows a call from a `build` by hand, and builds nothing in the former."""
    calls = []

    class Model(keras.Model):
        def build(self, *args, **kwargs):
            calls.append((args, kwargs))

        def call(self, x):
            return x

    Model()(np.ones((2, 3)))
    Model().build((None, 3))
    assert calls == [((), {}), (((None, 3),), {})], "see SharpnessAwareModel.build"


def test_has_mask_tells_what_a_layer_has_masked():
    x = keras.ops.convert_to_tensor(np.array([[[1.0], [0.0]]], "float32"))
    assert _keras.has_mask(layers.Masking()(x)), "see has_mask"
    assert not _keras.has_mask(layers.Dense(1)(x)), "see has_mask"


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="Keras refuses unseeded random numbers in JAX traces"
)
def test_global_seed_is_what_unseeded_random_numbers_come_from():
    seed = _keras.global_seed()
    before = keras.ops.convert_to_numpy(seed).copy()
    keras.random.uniform((2,))
    assert np.any(keras.ops.convert_to_numpy(seed) != before), "see global_seed"
    seed.assign(before)
    first = keras.ops.convert_to_numpy(keras.random.uniform((4,)))
    seed.assign(before)
    again = keras.ops.convert_to_numpy(keras.random.uniform((4,)))
    np.testing.assert_array_equal(first, again)


def sources(outside_engine):
    for path in PACKAGE.rglob("*.py"):
        if not (outside_engine and path.is_relative_to(PACKAGE / "engine")):
            yield path, path.read_text()


def test_backends_appear_in_the_engine_only():
    backend = re.compile(r"^\s*(import|from)\s+(tensorflow|jax|torch)\b", re.MULTILINE)
    found = [path.name for path, text in sources(outside_engine=True) if backend.search(text)]
    assert found == []


def test_private_keras_appears_in_one_file_only():
    found = {path.name for path, text in sources(outside_engine=False) if "keras.src" in text}
    assert found == {"_keras.py"}


def test_outside_the_engine_no_private_attribute_of_another_object_is_read():
    """`self._x` is fine; so is a name of the package itself."""
    access = re.compile(r"(?<!self)(?<!super\(\))\.(_[a-z]\w*)")
    own = {"_make", "_replace", "_check", "_value"}  # of NamedTuple, Setting and Objective
    own |= {
        "_batch",
        "_hand_on",
        "_log",
        "_losses",
        "_share",
        "_takes_all",
        "_wants_cosine",
    }  # of an Objective's copies
    found = {
        (path.name, name)
        for path, text in sources(outside_engine=True)
        for name in access.findall(text)
        if name not in own
    }
    assert found == set()

"""Every public member of `keras.Model`: what the wrapper makes of it, on purpose.

A member that is new in Keras fails the first test, until it is put into one of the tables.
"""

import inspect

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_sharp import SharpnessAwareModel
from tests.models import BACKEND, KERAS

X, Y = np.ones((4, 3), "float32"), np.ones((4, 1), "float32")


def network(name="net"):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,), name="inputs")
    x = layers.Dense(4, "tanh", name="first", kernel_regularizer="l2")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, layers.Dense(1, name="last")(x), name=name)


def wrapped():
    model = SharpnessAwareModel(network(), "bsam", extra_logs=["sharpness"], name="wrapper")
    model.compile("sgd", "mse", metrics=["mae"])
    return model


@pytest.fixture(scope="module")
def model():
    model = wrapped()
    model.train_on_batch(X, Y)
    return model


def spec(tensor):
    return tensor.shape, tensor.dtype


def state(m):
    groups = m.trainable_variables, m.non_trainable_variables, m.metrics_variables
    return [[ops.convert_to_tensor(v) for v in group] for group in groups]


def printed(m):
    lines = []
    m.summary(print_fn=lines.append)
    return lines


def refusal(call):
    with pytest.raises(NotImplementedError) as error:
        call()
    return type(error.value)


#: Whatever is asked of the wrapper, the answer is that of the wrapped model.
SAME = {
    "add_loss": lambda m: refusal(lambda: m.add_loss(ops.ones(()))),  # that of Functional
    "call": lambda m: m.call(ops.convert_to_tensor(X)),
    "compute_dtype": lambda m: m.compute_dtype,
    "compute_loss": lambda m: m.compute_loss(X, Y, m(X)),
    "compute_mask": lambda m: m.compute_mask(X, Y),
    "compute_metrics": lambda m: (m.reset_metrics(), m.compute_metrics(X, Y, m(X)))[1],
    "compute_output_shape": lambda m: m.compute_output_shape((None, 3)),
    "compute_output_spec": lambda m: spec(m.compute_output_spec(keras.KerasTensor((2, 3)))),
    "count_params": lambda m: m.count_params(),
    "dtype": lambda m: m.dtype,
    "dtype_policy": lambda m: m.dtype_policy,
    "evaluate": lambda m: m.evaluate(X, Y, verbose=0),
    "get_compile_config": lambda m: m.get_compile_config(),
    "get_layer": lambda m: [m.get_layer("first"), m.get_layer(index=2)],
    "get_metrics_result": lambda m: m.get_metrics_result(),
    "get_quantization_layer_structure": lambda m: m.get_quantization_layer_structure("gptq"),
    "input": lambda m: m.input,
    "input_dtype": lambda m: m.input_dtype,
    "input_spec": lambda m: [(s.shape, s.dtype) for s in m.input_spec],
    "jit_compile": lambda m: m.jit_compile,
    "losses": lambda m: m.losses,
    "metrics_names": lambda m: m.metrics_names,
    "output": lambda m: m.output,
    "predict": lambda m: m.predict(X, verbose=0),
    "predict_on_batch": lambda m: m.predict_on_batch(X),
    "quantization_mode": lambda m: m.quantization_mode,
    "quantized_build": lambda m: refusal(lambda: m.quantized_build((None, 3), "int8")),
    "quantized_call": lambda m: refusal(lambda: m.quantized_call(X)),
    "rematerialized_call": lambda m: m.rematerialized_call(m.call)(ops.convert_to_tensor(X)),
    "run_eagerly": lambda m: m.run_eagerly,
    "stateless_call": lambda m: m.stateless_call(*state(m)[:2], X)[0],
    "stateless_compute_loss": lambda m: m.stateless_compute_loss(*state(m), x=X, y=Y, y_pred=m(X))[
        0
    ],
    "summary": printed,
    "supports_masking": lambda m: m.supports_masking,
    "symbolic_call": lambda m: spec(m.symbolic_call(keras.KerasTensor((2, 3)))),
    "test_on_batch": lambda m: (m.reset_metrics(), m.test_on_batch(X, Y))[1],
    "trainable": lambda m: m.trainable,
    "trainable_variables": lambda m: m.trainable_variables,
    "trainable_weights": lambda m: m.trainable_weights,
    "weights": lambda m: m.weights,
    "variable_dtype": lambda m: m.variable_dtype,
}

#: What not every model has, and a wrapper has if the wrapped model does.
SAME_IF_ANY = ("inputs", "outputs", "input_shape", "output_shape", "output_names")

#: The version of Keras that brought a member, and the one that made it work outside of a scope.
SINCE = {"get_quantization_layer_structure": (3, 13)}
WORKS_SINCE = {"rematerialized_call": (3, 15)}

#: Those of the wrapper, for which it has code or state of its own; and the test of them.
OWN = {
    # How it is trained, and what with.
    "compile": "test_model_api.py",
    "compile_from_config": "test_saving.py",
    "fit": "test_model_api.py",
    "make_predict_function": "the three functions are those of the wrapper's steps",
    "make_test_function": "the three functions are those of the wrapper's steps",
    "make_train_function": "the three functions are those of the wrapper's steps",
    "metrics": "test_the_metrics_are_those_of_the_model_and_of_the_extra_logs",
    "metrics_variables": "test_the_metrics_are_those_of_the_model_and_of_the_extra_logs",
    "predict_step": "Keras' own, which calls the wrapper",
    "reset_metrics": "test_the_metrics_are_those_of_the_model_and_of_the_extra_logs",
    "test_step": "Keras' own, with the losses and metrics of the wrapped model",
    "train_on_batch": "test_model_api.py",
    "train_step": "test_model_api.py",
    # Its variables: those of the wrapped model, and its own.
    "add_variable": "test_trainable_weights_beside_those_of_the_model_are_refused",
    "add_weight": "test_trainable_weights_beside_those_of_the_model_are_refused",
    "get_state_tree": "test_the_state_tree_is_that_of_training_and_can_be_set",
    "get_weights": "test_saving.py",
    "non_trainable_variables": "test_the_variables_hold_those_of_the_model",
    "non_trainable_weights": "test_the_variables_hold_those_of_the_model",
    "path": "test_its_name_and_path_are_its_own",
    "set_state_tree": "test_the_state_tree_is_that_of_training_and_can_be_set",
    "set_weights": "test_saving.py",
    "variables": "test_the_variables_hold_those_of_the_model",
    # Building and files.
    "layers": "test_files_hold_the_wrapped_model_as_a_layer",
    "build": "test_saving.py",
    "build_from_config": "test_saving.py",
    "export": "test_saving.py",
    "from_config": "test_saving.py",
    "get_build_config": "test_saving.py",
    "get_config": "test_saving.py",
    "load_own_variables": "test_saving.py",
    "load_weights": "test_saving.py",
    "quantize": "test_quantizing_the_wrapper_quantizes_the_model",
    "save": "test_saving.py",
    "save_own_variables": "test_saving.py",
    "save_weights": "test_saving.py",
    "to_json": "test_json_holds_the_wrapper_and_the_model",
}

#: Keras refuses them for every model.
REFUSED = {
    "add_metric": lambda m: m.add_metric(),
}

#: What only one backend has: Keras' own code, which holds for any model.
OF_BACKEND = {
    "jax": {"compute_loss_and_updates", "jax_state_sync"},
    "tensorflow": {
        "compiled_loss",  # deprecated
        "compiled_metrics",  # deprecated
        "distribute_reduction_method",
        "distribute_strategy",
        "loss",  # deprecated; `compile` puts the loss in its place
    },
    "torch": {"forward", "named_parameters", "torch_params"},
}[BACKEND]


def members():
    """The public names in `dir(keras.Model)` that are Keras', and not those of its bases.

    torch.nn.Module has some forty more, such as `parameters` and `to`. They
    know nothing of Keras: the wrapper is to them a module with one child, the
    wrapped model, with whose parameters they do what they always do.
    """
    return {
        name
        for cls in keras.Model.__mro__
        if cls.__module__.startswith("keras.")
        for name in vars(cls)
        if not name.startswith("_")
    }


def test_no_member_of_keras_is_forgotten():
    tables = [SAME, OWN, REFUSED, OF_BACKEND]
    listed = [name for table in tables for name in table]
    assert len(listed) == len(set(listed)), "a member is in two tables"
    assert members() - set(listed) == set(), "new in Keras: put it into one of the tables"
    later = {name for name, version in SINCE.items() if version > KERAS}
    assert set(listed) - members() == later, "no longer in Keras"


def equal(a, b):
    if isinstance(a, keras.KerasTensor) or a is b:
        return a is b
    if isinstance(a, (str, bool, int, type(None), type, keras.DTypePolicy)):
        return a == b
    return np.array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


@pytest.mark.parametrize("name", [*SAME, *SAME_IF_ANY])
def test_the_wrapper_answers_as_the_wrapped_model(model, name):
    needed = {**SINCE, **WORKS_SINCE}.get(name, KERAS)
    if needed > KERAS:
        pytest.skip(f"Keras {keras.__version__} does not have it, or not working")
    ask = SAME.get(name, lambda m: getattr(m, name))
    answers = [keras.tree.flatten(ask(m)) for m in (model, model.model)]
    for ours, expected in zip(*answers, strict=True):
        assert equal(ours, expected), (ours, expected)


def test_what_the_wrapped_model_lacks_the_wrapper_lacks():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    model = SharpnessAwareModel(Subclassed())
    for name in SAME_IF_ANY:
        assert not hasattr(model.model, name)
        assert not hasattr(model, name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_keras_refuses_is_refused(model, name):
    for m in (model, model.model):
        with pytest.raises(NotImplementedError):
            REFUSED[name](m)


def test_each_own_member_has_its_test():
    here = {name for name, value in globals().items() if inspect.isfunction(value)}
    named = {why for why in OWN.values() if why.startswith("test_") and not why.endswith(".py")}
    assert named - here == set()


def test_trainable_weights_beside_those_of_the_model_are_refused():
    model = SharpnessAwareModel(network())
    model.add_weight(shape=(), initializer="zeros", trainable=False)
    model.compile("sgd", "mse")
    model.make_train_function()
    model.add_variable((2,), "zeros", name="of_its_own")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"beside those of the model inside.*of_its_own"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("name", ["trainable", "dtype_policy", "supports_masking"])
def test_what_is_set_on_the_wrapper_is_set_on_the_wrapped_model(name):
    model = SharpnessAwareModel(network())
    value = {"dtype_policy": keras.DTypePolicy("mixed_bfloat16"), "trainable": False}.get(
        name, True
    )
    setattr(model, name, value)
    assert getattr(model.model, name) == getattr(model, name) == value
    if name == "trainable":
        assert model.trainable_variables == model.model.trainable_variables == []
        model.trainable = True
        assert len(model.model.trainable_variables) == 6


def test_a_loss_that_is_added_to_the_wrapper_is_one_of_the_wrapped_model():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    model = SharpnessAwareModel(Subclassed())
    model.add_loss(ops.convert_to_tensor(3.0))
    assert [float(loss) for loss in model.losses] == [3.0]
    assert [float(loss) for loss in model.model.losses] == [3.0]


def test_the_metrics_are_those_of_the_model_and_of_the_extra_logs(model):
    assert [m.name for m in model.metrics] == [*model.model.metrics_names, "sharpness"]
    own = {id(v) for m in model.metrics[-1:] for v in m.variables}
    inner = {id(v) for v in model.model.metrics_variables}
    assert {id(v) for v in model.metrics_variables} == inner | own
    model.reset_metrics()
    assert all(float(ops.max(v)) == 0 for v in model.metrics_variables)


def test_the_variables_hold_those_of_the_model(model):
    for name in ("variables", "non_trainable_variables", "non_trainable_weights"):
        ours = {id(v) for v in getattr(model, name)}
        assert ours >= {id(v) for v in getattr(model.model, name)}, name
    assert id(model.skipped_steps) in {id(v) for v in model.non_trainable_variables}


def test_its_name_and_path_are_its_own(model):
    assert model.name == "wrapper"
    assert model.model.path == "net"
    assert model.path in (None, "wrapper")  # Keras gives the path of what it has built itself.


def test_the_state_tree_is_that_of_training_and_can_be_set(model):
    before = model.get_state_tree("numpy_array")
    assert {"first", "norm", "last"} <= set(before["trainable_variables"])
    model.train_on_batch(X, 2 * Y)
    model.set_state_tree(before)
    after = model.get_state_tree("numpy_array")
    for old, new in zip(keras.tree.flatten(before), keras.tree.flatten(after), strict=True):
        np.testing.assert_array_equal(old, new)


def test_json_holds_the_wrapper_and_the_model(model):
    again = keras.models.model_from_json(model.to_json())
    assert isinstance(again, SharpnessAwareModel)
    assert again.get_layer("first").units == 4


def test_quantizing_the_wrapper_quantizes_the_model():
    model = SharpnessAwareModel(network())
    model.compile("sgd", "mse")
    before = model.predict(X, verbose=0)
    model.quantize("int8")
    assert model.get_layer("first").quantization_mode == "int8"
    assert not np.array_equal(model.predict(X, verbose=0), before)
    np.testing.assert_array_equal(model.predict(X, verbose=0), model.model.predict(X, verbose=0))


def test_the_wrapper_is_a_layer_as_the_model_is(model):
    inputs = keras.Input((3,))
    outputs = keras.Model(inputs, model(inputs))(X)
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(ops.convert_to_numpy(outputs), expected, rtol=1e-5)


def test_files_hold_the_wrapped_model_as_a_layer(model, tmp_path):
    """Keras' files follow `layers`: with those of the wrapped model, they would be others."""
    import h5py

    assert model.layers == [model.model]
    path = tmp_path / "w.weights.h5"
    model.save_weights(path)
    with h5py.File(path) as file:
        assert set(file["layers"]) == {"functional"}
        assert set(file["layers/functional/layers"]) >= {"dense", "dense_1"}
        assert not {"inputs", "outputs", "input_spec"} & set(file)

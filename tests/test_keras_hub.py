"""A task of KerasHub preprocesses what `fit` is given; wrapped, it does just the same.

Tasks and preprocessors are those of KerasHub, with tiny networks inside. What the wrapper
does is compared with what the methods of the task do, on raw data: images of 0..255, and
strings.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_sharp import SharpnessAwareModel, callbacks, curvature, methods, sharpness
from keras_sharp.preprocessing import Preprocessed
from tests import models

keras_hub = pytest.importorskip("keras_hub")

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (10, 8, 8, 3)).astype("uint8")
Y = RNG.integers(0, 3, 10)
WEIGHTS = RNG.uniform(0.1, 2.0, 10).astype("float32")
WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "in", "fog"]
TEXTS = np.array([" ".join(RNG.choice(WORDS, 5)) for _ in range(10)])
NOT_SHUFFLED = {"batch_size": 5, "epochs": 2, "shuffle": False, "verbose": 0}


@pytest.fixture(autouse=True)
def _mode(request):
    """As written, unless a test is marked as slow: then it is compiled."""
    slow = request.node.get_closest_marker("slow")
    with models.running("compiled" if slow else "as_written"):
        yield


@keras.saving.register_keras_serializable(package="tests_keras_hub")
class TinyImageBackbone(keras_hub.models.Backbone):
    def __init__(self, filters, **kwargs):
        self.filters = filters
        inputs = keras.Input((8, 8, 3))
        outputs = keras.layers.Conv2D(filters, 4, strides=4, activation="tanh")(inputs)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


def image_task(preprocessor=True, seed=0):
    """A classifier whose preprocessor scales the pixels."""
    keras.utils.set_random_seed(seed)
    converter = keras_hub.layers.ImageConverter(scale=1 / 255.0)
    return keras_hub.models.ImageClassifier(
        TinyImageBackbone(4),
        num_classes=3,
        preprocessor=keras_hub.models.ImageClassifierPreprocessor(converter)
        if preprocessor
        else None,
    )


class TinyTextBackbone(keras_hub.models.Backbone):
    def __init__(self, vocabulary_size, **kwargs):
        names = ("token_ids", "segment_ids", "padding_mask")
        inputs = {name: keras.Input((8,), dtype="int32", name=name) for name in names}
        embedded = keras.layers.Embedding(vocabulary_size, 4)(inputs["token_ids"])
        mask = keras.ops.cast(inputs["padding_mask"][..., None], "float32")
        super().__init__(inputs=inputs, outputs=ops.mean(embedded * mask, axis=1), **kwargs)


class TinyTextClassifier(keras_hub.models.TextClassifier):
    def __init__(self, backbone, num_classes, preprocessor):
        self.backbone, self.preprocessor = backbone, preprocessor
        outputs = keras.layers.Dense(num_classes)(backbone.output)
        super().__init__(inputs=backbone.input, outputs=outputs)


def text_task(seed=0):
    """A classifier whose preprocessor makes tokens of strings."""
    keras.utils.set_random_seed(seed)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        keras_hub.tokenizers.BertTokenizer(vocabulary), sequence_length=8
    )
    return TinyTextClassifier(TinyTextBackbone(len(vocabulary)), 3, preprocessor)


TASKS = {"images": (image_task, X), "strings": (text_task, TEXTS)}


def wrap(task, method="sam", **kwargs):
    model = SharpnessAwareModel(task, method, **kwargs)
    model.compile(keras.optimizers.SGD(0.1))
    return model


def numpy_weights(model):
    return [ops.convert_to_numpy(v) for v in model.trainable_variables]


def assert_same(actual, expected, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-5, **tolerance}
    keras.tree.map_structure(
        lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected
    )


def assert_trains_as_the_task(make, x, *data, **kwargs):
    """`fit` of the wrapper without a method is `fit` of the task: weights and logs."""
    task, wrapped = make(), make()
    model = wrap(wrapped, None)
    task.compile(keras.optimizers.SGD(0.1))
    expected = task.fit(x, *data, **kwargs).history
    actual = model.fit(x, *data, **kwargs).history
    assert_same(actual, expected)
    assert_same(numpy_weights(wrapped), numpy_weights(task))
    return model, task


# What the wrapper does is what the task does


@pytest.mark.parametrize("kind", TASKS)
def test_predict_evaluate_and_the_methods_on_a_batch_are_those_of_the_task(kind):
    make, x = TASKS[kind]
    task = make()
    model = wrap(task)
    expected = task.predict(x, verbose=0)
    assert expected.shape == (10, 3)
    assert_same(model.predict(x, verbose=0), expected)
    assert_same(model.predict(x, batch_size=5, verbose=0), expected)
    assert_same(ops.convert_to_numpy(model.predict_on_batch(x)), expected)
    assert_same(
        model.evaluate(x, Y, sample_weight=WEIGHTS, verbose=0, return_dict=True),
        task.evaluate(x, Y, sample_weight=WEIGHTS, verbose=0, return_dict=True),
    )
    task.reset_metrics()
    expected = task.test_on_batch(x, Y, WEIGHTS, return_dict=True)
    model.reset_metrics()
    assert_same(model.test_on_batch(x, Y, WEIGHTS, return_dict=True), expected)


@pytest.mark.parametrize("kind", TASKS)
def test_plain_training_is_that_of_the_task(kind):
    model, task = assert_trains_as_the_task(*TASKS[kind], Y, **NOT_SHUFFLED)
    x = TASKS[kind][1]
    assert_same(model.model.predict(x, verbose=0), task.predict(x, verbose=0))


@pytest.mark.slow
def test_plain_training_is_that_of_the_task_when_compiled():
    assert_trains_as_the_task(image_task, X, Y, **NOT_SHUFFLED)


def test_train_on_batch_is_that_of_the_task():
    task, wrapped = image_task(), image_task()
    model = wrap(wrapped, None)
    task.compile(keras.optimizers.SGD(0.1))
    for weights in (None, WEIGHTS):
        expected = task.train_on_batch(X, Y, weights, return_dict=True)
        assert_same(model.train_on_batch(X, Y, weights, return_dict=True), expected)
    assert_same(numpy_weights(wrapped), numpy_weights(task))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sample_weight": WEIGHTS},
        {"class_weight": {0: 0.2, 1: 1.0, 2: 3.0}},
        {"validation_data": (X[:5], Y[:5])},
        {"validation_data": (X[:5], Y[:5], WEIGHTS[:5])},
        {"validation_split": 0.5, "sample_weight": WEIGHTS},
        {"steps_per_epoch": 1},
    ],
    ids=lambda kwargs: "+".join(kwargs),
)
def test_the_arguments_of_fit_mean_what_they_mean_to_the_task(kwargs):
    assert_trains_as_the_task(image_task, X, Y, **{**NOT_SHUFFLED, **kwargs})


@pytest.mark.parametrize("kind", TASKS)
def test_tf_data_is_preprocessed(kind):
    tf = pytest.importorskip("tensorflow")
    make, x = TASKS[kind]
    data = tf.data.Dataset.from_tensor_slices((x, Y, WEIGHTS)).batch(5)
    kwargs = {} if kind == "strings" else {"validation_data": data}
    kwargs |= {"epochs": 2, "shuffle": False, "verbose": 0}
    model, task = assert_trains_as_the_task(make, data, **kwargs)
    if kind == "images":
        assert_same(model.evaluate(data, verbose=0), task.evaluate(data, verbose=0))
        assert_same(model.predict(data, verbose=0), task.predict(data, verbose=0))


def test_lists_of_strings_are_strings():
    model = wrap(text_task())
    assert_same(model.predict(list(TEXTS), verbose=0), model.predict(TEXTS, verbose=0))
    model.fit(list(TEXTS), list(Y), verbose=0)


def test_a_task_without_a_preprocessor_takes_the_data_as_they_are():
    x = (X / 255).astype("float32")
    task = image_task(preprocessor=False)
    model = wrap(task)
    assert_same(model.predict(x, verbose=0), image_task().predict(X, verbose=0))
    model.fit(x, Y, verbose=0)
    assert_same(model.predict(x, verbose=0), task.predict(x, verbose=0))


# A method sees preprocessed data


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("kind", TASKS)
def test_a_method_trains_on_preprocessed_data(kind, num_micro_batches):
    make, x = TASKS[kind]
    task, bare = make(), make()
    prepared = keras.tree.map_structure(lambda t: np.asarray(t), task.preprocessor(x))
    bare.preprocessor = None
    kwargs = {"method": methods.SAM(rho=0.1), "num_micro_batches": num_micro_batches}
    kwargs["extra_logs"] = ["sharpness"]
    model, expected = wrap(task, **kwargs), SharpnessAwareModel(bare, **kwargs)
    expected.compile(keras.optimizers.SGD(0.1))
    plain = SharpnessAwareModel(make(), None)
    plain.compile(keras.optimizers.SGD(0.1))
    plain.fit(x, Y, batch_size=5, shuffle=False, verbose=0)
    fit = {"batch_size": 5, "shuffle": False, "verbose": 0}
    history = model.fit(x, Y, **fit).history
    assert_same(history, expected.fit(prepared, Y, **fit).history)
    assert history["sharpness"][0] != 0
    assert_same(numpy_weights(task), numpy_weights(bare))
    moved = [np.abs(a - b).max() for a, b in zip(*map(numpy_weights, (model, plain)), strict=True)]
    assert max(moved) > 1e-4


def test_too_many_micro_batches_for_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"larger than the batch.*a batch of 4"):
        wrap(image_task(), num_micro_batches=5).fit(X, Y, batch_size=4, verbose=0)


def test_curvature_and_sharpness_see_preprocessed_data():
    task, bare = image_task(), image_task()
    prepared = np.asarray(task.preprocessor(X))
    bare.preprocessor = None
    model = wrap(task)
    bare.compile("sgd")
    for see in (
        lambda *args: sharpness.max_sharpness(*args, rho=0.1),
        lambda *args: curvature.eigenvalues(*args, k=1, verbose=0).values,
    ):
        assert_same(see(model, X, Y), see(bare, prepared, Y), rtol=1e-3)
        assert_same(see(task, X, Y), see(bare, prepared, Y), rtol=1e-3)


def test_a_probe_sees_preprocessed_data():
    probe = callbacks.SharpnessProbe(X, Y, measures=["max_sharpness"], rho=0.1)
    task = image_task()
    history = wrap(task).fit(X, Y, callbacks=[probe], verbose=0).history
    prepared = np.asarray(task.preprocessor(X))
    task.preprocessor = None
    expected = sharpness.max_sharpness(task, prepared, Y, rho=0.1)
    assert_same(history["max_sharpness"][0], expected, rtol=1e-3)


# Compiling and saving


def test_compile_has_the_defaults_of_the_task():
    task = image_task()
    model = SharpnessAwareModel(task)
    model.compile()
    assert isinstance(model.optimizer, keras.optimizers.Adam)
    assert float(model.optimizer.learning_rate) == pytest.approx(5e-5)
    assert model.optimizer is task.optimizer
    logs = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert sorted(logs) == ["loss", "sparse_categorical_accuracy"]
    assert_same(logs, task.evaluate(X, Y, verbose=0, return_dict=True))


def test_auto_is_understood_and_may_be_replaced():
    model = SharpnessAwareModel(image_task())
    model.compile(keras.optimizers.SGD(0.1), loss="auto", metrics=["accuracy"])
    assert type(model.loss) is keras.losses.SparseCategoricalCrossentropy
    assert sorted(model.evaluate(X, Y, verbose=0, return_dict=True)) == ["accuracy", "loss"]


@pytest.mark.filterwarnings("error:.*compile.*:UserWarning")
def test_saved_and_loaded_the_model_goes_on(tmp_path):
    model = wrap(image_task(), "gsam")
    model.fit(X, Y, **NOT_SHUFFLED)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert type(loaded.model) is keras_hub.models.ImageClassifier
    assert_same(loaded.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-6, atol=1e-6)
    assert_same(loaded.fit(X, Y, **NOT_SHUFFLED).history, model.fit(X, Y, **NOT_SHUFFLED).history)
    assert_same(numpy_weights(loaded), numpy_weights(model), rtol=1e-6, atol=1e-6)


# What is read, and how


def test_arrays_are_read_in_a_new_order_each_time():
    data = Preprocessed(image_task(preprocessor=False), (np.arange(10), None, None), 4, True)
    keras.utils.set_random_seed(7)
    passes = [np.concatenate([batch[0] for batch in data]).tolist() for _ in range(3)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert passes[0] != passes[1] != passes[2] != list(range(10))
    keras.utils.set_random_seed(7)
    assert [np.concatenate([batch[0] for batch in data]).tolist()] != passes[:1]  # it goes on


def test_shuffled_training_is_repeated_by_the_seed():
    histories = []
    for seed in (1, 1, 2):
        model = wrap(image_task())
        keras.utils.set_random_seed(seed)
        histories.append(model.fit(X, Y, batch_size=2, epochs=2, verbose=0).history["loss"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    assert histories[0] != pytest.approx(histories[2], rel=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, Y[:4]), r"same length.*\[4, 10\]"),
        ((X[:0], Y[:0]), r"at least 1.*\[0\]"),
        ((iter([(X, Y)]),), r"takes arrays.*tf\.data\.Dataset.*set `preprocessor = None`"),
    ],
)
def test_data_that_cannot_be_preprocessed_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        wrap(image_task()).fit(*data, verbose=0)


@pytest.mark.parametrize("share", [0.99, 1.0])
def test_a_validation_split_that_leaves_nothing_is_refused(share):
    with pytest.raises(ValueError, match=rf"validation_split={share} and 10 examples"):
        wrap(image_task()).fit(X, Y, validation_split=share, verbose=0)


def test_a_task_with_a_fit_of_its_own_is_refused():
    class OwnFit(type(image_task())):
        def fit(self, *args, **kwargs):
            raise NotImplementedError

    task = image_task()
    task.__class__ = OwnFit
    with pytest.raises(ValueError, match=r"`fit` of its own.*the class OwnFit"):
        SharpnessAwareModel(task)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="to a format of TensorFlow")
def test_exported_it_takes_what_the_preprocessor_makes_as_the_task_does(tmp_path):
    import tensorflow as tf

    model, task = wrap(image_task()), image_task()
    prepared = np.asarray(task.preprocessor(X))
    served = []
    for name, exported in {"wrapped": model, "task": task}.items():
        exported.export(tmp_path / name, format="tf_saved_model", verbose=False)
        loaded = tf.saved_model.load(str(tmp_path / name))
        served.append(loaded.serve(prepared))
    assert_same(*served)
    assert_same(served[0], model.predict(X, verbose=0))

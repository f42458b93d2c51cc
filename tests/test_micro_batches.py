"""m-sharpness: a batch in parts, each with a perturbation of its own, the directions averaged."""

import itertools
import warnings

import keras
import numpy as np
import pytest
import scipy.sparse
from keras import layers

from keras_sharp import SharpnessAwareModel, methods
from tests import models
from tests.models import BACKEND, assert_close, assert_same, slow, twins, values

COMPILED = pytest.mark.parametrize("mode", ["compiled"], indirect=True)
AS_WRITTEN = pytest.mark.parametrize("mode", ["as_written"], indirect=True)


@pytest.fixture(autouse=True, params=models.MODES)
def mode(request):
    """Whether functions are compiled in a test."""
    with models.running(request.param):
        yield request.param


def pair(build, parts, method="sam", loss="mse", learning_rate=0.1, **kwargs):
    """A compiled wrapper, and a compiled copy of the model inside it."""
    inner, copy = twins(build)
    wrapper = SharpnessAwareModel(inner, method, num_micro_batches=parts)
    wrapper.compile(keras.optimizers.SGD(learning_rate), loss, **kwargs)
    copy.compile(keras.optimizers.SGD(learning_rate), loss, **kwargs)
    return wrapper, copy


def split(batch, parts):
    """The parts of a batch, the larger ones first, and their shares of the examples."""
    size = len(keras.tree.flatten(batch)[0])
    edges = np.cumsum([0, *(size // parts + (i < size % parts) for i in range(parts))])
    for start, end in itertools.pairwise(edges):
        if end > start:
            part = keras.tree.map_structure(lambda a, s=start, e=end: a[s:e], batch)
            yield part, (end - start) / size


def step_by_hand(model, batch, parts, **kwargs):
    """The mean of the directions, by hand, and the mean of the statistics."""
    state = values(model.non_trainable_variables)
    direction = [np.zeros(v.shape) for v in model.trainable_variables]
    statistics = [np.zeros(v.shape) for v in model.non_trainable_variables]
    for part, share in split(batch, parts):
        models.assign(model.non_trainable_variables, state)
        _, d = models.direction_by_hand(model, *part, **kwargs)
        direction = [a + share * b for a, b in zip(direction, d, strict=True)]
        after = values(model.non_trainable_variables)
        statistics = [a + share * b for a, b in zip(statistics, after, strict=True)]
    models.assign(model.non_trainable_variables, statistics)
    models.apply(model, [d.astype("float32") for d in direction])


# The mean, not the sum


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("sam", 3),
        ("bsam", 2),
        slow("sam", 2),
        slow("sam", 8),
        slow("gsam", 2),
        slow("gsam", 3),
    ],
)
def test_the_direction_is_the_mean_of_those_of_the_parts(method, parts):
    wrapper, copy = pair(models.mlp, parts, method)
    for seed in range(2):
        batch = models.regression(seed=seed)
        wrapper.train_on_batch(*batch)
        step_by_hand(copy, batch, parts, method=method)
    assert_close(wrapper.model.variables, copy.variables)


@COMPILED
def test_the_direction_is_the_mean_in_compiled_functions():
    wrapper, copy = pair(models.mlp, 3)
    batch = models.regression()
    wrapper.train_on_batch(*batch)
    step_by_hand(copy, batch, 3)
    assert_close(wrapper.model.variables, copy.variables)


@pytest.mark.parametrize("parts", [slow(2), 3])
def test_at_rho_zero_the_step_is_that_of_the_whole_batch(parts):
    wrapper, plain = pair(models.mlp, parts, methods.SAM(rho=0.0))
    batch = models.regression()
    wrapper.train_on_batch(*batch)
    plain.train_on_batch(*batch)
    assert_close(wrapper.model.variables, plain.variables)


@pytest.mark.parametrize("method", ["sam", slow("gsam")])
def test_equal_examples_give_the_same_step_for_any_number_of_parts(method):
    batch = np.ones((8, 3), "float32"), np.full((8, 1), 2.0, "float32")
    results = []
    for parts in (1, 2, 4):
        wrapper, _ = pair(models.mlp, parts, method)
        wrapper.train_on_batch(*batch)
        results.append(models.flat(values(wrapper.model.variables)))
    assert_close(results[1:], results[:1] * 2)


# Sizes


@pytest.mark.parametrize(
    ("examples", "batch_size", "parts"),
    [(11, 4, 2), (10, 8, 3), slow(10, 4, 2), slow(9, 4, 2), slow(13, 5, 4)],
    ids=["last_does_not_divide", "last_of_two", "last_divides", "last_of_one", "last_of_three"],
)
def test_partial_last_batches_are_weighted_by_size(examples, batch_size, parts):
    """Also where the last batch has fewer examples than parts: it then has fewer parts."""
    wrapper, copy = pair(models.mlp, parts)
    x, y = models.regression(examples)
    wrapper.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
    for start in range(0, examples, batch_size):
        step_by_hand(copy, (x[start : start + batch_size], y[start : start + batch_size]), parts)
    assert_close(wrapper.model.variables, copy.variables)


@COMPILED
def test_a_last_batch_of_one_example_in_compiled_functions():
    wrapper, copy = pair(models.mlp, 3)
    x, y = models.regression(9)
    wrapper.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    for start in (0, 4, 8):
        step_by_hand(copy, (x[start : start + 4], y[start : start + 4]), 3)
    assert_close(wrapper.model.variables, copy.variables)


# Structure


def test_nested_inputs_and_outputs_are_split_alike():
    losses = {"small": "mse", "big": "mae"}
    wrapper, copy = pair(models.two_in_two_out, 3, loss=losses)
    rng = np.random.default_rng(0)
    a, c, small, big = (rng.normal(size=(8, n)).astype("float32") for n in (3, 2, 1, 2))
    batch = {"a": a, "b": {"c": c}}, {"small": small, "big": big}
    wrapper.train_on_batch(*batch)
    step_by_hand(copy, batch, 3)
    assert_close(wrapper.model.variables, copy.variables)


@pytest.mark.parametrize("method", ["sam", methods.SAM(rho=0.0)], ids=["sam", "rho_zero"])
def test_sample_weights_are_split_alike(method):
    wrapper, copy = pair(models.mlp, 3, method)
    batch = (*models.regression(), np.linspace(0, 2, 8).astype("float32"))
    wrapper.train_on_batch(*batch)
    if method == "sam":
        step_by_hand(copy, batch, 3)
    else:
        copy.train_on_batch(*batch)
    assert_close(wrapper.model.variables, copy.variables)


def test_class_weights_are_split_alike():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    wrapper, copy = pair(lambda: models.mlp(outputs=3), 2, loss=loss)
    x, y = models.classification()
    class_weight = {0: 1.0, 1: 3.0, 2: 0.5}
    wrapper.fit(x, y, class_weight=class_weight, batch_size=8, shuffle=False, verbose=0)
    weights = np.array([class_weight[c] for c in y], "float32")
    step_by_hand(copy, (x, y, weights), 2)
    assert_close(wrapper.model.variables, copy.variables)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no sparse inputs on PyTorch")
def test_sparse_inputs_are_split_alike():
    def build():
        keras.utils.set_random_seed(0)
        x = keras.Input((6,), sparse=True)
        return keras.Model(x, layers.Dense(1)(x))

    x = scipy.sparse.random(12, 6, 0.4, format="csr", random_state=0, dtype="float32")
    y = np.random.default_rng(0).normal(size=(12, 1)).astype("float32")
    wrapper, plain = pair(build, 3, methods.SAM(0.0))
    for model in (wrapper, plain):
        model.fit(x, y, batch_size=5, shuffle=False, verbose=0)
    assert_close(wrapper.model.variables, plain.variables)


@pytest.mark.skipif(
    BACKEND == "torch" and models.KERAS < (3, 14),
    reason="there, train_on_batch of the plain model raises for a loss of add_loss alone",
)
def test_a_model_without_targets_is_split_alike():
    def build():
        keras.utils.set_random_seed(1)
        model = models.Autoencoder()
        model(np.ones((1, 3), "float32"))
        return model

    wrapper, copy = pair(build, 2, loss=None)
    x, _ = models.regression()
    logs = wrapper.train_on_batch(x, return_dict=True)
    expected = copy.train_on_batch(x, return_dict=True)
    assert_close([logs[n] for n in expected], list(expected.values()))


# State


def test_batchnorm_statistics_move_once_per_step_by_the_mean_of_the_parts():
    wrapper, copy = pair(models.batchnorm_net, 3)
    for seed in range(2):
        batch = models.regression(seed=seed)
        wrapper.train_on_batch(*batch)
        step_by_hand(copy, batch, 3)
    bias = wrapper.model.get_layer("first").bias  # Before a BatchNormalization: rounding only.
    assert_close(
        [v for v in wrapper.model.variables if v is not bias],
        [v for v in copy.variables if v is not copy.get_layer("first").bias],
    )


@AS_WRITTEN
def test_dropout_masks_differ_between_parts_and_agree_within_a_part():
    masks = []
    inner = keras.Sequential(
        [keras.Input((3,)), layers.Dense(16), models.Recorder((4, 16), masks), layers.Dense(1)]
    )
    wrapper = SharpnessAwareModel(inner, num_micro_batches=2)
    wrapper.compile("sgd", "mse", run_eagerly=True)
    wrapper.train_on_batch(*models.regression())
    first, first_adversary, second, second_adversary = masks
    assert_same([first_adversary, second_adversary], [first, second], bits=True)
    assert np.any(first != second)


def test_the_seed_advances_once_per_part():
    wrapper = SharpnessAwareModel(models.dropout_net(dropout_seed=5), num_micro_batches=4)
    wrapper.compile("sgd", "mse")
    state = wrapper.model.get_layer("dropout").seed_generator.state
    before = values([state])[0].astype("int64")
    wrapper.train_on_batch(*models.regression())
    assert_same([values([state])[0].astype("int64") - before], [[0, 4]], bits=True)


@keras.saving.register_keras_serializable(package="tests")
class Counts(methods.Method):
    """Plain training that counts its steps."""

    def initial_state(self, variables):
        return [np.zeros((), "int32"), np.zeros((), "float32"), np.zeros((2,), "bool")]

    def step(self, objective, w, state):
        return objective(w).gradient, [state[0] + 1, state[1] + 1, keras.ops.logical_not(state[2])]


def test_integers_in_the_memory_of_a_method_are_kept():
    """They have no mean: weighted by a half and cast, a counter would stay at 0."""
    wrapper, _ = pair(models.mlp, 3, Counts())
    for _ in range(3):
        wrapper.train_on_batch(*models.regression(8))
    whole, number, odd = values(wrapper.method_state)
    assert whole == 3
    np.testing.assert_allclose(number, 3.0, rtol=1e-6)
    assert np.all(odd)


def two_outputs():
    keras.utils.set_random_seed(0)
    x = keras.Input((3,))
    outputs = {"a": layers.Dense(1, name="a")(x), "b": layers.Dense(2, name="b")(x)}
    return keras.Model(x, outputs)


@pytest.mark.parametrize("examples", [5, 6])
def test_the_logs_of_each_output_count_every_example_once(examples):
    """In a last batch with fewer examples than parts, too: some parts are empty then."""
    wrapper, plain = pair(two_outputs, 4, learning_rate=0.0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 3)).astype("float32")
    y = {name: rng.normal(size=(examples, n)).astype("float32") for name, n in (("a", 1), ("b", 2))}
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    logs, expected = (model.fit(x, y, **options).history for model in (wrapper, plain))
    for name in ("loss", "a_loss", "b_loss"):
        np.testing.assert_allclose(logs[name], expected[name], rtol=1e-5, err_msg=name)
    trackers = (m.metrics_variables for m in (wrapper.model, plain))
    assert_close(*trackers)


def test_a_last_batch_with_fewer_examples_than_parts_moves_seeds_once_per_example():
    wrapper, _ = pair(lambda: models.dropout_net(dropout_seed=5), 4)
    state = wrapper.model.get_layer("dropout").seed_generator.state
    before = values([state])[0].astype("int64")
    x, y = models.regression(6)
    wrapper.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    assert_same([values([state])[0].astype("int64") - before], [[0, 4 + 2]], bits=True)


def test_one_part_that_is_not_finite_skips_the_whole_step():
    wrapper, plain = pair(models.batchnorm_net, 4)
    x, y = models.regression()
    x[5] = np.nan
    wrapper.train_on_batch(x, y)
    assert int(wrapper.skipped_steps) == 1
    assert_same(wrapper.model.variables, plain.variables, bits=True)


@pytest.mark.parametrize("parts", [slow(2), 3])
def test_loss_and_metrics_are_those_of_the_whole_batch(parts):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    wrapper, plain = pair(
        lambda: models.mlp(outputs=3),
        parts,
        loss=loss,
        learning_rate=0.0,
        metrics=["accuracy", keras.metrics.SparseCategoricalCrossentropy(from_logits=True)],
        weighted_metrics=["accuracy"],
    )
    x, y = models.classification(11)
    weights = np.linspace(0, 2, 11)
    fit = {"batch_size": 4, "shuffle": False, "verbose": 0, "sample_weight": weights}
    logs, expected = wrapper.fit(x, y, **fit).history, plain.fit(x, y, **fit).history
    assert set(logs) == {*expected, "rho"}
    assert_close([logs[n] for n in expected], list(expected.values()), rtol=1e-5)


# What is refused


def assert_unchanged(wrapper, before):
    assert_same(wrapper.model.variables, before, bits=True)
    assert int(wrapper.optimizer.iterations) == 0


class Batches(keras.utils.PyDataset):
    """Two batches of four examples."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return models.regression(4, seed=index)


def as_numpy():
    return {"x": models.regression(8)[0], "y": models.regression(8)[1], "batch_size": 4}


def as_numpy_with_few_examples():
    return {"x": models.regression(4)[0], "y": models.regression(4)[1]}


def as_dataset():
    return {"x": Batches()}


def as_tf_data():
    tf = pytest.importorskip("tensorflow")
    return {"x": tf.data.Dataset.from_tensor_slices(models.regression(8)).batch(4)}


def as_data_loader():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(*map(torch.as_tensor, models.regression(8)))
    return {"x": torch.utils.data.DataLoader(data, batch_size=4)}


SOURCES = [as_numpy, as_numpy_with_few_examples, as_dataset, as_tf_data]
if BACKEND == "torch":
    SOURCES += [as_data_loader]


@pytest.mark.parametrize("source", SOURCES)
def test_more_parts_than_examples_are_refused_before_any_step(source):
    wrapper, copy = pair(models.mlp, 5)
    with pytest.raises(ValueError, match="num_micro_batches=5 and a batch of 4 examples"):
        wrapper.fit(**source(), verbose=0)
    assert_unchanged(wrapper, copy.variables)


def test_more_parts_than_examples_are_refused_by_train_on_batch():
    wrapper, copy = pair(models.mlp, 5)
    with pytest.raises(ValueError, match=r"num_micro_batches=5.*4 examples.*larger batches"):
        wrapper.train_on_batch(*models.regression(4))
    assert_unchanged(wrapper, copy.variables)


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.MeanSquaredError(reduction="sum"),
        {"small": "mse", "big": keras.losses.MeanSquaredError(reduction="sum")},
    ],
    ids=["one", "nested"],
)
def test_a_loss_that_is_summed_is_refused(loss):
    wrapper = SharpnessAwareModel(models.two_in_two_out(), num_micro_batches=2)
    with pytest.raises(ValueError, match=r"reduction='sum'.*sum_over_batch_size"):
        wrapper.compile("sgd", loss)
    SharpnessAwareModel(models.two_in_two_out()).compile("sgd", loss)


def test_float8_weights_are_refused():
    inner = models.mlp()
    inner.get_layer("first").quantize("float8")
    wrapper = SharpnessAwareModel(inner, num_micro_batches=2)
    wrapper.compile("sgd", "mse")
    before = values(inner.variables)
    with pytest.raises(ValueError, match=r"float8.*num_micro_batches=2"):
        wrapper.train_on_batch(*models.regression())
    assert_same(inner.variables, before, bits=True)


def test_tf_data_of_unknown_length_is_not_used_up_by_the_check():
    """The look at the first batch must not eat it."""
    tf = pytest.importorskip("tensorflow")
    calls = []

    def generate():
        calls.append(1)
        yield from (models.regression(4, seed=seed) for seed in range(3))

    signature = (tf.TensorSpec((None, 3), "float32"), tf.TensorSpec((None, 1), "float32"))
    wrapper, copy = pair(models.mlp, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper.fit(tf.data.Dataset.from_generator(generate, output_signature=signature), verbose=0)
    assert int(wrapper.optimizer.iterations) == 3
    for seed in range(3):
        step_by_hand(copy, models.regression(4, seed=seed), 2)
    assert_close(wrapper.model.variables, copy.variables)

"""What the passes of a step leave behind: written weights, masks, random numbers, errors.

Each as plain Keras leaves it, once per step, whatever the number of passes.
"""

import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_sharp import SharpnessAwareModel, engine, methods
from tests import models
from tests.models import BACKEND, assert_close, assert_same, twins, values

PARTS = pytest.mark.parametrize("parts", [1, 3])
ON_TORCH = pytest.mark.skipif(BACKEND != "torch", reason="only PyTorch has such a generator")


#: What is worth a compilation as well.
IN_BOTH_MODES = pytest.mark.parametrize("mode", models.MODES, indirect=True)


@pytest.fixture(autouse=True, params=["as_written"])
def mode(request):
    """Whether functions are compiled in a test."""
    with models.running(request.param):
        yield request.param


def pair(build, method="sam", learning_rate=0.1, loss="mse", compile_kwargs=None, **kwargs):
    """A compiled wrapper, and a compiled copy of the model inside it."""
    inner, plain = twins(build)
    wrapper = SharpnessAwareModel(inner, method, **kwargs)
    for model in (wrapper, plain):
        model.compile(keras.optimizers.SGD(learning_rate), loss, **(compile_kwargs or {}))
    return wrapper, plain


# Weights that a layer writes in the pass


@keras.saving.register_keras_serializable(package="tests")
class Clipped(layers.Layer):
    """A product with a kernel that it clips by itself, and a count of its calls."""

    LIMIT = 0.5

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 1), name="kernel")
        self.calls = self.add_weight(shape=(), dtype="int32", trainable=False, name="calls")
        self.largest = self.add_weight(shape=(), trainable=False, name="largest")

    def call(self, x, training=None):
        if training:
            self.largest.assign(ops.max(ops.abs(self.kernel)))
            self.kernel.assign(ops.clip(self.kernel, -self.LIMIT, self.LIMIT))
            self.calls.assign(self.calls + 1)
        return ops.matmul(x, self.kernel)


@keras.saving.register_keras_serializable(package="tests")
class Quantized(layers.Layer):
    """Vector quantization: a codebook that follows the vectors next to it."""

    def build(self, shape):
        self.codes = self.add_weight(shape=(3, shape[-1]), trainable=False, name="codes")

    def call(self, x, training=None):
        nearest = ops.argmin(ops.sum((x[:, None] - self.codes) ** 2, -1), -1)
        chosen = ops.one_hot(nearest, 3, dtype=x.dtype)
        quantized = ops.matmul(chosen, self.codes)
        if training:
            mean = ops.matmul(ops.transpose(chosen), x) / (ops.sum(chosen, 0)[:, None] + 1.0)
            self.codes.assign(0.9 * self.codes + 0.1 * ops.stop_gradient(mean))
        return x + ops.stop_gradient(quantized - x)


@keras.saving.register_keras_serializable(package="tests")
class Centered(layers.Layer):
    """Subtracts a moving mean, which it reads after it has moved it."""

    def build(self, shape):
        self.mean = self.add_weight(shape=(shape[-1],), trainable=False, name="mean")

    def call(self, x, training=None):
        if training:
            self.mean.assign(0.5 * self.mean + 0.5 * ops.mean(x, 0))
        return x - self.mean


@keras.saving.register_keras_serializable(package="tests")
class WeightNorm(layers.Layer):
    """A dense layer whose kernel it divides by its norm in each training pass."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")

    def call(self, x, training=None):
        if training:
            self.kernel.assign(self.kernel / ops.sqrt(ops.sum(ops.square(self.kernel), 0)))
        return ops.matmul(x, self.kernel)


def sequential(parts):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), *parts()])
    for v in model.trainable_variables:  # So large that the layers have something to do.
        v.assign(3.0 * v.value)
    return model


def frozen():
    layer = Clipped()
    layer.trainable = False
    return [layers.Dense(3), layer]


WRITERS = {
    "spectral": lambda: [
        layers.SpectralNormalization(layers.Dense(4), power_iterations=2),
        layers.Dense(1),
    ],
    "clipped": lambda: [layers.Dense(3, "tanh"), Clipped()],
    "weight_norm": lambda: [WeightNorm(), layers.Dense(1)],
    "centered": lambda: [layers.Dense(3, "tanh"), Centered(), layers.Dense(1)],
    "quantized": lambda: [layers.Dense(3), Quantized(), layers.Dense(1)],
    "frozen": frozen,
}


@pytest.mark.parametrize("name", WRITERS)
def test_at_rho_zero_the_pass_leaves_in_all_variables_what_plain_training_leaves(name):
    wrapper, plain = pair(lambda: sequential(WRITERS[name]), methods.SAM(0.0))
    x, y = models.regression(8)
    for model in (wrapper, plain):
        for _ in range(3):
            model.train_on_batch(x, y)
    assert_close(wrapper.model.variables, plain.variables)
    assert_close([wrapper.predict(x, verbose=0)], [plain.predict(x, verbose=0)])


def only_clipped():
    model = keras.Sequential([keras.Input((3,)), Clipped()])
    model.layers[0].kernel.assign([[2.0], [0.3], [-0.48]])
    return model


@IN_BOTH_MODES
@PARTS
def test_the_clean_pass_writes_and_the_perturbed_ones_start_from_there(parts):
    """Next to the new weights the adversary looks; what it makes the layer write is dropped."""
    wrapper, _ = pair(only_clipped, methods.SAM(0.3), num_micro_batches=parts)
    x, y = models.regression(6)
    old = np.array([2.0, 0.3, -0.48])
    written = np.clip(old, -0.5, 0.5)
    forgets = BACKEND == "jax"  # As plain training there: it differentiates through the clipping.

    def gradient(w):
        g = 2 / len(x) * x.T @ (x @ np.clip(w, -0.5, 0.5) - y[:, 0])
        return g * (np.abs(w) < 0.5) if forgets else g

    start = old if forgets else written
    if parts == 1:
        g = gradient(start)
        expected = start - 0.1 * gradient(start + 0.3 * g / np.linalg.norm(g))
    wrapper.train_on_batch(x, y)
    kernel, calls, largest = values(wrapper.model.variables)
    if parts == 1:
        np.testing.assert_allclose(kernel[:, 0], expected, rtol=1e-5)
    elif not forgets:
        assert np.all(np.abs(kernel[:, 0] - written) < 0.5)
    assert calls == parts
    assert largest == 2.0


def test_a_skipped_step_writes_no_weight():
    wrapper, _ = pair(lambda: sequential(WRITERS["clipped"]))
    before = values(wrapper.model.variables)
    x, y = models.regression(8)
    wrapper.train_on_batch(np.nan * x, y)
    assert int(wrapper.skipped_steps) == 1
    assert_same(wrapper.model.variables, before, bits=True)


# What else a skipped step leaves alone


@IN_BOTH_MODES
@pytest.mark.parametrize("bad", ["data", "learning_rate"])
def test_a_skipped_step_moves_nothing_but_its_counter(bad):
    rho = keras.optimizers.schedules.PolynomialDecay(0.1, 10)
    wrapper, _ = pair(models.batchnorm_net, methods.BSAM(rho), learning_rate=0.1)
    x, y = models.regression(8)
    wrapper.train_on_batch(x, y)
    kept = [v for v in wrapper.variables if v is not wrapper.skipped_steps]
    kept += wrapper.hyperparameter_variables
    metrics = {id(v) for v in wrapper.metrics_variables}
    kept = [v for v in kept if id(v) not in metrics]
    before = values(kept)
    rate = 10.0 if bad == "data" else np.nan
    wrapper.optimizer.learning_rate = rate
    wrapper.train_on_batch(x * (np.nan if bad == "data" else 1.0), y)
    wrapper.optimizer.learning_rate = 0.1
    assert int(wrapper.skipped_steps) == 1
    assert int(wrapper.optimizer.iterations) == 1
    assert_same(kept, before, bits=True)
    wrapper.train_on_batch(x, y)
    assert int(wrapper.skipped_steps) == 1
    assert float(wrapper.highest_learning_rate) == np.float32(0.1)


def test_a_learning_rate_that_is_not_finite_never_reaches_the_weights():
    wrapper, _ = pair(models.mlp)
    before = values(wrapper.model.variables)
    wrapper.optimizer.learning_rate = float("inf")
    wrapper.train_on_batch(*models.regression())
    assert_same(wrapper.model.variables, before, bits=True)


# Masks


def embedded():
    keras.utils.set_random_seed(1)
    tokens = keras.Input((5,), dtype="int32")
    return tokens, layers.Embedding(9, 4, mask_zero=True)(tokens)


def tagger():
    tokens, h = embedded()
    h = layers.Bidirectional(layers.GRU(3, return_sequences=True))(h)
    return keras.Model(tokens, layers.Dense(2)(h))


def attention():
    tokens, h = embedded()
    h = layers.MultiHeadAttention(1, 3)(h, h)
    return keras.Model(tokens, layers.Dense(2)(h))


def two_taggers():
    tokens, h = embedded()
    pooled = layers.GlobalAveragePooling1D()(h)  # Its mask ends here.
    return keras.Model(
        tokens,
        {
            "a": layers.Dense(2, name="a")(h),
            "b": layers.Dense(1, name="b")(layers.LSTM(3, return_sequences=True)(h)),
            "c": layers.Dense(1, name="c")(pooled),
        },
    )


def tokens_and_targets(model):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, (6, 5))
    for i, length in enumerate((2, 5, 1, 3, 4, 2)):
        tokens[i, length:] = 0
    targets = keras.tree.map_structure(
        lambda t: rng.normal(size=(6, *t.shape[1:])).astype("float32"), model.output
    )
    return tokens, targets


@PARTS
@pytest.mark.parametrize(
    ("build", "mode"),
    [
        (tagger, "as_written"),
        models.slow(attention, "as_written"),
        models.slow(two_taggers, "compiled"),
    ],
    indirect=["mode"],
)
def test_metrics_of_training_leave_masked_steps_out(build, parts):
    """`evaluate` of plain Keras says what they are; on JAX its training counts masked steps."""
    plain, inner = build(), build()
    outputs = plain.output_names if build is two_taggers else None

    def every(name):
        return {output: [name] for output in outputs} if outputs else [name]

    compile_kwargs = {"metrics": every("mae"), "weighted_metrics": every("mse")}
    wrapper = SharpnessAwareModel(inner, "sam", num_micro_batches=parts)
    x, y = tokens_and_targets(plain)
    plain.compile("sgd", "mse", **compile_kwargs)
    expected = plain.evaluate(x, y, batch_size=6, verbose=0, return_dict=True)
    wrapper.compile("sgd", "mse", **compile_kwargs)
    logs = wrapper.train_on_batch(x, y, return_dict=True)
    names = [name for name in expected if "mae" in name or "mse" in name]
    assert len(names) == 2 * len(outputs or [1])
    for name in names:
        np.testing.assert_allclose(float(logs[name]), expected[name], rtol=1e-5, err_msg=name)


def test_all_passes_see_the_same_sample_weights():
    """On PyTorch, Keras multiplies them in place by the mask."""
    model = tagger()
    wrapper = SharpnessAwareModel(model, methods.SAM(0.0), extra_logs=["perturbed_loss"])
    wrapper.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = tokens_and_targets(model)
    given = np.random.default_rng(0).uniform(size=x.shape).astype("float32")
    weight = given.copy()
    options = {"batch_size": 6, "shuffle": False, "verbose": 0}
    logs = wrapper.fit(x, y, sample_weight=weight, **options).history
    np.testing.assert_allclose(logs["perturbed_loss"], logs["loss"], rtol=1e-6)
    np.testing.assert_array_equal(weight, given)


# Random numbers


@ON_TORCH
def test_no_step_rewinds_the_generator_of_the_process():
    import torch

    wrapper, _ = pair(models.dropout_net, "bsam")
    x, y = models.regression()
    wrapper.train_on_batch(x, y)
    before = torch.get_rng_state()
    wrapper.train_on_batch(x, y)
    assert torch.equal(torch.get_rng_state(), before)


@ON_TORCH
def test_models_in_two_threads_do_not_disturb_each_others_masks():
    masks = {name: [] for name in "ab"}

    @keras.saving.register_keras_serializable(package="tests")
    class Recording(layers.Layer):
        def __init__(self, masks):
            super().__init__()
            self.drop, self.write = layers.Dropout(0.5), masks.append

        def call(self, x, training=None):
            if training and x.device.type != "meta":
                ones = ops.ones((1, 64))
                self.write(ops.convert_to_numpy(self.drop(ones, training=True)).tobytes())
            return x

    def make(name):
        inner = keras.Sequential([keras.Input((3,)), Recording(masks[name]), layers.Dense(1)])
        wrapper = SharpnessAwareModel(inner)
        wrapper.compile("sgd", "mse")
        wrapper.train_on_batch(*models.regression())
        masks[name].clear()
        return wrapper

    def train(wrapper):
        for _ in range(30):
            wrapper.train_on_batch(*models.regression())

    threads = [threading.Thread(target=train, args=(make(name),)) for name in masks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seen in masks.values():
        assert len(seen) == 60
        assert seen[::2] == seen[1::2], "the passes of a step have seen different masks"
        assert len(set(seen)) == 30, "a mask has come twice"
    assert not set(masks["a"]) & set(masks["b"])


def test_dropout_without_a_seed_goes_on_where_a_file_was_saved(tmp_path):
    def make():
        keras.utils.set_random_seed(1)
        wrapper = SharpnessAwareModel(models.dropout_net())
        wrapper.compile(keras.optimizers.SGD(0.1), "mse")
        return wrapper

    def train(model):
        model.fit(*models.regression(), batch_size=4, epochs=2, shuffle=False, verbose=0)

    through, stopped = make(), make()
    train(through)
    train(through)
    train(stopped)
    stopped.save(tmp_path / "model.keras")
    keras.utils.set_random_seed(1)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    train(loaded)
    assert_same(loaded.model.variables, values(through.model.variables), bits=True)


# Errors


@keras.saving.register_keras_serializable(package="tests")
class Refusing(layers.Layer):
    """Raises if its input is not finite, as far as that is known, or in a given call."""

    def __init__(self, fail_in=None, **kwargs):
        super().__init__(**kwargs)
        self.fail_in, self.count = fail_in, 0

    def call(self, x, training=None):
        self.count += bool(training)
        if self.count == self.fail_in:
            raise RuntimeError("a fault of the layer")
        if BACKEND == "torch" and x.device.type != "meta" and not bool(ops.all(ops.isfinite(x))):
            raise RuntimeError("not finite")
        return x


@ON_TORCH
@pytest.mark.parametrize("culprit", ["loss", "layer"])
def test_what_raises_because_perturbed_weights_are_not_finite_is_a_skipped_step(culprit):
    def build():
        keras.utils.set_random_seed(1)
        refuse = [Refusing()] if culprit == "layer" else []
        # Where the weights are 1e30, the second product is infinite.
        dense = [layers.Dense(4), layers.Dense(4), *refuse, layers.Dense(1, "sigmoid")]
        return keras.Sequential([keras.Input((3,)), *dense])

    method = methods.SAM(1e30)
    if culprit == "layer":  # Here the weights themselves overflow.
        method = methods.SAM(3e38, neighborhood="weight_scaled")
    wrapper, _ = pair(build, method, loss="binary_crossentropy")
    for v in wrapper.model.trainable_variables:
        v.assign(9.0 * v.value)
    before = values(wrapper.model.variables)
    x, y = models.regression()
    wrapper.train_on_batch(x, np.ones_like(y))
    assert int(wrapper.skipped_steps) == 1
    assert_same(wrapper.model.variables, before, bits=True)


@ON_TORCH
def test_a_clean_batch_that_a_loss_refuses_is_a_skipped_step():
    wrapper, _ = pair(
        lambda: keras.Sequential([keras.Input((3,)), layers.Dense(1, "sigmoid")]),
        loss="binary_crossentropy",
    )
    x, y = models.regression()
    wrapper.train_on_batch(np.nan * x, np.ones_like(y))
    assert int(wrapper.skipped_steps) == 1


@pytest.mark.parametrize("passes", [1, 2])
def test_an_error_of_another_cause_is_raised_and_changes_nothing(passes):
    layer = Refusing()
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(1), layer])
    wrapper = SharpnessAwareModel(inner)
    wrapper.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    x, y = models.regression()
    wrapper.train_on_batch(x, y)
    before = values(wrapper.variables)
    layer.fail_in = layer.count + passes
    with pytest.raises(RuntimeError, match="a fault of the layer"):
        wrapper.train_on_batch(x, y)
    assert_same(wrapper.variables, before, bits=True)


def test_own_random_numbers_of_a_model_are_those_of_its_layers():
    """What the engine says of it: whose seeds move in a step."""
    wrapper, _ = pair(models.dropout_net)
    engine.own_random_numbers(wrapper.model)
    seed = wrapper.model.get_layer("dropout").seed_generator.state
    before = values([seed])[0].astype("int64")
    wrapper.train_on_batch(*models.regression())
    assert_same([values([seed])[0].astype("int64") - before], [[0, 1]], bits=True)

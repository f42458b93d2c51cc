"""What `engine/_tensorflow_derivatives.py` replaces: right where it stands in, needed, and used.

A failure of the last tests means that TensorFlow or Keras has changed: look at the table there.
"""

import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

tf = pytest.importorskip("tensorflow")
if keras.backend.backend() != "tensorflow":
    pytest.skip("repairs of TensorFlow", allow_module_level=True)

from keras_sharp import engine  # noqa: E402
from keras_sharp.engine import _tensorflow_derivatives as derivatives  # noqa: E402

RNG = np.random.default_rng(0)
IMAGES, SCORES = RNG.normal(size=(2, 5, 6, 2)), RNG.normal(size=(3, 5, 4))


def pool(x, window=2, stride=1, padding="SAME"):
    # What comes in is not the argument itself: its memory may be written to.
    return tf.nn.max_pool(tf.sin(x), window, stride, padding)


def resized(method, **kwargs):
    return lambda x: tf.image.resize(x, (7, 4), method, **kwargs)


def ctc(x):
    labels, lengths = [[1, 2], [3, 3], [2, 0]], [2, 2, 1]
    return tf.nn.ctc_loss(labels, x, lengths, [5, 4, 5], False, blank_index=0)


#: A function of a tensor, its argument, and whether XLA compiles its second derivative.
CASES = {
    "moments": (lambda x: tf.nn.moments(x, (1, 2))[1], IMAGES, True),
    "softsign": (tf.nn.softsign, IMAGES, True),
    "pool": (pool, IMAGES, True),
    "pool, valid": (lambda x: pool(x, 3, 2, "VALID"), IMAGES, True),
    "pool, same": (lambda x: pool(x, 3, 2), IMAGES, True),
    "pool, explicit": (lambda x: pool(x, 2, 2, [[0, 0], [1, 0], [0, 1], [0, 0]]), IMAGES, False),
    "pool 3D": (lambda x: tf.nn.max_pool3d(x[None], 2, 1, "SAME"), IMAGES, True),
    **{f"resize, {m}": (resized(m), IMAGES, False) for m in ("bicubic", "lanczos3", "nearest")},
    "resize, bilinear": (resized("bilinear"), IMAGES, True),
    "resize, antialias": (resized("bilinear", antialias=True), IMAGES, False),
    "ctc": (ctc, SCORES, False),
}


def loss_of(fn):
    """A loss of one list of weights, in which each output counts otherwise."""

    def loss(w):
        y = fn(w[0])
        weights = tf.sin(tf.range(tf.size(y), dtype=tf.float32))
        return tf.reduce_sum(tf.reshape(weights, tf.shape(y)) * tf.cast(y, tf.float32) ** 2)

    return loss


def as_written(fn):
    return fn


def graph(fn):
    return tf.function(fn)


def xla(fn):
    return tf.function(fn, jit_compile=True)


def relative_error(loss, x, run, h=2e-3):
    """Of a product with the Hessian, against differences of the gradient that TensorFlow has."""
    x = np.asarray(x, "float32")
    v = np.random.default_rng(1).normal(size=x.shape).astype("float32")

    def gradient(t):
        at = tf.constant(x + t * v)
        with tf.GradientTape() as tape:
            tape.watch(at)
            value = loss([at])
        return tape.gradient(value, at).numpy().astype("float64")

    difference = (gradient(h) - gradient(-h)) / (2 * h)
    (product,) = run(lambda w, v: engine.hessian(loss, [w])([v]))(tf.constant(x), tf.constant(v))
    return np.linalg.norm(product.numpy() - difference) / np.linalg.norm(difference)


@pytest.mark.parametrize(
    "run", [as_written, *(pytest.param(run, marks=pytest.mark.slow) for run in (graph, xla))]
)
@pytest.mark.parametrize("name", CASES)
def test_products_are_right(name, run):
    fn, x, with_xla = CASES[name]
    if run is xla and not with_xla:
        pytest.skip("XLA cannot compile it")
    assert relative_error(loss_of(fn), x, run) < 5e-3


@pytest.mark.parametrize("run", [graph, pytest.param(xla, marks=pytest.mark.slow)])
def test_linearized_products_are_right(run):
    loss = loss_of(lambda x: tf.nn.moments(pool(x), (1, 2))[1])
    at = engine.linearized(engine.hessian, loss)
    product = lambda w, v: at([w])([v])  # noqa: E731
    assert relative_error(loss, IMAGES, lambda _: run(product)) < 5e-3


@pytest.mark.parametrize("name", ["moments", "ctc", "resize, bilinear"])
def test_the_values_are_those_of_tensorflow(name):
    fn, x, _ = CASES[name]
    x = tf.constant(x, "float32")
    with derivatives.within(), derivatives.within():
        value = fn(x)
    np.testing.assert_allclose(value, fn(x), rtol=1e-5, atol=1e-6)


def test_a_second_derivative_that_would_be_zero_is_refused():
    def bare(x):
        return tf.raw_ops.ResizeBilinear(images=x, size=(7, 4))

    def fake(x):
        return tf.quantization.fake_quant_with_min_max_args(x)

    for fn in (bare, fake):
        loss, x = loss_of(fn), tf.constant(IMAGES, "float32")
        engine.value_and_gradient(lambda w, loss=loss: (loss(w), None), [x])
        with pytest.raises(LookupError, match=r"Received: .*Expected none of"):
            engine.hessian(loss, [x])([x])


def calls(monkeypatch):
    """The names of the formulas that are called from now on."""
    called = set()

    def counted(name, formula):
        def run(*args, **kwargs):
            called.add(name)
            return formula(*args, **kwargs)

        return run

    for name, formula in derivatives.FORMULAS.items():
        monkeypatch.setitem(derivatives.FORMULAS, name, counted(name, formula))
    return called


def test_where_one_derivative_is_taken_the_functions_are_those_of_tensorflow(monkeypatch):
    called = calls(monkeypatch)
    for name in ("moments", "resize, bilinear", "ctc"):
        fn, x, _ = CASES[name]
        fn(tf.constant(x, "float32"))
        engine.value_and_gradient(
            lambda w, fn=fn: (loss_of(fn)(w), None), [tf.constant(x, "float32")]
        )
    assert called == set()


def test_another_thread_keeps_the_functions_of_tensorflow(monkeypatch):
    called = calls(monkeypatch)
    with derivatives.within(), derivatives.within():
        thread = threading.Thread(target=tf.nn.moments, args=(tf.constant(IMAGES), (1, 2)))
        thread.start()
        thread.join()
        assert called == set()
        tf.nn.moments(tf.constant(IMAGES), (1, 2))
    assert called == {"moments"}


# That they are still needed, and still called


def test_keras_calls_what_is_replaced(monkeypatch):
    x = ops.convert_to_tensor(IMAGES, "float32")
    uses = {
        "moments": lambda: [
            layers.LayerNormalization()(x),
            layers.GroupNormalization(2)(x),
            layers.BatchNormalization()(x, training=True),
        ],
        "resize": lambda: [
            layers.UpSampling2D(interpolation="bilinear")(x),
            layers.Resizing(3, 3)(x),
        ],
        "ctc_loss": lambda: [keras.losses.CTC()(np.array([[1, 2]] * 3), SCORES.astype("float32"))],
    }
    for name, use in uses.items():
        called = calls(monkeypatch)
        with derivatives.within(), derivatives.within():
            use()
        assert called == {name}, "Keras calls another function now."


def plain_product(fn, w, v):
    """By two tapes, which the formulas know nothing of."""
    with tf.GradientTape() as outer:
        outer.watch(w)
        with tf.GradientTape() as inner:
            inner.watch(w)
            value = loss_of(fn)([w])
        gradient = inner.gradient(value, w)
    return outer.gradient(gradient, w, v, unconnected_gradients="zero")


def test_functions_that_are_replaced_are_still_wrong_in_tensorflow():
    for name in ("moments", "ctc"):
        fn, x, _ = CASES[name]

        def product(w, v, fn=fn):
            return [plain_product(fn, w, v)]

        error = relative_error(loss_of(fn), x, lambda _, product=product: product)
        assert not error < 1e-2, "TensorFlow has mended it: leave the formula out."


@pytest.mark.parametrize("run", [graph, xla])
def test_max_pooling_is_right_where_tensorflow_is_still_wrong(monkeypatch, run):
    x = tf.constant(1 + 1e-4 * IMAGES, "float32")
    v = tf.constant(RNG.normal(size=x.shape), "float32")

    def product(w, v):
        return plain_product(pool, w, v)

    mended = run(product)(x, v)
    entry = derivatives.REGISTRY._registry["MaxPoolGrad"]
    monkeypatch.setitem(entry, "type", derivatives.REGISTERED["MaxPoolGrad"])
    expected = product(x, v)  # Right where each operation runs by itself.
    np.testing.assert_allclose(mended, expected, rtol=1e-4, atol=1e-6)
    wrong = run(lambda w, v: product(w, v))(x, v)
    error = np.linalg.norm(wrong - expected) / np.linalg.norm(expected)
    assert error > 1e-2, "TensorFlow has mended it: leave `_max_pool` out."


def test_gradients_of_gradients_are_still_missing_in_tensorflow():
    registered = derivatives.REGISTERED
    constants = {name for name, fn in registered.items() if fn is None}
    refused = {name for name, fn in derivatives.GRADIENTS.items() if fn is derivatives._refused}
    assert constants == refused, "TensorFlow has a gradient of these now: do not refuse them."
    assert "SoftsignGrad" not in registered, "TensorFlow has one now: leave `_softsign` out."
    names = derivatives.REGISTRY.list()
    for name in ("ResizeBicubicGrad", "ResizeNearestNeighborGrad", "ScaleAndTranslateGrad"):
        assert name not in names, "TensorFlow has a gradient of it now."


def test_the_gradients_are_those_that_tensorflow_looks_up():
    for name, fn in derivatives.GRADIENTS.items():
        assert derivatives.REGISTRY.lookup(name) is fn

"""Second derivatives that TensorFlow lacks, or gets wrong without a word, and their repair.

TensorFlow differentiates a gradient as it differentiates all else: operation by operation. Some
functions and operations were written to be differentiated once only (TensorFlow 2.21):

| what | its second derivative | the repair |
|---|---|---|
| `tf.nn.moments` | wrong: it stops a gradient that is zero, whose derivative is not | a formula |
| `tf.nn.ctc_loss` | zero: its gradient is computed ahead, as a constant | a formula |
| `tf.image.resize` | zero or none, and float32 in between whatever comes in | two products |
| `Softsign` | none | a formula |
| `MaxPool` | in a graph with stride 1, the kernel overwrites what it reads | a selection |
| `MaxPool` with XLA | compares the first 16 bits of each number only | the same |
| `FakeQuant...`, bare `ResizeBilinear` | zero: their gradient is taken for a constant | refused |

The functions are replaced `within` what is differentiated twice, in the thread that does it. For
all other calls they are those of TensorFlow, with their kernels and their speed; but images of
float64 are resized in float64 where they are differentiated once, too. A `tf.function` that a layer
keeps for itself, and that training has traced before, stays as it was traced. The operations
receive another gradient of their gradient, which only second derivatives ask for.

`tests/test_tensorflow_derivatives.py` fails loudly when TensorFlow or Keras changes any of this.
"""

import contextlib
import contextvars
import functools

import numpy as np
import tensorflow as tf

# There is no public way to exchange a gradient that is registered.
from tensorflow.python.framework.ops import gradient_registry as REGISTRY

from keras_sharp.engine._ctc import ctc_loss

#: How many derivatives will be taken of what runs now.
_order: contextvars.ContextVar[int] = contextvars.ContextVar("_order", default=0)


@contextlib.contextmanager
def within():
    """Around what a gradient will be taken of; nested, a derivative of a gradient."""
    token = _order.set(_order.get() + 1)
    try:
        yield
    finally:
        _order.reset(token)


# Functions


def _moments(x, axes, shift=None, keepdims=False, name=None):
    """The mean and the variance."""
    del shift, name
    wide = tf.cast(x, tf.float32) if x.dtype == tf.float16 else x
    mean = tf.reduce_mean(wide, axes, keepdims=keepdims)
    variance = tf.math.reduce_variance(wide, axes, keepdims=keepdims)
    return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)


def _ctc_loss(labels, logits, label_length, logit_length, logits_time_major=True, unique=None,
              blank_index=None, name=None):  # fmt: skip
    """The negative log-probability of the labels."""
    del unique, name
    if isinstance(labels, tf.SparseTensor):
        raise LookupError(
            "TensorFlow has no second derivative of tf.nn.ctc_loss with sparse labels. Received: "
            "labels in a tf.SparseTensor. Expected a dense tensor, and `label_length`."
        )
    if logits_time_major:
        logits = tf.transpose(logits, (1, 0, 2))
    wide = tf.cast(logits, tf.float32) if logits.dtype.size < 4 else logits
    loss = ctc_loss(labels, wide, label_length, logit_length, blank_index or 0)
    return tf.cast(loss, logits.dtype)


def _resize(
    images, size, method="bilinear", preserve_aspect_ratio=False, antialias=False, name=None
):
    """Images of another size: a linear map along each of the two axes."""
    resize, images = FUNCTIONS["resize"], tf.convert_to_tensor(images)
    if preserve_aspect_ratio or not images.dtype.is_floating:
        return resize(images, size, method, preserve_aspect_ratio, antialias, name)
    if images.shape.rank == 3:
        return _resize(images[None], size, method, antialias=antialias)[0]
    if images.dtype.size < 4:
        images = tf.cast(images, tf.float32)
    for axis, product in ((1, "oh,bhwc->bowc"), (2, "ow,bhwc->bhoc")):
        # The matrix, as what becomes of the columns of an identity.
        columns = tf.eye(tf.shape(images)[axis])[None, :, None, :]
        matrix = resize(columns, (size[axis - 1], 1), method, antialias=antialias)[0, :, 0]
        images = tf.einsum(product, tf.cast(matrix, images.dtype), images)
    return images


#: What stands in for functions of TensorFlow.
FORMULAS: dict = {"moments": _moments, "ctc_loss": _ctc_loss, "resize": _resize}


def _replace(module, name):
    """Let a function be the formula `within` what is differentiated twice: the function it was."""
    old = getattr(module, name)

    @functools.wraps(old)
    def function(*args, **kwargs):
        order = _order.get()
        if order > 1 or (order == 1 and name == "resize" and _is_float64(*args, **kwargs)):
            return FORMULAS[name](*args, **kwargs)
        return old(*args, **kwargs)

    setattr(module, name, function)
    return old


def _is_float64(images, *args, **kwargs):
    return tf.convert_to_tensor(images).dtype == tf.float64


#: The functions of TensorFlow itself.
FUNCTIONS = {
    "moments": _replace(tf.nn, "moments"),
    "ctc_loss": _replace(tf.nn, "ctc_loss"),
    "resize": _replace(tf.image, "resize"),
}


# Gradients of gradients. Each function receives an operation that has computed a gradient, and the
# derivative by its results; it returns that by its inputs.


def _softsign(op, by):
    gradient, x = op.inputs
    s = 1 + tf.abs(x)
    return by / s**2, -2 * by * gradient * tf.sign(x) / s**3


def _max_pool(op, by):
    x, y, _ = op.inputs
    window, strides = op.get_attr("ksize"), op.get_attr("strides")
    padding = _padding(op, tf.shape(x), tf.shape(y), window, strides)
    padded, by = tf.pad(x, padding, constant_values=x.dtype.min), tf.pad(by, padding)
    size = (tf.shape(y) - 1) * strides + 1
    highest, selected = None, None
    # The first of equal numbers, as in the kernel that computed the gradient.
    for start in np.ndindex(*window):
        part, by_part = (tf.strided_slice(t, start, start + size, strides) for t in (padded, by))
        if highest is None:
            highest, selected = part, by_part
        else:
            higher = part > highest
            highest = tf.where(higher, part, highest)
            selected = tf.where(higher, by_part, selected)
    return tf.zeros_like(x), tf.zeros_like(y), selected


def _padding(op, size, pooled, window, strides):
    """How many places stand before and after each axis."""
    if op.get_attr("padding") == b"EXPLICIT":
        return tf.reshape(op.get_attr("explicit_paddings"), (-1, 2))
    missing = tf.maximum((pooled - 1) * strides + window - size, 0)
    return tf.stack([missing // 2, missing - missing // 2], axis=1)


def _refused(op, *by):
    del by
    raise LookupError(
        "A second derivative that TensorFlow would take for zero, and that is not zero. Received: "
        f"a second derivative through the operation {op.type}. Expected none of "
        f"{[name for name, fn in GRADIENTS.items() if fn is _refused]} in the model. Resize images "
        "with keras.ops.image.resize or tf.image.resize; leave quantization out, or use gradients "
        "only (`second_order=False`)."
    )


#: By the operation that computes a gradient.
GRADIENTS: dict = {
    "SoftsignGrad": _softsign,
    "MaxPoolGrad": _max_pool,
    "MaxPool3DGrad": _max_pool,
    "ResizeBilinearGrad": _refused,
    "FakeQuantWithMinMaxArgsGradient": _refused,
    "FakeQuantWithMinMaxVarsGradient": _refused,
    "FakeQuantWithMinMaxVarsPerChannelGradient": _refused,
}
#: What TensorFlow itself has registered for them. `None` stands for a constant.
REGISTERED = {name: REGISTRY.lookup(name) for name in GRADIENTS if name in REGISTRY.list()}
for _name, _fn in GRADIENTS.items():
    REGISTRY._registry.pop(_name, None)
    tf.RegisterGradient(_name)(_fn)

"""Loss and gradient by TensorFlow's own tape, on the variables of a plain Keras model."""

import tensorflow as tf

from tests import models


def forward_and_gradient(model, batch, scale):
    """One training pass, which moves statistics, seeds and trackers as in `fit`.

    See `_torch.py`.
    """
    x, y, sample_weight = batch
    weights = [v.value for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        y_pred = model(x, training=True)
        loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
        scaled = loss * tf.cast(scale, loss.dtype)
    gradient = tape.gradient(scaled, weights)
    gradient = [None if g is None else tf.convert_to_tensor(g) for g in gradient]
    return loss, y_pred, [None if g is None else g / tf.cast(scale, g.dtype) for g in gradient]


def value_and_gradient(loss, v):
    """The value and the gradient of a function of one tensor, at an array."""
    v = tf.convert_to_tensor(v)
    with tf.GradientTape() as tape:
        tape.watch(v)
        value = loss(v)
    return value, tf.convert_to_tensor(tape.gradient(value, v))


def differentiable_gradient(loss):
    """The function `v -> ∇loss(v)`, through which a gradient can be taken.

    Some kernels of TensorFlow have wrong second derivatives, and this is what keras_sharp is
    compared with: the product with the Hessian is a central difference of gradients.
    """

    @tf.custom_gradient
    def at(v):
        def pull(u, variables=()):
            h = 2e-3 * (1.0 + tf.norm(v)) / (tf.norm(u) + 1e-30)
            ahead, behind = (value_and_gradient(loss, v + s * u)[1] for s in (h, -h))
            product = (ahead - behind) / (2.0 * h)
            # Variables that the loss reads beside `v`, such as frozen weights, take none.
            return (product, [None] * len(variables)) if variables else product

        return value_and_gradient(loss, v)[1], pull

    return at


def assigned(value, trained):
    """What a pass reads of a variable after an assignment, which has no derivative.

    Of a weight that is trained, the gradient is that by the new value.
    """
    value = tf.stop_gradient(value)
    return value if trained is None else value + (trained - tf.stop_gradient(trained))


def apply(model, direction):
    """Hand a direction, arrays or `None`, to the optimizer of the model."""
    models.apply(model, direction)


def update_metrics(model, update, arguments):
    """Run a function that moves the metrics of a model."""
    del model
    update(*arguments)


def noise():
    """The state of random numbers that are in no variable: there is none."""


def set_noise(state):
    del state

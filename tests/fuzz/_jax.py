"""Loss and gradient by `jax.grad`, on the variables of a plain Keras model."""

import math

import jax
import jax.numpy as jnp

from tests.models import assign


def forward_and_gradient(model, batch, scale):
    """One training pass, which moves statistics, seeds and trackers as in `fit`.

    See `_torch.py`. What Keras itself differentiates on JAX is differentiated here.
    """
    x, y, sample_weight = batch
    before = [v.value for v in model.trainable_variables]

    def scaled(w):
        loss, (unscaled, y_pred, state, trackers) = model.compute_loss_and_updates(
            w,
            [v.value for v in model.non_trainable_variables],
            [v.value for v in model.metrics_variables],
            x,
            y,
            sample_weight,
            training=True,
            optimizer_variables=[v.value for v in model.optimizer.variables],
        )
        del loss  # Scaled by the optimizer.
        return unscaled * jnp.asarray(scale, unscaled.dtype), (unscaled, y_pred, state, trackers)

    (_, (loss, y_pred, state, trackers)), gradient = jax.value_and_grad(scaled, has_aux=True)(before)
    assign(model.non_trainable_variables, state)
    assign(model.metrics_variables, trackers)
    return loss, y_pred, [g / scale for g in gradient]


gradient = differentiable_gradient = jax.grad


def split(vector, shapes):
    """The parts of a vector, in these shapes."""
    ends, parts = 0, []
    for shape in shapes:
        start, ends = ends, ends + math.prod(shape)
        parts.append(vector[start:ends].reshape(shape))
    return parts


def assigned(value, trained):
    """What a pass reads of a variable after an assignment: JAX differentiates through it."""
    del trained
    return value


def noise():
    """The state of random numbers that are in no variable: there is none."""


def set_noise(state):
    del state

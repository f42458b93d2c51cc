"""Loss and gradient by `jax.grad`, on the variables of a plain Keras model."""

import weakref

import jax
import jax.numpy as jnp
import keras

from keras_sharp.engine._keras import get_keras_mask, set_keras_mask
from tests.models import assign

_compiled = weakref.WeakKeyDictionary()


def forward_and_gradient(model, batch, scale):
    """One training pass, which moves statistics, seeds and trackers as in `fit`.

    See `_torch.py`. What Keras itself differentiates on JAX is differentiated here.
    """
    if model not in _compiled:
        _compiled[model] = jax.jit(_pass_of(weakref.proxy(model)))
    (_, (loss, y_pred, masks, state, trackers)), gradient = _compiled[model](
        *([v.value for v in group] for group in _groups(model)),
        batch,
        jnp.asarray(scale, "float32"),
    )
    assign(model.non_trainable_variables, state)
    assign(model.metrics_variables, trackers)
    for t, mask in zip(keras.tree.flatten(y_pred), masks, strict=True):
        if mask is not None:
            set_keras_mask(t, mask)
    return loss, y_pred, [g / scale for g in gradient]


def _groups(model):
    optimizer = model.optimizer.variables
    return (
        model.trainable_variables,
        model.non_trainable_variables,
        model.metrics_variables,
        optimizer,
    )


def _pass_of(model):
    def scaled(w, state, trackers, slots, batch, scale):
        x, y, sample_weight = batch
        # The first result is scaled by the optimizer, if it does so.
        _, (loss, y_pred, state, trackers) = model.compute_loss_and_updates(
            w, state, trackers, x, y, sample_weight, training=True, optimizer_variables=slots
        )
        masks = [get_keras_mask(t) for t in keras.tree.flatten(y_pred)]
        return loss * scale.astype(loss.dtype), (loss, y_pred, masks, state, trackers)

    return jax.value_and_grad(scaled, has_aux=True)


differentiable_gradient = jax.grad


def value_and_gradient(loss, v):
    """The value and the gradient of a function of one tensor, at an array."""
    return jax.jit(jax.value_and_grad(loss))(v)


def assigned(value, trained):
    """What a pass reads of a variable after an assignment: JAX differentiates through it."""
    del trained
    return value


def apply(model, direction):
    """Hand a direction, a list of arrays, to the optimizer of the model."""
    key = model.optimizer
    if key not in _compiled:
        _compiled[key] = jax.jit(weakref.proxy(key).stateless_apply)
    weights, slots = model.trainable_variables, key.variables
    new = _compiled[key]([v.value for v in slots], direction, [v.value for v in weights])
    assign(weights, new[0])
    assign(slots, new[1])


def update_metrics(model, update, arguments):
    """Run a function that moves the metrics of a model: compiled, as a pure function of them."""
    variables = model.metrics_variables
    weights = model.trainable_variables  # Regularizers read them.
    size = len(keras.tree.flatten(arguments[0])[0])  # `update` knows it without being told.

    def pure(trackers, values, arguments):
        mapping = list(zip([*variables, *weights], [*trackers, *values], strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            update(*arguments)
        return [scope.get_current_value(v) for v in variables]

    kept = _compiled.setdefault(next(iter(model.metrics)), {})
    if size not in kept:
        kept[size] = jax.jit(pure)
    trackers, values = ([v.value for v in group] for group in (variables, weights))
    assign(variables, kept[size](trackers, values, arguments))


def noise():
    """The state of random numbers that are in no variable: there is none."""


def set_noise(state):
    del state

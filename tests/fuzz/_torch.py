"""Loss and gradient by PyTorch's own autograd, on the variables of a plain Keras model."""

import keras
import torch

from keras_sharp.engine._keras import get_keras_mask, set_keras_mask
from tests import models


def forward_and_gradient(model, batch, scale):
    """One training pass, which moves statistics, seeds and trackers as in `fit`.

    Args:
        model: a compiled model.
        batch: tensors, `(x, y, sample_weight)`.
        scale: float by which the loss is multiplied before, and the gradient divided after.

    Returns:
        The loss; the predictions; the gradient, with `None` where there is none.
    """
    x, y, sample_weight = batch
    y_pred = model(x, training=True)
    loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
    weights = [v.value for v in model.trainable_variables]
    gradient = torch.autograd.grad(loss * scale, weights, allow_unused=True)
    detached = keras.tree.map_structure(_detached, y_pred)
    return loss.detach(), detached, [None if g is None else g / scale for g in gradient]


def _detached(t):
    new = t.detach()
    if get_keras_mask(t) is not None:
        set_keras_mask(new, get_keras_mask(t))
    return new


def differentiable_gradient(loss):
    """The function `v -> ∇loss(v)` of one tensor, through which a gradient can be taken."""

    def at(v):
        v = v if v.requires_grad else v.detach().requires_grad_()
        # The faster kernels of attention have one derivative only.
        math = torch.nn.attention.SDPBackend.MATH
        with torch.enable_grad(), torch.nn.attention.sdpa_kernel(math):
            return torch.autograd.grad(loss(v), v, create_graph=True)[0]

    return at


def value_and_gradient(loss, v):
    """The value and the gradient of a function of one tensor, at a NumPy array."""
    v = torch.as_tensor(v).requires_grad_()
    with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = loss(v)
        return value.detach(), torch.autograd.grad(value, v)[0]


def assigned(value, trained):
    """What a pass reads of a variable after an assignment, which has no derivative.

    Of a weight that is trained, the gradient is that by the new value.
    """
    value = value.detach()
    return value if trained is None else value + (trained - trained.detach())


def apply(model, direction):
    """Hand a direction, arrays or `None`, to the optimizer of the model."""
    models.apply(model, direction)


def update_metrics(model, update, arguments):
    """Run a function that moves the metrics of a model."""
    del model
    update(*arguments)


def noise():
    """The state of random numbers that are in no variable."""
    return torch.get_rng_state()


def set_noise(state):
    torch.set_rng_state(state)

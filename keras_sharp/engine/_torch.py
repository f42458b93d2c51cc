"""The PyTorch engine: `torch.autograd.grad`, eager, `torch._foreach_*` on lists."""

import keras
import torch

from keras_sharp.engine._keras import all_layers, global_seed
from keras_sharp.engine._micro_batches import average_micro_batches as average_micro_batches


def value_and_gradient(fn, weights):
    """`(value, aux), gradient` of `fn(weights) -> (value, aux)`."""
    # Weights that are already being differentiated: this call is the inner
    # one of two, and its gradient must stay in the graph of the outer one.
    nested = any(w.requires_grad for w in weights)
    if not nested:
        weights = [w.detach().requires_grad_() for w in weights]
    with torch.enable_grad():
        value, aux = fn(weights)
        gradient = torch.autograd.grad(value, weights, allow_unused=True, create_graph=nested)
    if not nested:
        value, aux = keras.tree.map_structure(_detach, (value, aux))
    return (value, aux), list(gradient)


def _detach(t):
    return t.detach() if isinstance(t, torch.Tensor) else t


def hessian(fn, w, *args):
    """The product `v -> H v` with the Hessian of the scalar `fn(w, *args)` at `w`."""
    w = [t.detach().requires_grad_() for t in w]
    with torch.enable_grad():
        gradient = torch.autograd.grad(fn(w, *args), w, create_graph=True, allow_unused=True)
    return _backward(gradient, w)


def gauss_newton(outputs, loss, w, *args):
    """The product `v -> J' H J v` of `loss(outputs(w, *args), *args)` at `w`.

    `J` is the derivative of `outputs`, a list, and `H` the Hessian of `loss`.
    """
    w = [t.detach().requires_grad_() for t in w]
    with torch.enable_grad():
        z = outputs(w, *args)
        # J' u is linear in u: its derivative by u, transposed, is J.
        u = [torch.zeros_like(t).requires_grad_() for t in z]
        pulled = torch.autograd.grad(z, w, u, create_graph=True, allow_unused=True)
    forward, middle, backward = _backward(pulled, u), hessian(loss, z, *args), _backward(z, w)
    return lambda v: backward(middle(forward(v)))


def _backward(outputs, inputs):
    """The product `v -> J' v` with the derivative of `outputs` by `inputs`, any number of times."""
    used = [i for i, t in enumerate(outputs) if t is not None and t.requires_grad]

    def product(v):
        if not used:
            return [torch.zeros_like(t) for t in inputs]
        return torch.autograd.grad(
            [outputs[i] for i in used],
            inputs,
            [v[i] for i in used],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    return product


def linearized(matrix, *fns):
    """`hessian` or `gauss_newton` in two parts.

    Args:
        matrix: one of the two.
        *fns: its functions.

    Returns:
        `at(w, *args) -> product`. `at` runs the network forward and backward,
        once; `product(v)` goes backward through the graph, which is kept.
    """
    return lambda w, *args: matrix(*fns, w, *args)


def cond(condition, if_true, if_false):
    """The value of one of two functions without arguments."""
    return if_true() if condition else if_false()


def run_either(condition, if_true, if_false, variables):
    """Run one of two functions that assign to some of `variables`."""
    del variables  # PyTorch runs at once: there is nothing to follow.
    if condition:
        if_true()
    else:
        if_false()


def apply(optimizer, gradients, variables):
    """One step of the optimizer."""
    with torch.no_grad():
        optimizer.apply(gradients, variables)


def dot(xs, ys):
    """The inner product of two lists of tensors, in float32 or float64."""
    return torch.stack([_dot(x, y) for x, y in zip(xs, ys, strict=True)]).sum()


def _dot(x, y):
    if x.dtype not in (torch.float32, torch.float64):
        x, y = x.float(), y.float()
    return torch.dot(x.reshape(-1), y.reshape(-1))


def scale(a, xs):
    """`a * x` for each tensor of a list, in the dtype of `x`."""
    if isinstance(a, float):
        return [a * x for x in xs]
    if _is_plain(xs, a.dtype) and not a.requires_grad:
        return list(torch._foreach_mul(xs, a))
    # In the precision of `a`: the factor itself may be too large for float16.
    return [(a * x.to(torch.promote_types(a.dtype, x.dtype))).to(x.dtype) for x in xs]


def add(xs, ys):
    """`x + y` for each pair of two lists, in the dtype of `x`."""
    if xs and _is_plain([*xs, *ys], xs[0].dtype):
        return list(torch._foreach_add(xs, ys))
    return [x + y.to(x.dtype) for x, y in zip(xs, ys, strict=True)]


def _is_plain(tensors, dtype):
    """Whether `torch._foreach_*` may be used: one dtype, and no second derivative."""
    return bool(tensors) and all(t.dtype == dtype and not t.requires_grad for t in tensors)


def add_scaled(ys, a, xs):
    """`y + a * x` for each pair of two lists, in the dtype of `y`."""
    scaled = scale(a, xs)
    if _is_plain([*scaled, *ys], ys[0].dtype if ys else None):
        # In place: half of the time of a large sum goes into fresh memory.
        torch._foreach_add_(scaled, ys)
        return scaled
    return add(ys, scaled)


def quotient(a, b):
    """`a / b` for scalars, and 0 with derivative 0 where `b` is 0."""
    return a / b if b != 0 else a * b * 0


def read(variable):
    """The value of a variable, a tensor through which no gradient flows."""
    return variable.value.detach()


def compiled(fn):
    """A pure function of tensors; PyTorch runs it as it is."""
    return fn


def global_seeds():
    """Variables outside the model that its random numbers may come from."""
    return [global_seed()]


def random_state():
    """The state of random numbers that are in no variable.

    `keras.layers.Dropout` without a seed draws from the generator of PyTorch.
    """
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None


def set_random_state(state):
    """Go back to a state of `random_state`."""
    cpu, gpu = state
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)


def check_layers(model):
    """Refuse a model with layers that a pure function of the weights cannot reach."""
    for layer in all_layers(model):
        if isinstance(layer, keras.layers.TorchModuleWrapper):
            raise ValueError(
                f"The layer {layer.name!r} wraps a torch.nn.Module, which reads its own parameters "
                "and not the perturbed weights: its gradient would be taken at the wrong point. "
                "Received a model with a keras.layers.TorchModuleWrapper; expected Keras layers "
                "only. Rebuild this part from keras.layers."
            )


class Trainer:
    """The glue into `TorchTrainer`: the step runs eagerly."""

    model: keras.Model  # The wrapped one.

    def train_step(self, data):
        return self.sharpness_aware_step(data)

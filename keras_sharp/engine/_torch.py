"""The PyTorch engine: `torch.autograd.grad`, eager, `torch._foreach_*` on lists."""

import contextlib

import keras
import optree
import torch
import torch.distributed as dist

from keras_sharp.engine import _micro_batches
from keras_sharp.engine._ctc import ctc_loss
from keras_sharp.engine._keras import (
    all_layers,
    draw_from_own_seeds,
    global_seed,
)
from keras_sharp.engine._micro_batches import first_tensor

# A step makes several lists of tensors and lets them go. On Linux, the C library would hand that
# memory back to the system and fault it in again, page by page: a tenth of a step of a small
# network. It keeps up to twice the largest block that it has seen come back, of up to 32 MiB.
torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def value_and_gradient(fn, weights, averages=False):
    """`(value, aux), gradient` of `fn(weights) -> (value, aux)`."""
    del averages  # Whether `fn` averages over replicas: it may.
    # Weights that are already being differentiated: this call is the inner
    # one of two, and its gradient must stay in the graph of the outer one.
    nested = any(w.requires_grad for w in weights)
    if not nested:
        weights = [w.detach().requires_grad_() for w in weights]
    with torch.enable_grad(), _twice() if nested else contextlib.nullcontext():
        value, aux = fn(weights)
        if value.requires_grad:
            gradient = torch.autograd.grad(value, weights, allow_unused=True, create_graph=nested)
        else:  # It depends on none of them.
            gradient = [None] * len(weights)
    if not nested:
        # Keras' own tree functions take a tenth of a millisecond on PyTorch.
        value, aux = optree.tree_map(_detach, (value, aux))
    return (value, aux), list(gradient)


def _detach(t):
    return t.detach() if isinstance(t, torch.Tensor) else t


@contextlib.contextmanager
def _twice():
    """Within, all is computed such that it can be differentiated twice."""
    # The faster kernels of attention have one derivative only, and so have some functions.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), _TwiceFunctions():
        yield


class _TwiceFunctions(torch.overrides.TorchFunctionMode):
    """Exchanges the functions of PyTorch 2.13 that have one derivative only for formulas."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        formula = _FORMULAS.get(func)
        result = None if formula is None else formula(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


def _hardsigmoid(x, inplace=False):
    return None if inplace else torch.nn.functional.relu6(x + 3) / 6


def _ctc_loss(log_p, labels, steps, lengths, blank=0, reduction="mean", zero_infinity=False):
    if reduction != "none" or zero_infinity or labels.ndim != 2:
        return None  # Nothing of Keras; PyTorch says that it has no derivative.
    return ctc_loss(labels, log_p.transpose(0, 1), lengths, steps, blank)


_FORMULAS: dict = {
    torch.nn.functional.hardsigmoid: _hardsigmoid,
    torch.nn.functional.ctc_loss: _ctc_loss,
}


def hessian(fn, w, *args):
    """The product `v -> H v` with the Hessian of the scalar `fn(w, *args)` at `w`."""
    w = [t.detach().requires_grad_() for t in w]
    with torch.enable_grad(), _twice():
        gradient = torch.autograd.grad(fn(w, *args), w, create_graph=True, allow_unused=True)
    return _backward(gradient, w)


def gauss_newton(outputs, loss, w, *args):
    """The product `v -> J' H J v` of `loss(outputs(w, *args), *args)` at `w`.

    `J` is the derivative of `outputs`, a list, and `H` the Hessian of `loss`.
    """
    w = [t.detach().requires_grad_() for t in w]
    with torch.enable_grad(), _twice():
        z = outputs(w, *args)
        # J' u is linear in u: its derivative by u, transposed, is J.
        u = [torch.zeros_like(t).requires_grad_() for t in z]
        used = [i for i, t in enumerate(z) if t.requires_grad]
        pulled = torch.autograd.grad(
            [z[i] for i in used], w, [u[i] for i in used], create_graph=True, allow_unused=True
        )
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


def is_known(condition):
    """Whether a condition has a value: on PyTorch every tensor has."""
    del condition
    return True


def cond(condition, if_true, if_false):
    """The value of one of two functions without arguments."""
    return if_true() if condition else if_false()


cond_of_all = cond


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


# Replicas: the processes of `torch.distributed`. What `DistributedDataParallel`
# does is not relied on: its hooks do not fire for gradients at other weights
# than the parameters.


def num_replicas():
    """How many processes share the training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def broadcast(variables):
    """Give every process the values of the first one."""
    if num_replicas() > 1:
        for variable in variables:
            dist.broadcast(variable.value.detach(), src=0)


def loss_of_replica(loss):
    """The loss of this process by itself, as Keras computed it."""
    return loss


def mean_over_replicas(structure, size):
    """The mean of a nested structure over all processes, weighted by their `size`. One message."""
    if num_replicas() == 1:  # Without a look at the structure, which costs a percent of a step.
        return structure
    leaves = keras.tree.flatten(structure)
    averaged = [t is not None and _micro_batches.has_mean(t) for t in leaves]
    present = [t for t, mean in zip(leaves, averaged, strict=True) if mean]
    if not present:
        return structure
    means = iter(_split(_Mean.apply(_flat(present), float(size)), present))
    return keras.tree.pack_sequence_as(
        structure, [next(means) if m else t for t, m in zip(leaves, averaged, strict=True)]
    )


class _Mean(torch.autograd.Function):
    """The weighted mean over all processes. Its derivative is the mean of their derivatives.

    For `L = Σ_i n_i L_i(m) / Σ_i n_i`, a mean of functions of the mean `m`, that is the
    contribution of each process to the mean of the gradients.
    """

    @staticmethod
    def forward(ctx, flat, size):
        ctx.size = size
        message = torch.cat([flat * size, flat.new_tensor([size])])
        dist.all_reduce(message)
        return message[:-1] / message[-1]

    @staticmethod
    def backward(ctx, gradient):
        return _Mean.apply(gradient, ctx.size), None


mean_over_processes = mean_over_replicas


def sum_over_processes(tensors):
    """The sum over all processes, of a list in which some may be `None`. One message."""
    present = [t for t in tensors if t is not None]
    if num_replicas() == 1 or not present:
        return tensors
    flat = _flat(present)
    dist.all_reduce(flat)
    sums = iter(_split(flat, present))
    return [None if t is None else next(sums) for t in tensors]


def _flat(tensors):
    """All numbers in one new tensor, of float32 or float64."""
    device = tensors[0].device
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.cat([t.reshape(-1).to(device, dtype) for t in tensors])


def _split(flat, tensors):
    """The opposite of `_flat`."""
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


def average_replicas(fn, carried, batch):
    """Run `fn` in each process on its batch, and average what is to be averaged."""
    carried, averaged, outputs = fn(carried, batch)
    return (
        carried,
        mean_over_replicas(averaged, first_tensor(batch).shape[0]),
        outputs,
    )


def average_micro_batches(fn, carried, batch, num_micro_batches):
    """Run `fn` on equal parts of a batch: see `_micro_batches.py`."""
    size = first_tensor(batch).shape[0]
    if size < num_micro_batches and num_replicas() > 1:
        raise ValueError(
            "All processes must split their batches into as many parts, or they would wait for "
            f"each other forever. Received: num_micro_batches={num_micro_batches} and a batch of "
            f"{size} examples in process {dist.get_rank()}. Drop the last, partial batch."
        )
    return _micro_batches.average_micro_batches(fn, carried, batch, num_micro_batches)


part_of_batch = _micro_batches.part_of_batch
largest_of_batch = _micro_batches.largest_of_batch


def as_tensors(batch):
    """The arrays of a batch as tensors: the part of this process."""
    return _micro_batches.map_present(keras.ops.convert_to_tensor, batch)


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
    # One pass, and no fresh memory but for the result: half of the time goes into that. A
    # number that is read out of its tensor would make torch.compile start anew for each value.
    read_out = isinstance(a, torch.Tensor) and not torch.compiler.is_compiling()
    if read_out and not a.requires_grad and _is_plain([*xs, *ys], a.dtype):
        return list(torch._foreach_add(ys, xs, alpha=a.item()))
    return add(ys, scale(a, xs))


def quotient(a, b):
    """`a / b` for scalars, and 0 with derivative 0 where `b` is 0."""
    return a / b if b != 0 else a * b * 0


def read(variable):
    """The value of a variable, a tensor through which no gradient flows."""
    return variable.value.detach()


def write(weight, value):
    """What the rest of a pass reads of a variable that a layer has written, and what is left in it.

    As in plain training an assignment has no derivative: the gradient by a
    weight is that by its new value. `weight` is `None` for other variables.
    """
    value = value.detach()
    return value if weight is None else value + (weight - weight.detach()), value


def compiled(fn):
    """A pure function of tensors; PyTorch runs it as it is."""
    return fn


def global_seeds():
    """Variables outside the model that its random numbers may come from."""
    return [global_seed()]


def random_state():
    """The state of random numbers that are in no variable: the generator of PyTorch.

    Keras shuffles with it, and a model that was never trained by the wrapper
    draws the masks of `Dropout` without a seed from it.
    """
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None


def set_random_state(state):
    """Go back to a state of `random_state`."""
    cpu, gpu = state
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)


def own_random_numbers(model):
    """Let a model draw from seeds that it holds, which a step carries along and saves.

    A generator that all models and threads share could not be rewound for the
    second pass of a step without harm to the others.
    """
    draw_from_own_seeds(model)


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

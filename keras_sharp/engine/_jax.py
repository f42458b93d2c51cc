"""The JAX engine: `jax.value_and_grad`, and the step as a pure function of state."""

import contextvars
import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from keras_sharp.engine import _micro_batches
from keras_sharp.engine._micro_batches import has_mean, map_present

#: Whether the program that is being traced is that of one replica by itself.
_on_replica = contextvars.ContextVar("_on_replica", default=False)


def value_and_gradient(fn, weights, averages=False):
    """`(value, aux), gradient` of `fn(weights) -> (value, aux)`."""
    del averages  # Whether `fn` averages over replicas: it may.
    return jax.value_and_grad(fn, has_aux=True)(weights)


def hessian(fn, w, *args):
    """The product `v -> H v` with the Hessian of the scalar `fn(w, *args)` at `w`."""
    return jax.linearize(lambda u: jax.grad(fn)(u, *args), w)[1]


def gauss_newton(outputs, loss, w, *args):
    """The product `v -> J' H J v` of `loss(outputs(w, *args), *args)` at `w`.

    `J` is the derivative of `outputs`, a list, and `H` the Hessian of `loss`.
    """
    z, forward = jax.linearize(lambda u: outputs(u, *args), w)
    _, backward = jax.vjp(lambda u: outputs(u, *args), w)
    middle = hessian(loss, z, *args)
    return jax.tree_util.Partial(_sandwich, forward, middle, backward)


def _sandwich(forward, middle, backward, v):
    return backward(middle(forward(v)))[0]


def linearized(matrix, *fns):
    """`hessian` or `gauss_newton` in two compiled parts.

    Args:
        matrix: one of the two.
        *fns: its functions.

    Returns:
        `at(w, *args) -> product`. `at` runs the network forward and backward,
        once; `product(v)` takes from there what does not depend on `v`.
    """
    start = jax.jit(lambda w, *args: matrix(*fns, w, *args))
    finish = jax.jit(lambda product, v: product(v))
    return lambda w, *args: functools.partial(finish, start(w, *args))


def is_known(condition):
    """Whether a condition has a value, and is not being traced."""
    return not isinstance(condition, jax.core.Tracer)


def cond(condition, if_true, if_false):
    """The value of one of two functions without arguments."""
    if is_known(condition):  # Without compiling both, which `lax.cond` does.
        return if_true() if condition else if_false()
    if jax.default_backend() == "cpu":
        # Here, because it imports more of JAX than is there already.
        from keras_sharp.engine._jax_convolutions import with_fast_convolutions

        if_true, if_false = with_fast_convolutions(if_true), with_fast_convolutions(if_false)
    return jax.lax.cond(condition, if_true, if_false)


cond_of_all = cond


def run_either(condition, if_true, if_false, variables):
    """Run one of two functions that assign to some of `variables`."""
    old = [v.value for v in variables]

    def branch(fn):
        def run():
            with keras.StatelessScope(state_mapping=zip(variables, old, strict=True)) as scope:
                fn()
            return [scope.get_current_value(v) for v in variables]

        return run

    new = jax.lax.cond(condition, branch(if_true), branch(if_false))
    for variable, value in zip(variables, new, strict=True):
        variable.assign(value)


def apply(optimizer, gradients, variables):
    """One step of the optimizer."""
    new_values, new_slots = optimizer.stateless_apply(
        [v.value for v in optimizer.variables], gradients, [v.value for v in variables]
    )
    for variable, value in zip(
        [*variables, *optimizer.variables], [*new_values, *new_slots], strict=True
    ):
        variable.assign(value)


# Replicas: the devices along the batch axis of a `keras.distribution`. One
# program runs on all of them, and sees the whole batch.


def num_replicas():
    """How many replicas share what runs here: one program does it all."""
    return 1


def broadcast(variables):
    """Give every replica the values of the first one: the program has one value for all."""


def loss_of_replica(loss):
    """The loss as Keras computed it."""
    return loss


def mean_over_replicas(structure, size):
    """The mean over all replicas: the program has it, since it sees the whole batch."""
    del size
    return structure


def sum_over_processes(tensors):
    """The sum over all processes: the program has it, since it sees the data of all."""
    return tensors


def mean_over_processes(tensors, weight):
    """The mean over all processes: the program has it, since it sees the data of all."""
    del weight
    return tensors


def as_tensors(batch):
    """The arrays of a batch as tensors, each divided among the devices.

    With several processes the batch is made of what each of them has.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return map_present(jnp.asarray, batch)
    mesh = distribution.device_mesh.backend_mesh
    devices = mesh.shape[distribution.batch_dim_name]

    def divided(array):
        array = np.asarray(array)
        sharding = distribution.get_data_layout(array.shape).backend_layout
        if array.shape[0] * jax.process_count() % devices == 0:
            return jax.make_array_from_process_local_data(sharding, array)
        if jax.process_count() == 1:  # All have all of it.
            return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))
        raise ValueError(
            "With several processes, the examples of a batch must divide by the number of devices. "
            f"Received: {array.shape[0]} examples in each of {jax.process_count()} processes, with "
            f"{devices} devices together. Choose another `batch_size`, or leave some examples out."
        )

    return map_present(divided, batch)


def average_replicas(fn, carried, batch):
    """Run `fn` on each replica's part of the batch, and average what is to be averaged.

    `vmap` would do, too, but it makes convolutions grouped, because in the
    second pass each replica has weights of its own.

    Args:
        fn: `fn(carried, part) -> (carried, averaged, outputs)`.
        carried: a pair: what is the same on all replicas, and what adds up.
        batch: nested structure of tensors with a common first axis.

    Returns:
        What `fn` returns, for the whole batch.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return fn(carried, batch)
    axis = distribution.batch_dim_name

    def run(part):
        token = _on_replica.set(True)
        try:
            (same, added), averaged, outputs = fn(carried, part)
        finally:
            _on_replica.reset(token)
        added = [
            old if new is old else old + jax.lax.psum(new - old, axis)
            for new, old in zip(added, carried[1], strict=True)
        ]
        mean = map_present(lambda t: jax.lax.pmean(t, axis) if has_mean(t) else t, averaged)
        return (same, added), mean, outputs

    # Other axes of the mesh, along which weights are split, are left to the compiler.
    return jax.shard_map(
        run,
        mesh=distribution.device_mesh.backend_mesh,
        in_specs=PartitionSpec(axis),
        out_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(axis)),
        axis_names={axis},
        check_vma=False,  # With it, a gradient at shared weights would be summed unasked.
    )(batch)


largest_of_batch = _micro_batches.largest_of_batch


def part_of_batch(batch, share):
    """The first examples of a batch, as many as this share of all, and one at least.

    On several devices, those of each device.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or _on_replica.get():
        return _micro_batches.part_of_batch(batch, share)
    devices = distribution.device_mesh.backend_mesh.shape[distribution.batch_dim_name]
    split = map_present(lambda t: t.reshape((devices, -1, *t.shape[1:])), batch)
    part = _micro_batches.part_of_batch(split, share, axis=1)
    return map_present(lambda t: t.reshape((-1, *t.shape[2:])), part)


def average_micro_batches(fn, carried, batch, num_micro_batches):
    """Run `fn` on equal parts of a batch: see `_micro_batches.py`.

    On several devices a part takes its share from each of them: the examples
    stay where they are, and no device idles.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or _on_replica.get():
        return _micro_batches.average_micro_batches(fn, carried, batch, num_micro_batches)
    devices = distribution.device_mesh.backend_mesh.shape[distribution.batch_dim_name]

    def split(structure):
        return map_present(lambda t: t.reshape((devices, -1, *t.shape[1:])), structure)

    def merge(structure):
        return map_present(lambda t: t.reshape((-1, *t.shape[2:])), structure)

    def run(carried, part):
        carried, averaged, outputs = fn(carried, merge(part))
        return carried, averaged, split(outputs)

    carried, averaged, outputs = _micro_batches.average_micro_batches(
        run, carried, split(batch), num_micro_batches, axis=1
    )
    return carried, averaged, merge(outputs)


def dot(xs, ys):
    """The inner product of two lists of tensors, in float32 or float64."""
    return sum(_dot(x, y) for x, y in zip(xs, ys, strict=True))


def _dot(x, y):
    if x.dtype not in (jnp.float32, jnp.float64):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sum(x * y)


def scale(a, xs):
    """`a * x` for each tensor of a list."""
    # In the precision of `a`: the factor itself may be too large for float16.
    return [(a * x).astype(x.dtype) for x in xs]


def add(xs, ys):
    """`x + y` for each pair of two lists, in the dtype of `x`."""
    return [x + y.astype(x.dtype) for x, y in zip(xs, ys, strict=True)]


def add_scaled(ys, a, xs):
    """`y + a * x` for each pair of two lists, in the dtype of `y`."""
    return add(ys, scale(a, xs))


def quotient(a, b):
    """`a / b` for scalars, and 0 with derivative 0 where `b` is 0."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def read(variable):
    """The value of a variable, a tensor through which no gradient flows."""
    return jax.lax.stop_gradient(variable.value)


def write(weight, value):
    """What the rest of a pass reads of a variable that a layer has written, and what is left in it.

    Plain training on JAX differentiates through the assignment. One to a
    weight it then forgets: nothing is left.
    """
    del weight
    return value, None


def compiled(fn):
    """A pure function of tensors, compiled."""
    return jax.jit(fn)


def global_seeds():
    """Variables outside the model that its random numbers may come from: none."""
    return []  # Keras refuses unseeded random numbers in a traced function.


def random_state():
    """The state of random numbers that are in no variable: JAX has none."""


def set_random_state(state):
    """Go back to a state of `random_state`."""


def own_random_numbers(model):
    """Let a model draw from seeds that it holds: on JAX it does."""


def check_layers(model):
    """Refuse a model with layers that a pure function of the weights cannot reach."""
    del model  # Every trainable Keras layer works.

"""The TensorFlow engine: `tf.GradientTape`, stateful variables, `tf.cond`."""

import contextlib
import contextvars
import functools

import keras
import tensorflow as tf

from keras_sharp.engine import _tensorflow_derivatives as derivatives
from keras_sharp.engine._keras import (
    global_seed,
    without_reduction,
)
from keras_sharp.engine._micro_batches import (
    accumulate,
    first_tensor,
    has_mean,
    map_present,
)

#: What XLA will compile of the step that is being traced: "step", each of its
#: "passes" by itself, or nothing.
_xla: contextvars.ContextVar[str | None] = contextvars.ContextVar("_xla", default=None)


@contextlib.contextmanager
def compiling(what):
    """Within, `"step"`, `"passes"` or `None` is what XLA will compile of what is traced."""
    token = _xla.set(what)
    try:
        yield
    finally:
        _xla.reset(token)


def value_and_gradient(fn, weights, averages=False):
    """`(value, aux), gradient` of `fn(weights) -> (value, aux)`.

    If `fn` averages over replicas, which meet there, it cannot be compiled by itself.
    """

    def run(weights):
        with tf.GradientTape(watch_accessed_variables=False) as tape, derivatives.within():
            tape.watch(weights)
            value, aux = fn(weights)
        gradient = tape.gradient(value, weights)
        return (value, aux), [_dense(g, w) for g, w in zip(gradient, weights, strict=True)]

    if _xla.get() == "passes" and not averages:
        return tf.function(run, jit_compile=True, autograph=False)(weights)
    return run(weights)


def _dense(gradient, weight):
    """A gradient as a tensor of the shape of its weight.

    Embeddings give IndexedSlices, in which a row may stand several times: they
    have no norm before their rows are added up. And where the size of a batch
    is not known, TensorFlow loses the shape of the gradient of some kernels,
    such as that of a Dense layer on sequences.
    """
    if gradient is None:
        return None
    gradient = tf.convert_to_tensor(gradient)
    gradient.set_shape(weight.shape)
    return gradient


def hessian(fn, w, *args):
    """The product `v -> H v` with the Hessian of the scalar `fn(w, *args)` at `w`."""
    tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
    with tape, derivatives.within():
        tape.watch(w)
        _, gradient = value_and_gradient(lambda u: (fn(u, *args), None), w)
    return _backward(tape, gradient, w)


def gauss_newton(outputs, loss, w, *args):
    """The product `v -> J' H J v` of `loss(outputs(w, *args), *args)` at `w`.

    `J` is the derivative of `outputs`, a list, and `H` the Hessian of `loss`.
    """
    tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
    with tape, derivatives.within():
        tape.watch(w)
        z = outputs(w, *args)
    backward = _backward(tape, z, w)
    # J' u is linear in u: its derivative by u, transposed, is J.
    u = [tf.zeros_like(t) for t in z]
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as linear:
        linear.watch(u)
        pulled = backward(u)
    forward, middle = _backward(linear, pulled, u), hessian(loss, z, *args)
    return lambda v: backward(middle(forward(v)))


def _backward(tape, outputs, inputs):
    """The product `v -> J' v` with the derivative of `outputs` by `inputs`, any number of times."""
    used = [i for i, t in enumerate(outputs) if t is not None]

    def product(v):
        result = tape.gradient(
            [outputs[i] for i in used],
            inputs,
            output_gradients=[v[i] for i in used],
            unconnected_gradients="zero",
        )
        return [tf.convert_to_tensor(t) for t in result]

    return product


def linearized(matrix, *fns):
    """`hessian` or `gauss_newton` in two parts, of compiled functions.

    Args:
        matrix: one of the two.
        *fns: its functions.

    Returns:
        `at(w, *args) -> product`. `at` runs the network forward and backward,
        once; `product(v)` goes backward through what the tape has kept.
    """

    def constant(fn):
        def run(w, *args):
            # Or the derivative by the data and the state would be computed as well.
            args = map_present(tf.stop_gradient, args)
            return fn(w, *args)

        return run

    compiled_fns = [compiled(constant(fn)) for fn in fns]
    return lambda w, *args: matrix(*compiled_fns, w, *args)


def is_known(condition):
    """Whether a condition has a value, and is not being traced."""
    return tf.executing_eagerly() and not merges_threads()


def cond(condition, if_true, if_false):
    """The value of one of two functions without arguments."""
    return tf.cond(condition, if_true, if_false)


def cond_of_all(condition, if_true, if_false):
    """As `cond`, of functions that average over the replicas, which all take the same branch.

    Replicas that are threads meet to average, which they cannot do inside of a conditional of
    their own: there is one conditional around all of them.

    Args:
        condition: scalar Boolean tensor.
        if_true: function that returns a list of tensors.
        if_false: likewise.
    """
    if not merges_threads():
        return tf.cond(condition, if_true, if_false)
    mine: list = []  # What the branch has returned on this replica.

    def all_replicas(strategy, conditions, if_trues, if_falses, owners):
        local = strategy.experimental_local_results

        def on_each(fns):
            def run():
                run_each = strategy.extended.call_for_each_replica
                results = run_each(lambda fn: fn(), args=(fns,))
                return [t for result in results for t in local(result)]

            return run

        flat = tf.cond(local(conditions)[0], on_each(if_trues), on_each(if_falses))
        owners = local(owners)
        for i, extend in enumerate(owners):
            extend(flat[i :: len(owners)])

    tf.distribute.get_replica_context().merge_call(
        all_replicas, args=(condition, if_true, if_false, mine.extend)
    )
    return mine


def run_either(condition, if_true, if_false, variables):
    """Run one of two functions that assign to some of `variables`."""
    if _xla.get() == "step":
        # A conditional copies all that it may assign; choosing between the outcomes does not.
        old = _values(variables)
        if_true()
        new = _values(variables)
        _assign(variables, old)
        if_false()
        for variable, yes, no in zip(variables, new, _values(variables), strict=True):
            variable.assign(tf.where(condition, yes, no))
        return

    def branch(fn):
        def run():
            fn()
            return tf.constant(0)  # A branch must return something.

        return run

    if not merges_threads():
        tf.cond(condition, branch(if_true), branch(if_false))
        return

    # The replicas are threads that meet to assign, which they cannot do inside
    # of a conditional: one conditional around all of them. They agree on it.
    def all_replicas(strategy, conditions, if_trues, if_falses):
        def on_each(fns):
            run = strategy.extended.call_for_each_replica
            return branch(lambda: run(lambda fn: fn(), args=(fns,)))

        first = strategy.experimental_local_results(conditions)[0]
        tf.cond(first, on_each(if_trues), on_each(if_falses))

    tf.distribute.get_replica_context().merge_call(
        all_replicas, args=(condition, if_true, if_false)
    )


def _values(variables):
    return [tf.identity(v.value) for v in variables]


def _assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def apply(optimizer, gradients, variables):
    """One step of the optimizer. On several replicas, all have the same gradients."""
    if num_replicas() == 1:
        optimizer.apply(gradients, variables)
    else:
        with without_reduction(optimizer):
            optimizer.apply(gradients, variables)


# Replicas: those of a `tf.distribute.Strategy`.


def num_replicas():
    """How many replicas share the training."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def merges_threads():
    """Whether replicas are threads. In MirroredStrategy even a single one is."""
    strategy = tf.distribute.get_strategy()
    return (
        tf.distribute.has_strategy()
        and not isinstance(strategy, tf.distribute.OneDeviceStrategy)
        and not tf.__internal__.distribute.strategy_supports_no_merge_call()
    )


def broadcast(variables):
    """Give every replica the values of the first one: the strategy has done so."""


def loss_of_replica(loss):
    """The loss of this replica by itself: Keras divides by the number of replicas."""
    return loss * num_replicas()


def mean_over_replicas(structure, size):
    """The mean of a nested structure over all replicas, weighted by their `size`."""
    leaves = keras.tree.flatten(structure)
    averaged = [t is not None and has_mean(t) for t in leaves]
    present = [t for t, mean in zip(leaves, averaged, strict=True) if mean]
    if num_replicas() == 1 or not present:
        return structure

    @tf.custom_gradient
    def mean(*tensors):
        *sums, total = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM,
            [*(t * tf.cast(size, t.dtype) for t in tensors), tf.cast(size, tf.float32)],
        )
        # The derivative of a mean of functions of the mean is the mean of the derivatives.
        return [s / tf.cast(total, s.dtype) for s in sums], mean

    wide = [t if t.dtype == tf.float64 else tf.cast(t, tf.float32) for t in present]
    means = iter(tf.cast(m, t.dtype) for m, t in zip(mean(*wide), present, strict=True))
    return keras.tree.pack_sequence_as(
        structure, [next(means) if m else t for t, m in zip(leaves, averaged, strict=True)]
    )


def sum_over_processes(tensors):
    """The sum over all processes: what is outside of a step, each does by itself."""
    return tensors


def mean_over_processes(tensors, weight):
    """The mean over all processes: what is outside of a step, each does by itself."""
    del weight
    return tensors


def as_tensors(batch):
    """The arrays of a batch as tensors, on the first device of this process."""
    return map_present(tf.convert_to_tensor, batch)


def average_replicas(fn, carried, batch):
    """Run `fn` on each replica on its batch, and average what is to be averaged."""
    carried, averaged, outputs = fn(carried, batch)
    return carried, mean_over_replicas(averaged, tf.shape(first_tensor(batch))[0]), outputs


def average_micro_batches(fn, carried, batch, num_micro_batches):
    """Run `fn` on equal parts of a batch: see `_micro_batches.py`.

    The size of a batch may be known only when the compiled function runs.
    """
    size = tf.shape(first_tensor(batch))[0]
    quotient, remainder = size // num_micro_batches, size % num_micro_batches
    total, outputs = None, []
    for i in range(num_micro_batches):
        start = i * quotient + tf.minimum(i, remainder)
        length = quotient + tf.cast(i < remainder, size.dtype)
        # A last batch with fewer examples than parts leaves some parts empty.
        # Such a part computes an example again, and counts for nothing.
        first = tf.minimum(start, size - 1)
        part = map_present(lambda t, a=first, n=tf.maximum(length, 1): _rows(t, a, n), batch)
        after, averaged, output = fn(carried, part)
        counts = length > 0
        carried = keras.tree.map_structure(
            lambda new, old, c=counts: new if new is old else tf.where(c, new, old), after, carried
        )
        weight = tf.cast(length, tf.float32) / tf.cast(size, tf.float32)
        total = accumulate(total, averaged, weight)
        outputs.append(map_present(lambda t, n=length: t[:n], output))
    outputs = keras.tree.map_structure(lambda *parts: tf.concat(parts, 0), *outputs)
    return carried, total, outputs


def part_of_batch(batch, share):
    """The first examples of a batch, as many as this share of all, and one at least."""
    first = first_tensor(batch)
    if first.shape[0] is not None:
        count = max(1, int(share * first.shape[0]))
    else:
        size = tf.cast(tf.shape(first)[0], tf.float32)
        count = tf.maximum(1, tf.cast(share * size, tf.int32))
    return map_present(lambda t: _rows(t, 0, count), batch)


def largest_of_batch(batch, values, share):
    """The examples with the largest values, as many as this share of all, and one at least."""
    size = values.shape[0]
    if size is not None:
        count = max(1, int(share * size))
    else:
        count = tf.maximum(1, tf.cast(share * tf.cast(tf.shape(values)[0], tf.float32), tf.int32))
    _, chosen = tf.math.top_k(values, count)
    return map_present(lambda t: _chosen_rows(t, chosen), batch)


def _rows(tensor, first, count):
    """Some examples of a tensor, which may be sparse."""
    if not isinstance(tensor, tf.SparseTensor):
        return tensor[first : first + count]
    _, *others = tensor.shape
    first, count = (tf.cast([i], tf.int64) for i in (first, count))
    shape = tensor.dense_shape[1:]
    rows = tf.sparse.slice(tensor, tf.concat([first, 0 * shape], 0), tf.concat([count, shape], 0))
    rows.set_shape([None, *others])
    return rows


def _chosen_rows(tensor, chosen):
    """Some examples of a tensor, which may be sparse, in the order of `chosen`, each once."""
    if not isinstance(tensor, tf.SparseTensor):
        return tf.gather(tensor, chosen)
    rows, others = tensor.indices[:, 0], tensor.indices[:, 1:]
    # Where each example comes to stand, and -1 for one that is left out.
    size = tf.cast(tensor.dense_shape[:1], tf.int32)
    places = tf.tensor_scatter_nd_update(
        tf.fill(size, -1), chosen[:, None], tf.range(tf.size(chosen))
    )
    rows = tf.cast(tf.gather(places, rows), tf.int64)
    shape = tf.concat([tf.size(chosen, tf.int64)[None], tensor.dense_shape[1:]], 0)
    indices = tf.concat([rows[:, None], others], 1)
    moved = tf.sparse.retain(tf.SparseTensor(indices, tensor.values, shape), rows >= 0)
    moved = tf.sparse.reorder(moved)
    moved.set_shape([None, *tensor.shape[1:]])
    return moved


def dot(xs, ys):
    """The inner product of two lists of tensors, in float32 or float64."""
    return tf.add_n([_dot(x, y) for x, y in zip(xs, ys, strict=True)])


def _dot(x, y):
    if x.dtype not in (tf.float32, tf.float64):
        x, y = tf.cast(x, tf.float32), tf.cast(y, tf.float32)
    # A short sum is not worth it: most weights are biases and the like, and each costs XLA memory.
    if _xla.get() == "step" and x.shape.num_elements() >= 4096:
        return _sum_in_parts(tf.reshape(x * y, (-1,)))
    # The fused kernel spares a pass through memory.
    return 2 * tf.nn.l2_loss(x) if x is y else tf.reduce_sum(x * y)


def _sum_in_parts(x, parts=8):
    """The sum of a vector. On a CPU, XLA waits for each addition before it begins the next.

    Measured on 400,000 numbers: 0.37 ms in one sum, 0.06 ms in eight that run side by side.
    Eight slices would do as well, but XLA took minutes to compile a dozen of them.
    """
    even = x.shape[0] // parts * parts
    sums = tf.reduce_sum(tf.reshape(x[:even], (parts, -1)), axis=0)
    # It changes nothing, and keeps XLA from making one sum of the two.
    sums = tf.where(sums == sums, sums, 2 * sums)
    return tf.reduce_sum(sums) + tf.reduce_sum(x[even:])


def scale(a, xs):
    """`a * x` for each tensor of a list."""
    return [_product(a, x) for x in xs]


def _product(a, x):
    if isinstance(a, float):
        return a * x
    if x.dtype.size < a.dtype.size:  # The factor itself may be too large for float16.
        return tf.cast(a * tf.cast(x, a.dtype), x.dtype)
    return tf.cast(a, x.dtype) * x


def add(xs, ys):
    """`x + y` for each pair of two lists, in the dtype of `x`."""
    return [x + tf.cast(y, x.dtype) for x, y in zip(xs, ys, strict=True)]


def add_scaled(ys, a, xs):
    """`y + a * x` for each pair of two lists, in the dtype of `y`."""
    return add(ys, scale(a, xs))


def quotient(a, b):
    """`a / b` for scalars, and 0 with derivative 0 where `b` is 0."""
    return tf.math.divide_no_nan(a, b)


def read(variable):
    """The value of a variable, a tensor through which no gradient flows."""
    return tf.stop_gradient(tf.convert_to_tensor(variable.value))


def write(weight, value):
    """What the rest of a pass reads of a variable that a layer has written, and what is left in it.

    As in plain training an assignment has no derivative: the gradient by a
    weight is that by its new value. `weight` is `None` for other variables.
    """
    value = tf.stop_gradient(value)
    return value if weight is None else value + (weight - tf.stop_gradient(weight)), value


def compiled(fn):
    """A pure function of tensors, compiled."""
    # TensorFlow would take all functions that one line has made for one that is traced too often,
    # and say so. It looks at their code, and a `partial` has none.
    return tf.function(functools.partial(fn), reduce_retracing=True)


def global_seeds():
    """Variables outside the model that its random numbers may come from."""
    # Keras keeps one seed per thread. Replicas are threads, where none can be made any more.
    return [] if merges_threads() else [global_seed()]


def random_state():
    """The state of random numbers that are in no variable: TensorFlow has none here."""


def set_random_state(state):
    """Go back to a state of `random_state`."""


def own_random_numbers(model):
    """Let a model draw from seeds that it holds: on TensorFlow it does."""


def check_layers(model):
    """Refuse a model with layers that a pure function of the weights cannot reach."""
    del model  # Every trainable Keras layer works.

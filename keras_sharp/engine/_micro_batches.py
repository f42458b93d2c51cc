"""Micro-batches where the size of a batch is known: JAX and PyTorch."""

import keras
from keras import ops


def average_micro_batches(fn, carried, batch, num_micro_batches, axis=0):
    """Run `fn` on equal parts of a batch, one after the other.

    On JAX the loop is unrolled into one program. Measured on a CPU, the
    alternatives are far slower on convolutions: `lax.scan` runs them without
    the fast kernels (26 times a plain step, for four parts), and `vmap` makes
    them grouped, because in the second pass each part has weights of its own.

    Args:
        fn: `fn(carried, micro_batch) -> (carried, averaged, outputs)`.
        carried: what the first part receives, and each hands to the next.
        batch: nested structure of tensors that have `axis` in common.
        num_micro_batches: Integer, the number of parts. Their sizes differ
            by one example at most; a batch with fewer examples than parts
            has one part per example.
        axis: Integer, the axis of the examples. Defaults to `0`.

    Returns:
        The last `carried`; the mean of `averaged` over the parts, weighted
        by their sizes; and the `outputs`, concatenated.
    """
    size = first_tensor(batch).shape[axis]
    quotient, remainder = divmod(size, num_micro_batches)
    total, outputs, start = None, [], 0
    others = axis * (slice(None),)
    for i in range(min(num_micro_batches, size)):
        end = start + quotient + (i < remainder)
        part = map_present(lambda t, a=start, b=end: t[(*others, slice(a, b))], batch)
        carried, averaged, output = fn(carried, part)
        total = accumulate(total, averaged, (end - start) / size)
        outputs.append(output)
        start = end
    outputs = keras.tree.map_structure(lambda *parts: ops.concatenate(parts, axis), *outputs)
    return carried, total, outputs


def part_of_batch(batch, share, axis=0):
    """The first examples of a batch, as many as this share of all, and one at least."""
    size = first_tensor(batch).shape[axis]
    others, count = axis * (slice(None),), max(1, int(share * size))
    return map_present(lambda t: t[(*others, slice(0, count))], batch)


def largest_of_batch(batch, values, share):
    """The examples with the largest values, as many as this share of all, and one at least."""
    count = max(1, int(share * values.shape[0]))
    _, chosen = ops.top_k(values, count)
    # Unlike `ops.take` an index goes with sparse tensors, too.
    return map_present(lambda t: ops.convert_to_tensor(t)[chosen], batch)


def first_tensor(batch):
    """Some tensor of a batch, which has as many examples as all the others."""
    return next(t for t in keras.tree.flatten(batch) if t is not None)


def map_present(fn, structure):
    """Apply `fn` to each entry of a nested structure that is not `None`."""
    return keras.tree.map_structure(lambda t: None if t is None else fn(t), structure)


def has_mean(tensor):
    """Whether a tensor is averaged over parts of a batch: whether it is of floats."""
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))


def accumulate(total, new, weight):
    """`total + weight * new`, entry by entry; `None` counts for nothing.

    An integer has no mean: it is that of the first part.
    """

    def add(a, b):
        if b is None or not has_mean(b):
            return b if a is None else a
        b = b * ops.cast(weight, b.dtype)
        return b if a is None else a + b

    if total is None:
        return map_present(lambda b: add(None, b), new)
    return keras.tree.map_structure(add, total, new)

"""The examples of a batch, and the data that batches come from."""

import keras

from keras_sharp import engine
from keras_sharp.identifiers import check_count
from keras_sharp.preprocessing import preprocess_data

_INFINITE = -1  # What `tf.data.Dataset.cardinality` returns for an infinite data set.


def size_of(batch):
    """The number of examples in a batch, a nested structure of arrays or tensors.

    An integer, or a scalar tensor where it is not known before a step runs.
    """
    return keras.ops.shape(engine.first_tensor(batch))[0]


def size_of_first(x, batch_size):
    """The number of examples in the first batch of `fit`, or `None` if it can't be known."""
    if hasattr(x, "element_spec"):  # tf.data, where the static shape is often unknown
        return int(size_of(next(iter(x))))
    if isinstance(x, keras.utils.PyDataset):
        return int(size_of(x[0]))
    shape = getattr(keras.tree.flatten(x)[0], "shape", None)
    return min(int(shape[0]), batch_size or 32) if shape else None


def open_data(model, x, y, sample_weight, batch_size):
    """The adapter through which Keras would read these data, again and again.

    Args:
        model: a `keras.Model`; its own preprocessing is applied.
        x: the inputs, or all the data, as `fit` takes them.
        y: the targets, likewise.
        sample_weight: the weights of the examples, likewise.
        batch_size: Integer, for arrays.

    Raises:
        ValueError: if there are no data, no end to them, or if they can be
            read only once.
    """
    check_count("batch_size", batch_size, at_least=1)
    if hasattr(x, "__next__"):
        raise ValueError(
            "The data are read more than once, and a generator can be read only once. Received: "
            f"x={x!r}. Expected arrays, a tf.data.Dataset, a keras.utils.PyDataset or a torch "
            "DataLoader."
        )
    shapes = [getattr(a, "shape", (1,)) for a in keras.tree.flatten(x)]
    if x is None or not shapes or any(shape[:1] == (0,) for shape in shapes):
        raise ValueError(
            "There are no data: `x` is empty. Expected at least one example. Received: "
            f"x of type {type(x).__name__}"
        )
    x, y, sample_weight = preprocess_data(model, (x, y, sample_weight), batch_size)
    data = engine.data_adapter(x, y, sample_weight, batch_size)
    endless = hasattr(x, "num_batches") or (
        hasattr(x, "cardinality") and int(x.cardinality()) == _INFINITE
    )
    if data.num_batches is None and endless:
        raise ValueError(
            "The data have no end, and the loss is that of all of them. Received: an infinite "
            f"{type(x).__name__}. Use `take`, or a PyDataset with a finite `num_batches`."
        )
    return data

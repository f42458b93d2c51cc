"""Data for models that preprocess what `fit` is given, as the tasks of KerasHub do.

`task.fit`, `task.evaluate` and `task.predict` pass the data through
`task.preprocess_samples`; `task(x)` does not. Whoever calls such a model has to
do it first, or the model sees raw pixels where it expects scaled ones, and
nothing tells. Here the data are preprocessed batch by batch, when they are read.
KerasHub itself is not needed: a model is one of these if it has that method.
Data for all other models pass through these functions unchanged.
"""

import keras
import numpy as np


def preprocesses(model):
    """Whether `model.fit` preprocesses the data: whether it has `preprocess_samples`."""
    return callable(getattr(model, "preprocess_samples", None))


def only_preprocesses(cls, name):
    """Whether a class has its own method `name` only to apply `preprocess_samples`.

    That is so if one class brought both. A `fit` that comes from elsewhere, a
    class of the user say, may do anything.
    """
    owner = next(c for c in cls.__mro__ if name in vars(c))
    return "preprocess_samples" in vars(owner)


def preprocess_fit(model, arguments):
    """Preprocess training and validation data.

    Args:
        model: a `keras.Model`.
        arguments: dictionary with the arguments of `keras.Model.fit`, all of
            them.

    Returns:
        A dictionary likewise.
    """
    if not preprocesses(model):
        return arguments
    arguments = dict(arguments)
    data = arguments["x"], arguments["y"], arguments["sample_weight"]
    batch_size, split = arguments["batch_size"], arguments.pop("validation_split")
    validation_data = arguments["validation_data"]
    if validation_data is not None:
        validation_data = keras.utils.unpack_x_y_sample_weight(validation_data)
    elif split:
        data, validation_data = _split(data, split)
    if validation_data is not None:
        size = arguments["validation_batch_size"] or batch_size
        arguments["validation_data"] = preprocess_data(model, validation_data, size)
    x, y, sample_weight = preprocess_data(model, data, batch_size, arguments["shuffle"])
    # Keras would shuffle the batches; `Preprocessed` shuffles the examples.
    return {**arguments, "x": x, "y": y, "sample_weight": sample_weight, "shuffle": False}


def preprocess_data(model, data, batch_size=None, shuffle=False):
    """Data that a model may be called with, from data for its `fit`.

    Args:
        model: a `keras.Model`.
        data: the triple `(x, y, sample_weight)`, which `model.fit` takes. To
            be preprocessed, these must be arrays, lists of strings or
            numbers, tuples or dictionaries of these, or `None`; or `x` is a
            `tf.data.Dataset` and the others are `None`.
        batch_size: Integer. Defaults to `None`, the 32 of Keras.
        shuffle: Boolean, whether arrays are read in a new order each time.
            Defaults to `False`. A data set has an order of its own.

    Returns:
        The triple `(x, y, sample_weight)`. Preprocessed data are a data set,
        with `None` for `y` and `sample_weight`.

    Raises:
        ValueError: if the data are of a kind that can't be preprocessed, or
            differ in length.
    """
    if not preprocesses(model):
        return data
    x, y, sample_weight = data
    if hasattr(x, "element_spec"):  # tf.data
        # -1: as many threads and batches ahead as tf.data thinks best.
        return x.map(model.preprocess_samples, num_parallel_calls=-1).prefetch(-1), y, sample_weight
    return Preprocessed(model, data, batch_size or 32, shuffle), None, None


def preprocess_batch(model, x, y=None, sample_weight=None):
    """A batch that a model may be called with, from a batch for its `train_on_batch`.

    Args:
        model: a `keras.Model`.
        x: the inputs: an array, a list, or a tuple or dictionary of these.
        y: the targets, likewise. Defaults to `None`.
        sample_weight: the weights of the examples, likewise.

    Returns:
        The triple `(x, y, sample_weight)`, of NumPy arrays if they were
        preprocessed.
    """
    if not preprocesses(model):
        return x, y, sample_weight
    return _preprocess(model, _map_leaves(_to_array, (x, y, sample_weight)))


class Preprocessed(keras.utils.PyDataset):
    """Arrays, preprocessed batch by batch.

    Args:
        model: a `keras.Model` with `preprocess_samples`.
        data: the triple `(x, y, sample_weight)`.
        batch_size: Integer.
        shuffle: Boolean.
    """

    def __init__(self, model, data, batch_size, shuffle):
        super().__init__()
        self.model = model
        self.batch_size = batch_size
        self.shuffle = shuffle
        self._data = _map_leaves(_to_array, data)
        self._order = np.arange(_length(self._data))

    @property
    def num_batches(self):
        return -(-len(self._order) // self.batch_size)

    def __getitem__(self, index):
        if self.shuffle and index == 0:  # With the first batch begins a new pass.
            # Not by a generator of its own: keras.utils.set_random_seed seeds this one.
            self._order = np.random.permutation(self._order)
        start = index * self.batch_size
        chosen = self._order[start : start + self.batch_size]
        batch = _preprocess(self.model, _map_leaves(lambda a: a[chosen], self._data))
        return tuple(part for i, part in enumerate(batch) if i == 0 or part is not None)


def _preprocess(model, batch):
    """Preprocess a triple of arrays."""
    x, y, sample_weight = _map_leaves(_to_strings, batch)
    batch = model.preprocess_samples(x, y, sample_weight)
    return keras.tree.map_structure(
        lambda t: None if t is None else _to_dense(t), keras.utils.unpack_x_y_sample_weight(batch)
    )


def _split(data, share):
    """The first examples, and the last `share` of them for validation."""
    data = _map_leaves(_to_array, data)
    length = _length(data)
    at = int(length * (1.0 - share))
    if not 0 < at < length:
        raise ValueError(
            "`validation_split` must leave examples for both training and validation. Received: "
            f"validation_split={share} and {length} examples."
        )
    return _map_leaves(lambda a: a[:at], data), _map_leaves(lambda a: a[at:], data)


def _map_leaves(fn, data):
    """`fn` of each array. As for KerasHub, a list is an array, and not a structure."""
    if isinstance(data, tuple):
        return tuple(_map_leaves(fn, part) for part in data)
    if isinstance(data, dict):
        return {name: _map_leaves(fn, part) for name, part in data.items()}
    return None if data is None else fn(data)


def _length(data):
    """The number of examples."""
    lengths = set()
    _map_leaves(lambda a: lengths.add(len(a)), data)
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            "Inputs, targets and sample weights must be of the same length, at least 1. Received: "
            f"arrays of the lengths {sorted(lengths)}."
        )
    return lengths.pop()


def _to_array(data):
    """A NumPy array, of the dtype that Keras gives to arrays."""
    array = keras.ops.convert_to_numpy(data) if keras.ops.is_tensor(data) else np.asarray(data)
    if array.ndim == 0:
        raise ValueError(
            "A model that preprocesses its data takes arrays, lists, tuples or dictionaries of "
            f"these, or a tf.data.Dataset. Received: {data!r} (of type {type(data).__name__}). "
            "Use one of these, or preprocess the data yourself and set `preprocessor = None`."
        )
    return array.astype(keras.config.floatx()) if array.dtype == "float64" else array


def _to_strings(array):
    """Strings as KerasHub takes them, in lists; anything else as it is."""
    return array.tolist() if array.dtype.kind in "OSU" else array


def _to_dense(tensor):
    """A NumPy array, from a tensor of any backend: KerasHub may use TensorFlow on each."""
    if hasattr(tensor, "row_splits"):
        raise ValueError(
            "The model makes ragged tensors of these data, which arrays can't hold. Pass the data "
            "as a tf.data.Dataset."
        )
    return keras.ops.convert_to_numpy(tensor) if keras.ops.is_tensor(tensor) else np.asarray(tensor)

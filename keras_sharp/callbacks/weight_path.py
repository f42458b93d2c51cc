"""The way that training takes through the weights."""

import keras
import numpy as np
from keras import ops

from keras_sharp import engine
from keras_sharp.delegation import unwrapped
from keras_sharp.identifiers import check_count, did_you_mean
from keras_sharp.snapshots import Snapshots
from keras_sharp.weights import is_overwritten

_UNITS = ("epoch", "step")


class WeightPath(keras.callbacks.Callback):
    """Keeps the weights at the beginning of training, every so often, and at the end.

    `keras_sharp.landscape.around_path` draws the way through them, on the loss
    around it. There are never more than `max_snapshots`: where there would be,
    every second one is dropped, and from then on they are taken half as often.
    Works with any Keras model, wrapped or not, and does not change the
    training.

    Kept are the trainable weights, in float32 (or in float64, if they are).
    The statistics of BatchNormalization are not: the loss around a path is
    that of one state of the model everywhere, see `around_path`.

    The attribute `snapshots` is a sequence, of which each entry has one array
    per trainable variable; `snapshots.positions` tells after how many epochs
    or steps each was taken. The last one holds the weights with which training
    ended, after what the optimizer or a callback that is listed before has
    made of them (an average, or the best of all epochs). A second `fit` begins
    a new path.

    Args:
        every: Integer >= 1, how many epochs or steps lie between two
            snapshots at first. Defaults to `1`.
        unit: `"epoch"` or `"step"`, what `every` counts. Steps are batches.
            Defaults to `"epoch"`.
        max_snapshots: Integer >= 3, how many there may be. In memory, they
            take as much as so many copies of the weights. Defaults to `50`.
        directory: String or path, a folder for the snapshots of one training,
            each an .npz file: for large models, and to draw them later. It is
            made if it is not there. Defaults to `None`: they are in memory.

    Raises:
        ValueError: if an argument is not one of these; and before the first
            epoch, if the model is not built, or if there are snapshots in the
            directory already.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> path = keras_sharp.callbacks.WeightPath()
    >>> x, y = np.random.normal(size=(16, 4)), np.zeros((16, 1))
    >>> history = model.fit(x, y, epochs=3, callbacks=[path], verbose=0)
    >>> path.snapshots.positions
    [0, 1, 2, 3]
    >>> plane = keras_sharp.landscape.around_path(model, path, x, y)
    >>> figure = keras_sharp.plots.landscape(plane)

    Reference:
        - [Li et al., 2018](https://arxiv.org/abs/1712.09913), section 7.
    """

    def __init__(self, every=1, *, unit="epoch", max_snapshots=50, directory=None):
        super().__init__()
        check_count("every", every, at_least=1)
        check_count("max_snapshots", max_snapshots, at_least=3)
        if unit not in _UNITS:
            raise ValueError(
                f"`unit` must be one of {list(_UNITS)}. Received: unit={unit!r}."
                f"{did_you_mean(str(unit), _UNITS)}"
            )
        self.every = every
        self.unit = unit
        self.max_snapshots = max_snapshots
        self.directory = directory
        self.snapshots = Snapshots()

    def on_train_begin(self, logs=None):
        if not self.model.built:
            raise ValueError(
                "WeightPath keeps the weights from the beginning on, and needs a model that has "
                f"some. Received: {self.model!r}. Build it before `fit`: give it a keras.Input, or "
                "call it on a batch."
            )
        self.snapshots = Snapshots(self.directory)
        if len(self.snapshots):
            raise ValueError(
                "The directory of a WeightPath is for one training alone. Received: "
                f"directory={self.directory!r}, with {len(self.snapshots)} snapshots. Pass an "
                "empty folder, or remove the files of the earlier training."
            )
        self._interval, self._position = self.every, 0
        self._keep()

    def on_epoch_begin(self, epoch, logs=None):
        self._last_batch = -1

    def on_train_batch_end(self, batch, logs=None):
        if self.unit == "step":
            self._go_on(batch - self._last_batch)  # Several, with steps_per_execution.
            self._last_batch = batch

    def on_epoch_end(self, epoch, logs=None):
        if self.unit == "epoch":
            self._go_on(1)

    def on_train_end(self, logs=None):
        if self._position > self.snapshots.positions[-1]:
            self._make_room()
        self._keep()

    def _go_on(self, units):
        """Count, and take a snapshot if it is time."""
        self._position += units
        if self._is_time():
            self._make_room()
        if self._is_time():
            self._keep()

    def _is_time(self):
        return self._position - self.snapshots.positions[-1] >= self._interval

    def _make_room(self):
        """For one more: if there are too many already, take half as many from now on."""
        if len(self.snapshots) == self.max_snapshots:
            self.snapshots.thin()
            self._interval *= 2

    def _keep(self):
        variables = unwrapped(self.model).trainable_variables
        arrays = [_array(v) for v in variables if not is_overwritten(v)]
        self.snapshots.keep(self._position, arrays)


def _array(variable):
    """A copy of a variable, which is trained in place."""
    dtype = "float64" if variable.dtype == "float64" else "float32"
    return np.array(ops.convert_to_numpy(ops.cast(engine.read(variable), dtype)))

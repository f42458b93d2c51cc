"""What the probes have in common: when they look, and where the numbers go."""

import math
import warnings

import keras

from keras_sharp import engine
from keras_sharp.delegation import unwrapped
from keras_sharp.identifiers import check_count
from keras_sharp.preprocessing import preprocess_data


class Probe(keras.callbacks.Callback):
    """Base class: measures the model on fixed data at the end of some epochs.

    Subclasses write `prepare`, `refresh` and `measure`. The numbers go into
    the logs and into `history`. Should the loss on the data cease to be
    finite in the course of training, they are NaN, and a warning says so.

    Args:
        data: the triple `(x, y, sample_weight)`.
        every: Integer >= 1, how many epochs lie between two looks. The first
            epoch and the last one are always among them.
        verbose: Integer. `1` prints the numbers.
    """

    def __init__(self, data, every, verbose):
        super().__init__()
        check_count("every", every, at_least=1)
        self.data = data
        self.every = every
        self.verbose = verbose
        #: Lists with an entry per look: `"epoch"`, counted from 0, and each number by its name.
        self.history = {}

    #: The names of the numbers.
    names: list

    def prepare(self):
        """Check data and model, and compile nothing twice. Called when training begins."""
        raise NotImplementedError

    def refresh(self):
        """Move on to the weights of now, or raise a ValueError if the loss there is none."""
        raise NotImplementedError

    def measure(self):
        """A dictionary with a float for each name."""
        raise NotImplementedError

    def on_train_begin(self, logs=None):
        self.history = {"epoch": [], **{name: [] for name in self.names}}
        if not self.model.built:  # On TensorFlow, `fit` builds a model in the first step.
            x, y, sample_weight = preprocess_data(unwrapped(self.model), self.data)
            for batch in engine.data_adapter(x, y, sample_weight, 1).get_numpy_iterator():
                engine.build_symbolically(self.model, keras.utils.unpack_x_y_sample_weight(batch))
                break
        self.prepare()

    def on_epoch_end(self, epoch, logs=None):
        if epoch % self.every and epoch + 1 != self.params["epochs"]:
            return
        try:
            self.refresh()
        except ValueError as error:
            warnings.warn(f"{type(self).__name__}, epoch {epoch + 1}: {error}", stacklevel=2)
            values = dict.fromkeys(self.names, math.nan)
        else:
            values = self.measure()
        self.history["epoch"].append(epoch)
        for name, value in values.items():
            self.history[name].append(value)
        if logs is not None:
            logs.update(values)
        if self.verbose > 0:
            numbers = " - ".join(f"{name}: {value:.4g}" for name, value in values.items())
            print(f"\nEpoch {epoch + 1}: {numbers}")

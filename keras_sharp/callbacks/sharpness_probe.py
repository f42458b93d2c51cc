"""Sharpness, watched in training."""

from functools import partial

from keras_sharp import sharpness
from keras_sharp.callbacks.probe import Probe
from keras_sharp.identifiers import did_you_mean
from keras_sharp.surface import LossSurface

_MEASURES = {
    "max_sharpness": sharpness.max_sharpness,
    "min_sharpness": sharpness.min_sharpness,
    "bilateral_sharpness": sharpness.bilateral_sharpness,
    "surrogate_gap": sharpness.surrogate_gap,
    "gap_curvature": lambda surface, rho, neighborhood: sharpness.gap_curvature(surface, rho=rho),
    "average_sharpness": lambda *args, **kwargs: sharpness.average_sharpness(*args, **kwargs).value,
    "m_sharpness": sharpness.m_sharpness,
    "gradient_angle": sharpness.gradient_angle,
}


class SharpnessProbe(Probe):
    """Measures at the end of each epoch how sharp the loss is.

    The numbers are written into the logs under the names of the measures, for
    the progress bar, `EarlyStopping`, `CSVLogger` and the like, which must be
    listed after this callback. They are also kept in the attribute `history`.
    Works with any compiled model, wrapped or not. Nothing that the callback
    does changes the training.

    Args:
        x: the inputs to measure on, a fixed sample of the training data: an
            array or a nested structure of arrays; or all the data, as a
            `tf.data.Dataset`, a `keras.utils.PyDataset` or a
            `torch.utils.data.DataLoader`.
        y: the targets, likewise.
        sample_weight: the weights of the examples, likewise.
        measures: list of names of functions of `keras_sharp.sharpness`. Or a
            dictionary of functions, by the names for the logs, each of which
            receives a `keras_sharp.surface.LossSurface` and returns a float.
            Defaults to `("max_sharpness", "bilateral_sharpness",
            "gradient_angle")`, which cost about five gradients over the data.
        rho: Float >= 0, the radius for all measures given by name. Defaults
            to `0.05`.
        neighborhood: a `keras_sharp.neighborhoods.Neighborhood` or its name,
            likewise; `"adaptive"` is what it is in `keras_sharp.sharpness`.
            Defaults to `"euclidean"`.
        every: Integer >= 1, how many epochs lie between two looks. The first
            epoch and the last one are always among them. Defaults to `1`.
        batch_size: Integer, how many examples of an array are in memory at
            once, and the `m` of `"m_sharpness"`. Defaults to `256`.
        verbose: Integer. `0` is quiet, `1` prints the numbers. Defaults to
            `0`.

    Raises:
        ValueError: if an argument is not one of these; before the first
            epoch, if the data do not fit the model, or if the loss on them is
            not finite.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.random.normal(size=(16, 4)), np.zeros((16, 1))
    >>> probe = keras_sharp.callbacks.SharpnessProbe(x, y, measures=["max_sharpness"], rho=0.1)
    >>> history = model.fit(x, y, epochs=3, callbacks=[probe], verbose=0)
    >>> len(history.history["max_sharpness"])
    3

    Functions with settings of their own:

    >>> def worst(surface):
    ...     return keras_sharp.sharpness.max_sharpness(surface, rho=0.1, steps=5, restarts=2)
    >>> probe = keras_sharp.callbacks.SharpnessProbe(x, y, measures={"worst_case": worst})
    """

    def __init__(
        self,
        x,
        y=None,
        sample_weight=None,
        *,
        measures=("max_sharpness", "bilateral_sharpness", "gradient_angle"),
        rho=0.05,
        neighborhood="euclidean",
        every=1,
        batch_size=256,
        verbose=0,
    ):
        super().__init__((x, y, sample_weight), every, verbose)
        rho, region = sharpness.as_radius(rho), sharpness.as_region(neighborhood)
        if not isinstance(measures, dict):
            names = [measures] if isinstance(measures, str) else measures
            measures = {
                name: partial(_look_up(name), rho=rho, neighborhood=region) for name in names
            }
        if not measures or not all(map(callable, measures.values())):
            raise ValueError(
                "`measures` must be a list of names, or a dictionary of functions. Received: "
                f"measures={measures!r}"
            )
        self.measures = measures
        self.names = list(measures)
        self.batch_size = batch_size

    def prepare(self):
        self._surface = LossSurface(self.model, *self.data, batch_size=self.batch_size)
        self.refresh()

    def refresh(self):
        self._surface.check()

    def measure(self):
        return {name: float(measure(self._surface)) for name, measure in self.measures.items()}


def _look_up(name):
    if name not in _MEASURES:
        raise ValueError(
            f"There is no measure named {name!r}.{did_you_mean(str(name), _MEASURES)} Expected "
            f"names from {list(_MEASURES)}, or a dictionary of functions."
        )
    return _MEASURES[name]

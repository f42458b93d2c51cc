"""The curvature of the loss, watched in training."""

import importlib
import math
import os

import keras
import numpy as np

from keras_sharp import curvature, plots
from keras_sharp.callbacks.probe import Probe
from keras_sharp.docstrings import filled_in
from keras_sharp.identifiers import check_boolean, check_count


@filled_in(curvature.HessianOperator)
class HessianProbe(Probe):
    """Measures at the end of each epoch the largest eigenvalues of the Hessian.

    Writes into the logs `hessian_lambda_1` to `hessian_lambda_k`;
    `hessian_ratio`, the first over the fifth (or over the last of fewer), NaN
    if that is not positive, or zero within rounding; and, if asked for,
    `hessian_trace`. `EarlyStopping`, `CSVLogger` and the like can use them, if
    listed after this callback. The attribute `history` keeps them, and `plot`
    draws them. Products are checked with each look: `history["certificate"]`
    has a `keras_sharp.curvature.Certificate` for each. Works with any compiled
    model, wrapped or not. Nothing that the callback does changes the training.

    Args:
        x: the inputs to measure on, a fixed sample of the training data: an
            array or a nested structure of arrays; or all the data, as a
            `tf.data.Dataset`, a `keras.utils.PyDataset` or a
            `torch.utils.data.DataLoader`. A few hundred examples tell the
            large eigenvalues well.
        y: the targets, likewise.
        sample_weight: the weights of the examples, likewise.
        k: Integer >= 1, how many eigenvalues. Defaults to `5`.
        every: Integer >= 1, how many epochs lie between two looks. The first
            epoch and the last one are always among them. Defaults to `1`.
        trace: Boolean, whether to estimate the trace as well, from 100
            products. Defaults to `False`.
        density: Boolean, whether to keep, in `history["density"]`, a
            `SpectralDensity` for each look, from 40 products. Defaults to
            `False`.
        per_layer: Boolean, whether to keep, in `history["per_layer"]`, a
            `PerLayer` for each look: the curvature of each layer by itself,
            from 100 products and some twenty for each layer. Defaults to
            `False`.
        verbose: Integer. `0` is quiet, `1` prints the numbers. Defaults to
            `0`.
        log_dir: String, a directory that TensorBoard reads. The spectra are
            written there, as a run named `spectra`: the eigenvalues as a
            histogram and, with `density=True`, the density as an image. Needs
            TensorFlow and TensorBoard, on every backend, as
            `keras.callbacks.TensorBoard` does. Defaults to `None`: nothing is
            written.
        **kwargs: `batch_size`, `variables` and `certify`, see
            `HessianOperator`.

    Raises:
        ImportError: before the first epoch, if there is a `log_dir` and
            TensorFlow or TensorBoard is not installed.
        ValueError: if an argument is not one of these; before the first
            epoch, if the data do not fit the model, if the loss on them is
            not finite, if a product is wrong, or if there are fewer than `k`
            weights.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.random.normal(size=(16, 4)), np.zeros((16, 1))
    >>> probe = keras_sharp.callbacks.HessianProbe(x, y, k=2)
    >>> history = model.fit(x, y, epochs=3, callbacks=[probe], verbose=0)
    >>> sorted(history.history)
    ['hessian_lambda_1', 'hessian_lambda_2', 'hessian_ratio', 'loss']
    >>> figure = probe.plot()

    References:
        - [Foret et al., 2021](https://arxiv.org/abs/2010.01412), section 4.2.
        - [Jastrzebski et al., 2020](https://arxiv.org/abs/2002.09572)
    """

    def __init__(
        self,
        x,
        y=None,
        sample_weight=None,
        *,
        k=5,
        every=1,
        trace=False,
        density=False,
        per_layer=False,
        verbose=0,
        log_dir=None,
        **kwargs,
    ):
        super().__init__((x, y, sample_weight), every, verbose)
        check_count("k", k, at_least=1)
        check_boolean("trace", trace)
        check_boolean("density", density)
        check_boolean("per_layer", per_layer)
        self.k, self.trace, self.density, self.per_layer = k, trace, density, per_layer
        self.log_dir = log_dir
        self.options = kwargs
        self.names = [f"hessian_lambda_{i + 1}" for i in range(k)]
        if k > 1:
            self.names.append("hessian_ratio")
        if trace:
            self.names.append("hessian_trace")

    def prepare(self):
        self._hessian = curvature.HessianOperator(self.model, *self.data, **self.options)
        if self.k > self._hessian.size:
            raise ValueError(
                f"`k`, the number of eigenvalues, is larger than that of the weights. Received: "
                f"k={self.k} and {self._hessian.size} weights."
            )
        self.history["certificate"] = []
        if self.density:
            self.history["density"] = []
        if self.per_layer:
            self.history["per_layer"] = []
        if self.log_dir is not None:
            self._summary = _summary_module()
            self._writer = self._summary.create_file_writer(os.path.join(self.log_dir, "spectra"))

    def refresh(self):
        self._hessian.refresh()

    def measure(self):
        found = curvature.eigenvalues(self._hessian, k=self.k, verbose=0)
        self.history["certificate"].append(found.certificate)
        numbers = [float(value) for value in found.values]
        if self.k > 1:
            i = min(self.k, 5) - 1
            says_something = numbers[i] > 0 and found.limits[i] != "zero"
            numbers.append(numbers[0] / numbers[i] if says_something else math.nan)
        if self.trace:
            numbers.append(curvature.trace(self._hessian, verbose=0).value)
        if self.density:
            density = curvature.spectral_density(self._hessian, verbose=0)
            self.history["density"].append(density)
        if self.per_layer:
            found = curvature.per_layer(self._hessian, verbose=0)
            self.history["per_layer"].append(found)
        return dict(zip(self.names, numbers, strict=True))

    def on_epoch_end(self, epoch, logs=None):
        looks = len(self.history["certificate"])
        super().on_epoch_end(epoch, logs)
        if self.log_dir is not None and len(self.history["certificate"]) > looks:
            self._write_spectra(epoch)

    def on_train_end(self, logs=None):
        if self.log_dir is not None:
            self._writer.close()

    def _write_spectra(self, epoch):
        values = [self.history[name][-1] for name in self.names[: self.k]]
        with self._writer.as_default():
            self._summary.histogram("hessian_eigenvalues", values, step=epoch)
            if self.density:
                figure = plots.spectral_density({"": self.history["density"][-1]})
                self._summary.image("hessian_density", _pixels(figure)[None], step=epoch)
        self._writer.flush()  # To be seen while the training runs.

    def plot(self):
        """Draw the eigenvalues over the epochs.

        Returns:
            A `matplotlib.figure.Figure`: see
            `keras_sharp.plots.eigenvalue_history`.
        """
        return plots.eigenvalue_history(self.history)


def _summary_module():
    """What writes the files of TensorBoard: that of Keras' own callback."""
    try:
        # TensorFlow offers the functions without TensorBoard, too; they raise when called.
        importlib.import_module("tensorboard")
        return keras.callbacks.TensorBoard().summary
    except ImportError as error:
        raise ImportError(
            "`log_dir` of a HessianProbe needs TensorFlow and TensorBoard, whatever the backend, "
            "as keras.callbacks.TensorBoard does. Install them by "
            "`pip install tensorflow tensorboard`, or leave `log_dir` out."
        ) from error


def _pixels(figure):
    """A figure as an array of the shape (height, width, 4); the figure is closed."""
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    plt.close(figure)
    return np.asarray(canvas.buffer_rgba()).copy()

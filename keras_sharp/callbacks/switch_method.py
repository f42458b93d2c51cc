"""Another method from some epoch on."""

import keras

from keras_sharp import methods
from keras_sharp.callbacks.wrapped import begin, check_wrapped, is_done
from keras_sharp.model import SharpnessAwareModel


class SwitchMethod(keras.callbacks.Callback):
    """Trains with another method from given epochs on.

    An adversary in the last part of training, or in the first one alone,
    costs less than one throughout. Weights, the state of the optimizer, and
    the statistics of the model stay as they are; a switch costs one
    compilation. The model keeps, and saves, the method that it has: training
    that goes on with `initial_epoch`, or from the checkpoint of a
    `BackupAndRestore`, has the method that was on, with its memory, and does
    not repeat earlier switches.

    A hyperparameter in proportion to the learning rate, as BSAM's `rho_min`,
    takes the highest rate since its method began, unless it was given
    `max_learning_rate`. List this callback before a `RhoScheduler`.

    Each log has one entry per epoch: `"rho"` is 0 in epochs of plain training,
    and logs that tell of an adversary are NaN there.

    Args:
        schedule: a dictionary. Each key is the epoch (an integer, from 0 up)
            at whose start the method is set; the value is what
            `SharpnessAwareModel` takes as `method`, and `None` is plain
            training.
        verbose: Integer. `0` is quiet, `1` prints each switch. Defaults to
            `0`.

    Raises:
        ValueError: if `schedule` is not such a dictionary; and before the
            first epoch, if the model is not a `SharpnessAwareModel`.

    Example:

    Plain training first, SAM for the last two epochs:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = keras_sharp.SharpnessAwareModel(model, method=None)
    >>> model.compile("sgd", "mse")
    >>> callback = keras_sharp.callbacks.SwitchMethod({2: "sam"})
    >>> x, y = np.ones((8, 4)), np.ones((8, 1))
    >>> history = model.fit(x, y, epochs=4, callbacks=[callback], verbose=0)
    >>> type(model.method).__name__
    'SAM'

    Reference:
        - [Andriushchenko and Flammarion, 2022](https://arxiv.org/abs/2206.06232)
    """

    def __init__(self, schedule, verbose=0):
        super().__init__()
        if not isinstance(schedule, dict) or not schedule:
            raise ValueError(
                "`schedule` must be a dictionary from epochs to methods, such as "
                f"{{10: 'sam', 20: None}}. Received: schedule={schedule!r}"
            )
        for epoch in schedule:
            if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
                raise ValueError(
                    "The keys of `schedule` are epochs, integers >= 0. Received: the key "
                    f"{epoch!r} in schedule={schedule!r}"
                )
        self.schedule = {epoch: methods.get(method) for epoch, method in schedule.items()}
        self.verbose = verbose

    def set_model(self, model):
        super().set_model(model)
        begin(model, "method")
        if isinstance(model, SharpnessAwareModel):
            # A checkpoint, loaded as training begins, may be one of these.
            model.progress.methods = self.schedule

    def on_train_begin(self, logs=None):
        check_wrapped(self)
        trained_with = (self.model.method, *self.schedule.values())
        self._logs_rho = any("rho" in method.settings for method in trained_with)

    def on_epoch_begin(self, epoch, logs=None):
        if epoch not in self.schedule or is_done(self.model, "method", epoch):
            return
        self.model.method = self.schedule[epoch]
        if self.verbose > 0:
            name = type(self.schedule[epoch]).__name__
            print(f"\nEpoch {epoch + 1}: SwitchMethod setting the method to {name}.")

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None and self._logs_rho:
            logs.setdefault("rho", 0.0)

"""A number of the method that changes from epoch to epoch."""

import math

import keras
from keras import ops

from keras_sharp.callbacks.wrapped import begin, check_wrapped, is_done
from keras_sharp.identifiers import did_you_mean
from keras_sharp.methods import Plain


class RhoScheduler(keras.callbacks.Callback):
    """Sets rho, or another number of the method, at the start of each epoch.

    As `keras.callbacks.LearningRateScheduler` does for the learning rate. At
    the end of each epoch the value is written into the logs. For a number
    that changes from step to step give the method a schedule instead, see
    `keras_sharp.schedules`. Epochs of plain training are passed over; in
    their logs, a number other than rho is NaN. In training that goes on from
    a checkpoint, the value is the one that was saved; an epoch that was broken
    off and begins again is not scheduled twice.

    Args:
        schedule: a function of the epoch (an integer, from 0 up) and the
            current value (a float) that returns the new value, a float.
        verbose: Integer. `0` is quiet, `1` prints each new value. Defaults to
            `0`.
        name: String, the hyperparameter to set: `"rho"`, GSAM's `"alpha"`,
            BSAM's `"rho_min"`, or one of a method of your own. Defaults to
            `"rho"`.

    Raises:
        ValueError: before the first epoch, if the model is not a
            `SharpnessAwareModel`, if the method has no such hyperparameter,
            or one with a schedule of its own. In an epoch, if the value is
            not one that the method takes.

    Example:

    >>> def warm_up(epoch, rho):
    ...     return 0.05 * min(1.0, (epoch + 1) / 3)
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = keras_sharp.SharpnessAwareModel(model, "sam")
    >>> model.compile("sgd", "mse")
    >>> callback = keras_sharp.callbacks.RhoScheduler(warm_up)
    >>> x, y = np.ones((8, 4)), np.ones((8, 1))
    >>> history = model.fit(x, y, epochs=4, callbacks=[callback], verbose=0)
    >>> [round(rho, 3) for rho in history.history["rho"]]
    [0.017, 0.033, 0.05, 0.05]
    """

    def __init__(self, schedule, verbose=0, *, name="rho"):
        super().__init__()
        if not callable(schedule):
            raise ValueError(
                "`schedule` must be a function of the epoch and the current value that returns the "
                f"new value. Received: schedule={schedule!r}"
            )
        self.schedule = schedule
        self.verbose = verbose
        self.name = name

    def set_model(self, model):
        super().set_model(model)
        begin(model, self.name)

    def on_train_begin(self, logs=None):
        check_wrapped(self)
        self._check_method()

    def on_epoch_begin(self, epoch, logs=None):
        self._check_method()  # It may be another one now.
        method = self.model.method
        if isinstance(method, Plain) or is_done(self.model, self.name, epoch):
            return
        setattr(method, self.name, self.schedule(epoch, self._value()))
        if self.verbose > 0:
            print(f"\nEpoch {epoch + 1}: RhoScheduler setting {self.name} to {self._value():g}.")

    def on_epoch_end(self, epoch, logs=None):
        if logs is None:
            return
        if not isinstance(self.model.method, Plain):
            logs[self.name] = self._value()
        elif self.name != "rho":  # Which `SwitchMethod` has logged.
            logs[self.name] = math.nan

    def _value(self):
        return float(ops.convert_to_numpy(getattr(self.model.method, self.name)))

    def _check_method(self):
        method = self.model.method
        if isinstance(method, Plain):
            return
        if self.name not in method.settings:
            raise ValueError(
                f"The method {type(method).__name__} has no hyperparameter named {self.name!r}."
                f"{did_you_mean(str(self.name), method.settings)} Received: name={self.name!r}. "
                f"Expected one of {list(method.settings)}."
            )
        schedule = method.settings[self.name].schedule
        if schedule is not None:
            raise ValueError(
                f"`{self.name}` of the method {type(method).__name__} has a schedule of its own, "
                f"which sets it at every step. Received: {self.name}={schedule!r}. Give "
                f"`{self.name}` as a float, or leave RhoScheduler out."
            )

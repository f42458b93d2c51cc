"""Numbers that change during training: rho and its like.

A hyperparameter takes any schedule that Keras has for the learning rate, and
follows it from step to step. Linear, cosine, warm-up, and both together:

>>> schedules = keras.optimizers.schedules
>>> linear = schedules.PolynomialDecay(0.1, decay_steps=100, end_learning_rate=0.02)
>>> cosine = schedules.CosineDecay(0.1, decay_steps=100)
>>> warm_up = schedules.PolynomialDecay(0.0, decay_steps=50, end_learning_rate=0.1)
>>> both = schedules.CosineDecay(0.0, decay_steps=50, warmup_target=0.1, warmup_steps=50)
>>> for rho in (linear, cosine, warm_up, both):
...     print([round(float(rho(step)), 3) for step in (0, 25, 50, 75, 100)])
[0.1, 0.08, 0.06, 0.04, 0.02]
[0.1, 0.085, 0.05, 0.015, 0.0]
[0.0, 0.05, 0.1, 0.1, 0.1]
[0.0, 0.05, 0.1, 0.05, 0.0]
>>> method = keras_sharp.methods.SAM(rho=both)

Stairs are `PiecewiseConstantDecay`; any function of the step will do. What
Keras does not have is here: `ProportionalToLearningRate`, and `WarmUp`, which
may be put in front of any of these. To set a number once
per epoch, as `LearningRateScheduler` does, use
`keras_sharp.callbacks.RhoScheduler`.
"""

import math
import typing

import keras
from keras import ops

from keras_sharp import engine

__all__ = [
    "Hyperparameter",
    "ProportionalToLearningRate",
    "WarmUp",
]


class Hyperparameter:
    """A number of a method that may change while the model trains.

    A descriptor for the attributes of a `Method`. It takes what the learning
    rate of a Keras optimizer takes: a float, a
    `keras.optimizers.schedules.LearningRateSchedule`, or a function of the
    step. The current value lives in a variable: changing it does not compile
    the training step anew, and it is saved and restored with the model.

    Args:
        minimum: Float, the smallest value that makes sense. Defaults to `0.0`.

    Example:

    >>> class MyMethod(keras_sharp.methods.Method):
    ...     strength = keras_sharp.schedules.Hyperparameter()
    ...
    ...     def __init__(self, strength=0.1):
    ...         super().__init__()
    ...         self.strength = strength
    """

    def __init__(self, minimum=0.0):
        self.minimum = minimum

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, method, owner=None):
        if method is None:
            return self
        return method.own_settings[self.name].variable

    def __set__(self, method, value):
        settings = method.own_settings
        if self.name in settings:
            settings[self.name].assign(value)
        else:
            settings[self.name] = Setting(self.name, value, self.minimum)


def full_precision():
    """The dtype of numbers such as rho, whatever smaller dtype the model has."""
    return "float64" if keras.config.floatx() == "float64" else "float32"


class Setting:
    """The value of one hyperparameter of one method: a variable and its schedule.

    Args:
        name: String, for error messages and for the variable.
        value: a float, a `LearningRateSchedule`, a function of the step, or a
            `ProportionalToLearningRate`.
        minimum: Float, the smallest value allowed.

    Raises:
        ValueError: if `value` is none of these, or a number below `minimum`.
    """

    def __init__(self, name, value, minimum=0.0):
        self.name = name
        self.minimum = minimum
        self.given = value
        self.schedule = value if callable(value) else None
        initial = 0.0 if self.schedule else self._check(value)
        self.variable = keras.Variable(initial, dtype=full_precision(), trainable=False, name=name)

    def assign(self, value):
        """Set the value by hand."""
        if callable(value):
            raise ValueError(
                f"A schedule of `{self.name}` is given when the method is made; later, "
                f"`{self.name}` takes numbers only. Received: {self.name}={value!r}. Make another "
                f"method: `model.method = keras_sharp.methods.SAM({self.name}=...)`, say."
            )
        if self.schedule is not None:
            raise TypeError(
                f"`{self.name}` was given as a schedule ({self.schedule!r}), which sets it at "
                f"every step; it cannot be set by hand. Received: {value!r}. Give `{self.name}` "
                "as a float if a callback is to change it."
            )
        self.variable.assign(self._check(value))

    def value_at(self, step, learning_rate, read=engine.read):
        """The value for one step, a scalar tensor.

        Args:
            step: integer tensor, the steps of the optimizer so far.
            learning_rate: function without arguments that returns the
                learning rate of this step and the highest one so far.
            read: function that returns the value that another hyperparameter,
                given by its variable, has in this step. Defaults to the one
                that the variable holds.
        """
        if self.schedule is None:
            return engine.read(self.variable)
        if isinstance(self.schedule, WarmUp):
            return self.schedule.value_at(step, learning_rate, read)
        if isinstance(self.schedule, ProportionalToLearningRate):
            now, highest = learning_rate()
            return ops.cast(self.schedule(now, highest, read), self.variable.dtype)
        value = self._ask(step)
        # A step with NaN is skipped, counted and told of; one with a negative radius would descend.
        return value * ops.cast(ops.where(value >= self.minimum, 1.0, math.nan), value.dtype)

    def check_at(self, step, as_in_step):
        """Refuse a schedule that gives no valid number at a step, before that is compiled.

        Args:
            step: integer tensor, a step whose number is known.
            as_in_step: function that returns a function of tensors as the
                step would run it: compiled, say.
        """
        if isinstance(self.schedule, WarmUp):
            return self.schedule.setting.check_at(step, as_in_step)
        if self.schedule is None or isinstance(self.schedule, ProportionalToLearningRate):
            return
        value = float(ops.convert_to_numpy(as_in_step(self._ask)(step)))
        if not self.minimum <= value < math.inf:
            raise ValueError(
                f"`{self.name}` must be a finite number >= {self.minimum:g} at every step. "
                f"Received: {self.name}={self.schedule!r}, which gives {value!r} at step "
                f"{int(ops.convert_to_numpy(step))}."
            )

    @property
    def follows_learning_rate(self):
        """Whether the value rises and falls with the learning rate."""
        if isinstance(self.schedule, WarmUp):
            return self.schedule.setting.follows_learning_rate
        return isinstance(self.schedule, ProportionalToLearningRate)

    def _ask(self, step):
        """What the schedule answers, a scalar tensor; its failures are told by name."""
        schedule: typing.Any = self.schedule
        value: typing.Any = None
        try:
            answer = schedule(step)
        except Exception as error:
            raise ValueError(
                f"{self._contract()} It raised {type(error).__name__}: {_first_line(error)}"
            ) from error
        try:
            numeric = answer is not None and not isinstance(answer, (str, bytes, bool))
            if numeric:
                value = ops.cast(answer, self.variable.dtype)
        except Exception:  # Each backend raises errors of its own for what is no tensor.
            numeric = False
        if not numeric or value.shape != ():
            raise ValueError(f"{self._contract()} It returned {answer!r}.")
        return value

    def _contract(self):
        return (
            f"`{self.name}` as a function of the step takes one argument, the number of the step, "
            "a scalar integer tensor, and returns a number or a scalar tensor. It is compiled into "
            "the training step: choose with `keras.ops.where`, not with `if`. Received: "
            f"{self.name}={self.schedule!r}."
        )

    def config(self):
        """The value as a constructor argument, as plain as can be."""
        if self.schedule is not None:
            return keras.saving.serialize_keras_object(self.schedule)
        current = float(ops.convert_to_numpy(self.variable))
        unchanged = current == float(
            ops.convert_to_numpy(ops.cast(self.given, self.variable.dtype))
        )
        return float(self.given) if unchanged else current

    def agrees_with(self, config):
        """Whether a config is that of this setting, but for a number that is in a variable."""
        if self.schedule is None:
            return isinstance(config, (int, float))
        follows = isinstance(self.schedule, ProportionalToLearningRate) and isinstance(
            self.schedule.maximum, keras.Variable
        )
        if not follows or not isinstance(config, dict) or not isinstance(config["config"], dict):
            return False  # A schedule has no variables, so all of it had to be equal.
        mine = self.schedule.get_config()
        return {**config["config"], "maximum": mine["maximum"]} == mine

    def _check(self, value):
        if isinstance(value, (str, bytes, bool)) or value is None:
            number = math.nan
        else:
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
        if not (self.minimum <= number < math.inf):
            raise ValueError(
                f"`{self.name}` must be a finite number >= {self.minimum:g}, a "
                "keras.optimizers.schedules.LearningRateSchedule, or a function of the step. "
                f"Received: {self.name}={value!r}"
            )
        return number


def _first_line(error):
    return str(error).strip().partition("\n")[0]


@keras.saving.register_keras_serializable(package="keras_sharp")
class ProportionalToLearningRate:
    """A hyperparameter that rises and falls with the learning rate.

    ```
    value = minimum + (maximum - minimum) * learning_rate / max_learning_rate
    ```

    GSAM uses this for rho, BSAM for rho_min, so that the adversary fades out
    as the steps get small.

    Args:
        maximum: Float >= 0, the value at the highest learning rate. Or
            another hyperparameter, such as `method.rho`, to follow that.
        minimum: Float >= 0, the value at learning rate 0. Defaults to `0.0`.
        max_learning_rate: Float > 0, the highest learning rate. Defaults to
            `None`: the highest one that training has seen so far, which makes
            the value `maximum` all through a warm-up.

    Raises:
        ValueError: if a number is negative or not finite.

    Example:

    >>> rho = keras_sharp.schedules.ProportionalToLearningRate(maximum=0.05, minimum=0.01)
    >>> method = keras_sharp.methods.GSAM(rho=rho)

    References:
        - [Zhuang et al., 2022](https://arxiv.org/abs/2203.08065), section 4.
        - [Deng et al., 2024](https://arxiv.org/abs/2409.13173).
    """

    def __init__(self, maximum, minimum=0.0, max_learning_rate=None):
        if not isinstance(maximum, keras.Variable):
            maximum = Setting("maximum", maximum)._check(maximum)
        self.maximum = maximum
        self.minimum = Setting("minimum", minimum)._check(minimum)
        if max_learning_rate is not None and (
            isinstance(max_learning_rate, bool)
            or not isinstance(max_learning_rate, (int, float))
            or not 0 < max_learning_rate < math.inf
        ):
            raise ValueError(
                "`max_learning_rate` must be a finite number > 0, or None for the highest learning "
                f"rate seen so far. Received: max_learning_rate={max_learning_rate!r}"
            )
        self.max_learning_rate = max_learning_rate

    def __call__(self, learning_rate, highest, read=engine.read):
        """The value at a learning rate.

        Args:
            learning_rate: scalar tensor, the learning rate now.
            highest: scalar tensor, the highest one so far.
            read: see `Setting.value_at`.
        """
        if self.max_learning_rate is not None:
            highest = ops.convert_to_tensor(self.max_learning_rate, dtype=learning_rate.dtype)
        one = ops.ones_like(highest)
        share = ops.where(highest == 0, one, learning_rate / ops.where(highest == 0, one, highest))
        maximum = self.maximum
        if isinstance(maximum, keras.Variable):
            maximum = ops.cast(read(maximum), share.dtype)
        return self.minimum + (maximum - self.minimum) * share

    def get_config(self):
        """The arguments of the constructor."""
        return {
            "maximum": float(ops.convert_to_numpy(self.maximum)),
            "minimum": self.minimum,
            "max_learning_rate": self.max_learning_rate,
        }

    @classmethod
    def from_config(cls, config):
        """Make a schedule from what `get_config` returned."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_sharp")
class WarmUp:
    """A hyperparameter that rises from 0 over the first steps, and then goes on as it is.

    ```
    value(step) * min(1, step / steps)
    ```

    From random weights, a large rho may keep a network from learning anything:
    the gradient at the perturbed weights then has little to do with the one at
    the weights. Once the network has begun to learn, the same rho may do well.

    Args:
        value: what comes after the warm-up, and by a growing share during it:
            a float >= 0, a `keras.optimizers.schedules.LearningRateSchedule`,
            a function of the step, or a `ProportionalToLearningRate`. Their
            steps are those of the training, warm-up included.
        steps: Integer > 0, the length of the warm-up in steps of the
            optimizer. A tenth of the training is a usual length.

    Raises:
        ValueError: if `value` is none of these, or `steps` no positive integer.

    Example:

    >>> rho = keras_sharp.schedules.WarmUp(0.2, steps=500)
    >>> method = keras_sharp.methods.SAM(rho=rho)
    """

    def __init__(self, value, steps):
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(
                "`steps`, the length of a warm-up, must be an integer > 0. Received: "
                f"steps={steps!r}. A share of a training is that share of "
                "`epochs * steps_per_epoch`, rounded."
            )
        if isinstance(value, WarmUp):
            raise ValueError(
                f"A warm-up cannot begin with another one. Received: value={value!r}. Give the "
                "value that comes after it."
            )
        self.setting = Setting("value", value)
        self.steps = steps

    def __call__(self, step):
        """The value at a step; not for what follows the learning rate: see `value_at`."""
        return self.value_at(step, None)

    def value_at(self, step, learning_rate, read=engine.read):
        """The value for one step, a scalar tensor: see `Setting.value_at`."""
        if self.setting.schedule is None:
            value = ops.convert_to_tensor(self.setting.given, dtype=full_precision())
        else:
            value = self.setting.value_at(step, learning_rate, read)
        share = ops.cast(step, value.dtype) / self.steps
        return value * ops.where(step < self.steps, share, ops.ones_like(share))

    def get_config(self):
        """The arguments of the constructor."""
        return {"value": self.setting.config(), "steps": self.steps}

    @classmethod
    def from_config(cls, config):
        """Make a schedule from what `get_config` returned."""
        value = config["value"]
        if isinstance(value, dict):
            value = keras.saving.deserialize_keras_object(value)
        return cls(value, config["steps"])

"""When to look for the adversary: at some steps only, and train plainly in between.

A policy is a method around another one. Each gradient that it spares is really
spared, inside of the compiled step:

>>> late = keras_sharp.policies.From("sam", 0.7)  # the last 30 % of the training
>>> rare = keras_sharp.policies.Every("gsam", 5)  # every fifth step
>>> both = keras_sharp.policies.From(keras_sharp.policies.Every("sam", 5), 0.7)
>>> model = keras.Sequential([keras.layers.Dense(1)])
>>> model = keras_sharp.SharpnessAwareModel(model, method=both)

The numbers of the method inside are those of the policy as well:
`model.method.rho = 0.1` sets that of SAM. Steps are those of the optimizer; with
gradient accumulation, each batch is one.
"""

import math

import keras
import numpy as np
from keras import ops

from keras_sharp import methods, vectors
from keras_sharp.identifiers import check_count, check_fraction
from keras_sharp.methods.method import Method
from keras_sharp.schedules import Hyperparameter

__all__ = ["Every", "From", "Policy", "Until", "WhenGradientNorm", "WithProbability"]


class Policy(Method):
    """Base class: another method at some steps, plain training at all others.

    To write one, derive from it, and write `asks`. A policy may hold another
    one, and then asks if both do.

    Args:
        method: the method to ask, a `keras_sharp.methods.Method` or its name.

    Raises:
        ValueError: if `method` is none, or has a number of the same name as
            one of the policy.
    """

    _FIXED: tuple = ("method",)

    is_conditional = True

    def __init__(self, method):
        self.method = methods.get(method)
        both = set(self.hyperparameters()) & set(self.method.settings)
        if both:
            raise ValueError(
                f"{type(self).__name__} and the method that it asks have a number of the same "
                f"name, {sorted(both)}. Received: method={self.method!r}"
            )

    def asks(self, objective, w, **hyperparameters):
        """Whether to ask the method in this step.

        Args:
            objective: an `Objective`, as a method sees it; `objective.step` is
                the number of steps so far.
            w: the weights, a list of tensors.
            **hyperparameters: a scalar tensor for each `Hyperparameter` of the
                policy.

        Returns:
            A scalar Boolean tensor, the same on all replicas.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `asks`.")

    def step(self, objective, w, state, **hyperparameters):
        condition = self.asks(objective, w, **self._take_own(hyperparameters))
        return self._ask_if(condition, objective, w, state, hyperparameters)

    def _take_own(self, hyperparameters):
        """The numbers of the policy, which are taken out of those of all."""
        return {name: hyperparameters.pop(name) for name in self.own_settings}

    def _ask_if(self, condition, objective, w, state, hyperparameters):
        def ask():
            return self.method.step(objective, w, state, **hyperparameters)

        def rest():
            g = objective(w).gradient
            if self.by_passes_optimizer:
                return g, state, vectors.map_present(ops.zeros_like, g)
            return g, state

        return objective.cond(condition, ask, rest)

    def initial_state(self, variables):
        return self.method.initial_state(variables)

    # What the method inside has, the policy has.

    @property
    def settings(self):
        return {**self.own_settings, **self.method.settings}

    @property
    def neighborhood(self):
        """The region that the adversary searches: that of the method."""
        return self.method.neighborhood

    @property
    def draws_random_numbers(self):
        """Whether the policy, or the method, draws random numbers."""
        return self.method.draws_random_numbers

    @property
    def by_passes_optimizer(self):
        """Whether a part of what the method returns by-passes the optimizer."""
        return self.method.by_passes_optimizer

    @property
    def in_training(self):
        """Whether a training step was made of this policy."""
        method = vars(self).get("method")  # The constructor asks before it is set.
        return method is not None and method.in_training

    @in_training.setter
    def in_training(self, value):
        self.method.in_training = value

    def __getattr__(self, name):
        method = vars(self).get("method")
        if method is not None and name in method.settings:
            return getattr(method, name)
        raise AttributeError(f"{type(self).__name__} has no attribute `{name}`.")

    def __setattr__(self, name, value):
        method = vars(self).get("method")
        if method is not None and name in method.settings:
            setattr(method, name, value)
        else:
            super().__setattr__(name, value)

    def set_length(self, num_steps):
        """Be told how many steps the training has, those that are done among them.

        Args:
            num_steps: Integer, or `None` if that is not known.
        """
        if isinstance(self.method, Policy):
            self.method.set_length(num_steps)

    @property
    def knows_length(self):
        """Whether there is no need to be told, or no more."""
        return not isinstance(self.method, Policy) or self.method.knows_length

    @property
    def waits(self):
        """Whether there is a time at which the policy does not ask at all."""
        return isinstance(self.method, Policy) and self.method.waits


@keras.saving.register_keras_serializable(package="keras_sharp")
class Every(Policy):
    """A method at the steps 0, k, 2k, ..., plain training in between.

    Costs `1 + (n - 1) / k` gradients per step, `n` those of the method. The
    paper on LookSAM finds that accuracy falls with k; `keras_sharp.methods.LookSAM`
    fills the steps in between with what the adversary found.

    Args:
        method: the method to ask, a `keras_sharp.methods.Method` or its name.
        k: Integer >= 1, the number of steps from one question to the next.
            Defaults to `5`.

    Raises:
        ValueError: if an argument is not one of these.

    Example:

    >>> policy = keras_sharp.policies.Every(keras_sharp.methods.SAM(rho=0.1), k=10)

    Reference:
        - [Liu et al., 2022](https://arxiv.org/abs/2203.02714), who compare with it.
    """

    _FIXED = ("method", "k")

    def __init__(self, method, k=5):
        check_count("k", k, at_least=1)
        super().__init__(method)
        self.k = k

    def asks(self, objective, w):
        return objective.step % self.k == 0


class _Moment(Policy):
    """Base class of those that begin or end at one moment of the training."""

    def __init__(self, method, name, moment):
        is_number = isinstance(moment, (int, float)) and not isinstance(moment, bool)
        is_share = isinstance(moment, float) and 0 < moment < 1
        if not is_number or not (is_share or (isinstance(moment, int) and moment >= 0)):
            raise ValueError(
                f"`{name}` must be a step, an integer >= 0, or a share of the training, a float "
                f"between 0 and 1. Received: {name}={moment!r}"
            )
        super().__init__(method)
        self._name, self._share = name, moment if is_share else None
        # The steps of a share are not known before `fit`.
        setattr(self, name, 0.0 if is_share else float(moment))
        self._is_known = not is_share

    @property
    def waits(self):
        return True

    @property
    def knows_length(self):
        return self._is_known and super().knows_length

    def set_length(self, num_steps):
        super().set_length(num_steps)
        if self._share is None:
            return
        if num_steps is None:
            raise ValueError(
                f"{type(self).__name__} was given `{self._name}` as a share of the training, "
                f"{self._share:g}, and the length of the training is not known: it is told by "
                f"`fit`, for data of a known length. Give `{self._name}` in steps, as an integer, "
                "or tell a `tf.data.Dataset` its length by `assert_cardinality`."
            )
        setattr(self, self._name, float(round(self._share * num_steps)))
        self._is_known = True

    def get_config(self):
        config = super().get_config()
        moment = config[self._name] if self._share is None else self._share
        return {**config, self._name: moment if self._share else int(moment)}


@keras.saving.register_keras_serializable(package="keras_sharp")
class From(_Moment):
    """Plain training at first, a method from some step on.

    What happens late decides, more or less, where training ends: most of the
    gain of SAM is said to be had in the last part of a training.

    Args:
        method: the method to ask, a `keras_sharp.methods.Method` or its name.
        start: the first step at which it is asked, an integer >= 0; or the
            share of the training before that, a float between 0 and 1, which
            needs `fit` and data of a known length.

    Raises:
        ValueError: if an argument is not one of these; before the first
            step, if `start` is a share and the length of the training is not
            known.

    Example:

    >>> policy = keras_sharp.policies.From("sam", 0.7)

    Reference:
        - [Zhou et al., 2024](https://arxiv.org/abs/2410.10373)
    """

    start = Hyperparameter()

    def __init__(self, method, start):
        super().__init__(method, "start", start)

    def asks(self, objective, w, start):
        return ops.cast(objective.step, start.dtype) >= start


@keras.saving.register_keras_serializable(package="keras_sharp")
class Until(_Moment):
    """A method at first, plain training from some step on.

    Args:
        method: the method to ask, a `keras_sharp.methods.Method` or its name.
        end: the first step at which it is not asked any more, an integer
            >= 0; or the share of the training before that, a float between 0
            and 1, which needs `fit` and data of a known length.

    Raises:
        ValueError: if an argument is not one of these; before the first
            step, if `end` is a share and the length of the training is not
            known.

    Example:

    >>> policy = keras_sharp.policies.Until("sam", 1000)

    Reference:
        - [Andriushchenko and Flammarion, 2022](https://arxiv.org/abs/2206.06232), section 3.3,
          who switch in both directions.
    """

    end = Hyperparameter()

    def __init__(self, method, end):
        super().__init__(method, "end", end)

    def asks(self, objective, w, end):
        return ops.cast(objective.step, end.dtype) < end


@keras.saving.register_keras_serializable(package="keras_sharp")
class WithProbability(Policy):
    """A method at random steps, plain training at the others.

    Costs `1 + p (n - 1)` gradients per step on average, `n` those of the
    method. All replicas and micro-batches of a step decide alike.

    Args:
        method: the method to ask, a `keras_sharp.methods.Method` or its name.
        p: how probable it is that a step asks, from 0 to 1: a float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.5`.

    Raises:
        ValueError: if an argument is not one of these.

    Example:

    >>> policy = keras_sharp.policies.WithProbability("sam", p=0.25)

    Reference:
        - [Zhao et al., 2022](https://arxiv.org/abs/2203.09962)
    """

    p = Hyperparameter()
    draws_random_numbers = True

    def __init__(self, method, p=0.5):
        super().__init__(method)
        self.p = p
        if isinstance(p, (int, float)) and p > 1:
            raise ValueError(f"`p`, a probability, must be at most 1. Received: p={p!r}")

    def asks(self, objective, w, p):
        return objective.random(()) < ops.cast(p, "float32")


@keras.saving.register_keras_serializable(package="keras_sharp")
class WhenGradientNorm(Policy):
    """A method where the gradient is large by the standards of the last steps (AE-SAM).

    ```
    mean = decay * mean + (1 - decay) * ‖g‖²
    variance = decay * variance + (1 - decay) * (‖g‖² - mean)²
    asks, if ‖g‖² >= mean + c * sqrt(variance)
    ```

    The squared norm of the gradient of a batch is close to normally
    distributed, says the paper, and SAM makes most of a difference where it is
    large. With `c = 0` about half of the steps ask, and a step costs 1.5
    gradients with SAM.

    Args:
        method: the method to ask, a `keras_sharp.methods.Method` or its name.
        c: how many standard deviations above the mean: a float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.0`. The paper lets it fall from 1 to -1
            along a line, so that more and more steps ask.
        decay: Float in [0, 1), of the moving averages. Defaults to `0.9`, the
            paper's value.

    Raises:
        ValueError: if an argument is not one of these.

    Example:

    >>> falling = keras.optimizers.schedules.PolynomialDecay(1.0, 10_000, end_learning_rate=-1.0)
    >>> policy = keras_sharp.policies.WhenGradientNorm("sam", c=falling)

    Reference:
        - [Jiang et al., 2023](https://arxiv.org/abs/2304.14647)
    """

    _FIXED = ("method", "decay")

    c = Hyperparameter(minimum=-math.inf)

    def __init__(self, method, c=0.0, decay=0.9):
        super().__init__(method)
        self.c = c
        self.decay = check_fraction("decay", decay)

    def initial_state(self, variables):
        # Mean, variance, and whether there was a step.
        return [*(np.zeros((), "float32") for _ in range(3)), *super().initial_state(variables)]

    def step(self, objective, w, state, **hyperparameters):
        (c,) = self._take_own(hyperparameters).values()
        mean, variance, began, *inner = state
        squared = ops.cast(objective(w).gradient.squared_norm, mean.dtype)
        decay = self.decay * began  # The first norm is the mean.
        mean = decay * mean + (1 - decay) * squared
        variance = decay * variance + (1 - decay) * (squared - mean) ** 2
        condition = squared >= mean + ops.cast(c, mean.dtype) * ops.sqrt(variance)
        direction, inner, *rest = self._ask_if(condition, objective, w, inner, hyperparameters)
        return direction, [mean, variance, ops.ones_like(began), *inner], *rest

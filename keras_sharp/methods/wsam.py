"""Weighted sharpness-aware minimization (Yue et al., 2023)."""

import keras

from keras_sharp import vectors
from keras_sharp.identifiers import check_boolean
from keras_sharp.methods.method import Method
from keras_sharp.schedules import Hyperparameter


@keras.saving.register_keras_serializable(package="keras_sharp")
class WSAM(Method):
    """Weighted SAM: the sharpness as a regularizer, with a weight of its own.

    ```
    g_adv = ∇L(w + rho * g / ‖g‖)
    direction = g + gamma / (1 - gamma) * (g_adv - g)
    ```

    SAM lowers the loss and the rise to the perturbed loss alike, which is
    `gamma = 0.5`; above that the rise counts more. All of this direction goes
    through the optimizer. In the decoupled form the optimizer receives the
    gradient, and the rest by-passes it, as decoupled weight decay does:

    ```
    direction = g
    w = w - learning_rate * gamma / (1 - gamma) * (g_adv - g)      # after the optimizer
    ```

    With SGD without momentum, without clipping and the like both are the same.
    Costs two gradients per step.

    Args:
        rho: the radius of the ball, in units of the weights: a float >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.05`.
        gamma: the weight of the sharpness, from 0 to below 1, like `rho`.
            Defaults to `0.88`, as in the authors' code; the paper finds 0.8
            to 0.95 good.
        decoupled: Boolean, which of the two forms. Defaults to `False`. The
            authors' code has `True` by default, which needs an optimizer that
            takes each step as it comes: one that accumulates gradients,
            averages weights or scales the loss by itself is refused.
        **kwargs: `neighborhood`, `ascent_steps` and `second_order`, see
            `keras_sharp.methods.Method`.

    Raises:
        ValueError: if `rho` or `gamma` is negative or not a finite number, or
            if `gamma` is a number >= 1; before the first step, if the
            decoupled form and the optimizer do not go together.

    Example:

    >>> method = keras_sharp.methods.WSAM(rho=0.05, gamma=0.9)

    References:
        - [Yue et al., 2023](https://arxiv.org/abs/2305.15817)
        - [Authors' code](https://github.com/intelligent-machine-learning/atorch)
    """

    _FIXED = (*Method._FIXED, "decoupled")

    rho = Hyperparameter()
    gamma = Hyperparameter()

    def __init__(self, rho=0.05, gamma=0.88, decoupled=False, **kwargs):
        super().__init__(**kwargs)
        self.rho = rho
        self.gamma = gamma
        if isinstance(gamma, (int, float)) and gamma >= 1:
            raise ValueError(f"`gamma` must be below 1. Received: gamma={gamma!r}")
        check_boolean("decoupled", decoupled)
        self.decoupled = decoupled

    @property
    def by_passes_optimizer(self):
        """Whether the weighted rise by-passes the optimizer."""
        return self.decoupled

    def step(self, objective, w, state, rho, gamma):
        g = objective(w).gradient
        g_adv = self.gradient_at_adversary(objective, w, g, rho)
        rise, weight = vectors.add_scaled(g_adv, -1.0, g), gamma / (1.0 - gamma)
        if self.decoupled:
            return g, state, vectors.scale(weight, rise)
        return vectors.add_scaled(g, weight, rise), state

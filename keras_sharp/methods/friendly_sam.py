"""Friendly sharpness-aware minimization (Li et al., 2024)."""

import keras

from keras_sharp import vectors
from keras_sharp.identifiers import check_fraction
from keras_sharp.methods.method import Method
from keras_sharp.schedules import Hyperparameter


@keras.saving.register_keras_serializable(package="keras_sharp")
class FriendlySAM(Method):
    """SAM that climbs along the noise of the batch alone.

    ```
    d = g - sigma * m
    e = rho * d / ‖d‖
    direction = ∇L(w + e)
    m = decay * m + (1 - decay) * g
    ```

    The gradient of a batch is that of all the data and noise. It is the noise,
    says the paper, that makes SAM generalize, and climbing along the rest is
    harmful: a moving average `m` of the gradients stands for it, and is taken
    out. Costs two gradients per step.

    Args:
        rho: the radius of the ball, in units of the weights: a float >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.1`; the paper takes 0.1 to 0.2.
        sigma: how much of the average is taken out, like `rho`. Defaults to
            `1.0`, as in the authors' code.
        decay: Float in [0, 1), of the moving average. Defaults to `0.9`, as in
            the authors' code; their trainings take `0.95`.
        **kwargs: `neighborhood`, `ascent_steps` and `second_order`, see
            `keras_sharp.methods.Method`.

    Raises:
        ValueError: if `rho` or `sigma` is negative or not a finite number, or
            if `decay` is not in [0, 1).

    Example:

    >>> method = keras_sharp.methods.FriendlySAM(rho=0.1)

    References:
        - [Li et al., 2024](https://arxiv.org/abs/2403.12350)
        - [Authors' code](https://github.com/nblt/F-SAM)
    """

    _FIXED = (*Method._FIXED, "decay")

    rho = Hyperparameter()
    sigma = Hyperparameter()

    def __init__(self, rho=0.1, sigma=1.0, decay=0.9, **kwargs):
        super().__init__(**kwargs)
        self.rho = rho
        self.sigma = sigma
        self.decay = check_fraction("decay", decay)

    def initial_state(self, variables):
        return vectors.zeros(variables)

    def step(self, objective, w, m, rho, sigma):
        def noise(g):
            return vectors.add_scaled(g, -sigma, vectors.recall(m, g))

        g = objective(w).gradient
        direction = self.gradient_at_adversary(objective, w, g, rho, along=noise)
        average = vectors.add_scaled(vectors.scale(self.decay, m), 1.0 - self.decay, g)
        return direction, vectors.remember(average, m)

"""Bilateral sharpness-aware minimization (Deng et al., 2024)."""

import keras

from keras_sharp import vectors
from keras_sharp.methods.method import Method
from keras_sharp.schedules import Hyperparameter, ProportionalToLearningRate


@keras.saving.register_keras_serializable(package="keras_sharp")
class BSAM(Method):
    """Bilateral SAM: flatten the loss above the weights and below them.

    ```
    g_down = ∇L(w - rho_min * g / ‖g‖)
    g_up = ∇L(w + rho * g / ‖g‖)
    direction = g_up + g - (‖g_up‖ / ‖g_down‖) * g_down
    ```

    SAM looks at the highest loss nearby only. The difference between the
    highest and the lowest one is a fuller measure of the sharpness, and its
    gradient is added. (Not to be confused with Bayesian SAM, which goes by
    the same letters.) Costs three gradients per step.

    The step is taken from `w`, as the paper writes it. The authors' published
    code takes it from the lower point, because the weights that it saved
    share their memory with the live ones.

    Args:
        rho: the radius upwards, in units of the weights: a float >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.05`.
        rho_min: the radius downwards, like `rho`. Defaults to `None`: it
            falls from `rho` to 0 in proportion to the learning rate, as in
            the paper; with a constant learning rate it is `rho`, whatever
            sets that.
        **kwargs: `neighborhood`, `ascent_steps` and `second_order`, see
            `keras_sharp.methods.Method`.

    Raises:
        ValueError: if `rho` or `rho_min` is negative or not a finite number.

    Example:

    >>> method = keras_sharp.methods.BSAM(rho=0.05, rho_min=0.01)

    References:
        - [Deng et al., 2024](https://arxiv.org/abs/2409.13173)
        - [Authors' code](https://github.com/ajiaaa/BSAM)
    """

    rho = Hyperparameter()
    rho_min = Hyperparameter()

    def __init__(self, rho=0.05, rho_min=None, **kwargs):
        super().__init__(**kwargs)
        self.rho = rho
        self._follows_rho = rho_min is None
        if rho_min is None:
            rho_min = ProportionalToLearningRate(maximum=self.rho)
        self.rho_min = rho_min

    def direction(self, objective, w, g, rho, rho_min):
        g_down = self.gradient_at_adversary(objective, w, g, -rho_min)
        g_up = self.gradient_at_adversary(objective, w, g, rho)
        ratio = vectors.quotient(vectors.norm(g_up), vectors.norm(g_down))
        return vectors.add_scaled(vectors.add(g_up, g), -ratio, g_down)

    def get_config(self):
        config = super().get_config()
        return {**config, "rho_min": None} if self._follows_rho else config

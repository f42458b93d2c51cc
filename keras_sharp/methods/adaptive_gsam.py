"""Adaptive-GSAM: GSAM with a perturbation scaled by the weights."""

import keras

from keras_sharp.methods.gsam import GSAM
from keras_sharp.neighborhoods import WeightScaledBall


@keras.saving.register_keras_serializable(package="keras_sharp")
class AdaptiveGSAM(GSAM):
    """GSAM that perturbs each weight in proportion to its size.

    ```
    e = rho * (abs(w) + gamma) * g / ‖g‖
    g_adv = ∇L(w + e)
    g_perp = g - (g·g_adv / ‖g_adv‖²) * g_adv
    direction = g_adv - alpha * g_perp
    ```

    It is GSAM in `keras_sharp.neighborhoods.WeightScaledBall`, which has one
    factor of the weights where ASAM has two, as the option "adaptive" of the
    official GSAM code. For ASAM's region write
    `GSAM(neighborhood="adaptive")`. Costs two gradients per step.

    Args:
        rho: the radius, in units of the size of the weights: a float >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.05`.
        alpha: the weight of the gap, like `rho`. Defaults to `0.4`.
        gamma: Float >= 0, keeps the scale of small weights from vanishing.
            Defaults to `0.01`.
        **kwargs: `ascent_steps` and `second_order`, see
            `keras_sharp.methods.Method`.

    Raises:
        ValueError: if `rho`, `alpha` or `gamma` is negative or not a finite
            number.

    Example:

    >>> method = keras_sharp.methods.AdaptiveGSAM(rho=0.1, gamma=0.01)

    References:
        - [Zhuang et al., 2022](https://arxiv.org/abs/2203.08065)
        - [Kwon et al., 2021](https://arxiv.org/abs/2102.11600)
    """

    def __init__(self, rho=0.05, alpha=0.4, gamma=0.01, **kwargs):
        super().__init__(rho, alpha, neighborhood=WeightScaledBall(gamma), **kwargs)

    def get_config(self):
        config = super().get_config()
        del config["neighborhood"]
        return {**config, **self.neighborhood.get_config()}

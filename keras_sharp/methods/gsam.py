"""Surrogate gap guided sharpness-aware minimization (Zhuang et al., 2022)."""

import keras

from keras_sharp import vectors
from keras_sharp.methods.method import Method
from keras_sharp.schedules import Hyperparameter


@keras.saving.register_keras_serializable(package="keras_sharp")
class GSAM(Method):
    """Surrogate gap guided SAM: lower the perturbed loss and the gap to it.

    ```
    e = rho * g / ‖g‖
    g_adv = ∇L(w + e)
    g_perp = g - (g·g_adv / ‖g_adv‖²) * g_adv
    direction = g_adv - alpha * g_perp
    ```

    SAM lowers the perturbed loss only, which is also low in sharp valleys
    with a low floor. GSAM in addition climbs along the part of the gradient
    that leaves the perturbed loss as it is: the gap between the two losses,
    which measures the sharpness, closes. Costs two gradients per step.

    Args:
        rho: the radius of the ball, in units of the weights: a float >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.05`. The paper lets it fall with the
            learning rate: `keras_sharp.schedules.ProportionalToLearningRate`.
        alpha: the weight of the gap, like `rho`. Defaults to `0.4`, the
            paper's choice for ResNets on ImageNet.
        **kwargs: `neighborhood`, `ascent_steps` and `second_order`, see
            `keras_sharp.methods.Method`.

    Raises:
        ValueError: if `rho` or `alpha` is negative or not a finite number.

    Example:

    >>> method = keras_sharp.methods.GSAM(rho=0.05, alpha=0.4)

    References:
        - [Zhuang et al., 2022](https://arxiv.org/abs/2203.08065)
        - [Authors' code](https://github.com/google-research/big_vision)
    """

    rho = Hyperparameter()
    alpha = Hyperparameter()

    def __init__(self, rho=0.05, alpha=0.4, **kwargs):
        super().__init__(**kwargs)
        self.rho = rho
        self.alpha = alpha

    def direction(self, objective, w, g, rho, alpha):
        g_adv = self.gradient_at_adversary(objective, w, g, rho)
        g_perp = vectors.reject(g, onto=g_adv)
        return vectors.add_scaled(g_adv, -alpha, g_perp)

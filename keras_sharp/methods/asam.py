"""Adaptive sharpness-aware minimization (Kwon et al., 2021)."""

import keras

from keras_sharp.methods.sam import SAM
from keras_sharp.neighborhoods import AdaptiveBall


@keras.saving.register_keras_serializable(package="keras_sharp")
class ASAM(SAM):
    """Adaptive SAM: the ball is stretched by the size of each weight.

    ```
    T = abs(w) + eta          # biases: T = 1
    e = rho * T²g / ‖Tg‖
    direction = ∇L(w + e)
    ```

    The sharpness that it sees does not change when the weights of one layer
    are multiplied and those of the next divided by a number. It is SAM in
    `keras_sharp.neighborhoods.AdaptiveBall`. Costs two gradients per step.

    Args:
        rho: the radius of the ball, in units of the size of the weights: a
            float >= 0, a `keras.optimizers.schedules.LearningRateSchedule`,
            or a function of the step. Defaults to `0.5`, the paper's choice
            for CIFAR-10; `1.0` for CIFAR-100. A popular PyTorch port has
            another scale (no `eta`, biases scaled) and needs `2.0`.
        eta: Float >= 0, keeps the scale of small weights from vanishing.
            Defaults to `0.01`, the paper's value.
        p: Float in (1, inf], the order of the norm. Defaults to `2.0`.
        **kwargs: `ascent_share`, see `keras_sharp.methods.SAM`;
            `ascent_steps` and `second_order`, see `keras_sharp.methods.Method`.

    Raises:
        ValueError: if `rho` or `eta` is negative or not a finite number, or
            if `p` is not greater than 1.

    Example:

    >>> method = keras_sharp.methods.ASAM(rho=1.0)

    References:
        - [Kwon et al., 2021](https://arxiv.org/abs/2102.11600)
        - [Authors' code](https://github.com/SamsungLabs/ASAM)
    """

    def __init__(self, rho=0.5, eta=0.01, p=2.0, **kwargs):
        super().__init__(rho, neighborhood=AdaptiveBall(eta, p), **kwargs)

    def get_config(self):
        config = super().get_config()
        del config["neighborhood"]
        return {**config, "eta": self.neighborhood.eta, "p": self.neighborhood.p}

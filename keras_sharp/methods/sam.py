"""Sharpness-aware minimization (Foret et al., 2021)."""

import keras

from keras_sharp.methods.method import Method
from keras_sharp.schedules import Hyperparameter


@keras.saving.register_keras_serializable(package="keras_sharp")
class SAM(Method):
    """Sharpness-aware minimization: the gradient at the worst point nearby.

    ```
    e = rho * g / ‖g‖
    direction = ∇L(w + e)
    ```

    The loss is minimized at the point of a ball around the weights where it
    is about highest, which drives training towards wide, flat minima. Costs
    two gradients per step.

    Args:
        rho: the radius of the ball, in units of the weights: a float >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.05`, the paper's choice for CIFAR and
            ImageNet. Vision transformers take up to `0.2`.
        **kwargs: `neighborhood`, `ascent_steps` and `second_order`, see
            `keras_sharp.methods.Method`.

    Raises:
        ValueError: if `rho` is negative or not a finite number.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = keras_sharp.SharpnessAwareModel(model, keras_sharp.methods.SAM(rho=0.1))
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)

    References:
        - [Foret et al., 2021](https://arxiv.org/abs/2010.01412)
        - [Authors' code](https://github.com/google-research/sam)
    """

    rho = Hyperparameter()

    def __init__(self, rho=0.05, **kwargs):
        super().__init__(**kwargs)
        self.rho = rho

    def direction(self, objective, w, g, rho):
        return self.gradient_at_adversary(objective, w, g, rho)

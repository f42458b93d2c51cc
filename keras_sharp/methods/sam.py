"""Sharpness-aware minimization (Foret et al., 2021)."""

import keras

from keras_sharp import vectors
from keras_sharp.identifiers import check_share
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
        ascent_share: Float in (0, 1], the share of the batch whose gradient
            the adversary climbs along. Below 1 the gradient at the weights is
            not taken over the whole batch: a step then costs
            `1 + ascent_share` gradients, and the loss and the metrics in the
            logs of training, and the statistics of BatchNormalization, are
            those at the perturbed weights. Does not go with `second_order`.
            Defaults to `1.0`.
        **kwargs: `neighborhood`, `ascent_steps` and `second_order`, see
            `keras_sharp.methods.Method`.

    Raises:
        ValueError: if `rho` is negative or not a finite number, or if
            `ascent_share` is no such share, or below 1 with `second_order`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = keras_sharp.SharpnessAwareModel(model, keras_sharp.methods.SAM(rho=0.1))
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)

    References:
        - [Foret et al., 2021](https://arxiv.org/abs/2010.01412)
        - [Authors' code](https://github.com/google-research/sam)
    """

    _FIXED = (*Method._FIXED, "ascent_share")

    rho = Hyperparameter()

    def __init__(self, rho=0.05, ascent_share=1.0, **kwargs):
        super().__init__(**kwargs)
        self.rho = rho
        self.ascent_share = check_share("ascent_share", ascent_share)
        if self.second_order and self.ascent_share < 1:
            raise ValueError(
                "The gradient of the perturbed loss is exact where ascent and loss are of the same "
                "batch: give `second_order=True`, or an `ascent_share` below 1. Received: "
                f"second_order=True, ascent_share={ascent_share!r}"
            )

    def step(self, objective, w, state, rho):
        if self.ascent_share == 1:
            return self.direction(objective, w, objective.uphill(w).gradient, rho), state
        part = objective.part(self.ascent_share)
        e = self.perturbation(part, w, part.uphill(w).gradient, rho)
        return objective(vectors.add(w, e)).gradient, state

    def direction(self, objective, w, g, rho):
        return self.gradient_at_adversary(objective, w, g, rho)

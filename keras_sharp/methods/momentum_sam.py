"""Momentum-SAM (Becker et al., 2024)."""

import keras

from keras_sharp import vectors
from keras_sharp.identifiers import check_fraction
from keras_sharp.methods.method import Method
from keras_sharp.schedules import Hyperparameter


@keras.saving.register_keras_serializable(package="keras_sharp")
class MomentumSAM(Method):
    """SAM whose perturbation is made of the momentum: one gradient per step.

    ```
    direction = ∇L(w - rho * v / ‖v‖)
    v = momentum * v + direction
    ```

    The perturbed weights lie where the momentum leads. The method keeps a
    momentum of its own, so that it goes with any optimizer; give it the
    momentum of SGD. Costs one gradient per step, which is taken at the
    perturbed weights: the loss and the metrics in the logs of training, and
    the statistics of BatchNormalization, are those there. `evaluate`,
    `predict` and files have the weights themselves.

    Args:
        rho: the radius of the ball, in units of the weights: a float >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.3`, as in the authors' code; their
            trainings of ResNets on CIFAR-100 take `3.0`.
        momentum: Float in [0, 1). Defaults to `0.9`.
        neighborhood: the region in whose size and shape the perturbation is
            made, a `keras_sharp.neighborhoods.Neighborhood` or its name.
            Defaults to `"euclidean"`.

    Raises:
        ValueError: if `rho` is negative or not a finite number, or if
            `momentum` is not in [0, 1).

    Example:

    >>> method = keras_sharp.methods.MomentumSAM(rho=1.0)

    References:
        - [Becker et al., 2024](https://arxiv.org/abs/2401.12033)
        - [Authors' code](https://github.com/MarlonBecker/MSAM)
    """

    _FIXED = (*Method._FIXED, "momentum")

    rho = Hyperparameter()

    def __init__(self, rho=0.3, momentum=0.9, neighborhood="euclidean"):
        super().__init__(neighborhood=neighborhood)
        self.rho = rho
        self.momentum = check_fraction("momentum", momentum)

    def initial_state(self, variables):
        return vectors.zeros(variables)

    def step(self, objective, w, v, rho):
        ahead = objective.perturbed(vectors.recall(v, w))
        e = self.neighborhood.perturbation(ahead, w, -rho, objective.biases)
        direction = objective(vectors.add(w, e)).gradient
        v = vectors.add(vectors.scale(self.momentum, v), direction)
        return direction, v

    def get_config(self):
        config = super().get_config()
        del config["ascent_steps"], config["second_order"]
        return config

"""Asynchronous SAM: the ascent along the gradient of the step before."""

import keras

from keras_sharp import vectors
from keras_sharp.methods.method import Method
from keras_sharp.schedules import Hyperparameter


@keras.saving.register_keras_serializable(package="keras_sharp")
class AsyncSAM(Method):
    """SAM that climbs along the gradient of the step before: one gradient per step.

    ```
    direction = ∇L(w + rho * m / ‖m‖)
    m = direction
    ```

    The paper takes an old gradient for the ascent so that a slow device can
    compute it while others go on; here it is the one that is there already.
    Costs one gradient per step, which is taken at the perturbed weights: the
    loss and the metrics in the logs of training, and the statistics of
    BatchNormalization, are those there. `evaluate`, `predict` and files have
    the weights themselves.

    Args:
        rho: the radius of the ball, in units of the weights: a float >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.05`, as SAM.
        neighborhood: the region in whose size and shape the perturbation is
            made, a `keras_sharp.neighborhoods.Neighborhood` or its name.
            Defaults to `"euclidean"`.

    Raises:
        ValueError: if `rho` is negative or not a finite number.

    Example:

    >>> method = keras_sharp.methods.AsyncSAM(rho=0.1)

    Reference:
        - [Deng et al., 2025](https://arxiv.org/abs/2503.11147)
    """

    rho = Hyperparameter()

    def __init__(self, rho=0.05, neighborhood="euclidean"):
        super().__init__(neighborhood=neighborhood)
        self.rho = rho

    def initial_state(self, variables):
        return vectors.zeros(variables)

    def step(self, objective, w, m, rho):
        uphill = objective.perturbed(vectors.recall(m, w))
        e = self.neighborhood.perturbation(uphill, w, rho, objective.biases)
        direction = objective(vectors.add(w, e)).gradient
        return direction, vectors.remember(direction, m)

    def get_config(self):
        config = super().get_config()
        del config["ascent_steps"], config["second_order"]
        return config

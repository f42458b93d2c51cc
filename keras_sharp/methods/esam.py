"""Efficient sharpness-aware minimization (Du et al., 2022)."""

import keras
from keras import ops

from keras_sharp import vectors
from keras_sharp.identifiers import check_share
from keras_sharp.methods.method import Method
from keras_sharp.schedules import Hyperparameter


@keras.saving.register_keras_serializable(package="keras_sharp")
class ESAM(Method):
    """Efficient SAM: some of the weights are perturbed, and some of the examples answer.

    ```
    e = (rho / beta) * g / ‖g‖ * mask        # mask: each entry is 1 with probability beta
    rise = L_i(w + e) - L_i(w)               # of each example i
    direction = ∇L(w + e) of the share gamma of the examples with the largest rise
    ```

    Costs two gradients per step with `gamma = 1.0`; below that `1 + gamma`, and
    a forward pass over the batch that finds the examples. Masks are drawn anew
    in each step. BatchNormalization normalizes the selected examples by
    themselves in the last pass, and dropout draws other masks for them. On
    several devices each selects from its own part of the batch, but for JAX in
    `"global"` scope.

    Args:
        rho: the radius of the ball, in units of the weights: a float >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.05`; the paper takes 0.05 to 0.2.
        beta: Float in (0, 1], how probable it is that an entry of a weight is
            perturbed. Defaults to `0.6`; the paper takes 0.5 to 0.6.
        gamma: Float in (0, 1], the share of the examples that is selected.
            Defaults to `0.5`, as in the paper. Below 1 the model must have one
            output, and a loss that Keras computes example by example.
        neighborhood: the region that the adversary searches, a
            `keras_sharp.neighborhoods.Neighborhood` or its name. Defaults to
            `"euclidean"`.

    Raises:
        ValueError: if `rho` is negative or not a finite number, or if `beta`
            or `gamma` is not in (0, 1]; before the first step, if there is no
            loss of each example.

    Example:

    >>> method = keras_sharp.methods.ESAM(rho=0.05, gamma=0.5)

    References:
        - [Du et al., 2022](https://arxiv.org/abs/2110.03141)
        - [Authors' code](https://github.com/dydjw9/Efficient_SAM)
    """

    _FIXED = (*Method._FIXED, "beta", "gamma")

    rho = Hyperparameter()

    def __init__(self, rho=0.05, beta=0.6, gamma=0.5, neighborhood="euclidean"):
        super().__init__(neighborhood=neighborhood)
        self.rho = rho
        self.beta = check_share("beta", beta)
        self.gamma = check_share("gamma", gamma)

    @property
    def is_conditional(self):
        """Whether there are examples to select."""
        return self.gamma < 1

    @property
    def draws_random_numbers(self):
        """Whether there are masks to draw."""
        return self.beta < 1

    def step(self, objective, w, state, rho):
        g = objective.uphill(w).gradient
        e = self.perturbation(objective, w, g, rho / self.beta)
        if self.beta < 1:
            e = vectors.map_present(lambda t: t * self._mask(objective, t), e)
        w_adv = vectors.add(w, e)
        if self.gamma == 1:
            return objective(w_adv).gradient, state

        def of_those_that_rise():
            rise = objective.losses(w_adv) - objective.losses(w)
            return objective.take_largest(rise, self.gamma)(w_adv).gradient

        # Where nothing is perturbed no example stands out: all of them answer.
        direction = objective.cond(
            vectors.norm(e) > 0, of_those_that_rise, lambda: objective(w).gradient
        )
        return direction, state

    def _mask(self, objective, t):
        return ops.cast(objective.random(t.shape) < self.beta, t.dtype)

    def get_config(self):
        config = super().get_config()
        del config["ascent_steps"], config["second_order"]
        return config

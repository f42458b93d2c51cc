"""LookSAM (Liu et al., 2022)."""

import keras

from keras_sharp import vectors
from keras_sharp.identifiers import check_count
from keras_sharp.methods.method import Method
from keras_sharp.schedules import Hyperparameter


@keras.saving.register_keras_serializable(package="keras_sharp")
class LookSAM(Method):
    """SAM that looks for its adversary every k-th step, and remembers what it added.

    ```
    steps 0, k, 2k, ...:   g_adv = ∇L(w + rho * g / ‖g‖)
                           v = g_adv - (g·g_adv / ‖g‖²) * g
                           direction = g_adv
    all others:            direction = g + alpha * (‖g‖ / ‖v‖) * v
    ```

    What the adversary adds to the gradient is the part `v` that is
    perpendicular to it, says the paper, and that changes slowly from step to
    step. Norms are those of all weights together, as in the paper. Costs two
    gradients per step at every k-th step, and one at all others: `1 + 1 / k` on
    average. With gradient accumulation, a step is a batch.

    The paper trains with batches of thousands. With batches of 64, of which
    many had a wrong label, it ended below plain SGD in this package's
    benchmark (docs/how_to/cheaper.md): what is remembered of one batch is
    added to `k - 1` others with a length of `alpha` gradients, whatever rho is.

    Args:
        rho: the radius of the ball, in units of the weights: a float >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a function
            of the step. Defaults to `0.05`.
        alpha: the weight of what is remembered, like `rho`. Defaults to
            `0.7`, the paper's choice.
        k: Integer >= 1, the number of steps from one look to the next.
            Defaults to `5`, the paper's choice.
        **kwargs: `neighborhood`, `ascent_steps` and `second_order`, see
            `keras_sharp.methods.Method`.

    Raises:
        ValueError: if `rho` or `alpha` is negative or not a finite number, or
            `k` no positive integer.

    Example:

    >>> method = keras_sharp.methods.LookSAM(rho=0.1, k=10)

    Reference:
        - [Liu et al., 2022](https://arxiv.org/abs/2203.02714)
    """

    _FIXED = (*Method._FIXED, "k")

    is_conditional = True

    rho = Hyperparameter()
    alpha = Hyperparameter()

    def __init__(self, rho=0.05, alpha=0.7, k=5, **kwargs):
        super().__init__(**kwargs)
        check_count("k", k, at_least=1)
        self.rho = rho
        self.alpha = alpha
        self.k = k

    def initial_state(self, variables):
        return vectors.zeros(variables)

    def step(self, objective, w, state, rho, alpha):
        g = objective(w).gradient

        def look():
            g_adv = self.gradient_at_adversary(objective, w, g, rho)
            return g_adv, vectors.remember(vectors.reject(g_adv, onto=g), state)

        def remember():
            v = vectors.recall(state, g)
            size = alpha * vectors.quotient(vectors.norm(g), vectors.norm(v))
            return vectors.add_scaled(g, size, v), state

        return objective.cond(objective.step % self.k == 0, look, remember)

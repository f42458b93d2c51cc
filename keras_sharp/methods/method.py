"""The contract that every sharpness-aware method fulfils."""

import keras

from keras_sharp import neighborhoods, schedules, vectors
from keras_sharp.identifiers import did_you_mean, meant


class Method:
    """A rule that turns the gradients of a batch into an update direction.

    A method is pure: it asks an `Objective` for loss and gradient at points
    of its choice, and returns the direction that the optimizer then receives
    in place of the gradient. It knows neither the backend nor the model. To
    write one, copy the file of SAM, write `direction`, and declare each number
    that may change in training as a `keras_sharp.schedules.Hyperparameter`.

    What every method promises, and `tests/test_every_method.py` checks:

    1. with rho = 0 the direction is the gradient, to the bit where the backend
       is deterministic;
    2. nothing but the optimizer changes a weight;
    3. the perturbation has the size that the neighborhood states;
    4. on a quadratic the direction is the closed form;
    5. a zero gradient gives a zero direction, and never NaN;
    6. a gradient that is not finite never reaches the weights;
    7. shapes, dtypes and the structure of the state stay as they are, and the
       second step does not compile again;
    8. weights that are frozen, or without a gradient, are left alone;
    9. the three backends agree with a float64 oracle;
    10. saving and loading reproduce the next step.

    Args:
        neighborhood: the region that the adversary searches, a
            `keras_sharp.neighborhoods.Neighborhood` or its name. Defaults to
            `"euclidean"`.
        ascent_steps: Integer >= 1. How often the adversary climbs; after each
            step but the first it is projected back to the region. Each step
            costs one more gradient. Defaults to `1`, as in the papers.
        second_order: Boolean. Whether the perturbation is differentiated as
            well, which gives the exact gradient of the perturbed loss, at two
            to three times the cost of a gradient. Defaults to `False`: the
            papers drop this term.

    Raises:
        ValueError: if an argument is not one of these.
    """

    #: The attributes that make the training step what it is.
    _FIXED = ("neighborhood", "ascent_steps", "second_order")

    #: Whether a training step was made of this method.
    in_training = False

    def __init__(self, *, neighborhood="euclidean", ascent_steps=1, second_order=False, **unknown):
        for name, value in unknown.items():
            known = [*type(self).hyperparameters(), *self._FIXED]
            raise TypeError(
                f"The method {type(self).__name__} has no argument `{name}`."
                f"{did_you_mean(name, known)} Expected arguments from {known}, or those of its "
                f"constructor. Received: {name}={value!r}"
            )
        if isinstance(ascent_steps, bool) or not isinstance(ascent_steps, int) or ascent_steps < 1:
            raise ValueError(
                f"`ascent_steps` must be an integer >= 1. Received: ascent_steps={ascent_steps!r}"
            )
        if not isinstance(second_order, bool):
            raise ValueError(
                f"`second_order` must be True or False. Received: second_order={second_order!r}"
            )
        self.neighborhood = neighborhoods.get(neighborhood)
        self.ascent_steps = ascent_steps
        self.second_order = second_order

    def __setattr__(self, name, value):
        """Set an attribute, unless that would do nothing.

        Refused are: an attribute that the training step was made of, once it
        is made; on a method of this package, any public name that is new; on
        a method of your own, a new name that is one slip of the fingers away
        from an argument of it, once the step is made.
        """
        if not name.startswith("_") and not hasattr(type(self), name):
            self._check_attribute(name, value)
        super().__setattr__(name, value)

    def _check_attribute(self, name, value):
        cls, received = type(self).__name__, f"Received: {name}={value!r}."
        if name in self._FIXED:
            if self.in_training:
                raise AttributeError(
                    f"`{name}` of the method {cls} is fixed once a training step was made of it. "
                    f"{received} Set another method: `model.method = {cls}({name}={value!r})`."
                )
            return
        known = [*type(self).hyperparameters(), *self._FIXED]
        is_own = not type(self).__module__.startswith("keras_sharp.")
        if name in vars(self) or (is_own and not (self.in_training and meant(name, known))):
            return
        raise AttributeError(
            f"The method {cls} has no attribute `{name}`.{did_you_mean(name, known)} {received} "
            f"Expected one of {known}."
        )

    @classmethod
    def hyperparameters(cls):
        """The names of the numbers that may change in training, a list."""
        return [
            name for name in dir(cls) if isinstance(getattr(cls, name), schedules.Hyperparameter)
        ]

    def direction(self, objective, w, g, **hyperparameters):
        """The direction that the optimizer receives in place of the gradient.

        Args:
            objective: an `Objective`; `objective(w)` is the pair of loss and
                gradient at any weights `w`. The last point that a method asks
                for is its adversary: the logs `perturbed_loss`, `sharpness`
                and `grad_cosine` are taken there.
            w: the weights, a list of tensors.
            g: the gradient at `w`, a list of tensors of the same shapes and
                dtypes; `None` for a weight that the loss does not depend on.
            **hyperparameters: a scalar tensor for each `Hyperparameter`.

        Returns:
            A list of tensors like `g`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `direction` or `step`.")

    def step(self, objective, w, g, state, **hyperparameters):
        """The direction and the new state of the method.

        Override this in place of `direction` if the method remembers
        something from step to step.

        Args:
            objective: see `direction`.
            w: see `direction`.
            g: see `direction`.
            state: list of tensors, at first those of `initial_state`.
            **hyperparameters: see `direction`.

        Returns:
            A pair: the direction, and a list like `state`.
        """
        return self.direction(objective, w, g, **hyperparameters), state

    def initial_state(self, variables):
        """What the method remembers before the first step.

        Args:
            variables: the trainable variables of the model, for their shapes
                and dtypes; they may have no values yet.

        Returns:
            A list of NumPy arrays. Defaults to an empty list: no memory.
        """
        return []

    def perturbation(self, objective, w, g, rho):
        """The adversary's step from `w`: up the loss, to the border of the region.

        Args:
            objective: see `direction`.
            w: see `direction`.
            g: see `direction`.
            rho: scalar, the radius of the neighborhood.

        Returns:
            A list like `g`, with `None` where a weight is not perturbed.
        """
        region, biases = self.neighborhood, objective.biases
        e = region.perturbation(objective.perturbed(g), w, rho, biases)
        for _ in range(self.ascent_steps - 1):
            g = objective(vectors.add(w, e)).gradient
            climb = region.perturbation(objective.perturbed(g), w, rho, biases)
            e = region.project(vectors.add(e, climb), w, abs(rho), biases)
        return e

    def gradient_at_adversary(self, objective, w, g, rho):
        """The gradient at the perturbed weights, `∇L(w + e)`.

        With `second_order` it is the gradient of `L(w + e(w))`.

        Args:
            objective: see `direction`.
            w: see `direction`.
            g: see `direction`.
            rho: scalar, the radius of the neighborhood. A negative one makes
                the adversary descend.

        Returns:
            A list like `g`.
        """

        def ascent(objective, w, g):
            if self.ascent_steps > 1:
                return vectors.add(w, self.perturbation(objective, w, g, rho))
            climb = self.neighborhood.climb(objective.perturbed(g), w, rho, objective.biases)
            return vectors.add_scaled(w, *climb)

        if self.second_order:
            return objective.through(
                lambda inner, v: ascent(inner, v, inner(v).gradient), w
            ).gradient
        return objective(ascent(objective, w, g)).gradient

    @property
    def settings(self):
        """The hyperparameters with their variables and schedules, by name."""
        return self.__dict__.setdefault("_settings", {})

    @property
    def follows_learning_rate(self):
        """Whether a hyperparameter rises and falls with the learning rate."""
        return any(setting.follows_learning_rate for setting in self.settings.values())

    def get_config(self):
        """The arguments of the constructor, as plain values."""
        return {
            **{name: setting.config() for name, setting in self.settings.items()},
            "neighborhood": keras.saving.serialize_keras_object(self.neighborhood),
            "ascent_steps": self.ascent_steps,
            "second_order": self.second_order,
        }

    @classmethod
    def from_config(cls, config):
        """Make a method from what `get_config` returned."""
        return cls(
            **{
                name: keras.saving.deserialize_keras_object(value)
                if isinstance(value, dict)
                else value
                for name, value in config.items()
            }
        )

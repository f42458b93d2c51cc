"""The contract that every sharpness-aware method fulfils."""

import functools
import inspect

import keras

from keras_sharp import neighborhoods, schedules, vectors
from keras_sharp.docstrings import filled_in
from keras_sharp.identifiers import check_boolean, check_count, did_you_mean, meant


def _itself(g):
    return g


def _given_the_gradient(step):
    """A `step` as version 0.1 had it, with the gradient at the weights as an argument."""

    @functools.wraps(step)
    def ask(self, objective, w, state, **hyperparameters):
        return step(self, objective, w, objective(w).gradient, state, **hyperparameters)

    # The signature is that of the function around, or a subclass would be wrapped once more.
    del ask.__wrapped__
    return ask


class Method:
    """A rule that turns the gradients of a batch into an update direction.

    A method is pure: it asks an `Objective` for loss and gradient at points
    of its choice, and returns the direction that the optimizer then receives
    in place of the gradient. It knows neither the backend nor the model. To
    write one, copy the file of GSAM, write `direction`, and declare each number
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

    #: The attributes that make the training step what it is, arguments of the constructor.
    _FIXED: tuple = ("neighborhood", "ascent_steps", "second_order")

    #: Whether the method asks for `objective.random`: there is then a seed for it.
    draws_random_numbers = False

    #: Whether a step asks `objective.cond`. On CPUs, XLA then compiles the passes by themselves.
    is_conditional = False

    #: Whether `step` returns a third part, which by-passes the optimizer.
    by_passes_optimizer = False

    #: Whether a training step was made of this method.
    in_training = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "g" in inspect.signature(cls.step).parameters:
            setattr(cls, "step", _given_the_gradient(cls.step))  # noqa: B010
        filled_in(*(base for base in cls.__mro__[1:] if issubclass(base, Method)))(cls)

    def __init__(self, *, neighborhood="euclidean", ascent_steps=1, second_order=False, **unknown):
        for name, value in unknown.items():
            known = [*type(self).hyperparameters(), *self._FIXED]
            raise TypeError(
                f"The method {type(self).__name__} has no argument `{name}`."
                f"{did_you_mean(name, known)} Expected arguments from {known}, or those of its "
                f"constructor. Received: {name}={value!r}"
            )
        check_count("ascent_steps", ascent_steps, at_least=1)
        check_boolean("second_order", second_order)
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

    @filled_in(direction)
    def step(self, objective, w, state, **hyperparameters):
        """The direction and the new state of the method.

        Override this in place of `direction` if the method remembers
        something from step to step, or does not begin with the gradient at
        the weights. By default it asks for that gradient, and `direction`
        for the rest.

        Args:
            objective: see `direction`.
            w: see `direction`.
            state: list of tensors, at first those of `initial_state`.
            **hyperparameters: see `direction`.

        Returns:
            A pair: the direction, and a list like `state`. If the class says
            `by_passes_optimizer = True`, a triple: also a list like the
            direction that is subtracted from the weights, times the learning
            rate, after the step of the optimizer.
        """
        g = objective(w).gradient
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

    @filled_in(direction)
    def perturbation(self, objective, w, g, rho, along=_itself):
        """The adversary's step from `w`: up the loss, to the border of the region.

        Args:
            objective: see `direction`.
            w: see `direction`.
            g: see `direction`.
            rho: scalar, the radius of the neighborhood.
            along: function of a gradient that returns what the adversary
                climbs along, a list like it. Defaults to the gradient itself.
                It may be given a gradient of the perturbed weights alone, with
                `None` for the others.

        Returns:
            A list like `g`, with `None` where a weight is not perturbed.
        """
        e = None
        for _ in range(self.ascent_steps):
            if e is not None:
                g = objective.uphill(vectors.add(w, e)).gradient
            climbed = objective.perturbed(along(g))
            e = self.neighborhood.ascend(e, climbed, w, rho, objective.biases)
        return e

    @filled_in(direction, perturbation)
    def gradient_at_adversary(self, objective, w, g, rho, along=_itself):
        """The gradient at the perturbed weights, `∇L(w + e)`.

        With `second_order` it is the gradient of `L(w + e(w))`.

        Args:
            objective: see `direction`.
            w: see `direction`.
            g: see `direction`.
            rho: scalar, the radius of the neighborhood. A negative one makes
                the adversary descend.
            along: see `perturbation`.

        Returns:
            A list like `g`.
        """

        def ascent(objective, w, g):
            if self.ascent_steps > 1:
                return vectors.add(w, self.perturbation(objective, w, g, rho, along))
            climb = self.neighborhood.climb(objective.perturbed(along(g)), w, rho, objective.biases)
            return vectors.add_scaled(w, *climb)

        if self.second_order:
            return objective.through(
                lambda inner, v: ascent(inner, v, inner.uphill(v).gradient), w
            ).gradient
        return objective(ascent(objective, w, g)).gradient

    @property
    def own_settings(self):
        """The hyperparameters of this class, with their variables and schedules, by name."""
        return self.__dict__.setdefault("_settings", {})

    @property
    def settings(self):
        """All hyperparameters that a step needs, with their variables and schedules, by name."""
        return self.own_settings

    @property
    def follows_learning_rate(self):
        """Whether a hyperparameter rises and falls with the learning rate."""
        return any(setting.follows_learning_rate for setting in self.settings.values())

    def get_config(self):
        """The arguments of the constructor, as plain values."""
        return {
            **{name: setting.config() for name, setting in self.own_settings.items()},
            **{n: keras.saving.serialize_keras_object(getattr(self, n)) for n in self._FIXED},
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

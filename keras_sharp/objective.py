"""The loss of one batch as a pure function of the weights."""

import functools
import inspect
import math
from typing import NamedTuple

import keras
from keras import ops

from keras_sharp import engine, vectors


class Evaluation(NamedTuple):
    """What the objective answers: how high is it here, and which way is up.

    Attributes:
        loss: scalar tensor.
        gradient: list with one tensor per weight, or `None` for a weight that
            the loss does not depend on.
    """

    loss: object
    gradient: vectors.Vector


class Objective:
    """Loss and gradient of one batch at any weights: `objective(w)`.

    Asking changes nothing: every call sees the same batch, the same dropout
    masks and the same state of the model, and writes to no variable. A method
    may ask as often as it likes; each call costs a forward and a backward pass.

    Args:
        loss_fn: function of the weights, a list of tensors, that returns the
            loss, a scalar tensor.
        perturbed: list of Booleans, one per weight: `True` if the weight
            takes part in the perturbation. Defaults to all of them.
        biases: list of Booleans, one per weight: `True` for a bias, which
            ASAM does not scale. Defaults to none.
        frozen: list of Booleans, one per weight: `True` if its gradient is
            none of the method's business. Defaults to none.
        loss_scale: scalar by which the loss is multiplied before, and the
            gradient divided after, the backward pass, for float16. Defaults
            to `None`, no scaling.
        average: function that takes a list, the loss and the gradient of this
            replica, and returns their means over all replicas. Defaults to
            `None`, one replica by itself.

    Example:

    >>> objective = Objective(lambda w: 0.5 * ops.sum(w[0] ** 2))
    >>> loss, gradient = objective([ops.convert_to_tensor([3.0, 4.0])])
    >>> float(loss)
    12.5
    """

    def __init__(
        self, loss_fn, perturbed=None, biases=None, frozen=None, loss_scale=None, average=None
    ):
        self._value = lambda w: (loss_fn(w), None)
        self._perturbed = perturbed
        self.biases = biases
        self._frozen = frozen
        self._loss_scale = loss_scale
        self._average = average
        #: Each `Evaluation` asked for so far, but not those inside `through`.
        self.evaluations = []
        #: What the loss function returned beside the loss, the last time.
        self.aux = None
        #: The gradient of the frozen weights alone, the last time.
        self.frozen_gradient = []

    @classmethod
    def with_aux(cls, value_fn, **kwargs):
        """An objective from a function that returns `(loss, aux)`."""
        objective = cls(None, **kwargs)
        objective._value = value_fn
        return objective

    def __call__(self, w):
        """Loss and gradient at the weights `w`.

        Args:
            w: list of tensors, one per weight.

        Returns:
            An `Evaluation`, the pair `(loss, gradient)`.
        """
        return self._evaluate(self._value, w)

    def through(self, ascent, w):
        """Loss and exact gradient of `L(ascent(w))` as a function of `w`.

        `objective(ascent(w))` gives the gradient at the perturbed weights;
        here the perturbation is differentiated as well, which brings in the
        Hessian.

        Args:
            ascent: function `(objective, w) -> w_adv`. The objective that it
                receives is this one, in a form that can be differentiated.
            w: list of tensors, one per weight.

        Returns:
            An `Evaluation`.
        """
        inner = Objective.with_aux(
            lambda v: (self._value(v)[0], None),
            perturbed=self._perturbed,
            biases=self.biases,
            frozen=self._frozen,
            loss_scale=self._loss_scale,
            average=self._average,
        )
        return self._evaluate(lambda v: self._value(ascent(inner, v)), w, averages=True)

    def perturbed(self, g):
        """`g` without the entries of weights that are not to be perturbed."""
        if self._perturbed is None or all(self._perturbed):
            return g
        return [t if take else None for t, take in zip(g, self._perturbed, strict=True)]

    @property
    def finite(self):
        """Scalar Boolean tensor: were all losses and gradients so far finite?"""
        # A sum is finite only if all its terms are: one check for all of them.
        total = 0.0
        for loss, gradient in self.evaluations:
            norm = vectors.norm(gradient)
            total = total + (norm + ops.cast(loss, norm.dtype))
        return ops.isfinite(total)

    def _evaluate(self, value_fn, w, averages=False):
        def scaled(weights):
            loss, aux = value_fn(weights)
            if self._loss_scale is None:
                return loss, (loss, aux)
            return loss * ops.cast(self._loss_scale, loss.dtype), (loss, aux)

        (_, (loss, self.aux)), gradient = engine.value_and_gradient(scaled, w, averages)
        if self._frozen is not None and any(self._frozen):
            pairs = list(zip(gradient, self._frozen, strict=True))
            self.frozen_gradient = [g if frozen else None for g, frozen in pairs]
            gradient = [None if frozen else g for g, frozen in pairs]
        if self._loss_scale is not None:
            # Before any norm or inner product is taken.
            gradient = vectors.map_present(
                lambda g: g / ops.cast(self._loss_scale, g.dtype), gradient
            )
        if self._average is not None:
            loss, *gradient = self._average([loss, *gradient])
        evaluation = Evaluation(loss, vectors.Vector(gradient))
        self.evaluations.append(evaluation)
        return evaluation


def compute_loss(model, x, y, y_pred, sample_weight, training):
    """What `model.compute_loss` gives, regularizers and `add_loss` included."""
    # A copy: on PyTorch, Keras multiplies the weights by the mask in place, and the next pass would
    # see them multiplied once more.
    weight = keras.tree.map_structure(lambda t: None if t is None else ops.copy(t), sample_weight)
    kwargs = {"x": x, "y": y, "y_pred": y_pred, "sample_weight": weight}
    if _takes_training(type(model).compute_loss):  # Not in models from before Keras 3.3.
        kwargs["training"] = training
    return model.compute_loss(**kwargs)


def predict_in_training(model, x):
    """The predictions of a training pass, asked for as Keras' own training steps do.

    A model whose `call` has no argument `training` is not told that it is
    trained, and then neither are its layers: dropout drops nothing, and
    BatchNormalization takes its moving statistics.
    """
    return model(x, training=True) if _takes_training(type(model).call) else model(x)


@functools.cache
def _takes_training(function):
    return "training" in inspect.signature(function).parameters


class State(NamedTuple):
    """Everything but the weights that a training pass of a model reads and moves.

    Each field is a list: of variables, of their values before a pass, or of
    those after it.

    Attributes:
        noise: seeds of random generators and other integer state. It tells the
            passes of a step, which may share it, from those of the next.
        statistics: float state, such as the moving averages of
            BatchNormalization. After a pass, `None` if it was not touched.
        trackers: the variables of the metrics.
    """

    noise: list
    statistics: list
    trackers: list


class Pass(NamedTuple):
    """What a training pass leaves beside the loss.

    Attributes:
        y_pred: the predictions; `None` if the pass broke off.
        masks: the masks of the predictions, see `engine.masks_of`.
        state: the `State` of the model afterwards.
        written: list with one entry per weight: the value that a layer has
            put in its place, or `None`.
    """

    y_pred: object
    masks: dict
    state: State
    written: list


class TrainingLoss:
    """The training loss of a model as a pure function of weights, state and data.

    Args:
        model: a compiled `SharpnessAwareModel`.
    """

    def __init__(self, model):
        self._model = model
        self.weights = model.model.trainable_variables
        others = model.model.non_trainable_variables
        floats = [keras.backend.is_float_dtype(v.dtype) for v in others]
        noise = [v for v, is_float in zip(others, floats, strict=True) if not is_float]
        self.variables = State(
            noise=noise + engine.global_seeds(),
            statistics=[v for v, is_float in zip(others, floats, strict=True) if is_float],
            trackers=model.metrics_variables,
        )

    def current_state(self):
        """The values of all state now."""
        return State(*([engine.read(v) for v in group] for group in self.variables))

    def __call__(self, w, state, batch, perturbed=False):
        """One forward pass in training mode. Writes to no variable.

        Args:
            w: list of tensors, the weights.
            state: a `State` of values.
            batch: the triple `(x, y, sample_weight)`.
            perturbed: Boolean, whether `w` are perturbed weights. If these are
                not finite, neither is the loss, even if a layer raises.
                Defaults to `False`.

        Returns:
            The loss, and what else the `Pass` leaves.
        """
        x, y, sample_weight = batch
        others = [
            pair
            for variables, values in zip(self.variables, state, strict=True)
            for pair in zip(variables, values, strict=True)
        ]
        y_pred = None
        try:
            with engine.TrainingScope(
                list(zip(self.weights, w, strict=True)), others, engine.write
            ) as scope:
                y_pred = predict_in_training(self._model.model, x)
                loss = self._model.compute_loss(
                    x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
                )
        except Exception:
            # Some losses and layers refuse NaN. It is then a step that is not finite, as with
            # those that hand it on.
            evidence = y_pred if y_pred is not None else w if perturbed else []
            if not _is_seen_not_to_be_finite(evidence):
                raise
            return sum(ops.sum(t) for t in w) * math.nan, Pass(
                y_pred, engine.masks_of(y_pred), state, [None] * len(w)
            )
        after = State(*([scope.get_current_value(v) for v in group] for group in self.variables))
        moved = [
            None if new is old else new
            for new, old in zip(after.statistics, state.statistics, strict=True)
        ]
        return engine.loss_of_replica(loss), Pass(
            y_pred,
            engine.masks_of(y_pred),
            after._replace(statistics=moved),
            [scope.written.get(id(v)) for v in self.weights],
        )


def _is_seen_not_to_be_finite(tensors):
    """Whether some number is not finite; `False` where a function is traced, and none is known."""
    try:
        return not all(bool(ops.all(ops.isfinite(t))) for t in keras.tree.flatten(tensors))
    except Exception:  # Each backend has its own one for a tensor without a value.
        return False

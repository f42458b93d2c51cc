"""The training loss of a model as a pure function of weights, state and data."""

import functools
import inspect
import math
from typing import NamedTuple

import keras
from keras import ops

from keras_sharp import engine


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

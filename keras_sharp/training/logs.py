"""The logs of a step that are computed only if asked for."""

import math

import keras
from keras import ops

from keras_sharp import vectors
from keras_sharp.identifiers import did_you_mean

#: The choices of `extra_logs`.
EXTRA_LOGS = (
    *("perturbed_loss", "sharpness", "grad_norm", "grad_cosine", "num_gradients"),
    "skipped_steps",
)
#: Those that tell of the adversary, and of nothing in a step that does not look for it.
_OF_THE_ADVERSARY = ("perturbed_loss", "sharpness", "grad_cosine")
#: Those that are of the gradient by all weights, perturbed or not.
_OF_THE_GRADIENT = ("grad_norm", "grad_cosine")


class ExtraLogs:
    """Those extra logs that are means over the steps, as Keras' metrics are.

    Args:
        names: some of `EXTRA_LOGS`.

    Raises:
        ValueError: if there is no such log.
    """

    def __init__(self, names):
        for name in names:
            if name not in EXTRA_LOGS:
                raise ValueError(
                    f"There is no log named {name!r}.{did_you_mean(str(name), EXTRA_LOGS)} "
                    f"Expected names from {list(EXTRA_LOGS)}. Received: extra_logs={names!r}"
                )
        #: A `keras.Metric` for each of them but for `"skipped_steps"`, which is a count.
        self.metrics = [_MeanOfSome(name=name) for name in names if name != "skipped_steps"]
        #: Whether some of them are of the gradient by all weights.
        self.are_of_the_gradient = any(name in _OF_THE_GRADIENT for name in names)

    def values(self, record):
        """The values of one pass: a dictionary of scalar tensors.

        Those of the adversary are 0 where none was asked, so that micro-batches
        and replicas can be averaged.

        Args:
            record: the `Record` of the passes.
        """
        values = {
            "perturbed_loss": lambda: record.perturbed_loss,
            "sharpness": lambda: record.perturbed_loss - record.report.loss,
            "grad_norm": lambda: record.grad_norm,
            "grad_cosine": lambda: record.grad_cosine,
            "num_gradients": lambda: ops.convert_to_tensor(record.num_gradients, "float32"),
        }

        def value(name):
            value = values[name]()
            if name not in _OF_THE_ADVERSARY:
                return value
            return value * ops.cast(record.is_perturbed, value.dtype)

        return {metric.name: value(metric.name) for metric in self.metrics}

    def update(self, values, is_perturbed, size):
        """Enter the values of a step into the metrics.

        Args:
            values: what `values` returned, averaged over the parts of the step.
            is_perturbed: scalar tensor, the share of the parts that asked the
                adversary.
            size: Integer, the number of examples.

        Returns:
            The logs, a dictionary.
        """
        for metric in self.metrics:
            value, weight = values[metric.name], ops.cast(size, "float32")
            if metric.name in _OF_THE_ADVERSARY:  # A step that did not look for it tells nothing.
                value = vectors.quotient(value, ops.cast(is_perturbed, value.dtype))
                weight = weight * is_perturbed
            metric.update_state(value, sample_weight=weight)
        return {metric.name: metric.result() for metric in self.metrics}


class _MeanOfSome(keras.metrics.Mean):
    """A mean that is NaN, and not 0, where there was nothing to be averaged."""

    def result(self):
        mean = super().result()
        return ops.where(self.count > 0, mean, ops.full_like(mean, math.nan))

"""The glue into Keras' `TorchTrainer`: the step runs eagerly."""

import keras
import torch

from keras_sharp.engine._keras import adds_up_metrics
from keras_sharp.engine._torch import num_replicas, read, sum_over_processes


class Trainer:
    """A base of `SharpnessAwareModel`, whose `sharpness_aware_step` is run as `train_step`."""

    model: keras.Model  # The wrapped one.
    _survives_failed_steps = True

    def _divides_batches(self):
        """Whether each replica sees its own part of a batch only."""
        return num_replicas() > 1

    def _as_in_step(self, fn):
        """A pure function of tensors, run as the step is: at once."""
        return fn

    def train_step(self, data):
        return self._with_metrics_of_all(self.sharpness_aware_step, data)

    def test_step(self, data):
        return self._with_metrics_of_all(super().test_step, data)

    def _with_metrics_of_all(self, step, data):
        """Run a step, and let the metrics of each process have seen the data of all."""
        if num_replicas() == 1:
            return step(data)
        # Keras may know how to do so, but not for those of the wrapper itself.
        done = {id(m) for m in self.model.metrics} if adds_up_metrics() else ()
        variables = [v for m in self.metrics if id(m) not in done for v in m.variables]
        before = [read(v).clone() for v in variables]
        logs = step(data)
        metrics = {m.name: m for m in self.metrics if m.name in logs}
        results = {**self.get_metrics_result(), **metrics}
        others = {k: torch.as_tensor(v) for k, v in logs.items() if k not in results}
        new = [read(v) - old for v, old in zip(variables, before, strict=True)]
        sums = sum_over_processes([*new, *others.values()])
        for variable, old, total in zip(variables, before, sums, strict=False):
            variable.assign(old + total)
        means = [total / num_replicas() for total in sums[len(variables) :]]
        logs.update(zip(others, means, strict=True))
        logs.update({name: metric.result() for name, metric in metrics.items()})
        return {**logs, **self.get_metrics_result()}

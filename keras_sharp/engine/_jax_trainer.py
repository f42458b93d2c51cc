"""The glue into Keras' `JAXTrainer`: state in, state out."""

import jax
import keras


class Trainer:
    """A base of `SharpnessAwareModel`, whose `sharpness_aware_step` is run as `train_step`."""

    model: keras.Model  # The wrapped one.
    _survives_failed_steps = (
        False  # Keras gives the weights to a step, which loses them if it fails.
    )

    def _divides_batches(self):
        """Whether each replica sees its own part of a batch only."""
        return keras.distribution.distribution() is not None and (
            self.perturbation_scope == "replica"
        )

    def _as_in_step(self, fn):
        """A pure function of tensors, run as the step is."""
        return jax.jit(fn) if self.jit_compile and not self.run_eagerly else fn

    def compute_loss_and_updates(
        self,
        trainable_variables,
        non_trainable_variables,
        metrics_variables,
        x,
        y,
        sample_weight,
        training=False,
        optimizer_variables=None,
    ):
        # Keras runs the forward pass and the loss in two scopes, and carries
        # the losses of the layers (`add_loss`, activity regularizers) from
        # the one to the other on the model itself. The wrapped model, which
        # computes the loss here, would not see them; one scope does.
        del optimizer_variables  # Only training scales the loss; it does not come here.
        groups = (
            (self.trainable_variables, trainable_variables),
            (self.non_trainable_variables, non_trainable_variables),
            (self.metrics_variables, metrics_variables),
        )
        mapping = [pair for group in groups for pair in zip(*group, strict=True)]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            y_pred = self.model(x, training=training)
            loss = self.compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
            )
        _, non_trainable, metrics = (
            [scope.get_current_value(v) for v in variables] for variables, _ in groups
        )
        return loss, (loss, y_pred, non_trainable, metrics)

    def train_step(self, state, data):
        groups = (
            self.trainable_variables,
            self.non_trainable_variables,
            self.optimizer.variables,
            self.metrics_variables,
        )
        mapping = [
            pair for group in zip(groups, state, strict=True) for pair in zip(*group, strict=True)
        ]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            logs = self.sharpness_aware_step(data)
        return logs, tuple([scope.get_current_value(v) for v in group] for group in groups)

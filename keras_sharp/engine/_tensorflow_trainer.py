"""The glue into Keras' `TensorFlowTrainer`: the step is what `tf.function` traces."""

import contextlib
import functools

import keras
import tensorflow as tf

from keras_sharp.engine import _tensorflow
from keras_sharp.engine._keras import StrategyTrainer, build_symbolically


class Trainer(StrategyTrainer):
    """A base of `SharpnessAwareModel`, whose `sharpness_aware_step` is run as `train_step`."""

    model: keras.Model  # The wrapped one.
    _survives_failed_steps = True

    def _divides_batches(self):
        """Whether each replica sees its own part of a batch only."""
        return self.distribute_strategy.num_replicas_in_sync > 1

    def make_train_function(self, force=False):
        _check_scope(self)
        shares = self._shares_variables()
        if shares:
            _check_distribution(self)
        with self._without_xla(shares or self._is_slow_in_xla()):
            return super().make_train_function(force)

    def make_test_function(self, force=False):
        with self._without_xla(self._shares_variables()):
            return super().make_test_function(force)

    def _as_in_step(self, fn):
        """A pure function of tensors, run as the step is."""
        # A `partial`: see `compiled`. The step is not translated by AutoGraph either.
        return fn if self.run_eagerly else tf.function(functools.partial(fn), autograph=False)

    def _shares_variables(self):
        with self.distribute_strategy.scope():
            return _tensorflow.merges_threads()

    def _is_slow_in_xla(self):
        """Whether XLA had better compile the passes of a step than the step as a whole.

        On CPUs the gradients of convolutions take ten times as long inside of
        a conditional that it compiles (TensorFlow 2.21).
        """
        on_cpus = all(device.device_type == "CPU" for device in tf.config.list_physical_devices())
        return self.method.is_conditional and on_cpus

    @contextlib.contextmanager
    def _without_xla(self, present):
        """Within, Keras makes functions that XLA does not compile as a whole, if `present`.

        It cannot compile a step whose variables lie on several devices, only its passes.
        """
        compiled = self.jit_compile
        self.jit_compile = compiled and not present
        try:
            yield
        finally:
            self.jit_compile = compiled

    def train_step(self, data):
        build_symbolically(self, data)
        by_passes = _tensorflow.merges_threads() or self._is_slow_in_xla()
        compiled = "passes" if by_passes else "step"
        with _tensorflow.compiling(compiled if self.jit_compile else None):
            return _as_vectors(self.sharpness_aware_step(data))

    def test_step(self, data):
        return _as_vectors(super().test_step(data))


def _as_vectors(logs):
    """Several workers: Keras averages logs over their first axis, which scalars do not have."""
    strategy = tf.distribute.get_strategy()
    if (
        not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        or len(strategy.extended.worker_devices) == strategy.num_replicas_in_sync
    ):
        return logs
    return {name: tf.reshape(value, (1,)) for name, value in logs.items()}


def _check_scope(wrapper):
    """Refuse a model whose variables are not those of the strategy that trains it."""
    inner, outer = (type(m.distribute_strategy).__name__ for m in (wrapper.model, wrapper))
    if wrapper.model.distribute_strategy is not wrapper.distribute_strategy:
        raise ValueError(
            "A model and its wrapper must be made in the scope of the same tf.distribute.Strategy. "
            f"Received: a model made in a {inner} and a wrapper made in a {outer}. Make both, and "
            "compile, in `with strategy.scope():`."
        )


def _check_distribution(model):
    """Refuse what Keras cannot do on several replicas."""
    strategy = model.distribute_strategy
    prefix = f"{type(strategy).__name__} with {strategy.num_replicas_in_sync} replicas cannot "
    if model.steps_per_execution > 1:
        raise ValueError(
            f"{prefix}run several steps in one execution. Received: steps_per_execution="
            f"{model.steps_per_execution}. Compile with steps_per_execution=1."
        )
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if optimizer.use_ema and optimizer.ema_overwrite_frequency:
        raise ValueError(
            f"{prefix}overwrite weights with their averages in training. Received an optimizer "
            f"with ema_overwrite_frequency={optimizer.ema_overwrite_frequency}. Leave it at None: "
            "the averages are then written at the end of `fit`."
        )
    if optimizer.gradient_accumulation_steps:
        raise ValueError(
            f"{prefix}accumulate gradients. Received an optimizer with "
            f"gradient_accumulation_steps={optimizer.gradient_accumulation_steps}. To save "
            "memory, use larger batches and SharpnessAwareModel(num_micro_batches=...)."
        )

"""The private names of Keras that cannot be avoided, each with its reason.

`tests/test_private_keras.py` fails loudly when Keras changes one of them.
"""

import contextlib

import keras
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.random.seed_generator import global_seed_generator
from keras.src.trainers.data_adapters import get_data_adapter


def stateless_scope(mapping):
    """A `keras.StatelessScope` for tensors of the right dtype and shape.

    The constructor converts and checks every value, which eager PyTorch pays
    for in each pass. What a step maps are values of the variables themselves.

    Args:
        mapping: pairs of a variable and a tensor.
    """
    return _fill(keras.StatelessScope(collect_losses=True), mapping)


def _fill(scope, mapping):
    scope.state_mapping.update((id(variable), value) for variable, value in mapping)
    return scope


class TrainingScope(keras.StatelessScope):
    """A stateless scope in which assignments mean what they mean in plain training.

    Layers may write to the weights that are trained: `SpectralNormalization`
    puts the normalized kernel into its variable. And they may read what they
    have written. Every assignment in a scope goes through `add_update`.

    Args:
        weights: pairs of a trained variable and a tensor.
        others: pairs of any other variable and a tensor.
        write: function of such a tensor, `None` for any other variable, and
            the assigned value. It returns what the rest of the pass reads, and
            what training leaves in the weight.
    """

    def __init__(self, weights, others, write):
        super().__init__(collect_losses=True)
        _fill(self, [*weights, *others])
        self._trained = {id(variable): value for variable, value in weights}
        self._write = write
        #: What training leaves in the weights that were written, by the `id` of the variable.
        self.written = {}

    def add_update(self, update):
        variable, value = update
        weight = self._trained.get(id(variable))
        value, left = self._write(weight, value)
        if weight is not None:
            self.written[id(variable)] = left
        super().add_update((variable, value))


def share_compiled_state(model, wrapper):
    """Let a wrapper use the losses and metrics of the model that it wraps.

    `compile` makes these objects from strings and functions, once for each of
    the two models. Shared, they are built once, updated once, and both models
    report the same numbers. There is no public way to hand them over.
    """
    for name in ("_compile_loss", "_compile_metrics", "_loss_tracker"):
        # Past `Layer.__setattr__`, which would list the metrics a second time.
        object.__setattr__(wrapper, name, getattr(model, name))


def loss_tracker(model):
    """The metric behind `logs["loss"]`.

    `model.metrics` lists it, too, unless a subclass overrides that property.
    """
    return model._loss_tracker


def losses_of_outputs(model):
    """The metrics behind `logs["a_loss"]`, of a model with several losses.

    `model.metrics` lists them, among others. None if the model has a
    `compute_loss` of its own, which may not use them.
    """
    if type(model).compute_loss is not keras.Model.compute_loss or model._compile_loss is None:
        return []
    return model._compile_loss.metrics


def update_losses_of_outputs(model, y, y_pred, sample_weight):
    """Update the metrics of `losses_of_outputs`: Keras does so when it computes the loss."""
    model._compile_loss(y, y_pred, sample_weight)


def in_order(model, logs):
    """Logs as `train_on_batch` returns them: a list in the order of Keras, or a single number.

    The order follows the metrics inside Keras' own containers, which have no
    public names.
    """
    return model._flatten_metrics_in_order(logs)


def build_symbolically(model, data):
    """Build model, losses, metrics and optimizer from the shapes of a batch.

    Keras calls this itself in `fit` on JAX and PyTorch. On TensorFlow it leaves
    building to the first trace, but a pure function of the weights needs the
    weights before it runs.
    """
    model._symbolic_build(data_batch=data)


class _Seed(keras.random.SeedGenerator):
    """Hands out one seed, which is a tensor: Keras takes none as it is."""

    def __init__(self, seed):
        self._seed = seed  # No variable is made, and none is advanced.

    def next(self, ordered=True):
        del ordered
        return self._seed


def random_uniform(shape, seed, step, draw):
    """Random numbers in [0, 1) that three integers determine, of which two may be tensors."""
    dtype = "uint32" if keras.backend.backend() == "jax" else "int64"
    parts = [keras.ops.cast(number, dtype) for number in (seed, step)]
    # PyTorch adds the two up: far apart, no draw of one step is one of another.
    parts[0] = parts[0] + keras.ops.cast(draw * 15_485_863 % 2**30, dtype)
    return keras.random.uniform(shape, dtype="float32", seed=_Seed(keras.ops.stack(parts)))


def all_layers(model):
    """Every layer of a model, at any depth; `model.layers` lists the first level."""
    return list(model._flatten_layers(include_self=False))


def draw_from_own_seeds(model):
    """Let every random generator of a model draw from the seed that it holds.

    Each has one, in a variable. But without a seed from the user, Keras on
    PyTorch draws dropout masks from the generator of the process, which all
    models and threads share and which no file holds.
    """
    for layer in [model, *all_layers(model)]:
        for generator in layer._seed_generators:
            if generator._initial_seed is None:
                generator._initial_seed = int(keras.ops.convert_to_numpy(generator.state)[0])


def global_seed():
    """The variable behind `keras.random` calls without a seed.

    No layer owns it, yet a pass must start from a known value of it, and the
    next step from a new one.
    """
    return global_seed_generator().state


@contextlib.contextmanager
def exchanging_variables(layer, old):
    """Within, a layer that has lost the variables `old` takes new ones, though it is built.

    Keras fixes the variables of a layer when it is built. There is no public
    way to exchange some, but it does so itself in `enable_lora`.
    """
    tracker = layer._tracker
    locked = tracker.locked
    for variable in old:
        layer._untrack_variable(variable)
    tracker.unlock()
    try:
        yield
    finally:
        if locked:
            tracker.lock()


def data_adapter(x, y, sample_weight, batch_size):
    """What `evaluate` reads arrays, tf.data, PyDataset and DataLoader through.

    With it, data of all these kinds come in the same batches as in `evaluate`,
    converted and checked alike.
    """
    return get_data_adapter(x, y, sample_weight, batch_size=batch_size)


def start_at_epoch(model, epoch):
    """Let the `fit` that begins, or has begun, start at an epoch; `None`: where it was told.

    A callback knows it in `on_train_begin` only, when the arguments are given.
    """
    model._initial_epoch = epoch


def is_saving_legacy_h5():
    """Whether a config is asked for by the legacy HDF5 format.

    It asks for nothing else that a model could refuse, and loads what it cannot
    hold as if it had it.
    """
    return bool(get_global_attribute("use_legacy_config"))


def is_validation_of_fit(kwargs):
    """Whether `fit` has called `evaluate` with these arguments, on its validation data."""
    # There is no public sign, and a preprocessor must not see the same data twice.
    return bool(kwargs.get("_use_cached_eval_dataset"))


def has_mask(tensor):
    """Whether a layer has masked this prediction: the loss leaves some of it out."""
    return get_keras_mask(tensor) is not None


def masks_of(structure):
    """The masks of tensors, by their place in the flat structure.

    Keras keeps a mask as an attribute of its tensor, which a copy does not have.
    """
    masks = enumerate(map(get_keras_mask, keras.tree.flatten(structure)))
    return {i: mask for i, mask in masks if mask is not None}


def set_masks(structure, masks):
    """Give tensors the masks that `masks_of` found at their places."""
    leaves = keras.tree.flatten(structure)
    for i, mask in masks.items():
        set_keras_mask(leaves[i], mask)


@contextlib.contextmanager
def without_reduction(optimizer):
    """Within, `optimizer.apply` takes gradients that are the same on all replicas.

    On TensorFlow it would add them up over the replicas, after having clipped
    the part of each replica by itself.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    attributes, name = vars(optimizer), "_all_reduce_sum_gradients"
    attributes[name] = list  # It hides the method of the class.
    try:
        yield
    finally:
        attributes.pop(name, None)  # Replicas are threads: another one may have done it.


def adds_up_metrics():
    """Whether Keras adds up metrics over the processes of PyTorch: from 3.16 on it does."""
    return keras.Model.get_metrics_result.__module__.endswith("torch.trainer")


class StrategyTrainer:
    """Repairs of what `TensorFlowTrainer` does on several replicas (Keras 3.15)."""

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Build from the batch of one replica: Keras averages them, which several workers can't."""
        strategy = self.distribute_strategy
        if strategy.num_replicas_in_sync == 1 or iterator is None:
            return super()._maybe_symbolic_build(iterator, data_batch)
        for _, _, batches in iterator:
            batch = keras.tree.map_structure(
                lambda t: None if t is None else strategy.experimental_local_results(t)[0],
                next(batches),
            )
            break
        with strategy.scope():
            return build_symbolically(self, batch)

    def _get_metrics_result_or_logs(self, logs):
        """Metrics of all replicas: with logs beside them, Keras has the mean of each replica's."""
        if self.distribute_strategy.num_replicas_in_sync == 1:
            return super()._get_metrics_result_or_logs(logs)
        own = {metric.name: metric.result() for metric in self.metrics if metric.name in logs}
        return {**logs, **own, **self.get_metrics_result()}

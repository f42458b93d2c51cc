"""What a user's program does with a model: data, `compile`, `fit`; and what it sees afterwards."""

import copy
import dataclasses

import keras
import numpy as np

from tests.fuzz.networks import CLASSES, EXTRA, SHAPES, WORDS
from tests.models import BACKEND, KERAS, values

LEARNING_RATE = 0.1


# Data


@dataclasses.dataclass
class Data:
    """Arrays for training, or nested structures of them."""

    x: object
    y: object
    sample_weight: object = None
    class_weight: dict | None = None

    def __len__(self):
        return len(keras.tree.flatten(self.x)[0])

    def part(self, start, end):
        """Some of the examples, as a triple; weights of classes become those of examples."""
        weight = self.sample_weight
        if self.class_weight:
            weight = np.array([self.class_weight[int(c)] for c in np.ravel(self.y)], "float32")
        return tuple(
            None if t is None else keras.tree.map_structure(lambda a: a[start:end], t)
            for t in (self.x, self.y, weight)
        )

    def batches(self, size):
        """The batches that `fit` makes, a last, partial one included."""
        return [self.part(i, min(i + size, len(self))) for i in range(0, len(self), size)]


def data(case, seed=0):
    """Random data for a case."""
    rng = np.random.default_rng([case.seed, seed])
    n, shape = case.examples, SHAPES[case.inputs]
    if case.inputs == "tokens":
        x = rng.integers(1, WORDS, (n, *shape)).astype("int32")
        lengths = rng.integers(1, shape[0] + 1, n)
        x[np.arange(shape[0]) >= lengths[:, None]] = 0  # Masked.
    else:
        x = rng.normal(size=(n, *shape)).astype("float32")
    if case.extra_input:
        x = {"main": x, "extra": rng.normal(size=(n, EXTRA)).astype("float32")}
    steps = shape[:1]
    y = [
        {
            "regression": lambda: rng.normal(size=(n, 2)).astype("float32"),
            "binary": lambda: rng.integers(0, 2, (n, 1)).astype("float32"),
            "classes": lambda: rng.integers(0, CLASSES, (n,)).astype("int32"),
            "steps": lambda: rng.normal(size=(n, *steps, 2)).astype("float32"),
            "steps_classes": lambda: rng.integers(0, CLASSES, (n, *steps)).astype("int32"),
        }[head]()
        for head in case.heads
    ]
    # Of one weight per example, Keras weighs the steps in place of the examples, or raises.
    shapes = [(n, *steps) if "steps" in head else (n,) for head in case.heads]
    weight = [rng.uniform(0.2, 2.0, s).astype("float32") for s in shapes]
    class_weight = {0: 0.5, 1: 2.0, 2: 1.0} if case.class_weight else None
    y, weight = _per_output(case, y), _per_output(case, weight)
    return Data(x, y, weight if case.sample_weight else None, class_weight)


def _per_output(case, parts):
    """One value per output in the structure that Keras expects."""
    if len(parts) == 1:
        return parts[0]
    return {f"out_{i}": p for i, p in enumerate(parts)} if case.named_outputs else parts


class _Dataset(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return _without_none(self.batches[i])


def _without_none(batch):
    return batch if batch[2] is not None else batch[:2]


def fit_arguments(case, data):
    """What `fit` is given, in the form of the case."""
    if case.data == "arrays":
        return {
            "x": data.x,
            "y": data.y,
            "sample_weight": data.sample_weight,
            "class_weight": data.class_weight,
            "batch_size": case.batch_size,
        }
    batches = data.batches(case.batch_size)
    if case.data == "dataset":
        return {"x": _Dataset(batches)}
    arrays = _without_none(data.part(0, len(data)))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        # A list would become one tensor.
        arrays = tuple(tuple(a) if isinstance(a, list) else a for a in arrays)
        return {"x": tf.data.Dataset.from_tensor_slices(arrays).batch(case.batch_size)}
    if BACKEND == "torch":
        return {"x": _data_loader(arrays, case.batch_size)}
    return {"x": _generator(batches, case.epochs), "steps_per_epoch": len(batches)}


def _data_loader(arrays, batch_size):
    import torch

    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return len(keras.tree.flatten(arrays)[0])

        def __getitem__(self, i):
            return keras.tree.map_structure(lambda a: a[i], arrays)

    return torch.utils.data.DataLoader(Examples(), batch_size=batch_size)


def _generator(batches, epochs):
    for _ in range(epochs):
        for batch in batches:
            yield _without_none(batch)


# Compiling


class _Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Falls, as `1 / (1 + step / 2)`."""

    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start / (1.0 + 0.5 * keras.ops.cast(step, "float32"))

    def get_config(self):
        return {"start": self.start}


Schedule = keras.saving.register_keras_serializable(package="tests.fuzz")(_Schedule)


def optimizer(case):
    """The optimizer of a case, with its options."""
    rate = LEARNING_RATE if case.optimizer in ("SGD", "Adagrad", "Ftrl") else 0.2 * LEARNING_RATE
    kwargs = {"learning_rate": Schedule(rate) if case.lr_schedule else rate}
    if case.clip:
        kwargs[case.clip] = 0.1 if case.clip == "clipvalue" else 0.3
    if case.weight_decay:
        kwargs["weight_decay"] = case.weight_decay
    if case.ema:
        kwargs.update(use_ema=True, ema_momentum=0.8)
        kwargs["ema_overwrite_frequency"] = 2 if case.ema == "often" else None
    if case.accumulation:
        kwargs["gradient_accumulation_steps"] = case.accumulation
    if case.optimizer == "SGD" and case.seed % 3 == 0:
        kwargs.update(momentum=0.8, nesterov=case.seed % 2 == 0)
    made = getattr(keras.optimizers, case.optimizer)(**kwargs)
    if case.dtype == "mixed_float16" and case.seed % 2:
        made = keras.optimizers.LossScaleOptimizer(made, initial_scale=2.0**8)
    return made


_LOSS_CLASSES = {
    "mse": "MeanSquaredError",
    "mae": "MeanAbsoluteError",
    "huber": "Huber",
    "log_cosh": "LogCosh",
    "cosine_similarity": "CosineSimilarity",
    "binary_crossentropy": "BinaryCrossentropy",
    "binary_focal_crossentropy": "BinaryFocalCrossentropy",
    "squared_hinge": "SquaredHinge",
    "sparse_categorical_crossentropy": "SparseCategoricalCrossentropy",
}
_METRIC_CLASSES = {
    "root_mean_squared_error": lambda: keras.metrics.RootMeanSquaredError(name="rmse"),
    "auc": lambda: keras.metrics.AUC(num_thresholds=10, name="auc"),
    "precision": lambda: keras.metrics.Precision(name="precision"),
    "sparse_top_k": lambda: keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2"),
}


def compile_arguments(case, mode=None):
    """What `compile` is given. Each call makes objects of its own."""
    from tests.fuzz.cases import METRICS

    mode = mode or case.mode
    losses = [getattr(keras.losses, _LOSS_CLASSES[n])() if case.loss_objects else n
              for n in case.losses]  # fmt: skip

    def metrics(offset):
        chosen = []
        for head in case.heads:
            names = METRICS[head]
            chosen.append(
                [names[(case.seed + offset + j) % len(names)] for j in range(min(2, len(names)))]
            )
        made = [[_METRIC_CLASSES[n]() if n in _METRIC_CLASSES else n for n in ns] for ns in chosen]
        return _per_output(case, made)

    return {
        "optimizer": optimizer(case),
        "loss": _per_output(case, losses),
        "loss_weights": _per_output(case, [0.5, 2.0][: len(case.heads)])
        if case.loss_weights
        else None,
        "metrics": metrics(0) if case.metrics else None,
        "weighted_metrics": metrics(1) if case.weighted_metrics else None,
        "run_eagerly": mode == "eager",
        "jit_compile": mode == "xla" or (mode == "graph" and BACKEND == "jax"),
        "steps_per_execution": case.steps_per_execution if mode != "eager" else 1,
    }


# Training


def train(model, case, data, validation=None):
    """Train as the case says: the logs of each epoch, or of each batch."""
    if case.call == "train_on_batch":
        logs = []
        for _ in range(case.epochs):
            for x, y, weight in data.batches(case.batch_size):
                if KERAS < (3, 15):  # It adds up over calls.
                    model.reset_metrics()
                logs.append(model.train_on_batch(x, y, sample_weight=weight, return_dict=True))
        return [{k: np.array(v) for k, v in one.items()} for one in copy.copy(logs)]
    kwargs = fit_arguments(case, data)
    if case.validation:
        kwargs["validation_data"] = validation.part(0, len(validation))
        kwargs["validation_batch_size"] = case.batch_size
    history = model.fit(**kwargs, epochs=case.epochs, shuffle=False, verbose=0).history
    return [{k: np.array(v[i]) for k, v in history.items()} for i in range(case.epochs)]


#: What `SharpnessAwareModel` adds to the logs of plain Keras.
ADDED = ("rho", "perturbed_loss", "sharpness", "grad_norm", "grad_cosine", "skipped_steps")


@dataclasses.dataclass
class Outcome:
    """What is left of a training: NumPy arrays."""

    weights: list
    state: list
    slots: list
    logs: list
    movement: float

    def without_added_logs(self):
        """As plain Keras would report it."""
        logs = [{k: v for k, v in one.items() if k not in ADDED} for one in self.logs]
        return dataclasses.replace(self, logs=logs)


def outcome(model, start, logs):
    """What is left of the training of a plain model (or of that in a wrapper)."""
    weights = values(model.trainable_variables)
    moved = [np.max(np.abs(a - b), initial=0.0) for a, b in zip(weights, start, strict=True)]
    slots = [] if model.optimizer is None else values(model.optimizer.variables)
    return Outcome(
        weights=weights,
        state=values(model.non_trainable_variables),
        slots=slots,
        logs=logs,
        movement=float(max(moved)),
    )

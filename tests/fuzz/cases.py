"""A case: everything that decides one random training, as plain data made from a seed.

The same seed is the same case on every backend, today and next year: that is why each choice
below draws from one `random.Random`, in a fixed order. A case that fails is shrunk by dropping
its features one at a time.
"""

import dataclasses
import json
import random

import keras

#: The building blocks of the trunk, by the kind of tensor that they take and return.
#: `tests/fuzz/networks.py` makes a layer of each.
BLOCKS = {
    "vector": [
        "dense", "dense_gelu", "prelu", "einsum_dense", "shared", "residual", "spectral", "lora",
        "batchnorm", "layernorm", "groupnorm", "rmsnorm", "unitnorm",
        "dropout", "alpha_dropout", "gaussian_noise", "gaussian_dropout",
        "add_loss", "activity", "unused", "counter", "moving_average",
    ],
    "image": [
        "conv", "depthwise", "separable", "transpose", "residual_conv", "spectral_conv",
        "lora_conv", "maxpool", "avgpool", "upsample",
        "batchnorm", "layernorm", "groupnorm", "rmsnorm",
        "dropout", "spatial_dropout", "gaussian_noise", "add_loss", "unused",
    ],
    "sequence": [
        "steps_dense", "conv1d", "separable1d", "time_distributed", "lstm", "gru", "rnn",
        "rnn_dropout", "bidirectional", "attention", "grouped_attention", "residual",
        "batchnorm", "layernorm", "rmsnorm",
        "dropout", "spatial_dropout1d", "gaussian_noise", "add_loss", "moving_average",
    ],
}  # fmt: skip

RECURRENT = {"lstm", "gru", "rnn", "rnn_dropout", "bidirectional"}

#: What is read in, and the kind of tensor that the trunk works on.
INPUTS = {"vector": "vector", "image": "image", "sequence": "sequence", "tokens": "sequence"}
HEADS = ("regression", "binary", "classes", "steps", "steps_classes")
LOSSES = {
    "regression": ["mse", "mae", "huber", "log_cosh", "cosine_similarity"],
    "binary": ["binary_crossentropy", "binary_focal_crossentropy", "squared_hinge"],
    "classes": ["sparse_categorical_crossentropy"],
    "steps": ["mse", "log_cosh"],
    "steps_classes": ["sparse_categorical_crossentropy"],
}
METRICS = {
    "regression": ["mae", "mse", "root_mean_squared_error"],
    "binary": ["accuracy", "auc", "precision"],
    "classes": ["accuracy", "sparse_top_k"],
    "steps": ["mae"],
    "steps_classes": ["accuracy", "sparse_categorical_crossentropy"],
}
#: The methods of the first cases, and those that came later, with the policies: these are drawn
#: behind all else, from this seed on, so that the cases before it stay what they were.
METHODS = (None, "sam", "sam", "asam", "gsam", "adaptive_gsam", "bsam")
NEWER_FROM = 10_000
NEWER = ("looksam", "momentum_sam", "async_sam", "friendly_sam", "wsam", "ascent_share")
#: Those that take no gradient of the whole batch at the weights.
AHEAD = ("momentum_sam", "async_sam", "ascent_share")
POLICIES = ("every_2", "from_1", "until_1", "from_every")
NEIGHBORHOODS = (
    "euclidean", "ball_3", "ball_inf", "adaptive", "adaptive_3", "weight_scaled", "unnormalized",
)  # fmt: skip

#: Optimizers of Keras that are no optimizers by themselves.
_NO_OPTIMIZERS = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer", "OptimizerMap"}
#: Every other one: a new one in Keras joins by itself.
OPTIMIZERS = sorted(
    name
    for name, value in vars(keras.optimizers).items()
    if isinstance(value, type)
    and issubclass(value, keras.optimizers.Optimizer)
    and name not in _NO_OPTIMIZERS
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One training. The defaults are what a shrunk case comes down to."""

    seed: int = 0
    # The model
    inputs: str = "vector"
    blocks: tuple = ()
    topology: str = "functional"  # or sequential, nested, subclassed
    heads: tuple = ("regression",)
    named_outputs: bool = False
    extra_input: bool = False
    built: bool = True
    frozen: bool = False
    seeded: bool = True
    regularizer: str | None = None
    constraint: str | None = None
    dtype: str = "float32"
    # The method
    method: str | None = "sam"
    policy: str | None = None
    rho: float = 0.0
    scheduled: bool = False
    neighborhood: str = "euclidean"
    ascent_steps: int = 1
    second_order: bool = False
    micro_batches: int = 1
    perturb: str = "all"
    extra_logs: bool = False
    # The optimizer
    optimizer: str = "SGD"
    clip: str | None = None
    weight_decay: float | None = None
    ema: str | None = None  # "end", or "often"
    accumulation: int | None = None
    lr_schedule: bool = False
    # The loss and the metrics
    losses: tuple = ("mse",)
    loss_objects: bool = False
    loss_weights: bool = False
    metrics: bool = False
    weighted_metrics: bool = False
    # The data
    data: str = "arrays"  # or dataset (PyDataset), native (tf.data, DataLoader, generator)
    examples: int = 8
    batch_size: int = 4
    sample_weight: bool = False
    class_weight: bool = False
    validation: bool = False
    # How it is run
    call: str = "fit"  # or train_on_batch
    epochs: int = 1
    mode: str = "eager"  # or graph, xla
    steps_per_execution: int = 1
    # What is checked beside the numbers of one training
    judged: bool = False
    again: bool = False
    resume: bool = False
    other_mode: bool = False

    def to_json(self):
        """What differs from the defaults."""
        changed = {k: v for k, v in dataclasses.asdict(self).items() if v != DEFAULTS[k]}
        return json.dumps(changed)

    @classmethod
    def from_json(cls, text):
        return cls(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        )

    def features(self):
        """The names of what this case tries, for the summary."""
        for name, value in dataclasses.asdict(self).items():
            if name in ("blocks", "heads", "losses"):
                yield from (f"{name}: {v}" for v in sorted(set(value)))
            elif name == "rho":
                yield f"rho: {'0' if value == 0 else '> 0'}"
            elif name != "seed":
                yield f"{name}: {value}"


DEFAULTS = dataclasses.asdict(Case())


def generate(seed):
    """The case of a seed."""
    r = random.Random(seed)

    def chance(p, value=True, otherwise=False):
        return value if r.random() < p else otherwise

    inputs = r.choice(list(INPUTS))
    kind = INPUTS[inputs]
    blocks = tuple(r.choice(BLOCKS[kind]) for _ in range(r.choice([1, 2, 2, 3, 4])))
    heads = [h for h in HEADS if kind == "sequence" or not h.startswith("steps")]
    heads = tuple(r.choice(heads) for _ in range(chance(0.25, 2, 1)))
    topology = r.choice(["functional", "functional", "sequential", "nested", "subclassed"])
    extra_input = chance(0.15)
    if topology == "sequential" and (extra_input or len(heads) > 1):
        topology = "functional"
    method = r.choice(METHODS)
    examples, batch_size = r.choice([(8, 4)] * 4 + [(4, 4), (12, 6), (10, 4), (9, 4)])
    case = Case(
        seed=seed,
        inputs=inputs,
        blocks=blocks,
        topology=topology,
        heads=heads,
        named_outputs=chance(0.5),
        extra_input=extra_input,
        built=chance(0.8),
        frozen=chance(0.1),
        seeded=chance(0.7),
        regularizer=chance(0.15, r.choice(["l1", "l2", "l1l2", "orthogonal"]), None),
        constraint=chance(0.1, r.choice(["max_norm", "unit_norm", "non_neg"]), None),
        dtype=chance(0.75, "float32", r.choice(["mixed_float16", "mixed_bfloat16", "float64"])),
        method=method,
        rho=chance(0.45, 0.0, r.choice([0.05, 0.1, 0.3])),
        scheduled=chance(0.1),
        neighborhood=chance(0.4, "euclidean", r.choice(NEIGHBORHOODS)),
        ascent_steps=r.choice([1, 1, 1, 2, 3]),
        second_order=chance(0.12),
        micro_batches=r.choice([1, 1, 2, 3]),
        perturb=r.choice(["all", "all", "no_bias_no_norm", "norm_only", "function"]),
        extra_logs=chance(0.3),
        optimizer=chance(0.25, "SGD", r.choice(OPTIMIZERS)),
        clip=chance(0.2, r.choice(["clipnorm", "global_clipnorm", "clipvalue"]), None),
        weight_decay=chance(0.15, 0.01, None),
        ema=chance(0.15, r.choice(["end", "often"]), None),
        accumulation=chance(0.12, r.choice([2, 3]), None),
        lr_schedule=chance(0.15),
        losses=tuple(r.choice(LOSSES[h]) for h in heads),
        loss_objects=chance(0.4),
        loss_weights=chance(0.4),
        metrics=chance(0.7),
        weighted_metrics=chance(0.2),
        data=r.choice(["arrays", "arrays", "dataset", "native"]),
        examples=examples,
        batch_size=batch_size,
        sample_weight=chance(0.25),
        class_weight=chance(0.15),
        validation=chance(0.15),
        call=r.choice(["fit", "fit", "fit", "train_on_batch"]),
        epochs=r.choice([1, 1, 2]),
        mode=r.choice(["eager"] * 8 + ["graph", "xla"]),
        steps_per_execution=r.choice([1, 1, 1, 1, 2]),
        judged=chance(0.2),
        again=chance(0.1),
        resume=chance(0.15),
        other_mode=chance(0.06),
    )
    if seed >= NEWER_FROM:
        method = chance(0.6, r.choice(NEWER), method or "sam")
        policy = chance(0.5, r.choice(POLICIES), None)
        case = dataclasses.replace(case, method=method, policy=policy)
    return sensible(case)


def is_overwriting(block):
    """Whether a layer assigns to weights and reads them in the same pass."""
    return "spectral" in block or block == "moving_average"


def sensible(case):
    """The case without what cannot be asked for: what Keras or keras_sharp would refuse."""
    changes = {}
    if case.topology == "sequential" and (case.extra_input or len(case.heads) > 1):
        changes["topology"] = "functional"
    if len(case.heads) == 1:
        changes.update(named_outputs=False, loss_weights=False)
    # These draw the seeds of their initializers when they are built, or, on PyTorch, their masks.
    words = ("lora", "attention", "spectral", "rnn_dropout")
    late = any(word in b for b in case.blocks for word in words)
    if case.topology not in ("sequential", "subclassed") or late:
        changes["built"] = True
    if case.sample_weight or case.heads not in (("classes",), ("binary",)):
        changes["class_weight"] = False
    if case.call == "train_on_batch":
        changes.update(data="arrays", validation=False, steps_per_execution=1)
    if case.call == "train_on_batch" or case.data != "arrays":
        changes["class_weight"] = False
    if case.mode == "eager":
        changes["steps_per_execution"] = 1
    if case.method is None:
        changes.update(rho=0.0, second_order=False, ascent_steps=1, scheduled=False)
        changes.update(neighborhood="euclidean", perturb="all", policy=None)
    if case.method in AHEAD:
        changes.update(ascent_steps=1, second_order=False)
        # What a layer makes of perturbed weights is nothing that the formula knows.
        changes["blocks"] = tuple(b for b in case.blocks if not is_overwriting(b))
    if case.method in ("asam", "adaptive_gsam"):  # They have a neighborhood of their own.
        changes["neighborhood"] = "euclidean"
    norms = {"batchnorm", "layernorm", "groupnorm", "rmsnorm"}
    if case.perturb == "norm_only" and not norms & set(case.blocks[case.frozen :]):
        changes["perturb"] = "all"
    if case.rho == 0:
        changes["scheduled"] = False
    # Recurrent layers take many small operations per step: then no more than two passes or parts.
    if sum(b in RECURRENT for b in case.blocks) * case.ascent_steps * case.micro_batches > 2:
        changes.update(ascent_steps=1, micro_batches=min(2, case.micro_batches))
        blocks = changes.get("blocks", case.blocks)
        found = [i for i, b in enumerate(blocks) if b in RECURRENT]
        changes["blocks"] = tuple(b for i, b in enumerate(blocks) if i not in found[1:])
    return dataclasses.replace(case, **changes)


def lean(case):
    """The case at a fraction of its cost, for tests where compiling takes most of the time."""
    return dataclasses.replace(
        case,
        blocks=case.blocks[:2],
        ascent_steps=min(2, case.ascent_steps),
        micro_batches=min(2, case.micro_batches),
        examples=8,
        batch_size=4,
        epochs=1,
        validation=False,
        again=False,
        other_mode=False,
        judged=case.seed % 10 == 0,
        resume=case.seed % 10 == 5,
    )


def simpler(case):
    """Cases with one feature less."""
    for i in range(len(case.blocks)):
        yield dataclasses.replace(case, blocks=case.blocks[:i] + case.blocks[i + 1 :])
    for i in range(len(case.heads)):
        if len(case.heads) > 1:
            yield dataclasses.replace(
                case,
                heads=case.heads[:i] + case.heads[i + 1 :],
                losses=case.losses[:i] + case.losses[i + 1 :],
            )
    for name, default in DEFAULTS.items():
        if name in ("seed", "blocks", "heads", "losses", "inputs", "rho"):
            continue
        if getattr(case, name) != default:
            yield dataclasses.replace(case, **{name: default})
    if case.heads == ("regression",) and case.losses != ("mse",):
        yield dataclasses.replace(case, losses=("mse",))
    elif case.heads[0] != "regression" and len(case.heads) == 1:
        yield dataclasses.replace(case, heads=("regression",), losses=("mse",))


def shrink(case, fails):
    """The case with every feature dropped that it takes no part in the failure.

    Args:
        case: a `Case` that fails.
        fails: function of a case, whether it fails as well.
    """
    tried = {case}
    progress = True
    while progress:
        progress = False
        for candidate in simpler(case):
            candidate = sensible(candidate)
            if candidate in tried:
                continue
            tried.add(candidate)
            if fails(candidate):
                case, progress = candidate, True
                break
    return case

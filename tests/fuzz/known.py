"""What is not tried, and why: each line names whose fault it is."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from tests.fuzz.cases import is_overwriting
from tests.models import BACKEND


class Known(NamedTuple):
    """A combination that is left out.

    Attributes:
        reason: whose it is, and what happens.
        backends: where.
        applies: function of a case.
        instead: the fields of a case that take its place.
    """

    reason: str
    backends: tuple
    applies: Callable
    instead: Callable


def _writes(case):
    return any(is_overwriting(b) for b in case.blocks)


def _has_penalty(case):
    """Whether the loss has more than one term."""
    return case.regularizer or any(b in ("activity", "add_loss") for b in case.blocks)


def is_noisy(case):
    """Whether a layer draws random numbers in a training pass."""
    return any(word in b for b in case.blocks for word in ("drop", "noise", "attention"))


ALL = ("tensorflow", "jax", "torch")

TABLE = [
    Known(
        "JAX has no float64 unless the whole program asks for it",
        ("jax",),
        lambda c: c.dtype == "float64",
        lambda c: {"dtype": "float32"},
    ),
    Known(
        "dropout without a seed, in a model that is not built, draws from PyTorch's generator",
        ("torch",),
        lambda c: not c.seeded and not c.built,
        lambda c: {"built": True},
    ),
    Known(
        "Keras on PyTorch: in mixed precision, what a layer assigns goes into a copy, and is lost",
        ("torch",),
        lambda c: c.dtype.startswith("mixed") and _writes(c),
        lambda c: {"dtype": "float32"},
    ),
    Known(
        "Keras saves what LoRA makes of a kernel, not the two factors",
        ALL,
        lambda c: c.resume and any("lora" in b for b in c.blocks),
        lambda c: {"resume": False},
    ),
    Known(
        "Keras: jit_compile on PyTorch is torch.compile, minutes per case",
        ("torch",),
        lambda c: c.mode == "xla",
        lambda c: {"mode": "graph"},
    ),
    Known(
        "JAX compiles each operation by itself where it runs eagerly: a minute per case",
        ("jax",),
        lambda c: c.mode == "eager" and c.seed % 50,
        lambda c: {"mode": "graph"},
    ),
    Known(
        "Keras: the loss is float32 and the penalty of a regularizer float64: their sum raises",
        ("tensorflow",),
        lambda c: (
            c.dtype == "float64" and (c.regularizer or {"activity", "add_loss"} & {*c.blocks})
        ),
        lambda c: {"dtype": "float32"},
    ),
    Known(
        "Keras: the loss is float32, the penalty of an activation has 16 bits: their sum raises",
        ("tensorflow",),
        lambda c: c.dtype.startswith("mixed") and "activity" in c.blocks,
        lambda c: {"dtype": "float32"},
    ),
    Known(
        "Keras: the factors of LoRA are float32 whatever the layer is, and Muon mixes dtypes",
        ("tensorflow",),
        lambda c: (
            c.dtype == "float64" and (c.optimizer == "Muon" or any("lora" in b for b in c.blocks))
        ),
        lambda c: {"dtype": "float32"},
    ),
    Known(
        "Keras: ScheduleFreeAdamW, built while a graph is traced, does not start from the weights",
        ("tensorflow",),
        lambda c: (
            c.optimizer == "ScheduleFreeAdamW"
            and (c.mode != "eager" or c.other_mode or c.steps_per_execution > 1)
        ),
        lambda c: {"optimizer": "AdamW"},
    ),
    Known(
        "Keras: ScheduleFreeAdamW copies the weights when it is built, and plain training builds "
        "it after the first pass here, before it on the other backends, as the wrapper does",
        ("tensorflow",),
        lambda c: c.optimizer == "ScheduleFreeAdamW" and _writes(c),
        lambda c: {"optimizer": "AdamW"},
    ),
    Known(
        "Keras: the losses of each output are means over batches in a graph, over examples else",
        ("tensorflow",),
        lambda c: len(c.heads) > 1 and (c.other_mode or (c.judged and c.mode != "eager")),
        lambda c: {"other_mode": False, "judged": False},
    ),
    Known(
        "Keras: and so the formula, which runs without a graph, is theirs where batches are equal",
        ("tensorflow",),
        lambda c: (
            len(c.heads) > 1
            and c.mode != "eager"
            and c.examples % c.batch_size > 0
            and not plain_is_reference(c)
        ),
        lambda c: {"examples": c.batch_size * -(-c.examples // c.batch_size)},
    ),
    Known(
        "Keras: after a fit with use_ema a second one raises, and so does saving in between",
        ("jax",),
        lambda c: c.resume and c.ema is not None,
        lambda c: {"resume": False},
    ),
    Known(
        "JAX: attention of float16 under XLA wants a product that it does not have on a CPU",
        ("jax",),
        lambda c: (
            c.mode == "xla" and "float16" in c.dtype and any("attention" in b for b in c.blocks)
        ),
        lambda c: {"dtype": "float32"},
    ),
    Known(
        "Keras loses `training` on the way to a layer in a layer of one's own, in a subclassed "
        "model: `stateless_call` enters no call, and the dropout inside is not applied",
        ("jax",),
        lambda c: c.topology == "subclassed" and "attention" in c.blocks,
        lambda c: {"topology": "functional"},
    ),
    Known(
        "Keras: SparseTopKCategoricalAccuracy raises on predictions of float64",
        ("tensorflow",),
        lambda c: c.dtype == "float64" and "classes" in c.heads,
        lambda c: {"metrics": False, "weighted_metrics": False},
    ),
    Known(
        "Keras: a PyDataset whose targets are a list, one per output, raises",
        ("tensorflow",),
        lambda c: c.data == "dataset" and len(c.heads) > 1 and not c.named_outputs,
        lambda c: {"data": "arrays"},
    ),
    Known(
        "the formula takes second derivatives by differences there, in float32, which do not see "
        "how far an adversary that nothing holds back climbs where the loss is curved",
        ("tensorflow",),
        lambda c: c.second_order and c.neighborhood == "unnormalized" and c.rho > 0,
        lambda c: {"second_order": False},
    ),
    Known(
        "TensorFlow draws other random numbers under XLA, and the formula runs without",
        ("tensorflow",),
        lambda c: c.mode == "xla" and is_noisy(c) and not plain_is_reference(c),
        lambda c: {"mode": "graph"},
    ),
    Known(
        "TensorFlow draws other random numbers under XLA",
        ("tensorflow",),
        lambda c: c.other_mode and is_noisy(c),
        lambda c: {"other_mode": False},
    ),
    Known(
        "PyTorch: the first gradient of attention is wrong on a CPU where a mask leaves a query no "
        "key, as for padding; the second is taken of another kernel",
        ("torch",),
        lambda c: c.inputs == "tokens" and c.second_order and any("att" in b for b in c.blocks),
        lambda c: {"second_order": False},
    ),
    Known(
        "Keras multiplies the sample weights that it evaluates with by the mask, in place",
        ("torch",),
        lambda c: c.inputs == "tokens" and c.sample_weight and c.weighted_metrics,
        lambda c: {"weighted_metrics": False},
    ),
    Known(
        "Keras: steps_per_execution must be 1 on PyTorch",
        ("torch",),
        lambda c: c.steps_per_execution > 1,
        lambda c: {"steps_per_execution": 1},
    ),
]


#: Where plain Keras is no reference, and the formula takes its place: reason, backends, cases.
PLAIN_DIFFERS = [
    (
        "Keras hands the optimizer the rows of an Embedding's gradient, one per token: of a token "
        "that occurs twice, Adam sums the squares in place of squaring the sum",
        ("tensorflow",),
        lambda c: c.inputs == "tokens",
    ),
    (
        "Keras loses the masks of predictions in the metrics of training",
        ("jax",),
        lambda c: c.inputs == "tokens" and (c.metrics or c.weighted_metrics),
    ),
    (
        "Keras multiplies sample weights by the mask in place: weighted metrics see the product",
        ("torch",),
        lambda c: c.inputs == "tokens" and c.sample_weight,
    ),
]


def plain_is_reference(case):
    """Whether the training must be that of plain Keras; else it must be what the formula says."""
    differs = any(BACKEND in backends and applies(case) for _, backends, applies in PLAIN_DIFFERS)
    return case.rho == 0 and case.micro_batches == 1 and not differs


def avoid(case):
    """The case without what `TABLE` leaves out here, and the reasons."""
    reasons = []
    for entry in TABLE:
        if BACKEND in entry.backends and entry.applies(case):
            case = dataclasses.replace(case, **entry.instead(case))
            reasons.append(entry.reason)
    return case, reasons

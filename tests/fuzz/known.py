"""What is not tried, and why: each line names whose fault it is."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

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


ALL = ("tensorflow", "jax", "torch")

TABLE = [
    Known(
        "JAX has no float64 unless the whole program asks for it",
        ("jax",),
        lambda c: c.dtype == "float64",
        lambda c: {"dtype": "float32"},
    ),
    Known(
        "Keras refuses random numbers without a seed in a traced function on JAX",
        ("jax",),
        lambda c: False,
        lambda c: {"seeded": True},
    ),
    Known(
        "dropout without a seed draws from PyTorch's generator",
        ("torch",),
        lambda c: not c.seeded,
        lambda c: {"seeded": True},
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
        "what a layer writes to its trainable weights, with an adversary: no formula yet",
        ALL,
        lambda c: any("spectral" in b for b in c.blocks) and (c.rho > 0 or c.micro_batches > 1),
        lambda c: {"blocks": tuple(b for b in c.blocks if "spectral" not in b)},
    ),
]


def avoid(case):
    """The case without what `TABLE` leaves out here, and the reasons."""
    reasons = []
    for entry in TABLE:
        if BACKEND in entry.backends and entry.applies(case):
            case = dataclasses.replace(case, **entry.instead(case))
            reasons.append(entry.reason)
    return case, reasons

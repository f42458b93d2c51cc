"""From plain training to SAM, and back."""

import numpy as np
from results import (
    NAMES,
    NUMBERS,
    UNDERSTANDING_SAM,
    Comparison,
    claim,
    entries,
    every_table,
    mean_and_error,
    methods,
    panels,
)

SHOWN = ("accuracy", "best", "memorized")


def values(content, method, number="accuracy"):
    return [NUMBERS[number].read(run) for run in entries(content, stage="final", method=method)]


def claims(content):
    def compared(pairs):
        return [
            Comparison(values(content, a), values(content, b), NUMBERS["accuracy"], where)
            for a, b, where in pairs
        ]

    moments = content["settings"]["moments"]
    late = [(t, f"from {t:g}") for t in moments]
    yield claim(
        "SAM that begins late is more accurate than plain training",
        UNDERSTANDING_SAM,
        "a picture",
        compared([(method, "sgd", f"the last {1 - t:.0%}: ") for t, method in late]),
    )
    yield claim(
        "and than SAM that ends there",
        UNDERSTANDING_SAM,
        "a picture",
        compared(
            [
                (method, f"until {t:g}", f"the last {1 - t:.0%} and the first {t:.0%}: ")
                for t, method in late
            ]
        ),
    )


TABLES = {"switching": lambda content: methods(content, SHOWN)}


def summary(content):
    return every_table(content, SHOWN)


def picture(content):
    """The accuracy over the moment of the switch, and what was learned by heart over the epochs."""
    moments, epochs = content["settings"]["moments"], content["settings"]["epochs"]
    figure, ((left, right),) = panels(1, 2, width=5.2)
    for color, which, ends in (("C1", "from", ("sam", "sgd")), ("C2", "until", ("sgd", "sam"))):
        # From the very beginning, or until the very end, is SAM all along.
        over_time = [ends[0], *(f"{which} {t:g}" for t in moments), ends[1]]
        means, errors = zip(
            *(mean_and_error(values(content, method)) for method in over_time), strict=True
        )
        label = {"from": "SAM from there on", "until": "SAM until there"}[which]
        left.errorbar(
            [0, *moments, 1], means, errors, marker="o", color=color, capsize=3, label=label
        )
    left.set(xlabel="the moment, as a share of training", ylabel="test accuracy, %")
    left.legend(frameon=False)
    middle = moments[len(moments) // 2]
    for color, method in (
        ("C0", "sgd"),
        ("C3", "sam"),
        ("C1", f"from {middle:g}"),
        ("C2", f"until {middle:g}"),
    ):
        curves = [run["memorized"] for run in entries(content, stage="final", method=method)]
        right.plot(
            range(1, epochs + 1),
            100 * np.mean(curves, 0),
            color=color,
            label=NAMES[method],
        )
    right.set(xlabel="epoch", ylabel="wrong labels learned by heart, %")
    right.legend(frameon=False, fontsize=8)
    return figure

"""MNIST: the claims of the Adaptive-GSAM report, and its curves."""

from typing import NamedTuple

import numpy as np
from results import (
    ADAPTIVE_GSAM,
    NAMES,
    claim,
    compared,
    dots,
    entries,
    every_table,
    methods,
    panels,
    verdict,
)

SHOWN = ("accuracy", "loss")


def claims(content):
    yield claim(
        "Adaptive-GSAM is more accurate than GSAM on MNIST",
        ADAPTIVE_GSAM,
        "98.5 % against 95.3 %",
        compared(content, "accuracy", "adaptive_gsam", "gsam"),
    )
    yield claim(
        "its test loss is lower",
        ADAPTIVE_GSAM,
        "0.01 against 0.04",
        compared(content, "loss", "adaptive_gsam", "gsam"),
    )
    for name in ("rho", "alpha"):
        yield claim(
            f"Adaptive-GSAM is less sensitive to {name} than GSAM",
            ADAPTIVE_GSAM,
            "-",
            [Curves(*(list(losses(content, name, m)) for m in ("adaptive_gsam", "gsam")))],
        )


class Curves(NamedTuple):
    """What two methods lose over their curves, seed by seed."""

    better: list
    worse: list

    @property
    def text(self):
        ours = [
            f"{np.mean(values):.2f} (seeds: {', '.join(f'{v:.2f}' for v in values)})"
            for values in self
        ]
        return f"accuracy lost on average over the curve, in %: {ours[0]} against {ours[1]}"

    @property
    def verdict(self):
        return verdict(*self, True)


def losses(content, name, method):
    """By how much the points of a curve lie below its best one, on average; one per seed."""
    found = entries(content, stage=name, method=method)
    for seed in sorted({e["seed"] for e in found}):
        accuracies = [100 * e["test_accuracy"] for e in found if e["seed"] == seed]
        yield max(accuracies) - float(np.mean(accuracies))


TABLES = {"mnist_cnn": lambda content: methods(content, SHOWN)}


def summary(content):
    return every_table(content, SHOWN)


def picture(content):
    figure, ((left, middle, right),) = panels(1, 3, width=4.2)
    dots(left, content, "accuracy")
    for panel, name in ((middle, "rho"), (right, "alpha")):
        for method, color in (("gsam", "C3"), ("adaptive_gsam", "C4")):
            runs = entries(content, stage=name, method=method)
            values = sorted({e["setting"][name] for e in runs})
            curves = [
                [100 * e["test_accuracy"] for e in runs if e["setting"][name] == value]
                for value in values
            ]
            low, high = ([f(curve) for curve in curves] for f in (np.min, np.max))
            mean = [np.mean(curve) for curve in curves]
            panel.plot(values, mean, marker="o", color=color, label=NAMES[method])
            panel.fill_between(values, low, high, color=color, alpha=0.15, lw=0)
        panel.set(xlabel=name, ylabel="test accuracy, %", xscale="log")
    middle.legend(frameon=False, loc="lower left")
    return figure

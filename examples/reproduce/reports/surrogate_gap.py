"""The surrogate gap, the perturbed loss and the largest eigenvalue."""

from typing import NamedTuple

import numpy as np
from results import GSAM, NAMES, Correlation, claim, entries, panels

#: What is compared with the largest eigenvalue: how it is called, and how it is read.
MEASURES = {
    "the gap, after 20 steps": lambda run: run["gap"],
    "the gap, after one step": lambda run: run["gap_1_step"],
    "the perturbed loss": lambda run: run["train_loss"] + run["gap"],
}


def eigenvalues(runs):
    return [run["lambda_1"] for run in runs]


def correlations(content):
    runs = entries(content, stage="final")
    return {
        name: Correlation(list(map(read, runs)), eigenvalues(runs))
        for name, read in MEASURES.items()
    }


def claims(content):
    highest, one_step, perturbed = correlations(content).values()
    yield claim(
        "the surrogate gap ranks networks by λ₁",
        GSAM,
        "a proof, near a minimum",
        [highest._replace(where="highest loss: "), one_step._replace(where="SAM's one step: ")],
    )
    yield claim("the perturbed loss does not", GSAM, "a proof that it need not", [Fails(perturbed)])


class Fails(NamedTuple):
    """The claim that there is no correlation such as this."""

    correlation: Correlation

    @property
    def text(self):
        return self.correlation.text

    @property
    def verdict(self):
        return "does not hold" if self.correlation.verdict == "holds" else "holds"


def table(content):
    runs = entries(content, stage="final")
    lines = [
        "| | rank correlation with λ₁ | 2 h / rho² over λ₁: median, all between |",
        "|---|---|---|",
    ]
    for name, found in correlations(content).items():
        ratio = 2 * np.divide(found.x, eigenvalues(runs)) / content["settings"]["rho_measured"] ** 2
        cells = f"{np.median(ratio):.2f}, {ratio.min():.2f} and {ratio.max():.2f}"
        lines.append(f"| {name} | {found.coefficient:.2f} | {cells if 'gap' in name else '-'} |")
    return lines


TABLES = {"surrogate_gap": table}


def summary(content):
    return ["", *table(content)]


def picture(content):
    """Both gaps, as eigenvalues, and the perturbed loss, over the largest eigenvalue."""
    runs, rho = entries(content, stage="final"), content["settings"]["rho_measured"]
    figure, ((left, right),) = panels(1, 2, width=5.2)
    for color, (name, read) in zip(("C0", "C1"), MEASURES.items(), strict=False):
        values = [2 * read(run) / rho**2 for run in runs]
        left.plot(eigenvalues(runs), values, "o", color=color, ms=4, alpha=0.7, label=name)
    ends = [min(eigenvalues(runs)), max(eigenvalues(runs))]
    left.plot(ends, ends, color="gray", lw=1, ls=":", label="λ₁ itself")
    left.set(xscale="log", yscale="log", xlabel="λ₁", ylabel="2 h / rho²")
    left.legend(frameon=False, fontsize=8)
    read = MEASURES["the perturbed loss"]
    for color, method in (("C0", "sgd"), ("C1", "sam")):
        chosen = [run for run in runs if run["method"] == method]
        right.plot(
            eigenvalues(chosen),
            [read(run) for run in chosen],
            "o",
            color=color,
            ms=4,
            alpha=0.7,
            label=NAMES[method],
        )
    right.set(xscale="log", yscale="log", xlabel="λ₁", ylabel="perturbed loss")
    right.legend(frameon=False, fontsize=8)
    return figure

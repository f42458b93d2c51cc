"""More ascent steps, and the second-order term."""

import numpy as np
from results import (
    NAMES,
    SAM,
    UNDERSTANDING_SAM,
    claim,
    compared,
    dots,
    entries,
    every_table,
    methods,
    panels,
)

SHOWN = ("accuracy", "loss")


def claims(content):
    for text, source, method in (
        ("two ascent steps are more accurate than one", UNDERSTANDING_SAM, "sam_2_steps"),
        ("and so are five", UNDERSTANDING_SAM, "sam_5_steps"),
        ("and SAM with the second-order term", SAM, "sam_second_order"),
    ):
        comparisons = compared(content, "accuracy", method, "sam")
        yield claim(text, source, "found not to be so", comparisons)


TABLES = {"inner_maximization": lambda content: methods(content, SHOWN)}


def summary(content):
    return every_table(content, SHOWN)


def picture(content):
    """The test accuracies, and the validation accuracy over rho that chose."""
    figure, ((left, right),) = panels(1, 2, width=5.2)
    dots(left, content, "accuracy")
    present = list(dict.fromkeys(run["method"] for run in content["runs"]))
    for i, method in enumerate(present):
        runs = entries(content, stage="search", method=method)
        rhos = sorted({run["setting"]["rho"] for run in runs if "rho" in run["setting"]})
        means = [
            np.mean([100 * r["validation_accuracy"] for r in runs if r["setting"]["rho"] == rho])
            for rho in rhos
        ]
        if rhos:
            right.plot(rhos, means, marker="o", color=f"C{i}", label=NAMES[method])
    right.set(xlabel="rho", xscale="log", ylabel="validation accuracy, %")
    right.set_title("where rho was searched (labels as wrong)", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    return figure

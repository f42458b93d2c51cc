"""A ReLU network with its weights rescaled."""

import numpy as np
from results import ASAM, NAMES, Comparison, Number, claim, entries, mean_and_error, panels, text_of

METHODS = ("gd", "sam", "asam")
SHARPNESS = Number("largest over smallest sharpness", None, 2, "", True)
SPREAD = Number("largest less smallest test accuracy", None, 2, " %", True)


def over_factors(content, method, read):
    """An array of numbers, one row per seed and one column per factor."""
    columns = [
        [
            read(run)
            for run in entries(content, stage="final", method=method)
            if run["setting"]["factor"] == factor
        ]
        for factor in content["settings"]["factors"]
    ]
    return np.transpose(columns)


def accuracies(content, method):
    return over_factors(content, method, lambda run: 100 * run["test_accuracy"])


def sharpnesses(content, method):
    """What a method calls sharpness, at networks of plain gradient descent."""
    return over_factors(content, "gd", lambda run: run[f"sharpness_{method}"])


def claims(content):
    ratios = [sharpnesses(content, method) for method in ("asam", "sam")]
    ratios = [list(np.max(values, 1) / np.min(values, 1)) for values in ratios]
    text = "rescaling a ReLU network changes SAM's sharpness more than ASAM's"
    yield claim(text, ASAM, "a proof", [Comparison(*ratios, SHARPNESS, SHARPNESS.title + ": ")])
    spreads = [list(np.ptp(accuracies(content, method), 1)) for method in ("asam", "sam")]
    text = "and where training with SAM ends more than with ASAM"
    yield claim(text, ASAM, "-", [Comparison(*spreads, SPREAD, SPREAD.title + ": ")])


def table(content):
    factors = content["settings"]["factors"]
    lines = [
        f"| | {' | '.join(f'c = {c:g}' for c in factors)} |",
        "|---" * (len(factors) + 1) + "|",
    ]
    for method in ("sam", "asam"):
        cells = columns(sharpnesses(content, method), Number("", None, 4, "", True))
        lines.append(f"| sharpness, as {NAMES[method]} measures it | {cells} |")
    for method in METHODS:
        cells = columns(accuracies(content, method), Number("", None, 2, " %", False))
        lines.append(f"| test accuracy after {NAMES[method]} | {cells} |")
    return lines


def columns(values, number):
    return " | ".join(text_of(column, number) for column in values.T)


TABLES = {"scale_invariance": table}


def summary(content):
    return ["", *table(content)]


def picture(content):
    """Both measures, and the accuracy, over the factor."""
    factors = content["settings"]["factors"]
    figure, ((left, right),) = panels(1, 2, width=5.2)
    for color, method in (("C1", "sam"), ("C2", "asam")):
        values = sharpnesses(content, method)
        of_one = values / values[:, [factors.index(1.0)]]
        draw(left, factors, of_one, color=color, label=f"as {NAMES[method]} measures it")
    left.set(yscale="log", ylabel="sharpness, that at c = 1 is 1")
    for color, method in zip(("C0", "C1", "C2"), METHODS, strict=True):
        draw(right, factors, accuracies(content, method), color=color, label=NAMES[method])
    right.set(ylabel="test accuracy, %")
    right.margins(y=0.25)  # The legend needs a place.
    for panel in (left, right):
        panel.set(xscale="log", xlabel="c")
        panel.set_xticks(factors, [f"{c:g}" for c in factors])
        panel.minorticks_off()
        panel.legend(frameon=False, loc="upper right", fontsize=9)
    return figure


def draw(panel, x, values, **options):
    means, errors = zip(*(mean_and_error(column) for column in values.T), strict=True)
    panel.errorbar(x, means, errors, marker="o", capsize=3, **options)

"""Sharpness and test error over many networks."""

import numpy as np
from results import NUMBERS, SAM, UNDERSTANDING_SAM, Correlation, claim, entries, panels


def measures(content):
    """The names of what was measured, by m."""
    settings = content["settings"]
    return {
        m or "all": [f"m {m or 'all'}, rho {rho:g}" for rho in settings["radii"]]
        for m in settings["m"]
    }


def correlation(runs, measure, where=""):
    errors = [NUMBERS["error"].read(run) for run in runs]
    return Correlation([run[measure] for run in runs], errors, where)


def by_batch_size(content):
    sizes = content["settings"]["batch_sizes"]
    return {size: entries(content, stage="final", batch_size=size) for size in sizes}


def claims(content):
    names = measures(content)
    runs = entries(content, stage="final")
    for text, source, m in (
        ("max-sharpness ranks networks of all batch sizes by test error", UNDERSTANDING_SAM, "all"),
        ("and so does m-sharpness, with the smallest m", UNDERSTANDING_SAM, list(names)[-1]),
    ):
        # The best radius of all: none is better.
        best = max(names[m], key=lambda name: correlation(runs, name).coefficient)
        where = f"at its best radius, {best.split(', ')[1]}: "
        yield claim(text, source, "found not to be so", [correlation(runs, best, where)])
    smallest = list(names)[-1]
    comparisons = []
    for size, found in by_batch_size(content).items():
        best = max(names[smallest], key=lambda name: correlation(found, name).coefficient)
        where = f"batches of {size}, {best.split(', ')[1]}: "
        comparisons.append(correlation(found, best, where))
    yield claim(
        f"m-sharpness, m = {smallest}, ranks those of one batch size", SAM, "-", comparisons
    )


def table(content):
    groups = {"all": entries(content, stage="final"), **by_batch_size(content)}
    titles = ["all batch sizes", *(f"batches of {size}" for size in list(groups)[1:])]
    lines = [f"| m | rho | {' | '.join(titles)} |", "|---" * (len(groups) + 2) + "|"]
    for m, names in measures(content).items():
        for name, rho in zip(names, content["settings"]["radii"], strict=True):
            cells = [f"{correlation(runs, name).coefficient:.2f}" for runs in groups.values()]
            lines.append(f"| {m} | {rho:g} | {' | '.join(cells)} |")
    return lines


TABLES = {"which_sharpness": table}


def summary(content):
    return ["", *table(content)]


def picture(content):
    """The rank correlation over the radius, and the networks for the best measure of all."""
    names, radii = measures(content), content["settings"]["radii"]
    figure, ((left, right),) = panels(1, 2, width=5.2)
    runs, groups = entries(content, stage="final"), by_batch_size(content)
    for i, (m, of_m) in enumerate(names.items()):
        over_all = [correlation(runs, name).coefficient for name in of_m]
        within = [
            np.mean([correlation(found, name).coefficient for found in groups.values()])
            for name in of_m
        ]
        left.plot(radii, over_all, marker="o", color=f"C{i}", label=f"m = {m}")
        left.plot(radii, within, marker="o", mfc="white", ls="--", color=f"C{i}")
    left.plot([], [], color="gray", label="all networks")
    left.plot([], [], color="gray", ls="--", label="of one batch size, mean")
    left.axhline(0, color="gray", lw=1)
    left.set(xscale="log", xlabel="rho", ylabel="rank correlation with the test error")
    left.legend(frameon=False, fontsize=8, loc="upper right")
    measure = max(
        (name for of_m in names.values() for name in of_m),
        key=lambda name: correlation(runs, name).coefficient,
    )
    for i, (size, found) in enumerate(groups.items()):
        for method, marker in (("sgd", "o"), ("sam", "^")):
            chosen = [run for run in found if run["method"] == method]
            right.plot(
                [run[measure] for run in chosen],
                [NUMBERS["error"].read(run) for run in chosen],
                marker,
                color=f"C{i}",
                ms=4,
                label=f"{'SGD' if method == 'sgd' else 'SAM'}, batches of {size}",
            )
    right.set(xscale="log", xlabel=f"sharpness, {measure}", ylabel="test error, %")
    right.legend(frameon=False, fontsize=8)
    return figure

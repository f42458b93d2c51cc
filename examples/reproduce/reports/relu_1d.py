"""Twelve points, 100 ReLUs: the bends of the function."""

import numpy as np
from results import UNDERSTANDING_SAM, Comparison, Number, claim, entries, panels, text_of

BENDS = Number("bends", lambda run: run["bends"], 1, "", True)
VARIATION = Number("changes of slope, in sum", lambda run: run["variation"], 0, "", True)
ACTIVE = Number("neurons that are not dead", lambda run: run["active"], 1, "", True)
#: In units of 1e-4.
LOSS = Number("training loss, 1e-4", lambda run: 1e4 * run["train_loss"], 2, "", True)


def bends(w, ends, near):
    """Where the function of a network changes its slope, and by how much.

    Args:
        w: kernel, bias and outgoing weights of one hidden layer of ReLUs.
        ends: pair of Floats; places beyond them are left out.
        near: Float; neighbors that are not farther from each other are one.

    Returns:
        Two arrays, the places and the changes.
    """
    kernel, bias, out = w
    places, changes = -bias / kernel, np.abs(kernel) * out
    order = np.argsort(places)
    order = order[(places[order] > ends[0]) & (places[order] < ends[1])]
    if not len(order):
        return np.array([]), np.array([])
    groups = np.split(order, 1 + np.flatnonzero(np.diff(places[order]) > near))
    return (
        np.array([np.average(places[g], weights=np.abs(changes[g]) + 1e-12) for g in groups]),
        np.array([changes[g].sum() for g in groups]),
    )


def runs_by_rho(content):
    return {
        rho: [run for run in entries(content, stage="final") if run["setting"]["rho"] == rho]
        for rho in content["settings"]["rhos"]
    }


def claims(content):
    runs = runs_by_rho(content)
    for text, number in (
        ("SAM combines fewer ReLUs than gradient descent through twelve points", BENDS),
        ("its function bends less, in sum", VARIATION),
    ):
        values = [list(map(number.read, runs[rho])) for rho in (max(runs), 0.0)]
        yield claim(text, UNDERSTANDING_SAM, "a picture", [Comparison(*values, number)])


def table(content):
    numbers = (BENDS, VARIATION, ACTIVE, LOSS)
    lines = [
        f"| rho | {' | '.join(number.title for number in numbers)} | seeds |",
        "|---" * (len(numbers) + 2) + "|",
    ]
    for rho, runs in runs_by_rho(content).items():
        cells = [text_of(list(map(number.read, runs)), number) for number in numbers]
        lines.append(f"| {rho:g} | {' | '.join(cells)} | {len(runs)} |")
    return lines


TABLES = {"relu_1d": table}


def summary(content):
    return ["", *table(content)]


def picture(content):
    """The functions of all starts, with the places of their bends as dots."""
    settings, runs = content["settings"], runs_by_rho(content)
    figure, (row,) = panels(1, len(runs), width=3.4)
    grid = np.linspace(settings["x"][0], settings["x"][-1], len(runs[0.0][0]["curve"]))
    for panel, (rho, found) in zip(row, runs.items(), strict=True):
        for i, run in enumerate(found):
            panel.plot(grid, run["curve"], color=f"C{i}", lw=1)
            heights = np.interp(run["places"], grid, run["curve"])
            panel.plot(run["places"], heights, ".", color=f"C{i}", ms=4)
        panel.plot(settings["x"], settings["y"], "o", mfc="none", color="black", ms=6)
        title = f"rho {rho:g}" if rho else "gradient descent"
        panel.set_title(
            f"{title}: {text_of(list(map(BENDS.read, found)), BENDS)} bends", loc="left"
        )
        panel.set(ylim=(-2.5, 4))
    return figure

"""The front between SGD and SAM: tables and picture of `pareto.py`. It imports no Keras.

    python benchmarks/front.py

prints the tables, and draws docs/pareto.png anew, from results/pareto_*.json.
"""

import json
import pathlib
import sys
from typing import NamedTuple

import numpy as np
from scipy import stats

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "reproduce"))

from results import NUMBERS, entries  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "pareto.png"

PLACES = {
    "noise": "Fashion-MNIST, 40 % wrong labels",
    "fine_tune": "fine-tuning, 20 images per class",
    "cifar10": "CIFAR-10, 4,000 images",
}
#: What is aimed at: so much of SAM's gain, at this cost or less.
SHARE, COSTS = 0.9, (1.05, 1.25)


class Row(NamedTuple):
    """What is known of a contestant at a place.

    Attributes:
        name: as in the JSON.
        cost: its CPU time over that of SGD, one value per round.
        gain: points of test accuracy beyond SGD, one value per seed.
        over_control: the same, beyond SGD at the usual learning rate.
        setting: the number that was chosen.
        at_border: whether that is the first or the last one that was tried.
    """

    name: str
    cost: np.ndarray
    gain: np.ndarray
    over_control: np.ndarray
    setting: float
    at_border: bool


def load(folder=RESULTS):
    """The contents of the files of a folder, by place, once the cost has been measured."""
    paths = {name: pathlib.Path(folder) / f"pareto_{name}.json" for name in PLACES}
    contents = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }
    return {name: content for name, content in contents.items() if "cpu_s" in content}


def rows(content):
    """A `Row` for each contestant whose trainings and cost are complete, by their cost."""
    runs, seconds = content["runs"], content["cpu_s"]
    plain, usual = (_accuracies(content, stage, "sgd") for stage in ("final", "control"))
    found = []
    for name in dict.fromkeys(run["method"] for run in runs):
        accuracies = _accuracies(content, "final", name)
        if len(accuracies) < len(usual) or name not in seconds:
            continue
        tried, chosen = (
            {_number(run) for run in entries(content, stage=stage, method=name)}
            for stage in ("search", "final")
        )
        (chosen,) = chosen
        found.append(
            Row(
                name,
                np.divide(seconds[name], seconds["sgd"]),
                accuracies - plain,
                accuracies - usual,
                chosen,
                chosen in (min(tried), max(tried)),
            )
        )
    return sorted(found, key=lambda row: (row.name != "sgd", np.median(row.cost)))


def _accuracies(content, stage, method):
    """In percent, in the order of the seeds."""
    runs = entries(content, stage=stage, method=method)
    return np.array([NUMBERS["accuracy"].read(run) for run in runs])


def _number(run):
    """The one number that was searched."""
    return list(run["setting"].values())[-1]


def share(gain, of):
    """Which part of a gain another one is, in means over the seeds, and its error (jackknife)."""
    n = len(gain)
    without_one = (gain.sum() - gain) / (of.sum() - of)
    return gain.mean() / of.mean(), np.sqrt((n - 1) * np.var(without_one))


def front(found):
    """Those rows than which no other one gains more and costs no more, by their cost."""
    best, kept = -np.inf, []
    for row in sorted(found, key=lambda row: (np.median(row.cost), -row.gain.mean())):
        if row.gain.mean() > best:
            best = row.gain.mean()
            kept.append(row)
    return kept


# Tables


def title(name):
    """How a contestant is called."""
    return {"sgd": "SGD", "sam": "SAM"}.get(name, name)


def table(content):
    """Cost and gain of each contestant; those of the front in bold."""
    found = rows(content)
    (sam,) = (row for row in found if row.name == "sam")
    on_front = {row.name for row in front(found)}
    lines = [
        "| | cost | gain over SGD | of SAM's gain | over SGD at the usual rate | chosen |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        part, error = share(row.gain, sam.gain)
        of_sam = f"{part:.0%}" + ("" if row is sam else f" ± {error:.0%}")
        gain = f"{row.gain.mean():.2f} ± {stats.sem(row.gain):.2f}"
        name = "learning rate" if row.name == "sgd" else "rho"
        label = f"**{title(row.name)}**" if row.name in on_front else title(row.name)
        plain = row.name == "sgd"
        lines.append(
            f"| {label} | {np.median(row.cost):.2f} | {'-' if plain else gain} "
            f"| {'-' if plain else of_sam} | {row.over_control.mean():.2f} ± "
            f"{stats.sem(row.over_control):.2f} | {name} {row.setting:g}"
            f"{', at the border' if row.at_border else ''} |"
        )
    return lines


#: The tables of the pages, by the name in their comments: functions that make their lines.
TABLES = {f"pareto {name}": lambda name=name: table(load()[name]) for name in load()}


# The picture


def picture(contents):
    """Gain over cost, one panel for each place."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(contents), figsize=(6.2 * len(contents), 4.4), layout="constrained", squeeze=False
    )
    for panel, (place, content) in zip(panels.flat, contents.items(), strict=True):
        _panel(panel, rows(content))
        panel.set_title(PLACES[place], loc="left")
    panels[0, 0].set_ylabel("gain over SGD, points of test accuracy")
    return figure


def _panel(panel, found):
    (sam,) = (row for row in found if row.name == "sam")
    on_front = front(found)
    cost = {row.name: np.median(row.cost) for row in found}
    # Who loses by far would press all others together, and stands at the edge.
    low = -0.75 * abs(sam.gain.mean())
    height = {row.name: max(row.gain.mean(), low) for row in found}
    panel.axhline(SHARE * sam.gain.mean(), color="gray", ls=":", lw=1)
    panel.annotate(
        f"{SHARE:.0%} of SAM's gain",
        (0, SHARE * sam.gain.mean()),
        xycoords=("axes fraction", "data"),
        xytext=(2, 2),
        textcoords="offset points",
        color="gray",
        fontsize=8,
    )
    for limit in COSTS:
        panel.axvline(limit, color="gray", ls=":", lw=1)
    panel.step(
        [cost[row.name] for row in on_front],
        [row.gain.mean() for row in on_front],
        where="post",
        color="C1",
        lw=1.5,
    )
    for row in found:
        color = "C1" if row in on_front else "C0"
        if row.gain.mean() < low:
            panel.plot(cost[row.name], low, "v", color=color, ms=6)
            continue
        error = None if row.name == "sgd" else stats.sem(row.gain)
        panel.errorbar(
            cost[row.name], row.gain.mean(), error, fmt="o", ms=5, color=color, capsize=2, lw=1
        )
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("cost, CPU time of SGD = 1")
    _label(panel, found, cost, height)


def _label(panel, found, cost, height):
    """The names in a column at the right, far enough apart, each with a line to its point."""
    found = sorted(found, key=lambda row: (height[row.name], row.gain.mean()))
    low, high = panel.get_ylim()
    steps = (high - low) / 17 * np.arange(len(found))
    # As high as its point, pushed up by those below; what is too high then is pushed down.
    places = np.maximum.accumulate([height[row.name] for row in found] - steps) + steps
    places = np.minimum(places, high - steps[::-1])
    left, right = panel.get_xlim()
    column = right + 0.06 * (right - left)
    for row, y in zip(found, places, strict=True):
        point = height[row.name]
        panel.plot([cost[row.name], column], [point, y], color="gray", lw=0.4, clip_on=False)
        name = title(row.name)
        if row.gain.mean() < point:
            name += f", {row.gain.mean():.0f}"
        panel.text(column, y, f" {name}", va="center", fontsize=8, clip_on=False)
    panel.set(xlim=(left, right), ylim=(low, high))


def show(folder=RESULTS):
    """Print the tables of a folder, and draw the picture beside its files."""
    contents = load(folder)
    for place, content in contents.items():
        print(f"\n{PLACES[place]}")
        print("\n".join(table(content)))
    path = (
        PICTURE
        if pathlib.Path(folder).resolve() == RESULTS
        else pathlib.Path(folder) / "pareto.png"
    )
    picture(contents).savefig(path, dpi=110)
    print(f"\nPicture: {path}")


if __name__ == "__main__":
    show()

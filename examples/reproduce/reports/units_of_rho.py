"""What rho is a number of: from the files of `examples/units_of_rho.py`."""

import math

from results import NAMES, RESULTS, entries, load

FOLDER = RESULTS / "units_of_rho"
#: The rows of the first table: how the example calls them, and the page.
ROWS = {
    "SAM": "SAM",
    "4 micro-batches": "4 micro-batches",
    "ASAM": "ASAM",
    "Adaptive-GSAM": "Adaptive-GSAM",
    "p = inf": "`Ball(p=inf)`",
}
SEEDS = (0, 1, 2)
#: GSAM's alpha, by default.
ALPHA = 0.4


def measured():
    """One unit of rho in each neighborhood, along a training on digits."""
    lines = [
        "| epoch | | length | `g·e` | rise | cosine | by length | by slope | by rise |",
        "|" + "---|" * 9,
    ]
    for epoch in load(FOLDER, "digits_0")["measured"]:
        for i, (name, title) in enumerate(ROWS.items()):
            of = epoch["table"][name]
            numbers = [of[key] for key in ("length", "slope", "rise")]
            worth = [of[key] for key in ("by_length", "by_slope", "by_rise")]
            cells = [epoch["epoch"] if i == 0 else "", title, *map(_short, numbers)]
            cells += [f"{of['cosine']:.2f}", *map(_short, worth)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def converted():
    """SAM's rho converted along its own trainings, beside what a search chose."""
    runs = [load(FOLDER, f"fashion_mnist_{seed}") for seed in SEEDS]
    epochs = list(zip(*(run["measured"] for run in runs), strict=True))
    rho, last = runs[0]["rho"], epochs[-1][0]["epoch"]
    first, middle, _ = (of[0]["epoch"] for of in epochs)
    lines = [
        f"| | after epoch {first} | {middle} | {last} | chosen |",
        "|---|---|---|---|---|",
    ]
    for name, divisor in (("ASAM", 1.0), ("Adaptive-GSAM", 1.0 + ALPHA)):
        for key in ("by_length", "by_slope", "by_rise"):
            found = [[of["table"][name][key] / divisor for of in seeds] for seeds in epochs]
            cells = [f"{_short(min(values))} to {_short(max(values))}" for values in found]
            over = f", over {divisor:g}" if divisor != 1 else ""
            lines.append(_row(f"{name}, {key.replace('_', ' ')}{over}", cells, name))
    lines.append(_row(f"GSAM, over {1 + ALPHA:g}", [_short(rho / (1 + ALPHA))] * 3, "GSAM"))
    # Its rho_min is rho times the share of the learning rate that is left: a cosine.
    shares = [0.5 + 0.5 * math.cos(math.pi * of[0]["epoch"] / last) for of in epochs]
    cells = [_short(rho / (1 + share)) for share in shares]
    return [*lines, _row("BSAM, over 2 at first and 1 at the end", cells, "BSAM")]


def _row(title, cells, name):
    method = next(key for key, value in NAMES.items() if value == name)
    found = entries(load(RESULTS, "label_noise"), stage="final", method=method, data="noise 0.4")
    return f"| {title} | {' | '.join(cells)} | {found[0]['setting']['rho']:g} |"


def _short(number):
    return f"{number:.3g}"


TABLES = {"units of rho": measured, "units of rho, converted": converted}

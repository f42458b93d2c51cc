"""Diagonal networks: test loss and norms over rho, and an adversary that comes later."""

import numpy as np
from results import (
    NAMES,
    UNDERSTANDING_SAM,
    Comparison,
    Number,
    claim,
    entries,
    mean_and_error,
    panels,
    setting_text,
    text_of,
)

METHODS = ("gd", "n_sam", "one_sam")
LOSS = Number("test loss", lambda run: run["test_loss"], 4, "", True)
NORM_1 = Number("1-norm", lambda run: run["norm_1"], 3, "", True)
NORM_2 = Number("2-norm", lambda run: run["norm_2"], 3, "", True)


def curve(content, method, scale):
    """The runs of each setting, in the order of the settings."""
    found = entries(content, stage="curve", method=method, scale=scale)
    settings = dict.fromkeys(tuple(run["setting"].items()) for run in found)
    return [[run for run in found if run["setting"] == dict(setting)] for setting in settings]


def chosen(content, method, scale):
    """The runs of the setting with the lowest validation loss, on average."""
    return min(
        curve(content, method, scale),
        key=lambda runs: np.mean([run["validation_loss"] for run in runs]),
    )


def compared(content, number, better, worse):
    for scale in content["settings"]["scales"]:
        values = [list(map(number.read, chosen(content, m, scale))) for m in (better, worse)]
        yield Comparison(*values, number, f"start at {scale:g}: ")


def claims(content):
    for text, *what in (
        (
            "1-SAM has a lower test loss than gradient descent in sparse regression",
            *(LOSS, "one_sam", "gd"),
        ),
        ("and than n-SAM", LOSS, "one_sam", "n_sam"),
        ("n-SAM has a lower one than gradient descent", LOSS, "n_sam", "gd"),
        ("1-SAM ends with a smaller 1-norm than gradient descent", NORM_1, "one_sam", "gd"),
    ):
        yield claim(text, UNDERSTANDING_SAM, "-", compared(content, *what))


def table(content):
    numbers = (LOSS, NORM_1, NORM_2)
    lines = [
        f"| start | | chosen setting | {' | '.join(n.title for n in numbers)} | seeds |",
        "|---" * 7 + "|",
    ]
    for scale in content["settings"]["scales"]:
        for method in METHODS:
            runs = chosen(content, method, scale)
            cells = [text_of(list(map(number.read, runs)), number) for number in numbers]
            setting = setting_text(runs[0]["setting"])
            lines.append(
                f"| {scale:g} | {NAMES[method]} | {setting} | {' | '.join(cells)} | {len(runs)} |"
            )
    return lines


def later(content):
    """The test loss of 1-SAM that comes after some steps of gradient descent."""
    settings = content["settings"]
    lines = [
        f"| start | {' | '.join(f'after {n:,} steps' for n in (0, *settings['late']))} | never |",
        "|---" * (len(settings["late"]) + 3) + "|",
    ]
    usual = settings["learning_rate"]
    for scale in settings["scales"]:
        rows = [
            entries(
                content,
                stage="curve",
                method="one_sam",
                scale=scale,
                setting={"learning_rate": usual, "rho": settings["late_rho"]},
            )
        ]
        late = entries(content, stage="late", scale=scale)
        rows += [[r for r in late if r["setting"]["after"] == n] for n in settings["late"]]
        rows.append(
            entries(
                content, stage="curve", method="gd", scale=scale, setting={"learning_rate": usual}
            )
        )
        cells = [text_of(list(map(LOSS.read, runs)), LOSS) for runs in rows]
        lines.append(f"| {scale:g} | {' | '.join(cells)} |")
    return lines


TABLES = {"diagonal_networks": table, "diagonal_networks late": later}


def summary(content):
    return ["", *table(content)]


def picture(content):
    """Test loss and 1-norm over rho, from each scale; gradient descent as a line."""
    scales = content["settings"]["scales"]
    figure, rows = panels(2, len(scales), height=2.8)
    for row, number in zip(rows, (LOSS, NORM_1), strict=True):
        for panel, scale in zip(row, scales, strict=True):
            level = np.mean(list(map(number.read, chosen(content, "gd", scale))))
            panel.axhline(level, color="C0", label=NAMES["gd"])
            for color, method in (("C2", "n_sam"), ("C1", "one_sam")):
                runs = curve(content, method, scale)
                values = [mean_and_error(list(map(number.read, many))) for many in runs]
                means, errors = zip(*values, strict=True)
                rhos = [many[0]["setting"]["rho"] for many in runs]
                panel.errorbar(rhos, means, errors, marker="o", color=color, label=NAMES[method])
            panel.set(xscale="log", ylabel=number.title)
            if number is LOSS:
                panel.set_yscale("log")
            panel.set_title(f"start at {scale:g}", loc="left")
            panel.sharey(row[0])
    for panel in rows[1]:
        panel.set_xlabel("rho")
    rows[0][0].legend(frameon=False)
    return figure

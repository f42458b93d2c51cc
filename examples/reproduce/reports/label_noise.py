"""Wrong labels: what SGD learns by heart, and what the methods do not."""

import math

import numpy as np
from results import (
    NAMES,
    NUMBERS,
    SAM,
    claim,
    compared,
    conditions,
    dots,
    entries,
    every_table,
    methods,
    panels,
    setting_text,
    text_of,
)

SHOWN = ("accuracy", "stopped", "best", "memorized")


def claims(content):
    yield claim(
        "SAM is more accurate than SGD where 40 % of the labels are wrong",
        SAM,
        "-",
        compared(content, "accuracy", "sam", "sgd"),
    )
    yield claim(
        "also if both are stopped early", SAM, "-", compared(content, "stopped", "sam", "sgd")
    )


def wrong_labels(content):
    """What the README shows: SGD with two learning rates, and the methods."""
    data = _share(content, 0.4)
    shown = ("accuracy", "stopped", "memorized")
    lines = [
        f"| 40 % wrong labels | {' | '.join(NUMBERS[n].title for n in shown)} |",
        "|---" * (len(shown) + 1) + "|",
    ]
    present = dict.fromkeys(run["method"] for run in content["runs"])
    rows = [("control", "sgd"), *(("final", method) for method in present)]
    for stage, method in rows:
        found = entries(content, stage=stage, method=method, data=data)
        if found:
            ((name, value),) = list(found[0]["setting"].items())[-1:]
            cells = [text_of([NUMBERS[n].read(e) for e in found], NUMBERS[n]) for n in shown]
            title = f"{NAMES[method]}, {name.replace('_', ' ')} {value:g}"
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def fair_opponents(content):
    """SGD with the usual learning rate, what else it can be given for nothing, and two methods."""
    data = _share(content, 0.4)
    lines = ["| 2,000 images of Fashion-MNIST, 40 % wrong | test accuracy |", "|---|---|"]
    for stage, method, number, title in (
        ("control", "sgd", "accuracy", "SGD, {}"),
        ("control", "sgd", "stopped", "the same, stopped early by noisy validation labels"),
        ("final", "sgd", "accuracy", "SGD, {}, the best of six"),
        ("final", "sam", "accuracy", "SAM, {}"),
        ("final", "gsam", "accuracy", "GSAM, {}"),
    ):
        found = entries(content, stage=stage, method=method, data=data)
        values = [NUMBERS[number].read(e) for e in found]
        title = title.format(setting_text(found[0]["setting"]))
        lines.append(f"| {title} | {text_of(values, NUMBERS[number])} |")
    return lines


def _share(content, share):
    """The condition with the share of wrong labels that is nearest to one."""
    return min(conditions(content), key=lambda name: abs(float(name.split()[1]) - share))


TABLES = {
    "label_noise": lambda content: methods(content, SHOWN, "noise 0.4"),
    "wrong labels": wrong_labels,
    "fair opponents": fair_opponents,
}


def summary(content):
    return every_table(content, SHOWN)


def picture(content):
    """Accuracy and what was learned by heart, over the epochs, at the share nearest to 40 %."""
    data = _share(content, 0.4)
    figure, ((left, middle, right),) = panels(1, 3, width=4.6)
    for stage, method, style in (
        ("control", "sgd", {"color": "C0"}),
        ("final", "sgd", {"color": "C0", "ls": "--"}),
        ("final", "sam", {"color": "C1"}),
    ):
        runs = entries(content, stage=stage, method=method, data=data)
        ((name, value),) = list(runs[0]["setting"].items())[-1:]
        label = f"{NAMES[method]}, {name.replace('_', ' ')} {value:g}"
        for panel, number in ((left, "test_accuracies"), (middle, "memorized")):
            curves = 100 * np.array([run[number] for run in runs])
            mean = curves.mean(0)
            error = curves.std(0, ddof=1) / math.sqrt(len(curves))
            epochs = np.arange(1, len(mean) + 1)
            panel.plot(epochs, mean, label=label, **style)
            panel.fill_between(
                epochs, mean - error, mean + error, color=style["color"], alpha=0.2, lw=0
            )
    left.set(xlabel="epoch", ylim=(40, None))
    left.set_title(f"{NAMES[data]}: test accuracy, %", loc="left")
    left.legend(frameon=False, loc="lower right")
    middle.set(xlabel="epoch", ylim=(0, None))
    middle.set_title("wrong labels learned by heart, %", loc="left")
    dots(right, content, "accuracy", data=data)
    usual = [NUMBERS["accuracy"].read(e) for e in entries(content, stage="control", data=data)]
    right.axvline(np.mean(usual), color="C0", lw=1)
    right.text(np.mean(usual), 5.4, " SGD,\n usual rate", color="C0", va="bottom", fontsize=8)
    right.set_title("at the end", loc="left")
    return figure

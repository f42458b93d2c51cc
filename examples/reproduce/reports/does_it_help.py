"""All results in one picture: where the methods are more accurate than SGD, and where not."""

import numpy as np
from results import (
    NAMES,
    NUMBERS,
    RESULTS,
    entries,
    interval,
    lengths,
    load,
    panels,
    text_of,
    verdict,
)

METHODS = ("sam", "asam", "gsam", "adaptive_gsam", "bsam")

#: What each situation is called, the study, the data, how often these are seen, in units of the
#: shortest training, and of SGD in the same units, what is compared, and which SGD it is.
SITUATIONS = (
    ("40 % wrong labels, SGD with the usual rate", "label_noise", 1, 1, "accuracy", "control"),
    ("40 % wrong labels, SGD with the best rate", "label_noise", 1, 1, "accuracy", "final"),
    ("the same, all of them stopped early", "label_noise", 1, 1, "stopped", "final"),
    ("clean {data}, {epochs} epochs", "sam_vs_sgd", 1, 1, "accuracy", "final"),
    ("clean {data}, {epochs} epochs", "sam_vs_sgd", 2, 2, "accuracy", "final"),
    ("clean {data}, SGD for twice as long", "sam_vs_sgd", 1, 2, "accuracy", "final"),
    ("clean MNIST, {epochs} epochs", "mnist_cnn", 1, 1, "accuracy", "final"),
    ("two moons, as good as it gets", "moons", 1, 1, "accuracy", "final"),
)


def situations():
    """Triples: what it is, the numbers of SGD, and those of each method, seed by seed."""
    for title, study, times, times_of_sgd, number, stage in SITUATIONS:
        content = load(RESULTS, study)
        epochs, read = lengths(content), NUMBERS[number].read
        for data in dict.fromkeys(run.get("data") for run in content["runs"]):

            def values(method, stage, times, content=content, epochs=epochs, data=data, read=read):
                found = entries(
                    content, stage=stage, method=method, epochs=epochs[times - 1], data=data
                )
                return [read(run) for run in found]

            name = title.format(data=NAMES.get(data, data), epochs=epochs[times - 1])
            of_methods = {method: values(method, "final", times) for method in METHODS}
            yield name, values("sgd", stage, times_of_sgd), of_methods


def table():
    """SGD and SAM in each situation."""
    lines = ["| | SGD | SAM | gain, points | |", "|---|---|---|---|---|"]
    words = {"holds": "helps", "the other way round": "harms"}
    for name, sgd, methods in situations():
        mean, margin = interval(np.subtract(methods["sam"], sgd))
        said = verdict(methods["sam"], sgd, lower_is_better=False)
        cells = [text_of(values, NUMBERS["accuracy"]) for values in (sgd, methods["sam"])]
        cells += [f"{mean:+.2f} ± {margin:.2f}", words.get(said, said)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def picture():
    """The gain of each method over SGD: means, and intervals of 95 %."""
    found = list(situations())
    figure, ((panel,),) = panels(1, 1, width=8.5, height=0.47 * len(found) + 1.2)
    for row, (_, sgd, methods) in enumerate(found):
        for i, method in enumerate(METHODS):
            mean, margin = interval(np.subtract(methods[method], sgd))
            panel.errorbar(
                mean,
                row + 0.15 * (i - 2),
                xerr=margin,
                fmt="o",
                ms=4,
                lw=1.2,
                color=f"C{i + 1}",
                label=NAMES[method] if row == 0 else None,
            )
    panel.axvline(0, color="gray", lw=1)
    for row in range(1, len(found), 2):
        panel.axhspan(row - 0.5, row + 0.5, color="0.96", zorder=0)
    panel.set_yticks(range(len(found)), [name for name, *_ in found])
    panel.set(ylim=(len(found) - 0.5, -0.5), xlabel="points of test accuracy more than SGD")
    panel.legend(loc="lower right", frameon=False)
    return figure


TABLES = {"does it help": table}

"""What the reports share: reading results, comparing them, and drawing. It imports no Keras."""

import json
import math
import pathlib
from typing import NamedTuple

import numpy as np
from scipy import stats

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "docs" / "results"

#: Where SAM begins or ends, as shares of a training.
MOMENTS = (0.2, 0.4, 0.6, 0.8, 0.9)

NAMES = {
    "sgd": "SGD",
    "sam": "SAM",
    "asam": "ASAM",
    "gsam": "GSAM",
    "adaptive_gsam": "Adaptive-GSAM",
    "bsam": "BSAM",
    "gd": "gradient descent",
    "n_sam": "n-SAM",
    "one_sam": "1-SAM",
    "sam_2_steps": "SAM, 2 steps",
    "sam_5_steps": "SAM, 5 steps",
    "sam_5_parts": "SAM, 5 steps of rho / 5",
    "sam_second_order": "SAM, second order",
    **{f"from {t:g}": f"SAM, the last {1 - t:.0%}" for t in MOMENTS},
    **{f"until {t:g}": f"SAM, the first {t:.0%}" for t in MOMENTS},
    "cifar10": "CIFAR-10",
    "fashion_mnist": "Fashion-MNIST",
    "digits": "digits",
    "moons": "moons",
    **{f"noise {share:g}": f"{share:.0%} wrong labels" for share in (0.0, 0.2, 0.4, 0.6, 0.8)},
}

# The papers of the claims.
SAM = "[Foret et al., 2021](https://arxiv.org/abs/2010.01412)"
ASAM = "[Kwon et al., 2021](https://arxiv.org/abs/2102.11600)"
GSAM = "[Zhuang et al., 2022](https://arxiv.org/abs/2203.08065)"
BSAM = "[Deng et al., 2024](https://arxiv.org/abs/2409.13173)"
UNDERSTANDING_SAM = "[Andriushchenko and Flammarion, 2022](https://arxiv.org/abs/2206.06232)"
ADAPTIVE_GSAM = "Adaptive-GSAM report"


class Number(NamedTuple):
    """A number of a run: how it is called, how it is printed, and which way is better."""

    title: str
    read: object
    digits: int
    unit: str
    lower_is_better: bool


NUMBERS = {
    "accuracy": Number("test accuracy", lambda e: 100 * e["test_accuracy"], 2, " %", False),
    "error": Number("test error", lambda e: 100 - 100 * e["test_accuracy"], 2, " %", True),
    "loss": Number("test loss", lambda e: e["test_loss"], 4, "", True),
    "lambda_1": Number("λ₁", lambda e: e["lambda_1"], 1, "", True),
    "ratio": Number("λ₁ / λ₅", lambda e: e["ratio"], 2, "", True),
    "stopped": Number("stopped early", lambda e: 100 * stopped_early(e), 2, " %", False),
    "best": Number("best epoch", lambda e: 100 * max(e["test_accuracies"]), 2, " %", False),
    "memorized": Number("learned by heart", lambda e: 100 * e["memorized"][-1], 1, " %", True),
}


def stopped_early(run):
    """The test accuracy at the first epoch with the best accuracy on the validation data."""
    return run["test_accuracies"][int(np.argmax(run["validation_accuracies"]))]


# Numbers


def load(folder, name):
    return json.loads((pathlib.Path(folder) / f"{name}.json").read_text(encoding="utf-8"))


def entries(content, **where):
    """The runs with these tags, in the order of their seeds."""
    found = [
        run for run in content["runs"] if all(run.get(key) == value for key, value in where.items())
    ]
    return sorted(found, key=lambda run: run["seed"])


def mean_and_error(values):
    """The mean, and its standard error."""
    values = np.asarray(values, float)
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


def interval(gains):
    """The mean of paired differences, and what stands on each side of it at the level of 95 %."""
    mean, error = mean_and_error(gains)
    return mean, stats.t.ppf(0.975, len(gains) - 1) * error if len(gains) > 1 else math.inf


def text_of(values, number):
    mean, error = mean_and_error(values)
    digits = number.digits
    if error > 0:  # at least one digit of it
        digits = max(digits, -math.floor(math.log10(error)))
    return f"{mean:.{digits}f} ± {error:.{digits}f}{number.unit}"


def verdict(better, worse, lower_is_better):
    """What the paired differences say, seed by seed, at the level of 95 %."""
    gain = np.subtract(worse, better) if lower_is_better else np.subtract(better, worse)
    mean, margin = interval(gain)
    if mean > margin:
        return "holds"
    return "the other way round" if -mean > margin else "no difference seen"


def conditions(content):
    """The data sets of an experiment; `None` if it has but one, without a tag."""
    return list(dict.fromkeys(run.get("data") for run in content["runs"]))


def lengths(content):
    """The lengths of the trainings with the chosen settings, in epochs."""
    return sorted({run["epochs"] for run in entries(content, stage="final")})


# Claims


class Comparison(NamedTuple):
    """The same number of two contestants, seed by seed.

    Attributes:
        better, worse: lists of Floats, in the order of the claim.
        number: the `Number` that they are.
        where: String, what tells this comparison from others of the claim.
    """

    better: list
    worse: list
    number: Number
    where: str = ""

    @property
    def text(self):
        better, worse = (text_of(values, self.number) for values in (self.better, self.worse))
        return f"{self.where}{better} against {worse} (n = {len(self.better)})"

    @property
    def verdict(self):
        return verdict(self.better, self.worse, self.number.lower_is_better)


class Correlation(NamedTuple):
    """Whether one number of many networks ranks them as another one does: Spearman's rho.

    Attributes:
        x, y: lists of Floats, one for each network.
        where: String, what tells this correlation from others of the claim.
    """

    x: list
    y: list
    where: str = ""

    @property
    def coefficient(self):
        return float(stats.spearmanr(self.x, self.y).statistic)

    @property
    def text(self):
        return f"{self.where}rank correlation {self.coefficient:.2f} (n = {len(self.x)})"

    @property
    def verdict(self):
        if stats.spearmanr(self.x, self.y).pvalue >= 0.05:
            return "no correlation seen"
        return "holds" if self.coefficient > 0 else "the other way round"


def claim(text, source, published, comparisons):
    """A row of the table of claims: what is said, by whom, and what was seen here.

    Args:
        text: String, that one is better than another.
        source: String, the paper.
        published: String, its figures.
        comparisons: `Comparison`s, or what else has a `text` and a `verdict`.
    """
    columns = zip(*((c.text, c.verdict) for c in comparisons), strict=True)
    ours, held = ("<br>".join(column) for column in columns)
    return f"| {text} | {source} | {published} | {ours} | {held} |"


def compared(content, number, better, worse, at=((1, 1),)):
    """The final trainings of two methods, on each data set.

    Args:
        content: what is in the JSON.
        number: String, the key in `NUMBERS`.
        better, worse: the methods.
        at: pairs of how often the one and the other sees the data, relative
            to the shortest training.
    """
    number, epochs = NUMBERS[number], lengths(content)
    for data in conditions(content):
        for times in at:
            values = [
                [
                    number.read(run)
                    for run in entries(
                        content, stage="final", method=method, epochs=epochs[t - 1], data=data
                    )
                ]
                for method, t in zip((better, worse), times, strict=True)
            ]
            where = ""
            if data is not None:
                many = " and ".join(str(epochs[t - 1]) for t in sorted(set(times)))
                where = f"{NAMES[data]}, {many} epochs: "
            yield Comparison(*values, number, where)


# Tables


def methods(content, names, data=None, times=1):
    """The final trainings of an experiment, one row per method.

    Args:
        content: what is in the JSON.
        names: the numbers to be shown, keys of `NUMBERS`.
        data: the data set, where there are several. Defaults to `None`.
        times: Integer, which length of training, in those of the shortest.
            Defaults to `1`.
    """
    epochs = lengths(content)[times - 1]
    lines = [
        f"| method | chosen setting | {' | '.join(NUMBERS[n].title for n in names)} | seeds |",
        "|---" * (len(names) + 3) + "|",
    ]
    if "bayes" in content:
        lines.append(_reference("best possible", content["bayes"]))
    if "line" in content:
        lines.append(_reference("a straight line", content["line"]))
    rows = [("final", method) for method in dict.fromkeys(r["method"] for r in content["runs"])]
    for stage, method in [*rows, ("control", "sgd")]:
        found = entries(content, stage=stage, method=method, epochs=epochs, data=data)
        if not found:  # Not each experiment has a control.
            continue
        title = f"*{NAMES[method]}, control*" if stage == "control" else NAMES[method]
        lines.append(row(title, found, names))
    return lines


def row(title, runs, names):
    """A row of a table: a title, the setting that these runs share, their numbers, and how many."""
    cells = [text_of([NUMBERS[n].read(run) for run in runs], NUMBERS[n]) for n in names]
    return f"| {title} | {setting_text(runs[0]['setting'])} | {' | '.join(cells)} | {len(runs)} |"


def setting_text(setting):
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in setting.items())


def _reference(name, known):
    """A row for a classifier that was not trained with any of the methods."""
    (accuracy, error), (loss, loss_error) = known["accuracy"], known["loss"]
    return (
        f"| *{name}* | - | {100 * accuracy:.2f} ± {100 * error:.2f} % | {loss:.4f} ± "
        f"{loss_error:.4f} | - |"
    )


def every_table(content, names):
    """What a script prints in the end: the tables of `methods`, each beneath a title."""
    for data in conditions(content):
        for times, epochs in enumerate(lengths(content), 1):
            yield f"\n{NAMES.get(data, content['name'])}, {epochs} epochs"
            yield from methods(content, names, data, times)


# Pictures


def panels(rows, columns, width=4.0, height=3.2):
    import matplotlib

    matplotlib.use("Agg")  # Pictures go into files.
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def dots(panel, content, number, **where):
    """Mean and standard error of each method, beneath each other; the seeds as small dots."""
    number = NUMBERS[number]
    present = list(dict.fromkeys(run["method"] for run in content["runs"]))
    for i, method in enumerate(present):
        runs = entries(content, stage="final", method=method, **where)
        values = [number.read(e) for e in runs]
        mean, error = mean_and_error(values)
        panel.errorbar(mean, i, xerr=error, fmt="o", color=f"C{i}", capsize=3)
        panel.plot(values, [i + 0.2] * len(values), ".", color=f"C{i}", alpha=0.35, ms=4)
    panel.set_yticks(range(len(present)), [NAMES[m] for m in present])
    panel.invert_yaxis()
    panel.set_xlabel(f"{number.title}{',' + number.unit if number.unit else ''}")


def search_over_rho(panel, content, label, color, **where):
    """The validation accuracy over the rho that were tried: means over the seeds."""
    accuracies = {}
    for run in entries(content, stage="search", **where):
        if "rho" in run["setting"]:
            seen = accuracies.setdefault(run["setting"]["rho"], [])
            seen.append(100 * run["validation_accuracy"])
    if not accuracies:  # SGD has none.
        return
    rhos = sorted(accuracies)
    means = [np.mean(accuracies[rho]) for rho in rhos]
    panel.plot(rhos, means, marker="o", color=color, label=label)
    panel.set(xlabel="rho", xscale="log", ylabel="validation accuracy, %")
    panel.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
    panel.minorticks_off()
    panel.set_title("where rho was searched (labels as wrong)", loc="left", fontsize=10)
    panel.legend(frameon=False, fontsize=8)

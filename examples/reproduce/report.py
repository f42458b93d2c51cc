"""Tables and pictures of the reproductions, made from their JSON files. It imports no Keras.

    python examples/reproduce/report.py

writes the tables of docs/reproductions.md and README.md anew, from docs/results/*.json and
benchmarks/results/*.json.
"""

import json
import math
import pathlib
import re
from typing import NamedTuple

import numpy as np
from scipy import stats

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PAGE, RESULTS = ROOT / "docs" / "reproductions.md", ROOT / "docs" / "results"
PAGES = (PAGE, ROOT / "README.md")
BENCHMARKS = ROOT / "benchmarks" / "results"

NAMES = {
    "sgd": "SGD",
    "sam": "SAM",
    "asam": "ASAM",
    "gsam": "GSAM",
    "adaptive_gsam": "Adaptive-GSAM",
    "bsam": "BSAM",
    "cifar10": "CIFAR-10",
    "fashion_mnist": "Fashion-MNIST",
    "digits": "digits",
    "moons": "moons",
    **{f"noise {share:g}": f"{share:.0%} wrong labels" for share in (0.0, 0.2, 0.4, 0.6, 0.8)},
}


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


class Claim(NamedTuple):
    """That one method is better than another in some number.

    `better` and `worse` are pairs of a method and how often it sees the data,
    relative to the shortest training; `at` lists these for the conditions.
    """

    text: str
    source: str
    published: str
    experiment: str
    number: str
    better: str
    worse: str
    #: Pairs: 1 or 2 times the epochs, for the one and for the other method.
    at: tuple = ((1, 1),)


REPORT = "Adaptive-GSAM report"
SAM = "[Foret et al., 2021](https://arxiv.org/abs/2010.01412)"
ASAM = "[Kwon et al., 2021](https://arxiv.org/abs/2102.11600)"
GSAM = "[Zhuang et al., 2022](https://arxiv.org/abs/2203.08065)"
BSAM = "[Deng et al., 2024](https://arxiv.org/abs/2409.13173)"
PORT = "[davda54/sam](https://github.com/davda54/sam), CIFAR-10"
ONCE_TWICE = ((1, 1), (2, 2))

CLAIMS = [
    Claim(
        "Adaptive-GSAM is more accurate than GSAM on moons",
        REPORT,
        "89.0 % against 85.7 %",
        "moons",
        "accuracy",
        "adaptive_gsam",
        "gsam",
    ),
    Claim(
        "its test loss is lower",
        REPORT,
        "0.27 against 0.33",
        "moons",
        "loss",
        "adaptive_gsam",
        "gsam",
    ),
    Claim(
        "Adaptive-GSAM is more accurate than GSAM on MNIST",
        REPORT,
        "98.5 % against 95.3 %",
        "mnist_cnn",
        "accuracy",
        "adaptive_gsam",
        "gsam",
    ),
    Claim(
        "its test loss is lower",
        REPORT,
        "0.01 against 0.04",
        "mnist_cnn",
        "loss",
        "adaptive_gsam",
        "gsam",
    ),
    Claim(
        "SAM is more accurate than SGD where 40 % of the labels are wrong",
        SAM,
        "-",
        "label_noise",
        "accuracy",
        "sam",
        "sgd",
    ),
    Claim(
        "also if both are stopped early",
        SAM,
        "-",
        "label_noise",
        "stopped",
        "sam",
        "sgd",
    ),
    Claim(
        "SAM has a lower test error than SGD",
        f"{SAM}; the figures: {PORT}",
        "2.86 % against 3.20 %",
        "sam_vs_sgd",
        "error",
        "sam",
        "sgd",
        ONCE_TWICE,
    ),
    Claim(
        "also than SGD with twice the epochs, which costs the same",
        SAM,
        "-",
        "sam_vs_sgd",
        "error",
        "sam",
        "sgd",
        ((1, 2),),
    ),
    Claim(
        "SAM has a lower test loss than SGD",
        "no published figure",
        "-",
        "sam_vs_sgd",
        "loss",
        "sam",
        "sgd",
        ONCE_TWICE,
    ),
    Claim(
        "ASAM has a lower test error than SAM",
        f"{ASAM}; the figures: {PORT}",
        "2.55 % against 2.86 %",
        "sam_vs_sgd",
        "error",
        "asam",
        "sam",
        ONCE_TWICE,
    ),
    Claim(
        "GSAM has a lower test error than SAM",
        GSAM,
        "-",
        "sam_vs_sgd",
        "error",
        "gsam",
        "sam",
        ONCE_TWICE,
    ),
    Claim(
        "BSAM has a lower test error than SAM",
        BSAM,
        "-",
        "sam_vs_sgd",
        "error",
        "bsam",
        "sam",
        ONCE_TWICE,
    ),
    Claim(
        "SAM ends with a smaller λ₁ than SGD",
        SAM,
        "-",
        "sam_vs_sgd",
        "lambda_1",
        "sam",
        "sgd",
        ONCE_TWICE,
    ),
    Claim(
        "and with a smaller λ₁ / λ₅",
        SAM,
        "-",
        "sam_vs_sgd",
        "ratio",
        "sam",
        "sgd",
        ONCE_TWICE,
    ),
    Claim(
        "BSAM ends with a smaller λ₁ than SAM",
        BSAM,
        "-",
        "sam_vs_sgd",
        "lambda_1",
        "bsam",
        "sam",
        ONCE_TWICE,
    ),
]


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


def text_of(values, number):
    mean, error = mean_and_error(values)
    digits = number.digits
    if error > 0:  # at least one digit of it
        digits = max(digits, -math.floor(math.log10(error)))
    return f"{mean:.{digits}f} ± {error:.{digits}f}{number.unit}"


def verdict(better, worse, lower_is_better):
    """What the paired differences say, seed by seed, at the level of 95 %."""
    gain = np.subtract(worse, better) if lower_is_better else np.subtract(better, worse)
    mean, error = mean_and_error(gain)
    margin = stats.t.ppf(0.975, len(gain) - 1) * error if len(gain) > 1 else math.inf
    if mean > margin:
        return "holds"
    return "the other way round" if -mean > margin else "no difference seen"


def conditions(content):
    """The data sets of an experiment; `None` if it has but one, without a tag."""
    return list(dict.fromkeys(run.get("data") for run in content["runs"]))


def lengths(content):
    """The lengths of the trainings with the chosen settings, in epochs."""
    return sorted({run["epochs"] for run in entries(content, stage="final")})


# Tables


def claims(folder):
    """Claim, source, published figure, ours, and whether it holds."""
    lines = ["| claim | source | published | ours | holds? |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        content = load(folder, claim.experiment)
        number, epochs, ours, held = NUMBERS[claim.number], lengths(content), [], []
        for data in conditions(content):
            for times in claim.at:
                pair = [
                    entries(content, stage="final", method=m, epochs=epochs[t - 1], data=data)
                    for m, t in zip((claim.better, claim.worse), times, strict=True)
                ]
                values = [[number.read(e) for e in found] for found in pair]
                where = ""
                if data is not None:
                    many = " and ".join(str(epochs[t - 1]) for t in sorted(set(times)))
                    where = f"{NAMES[data]}, {many} epochs: "
                ours.append(f"{where}{text_of(values[0], number)} against ")
                ours[-1] += f"{text_of(values[1], number)} (n = {len(values[0])})"
                held.append(verdict(*values, number.lower_is_better))
        lines.append(
            f"| {claim.text} | {claim.source} | {claim.published} | {'<br>'.join(ours)} | "
            f"{'<br>'.join(held)} |"
        )
    content = load(folder, "mnist_cnn")
    for name in ("rho", "alpha"):
        spread = {m: list(losses_on_curve(content, name, m)) for m in ("adaptive_gsam", "gsam")}
        ours = [
            f"{np.mean(values):.2f} (seeds: {', '.join(f'{v:.2f}' for v in values)})"
            for values in spread.values()
        ]
        lines.append(
            f"| Adaptive-GSAM is less sensitive to {name} than GSAM | {REPORT} | - | accuracy lost "
            f"on average over the curve, in %: {ours[0]} against {ours[1]} | "
            f"{verdict(*spread.values(), True)} |"
        )
    return lines


def losses_on_curve(content, name, method):
    """By how much the points of a curve lie below its best one, on average; one per seed."""
    found = entries(content, stage=name, method=method)
    for seed in sorted({e["seed"] for e in found}):
        accuracies = [100 * e["test_accuracy"] for e in found if e["seed"] == seed]
        yield max(accuracies) - float(np.mean(accuracies))


def methods(folder, experiment, data=None, times=1):
    """The final trainings of an experiment, one row per method."""
    content = load(folder, experiment)
    epochs = lengths(content)[times - 1]
    names = ["accuracy", "loss"]
    if experiment == "sam_vs_sgd":
        names = ["error", "loss", "lambda_1", "ratio"]
    elif experiment == "label_noise":
        names = ["accuracy", "stopped", "best", "memorized"]
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
        setting = ", ".join(
            f"{key.replace('_', ' ')} {value:g}" for key, value in found[0]["setting"].items()
        )
        cells = [text_of([NUMBERS[n].read(e) for e in found], NUMBERS[n]) for n in names]
        title = f"*{NAMES[method]}, control*" if stage == "control" else NAMES[method]
        lines.append(f"| {title} | {setting} | {' | '.join(cells)} | {len(found)} |")
    return lines


def _reference(name, known):
    """A row for a classifier that was not trained with any of the methods."""
    (accuracy, error), (loss, loss_error) = known["accuracy"], known["loss"]
    return (
        f"| *{name}* | - | {100 * accuracy:.2f} ± {100 * error:.2f} % | {loss:.4f} ± "
        f"{loss_error:.4f} | - |"
    )


def grid(content, data):
    """The final validation loss for each rho: a list of arrays with one entry per seed."""
    found = entries(content, stage="search", data=data)
    rhos = sorted({e["setting"]["rho"] for e in found})
    return np.array(rhos), [
        np.array([e["validation_loss"] for e in found if e["setting"]["rho"] == rho])
        for rho in rhos
    ]


def _tests(content, data, share):
    """The range tests of a length, by seed."""
    start = f"{data}, {share:g}, "
    return [test for key, test in content["tests"].items() if key.startswith(start)]


def which_rho(folder):
    """The advice of the range test against the best of the grid."""
    content = load(folder, "which_rho")
    lines = [
        "| data | test of | recommended rho, by seed | validation loss at the end with these | "
        "best of the grid | plain training |",
        "|---" * 6 + "|",
    ]
    for data in conditions(content):
        rhos, losses = grid(content, data)
        means = [float(np.mean(values)) for values in losses]
        best = int(np.argmin(means))
        epochs = content["settings"]["epochs"][data]
        for share in content["settings"]["shares"]:
            advice = [test["recommended"] for test in _tests(content, data, share)]
            ours = np.mean([means[int(np.argmin(np.abs(rhos - rho)))] for rho in advice])
            by_seed = ", ".join(f"{rho:g}" for rho in advice)
            lines.append(
                f"| {NAMES[data]} | {share * epochs:g} of {epochs} epochs | {by_seed} | "
                f"{ours:.4f} | {means[best]:.4f} (rho {rhos[best]:g}) | {means[0]:.4f} |"
            )
    return lines


def wrong_labels(folder):
    """What the README shows of `label_noise`: SGD with two learning rates, and the methods."""
    content = load(folder, "label_noise")
    data = _share(content, 0.4)
    shown = ("accuracy", "stopped", "memorized")
    lines = [
        f"| 40 % wrong labels | {' | '.join(NUMBERS[n].title for n in shown)} |",
        "|---" * (len(shown) + 1) + "|",
    ]
    methods = dict.fromkeys(run["method"] for run in content["runs"])
    rows = [("control", "sgd"), *(("final", method) for method in methods)]
    for stage, method in rows:
        found = entries(content, stage=stage, method=method, data=data)
        if found:
            ((name, value),) = list(found[0]["setting"].items())[-1:]
            cells = [text_of([NUMBERS[n].read(e) for e in found], NUMBERS[n]) for n in shown]
            title = f"{NAMES[method]}, {name.replace('_', ' ')} {value:g}"
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _share(content, share):
    """The condition with the share of wrong labels that is nearest to one."""
    return min(conditions(content), key=lambda name: abs(float(name.split()[1]) - share))


#: The networks of the benchmarks, and the programs that ran them.
WORKLOADS = {"W1": "CNN with BatchNormalization", "W2": "MLP", "W3": "transformer"}
WORKERS = {
    "tensorflow-jit": "TensorFlow, XLA",
    "tensorflow": "TensorFlow, graph",
    "jax": "JAX",
    "torch": "PyTorch",
}


def cost(folder):
    """CPU time of a step of SAM and of BSAM, in plain steps: the median over the rounds."""
    del folder  # These are the files of the benchmarks.
    blocks = {
        name: json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))["blocks"]
        for name in WORKLOADS
    }
    lines = [
        f"| SAM / BSAM, in plain steps | {' | '.join(WORKLOADS.values())} |",
        "|---" * (len(WORKLOADS) + 1) + "|",
    ]
    for worker, title in WORKERS.items():
        cells = [
            " / ".join(f"{_ratio(blocks[name], worker, m):.2f}" for m in ("sam", "bsam"))
            for name in WORKLOADS
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _ratio(blocks, worker, contestant):
    """The median over the rounds of the time of a step over that of a plain step."""
    times = {
        (b["contestant"], b["round"]): b["cpu_s"] / b["steps"]
        for b in blocks
        if b["worker"] == worker
    }
    rounds = [n for name, n in times if name == contestant]
    return float(np.median([times[contestant, n] / times["plain", n] for n in rounds]))


#: The tables of the pages, by the name in their comments.
TABLES = {
    "wrong labels": wrong_labels,
    "cost": cost,
    "label_noise": lambda folder: methods(folder, "label_noise", "noise 0.4"),
    "claims": claims,
    "moons": lambda folder: methods(folder, "moons"),
    "mnist_cnn": lambda folder: methods(folder, "mnist_cnn"),
    **{
        f"sam_vs_sgd {data} {times}x": lambda folder, data=data, times=times: methods(
            folder, "sam_vs_sgd", data, times
        )
        for data in ("cifar10", "fashion_mnist")
        for times in (1, 2)
    },
    "which_rho": which_rho,
}

_TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def fill(page, folder=RESULTS):
    """The page with its tables made anew from the JSON files of a folder."""
    return _TABLE.sub(lambda m: m[1] + "\n".join(TABLES[m[2]](folder)) + "\n" + m[3], page)


# Pictures


def show(folder, name):
    """Print the tables of an experiment, and save its picture beside its JSON."""
    content = load(folder, name)
    if name == "which_rho":
        print("\n" + "\n".join(which_rho(folder)))
    else:
        for data in conditions(content):
            for times, epochs in enumerate(lengths(content), 1):
                print(f"\n{NAMES.get(data, name)}, {epochs} epochs")
                print("\n".join(methods(folder, name, data, times)))
    import matplotlib

    matplotlib.use("Agg")
    path = pathlib.Path(folder) / f"{name}.png"
    figure = PICTURES[name](content)
    figure.savefig(path, dpi=110)
    print(f"\nPicture: {path}")


def _panels(rows, columns, width=4.0, height=3.2):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _dots(panel, content, number, **where):
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


def _moons_picture(content):
    figure, ((left, right),) = _panels(1, 2, width=4.6)
    for panel, name, scale in ((left, "accuracy", 100), (right, "loss", 1)):
        _dots(panel, content, name)
        published = {"gsam": (85.7, 0.33), "adaptive_gsam": (89.0, 0.27)}
        for i, method in enumerate(NAMES):
            if method in published:
                value = published[method][scale == 1]
                label = "published" if method == "gsam" else None
                panel.plot(value, i, "x", color=f"C{i}", ms=8, label=label)
        known = {"best possible": ("bayes", "-"), "straight line": ("line", "--")}
        for label, (key, style) in known.items():
            if key in content:
                value = scale * content[key][name][0]
                panel.axvline(value, color="black", lw=1, ls=style, label=label)
    right.legend(frameon=False)
    return figure


def _mnist_picture(content):
    figure, ((left, middle, right),) = _panels(1, 3, width=4.2)
    _dots(left, content, "accuracy")
    for panel, name in ((middle, "rho"), (right, "alpha")):
        for method, color in (("gsam", "C3"), ("adaptive_gsam", "C4")):
            runs = entries(content, stage=name, method=method)
            values = sorted({e["setting"][name] for e in runs})
            curves = [
                [100 * e["test_accuracy"] for e in runs if e["setting"][name] == value]
                for value in values
            ]
            low, high = ([f(curve) for curve in curves] for f in (np.min, np.max))
            mean = [np.mean(curve) for curve in curves]
            panel.plot(values, mean, marker="o", color=color, label=NAMES[method])
            panel.fill_between(values, low, high, color=color, alpha=0.15, lw=0)
        panel.set(xlabel=name, ylabel="test accuracy, %", xscale="log")
    middle.legend(frameon=False, loc="lower left")
    return figure


def _sam_picture(content):
    data = conditions(content)
    figure, panels = _panels(2 * len(data), 3, width=4.2, height=2.6)
    where = [(d, e) for d in data for e in lengths(content)]
    for row, (name, epochs) in zip(panels, where, strict=True):
        for panel, number in zip(row, ("error", "lambda_1", "ratio"), strict=True):
            _dots(panel, content, number, data=name, epochs=epochs)
        row[0].set_title(f"{NAMES[name]}, {epochs} epochs", loc="left")
    return figure


def _rho_picture(content):
    data = conditions(content)
    figure, panels = _panels(1, len(data), width=4.4)
    for panel, name in zip(panels[0], data, strict=True):
        rhos, losses = grid(content, name)
        means, errors = zip(*map(mean_and_error, losses), strict=True)
        panel.axhline(means[0], color="gray", ls="--", label="plain training")
        panel.errorbar(
            rhos[1:], means[1:], errors[1:], marker="o", color="black", label="at the end"
        )
        for i, share in enumerate(content["settings"]["shares"]):
            tests = _tests(content, name, share)
            curve = np.mean([test["val_loss"] for test in tests], 0)[1:]
            panel.plot(rhos[1:], curve, ":", marker=".", color=f"C{i}")
            # What the tests advise, marked where these trainings then end.
            for test in tests:
                end = np.interp(test["recommended"], rhos, means)
                panel.plot(test["recommended"], end, "o", ms=11 - 2 * i, mfc="none", color=f"C{i}")
            panel.plot(
                [], [], ":", marker="o", mfc="none", color=f"C{i}", label=f"test of {share:.0%}"
            )
        panel.set(xlabel="rho", ylabel="validation loss", xscale="log", yscale="log")
        panel.set_title(NAMES[name], loc="left")
    panels[0][0].legend(frameon=False, fontsize=8)
    return figure


def _noise_picture(content):
    """Accuracy and what was learned by heart, over the epochs, at the share nearest to 40 %."""
    data = _share(content, 0.4)
    figure, ((left, middle, right),) = _panels(1, 3, width=4.6)
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
    _dots(right, content, "accuracy", data=data)
    usual = [NUMBERS["accuracy"].read(e) for e in entries(content, stage="control", data=data)]
    right.axvline(np.mean(usual), color="C0", lw=1)
    right.text(np.mean(usual), 5.4, " SGD,\n usual rate", color="C0", va="bottom", fontsize=8)
    right.set_title("at the end", loc="left")
    return figure


PICTURES = {
    "label_noise": _noise_picture,
    "moons": _moons_picture,
    "mnist_cnn": _mnist_picture,
    "sam_vs_sgd": _sam_picture,
    "which_rho": _rho_picture,
}

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"Filled the tables of {page.relative_to(ROOT)}")

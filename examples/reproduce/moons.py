"""Moons: is Adaptive-GSAM better than GSAM, and how near do all methods come to the best possible?

    python examples/reproduce/moons.py
    python examples/reproduce/moons.py --backend jax --seeds 10 --output docs/results

The Adaptive-GSAM report trains a small network on scikit-learn's moons: 89.0 %
and a loss of 0.27 for Adaptive-GSAM, 85.7 % and 0.33 for GSAM. The densities of
the moons are known, so that the best possible classifier is, too.
"""

import command

args = command.parse(__doc__)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
from experiment import METHODS, Study, Trainer, latin_hypercube, search_space  # noqa: E402
from sklearn.datasets import make_moons  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

NOISE = 0.3
SETTINGS = {
    "points": 400 if args.quick else 10_000,  # a fifth of them to choose the settings by
    "test_points": 400 if args.quick else 100_000,
    "noise": NOISE,
    "epochs": 1 if args.quick else 50,
    "batch_size": 64,
    "searched": 2 if args.quick else 8,
}
LEARNING_RATE = (0.01, 0.3)
SEEDS = args.seeds or (2 if args.quick else 10)


def make_network():
    layers = [keras.layers.Dense(32, "relu") for _ in range(3)]
    return keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(1, "sigmoid")])


def make_data():
    """10,000 points, and fresh ones to test on: 2,000 would leave an error of 0.6 %."""
    x, y = make_moons(SETTINGS["points"], noise=NOISE, random_state=0)
    x = x.astype("float32")
    split = SETTINGS["points"] * 4 // 5
    fresh, labels = make_moons(SETTINGS["test_points"], noise=NOISE, random_state=1)
    return {
        "train": (x[:split], y[:split]),
        "validation": (x[split:], y[split:]),
        "test": (fresh.astype("float32"), labels),
    }


def bayes(count, seed=2):
    """Accuracy and loss of the classifier that knows the densities, by Monte Carlo.

    A point of a class lies on half a circle, evenly distributed, plus normal
    noise: its density is an integral over the angle, done here by the midpoint
    rule. Both numbers are means of functions of the probability of class 1.
    """
    x, _ = make_moons(count, noise=NOISE, random_state=seed)
    t = np.pi * (np.arange(256) + 0.5) / 256
    moons = np.stack([np.cos(t), np.sin(t)], -1), np.stack([1 - np.cos(t), 0.5 - np.sin(t)], -1)

    def density(points, moon):
        squares = (points**2).sum(-1)[:, None] - 2 * points @ moon.T + (moon**2).sum(-1)
        return np.exp(-squares / (2 * NOISE**2)).mean(-1)

    def probability(points):
        first, second = (density(points, moon) for moon in moons)
        return np.stack([first, second], -1) / (first + second)[:, None]

    p = np.concatenate([probability(part) for part in np.array_split(x, max(1, count // 10_000))])
    values = {
        "accuracy": p.max(-1),
        "loss": -(p * np.log(np.maximum(p, 1e-300))).sum(-1),
    }
    return {name: [float(v.mean()), float(v.std() / np.sqrt(count))] for name, v in values.items()}


def straight_line(data):
    """Accuracy and loss of logistic regression: what can be had without hidden layers."""
    x, y = data["test"]
    p = LogisticRegression().fit(*data["train"]).predict_proba(x)[np.arange(len(y)), y]
    values = {"accuracy": p > 0.5, "loss": -np.log(p)}
    return {name: [float(v.mean()), float(v.std() / np.sqrt(len(y)))] for name, v in values.items()}


def main():
    total = len(METHODS) * (SETTINGS["searched"] + SEEDS)
    study = Study(args.output / "moons.json", SETTINGS, total)
    data = make_data()
    if "line" not in study.content:
        best = bayes(2_000 if args.quick else 400_000)
        study.save(bayes=best, line=straight_line(data))
    trainer = Trainer(make_network, "binary_crossentropy", data, SETTINGS["batch_size"])
    for method in METHODS:
        space = search_space(method, LEARNING_RATE)
        settings = latin_hypercube(space, SETTINGS["searched"])
        best = study.search(trainer, method, settings, SETTINGS["epochs"])
        for seed in range(SEEDS):
            study.run(trainer, "final", method, best, seed, SETTINGS["epochs"])
    report.show(args.output, "moons")


if __name__ == "__main__":
    main()

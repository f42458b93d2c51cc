"""Twelve points, 100 ReLUs: does SAM combine fewer of them?

    python examples/reproduce/relu_1d.py
    python examples/reproduce/relu_1d.py --backend jax --output docs/results

A network with one hidden layer through the twelve points of Andriushchenko and Flammarion, 2022, by
gradient descent on all of them, with the published starts, learning rate, number of steps and rho.
The function that it ends with is a chain of straight lines. Where neurons that are bent at one
place count once, how many bends does it have between the points? 80 seconds of CPU
time, with JAX.
"""

import command

args = command.parse(__doc__)

import numpy as np  # noqa: E402
import report  # noqa: E402
from experiment import Study  # noqa: E402
from full_batch import make_descent  # noqa: E402
from keras import ops  # noqa: E402
from reports.relu_1d import bends  # noqa: E402

import keras_sharp  # noqa: E402

SETTINGS = {
    "x": [(v + 0.28) / 4 for v in np.arange(-5.5, 6).tolist()],
    "y": [v + 0.345 for v in (-2, 1.5, 0, 0, 2, 1, 0, -1, 0, 1, 2, -1)],
    "neurons": 100,
    "learning_rate": 5e-5,
    "steps": 1000 if args.quick else 1_000_000,
    "rhos": [0.0, 0.3] if args.quick else [0.0, 0.03, 0.1, 0.3],
    # A bend counts if the slope changes by more than this share of the largest slope; bends that
    # are nearer to each other than `near` are one.
    "bend": 0.01,
    "near": 0.01,
}
X, Y = (np.array(SETTINGS[name], "float32") for name in ("x", "y"))
SEEDS = args.seeds or (2 if args.quick else 5)


def make_weights(seed):
    """Directions, thresholds and outgoing weights, distributed as published."""
    random, n = np.random.default_rng(seed), SETTINGS["neurons"]
    signs = 2.5 * random.choice([-1.0, 1.0], n)
    return [signs, 2.5 * random.normal(size=n), 4.0 * random.normal(size=n)]


def loss(w):
    kernel, bias, out = w
    x, y = (ops.convert_to_tensor(values) for values in (X, Y))
    predicted = ops.relu(x[:, None] * kernel + bias) @ out[:, None]
    return 0.5 * ops.sum((predicted[:, 0] - y) ** 2)


descend = make_descent([loss], keras_sharp.methods.SAM())


def predict(w, x):
    kernel, bias, out = w
    return np.maximum(x[:, None] * kernel + bias, 0) @ out


def trainer(method, setting, seed, epochs, test):
    del method, epochs, test  # There are no test data.
    w = make_weights(seed)
    # Falling to 0 along a line, as published, in pieces between which memory is free.
    rates = setting["learning_rate"] * (1 - np.arange(SETTINGS["steps"]) / SETTINGS["steps"])
    for piece in np.array_split(rates, 10):
        w = descend(w, setting["rho"], piece)
    train_loss = float(loss(w))
    w = [ops.convert_to_numpy(v).astype("float64") for v in w]
    grid = np.linspace(X[0], X[-1], 201)
    places, changes = bends(w, (X[0], X[-1]), SETTINGS["near"])
    slopes = np.diff(predict(w, grid)) / np.diff(grid)
    strong = np.abs(changes) > SETTINGS["bend"] * np.abs(slopes).max()
    return {
        "train_loss": train_loss,
        "bends": float(strong.sum()),
        "active": float(np.sum(np.max(X[:, None] * w[0] + w[1], 0) > 0)),
        "variation": float(np.abs(changes).sum()),
        "curve": predict(w, grid).tolist(),
        "places": places[strong].tolist(),
    }


def main():
    study = Study(args.output / "relu_1d.json", SETTINGS, len(SETTINGS["rhos"]) * SEEDS)
    for rho in SETTINGS["rhos"]:
        setting = {"learning_rate": SETTINGS["learning_rate"], "rho": rho}
        for seed in range(SEEDS):
            study.run(trainer, "final", "sam" if rho else "gd", setting, seed, SETTINGS["steps"])
    report.show(args.output, "relu_1d")


if __name__ == "__main__":
    main()

"""MNIST: is Adaptive-GSAM better than GSAM, and less sensitive to rho and alpha?

    python examples/reproduce/mnist_cnn.py
    python examples/reproduce/mnist_cnn.py --backend jax --seeds 3 --output docs/results

The Adaptive-GSAM report trains a simple CNN for 25 epochs: 98.5 % and a loss of
0.01 for Adaptive-GSAM, 95.3 % and 0.04 for GSAM; and says that Adaptive-GSAM is
less sensitive to hyper-parameters. An hour on one core of a CPU.
"""

import command

args = command.parse(__doc__)

import datasets  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
from experiment import METHODS, Study, Trainer, latin_hypercube, search_space  # noqa: E402

SETTINGS = {
    "data": "digits" if args.quick else "mnist",
    "train": 320 if args.quick else 55_000,
    "validation": 200 if args.quick else 5000,
    "test": 300 if args.quick else 10_000,
    "epochs": 1 if args.quick else 25,
    "batch_size": 64 if args.quick else 128,
    "searched": 2 if args.quick else 4,
    "curve_epochs": 1 if args.quick else 3,
    "curve_points": 2 if args.quick else 6,
    "curve_seeds": 1 if args.quick else 3,
}
LEARNING_RATE = (0.01, 0.3)
ALPHA = (0.1, 1.0)
SEEDS = args.seeds or (2 if args.quick else 3)
# The same width for both on a logarithmic scale, around where the search looked.
CURVES = {"gsam": (0.01, 1.0), "adaptive_gsam": (0.05, 5.0)}


def make_network(shape):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(8, 3, strides=2, activation="relu"),
            layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, "relu"),
            layers.Dense(10),
        ]
    )


def main():
    curves = len(CURVES) * 2 * SETTINGS["curve_points"] * SETTINGS["curve_seeds"]
    total = len(METHODS) * (SETTINGS["searched"] + SEEDS) + curves
    study = Study(args.output / "mnist_cnn.json", SETTINGS, total)
    n, more = SETTINGS["train"], SETTINGS["validation"]
    (x, y), test = datasets.load_images(SETTINGS["data"], n + more, SETTINGS["test"])
    trainer = Trainer(
        lambda: make_network(x.shape[1:]),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        {"train": (x[:n], y[:n]), "validation": (x[n:], y[n:]), "test": test},
        SETTINGS["batch_size"],
    )
    for method in METHODS:
        space = search_space(method, LEARNING_RATE, alpha=ALPHA)
        settings = latin_hypercube(space, SETTINGS["searched"])
        best = study.search(trainer, method, settings, SETTINGS["epochs"])
        for seed in range(SEEDS):
            study.run(trainer, "final", method, best, seed, SETTINGS["epochs"])
        if method not in CURVES:
            continue
        # One number moves, the others stay as chosen.
        for name, (low, high) in {"rho": CURVES[method], "alpha": (0.02, 2.0)}.items():
            for value in np.geomspace(low, high, SETTINGS["curve_points"]):
                setting = {**best, name: float(f"{value:.3g}")}
                for seed in range(SETTINGS["curve_seeds"]):
                    study.run(trainer, name, method, setting, seed, SETTINGS["curve_epochs"])
    report.show(args.output, "mnist_cnn")


if __name__ == "__main__":
    main()

"""Which rho: does a short test find what a full grid search finds?

    python examples/reproduce/which_rho.py
    python examples/reproduce/which_rho.py --backend jax --seeds 3 --output docs/results

Trains with SAM on three small data sets: to the end with each rho of a grid and
several seeds, and with `keras_sharp.rho_range_test`. What is lost by taking the
test's advice in place of the best of the grid?
"""

import command

args = command.parse(__doc__)

import datasets  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
from experiment import Study, Trainer  # noqa: E402
from sklearn.datasets import make_moons  # noqa: E402

import keras_sharp  # noqa: E402

SETTINGS = {
    "data": ["digits"] if args.quick else ["moons", "digits", "fashion_mnist"],
    "train": 200 if args.quick else 1000,
    "validation": 100 if args.quick else 2000,
    "rhos": [0.01, 0.1] if args.quick else [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5],
    "learning_rate": 0.05,
    "epochs": {"moons": 200, "digits": 1 if args.quick else 20, "fashion_mnist": 20},
    "shares": [1.0] if args.quick else [0.05, 0.1, 0.2],  # of these epochs, for the test
    "batch_size": 32,
}
SEEDS = args.seeds or (1 if args.quick else 3)


def make_trainer(name):
    layers, n, more = keras.layers, SETTINGS["train"], SETTINGS["validation"]
    if name == "moons":
        n = n // 5  # So few that the network learns the noise.
        x, y = make_moons(n + more, noise=0.3, random_state=0)
        hidden = [layers.Dense(64, "relu") for _ in range(3)]
        outputs = 2
    else:
        if name == "digits":
            more = min(more, 400)
        (x, y), _ = datasets.load_images(name, n + more, 0)
        hidden = [layers.Conv2D(f, 3, strides=2, activation="relu") for f in (16, 32)]
        hidden += [layers.Flatten(), layers.Dense(64, "relu")]
        outputs = 10

    def make_network():
        copies = [layer.from_config(layer.get_config()) for layer in hidden]
        return keras.Sequential([keras.Input(x.shape[1:]), *copies, layers.Dense(outputs)])

    return Trainer(
        make_network,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        {"train": (x[:n], y[:n]), "validation": (x[n:], y[n:])},
        SETTINGS["batch_size"],
    )


def range_test(trainer, epochs, seed):
    """What the test says, as lists for the JSON."""
    setting = {"learning_rate": SETTINGS["learning_rate"], "rho": 0.05}
    trainer.reset("sam", setting, seed)
    found = keras_sharp.rho_range_test(
        trainer.model,
        *trainer.data["train"],
        validation_data=trainer.data["validation"],
        rhos=SETTINGS["rhos"],
        epochs=epochs,
        batch_size=SETTINGS["batch_size"],
        seed=seed,
        verbose=0,
    )
    return {name: np.round(value, 6).tolist() for name, value in found._asdict().items()}


def main():
    total = len(SETTINGS["data"]) * (len(SETTINGS["rhos"]) + 1) * SEEDS
    study = Study(args.output / "which_rho.json", SETTINGS, total)
    for name in SETTINGS["data"]:
        trainer = make_trainer(name)
        epochs = SETTINGS["epochs"][name]
        for share in SETTINGS["shares"]:
            for seed in range(SEEDS):
                key, tests = f"{name}, {share:g}, seed {seed}", study.content.get("tests", {})
                if key not in tests:
                    test = range_test(trainer, round(share * epochs), seed)
                    study.save(tests={**tests, key: test})
        for rho in [0.0, *SETTINGS["rhos"]]:
            setting = {"learning_rate": SETTINGS["learning_rate"], "rho": rho}
            for seed in range(SEEDS):
                study.run(trainer, "search", "sam", setting, seed, epochs, data=name)
    report.show(args.output, "which_rho")


if __name__ == "__main__":
    main()

"""Which sharpness tells the test error? Max-sharpness and m-sharpness, at several radii.

    python examples/reproduce/which_sharpness.py
    python examples/reproduce/which_sharpness.py --backend jax --output docs/results

Foret et al., 2021, and Andriushchenko and Flammarion, 2022, report that the highest loss around all
data tells little of generalization, and more where small groups of m examples have an adversary
of their own; and that even so batch sizes cannot be compared. Here SGD and SAM train networks
with three batch sizes and several rho on 1,000 images, and each sharpness at each radius is held
against the test error: over all networks, and among those of one batch size. Four minutes of
CPU time.
"""

import command

args = command.parse(__doc__)

import noise  # noqa: E402
import report  # noqa: E402
from experiment import Study  # noqa: E402

from keras_sharp import sharpness  # noqa: E402
from keras_sharp.surface import LossSurface  # noqa: E402

SETTINGS = {
    "data": "digits" if args.quick else "fashion_mnist",
    "train": 128 if args.quick else 1024,
    "validation": 100,
    "test": 100 if args.quick else 9000,
    "share": 0.0,
    "pixels": 8 if args.quick else 14,
    "width": 16 if args.quick else 128,
    "epochs": 2 if args.quick else 60,
    "batch_sizes": [64, 128] if args.quick else [32, 128, 512],
    "learning_rate": 0.05,
    "rhos": [0.0, 0.1] if args.quick else [0.0, 0.05, 0.1, 0.2, 0.4],
    "radii": [0.1] if args.quick else [0.03, 0.1, 0.3, 1.0],
    "m": [None, 16] if args.quick else [None, 64, 8],  # None is one adversary for all.
    "steps": 2 if args.quick else 5,
}
SEEDS = args.seeds or (2 if args.quick else 3)


def make_trainer(batch_size):
    trainer = noise.make_small_trainer(SETTINGS | {"batch_size": batch_size})
    x, y = trainer.data["train"]
    surfaces = {m: LossSurface(trainer.model, x, y, batch_size=m or len(x)) for m in SETTINGS["m"]}

    def measure(network):
        del network  # The surfaces read the weights that it has now.
        found = {}
        for m, surface in surfaces.items():
            for rho in SETTINGS["radii"]:
                found[f"m {m or 'all'}, rho {rho:g}"] = sharpness.m_sharpness(
                    surface, rho=rho, steps=SETTINGS["steps"]
                )
        return found

    trainer.measure = measure
    return trainer


def main():
    settings = [
        {"learning_rate": SETTINGS["learning_rate"]} | ({"rho": rho} if rho else {})
        for rho in SETTINGS["rhos"]
    ]
    total = len(SETTINGS["batch_sizes"]) * len(settings) * SEEDS
    study = Study(args.output / "which_sharpness.json", SETTINGS, total)
    for batch_size in SETTINGS["batch_sizes"]:
        trainer = make_trainer(batch_size)
        for setting in settings:
            method = "sam" if "rho" in setting else "sgd"
            for seed in range(SEEDS):
                study.run(
                    trainer,
                    "final",
                    method,
                    setting,
                    seed,
                    SETTINGS["epochs"],
                    batch_size=batch_size,
                )
    report.show(args.output, "which_sharpness")


if __name__ == "__main__":
    main()

"""Does the surrogate gap tell the largest eigenvalue, where the perturbed loss does not?

    python examples/reproduce/surrogate_gap.py
    python examples/reproduce/surrogate_gap.py --backend jax --output docs/results

Zhuang et al., 2022: near a minimum the largest eigenvalue of the Hessian is about 2 h / rho², where
h is the gap between the highest loss within rho and the loss (lemma 3); but the perturbed loss
itself, which SAM minimizes, may be lower in the sharper of two minima (lemma 1). Here both are
looked at in networks that SGD and SAM have trained with several learning rates, until they know 500
images by heart. Half a minute of CPU time.
"""

import command

args = command.parse(__doc__)

import noise  # noqa: E402
import report  # noqa: E402
from experiment import Study  # noqa: E402

from keras_sharp import curvature, sharpness  # noqa: E402
from keras_sharp.surface import LossSurface  # noqa: E402

SETTINGS = {
    "data": "digits" if args.quick else "fashion_mnist",
    "train": 100 if args.quick else 500,
    "validation": 100,
    "test": 100 if args.quick else 2000,
    "share": 0.0,
    "pixels": 8 if args.quick else 14,
    "width": 16 if args.quick else 64,
    "epochs": 2 if args.quick else 100,
    "batch_size": 50,
    "learning_rates": [0.05, 0.1] if args.quick else [0.01, 0.02, 0.04, 0.08],
    "rhos": [0.0, 0.1] if args.quick else [0.0, 0.05, 0.1, 0.2],
    "rho_measured": 0.01,
    "steps": 2 if args.quick else 20,  # of the ascent to the highest loss
}
SEEDS = args.seeds or 2


def make_trainer():
    trainer = noise.make_small_trainer(SETTINGS)
    surface = LossSurface(trainer.model, *trainer.data["train"])
    hessian = curvature.HessianOperator(trainer.model, *trainer.data["train"])

    def measure(network):
        del network  # The surface reads the weights that it has now.
        hessian.refresh()
        rho = SETTINGS["rho_measured"]
        return {
            "lambda_1": curvature.eigenvalues(hessian, k=1, verbose=0).values[0],
            "gap_1_step": sharpness.surrogate_gap(surface, rho=rho),
            "gap": sharpness.max_sharpness(surface, rho=rho, steps=SETTINGS["steps"], restarts=2),
        }

    trainer.measure = measure
    return trainer


def main():
    runs = [(rate, rho) for rho in SETTINGS["rhos"] for rate in SETTINGS["learning_rates"]]
    study = Study(args.output / "surrogate_gap.json", SETTINGS, len(runs) * SEEDS)
    trainer = make_trainer()
    for rate, rho in runs:
        setting = {"learning_rate": rate} | ({"rho": rho} if rho else {})
        for seed in range(SEEDS):
            study.run(trainer, "final", "sam" if rho else "sgd", setting, seed, SETTINGS["epochs"])
    report.show(args.output, "surrogate_gap")


if __name__ == "__main__":
    main()

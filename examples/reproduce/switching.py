"""When must SAM be there? From plain training to SAM, and back, at several moments.

    python examples/reproduce/switching.py
    python examples/reproduce/switching.py --backend jax --output docs/results

Andriushchenko and Flammarion, 2022, report that what happens late decides: SAM in the last part of
a training is nearly as good as all along, SAM in the first part only is nearly lost, and SAM
that starts at a minimum of plain training still improves it. Here with 40 % wrong labels, on the
network of label_noise.py; all contestants have its usual learning rate, and rho is searched for
each moment. Twenty minutes of CPU time.
"""

import command

args = command.parse(__doc__)

import noise  # noqa: E402
import report  # noqa: E402
from experiment import Study  # noqa: E402
from results import MOMENTS  # noqa: E402

from keras_sharp import policies  # noqa: E402

SETTINGS = noise.settings(args.quick, [0.4]) | {
    "moments": [0.6] if args.quick else list(MOMENTS),
    "rhos": [0.1, 0.4],
    "searched": 2 if args.quick else 3,
}
SEEDS = args.seeds or (2 if args.quick else 5)
CONTESTANTS = {
    "sam": lambda: "sam",
    **{f"from {t:g}": lambda t=t: policies.From("sam", t) for t in SETTINGS["moments"]},
    **{f"until {t:g}": lambda t=t: policies.Until("sam", t) for t in SETTINGS["moments"]},
}


def main():
    total = len(CONTESTANTS) * (SETTINGS["searched"] + SEEDS) + SEEDS
    study = Study(args.output / "switching.json", SETTINGS, total)
    trainer = noise.make_trainer(SETTINGS, SETTINGS["shares"][0], CONTESTANTS)
    epochs = SETTINGS["epochs"]
    for seed in range(SEEDS):
        study.run(trainer, "final", "sgd", {"learning_rate": noise.USUAL}, seed, epochs)
    settings = noise.around("rho", SETTINGS["rhos"], SETTINGS["searched"])
    for method in CONTESTANTS:
        best = study.search(trainer, method, settings, epochs)
        for seed in range(SEEDS):
            study.run(trainer, "final", method, best, seed, epochs)
    report.show(args.output, "switching")


if __name__ == "__main__":
    main()

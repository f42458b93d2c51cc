"""Does a smaller m generalize better? An adversary for each m examples of a batch.

    python examples/reproduce/m_sharpness.py
    python examples/reproduce/m_sharpness.py --backend jax --output docs/results

Foret et al., 2021, report that SAM generalizes better where each m examples have an adversary of
their own (on several devices, each its part of the batch), and the better the smaller m is. Here on
images of which 40 % have a wrong label, in batches of 64, which `num_micro_batches` splits in parts
of 64, 16, 4 and 1; rho is searched for each m. Five minutes of CPU time.
"""

import command

args = command.parse(__doc__)

import noise  # noqa: E402
import report  # noqa: E402
from experiment import Study  # noqa: E402

SETTINGS = {
    "data": "digits" if args.quick else "fashion_mnist",
    "train": 128 if args.quick else 1024,
    "validation": 100 if args.quick else 4000,
    "test": 100 if args.quick else 5000,
    "share": 0.4,
    "pixels": 8 if args.quick else 14,
    "width": 16 if args.quick else 128,
    "epochs": 1 if args.quick else 30,
    "batch_size": 64,
    "m": [64, 16] if args.quick else [64, 16, 4, 1],
    "learning_rate": 0.1,
    "learning_rates": [0.003, 0.1],  # where that of SGD is searched
    "rhos": [0.025, 0.4],
    "searched": 2 if args.quick else 5,
    "search_seeds": 1 if args.quick else 3,
}
SEEDS = args.seeds or (2 if args.quick else 5)


def main():
    contestants = [("sgd", SETTINGS["batch_size"]), *(("sam", m) for m in SETTINGS["m"])]
    total = len(contestants) * (SETTINGS["searched"] * SETTINGS["search_seeds"] + SEEDS)
    study = Study(args.output / "m_sharpness.json", SETTINGS, total)
    searched_with = range(100, 100 + SETTINGS["search_seeds"])
    for method, m in contestants:
        trainer = noise.make_small_trainer(SETTINGS, num_micro_batches=SETTINGS["batch_size"] // m)
        settings = noise.small_settings_of(method, SETTINGS)
        where = {"epochs": SETTINGS["epochs"], "m": m}
        best = study.search(trainer, method, settings, seeds=searched_with, **where)
        for seed in range(SEEDS):
            study.run(trainer, "final", method, best, seed, **where)
    report.show(args.output, "m_sharpness")


if __name__ == "__main__":
    main()

"""Does a better adversary help? More ascent steps, and the second-order term.

    python examples/reproduce/inner_maximization.py
    python examples/reproduce/inner_maximization.py --backend jax --output docs/results

SAM climbs once, and takes its perturbation for a constant. Foret et al., 2021, and Andriushchenko
and Flammarion, 2022, report that an adversary that solves its problem better does not train better
networks. Here on images of which 40 % have a wrong label, with rho searched for each variant. More
ascent steps each go as far as rho, and are projected back to the same ball, or a part of rho each,
which leads them no further. Four minutes of CPU time.
"""

import command

args = command.parse(__doc__)

import noise  # noqa: E402
import report  # noqa: E402
from experiment import Study  # noqa: E402

from keras_sharp import methods, neighborhoods  # noqa: E402

SETTINGS = {
    "data": "digits" if args.quick else "fashion_mnist",
    "train": 200 if args.quick else 1000,
    "validation": 100 if args.quick else 4000,
    "test": 100 if args.quick else 5000,
    "share": 0.4,
    "pixels": 8 if args.quick else 14,
    "width": 32 if args.quick else 128,
    "epochs": 2 if args.quick else 30,
    "batch_size": 50,
    "learning_rate": 0.1,
    "learning_rates": [0.003, 0.1],  # where that of SGD is searched
    "rhos": [0.05, 0.4],
    "searched": 2 if args.quick else 5,
    "search_seeds": 1 if args.quick else 3,  # one alone decides by chance
}
SEEDS = args.seeds or (2 if args.quick else 5)


class PartOfTheWay(neighborhoods.Ball):
    """Steps of the length rho / steps, which together stay in the ball without a projection."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def climb(self, g, w, rho, biases=None):
        return super().climb(g, w, rho / self.steps, biases)


VARIANTS = {
    "sgd": lambda: None,
    "sam": methods.SAM,
    "sam_2_steps": lambda: methods.SAM(ascent_steps=2),
    "sam_5_steps": lambda: methods.SAM(ascent_steps=5),
    "sam_5_parts": lambda: methods.SAM(ascent_steps=5, neighborhood=PartOfTheWay(5)),
    "sam_second_order": lambda: methods.SAM(second_order=True),
}


def main():
    total = len(VARIANTS) * (SETTINGS["searched"] * SETTINGS["search_seeds"] + SEEDS)
    study = Study(args.output / "inner_maximization.json", SETTINGS, total)
    trainer, epochs = noise.make_small_trainer(SETTINGS, VARIANTS), SETTINGS["epochs"]
    searched_with = range(100, 100 + SETTINGS["search_seeds"])  # The final trainings have others.
    for variant in VARIANTS:
        settings = noise.small_settings_of(variant, SETTINGS)
        best = study.search(trainer, variant, settings, epochs, searched_with)
        for seed in range(SEEDS):
            study.run(trainer, "final", variant, best, seed, epochs)
    report.show(args.output, "inner_maximization")


if __name__ == "__main__":
    main()

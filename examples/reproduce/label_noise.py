"""Wrong labels: what SGD learns by heart, and what the methods do not.

    python examples/reproduce/label_noise.py
    python examples/reproduce/label_noise.py --backend jax --seeds 5 --output docs/results

A small BatchNorm network on 2,000 images of Fashion-MNIST, of which a share has a label
drawn at random from the other nine. One number of each method is searched, on images whose
labels are as often wrong, since nobody has better ones: the learning rate of SGD, and the rho
of the others, which keep the learning rate of 0.1 that does well with the right labels. SGD with
this rate is the control. The fair opponents are SGD with the rate that was chosen, and SGD
stopped at the epoch with the best accuracy on these images. Half an hour per share on one core.
"""

import command

args = command.parse(__doc__)

import noise  # noqa: E402
import report  # noqa: E402
from experiment import METHODS, Study  # noqa: E402

SETTINGS = noise.settings(args.quick, [0.4] if args.quick else [0.4, 0.2, 0.6, 0.8, 0.0])
SEEDS = args.seeds or (2 if args.quick else 5)


def main():
    total = len(SETTINGS["shares"]) * (len(METHODS) * (SETTINGS["searched"] + SEEDS) + SEEDS)
    study = Study(args.output / "label_noise.json", SETTINGS, total)
    for share in SETTINGS["shares"]:
        trainer = noise.make_trainer(SETTINGS, share)
        where = {"epochs": SETTINGS["epochs"], "data": f"noise {share:g}"}
        for method in METHODS:
            settings = noise.settings_of(method, SETTINGS["searched"])
            best = study.search(trainer, method, settings, **where)
            for seed in range(SEEDS):
                study.run(trainer, "final", method, best, seed, **where)
            if method == "sgd":
                control = {"learning_rate": noise.USUAL}
                for seed in range(SEEDS):
                    study.run(trainer, "control", method, control, seed, **where)
    report.show(args.output, "label_noise")


if __name__ == "__main__":
    main()

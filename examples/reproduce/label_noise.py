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

import datasets  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
from experiment import METHODS, Study, Trainer  # noqa: E402

SETTINGS = {
    "data": "digits" if args.quick else "fashion_mnist",
    "train": 200 if args.quick else 2000,
    "validation": 100 if args.quick else 1000,
    "test": 100 if args.quick else 2000,
    "shares": [0.4] if args.quick else [0.4, 0.2, 0.6, 0.8, 0.0],
    "filters": [4, 8] if args.quick else [32, 64, 128],
    "epochs": 2 if args.quick else 25,
    "batch_size": 50 if args.quick else 64,
    "searched": 2 if args.quick else 6,
}
USUAL = 0.1
#: Down to where plain training is at its best: a small learning rate, too, keeps the network from
#: learning wrong labels by heart, and a range that ends above it would flatter the other methods.
LEARNING_RATE = (0.003, 0.3)
RHO, SCALED_RHO = (0.05, 0.6), (0.3, 4.0)
SEEDS = args.seeds or (2 if args.quick else 5)


def make_trainer(share):
    n, more = SETTINGS["train"], SETTINGS["validation"]
    (x, y), test = datasets.load_images(SETTINGS["data"], n + more, SETTINGS["test"])
    labels = datasets.mislabel(y, share)
    wrong = np.flatnonzero(labels[:n] != y[:n])
    train, validation = (x[:n], labels[:n]), (x[n:], labels[n:])

    def make_network():
        return datasets.make_network(x.shape[1:], SETTINGS["filters"])

    def accuracy(network, images, labels):
        predictions = network.predict(images, batch_size=1000, verbose=0)
        return float(np.mean(np.argmax(predictions, -1) == labels))

    def follow(network):
        memorized = accuracy(network, x[wrong], labels[wrong]) if len(wrong) else 0.0
        return {
            "test_accuracies": accuracy(network, *test),
            "validation_accuracies": accuracy(network, *validation),
            "memorized": memorized,
        }

    return Trainer(
        make_network,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        {"train": train, "validation": validation, "test": test},
        SETTINGS["batch_size"],
        follow=follow,
    )


def settings_of(method):
    """What is tried with a method: as many values of one number for each."""
    name, (low, high) = "rho", RHO
    if method == "sgd":
        name, (low, high) = "learning_rate", LEARNING_RATE
    elif method in ("asam", "adaptive_gsam"):
        low, high = SCALED_RHO
    values = np.geomspace(low, high, SETTINGS["searched"])
    return [{"learning_rate": USUAL, name: float(f"{value:.3g}")} for value in values]


def main():
    total = len(SETTINGS["shares"]) * (len(METHODS) * (SETTINGS["searched"] + SEEDS) + SEEDS)
    study = Study(args.output / "label_noise.json", SETTINGS, total)
    for share in SETTINGS["shares"]:
        trainer = make_trainer(share)
        where = {"epochs": SETTINGS["epochs"], "data": f"noise {share:g}"}
        for method in METHODS:
            best = study.search(trainer, method, settings_of(method), **where)
            for seed in range(SEEDS):
                study.run(trainer, "final", method, best, seed, **where)
            if method == "sgd":
                for seed in range(SEEDS):
                    study.run(trainer, "control", method, {"learning_rate": USUAL}, seed, **where)
    report.show(args.output, "label_noise")


if __name__ == "__main__":
    main()

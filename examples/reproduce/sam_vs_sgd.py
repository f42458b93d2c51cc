"""SAM and its kin against SGD: test error and the sharpness of the minima, on images.

    python examples/reproduce/sam_vs_sgd.py
    python examples/reproduce/sam_vs_sgd.py --backend jax --seeds 3 --output docs/results

A small ResNet on CIFAR-10 and on Fashion-MNIST, at 1x and at 2x epochs: SAM at 1x
costs what SGD costs at 2x. The papers say that SAM has a lower test error than SGD,
ASAM, GSAM and BSAM a lower one than SAM, and that they end in flatter minima. Here
with a small network, few epochs and no augmentation: two hours on one core of a CPU.
"""

import command

args = command.parse(__doc__)

import datasets  # noqa: E402
import keras  # noqa: E402
import report  # noqa: E402
from experiment import METHODS, Study, Trainer, latin_hypercube, search_space  # noqa: E402

from keras_sharp import curvature  # noqa: E402

SETTINGS = {
    "data": ["digits"] if args.quick else ["cifar10", "fashion_mnist"],
    "train": 200 if args.quick else 20_000,
    "validation": 100 if args.quick else 5000,
    "test": 100 if args.quick else 10_000,
    "width": 4 if args.quick else 12,
    "epochs": [1, 2] if args.quick else [6, 12],
    "batch_size": 25 if args.quick else 128,
    "weight_decay": 5e-4,
    "searched": 1 if args.quick else 3,
    "hessian": 50 if args.quick else 500,
}
LEARNING_RATE = (0.03, 0.3)
RHO, SCALED_RHO = (0.03, 0.3), (0.15, 1.5)
SEEDS = args.seeds or (2 if args.quick else 3)


def make_trainer(name):
    n, more = SETTINGS["train"], SETTINGS["validation"]
    (x, y), test = datasets.load_images(name, n + more, SETTINGS["test"])
    train = x[:n], y[:n]
    trainer = Trainer(
        lambda: datasets.make_resnet(x.shape[1:], SETTINGS["width"]),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        {"train": train, "validation": (x[n:], y[n:]), "test": test},
        SETTINGS["batch_size"],
        weight_decay=SETTINGS["weight_decay"],
    )
    probe = [a[: SETTINGS["hessian"]] for a in train]
    hessian = None

    def measure(network):
        """The largest eigenvalues of the Hessian of the training loss."""
        nonlocal hessian
        if hessian is None:
            hessian = curvature.HessianOperator(network, *probe)
        hessian.refresh()
        first, *_, fifth = curvature.eigenvalues(hessian, k=5, tol=0.03, verbose=0).values
        return {"lambda_1": first, "ratio": first / fifth}

    trainer.measure = measure
    return trainer


def main():
    per_method = SETTINGS["searched"] + SEEDS * len(SETTINGS["epochs"])
    total = len(SETTINGS["data"]) * (len(METHODS) * per_method + SEEDS)
    study = Study(args.output / "sam_vs_sgd.json", SETTINGS, total)
    once = SETTINGS["epochs"][0]
    for name in SETTINGS["data"]:
        trainer, chosen = make_trainer(name), {}
        for method in METHODS:
            space = search_space(method, LEARNING_RATE, RHO, SCALED_RHO)
            settings = latin_hypercube(space, SETTINGS["searched"])
            best = chosen[method] = study.search(trainer, method, settings, once, data=name)
            for seed in range(SEEDS):
                for epochs in SETTINGS["epochs"]:
                    study.run(trainer, "final", method, best, seed, epochs, data=name)
        # What of the flatness is that of the learning rate? SGD with that of SAM.
        control = {"learning_rate": chosen["sam"]["learning_rate"]}
        for seed in range(SEEDS):
            study.run(trainer, "control", "sgd", control, seed, once, data=name)
    report.show(args.output, "sam_vs_sgd")


if __name__ == "__main__":
    main()

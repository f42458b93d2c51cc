"""Which rho? A range test, in the manner of a learning rate finder.

    python examples/choose_rho.py
    python examples/choose_rho.py --backend jax --dataset mnist --method asam

Tries nine radii, each in a short training of the same small network, draws what they
came to, and recommends one. Then trains to the end with it, and without an adversary.
"""

import argparse
import os
import pathlib

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"], help="default: as Keras")
parser.add_argument(
    "--dataset", default="auto", choices=["auto", "fashion_mnist", "mnist", "digits"]
)
parser.add_argument(
    "--method", default="sam", choices=["sam", "asam", "gsam", "adaptive_gsam", "bsam"]
)
parser.add_argument("--train", type=int, default=1000, help="how many images to train on")
parser.add_argument("--epochs", type=int, default=20, help="of the training to the end")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", default="results/choose_rho.png", help="where the picture goes")
args = parser.parse_args()
if args.backend:
    os.environ["KERAS_BACKEND"] = args.backend  # before Keras is imported

import keras  # noqa: E402
import matplotlib  # noqa: E402
from datasets import load_images  # noqa: E402

import keras_sharp  # noqa: E402

matplotlib.use("Agg")


def make_model(method, input_shape):
    """A small convolutional network, wrapped and compiled."""
    keras.utils.set_random_seed(args.seed)  # the same initial weights every time
    layers = [keras.layers.Conv2D(f, 3, strides=2, activation="relu") for f in (16, 32)]
    layers += [keras.layers.Flatten(), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    model = keras_sharp.SharpnessAwareModel(
        keras.Sequential([keras.Input(input_shape), *layers]), method
    )
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def main():
    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    # Half of what is no training data is there to choose rho by, the other half to test on.
    train_data, (x, y) = load_images(args.dataset, num_train=args.train, num_test=4000)
    half = len(x) // 2
    validation_data, test_data = (x[:half], y[:half]), (x[half:], y[half:])
    model = make_model(args.method, x.shape[1:])

    found = keras_sharp.rho_range_test(
        model, *train_data, validation_data=validation_data, epochs=max(1, args.epochs // 10)
    )

    print(
        f"\n{'rho':>8} {'val. loss':>10} {'train loss':>10} {'sharpness':>10} {'rise':>8} "
        f"{'linear':>8} {'cosine':>7}"
    )
    rows = zip(*found[:7], strict=True)
    for rho, val_loss, loss, sharpness, gain, predicted, cosine in rows:
        mark = "  <- recommended" if rho == found.recommended else ""
        print(
            f"{rho:>8.4f} {val_loss:>10.4f} {loss:>10.4f} {sharpness:>10.4f} {gain:>8.4f} "
            f"{predicted:>8.4f} {cosine:>7.3f}{mark}"
        )
    path = pathlib.Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    keras_sharp.plots.rho_range(found).savefig(path, dpi=120)
    print(f"\nPicture: {path}\n")

    model.method.rho = found.recommended  # The model is as it was, but for this.
    contestants = {
        "no adversary": make_model(None, x.shape[1:]),
        f"{args.method}, rho {found.recommended:.3g}": model,
    }
    for name, contestant in contestants.items():
        keras.utils.set_random_seed(args.seed)
        contestant.fit(*train_data, batch_size=32, epochs=args.epochs, verbose=0)
        loss, accuracy = contestant.evaluate(*test_data, batch_size=500, verbose=0)
        print(f"{name:>24}: test accuracy {accuracy:.4f}, test loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()

"""Quickstart: the same network trained with plain SGD and with each method.

    python examples/quickstart.py
    python examples/quickstart.py --backend jax --dataset mnist --epochs 5 --method sam gsam

Trains a small convolutional network with BatchNormalization on 2,000 real
images, once with plain SGD and once with each sharpness-aware method, from the
same initial weights. So few images are easy to learn by heart: there the flat
minima show. Prints how well each method does on test images and how sharp the
minimum is that it found, and saves a picture of the curves.
"""

import argparse
import os
import time

# The settings of each method. The radius of ASAM and AdaptiveGSAM is in units
# of the size of the weights, so it has to be larger.
SETTINGS = {
    "sgd": {},
    "sam": {"rho": 0.1},
    "asam": {"rho": 1.0},
    "gsam": {"rho": 0.1, "alpha": 0.1},
    "adaptive_gsam": {"rho": 1.0, "alpha": 0.1},
    "bsam": {"rho": 0.05},
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"], help="default: as Keras")
parser.add_argument(
    "--dataset", default="auto", choices=["auto", "fashion_mnist", "mnist", "digits"]
)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--method", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", default="results/quickstart.png", help="where the picture goes")
args = parser.parse_args()
if args.backend:
    os.environ["KERAS_BACKEND"] = args.backend  # before Keras is imported

import keras  # noqa: E402
from datasets import load_images  # noqa: E402

import keras_sharp  # noqa: E402


def make_network(input_shape):
    """A small convolutional network with BatchNormalization."""
    # 32 steps make an epoch here: the usual momentum of 0.99 would be too slow.
    layers = [keras.Input(input_shape)]
    for filters in (32, 64, 128):
        layers += [
            keras.layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential(layers)


class Progress(keras.callbacks.Callback):
    """One line per epoch, and the time that each one took."""

    def __init__(self, title):
        super().__init__()
        self.title, self.seconds = title, []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)
        print(
            f"{self.title:>13}  epoch {epoch + 1}/{self.params['epochs']}"
            f"  loss {logs['loss']:.3f}  test accuracy {logs['val_accuracy']:.3f}"
            f"  ({self.seconds[-1]:.1f} s)",
            flush=True,
        )


def train(name, train_data, test_data):
    """Train the network with one method, and measure the minimum that it found."""
    keras.utils.set_random_seed(args.seed)  # the same initial weights for every method
    network = make_network(train_data[0].shape[1:])

    model = network
    if name != "sgd":
        # This is all there is to it: wrap the model, then go on as always.
        method = keras_sharp.methods.METHODS[name](**SETTINGS[name])
        model = keras_sharp.SharpnessAwareModel(network, method)

    steps = args.epochs * -(-len(train_data[0]) // 64)
    model.compile(
        optimizer=keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(0.05, steps), momentum=0.9
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    progress = Progress(name)
    history = model.fit(
        *train_data,
        batch_size=64,
        epochs=args.epochs,
        validation_data=test_data,
        validation_batch_size=500,
        callbacks=[progress],
        verbose=0,
    ).history

    # The wrapped network holds the trained weights.
    loss, accuracy = network.evaluate(*test_data, batch_size=500, verbose=0)
    return {
        "accuracy": accuracy,
        "loss": loss,
        "sharpness": keras_sharp.sharpness.max_sharpness(network, *train_data, rho=RHO),
        # The first epoch also compiles.
        "seconds": min(progress.seconds),
        "history": history,
    }


def print_table(results):
    """One line per method; times relative to plain SGD."""
    unit = results[next(iter(results))]["seconds"]
    print(f"\n{'method':>13} {'test accuracy':>14} {'test loss':>10} {'sharpness':>10} {'time':>6}")
    for name, r in results.items():
        print(
            f"{name:>13} {r['accuracy']:>14.4f} {r['loss']:>10.4f} {r['sharpness']:>10.4f} "
            f"{r['seconds'] / unit:>5.1f}x"
        )
    print(
        f"\nsharpness: rise of the training loss at a step of length {RHO} up the gradient;"
        f"\ntime: that of an epoch, relative to {next(iter(results))}"
    )


def save_picture(results, path):
    """Curves of test accuracy and loss, and the sharpness at the end."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("No picture: it needs matplotlib (pip install keras-sharp[plots])")
        return
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    epochs = range(1, args.epochs + 1)
    for i, (name, r) in enumerate(results.items()):
        style = {"color": f"C{i}", "label": name, "lw": 2.5 if name == "sgd" else 1.5}
        left.plot(epochs, r["history"]["val_accuracy"], **style)
        middle.plot(epochs, r["history"]["val_loss"], **style)
        right.barh(name, r["sharpness"], color=f"C{i}")
        right.text(r["sharpness"], i, f" {r['sharpness']:.3f}", va="center")
    left.set(xlabel="epoch", title="test accuracy")
    left.legend(frameon=False)
    middle.set(xlabel="epoch", title="test loss", yscale="log")
    right.set(title=f"sharpness at rho = {RHO}")
    right.invert_yaxis()
    right.margins(x=0.15)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\nPicture: {path}")


RHO = 0.1  # at which all minima are compared

if __name__ == "__main__":
    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    train_data, test_data = load_images(args.dataset, num_train=2000, num_test=2000)
    results = {name: train(name, train_data, test_data) for name in args.method}
    print_table(results)
    save_picture(results, args.output)

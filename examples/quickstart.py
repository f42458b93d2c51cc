"""Wrong labels: plain training learns them by heart, sharpness-aware training does not.

    python examples/quickstart.py
    python examples/quickstart.py --backend jax --label-noise 0.2 --method sgd sam bsam

Trains a small convolutional network on 2,000 real images, 40 % of which have a wrong
label: once with plain SGD, and with each sharpness-aware method, from the same initial
weights. Prints how well each does on test images with the right labels, at the end and
at its best epoch, and saves a picture. Each rho was chosen on a validation split. So can be
a learning rate with which SGD does better, 72.7 % of the images: see docs/reproductions.md.
"""

import argparse
import os
import time

#: The usual learning rate, and for each method the rho that `make reproduce NAME=label_noise` chose
#: at 40 % of wrong labels (docs/results/label_noise.json).
SETTINGS = {
    "sgd": {"learning_rate": 0.1},
    "sam": {"learning_rate": 0.1, "rho": 0.365},
    "asam": {"learning_rate": 0.1, "rho": 2.38},
    "gsam": {"learning_rate": 0.1, "rho": 0.222},
    "adaptive_gsam": {"learning_rate": 0.1, "rho": 2.38},
    "bsam": {"learning_rate": 0.1, "rho": 0.135},
}

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"], help="None: as Keras")
parser.add_argument(
    "--dataset",
    default="auto",
    choices=["auto", "fashion_mnist", "mnist", "digits"],
    help="auto: the first that is in a file or can be downloaded; digits come with scikit-learn",
)
parser.add_argument("--label-noise", type=float, default=0.4, help="the share of wrong labels")
parser.add_argument("--epochs", type=int, default=25, help="how often each image is seen")
parser.add_argument(
    "--method", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="which to train"
)
parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order")
parser.add_argument("--quick", action="store_true", help="two epochs of few images: does it run?")
parser.add_argument("--output", default="results/quickstart.png", help="where the picture goes")
args = parser.parse_args()
if not 0 <= args.label_noise < 1:
    parser.error(f"--label-noise is a share, from 0 to 1. Received: {args.label_noise}")
if args.quick:
    args.epochs = 2
if args.backend:
    os.environ["KERAS_BACKEND"] = args.backend  # before Keras is imported

import keras  # noqa: E402
import numpy as np  # noqa: E402
from datasets import load_images, make_network, mislabel  # noqa: E402

import keras_sharp  # noqa: E402

BATCH = 64
TITLES = {"sgd": "SGD", "adaptive_gsam": "Adaptive-GSAM"}


class Watch(keras.callbacks.Callback):
    """Moves the bar, and notes what the network knows after each epoch."""

    def __init__(self, network, bar, title, test_data, wrong):
        super().__init__()
        self.network, self.bar, self.title = network, bar, title
        self.test_data, self.wrong = test_data, wrong
        self.test, self.memorized, self.seconds = [], [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)
        self.test.append(self.accuracy(*self.test_data))
        self.memorized.append(self.accuracy(*self.wrong))
        self.bar.add(1, [(self.title, self.test[-1])])

    def accuracy(self, x, y):
        if len(x) == 0:
            return 0.0
        predictions = self.network.predict(x, batch_size=1000, verbose=0)
        return float(np.mean(np.argmax(predictions, -1) == y))


def train(name, train_data, test_data, wrong, bar):
    """Train the network with one method: what was seen after each epoch."""
    keras.utils.set_random_seed(args.seed)  # the same initial weights for every method
    network = make_network(train_data[0].shape[1:])
    settings = {**SETTINGS[name]}
    learning_rate = settings.pop("learning_rate")

    model = network
    if name != "sgd":
        # This is all there is to it: wrap the model, then go on as always.
        method = keras_sharp.methods.METHODS[name](**settings)
        model = keras_sharp.SharpnessAwareModel(network, method)

    steps = args.epochs * -(-len(train_data[0]) // BATCH)
    model.compile(
        optimizer=keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(learning_rate, steps), momentum=0.9
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    watch = Watch(network, bar, title(name), test_data, wrong)
    model.fit(*train_data, batch_size=BATCH, epochs=args.epochs, callbacks=[watch], verbose=0)
    return watch


def title(name):
    return TITLES.get(name, name.upper())


def print_table(results):
    """One line per method; times relative to the first."""
    unit = min(next(iter(results.values())).seconds)
    print(f"\n{'':>13}  test accuracy      best   wrong labels")
    print(f"{'':>13}     at the end     epoch  learned by heart   time")
    for name, r in results.items():
        print(
            f"{title(name):>13} {r.test[-1]:>14.1%} {max(r.test):>9.1%} {r.memorized[-1]:>17.1%} "
            f"{min(r.seconds) / unit:>5.1f}x"
        )


def save_picture(results, path, caption):
    """Test accuracy and what was learned by heart over the epochs; all methods at the end."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("No picture: it needs matplotlib (pip install keras-sharp[plots])")
        return
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    epochs = range(1, args.epochs + 1)
    for i, (name, r) in enumerate(results.items()):
        style = {"color": f"C{i}", "label": title(name), "lw": 2.5 if i < 2 else 0.8}
        left.plot(epochs, np.multiply(100, r.test), **style)
        middle.plot(epochs, np.multiply(100, r.memorized), **style)
        right.barh(title(name), 100 * r.test[-1], color=f"C{i}")
        right.plot(100 * max(r.test), i, "|", color="black", ms=16, mew=2)
        right.text(1, i, f"{r.test[-1]:.1%}", va="center", color="white", weight="bold")
    left.set(xlabel="epoch", title="accuracy on clean test images, %")
    left.legend(frameon=False)
    middle.set(xlabel="epoch", title="wrong labels learned by heart, %")
    right.set(title="at the end, %  (|: at the best epoch)")
    right.invert_yaxis()
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, fontsize=9)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\nPicture: {path}")


def main():
    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    count = 200 if args.quick else 2000
    (x, y), test_data = load_images(args.dataset, num_train=count, num_test=count)
    labels = mislabel(y, args.label_noise)
    changed = labels != y
    titles = [title(name) for name in args.method]
    print(f"{args.epochs} epochs with each method; the numbers are accuracies on test images:")
    bar = keras.utils.Progbar(len(titles) * args.epochs, stateful_metrics=titles, unit_name="epoch")
    results = {
        name: train(name, (x, labels), test_data, (x[changed], labels[changed]), bar)
        for name in args.method
    }
    print_table(results)
    save_picture(
        results,
        args.output,
        f"A small BatchNorm network on {len(x):,} images, {args.label_noise:.0%} of them with a "
        "wrong label; the same initial weights for all.",
    )
    print(
        "\nFor your own model:\n\n"
        "    import keras_sharp\n"
        f"    method = keras_sharp.methods.SAM(rho={SETTINGS['sam']['rho']:g})\n"
        "    model = keras_sharp.SharpnessAwareModel(your_model, method)\n\n"
        "and then `compile` and `fit` as always."
    )


if __name__ == "__main__":
    main()

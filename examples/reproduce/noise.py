"""Fashion-MNIST with wrong labels: the data, the network and what is searched."""

import datasets
import keras
import numpy as np
from experiment import Trainer

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
#: The learning rate that does well with the right labels.
USUAL = 0.1
#: Down to where plain training is at its best: a small learning rate, too, keeps the network from
#: learning wrong labels by heart, and a range that ends above it would flatter the other methods.
LEARNING_RATE = (0.003, 0.3)
RHO, SCALED_RHO = (0.05, 0.6), (0.3, 4.0)


def settings(quick, shares):
    """What all trainings have in common.

    Args:
        quick: Boolean, whether to be done in a minute.
        shares: list of floats, how many labels are wrong.

    Returns:
        A dictionary.
    """
    return {
        "data": "digits" if quick else "fashion_mnist",
        "train": 200 if quick else 2000,
        "validation": 100 if quick else 1000,
        "test": 100 if quick else 2000,
        "shares": shares,
        "filters": [4, 8] if quick else [32, 64, 128],
        "epochs": 2 if quick else 25,
        "batch_size": 50 if quick else 64,
        "searched": 2 if quick else 6,
    }


def load(settings, share):
    """Images, of which a share of those to train and to validate with has a wrong label.

    Args:
        settings: dictionary with `"data"`, and with the numbers of images,
            `"train"`, `"validation"` and `"test"`.
        share: Float, how many are wrong.

    Returns:
        A pair: the data, as `Trainer` takes them; and where the wrong labels
        are among those to train with, an array of integers.
    """
    n, more = settings["train"], settings["validation"]
    (x, y), test = datasets.load_images(settings["data"], n + more, settings["test"])
    labels = datasets.mislabel(y, share)
    data = {"train": (x[:n], labels[:n]), "validation": (x[n:], labels[n:]), "test": test}
    return data, np.flatnonzero(labels[:n] != y[:n])


def make_trainer(settings, share, contestants=None):
    """A trainer for a share of wrong labels; see `Trainer` for the contestants."""
    data, wrong = load(settings, share)
    x, labels = data["train"]

    def make_network():
        return datasets.make_network(x.shape[1:], settings["filters"])

    def accuracy(network, images, labels):
        predictions = network.predict(images, batch_size=1000, verbose=0)
        return float(np.mean(np.argmax(predictions, -1) == labels))

    def follow(network):
        memorized = accuracy(network, x[wrong], labels[wrong]) if len(wrong) else 0.0
        return {
            "test_accuracies": accuracy(network, *data["test"]),
            "validation_accuracies": accuracy(network, *data["validation"]),
            "memorized": memorized,
        }

    return Trainer(
        make_network,
        LOSS,
        data,
        settings["batch_size"],
        follow=follow,
        contestants=contestants,
    )


def make_small_trainer(settings, contestants=None, **options):
    """The same with a network of two hidden layers, without BatchNormalization.

    Args:
        settings: dictionary with `"data"`, `"train"`, `"validation"` and
            `"test"` (numbers of images), `"share"`, `"pixels"`, `"width"` and
            `"batch_size"`.
        contestants: see `Trainer`.
        **options: further arguments of `Trainer`.
    """
    data, _ = load(settings, settings["share"])
    # Every other pixel of the larger images.
    every = data["test"][0].shape[1] // settings["pixels"]
    data = {name: (x[:, ::every, ::every], y) for name, (x, y) in data.items()}
    shape = data["test"][0].shape[1:]

    def make_network():
        hidden = [keras.layers.Dense(settings["width"], "relu") for _ in range(2)]
        return keras.Sequential(
            [keras.Input(shape), keras.layers.Flatten(), *hidden, keras.layers.Dense(10)]
        )

    return Trainer(
        make_network, LOSS, data, settings["batch_size"], contestants=contestants, **options
    )


def settings_of(method, searched):
    """What is tried with a method: as many values of one number for each."""
    if method == "sgd":
        return around("learning_rate", LEARNING_RATE, searched)
    scaled = method in ("asam", "adaptive_gsam")
    return around("rho", SCALED_RHO if scaled else RHO, searched)


def around(name, ends, searched, usual=USUAL):
    """Settings with the values of one number, evenly spread on a logarithmic scale."""
    values = np.geomspace(*ends, searched)
    return [{"learning_rate": usual, name: float(f"{value:.3g}")} for value in values]


def small_settings_of(method, settings):
    """The same with the ranges of a study with `make_small_trainer`."""
    name, ends = ("learning_rate", "learning_rates") if method == "sgd" else ("rho", "rhos")
    return around(name, settings[ends], settings["searched"], settings["learning_rate"])

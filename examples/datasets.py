"""Small image data for the examples: from a file, from the network, or from scikit-learn."""

import os
import pathlib
import socket

import keras
import numpy as np

NAMES = ("fashion_mnist", "mnist", "cifar10", "digits")
#: What `"auto"` tries, in this order.
AUTO = ("fashion_mnist", "mnist", "digits")


def load_images(name="auto", num_train=None, num_test=None):
    """Images and labels for training and testing.

    Looks for `<name>.npz` in the folder named by the environment variable
    KERAS_SHARP_DATA and beside the project; then downloads with
    `keras.datasets`; without a network it takes the digits that come with
    scikit-learn. It says which.

    Args:
        name: `"fashion_mnist"`, `"mnist"`, `"cifar10"`, `"digits"`, or
            `"auto"`, the first of `AUTO` that can be had.
        num_train: Integer, how many training images to keep. Defaults to all.
        num_test: Integer, how many test images to keep. Defaults to all.

    Returns:
        `(x_train, y_train), (x_test, y_test)`: float32 images in [0, 1] of
        shape `(n, height, width, channels)`, and integer labels.
    """
    if name not in ("auto", *NAMES):
        raise ValueError(f"There is no data set {name!r}. Expected 'auto' or one of {NAMES}.")
    candidates = AUTO if name == "auto" else (name,)
    for candidate in candidates:
        found = _from_digits() if candidate == "digits" else _from_file_or_network(candidate)
        if found is not None:
            break
    else:
        raise OSError(
            f"The data set {name!r} is neither in a file nor can it be downloaded. Put "
            f"{name}.npz into the folder named by KERAS_SHARP_DATA, or use --dataset digits."
        )
    source, (train, test) = found
    train, test = _prepare(train, num_train), _prepare(test, num_test)
    print(
        f"Data: {candidate} {source}; {len(train[0])} training and {len(test[0])} test images of "
        f"{train[0].shape[1]}x{train[0].shape[2]} pixels"
    )
    return train, test


def _from_file_or_network(name):
    root = pathlib.Path(__file__).resolve().parent.parent
    folders = [os.environ.get("KERAS_SHARP_DATA"), root / "data", root.parent / "shared" / "data"]
    for folder in filter(None, folders):
        path = pathlib.Path(folder) / f"{name}.npz"
        if path.exists():
            with np.load(path) as z:
                arrays = (z["x_train"], z["y_train"]), (z["x_test"], z["y_test"])
            return f"from {path.name}", arrays
    if _is_online():
        return "downloaded by keras.datasets", getattr(keras.datasets, name).load_data()
    return None


def _from_digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 255 / 16).astype("uint8")
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    return "of scikit-learn", ((images[:1400], labels[:1400]), (images[1400:], labels[1400:]))


def _is_online():
    """Whether the server of keras.datasets answers; a download would wait much longer."""
    try:
        socket.create_connection(("storage.googleapis.com", 443), timeout=3).close()
    except OSError:
        return False
    return True


def _prepare(arrays, limit):
    images, labels = (a[:limit] for a in arrays)
    if images.ndim == 3:  # gray
        images = images[..., None]
    return images.astype("float32") / 255, labels.astype("int64").reshape(-1)

"""Small image data for the examples: from a file, from the network, or from scikit-learn."""

import os
import pathlib
import socket
import zipfile

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


def mislabel(labels, share, num_classes=10, seed=0):
    """Labels of which a share is wrong: each of the other classes is as likely.

    Args:
        labels: NumPy array of integers from 0 to `num_classes` - 1.
        share: Float in [0, 1], how many are wrong.
        num_classes: Integer. Defaults to `10`.
        seed: Integer, of the choice.

    Returns:
        A new array.
    """
    random = np.random.default_rng(seed)
    wrong = random.permutation(len(labels))[: round(share * len(labels))]
    new = labels.copy()
    new[wrong] = (labels[wrong] + random.integers(1, num_classes, len(wrong))) % num_classes
    return new


def make_network(input_shape, filters=(32, 64, 128), num_classes=10):
    """A small convolutional network with BatchNormalization, for images."""
    # A few dozen steps make an epoch here: the usual momentum of 0.99 would be too slow.
    layers = [keras.Input(input_shape)]
    for count in filters:
        layers += [
            keras.layers.Conv2D(count, 3, strides=2, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(num_classes)]
    return keras.Sequential(layers)


def make_resnet(input_shape, width, stem=4, num_classes=10):
    """A convolution of stride `stem`, and two residual blocks of half the size, twice the width."""
    layers = keras.layers

    def conv(x, filters, size=3, strides=1):
        x = layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    inputs = keras.Input(input_shape)
    x = layers.ReLU()(conv(inputs, width, size=5, strides=stem))
    for filters in (2 * width, 4 * width):
        y = conv(layers.ReLU()(conv(x, filters, strides=2)), filters)
        x = layers.ReLU()(layers.Add()([y, conv(x, filters, size=1, strides=2)]))
    return keras.Model(inputs, layers.Dense(num_classes)(layers.GlobalAveragePooling2D()(x)))


def _find(name):
    """The path of `<name>.npz`, or `None`."""
    root = pathlib.Path(__file__).resolve().parent.parent
    folders = [os.environ.get("KERAS_SHARP_DATA"), root / "data", root.parent / "shared" / "data"]
    paths = (pathlib.Path(folder) / f"{name}.npz" for folder in folders if folder)
    return next((path for path in paths if path.exists()), None)


def _from_file_or_network(name):
    path = _find(name)
    if path:
        with np.load(path) as z:
            arrays = (z["x_train"], z["y_train"]), (z["x_test"], z["y_test"])
        return f"from {path.name}", arrays
    if is_online():
        return "downloaded by keras.datasets", getattr(keras.datasets, name).load_data()
    return None


def _from_digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 255 / 16).astype("uint8")
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    return "of scikit-learn", ((images[:1400], labels[:1400]), (images[1400:], labels[1400:]))


def is_online(host="storage.googleapis.com"):
    """Whether a server answers; a download would wait much longer."""
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True


def _prepare(arrays, limit):
    images, labels = (a[:limit] for a in arrays)
    if images.ndim == 3:  # gray
        images = images[..., None]
    return images.astype("float32") / 255, labels.astype("int64").reshape(-1)


def tfds_name(name="cifar10", data_dir=None, num_train=None, num_test=None):
    """The name under which `tfds.load` finds a data set of RGB images.

    That is `name` itself, if TensorFlow Datasets has it on disk or can download
    it. Otherwise a builder is registered that writes what is at hand as a data
    set of TensorFlow Datasets: `<name>.npz`, or the digits of scikit-learn.

    Args:
        name: a data set of images and labels.
        data_dir: the folder of TensorFlow Datasets. Defaults to its own.
        num_train: Integer, how many images a builder writes. Defaults to all.
        num_test: Integer, likewise.

    Returns:
        String.
    """
    import tensorflow_datasets as tfds

    if tfds.builder(name, data_dir=data_dir).data_path.exists() or is_online():
        print(f"Data: {name} of TensorFlow Datasets")
        return name
    path = _find(name)
    size = f"_{num_train or 'all'}_{num_test or 'all'}"
    local = f"{name if path else 'digits'}_local{size}"
    print(f"Data: {path.name if path else 'digits of scikit-learn'}, as a TFDS data set {local}")

    def examples(split, limit):
        if path:
            images, labels = (
                read_npz(path, f"x_{split}", limit),
                read_npz(path, f"y_{split}", limit),
            )
        else:
            train, test = _from_digits()[1]
            images, labels = (a[:limit] for a in (train if split == "train" else test))
            images = np.kron(images, np.ones((4, 4), "uint8"))  # 32x32 pixels
        if images.ndim == 3:
            images = np.repeat(images[..., None], 3, axis=-1)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}

    class Local(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        name = local

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {"train": examples("train", num_train), "test": examples("test", num_test)}

        def _generate_examples(self):
            raise NotImplementedError  # `_split_generators` holds the examples already.

    return local


def read_npz(path, array, limit=None):
    """The first rows of an array of an .npz, without unpacking the rest."""
    with zipfile.ZipFile(path) as z, z.open(f"{array}.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        rows = shape[0] if limit is None else min(limit, shape[0])
        data = file.read(rows * int(np.prod(shape[1:])) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(rows, *shape[1:])

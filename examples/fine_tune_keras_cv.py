"""Fine-tune a backbone of KerasCV, with its augmentation.

    python examples/fine_tune_keras_cv.py
    python examples/fine_tune_keras_cv.py --backend torch --preset mobilenet_v3_small_imagenet

A model of KerasCV takes pixels of 0 to 255, and its layers augment them. Here the
backbone learns on new images in two ways, with Adam alone and with SAM. Where there
is a network, it comes pre-trained from a preset. Where there is none, the script makes
a tiny one and trains it on the first five classes. Then it learns the last five.
"""

from common import parse, progress, save

args = parse(
    __doc__,
    epochs=20,
    preset=("mobilenet_v3_small_imagenet", "a backbone of KerasCV, where there is a network"),
    dataset=("auto", "auto, fashion_mnist, mnist or digits: what is at hand"),
)

import keras  # noqa: E402
import keras_cv  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402  (for tf.data, on any backend)
from datasets import is_online, load_images  # noqa: E402

import keras_sharp  # noqa: E402

NUM_PRETRAIN, NUM_TRAIN, NUM_TEST = (200, 100, 100) if args.quick else (10_000, 300, 1000)
SIZE = 32
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

augment = keras_cv.layers.Augmenter(
    [
        keras_cv.layers.RandomFlip("horizontal"),
        keras_cv.layers.RandomCutout(height_factor=0.3, width_factor=0.3),
    ]
)


def images_of(arrays, classes, limit):
    """RGB images of 32x32 pixels from 0 to 255, and labels from 0."""
    images, labels = arrays
    chosen = np.flatnonzero(np.isin(labels, classes))[:limit]
    images = tf.image.resize(images[chosen] * 255, (SIZE, SIZE))
    return tf.image.grayscale_to_rgb(images).numpy(), labels[chosen] - min(classes)


def augmented(images, labels):
    data = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images))
    data = data.batch(32, drop_remainder=True)
    return data.map(lambda x, y: (augment({"images": x})["images"], y)).prefetch(tf.data.AUTOTUNE)


def tiny_backbone():
    """A MobileNet of three blocks."""
    return keras_cv.models.MobileNetV3Backbone(
        stackwise_expansion=[1, 4.5, 3.67],
        stackwise_filters=[16, 24, 24],
        stackwise_kernel_size=[3, 3, 3],
        stackwise_stride=[2, 2, 1],
        stackwise_se_ratio=[0.25, None, None],
        stackwise_activation=["relu", "relu", "hard_swish"],
        include_rescaling=True,
        input_shape=(SIZE, SIZE, 3),
    )


def classifier(backbone):
    return keras_cv.models.ImageClassifier(backbone=backbone, num_classes=5, activation=None)


def pretrained(train_data):
    """The weights of a backbone that has learned other classes."""
    print("No network: pre-training a tiny backbone on the first five classes")
    keras.utils.set_random_seed(args.seed)
    model = classifier(tiny_backbone())
    model.compile(keras.optimizers.Adam(3e-3), LOSS, metrics=["accuracy"])
    data = augmented(*images_of(train_data, range(5), NUM_PRETRAIN))
    epochs = 1 if args.quick else 8
    report = progress("pretrain")
    model.fit(data, epochs=epochs, shuffle=False, verbose=0, callbacks=[report])
    return model.backbone.get_weights()


def fine_tune(name, backbone, method, train, test):
    keras.utils.set_random_seed(args.seed)
    model = keras_sharp.SharpnessAwareModel(classifier(backbone), method)
    model.compile(keras.optimizers.Adam(1e-3), LOSS, metrics=["accuracy"])
    history = model.fit(
        augmented(*train),
        epochs=args.epochs,
        validation_data=test,
        validation_batch_size=500,
        shuffle=False,  # tf.data has done it
        verbose=0,
        callbacks=[progress(name)],
    ).history
    rise = keras_sharp.sharpness.max_sharpness(model, *train, rho=0.1)
    print(f"{name}: test accuracy {history['val_accuracy'][-1]:.3f}, sharpness {rise:.3f}")
    return history, rise


def picture(results, train):
    """What the network sees, how it learned, and how sharp the minimum is."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2])
    images = next(iter(augmented(*train)))[0].numpy().clip(0, 255) / 255
    for axes, image in zip(left.subplots(3, 4).flat, images, strict=False):
        axes.imshow(image)
        axes.axis("off")
    left.suptitle("augmented by KerasCV")
    panels = right.subplots(1, 3)
    for i, (name, (history, rise)) in enumerate(results.items()):
        epochs = range(1, args.epochs + 1)
        panels[0].plot(epochs, history["val_accuracy"], "o-", ms=3, label=name)
        panels[1].plot(epochs, history["val_loss"], "o-", ms=3, label=name)
        panels[2].bar(name, rise, color=f"C{i}")
    panels[0].legend(frameon=False)
    for axes, title in zip(panels, ("test accuracy", "test loss", "sharpness"), strict=True):
        axes.set(title=title, xlabel="" if title == "sharpness" else "epoch")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, args.output)


def main():
    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    train_data, test_data = load_images(args.dataset)
    train = images_of(train_data, range(5, 10), NUM_TRAIN)
    test = images_of(test_data, range(5, 10), NUM_TEST)
    weights = None if is_online("www.kaggle.com") else pretrained(train_data)
    results = {}
    for name, method in {"Adam": None, "SAM": keras_sharp.methods.SAM(rho=0.05)}.items():
        if weights is None:
            backbone = keras_cv.models.MobileNetV3Backbone.from_preset(args.preset)
        else:
            backbone = tiny_backbone()
            backbone.set_weights(weights)
        results[name] = fine_tune(name, backbone, method, train, test)
    picture(results, train)


if __name__ == "__main__":
    main()

"""CIFAR-10 from TensorFlow Datasets, augmented, with a small ResNet.

    python examples/cifar10_tfds.py
    python examples/cifar10_tfds.py --backend jax --epochs 100 --augment randaugment

The recipe of the papers: `tfds.load`, cache, shuffle and prefetch; random flips,
RandAugment, MixUp or CutMix; SGD with momentum and a cosine schedule; and a rho
that falls with the learning rate. On a GPU or TPU in mixed precision. Trains with
plain SGD and with GSAM, from the same initial weights. Without a network, the data
are those at hand, read through TensorFlow Datasets all the same.
"""

from common import accelerator, parse, progress, save

args = parse(
    __doc__,
    epochs=30,
    batch_size=(128, "images per step"),
    width=(16, "filters of the first layers"),
    augment=("mixup", "mixup, cutmix, randaugment or none"),
    data_dir=(None, "the folder of TensorFlow Datasets; default: its own"),
    train=(25_000, "how many images to train on"),
)

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402  (for tf.data, on any backend)
import tensorflow_datasets as tfds  # noqa: E402
from datasets import tfds_name  # noqa: E402
from keras import layers  # noqa: E402

import keras_sharp  # noqa: E402

NUM_TRAIN, NUM_TEST = (200, 100) if args.quick else (args.train, 10_000)
AUTOTUNE = tf.data.AUTOTUNE

flip = layers.RandomFlip("horizontal", seed=args.seed)
# What is mixed needs labels of one number per class.
AUGMENTATIONS = {
    "none": None,
    "randaugment": layers.RandAugment((0, 255), num_ops=2, factor=0.3, seed=args.seed),
    "mixup": layers.MixUp(alpha=0.2, seed=args.seed),
    "cutmix": layers.CutMix(factor=1.0, seed=args.seed),
}


def prepare(image, label):
    return tf.ensure_shape(tf.cast(image, "float32"), (32, 32, 3)), tf.one_hot(label, 10)


def augment(images, labels):
    batch = {"images": flip(images), "labels": labels}
    if AUGMENTATIONS[args.augment]:
        batch = AUGMENTATIONS[args.augment](batch)
    return batch["images"], batch["labels"]


def load_data():
    name = tfds_name("cifar10", args.data_dir, NUM_TRAIN, NUM_TEST)
    train, test = tfds.load(
        name,
        split=[f"train[:{NUM_TRAIN}]", f"test[:{NUM_TEST}]"],
        as_supervised=True,
        data_dir=args.data_dir,
    )
    train = train.map(prepare, AUTOTUNE).cache().shuffle(10_000, seed=args.seed)
    train = train.batch(args.batch_size, drop_remainder=True).map(augment, AUTOTUNE)
    test = test.map(prepare, AUTOTUNE).batch(500).cache()
    return train.prefetch(AUTOTUNE), test.prefetch(AUTOTUNE)


def make_network():
    """A ResNet of 14 layers: three stages of two blocks."""

    def convolution(x, filters, size=3, strides=1):
        x = layers.Conv2D(filters, size, strides, "same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(convolution(layers.Rescaling(1 / 64, -2)(inputs), args.width))
    for stage in range(3):
        filters = args.width * 2**stage
        for block in range(2):
            strides = 2 if stage > 0 and block == 0 else 1
            y = layers.ReLU()(convolution(x, filters, strides=strides))
            y = convolution(y, filters)
            x = convolution(x, filters, 1, strides) if strides == 2 else x
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, dtype="float32")(x))


def train_with(name, method, train, test):
    keras.utils.set_random_seed(args.seed)  # the same initial weights
    model = keras_sharp.SharpnessAwareModel(make_network(), method)
    steps = args.epochs * len(train)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=0.1, warmup_steps=steps // 10
    )
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=5e-4),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
        metrics=["accuracy"],
    )
    return model.fit(
        train,
        epochs=args.epochs,
        validation_data=test,
        shuffle=False,  # tf.data has done it
        verbose=0,
        callbacks=[progress(name)],
    ).history


def picture(train, histories):
    """What the network sees, and how it learned."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2.2])
    images = next(iter(train))[0].numpy().clip(0, 255) / 255
    for axes, image in zip(left.subplots(3, 4).flat, images, strict=False):
        axes.imshow(image)
        axes.axis("off")
    left.suptitle(f"augmented ({args.augment})")
    panels = right.subplots(1, 3)
    for axes, key in zip(panels, ("val_accuracy", "val_loss", "rho"), strict=True):
        for name, history in histories.items():
            if key in history:
                color = f"C{list(histories).index(name)}"
                axes.plot(
                    range(1, args.epochs + 1), history[key], "o-", ms=3, color=color, label=name
                )
        axes.set(xlabel="epoch", title=key.replace("val_", "test "))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    save(figure, args.output)


def main():
    device = accelerator()
    if device:
        keras.config.set_dtype_policy("mixed_float16" if device == "gpu" else "mixed_bfloat16")
    print(f"Backend: {keras.backend.backend()}, {keras.config.dtype_policy().name}")
    train, test = load_data()
    rho = keras_sharp.schedules.ProportionalToLearningRate(maximum=0.1, minimum=0.01)
    methods = {"SGD": None, "GSAM": keras_sharp.methods.GSAM(rho=rho, alpha=0.2)}
    picture(train, {name: train_with(name, m, train, test) for name, m in methods.items()})


if __name__ == "__main__":
    main()

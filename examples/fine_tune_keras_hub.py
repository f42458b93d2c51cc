"""Fine-tune an image classifier of KerasHub, its preprocessing included.

    python examples/fine_tune_keras_hub.py
    python examples/fine_tune_keras_hub.py --backend jax --preset resnet_50_imagenet

A task of KerasHub takes raw images: `fit` and `predict` resize and scale them
first. Wrapped, it does the same, so that nothing changes but one line. Where
there is a network, the task comes pre-trained from a preset. Where there is
none, the script makes a tiny one and trains it on the first five classes. Then
it learns the last five classes from 200 images, once with SGD and once with SAM.
"""

from common import parse, progress, save

args = parse(
    __doc__,
    epochs=20,
    preset=("resnet_18_imagenet", "a classifier of KerasHub, where there is a network"),
    dataset=("auto", "auto, fashion_mnist, mnist or digits: what is at hand"),
)

import keras  # noqa: E402
import keras_hub  # noqa: E402
import numpy as np  # noqa: E402
from datasets import is_online, load_images  # noqa: E402

import keras_sharp  # noqa: E402

NUM_PRETRAIN, NUM_TRAIN, NUM_TEST = (200, 100, 100) if args.quick else (5000, 200, 1000)


def raw_images(arrays, classes, limit):
    """Images as a camera gives them: RGB, 0 to 255. Labels from 0."""
    images, labels = arrays
    chosen = np.flatnonzero(np.isin(labels, classes))[:limit]
    images = np.broadcast_to(images[chosen] * 255, (*images[chosen].shape[:3], 3))
    return images.astype("uint8"), labels[chosen] - min(classes)


def tiny_backbone():
    """A ResNet small enough for a laptop."""
    return keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(28, 28, 3),
    )


def classifier(backbone):
    """A task: backbone, preprocessor, and a new head for five classes."""
    converter = keras_hub.layers.ResNetImageConverter(image_size=(28, 28), scale=1 / 255)
    preprocessor = keras_hub.models.ResNetImageClassifierPreprocessor(converter)
    return keras_hub.models.ResNetImageClassifier(backbone, 5, preprocessor=preprocessor)


def pretrained(train_data):
    """The weights of a backbone that has learned other classes."""
    print("No network: pre-training a tiny backbone on the first five classes")
    keras.utils.set_random_seed(args.seed)
    task = classifier(tiny_backbone())
    task.compile("adam", metrics=["accuracy"])
    images, labels = raw_images(train_data, range(5), NUM_PRETRAIN)
    epochs = 1 if args.quick else 5
    task.fit(images, labels, epochs=epochs, verbose=0, callbacks=[progress("pretrain")])
    return task.backbone.get_weights()


def fine_tune(make_task, method, train, test):
    keras.utils.set_random_seed(args.seed)
    task = make_task()
    model = keras_sharp.SharpnessAwareModel(task, method)  # the only new line
    # What is not named here is the default of the task: its loss.
    steps = args.epochs * -(-len(train[0]) // 32)
    rate = keras.optimizers.schedules.CosineDecay(0.02, steps)
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), metrics=["accuracy"])
    name = "SAM" if method else "SGD"
    history = model.fit(
        *train,
        epochs=args.epochs,
        validation_data=test,
        verbose=0,
        callbacks=[progress(name)],
    )
    logits = task.predict(test[0], verbose=0)  # the task itself is what was trained
    print(f"{name}: test accuracy {np.mean(logits.argmax(-1) == test[1]):.3f}")
    return history, logits


def picture(histories, test, logits):
    """Curves, and the test images of which the tuned model is least sure."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.5])
    axes = left.subplots()
    for name, history in histories.items():
        axes.plot(
            range(1, args.epochs + 1), history.history["val_accuracy"], "o-", ms=3, label=name
        )
    axes.set(xlabel="epoch", title="test accuracy, five new classes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    wrong = logits.argmax(-1) != test[1]
    confidence = logits.max(-1) - np.take_along_axis(logits, test[1][:, None], -1)[:, 0]
    order = np.argsort(-confidence * wrong)
    for axes, i in zip(right.subplots(2, 6).flat, order, strict=False):
        axes.imshow(test[0][i])
        axes.set_title(f"{test[1][i] + 5}, not {logits[i].argmax() + 5}", size=9)
        axes.axis("off")
    right.suptitle("where SAM errs most: the class, and the answer")
    save(figure, args.output)


def main():
    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    train_data, test_data = load_images(args.dataset)
    train = raw_images(train_data, range(5, 10), NUM_TRAIN)
    test = raw_images(test_data, range(5, 10), NUM_TEST)
    if is_online("www.kaggle.com"):

        def make_task():
            return keras_hub.models.ImageClassifier.from_preset(args.preset, num_classes=5)

    else:
        weights = pretrained(train_data)

        def make_task():
            backbone = tiny_backbone()
            backbone.set_weights(weights)
            return classifier(backbone)

    methods = {"SGD": None, "SAM": keras_sharp.methods.SAM(rho=0.05)}
    results = {name: fine_tune(make_task, m, train, test) for name, m in methods.items()}
    picture({name: r[0] for name, r in results.items()}, test, results["SAM"][1])


if __name__ == "__main__":
    main()

"""The path of training: the ways of SGD and SAM, seen in one plane of the loss.

    python examples/path_of_training.py
    python examples/path_of_training.py --backend jax --dataset mnist --rho 0.2

Trains the same small network twice on images of which 40 % have a wrong label, from the same
initial weights, and keeps the weights of each epoch. Then draws both ways over the loss on the
training images, with their wrong labels, and over the loss on test images, with the right ones.
"""

from common import parse, save

args = parse(
    __doc__,
    epochs=40,
    quick_epochs=3,
    dataset=("auto", "auto, fashion_mnist, mnist or digits: see examples/datasets.py"),
    train=(1000, "how many images to train on"),
    label_noise=(0.4, "the share of wrong labels"),
    rho=(0.1, "the radius of SAM"),
    points=(21, "of the plane, in each direction"),
)

import keras  # noqa: E402
from datasets import load_images, mislabel  # noqa: E402

import keras_sharp  # noqa: E402

METHODS = {"SGD": None, "SAM": keras_sharp.methods.SAM(rho=args.rho)}


def make_model(method, input_shape):
    """A small network, without BatchNormalization, whose statistics would be those of one path."""
    keras.utils.set_random_seed(args.seed)  # the same initial weights every time
    network = keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(100, "relu"),
            keras.layers.Dense(10),
        ]
    )
    model = keras_sharp.SharpnessAwareModel(network, method)
    model.compile(
        keras.optimizers.SGD(0.02, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def main():
    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    count, points = (200, 5) if args.quick else (args.train, args.points)
    (x, y), test_data = load_images(args.dataset, num_train=count, num_test=count)
    train_data = x, mislabel(y, args.label_noise)
    paths = {}
    for name, method in METHODS.items():
        model = make_model(method, x.shape[1:])
        paths[name] = keras_sharp.callbacks.WeightPath()
        model.fit(
            *train_data, batch_size=50, epochs=args.epochs, callbacks=[paths[name]], verbose=0
        )
        loss, _ = model.evaluate(*train_data, verbose=0)
        test_loss, accuracy = model.evaluate(*test_data, verbose=0)
        print(
            f"{name}: training loss {loss:.4f}, test loss {test_loss:.4f}, "
            f"test accuracy {accuracy:.4f}",
            flush=True,
        )
    planes = {
        title: keras_sharp.landscape.around_path(model, paths, *data, num_points=points, verbose=1)
        for title, data in {
            "training images, some labels wrong": train_data,
            "test images": test_data,
        }.items()
    }
    shares = next(iter(planes.values())).shares
    print(f"Shares of the variance: {shares[0]:.3f}, {shares[1]:.3f}")
    save(keras_sharp.plots.landscape(planes), args.output)


if __name__ == "__main__":
    main()

"""Which rho? A range test, in the manner of a learning rate finder.

    python examples/choose_rho.py
    python examples/choose_rho.py --backend jax --dataset mnist --method asam

Tries nine radii on images of which 40 % have a wrong label, each in a short training of the
same small network, draws what they came to, and recommends one. Then trains to the end
with it, with a third and with three times of it, and without an adversary.
"""

from common import parse, save

args = parse(
    __doc__,
    epochs=20,
    quick_epochs=2,
    dataset=("auto", "auto, fashion_mnist, mnist or digits: see examples/datasets.py"),
    method=("sam", "sam, asam, gsam, adaptive_gsam or bsam"),
    train=(1000, "how many images to train on"),
    label_noise=(0.4, "the share of wrong labels"),
)

import keras  # noqa: E402
from datasets import load_images, make_network, mislabel  # noqa: E402

import keras_sharp  # noqa: E402


def make_model(method, input_shape):
    """A small convolutional network, wrapped and compiled."""
    keras.utils.set_random_seed(args.seed)  # the same initial weights every time
    model = keras_sharp.SharpnessAwareModel(make_network(input_shape), method)
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def main():
    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    # A half more is there to choose rho by; its labels are as often wrong.
    count = 300 if args.quick else args.train
    (x, y), test_data = load_images(args.dataset, num_train=count + count // 2, num_test=2000)
    y = mislabel(y, args.label_noise)
    train_data, validation_data = (x[:count], y[:count]), (x[count:], y[count:])
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
    save(keras_sharp.plots.rho_range(found), args.output)

    print("\nTo the end:")
    for factor in (0, 1 / 3, 1, 3):
        rho = factor * found.recommended
        contestant = make_model(args.method if factor else None, x.shape[1:])
        if factor:
            contestant.method.rho = rho
        contestant.fit(*train_data, batch_size=32, epochs=args.epochs, verbose=0)
        loss, accuracy = contestant.evaluate(*test_data, batch_size=500, verbose=0)
        name = f"{args.method}, rho {rho:.3g}" if factor else "no adversary"
        print(f"{name:>24}: test accuracy {accuracy:.4f}, test loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()

"""What the examples share: options of the command line, and lines of progress.

Imports no Keras: the backend is chosen here, before Keras is imported.
"""

import argparse
import os


def parse(description, epochs, quick_epochs=1, **options):
    """The options of an example, with its backend chosen.

    Args:
        description: the docstring of the script.
        epochs: the default of `--epochs`.
        quick_epochs: the same with `--quick`.
        **options: further options, by name: pairs of a default value and what
            it means.

    Returns:
        An `argparse.Namespace`.
    """
    name = description.split("examples/")[1].split(".py")[0]
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--backend", choices=["tensorflow", "jax", "torch"], help="default: as Keras"
    )
    parser.add_argument("--quick", action="store_true", help="small and short: does it run?")
    parser.add_argument(
        "--epochs", type=int, help=f"how often the data are seen; default: {epochs}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order; default: 0")
    output = f"results/{name}.png"
    parser.add_argument(
        "--output", default=output, help=f"where the picture goes; default: {output}"
    )
    for option, (default, meaning) in options.items():
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            default=default,
            type=str if default is None else type(default),
            help=meaning if default is None else f"{meaning}; default: {default}",
        )
    args = parser.parse_args()
    if args.epochs is None:
        args.epochs = quick_epochs if args.quick else epochs
    if args.backend:
        os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("MPLBACKEND", "Agg")
    return args


def progress(title):
    """A callback that prints one line per epoch."""
    import keras

    def on_epoch_end(epoch, logs):
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in logs.items())
        print(f"{title:>8}  epoch {epoch + 1:>2}  {numbers}", flush=True)

    return keras.callbacks.LambdaCallback(on_epoch_end=on_epoch_end)


def accelerator():
    """`"gpu"`, `"tpu"`, or `None` if the backend has only CPUs."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return "gpu" if torch.cuda.is_available() else None
    if keras.backend.backend() == "jax":
        import jax

        return None if jax.default_backend() == "cpu" else jax.default_backend()
    import tensorflow as tf

    kinds = [device.device_type.lower() for device in tf.config.list_logical_devices()]
    return next((kind for kind in kinds if kind in ("gpu", "tpu")), None)


def compiled(fn):
    """The function as the backend compiles it."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(fn)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(fn)
    return fn


def save(figure, path):
    """Save a picture, and say where."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\nPicture: {path}")

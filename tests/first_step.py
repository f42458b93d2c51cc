"""A first training with what is installed: for test_packaging.py, `make dist` and the release."""

import pathlib

import keras
import numpy as np

import keras_sharp


def main():
    package = pathlib.Path(keras_sharp.__file__).parent
    if not (package / "py.typed").is_file():
        raise SystemExit(f"py.typed is not in {package}.")
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model = keras_sharp.SharpnessAwareModel(network, method="sam")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=5, verbose=0)
    after = model.evaluate(x, y, verbose=0)
    if not after < before / 2:
        raise SystemExit(f"The loss was to fall by half at least. Received: {before} to {after}.")
    print(f"keras_sharp {keras_sharp.__version__} of {package}")
    print(f"Keras {keras.__version__}, {keras.backend.backend()}: loss {before:.3f} to {after:.3f}")


if __name__ == "__main__":
    main()

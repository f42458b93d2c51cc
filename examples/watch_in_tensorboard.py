"""TensorBoard shows the sharpness and the spectrum of the Hessian while a network trains.

    pip install tensorflow tensorboard scikit-learn
    python examples/watch_in_tensorboard.py
    tensorboard --logdir results/watch_in_tensorboard

Trains a small network on the digits of scikit-learn with SAM, on any backend. The
scalars of the probes and of `extra_logs` are those of the run `train`, eigenvalues
(histograms) and densities (images) those of the run `spectra`.
"""

import os

from common import parse, progress

args = parse(__doc__, epochs=15, quick_epochs=2)

import keras  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import keras_sharp  # noqa: E402

keras.utils.set_random_seed(args.seed)
log_dir = os.path.splitext(args.output)[0]

x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16
network = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(32, "relu"),
        keras.layers.Dense(10, "softmax"),
    ]
)
model = keras_sharp.SharpnessAwareModel(network, "sam", extra_logs=["sharpness", "grad_norm"])
optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])

sample = x[:256], y[:256]
probes = [
    keras_sharp.callbacks.HessianProbe(*sample, k=5, density=True, log_dir=log_dir),
    keras_sharp.callbacks.SharpnessProbe(*sample, measures=["max_sharpness"], rho=0.05),
]
# TensorBoard comes after the probes: it writes what is in the logs by then.
board = keras.callbacks.TensorBoard(log_dir)
model.fit(
    x[:1200],
    y[:1200],
    validation_data=(x[1200:], y[1200:]),
    epochs=args.epochs,
    callbacks=[*probes, board, progress("SAM")],
    verbose=0,
)
print(f"\ntensorboard --logdir {log_dir}")

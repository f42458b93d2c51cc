"""Sharpness-aware training in a `tf.distribute` strategy.

All GPUs of one machine, or its CPU if it has none:

    python examples/distributed/train_tensorflow.py

Two processes; on a cluster each machine has its own TF_CONFIG, as here on one:

    export WORKERS='"cluster": {"worker": ["127.0.0.1:12345", "127.0.0.1:12346"]}'
    TF_CONFIG="{$WORKERS, \"task\": {\"type\": \"worker\", \"index\": 0}}" \
        python examples/distributed/train_tensorflow.py &
    TF_CONFIG="{$WORKERS, \"task\": {\"type\": \"worker\", \"index\": 1}}" \
        python examples/distributed/train_tensorflow.py
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import tensorflow as tf

if "TF_CONFIG" in os.environ:
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
else:
    strategy = tf.distribute.MirroredStrategy()

import keras

import keras_sharp
from data import load

BATCH = 64  # of all replicas together

x, y = load()
keras.utils.set_random_seed(0)
with strategy.scope():  # all variables are made in here
    network = keras.Sequential([keras.layers.Dense(32, "relu"), keras.layers.Dense(10)])
    model = keras_sharp.SharpnessAwareModel(network, "sam", perturbation_scope="global")
    model.compile(
        optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
history = model.fit(x, y, batch_size=BATCH, epochs=3, shuffle=False, verbose=0).history
replicas = strategy.num_replicas_in_sync
print(f"one of {replicas} replicas: loss {history['loss'][-1]:.6f}", flush=True)

"""Sharpness-aware training with a `keras.distribution`.

All devices of one machine; four, made of its CPU, if it has no accelerator:

    python examples/distributed/train_jax.py

Two processes; on a cluster the address is that of the first machine:

    export KERAS_DISTRIBUTION_JOB_ADDRESSES=127.0.0.1:12345
    export KERAS_DISTRIBUTION_NUM_PROCESSES=2
    KERAS_DISTRIBUTION_PROCESS_ID=0 python examples/distributed/train_jax.py &
    KERAS_DISTRIBUTION_PROCESS_ID=1 python examples/distributed/train_jax.py
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras

if "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ:
    keras.distribution.initialize()
else:
    jax.config.update("jax_num_cpu_devices", 4)

import keras_sharp
from data import load

BATCH = 64  # of all devices together

# Each process reads its own examples, so there is nothing left to divide.
keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
rank, world = jax.process_index(), jax.process_count()
x, y = load()
x, y = x[rank::world], y[rank::world]

keras.utils.set_random_seed(0)
network = keras.Sequential([keras.layers.Dense(32, "relu"), keras.layers.Dense(10)])
model = keras_sharp.SharpnessAwareModel(network, "sam", perturbation_scope="replica")
model.compile(
    optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = model.fit(x, y, batch_size=BATCH // world, epochs=3, verbose=0).history
print(f"{jax.device_count()} devices: loss {history['loss'][-1]:.6f}", flush=True)

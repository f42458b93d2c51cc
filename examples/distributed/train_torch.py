"""Sharpness-aware training in several processes of PyTorch, one per GPU.

Here, two processes on one machine:

    torchrun --nproc-per-node 2 examples/distributed/train_torch.py

On two machines of eight GPUs, on each of them, with the address of the first:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \
        --rdzv-endpoint FIRST:29500 examples/distributed/train_torch.py
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

import torch
import torch.distributed as dist

on_gpu = torch.cuda.is_available()
if on_gpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if on_gpu else "gloo")

import keras

import keras_sharp
from data import load

BATCH = 64  # of all processes together

rank, world = dist.get_rank(), dist.get_world_size()
x, y = load()
x, y = x[rank::world], y[rank::world]  # each process has examples of its own, equally many

keras.utils.set_random_seed(0)
network = keras.Sequential([keras.layers.Dense(32, "relu"), keras.layers.Dense(10)])
model = keras_sharp.SharpnessAwareModel(network, "sam", perturbation_scope="global")
model.compile(
    optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = model.fit(x, y, batch_size=BATCH // world, epochs=3, verbose=0).history
# With its newline the line is one write, and cannot mix with that of another process.
print(f"process {rank} of {world}: loss {history['loss'][-1]:.6f}\n", end="", flush=True)
if rank == 0:
    network.save("trained.keras")
dist.destroy_process_group()

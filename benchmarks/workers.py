"""The worker processes of `step_cost.py`: one per framework and mode, pinned to one core.

A worker builds its contestants for one workload. A contestant is a function
`run(steps)` that trains for that many steps and returns when the last one is
done. The worker then answers requests: run a block of this one, and say how
much time it took.
"""

import functools
import gc
import importlib
import importlib.util
import os
import resource
import time
import traceback
from typing import NamedTuple

import networks

LEARNING_RATE, MOMENTUM, RHO, PARTS = 1e-3, 0.9, 0.05, 4

OURS = ("sam", "asam", "gsam", "adaptive_gsam", "bsam", "sam_4_parts")
#: What spares gradients, run only if asked for; blocks must then be a multiple of ten steps.
CHEAPER = (
    *("every_10", "looksam_5", "looksam_10", "ascent_share", "momentum_sam", "async_sam"),
    *("friendly_sam", "wsam", "norm_only"),
)
#: The contestants that the others are compared with; they always run. `fb` is one forward and
#: backward pass, `fb_twice` two of them in one compiled function, the second at other weights.
BASELINES = ("plain", "fb", "fb_twice")


class Worker(NamedTuple):
    """One process: which packages it needs, what it runs, and who takes part.

    Attributes:
        peer: the PyPI package whose SAM it runs, or `None` for keras_sharp.
        package: the package to import first, which is the framework.
        backend: the Keras backend, or `None` where there is no Keras.
        jit: whether Keras compiles the step with XLA.
        contestants: names, beside the two baselines.
    """

    peer: str | None
    package: str
    backend: str | None
    jit: bool
    contestants: tuple = OURS


WORKERS = {
    "tensorflow": Worker(None, "tensorflow", "tensorflow", False, (*OURS, *CHEAPER)),
    "tensorflow-jit": Worker(None, "tensorflow", "tensorflow", True, (*OURS, *CHEAPER)),
    "jax": Worker(None, "jax", "jax", True, (*OURS, *CHEAPER)),
    "torch": Worker(None, "torch", "torch", False, (*OURS, *CHEAPER)),
    "tf_keras": Worker("tf_keras", "tf_keras", None, False, ("sam", "sam_4_parts")),
    "tf_keras-jit": Worker("tf_keras", "tf_keras", None, True, ("sam", "sam_4_parts")),
    "pytorch_optimizer": Worker("pytorch_optimizer", "torch", None, False, ("sam", "asam", "gsam")),
    "optax": Worker("optax", "jax", None, True, ("sam",)),
}


def serve(connection, name, workload_name, steps, wanted, core):
    """The main function of a worker process.

    It sends `("ready", names)` or `("missing", package)`, then answers each
    request `(contestant, steps)` with `("time", cpu, wall)` in seconds, and
    `"memory"` with the peak resident set size in MiB, before the networks
    were built and now. Whatever is raised goes back as `("error", text)`.
    """
    os.sched_setaffinity(0, {core})  # Before any framework counts the cores.
    worker = WORKERS[name]
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    if worker.backend:
        os.environ["KERAS_BACKEND"] = worker.backend
    try:
        for package in (worker.package, worker.peer):
            if package and importlib.util.find_spec(package) is None:
                connection.send(("missing", package))
                return
            if package:
                importlib.import_module(package)
        if worker.peer is None:
            importlib.import_module("keras_sharp")
        imported = _peak_mib()
        data = networks.batches(networks.WORKLOADS[workload_name], steps)
        contestants = BUILDERS[worker.peer](workload_name, worker, wanted, data)
        connection.send(("ready", list(contestants)))
        while (request := connection.recv()) is not None:
            if request == "memory":
                connection.send(("memory", imported, _peak_mib()))
                continue
            try:
                connection.send(("time", *_timed(contestants[request[0]], request[1])))
            except Exception as error:
                connection.send(("error", describe(error)))
    except EOFError:  # The driver is gone.
        return
    except Exception as error:
        connection.send(("error", describe(error)))


def describe(error):
    """The first line of an error, for the results. The traceback is shown, but not stored."""
    traceback.print_exception(error)
    return next(iter(traceback.format_exception_only(error))).strip().splitlines()[0]


def _timed(run, steps):
    """CPU time of all threads of this process, and wall time, of one block."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    run(steps)
    return time.process_time() - cpu, time.perf_counter() - wall


def _peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# keras_sharp: contestants are calls of `model.fit` on NumPy arrays


def _ours(name, worker, wanted, data):
    import keras

    import keras_sharp

    methods = {
        "plain": None,
        "sam": keras_sharp.methods.SAM(RHO),
        "asam": keras_sharp.methods.ASAM(RHO),
        "gsam": keras_sharp.methods.GSAM(RHO),
        "adaptive_gsam": keras_sharp.methods.AdaptiveGSAM(RHO),
        "bsam": keras_sharp.methods.BSAM(RHO),
        "sam_4_parts": keras_sharp.methods.SAM(RHO),
        "every_10": keras_sharp.policies.Every(keras_sharp.methods.SAM(RHO), 10),
        "looksam_5": keras_sharp.methods.LookSAM(RHO, k=5),
        "looksam_10": keras_sharp.methods.LookSAM(RHO, k=10),
        "ascent_share": keras_sharp.methods.SAM(RHO, ascent_share=0.25),
        "momentum_sam": keras_sharp.methods.MomentumSAM(RHO),
        "async_sam": keras_sharp.methods.AsyncSAM(RHO),
        "friendly_sam": keras_sharp.methods.FriendlySAM(RHO),
        "wsam": keras_sharp.methods.WSAM(RHO),
        "norm_only": keras_sharp.methods.SAM(RHO),
    }
    contestants = {}
    for contestant, method in methods.items():
        if contestant in wanted:
            model = networks.keras_network(name, keras)
            if method is not None:
                parts = PARTS if contestant == "sam_4_parts" else 1
                perturb = "norm_only" if contestant == "norm_only" else "all"
                model = keras_sharp.SharpnessAwareModel(model, method, parts, perturb=perturb)
            contestants[contestant] = _fit(keras, model, worker.jit, name, data)
    passes = {"tensorflow": functools.partial(_passes_tensorflow, jit=worker.jit)}
    passes |= {"jax": _passes_jax, "torch": _passes_torch}
    for contestant, number in {"fb": 1, "fb_twice": 2}.items():
        if contestant in wanted:
            network = networks.keras_network(name, keras)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            batch = [a[: networks.WORKLOADS[name].batch_size] for a in data]
            contestants[contestant] = passes[worker.backend](network, loss, batch, number)
    return contestants


def _fit(keras, model, jit, name, data):
    x, y = data
    batch_size = networks.WORKLOADS[name].batch_size
    model.compile(
        keras.optimizers.SGD(LEARNING_RATE, MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit,
    )

    def run(steps):
        size = steps * batch_size
        model.fit(x[:size], y[:size], batch_size, shuffle=False, verbose=0)

    return run


# Forward and backward passes alone: no data pipeline, no optimizer, no metrics. Between two of them
# the weights move along the gradient, or a compiler could make one pass of the two.


def _passes_tensorflow(network, loss, batch, number, jit):
    import tensorflow as tf

    x, y = map(tf.constant, batch)
    weights = network.trainable_variables

    @tf.function(jit_compile=jit)
    def forward_backward(x, y):
        for i in range(number):
            with tf.GradientTape() as tape:
                value = loss(y, network(x, training=True))
            gradient = tape.gradient(value, weights)
            if i + 1 < number:
                for w, g in zip(weights, gradient, strict=True):
                    w.assign_sub(1e-3 * g)
        return value, gradient

    def run(steps):
        for _ in range(steps):
            value, _ = forward_backward(x, y)
        value.numpy()

    return run


def _passes_jax(network, loss, batch, number):
    import jax
    import jax.numpy as jnp

    x, y = map(jnp.asarray, batch)

    def value(weights, state, x, y):
        logits, state = network.stateless_call(weights, state, x, training=True)
        return loss(y, logits), state

    @jax.jit
    def forward_backward(weights, state, x, y):
        values = []
        for i in range(number):
            new, gradient = jax.value_and_grad(value, has_aux=True)(weights, state, x, y)
            values.append(new)
            if i + 1 < number:
                weights = [w - 1e-3 * g for w, g in zip(weights, gradient, strict=True)]
        return values, gradient

    weights = [v.value for v in network.trainable_variables]
    state = [v.value for v in network.non_trainable_variables]

    def run(steps):
        for _ in range(steps):
            out = forward_backward(weights, state, x, y)
        jax.block_until_ready(out)

    return run


def _passes_torch(network, loss, batch, number):
    import torch

    x, y = map(torch.as_tensor, batch)
    weights = [v.value for v in network.trainable_variables]

    def run(steps):
        for _ in range(steps):
            for i in range(number):
                gradient = torch.autograd.grad(loss(y, network(x, training=True)), weights)
                if i + 1 < number:
                    with torch.no_grad():
                        torch._foreach_sub_(weights, gradient, alpha=1e-3)

    return run


# The peers


def _tf_keras(name, worker, wanted, data):
    import tf_keras

    sam = tf_keras.models.experimental.SharpnessAwareMinimization
    wrap = {
        "plain": lambda model: model,
        "sam": lambda model: sam(model, rho=RHO),
        "sam_4_parts": lambda model: sam(model, rho=RHO, num_batch_splits=PARTS),
    }
    contestants = {
        contestant: _fit(
            tf_keras, wrapped(networks.keras_network(name, tf_keras)), worker.jit, name, data
        )
        for contestant, wrapped in wrap.items()
        if contestant in wanted
    }
    if "fb" in wanted:
        network = networks.keras_network(name, tf_keras)
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        batch = [a[: networks.WORKLOADS[name].batch_size] for a in data]
        contestants["fb"] = _passes_tensorflow(network, loss, batch, 1, worker.jit)
    return contestants


def _pytorch_optimizer(name, worker, wanted, data):
    """A bare loop over prepared batches, as the documentation of each optimizer shows it."""
    import pytorch_optimizer
    import torch

    x, y = torch.as_tensor(data[0]), torch.as_tensor(data[1], dtype=torch.int64)
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    batch_size = networks.WORKLOADS[name].batch_size
    prepared = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    loss_fn = torch.nn.CrossEntropyLoss()
    hyperparameters = {"lr": LEARNING_RATE, "momentum": MOMENTUM}

    def plain(network):
        optimizer = torch.optim.SGD(network.parameters(), **hyperparameters)

        def step(x, y):
            optimizer.zero_grad()
            loss_fn(network(x), y).backward()
            optimizer.step()

        return step

    def forward_backward(network):
        weights = list(network.parameters())

        def step(x, y):
            torch.autograd.grad(loss_fn(network(x), y), weights)

        return step

    def sam(network, adaptive=False):
        optimizer = pytorch_optimizer.SAM(
            network.parameters(), torch.optim.SGD, rho=RHO, adaptive=adaptive, **hyperparameters
        )

        def step(x, y):
            def closure():
                optimizer.zero_grad()
                loss = loss_fn(network(x), y)
                loss.backward()
                return loss

            closure()
            optimizer.step(closure)

        return step

    def gsam(network):
        sgd = torch.optim.SGD(network.parameters(), **hyperparameters)
        constant = torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0)
        rho = pytorch_optimizer.ProportionScheduler(
            constant, LEARNING_RATE, LEARNING_RATE, max_value=RHO, min_value=RHO
        )
        optimizer = pytorch_optimizer.GSAM(network.parameters(), sgd, network, rho)

        def step(x, y):
            optimizer.set_closure(loss_fn, x, y)
            optimizer.step()
            optimizer.update_rho_t()

        return step

    def asam(network):
        return sam(network, adaptive=True)

    makers = {"plain": plain, "fb": forward_backward, "sam": sam, "asam": asam, "gsam": gsam}
    contestants = {}
    for contestant, make in makers.items():
        if contestant in wanted:
            step = make(networks.torch_network(name).train())

            def run(steps, step=step):
                for x, y in prepared[:steps]:
                    step(x, y)

            contestants[contestant] = run
    return contestants


def _optax(name, worker, wanted, data):
    """A bare loop over prepared batches; the whole step is one compiled function."""
    import jax
    import optax
    from optax import contrib

    batch_size = networks.WORKLOADS[name].batch_size
    prepared = [
        tuple(jax.numpy.asarray(a[i : i + batch_size]) for a in data)
        for i in range(0, len(data[0]), batch_size)
    ]
    weights, state, apply = networks.jax_network(name)

    def loss(weights, state, x, y):
        logits, state = apply(weights, state, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    sgd = optax.sgd(LEARNING_RATE, MOMENTUM)
    ascent = optax.chain(contrib.normalize(), optax.sgd(RHO))
    optimizers = {"plain": sgd, "sam": contrib.sam(sgd, ascent, opaque_mode=True)}

    def train(optimizer):
        @jax.jit
        def step(weights, state, slots, x, y):
            (value, new_state), gradient = value_and_grad(weights, state, x, y)
            updates, slots = optax.with_extra_args_support(optimizer).update(
                gradient,
                slots,
                weights,
                grad_fn=lambda weights, _: value_and_grad(weights, state, x, y)[1],
            )
            return value, optax.apply_updates(weights, updates), new_state, slots

        position = weights, state, optimizer.init(weights)

        def run(steps):
            nonlocal position
            for x, y in prepared[:steps]:
                value, *position = step(*position, x, y)
            jax.block_until_ready((value, position))

        return run

    contestants = {name: train(opt) for name, opt in optimizers.items() if name in wanted}
    if "fb" in wanted:
        compiled = jax.jit(value_and_grad)

        def run(steps):
            for x, y in prepared[:steps]:
                out = compiled(weights, state, x, y)
            jax.block_until_ready(out)

        contestants["fb"] = run
    return contestants


BUILDERS = {
    None: _ours,
    "tf_keras": _tf_keras,
    "pytorch_optimizer": _pytorch_optimizer,
    "optax": _optax,
}

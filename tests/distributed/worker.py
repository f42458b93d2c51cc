"""One process of a distributed training: trains every case and writes down what came out.

Run by `tests/test_distribution.py`, as many times as the topology has processes:

    python -m tests.distributed.worker TOPOLOGY RANK PORTS FOLDER
"""

import contextlib
import json
import math
import os
import pathlib
import re
import sys

BATCH = 16
N = 80

#: How many devices share a batch, in how many processes.
TOPOLOGIES = {
    "tensorflow": {"one_device": (1, 1), "mirrored": (2, 1), "workers": (2, 2)},
    "jax": {"data_parallel": (4, 1), "model_parallel": (2, 1), "processes": (2, 2)},
    "torch": {"processes": (2, 2), "ddp": (2, 2)},
}
METHODS = ("sam", "asam", "gsam", "adaptive_gsam", "bsam")

#: All methods in both scopes. They train on, for 50 steps in all, to see replicas drift.
EVERY_METHOD = {
    f"{m}-{scope}": ({"method": m, "perturbation_scope": scope}, {})
    for m in METHODS
    for scope in ("global", "replica")
}
#: Passes that are skipped in some steps, or that begin somewhere else; see `cheaper`.
CHEAPER = {
    f"{name}-global": ({}, {"cheaper": name})
    for name in ("every", "looksam", "norm", "random", "momentum_sam", "wsam")
}


def is_of_last_layer(variable):
    return "last" in variable.path


#: What is trained: arguments of the wrapper; and of `make`, `data` and `fit`, below.
CASES = {
    **EVERY_METHOD,
    **CHEAPER,
    "parts-global": ({"num_micro_batches": 2}, {}),
    "partial-global": ({"perturb": is_of_last_layer}, {}),
    "partial-replica": ({"perturb": is_of_last_layer, "perturbation_scope": "replica"}, {}),
    "parts-replica": ({"num_micro_batches": 2, "perturbation_scope": "replica"}, {}),
    "second_order-global": ({}, {"second_order": True}),
    "batchnorm-replica": ({"perturbation_scope": "replica"}, {"network": "batchnorm_net"}),
    "batchnorm-global": ({}, {"network": "batchnorm_net"}),
    "uneven-global": ({}, {"n": N - 3, "epochs": 4}),
    "clipped-global": ({}, {"clipnorm": 0.05}),
    "uneven_second_order-global": ({}, {"n": N - 3, "epochs": 4, "second_order": True}),
    "jit-global": ({}, {"jit_compile": True}),
    "jit_second_order-global": ({}, {"jit_compile": True, "second_order": True}),
    "watched-global": ({}, {"watched": True, "steps": 5}),
    "nan-global": ({}, {"bad_example": 20}),
    "nan-replica": ({"perturbation_scope": "replica"}, {"bad_example": 20}),
}
#: Topologies whose code is that of another one train these only.
FEW = ("sam-global", "sam-replica", "bsam-global", "bsam-replica", "every-global", "parts-global")
FEW += ("batchnorm-replica", "nan-replica", "watched-global")
#: Most of the time goes into compiling: two trainings with an evaluation are enough.
EVALUATED = ("sam-global", "uneven-global")
#: Of these, the messages of a step are counted.
COUNTED = {
    "tensorflow": (),  # There is no public way to see them.
    "jax": ("sam-global", "sam-replica", "bsam-global", "bsam-replica", "parts-replica"),
    "torch": tuple(f"{m}-{s}" for m in (*METHODS, "parts") for s in ("global", "replica")),
}


#: The topology that trains all cases.
ALL_CASES = {"tensorflow": "mirrored", "jax": "data_parallel", "torch": "processes"}


def cases(backend, topology):
    names = CASES if topology == ALL_CASES[backend] else FEW
    if topology == "model_parallel":  # Here the layouts are those of the methods.
        names = dict.fromkeys((*names, *(f"{method}-global" for method in METHODS)))
    # A sharded batch of JAX must divide by the number of devices; only on TensorFlow
    # is there something to see about XLA.
    left_out = {"jax": ("uneven", "jit"), "tensorflow": (), "torch": ("jit",)}[backend]
    return [name for name in names if not name.startswith(left_out)]


def data(name):
    """Twenty batches; five where the tests compute each by hand.

    In one epoch, where possible: TensorFlow takes a third of a second to begin one.
    """
    import numpy as np

    from tests import models

    options = CASES[name][1]
    x, y = models.classification(options.get("n", N))
    if "bad_example" in options:
        x[options["bad_example"]] = float("nan")
    times = options.get("steps", 5 if "replica" in name else 20) * BATCH // N
    times //= options.get("epochs", 1)
    return np.tile(x, (times, 1)), np.tile(y, times)


def make(name, seed=1):
    """A compiled wrapper around a small network."""

    import keras_sharp
    from tests import models

    arguments, options = CASES[name]
    arguments = {"method": "sam", "extra_logs": ["grad_norm", "skipped_steps"], **arguments}
    if "cheaper" in options:
        arguments["method"] = cheaper(options["cheaper"])
    if options.get("second_order"):
        arguments["method"] = keras_sharp.methods.SAM(second_order=True)
    network = getattr(models, options.get("network", "mlp"))(outputs=3, seed=seed)
    wrapper = keras_sharp.SharpnessAwareModel(network, **arguments)
    compile_like_all(
        wrapper, options.get("clipnorm"), jit_compile=options.get("jit_compile", "auto")
    )
    return wrapper


def cheaper(name):
    """A method or a policy that spares gradients."""
    import random

    from keras_sharp import methods, policies

    random.seed(0)  # Where the seed of `WithProbability` comes from.
    return {
        "every": lambda: policies.Every("sam", 2),
        "looksam": lambda: methods.LookSAM(k=2),
        "norm": lambda: policies.WhenGradientNorm("bsam"),
        "random": lambda: policies.WithProbability("sam", 0.5),
        "momentum_sam": lambda: methods.MomentumSAM(),
        "wsam": lambda: policies.Every(methods.WSAM(decoupled=True), 2),
    }[name]()


def compile_like_all(wrapper, clipnorm=None, **kwargs):
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    wrapper.compile(sgd(global_clipnorm=clipnorm), loss, metrics=["accuracy"], **kwargs)


def sgd(**kwargs):
    import keras

    return keras.optimizers.SGD(0.1, momentum=0.9, **kwargs)


def options_of(name):
    """Arguments of `fit`."""
    return {
        "epochs": CASES[name][1].get("epochs", 1),
        "evaluate": name in EVALUATED,
        "watched": "watched" in CASES[name][1],
    }


def fit(wrapper, x, y, batch_size=BATCH, epochs=1, evaluate=False, watched=False):
    """The logs of each epoch."""
    from keras_sharp import callbacks

    kwargs = {"validation_data": (x, y)} if evaluate else {}
    if watched:  # In one batch, and in several that are not equal, nor divide by 4.
        hessian = callbacks.HessianProbe(x, y, k=2)
        sharpness = callbacks.SharpnessProbe(x, y, measures=["max_sharpness"], batch_size=30)
        kwargs["callbacks"] = [hessian, sharpness]
    return wrapper.fit(
        x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, **kwargs
    ).history


class Place:
    """Where this process stands in its topology.

    Args:
        topology: its name.
        rank: the number of this process.
        ports: those of the processes.
        timeout: Integer, how many seconds without a word from another process are too many.
            Defaults to `100`, as in JAX.
    """

    def __init__(self, topology, rank, ports, timeout=100):
        self.topology, self.rank, self.ports = topology, int(rank), ports.split(",")
        self.timeout = timeout
        self.backend = os.environ["KERAS_BACKEND"]
        self.num_devices, self.num_processes = TOPOLOGIES[self.backend][topology]
        self.strategy = None
        if self.backend != "tensorflow":  # Keras would import it, which takes seconds.
            sys.modules["tensorflow"] = None
        getattr(self, f"_start_{self.backend}")()

    def _start_tensorflow(self):
        addresses = [f"127.0.0.1:{port}" for port in self.ports]
        if self.topology == "workers":
            task = {"type": "worker", "index": self.rank}
            cluster = {"cluster": {"worker": addresses}, "task": task}
            os.environ["TF_CONFIG"] = json.dumps(cluster)
        import tensorflow as tf

        if self.topology == "mirrored":
            cpu = tf.config.list_physical_devices("CPU")[0]
            logical = [tf.config.LogicalDeviceConfiguration()] * 2
            tf.config.set_logical_device_configuration(cpu, logical)
        distribute = tf.distribute
        self.strategy = {
            "one_device": lambda: distribute.OneDeviceStrategy("CPU:0"),
            "mirrored": lambda: distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
            "workers": lambda: distribute.MultiWorkerMirroredStrategy(),
        }[self.topology]()

    def _start_jax(self):
        import jax
        import keras

        keras_distribution = keras.distribution
        if self.topology == "processes":
            # As `keras.distribution.initialize` does, which does not take the time.
            address = f"127.0.0.1:{self.ports[0]}"
            jax.distributed.initialize(
                address, 2, self.rank, heartbeat_timeout_seconds=self.timeout
            )
        else:
            jax.config.update("jax_num_cpu_devices", 4)
        if self.topology == "model_parallel":
            devices = keras_distribution.list_devices()
            mesh = keras_distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
            layout = keras_distribution.LayoutMap(mesh)
            layout[".*first.*kernel"] = (None, "model")
            distribution = keras_distribution.ModelParallel(
                layout_map=layout, batch_dim_name="batch"
            )
        else:
            distribution = keras_distribution.DataParallel(auto_shard_dataset=False)
        keras_distribution.set_distribution(distribution)

    def _start_torch(self):
        import torch.distributed as dist

        address = f"tcp://127.0.0.1:{self.ports[0]}"
        dist.init_process_group("gloo", init_method=address, rank=self.rank, world_size=2)

    def scope(self):
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def share(self, x, y):
        """What this process passes to `fit`: data, and the size of its batches."""
        if self.num_processes == 1 or self.backend == "tensorflow":
            return x, y, BATCH
        import numpy as np

        batches = [range(i, min(i + BATCH, len(x))) for i in range(0, len(x), BATCH)]
        mine = np.concatenate([np.array_split(b, self.num_processes)[self.rank] for b in batches])
        return x[mine], y[mine], BATCH // self.num_processes

    def seed(self):
        """PyTorch processes begin with different weights, to see that they are made equal."""
        return 1 + self.rank if self.backend == "torch" else 1

    def values(self, variable):
        """The values that the replicas of this process hold, as arrays."""
        import keras

        if self.topology == "mirrored":
            return [v.numpy() for v in self.strategy.experimental_local_results(variable.value)]
        return [keras.ops.convert_to_numpy(variable)]


def messages_jax(wrapper, x, y):
    """How many numbers each message of a step carries, and each of a product with the Hessian."""
    import jax
    import keras

    from keras_sharp import curvature

    distribution = keras.distribution.distribution()
    data = [jax.device_put(a, distribution.get_data_layout(a.shape).backend_layout) for a in (x, y)]
    groups = (
        wrapper.trainable_variables,
        wrapper.non_trainable_variables,
        wrapper.optimizer.variables,
        wrapper.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in groups)
    yield sent(jax.jit(wrapper.train_step).lower(state, tuple(data)))
    hessian = curvature.HessianOperator(wrapper, x, y)
    product, v = hessian._product, hessian.as_weights([1.0] * hessian.size)
    yield sent(product.func.lower(*product.args, v))


def sent(lowered):
    """How many numbers each all-reduce of a compiled program adds up."""
    program, sizes = lowered.compile().as_text(), []
    assert not re.search(r"(all-gather|all-to-all|collective-permute)(-start)?\(", program)
    for shapes in re.findall(r"= (.*?) all-reduce(?:-start)?\(", program):
        dimensions = re.findall(r"\w\d+\[([\d,]*)\]", shapes)
        sizes.append(sum(math.prod(int(n) for n in d.split(",") if n) for d in dimensions))
    return sizes


def messages_torch(wrapper, x, y):
    """How many numbers each message of a step carries, and each of a product with the Hessian."""
    import torch.distributed as dist

    from keras_sharp import curvature

    def sent(run):
        all_reduce, sizes = dist.all_reduce, []

        def recorded(tensor, *args, **kwargs):
            sizes.append(tensor.numel())
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = recorded
        run()
        dist.all_reduce = all_reduce
        return sizes

    yield sent(lambda: wrapper.train_on_batch(x, y))
    hessian = curvature.HessianOperator(wrapper, x, y)
    yield sent(lambda: hessian.matvec([1.0] * hessian.size))


#: What Keras cannot do on several replicas of TensorFlow: arguments of the optimizer.
UNABLE = ("gradient_accumulation_steps", "ema_overwrite_frequency")


def refusals(place):
    """The error messages of what cannot be done on several replicas, by its name."""
    import keras

    names = ["sum", "float8"]
    names += [*UNABLE, "steps_per_execution"] if place.backend == "tensorflow" else []
    messages = {}
    for name in names:
        try:
            with place.scope():
                wrapper = make("sam-replica")
                optimizer, loss, kwargs = sgd(), wrapper.loss, {}
                if name == "sum":
                    loss = keras.losses.SparseCategoricalCrossentropy(True, reduction="sum")
                elif name == "float8":
                    wrapper.model.get_layer("first").quantize("float8")
                elif name in UNABLE:
                    optimizer = sgd(use_ema="ema" in name, **{name: 2})
                else:
                    kwargs = {name: 2}
                wrapper.compile(optimizer, loss, **kwargs)
            fit(wrapper, *place.share(*data("sam-replica")))
        except ValueError as error:
            messages[name] = str(error)
    return messages


MESSAGES = {("jax", "data_parallel"): messages_jax, ("torch", "processes"): messages_torch}


def main(topology, rank, ports, folder):
    place = Place(topology, rank, ports)
    import keras
    import numpy as np

    from keras_sharp import curvature

    start, folder, written = pathlib.Path(folder), pathlib.Path(folder) / topology, {}

    def write(name, wrapper, history):
        variables = [*wrapper.model.weights, *wrapper.optimizer.variables, wrapper.skipped_steps]
        for i, variable in enumerate(variables):
            for j, value in enumerate(place.values(variable)):
                written[f"{name}/{i}/{place.rank + j}"] = np.array(value)
        for key, numbers in history.items():
            written[f"{name}/{key}/{place.rank}"] = np.array(numbers)

    for name in cases(place.backend, topology):
        with place.scope():
            wrapper = make(name, place.seed())
        if topology == "ddp":  # It is not used, but its hooks are there.
            import torch

            torch.nn.parallel.DistributedDataParallel(wrapper)
        # In the scope of a strategy, so are the callbacks.
        with place.scope() if "watched" in name else contextlib.nullcontext():
            history = fit(wrapper, *place.share(*data(name)), **options_of(name))
        if "watched" in name and place.strategy:
            found = curvature.eigenvalues(wrapper, *data(name), k=2).values
            history["outside_of_the_scope"] = found
        if topology == "model_parallel":
            variables = [*wrapper.trainable_variables, *wrapper.optimizer.variables]
            history["layouts"] = [str(v.value.sharding.spec) for v in variables]
        write(name, wrapper, history)
        if name == "sam-global":  # All processes of JAX must take part in saving.
            wrapper.save(folder / f"from_many_{place.rank}.keras")
        if name in EVERY_METHOD:
            x, y = data(name)
            rows = 50 * BATCH - len(x)
            fit(wrapper, *place.share(np.resize(x, (rows, x.shape[1])), np.resize(y, rows)))
            write(f"{name}, 50 steps", wrapper, {})
        count = MESSAGES.get((place.backend, topology))
        if count and name in COUNTED[place.backend]:
            x, y, size = place.share(*data(name))
            messages = count(wrapper, x[:size], y[:size])
            kinds = ("step", "product") if name == "sam-global" else ("step",)
            for kind, sizes in zip(kinds, messages, strict=False):
                written[f"{name}/messages of a {kind}/{rank}"] = np.array(sizes)

    if topology == ALL_CASES[place.backend]:
        for name, message in refusals(place).items():
            written[f"refused/{name}/{rank}"] = np.array(message)

    # Goes on where one device stopped.
    with place.scope():
        wrapper = keras.saving.load_model(start / "from_one.keras")
    x, y = data("sam-global")
    half = len(x) // 2
    write("continued", wrapper, fit(wrapper, *place.share(x[half:], y[half:])))
    np.savez(folder / f"{place.rank}.npz", **written)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Several devices and several processes train as one device does.

Each topology is launched once, trains all cases (`tests/distributed/worker.py`), and
writes down its weights and logs; the tests compare.
"""

import contextlib
import functools
import re
import signal

import keras
import numpy as np
import pytest

from keras_sharp import SharpnessAwareModel
from tests import models
from tests.distributed import worker
from tests.distributed.launch import Processes, free_ports
from tests.models import BACKEND, values

TOPOLOGIES = worker.TOPOLOGIES[BACKEND]
#: Cases with every topology that trains them.
ALL = [(t, case) for t in TOPOLOGIES for case in worker.cases(BACKEND, t)]

slow = pytest.mark.slow


class Outcome:
    """What the processes of a topology wrote down."""

    def __init__(self, topology, folder):
        self.num_devices, self.num_processes = TOPOLOGIES[topology]
        self.folder = folder
        self.arrays = {}
        for rank in range(self.num_processes):
            self.arrays.update(np.load(folder / f"{rank}.npz"))

    def replicas(self, case, key):
        """The values that the replicas, or the processes, have of one thing."""
        found = [a for name, a in self.arrays.items() if name.rsplit("/", 1)[0] == f"{case}/{key}"]
        assert found, (case, key)
        return found

    def variables(self, case):
        """The variables of the first replica: weights, optimizer, skipped steps."""
        indices = {name.split("/")[1] for name in self.arrays if name.startswith(f"{case}/")}
        numbers = sorted(int(i) for i in indices if i.isdigit())
        return [self.replicas(case, i)[0] for i in numbers]

    def keys(self, case):
        return sorted({name.split("/")[1] for name in self.arrays if name.startswith(f"{case}/")})


def launch(topology, folder):
    """Run the processes of a topology to their end; an error message if they fail."""
    one_device()[0].save(folder / "from_one.keras")
    number = TOPOLOGIES[topology][1]
    ports = ",".join(free_ports(number))

    def command(rank):
        return ["-m", "tests.distributed.worker", topology, rank, ports, folder]

    with Processes(command, number, folder) as processes:
        codes = processes.wait(timeout=240)
        if codes != [0] * number:
            return f"exit codes {codes}\n{processes.output()}"
    return Outcome(topology, folder)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A function of the topology, which launches it when first asked for."""
    launch_once = functools.cache(lambda t: launch(t, tmp_path_factory.mktemp(t)))

    def get(topology):
        found = launch_once(topology)
        assert isinstance(found, Outcome), found
        return found

    return get


def one_device(epochs=2):
    """The first case on one device, and its logs."""
    wrapper = worker.make("sam-global")
    return wrapper, worker.fit(wrapper, *worker.data("sam-global"), epochs=epochs)


def in_parts(x, num_replicas, num_parts):
    """Rows in the order that one device must see, for its parts to be those of the replicas."""
    order = np.arange(len(x)).reshape(
        -1, num_replicas, num_parts, worker.BATCH // num_parts // num_replicas
    )
    return x[order.swapaxes(1, 2).ravel()]


def variables_of(wrapper):
    return [*wrapper.model.weights, *wrapper.optimizer.variables, wrapper.skipped_steps]


@functools.cache
def reference(case, num_replicas):
    """Variables and logs of one device that sees the whole batches."""
    wrapper = worker.make(case)
    x, y = worker.data(case)
    if "parts" in case:
        x, y = in_parts(x, num_replicas, 2), in_parts(y, num_replicas, 2)
    options = {"epochs": worker.epochs_of(case), "evaluate": case in worker.EVALUATED}
    history = worker.fit(wrapper, x, y, **options)
    return values(variables_of(wrapper)), history


@pytest.mark.parametrize(("topology", "case"), [a for a in ALL if "global" in a[1]])
@slow
def test_global_scope_equals_one_device(outcome, topology, case):
    if "batchnorm" in case and BACKEND != "jax" and topology != "one_device":
        pytest.skip("each replica normalizes its part of the batch by itself")
    found = outcome(topology)
    expected, history = reference(case, found.num_devices)
    models.assert_close(found.variables(case), expected, rtol=0, atol=1e-6)
    for name, numbers in history.items():
        np.testing.assert_allclose(found.replicas(case, name)[0], numbers, atol=1e-5)


@functools.cache
def by_hand(case, num_replicas):
    """Weights after one epoch of m-sharpness: one direction per part of a batch, averaged."""
    wrapper = worker.make(case)
    model, method = wrapper.model, worker.CASES[case][0].get("method", "sam")
    model.optimizer.build(model.trainable_variables)
    parts = num_replicas * wrapper.num_micro_batches
    x, y = worker.data(case)
    for batch in np.split(np.arange(len(x)), len(x) // worker.BATCH):
        before, after, directions = values(model.non_trainable_variables), [], []
        for part in np.split(batch, parts):
            models.assign(model.non_trainable_variables, before)
            _, d = models.direction_by_hand(model, x[part], y[part], method=method)
            directions.append(d)
            after.append(values(model.non_trainable_variables))
        for i, v in enumerate(model.non_trainable_variables):
            if keras.backend.is_float_dtype(v.dtype):
                v.assign(np.mean([a[i] for a in after], axis=0))
        mean = [np.mean(d, axis=0).astype("float32") for d in zip(*directions, strict=True)]
        if all(np.isfinite(d).all() for d in mean):
            models.apply(model, mean)
        else:
            models.assign(model.non_trainable_variables, before)
    return values(model.weights)


@pytest.mark.parametrize(
    ("topology", "case"), [a for a in ALL if "replica" in a[1] and "long" not in a[1]]
)
@slow
def test_replica_scope_equals_m_sharpness_by_hand(outcome, topology, case):
    found = outcome(topology)
    expected = by_hand(case, found.num_devices)
    weights = found.variables(case)[: len(expected)]
    models.assert_close(weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@slow
def test_replicas_are_equal_to_the_bit(outcome, topology):
    """Weights, statistics, optimizer and logs of every case; one trains for 50 steps."""
    found = outcome(topology)
    for case in [*worker.cases(BACKEND, topology), "continued"]:
        for key in found.keys(case):
            first, *others = found.replicas(case, key)
            for other in others:
                np.testing.assert_array_equal(first, other, err_msg=f"{case} {key}")
    assert len(found.replicas("sam-global", 0)) == (
        2 if topology in ("mirrored", "workers", "processes", "ddp") else 1
    )


@pytest.mark.parametrize("topology", TOPOLOGIES)
@slow
def test_a_step_with_nan_on_one_replica_is_skipped_on_all(outcome, topology):
    found = outcome(topology)
    for case in [c for c in worker.cases(BACKEND, topology) if "nan" in c]:
        assert found.variables(case)[-1] == worker.epochs_of(case)
        assert all(np.isfinite(v).all() for v in found.variables(case))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@slow
def test_training_goes_on_with_fewer_and_with_more_devices(outcome, topology):
    found = outcome(topology)
    expected, history = reference("sam-global", found.num_devices)
    continued = found.variables("continued")
    models.assert_close(continued, expected, rtol=0, atol=1e-6)

    wrapper = keras.saving.load_model(found.folder / "from_many_0.keras")
    models.assert_close(values(variables_of(wrapper)), found.variables("sam-global"), atol=1e-7)
    more = worker.fit(wrapper, *worker.data("sam-global"), epochs=1)
    whole, _ = one_device(epochs=5)
    models.assert_close(
        values(variables_of(wrapper)), values(variables_of(whole)), rtol=0, atol=1e-6
    )
    assert more["loss"][0] < history["loss"][-1]


@pytest.mark.skipif(BACKEND != "torch", reason="the others notice after minutes only")
@slow
def test_when_a_process_is_killed_the_other_ends_and_a_backup_goes_on(tmp_path):
    def processes(fate):
        ports = ",".join(free_ports(2))

        def command(rank):
            return ["-m", "tests.distributed.interrupted", "processes", rank, ports, tmp_path, fate]

        return Processes(command, 2, tmp_path)

    with processes("dies") as both:
        assert both.all[0].wait(timeout=60) > 0, both.output()
        assert both.all[1].wait(timeout=60) == -signal.SIGKILL
        assert "Check the logs of the remote worker" in both.outputs[0].read_text()
    assert not list(tmp_path.glob("*.npz"))

    with processes("lives") as both:
        assert both.wait(timeout=60) == [0, 0], both.output()
    expected = values(one_device(epochs=3)[0].model.weights)
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        models.assert_close([found[name] for name in found], expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="no public way to see the messages")
@pytest.mark.parametrize("case", worker.COUNTED)
@slow
def test_a_step_sends_one_gradient_per_evaluation_or_per_step(outcome, case):
    """Global scope: each gradient is averaged. Replica scope: only the direction is."""
    found = outcome("data_parallel" if BACKEND == "jax" else "processes")
    wrapper, _ = one_device(epochs=0)
    num_weights = sum(int(np.prod(v.shape)) for v in wrapper.trainable_variables)
    sizes = found.replicas(case, "messages")[0]
    gradients = {"sam-global": 2, "bsam-global": 3}.get(case, 1)
    # XLA puts the two perturbed gradients of BSAM into one message.
    messages = 2 if (BACKEND, case) == ("jax", "bsam-global") else gradients
    assert sum(size >= num_weights for size in sizes) == messages, sizes
    # Metrics, losses and norms are a handful of numbers beside them.
    assert gradients * num_weights <= sum(sizes) <= gradients * num_weights + 30, sizes


#: What a TPU has no code for: calls to the host, strings, shapes that depend on data.
FORBIDDEN_ON_TPU = re.compile(
    r"PyFunc|NumpyFunc|Print|Summary|String|AsString|Where$|Unique|DynamicPartition|Placeholder$"
)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TPUStrategy is of TensorFlow")
@pytest.mark.parametrize("case", [f"{m}-global" for m in worker.METHODS] + ["parts-replica"])
@slow
def test_the_traced_step_has_nothing_that_a_tpu_forbids(case):
    import tensorflow as tf

    x, y = (a[: worker.BATCH] for a in worker.data(case))
    wrapper = worker.make(case)
    wrapper.train_on_batch(x, y)
    step = tf.function(wrapper.train_step, jit_compile=True)
    graph = step.get_concrete_function((tf.constant(x), tf.constant(y))).graph
    assert not any(t.shape.rank is None for t in graph.outputs)
    inputs = {t.op.name for t in graph.inputs}
    operations = [o for o in graph.get_operations() if o.name not in inputs]
    types = {o.type for o in operations}
    types |= {n.op for f in graph.as_graph_def().library.function for n in f.node_def}
    assert not [t for t in types if FORBIDDEN_ON_TPU.search(t)]
    step((tf.constant(x), tf.constant(y)))  # XLA compiles all of it.


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a matter of tf.distribute")
@slow
def test_what_keras_cannot_do_on_several_replicas_is_refused(outcome):
    messages = outcome("mirrored").arrays["refusals"]
    for message, option in zip(messages, worker.REFUSED, strict=True):
        assert "with 2 replicas cannot" in message
        assert f"{option}=2" in message


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a matter of tf.distribute")
@pytest.mark.parametrize("inside", ["model", "wrapper"])
def test_a_model_and_a_wrapper_in_different_strategies_are_refused(inside):
    import tensorflow as tf

    scope, nothing = tf.distribute.OneDeviceStrategy("CPU:0").scope(), contextlib.nullcontext()
    with scope if inside == "model" else nothing:
        model = models.mlp()
    with scope if inside == "wrapper" else nothing:
        wrapper = SharpnessAwareModel(model)
        wrapper.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"OneDeviceStrategy.*strategy\.scope"):
        wrapper.fit(*models.regression(), verbose=0)


def test_on_one_device_both_scopes_are_the_same():
    x, y = models.classification()
    weights = []
    for scope in ("global", "replica"):
        wrapper = SharpnessAwareModel(models.mlp(outputs=3), "gsam", perturbation_scope=scope)
        worker.compile_like_all(wrapper)
        wrapper.train_on_batch(x, y)
        weights.append(values(wrapper.model.weights))
    models.assert_same(*weights)


def test_the_scope_is_saved():
    wrapper = SharpnessAwareModel(models.mlp(), perturbation_scope="replica")
    again = SharpnessAwareModel.from_config(wrapper.get_config())
    assert again.perturbation_scope == "replica"


def test_an_unknown_scope_is_answered_with_the_nearest_spelling():
    with pytest.raises(ValueError, match=r"perturbation_scope='globl'. Did you mean 'global'\?"):
        SharpnessAwareModel(models.mlp(), perturbation_scope="globl")

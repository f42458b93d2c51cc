"""Several devices and several processes train as one device does.

Each topology is launched once, trains all cases (`tests/distributed/worker.py`), and
writes down its weights and logs; the tests compare.
"""

import concurrent.futures
import contextlib
import functools
import re
import signal
import threading

import keras
import numpy as np
import pytest

from benchmarks import scaling_model
from keras_sharp import SharpnessAwareModel
from tests import models
from tests.distributed import worker
from tests.distributed.launch import Processes, free_ports, left_behind
from tests.models import BACKEND, values

TOPOLOGIES = worker.TOPOLOGIES[BACKEND]
#: Cases with every topology that trains them.
ALL = [(t, case) for t in TOPOLOGIES for case in worker.cases(BACKEND, t)]

#: Devices and processes are the business of each backend by itself.
slow = pytest.mark.slow(everywhere=True)


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


class Launcher:
    """Runs topologies in the background, each once, as long as there are cores for them."""

    def __init__(self, folder):
        self._folder = folder
        self._cores = threading.BoundedSemaphore(2)
        self._turn = threading.Lock()  # Two that have a core each would both wait for another.
        self._pool = concurrent.futures.ThreadPoolExecutor()
        self._running = []
        self.future = functools.cache(lambda topology: self._pool.submit(self._run, topology))
        one_device(steps=10).save(folder / "from_one.keras")

    def stop(self):
        self._pool.shutdown(wait=False, cancel_futures=True)
        for processes in self._running:
            processes.kill()

    def _run(self, topology):
        """The outcome, or an error message."""
        number = TOPOLOGIES[topology][1]
        ports = ",".join(free_ports(number))
        (self._folder / topology).mkdir()

        def command(rank):
            return ["-m", "tests.distributed.worker", topology, rank, ports, self._folder]

        with self._turn:
            for _ in range(number):
                self._cores.acquire()
        try:
            with Processes(command, number, self._folder / topology) as processes:
                self._running.append(processes)
                codes = processes.wait(timeout=600)
        finally:
            self._cores.release(number)
        if codes != [0] * number:
            return f"exit codes {codes}\n{processes.output()}"
        return Outcome(topology, self._folder / topology)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory, request):
    launcher = Launcher(tmp_path_factory.mktemp("topologies"))
    tests = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    for topology in [t for t in TOPOLOGIES if any(p.get("topology") == t for p in tests)]:
        launcher.future(topology)
    # Until they are done, this process computes what the tests will compare with.
    for topology, case in [a for a in ALL if {"topology": a[0], "case": a[1]} in tests]:
        expected(case, TOPOLOGIES[topology][0])
    yield launcher
    launcher.stop()
    assert not left_behind()


@pytest.fixture(autouse=True, scope="module")
def _xla_hurries():
    """As in the other processes."""
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_disable_most_optimizations", True)
    yield
    if BACKEND == "jax":
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def outcome(launcher):
    """A function of the topology."""

    def get(topology):
        found = launcher.future(topology).result()
        assert isinstance(found, Outcome), found
        return found

    return get


def expected(case, num_replicas):
    """Variables and logs on one device; or, of "replica" scope, weights and no logs."""
    if "parts" not in case and "replica" not in case:
        num_replicas = 1  # One device does the same for all.
    return (by_hand if "replica" in case else reference)(case, num_replicas)


@functools.cache
def one_device(steps):
    """The first case on one device, after so many steps."""
    wrapper = worker.make("sam-global")
    x, y = worker.data("sam-global")
    worker.fit(wrapper, np.resize(x, (steps * worker.BATCH, 3)), np.resize(y, steps * worker.BATCH))
    return wrapper


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
    history = worker.fit(wrapper, x, y, **worker.options_of(case))
    return values(variables_of(wrapper)), history


def normalizes_by_part(topology, case):
    """Whether each replica normalizes its part of the batch by itself, unlike one device."""
    return "batchnorm" in case and BACKEND != "jax" and topology != "one_device"


@pytest.mark.parametrize(
    ("topology", "case"),
    [a for a in ALL if "global" in a[1] and not normalizes_by_part(*a)],
)
@slow
def test_global_scope_equals_one_device(outcome, topology, case):
    found = outcome(topology)
    variables, history = expected(case, found.num_devices)
    # LookSAM divides by the length of a small difference of gradients, which rounding is part of.
    atol = 1e-5 if "looksam" in case else 1e-6
    models.assert_close(found.variables(case), variables, rtol=0, atol=atol)
    for name, numbers in history.items():
        np.testing.assert_allclose(found.replicas(case, name)[0], numbers, atol=1e-5)


@functools.cache
def by_hand(case, num_replicas):
    """Weights and logs of m-sharpness: one direction per part of a batch, averaged."""
    wrapper = worker.make(case)
    arguments = worker.CASES[case][0]
    how = {"method": arguments.get("method", "sam"), "takes_part": arguments.get("perturb")}
    model = wrapper.model
    model.optimizer.build(model.trainable_variables)
    parts = num_replicas * wrapper.num_micro_batches
    x, y = worker.data(case)
    for batch in np.split(np.arange(len(x)), len(x) // worker.BATCH):
        before, after, directions = values(model.non_trainable_variables), [], []
        for part in np.split(batch, parts):
            models.assign(model.non_trainable_variables, before)
            _, d = models.direction_by_hand(model, x[part], y[part], **how)
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
    return values(model.weights), {}


@pytest.mark.parametrize(("topology", "case"), [a for a in ALL if "replica" in a[1]])
@slow
def test_replica_scope_equals_m_sharpness_by_hand(outcome, topology, case):
    found = outcome(topology)
    weights, _ = expected(case, found.num_devices)
    models.assert_close(found.variables(case)[: len(weights)], weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@slow
def test_replicas_are_equal_to_the_bit(outcome, topology):
    """Weights, statistics, optimizer and logs of every case; of every method after 50 steps."""
    found = outcome(topology)
    longer = [f"{case}, 50 steps" for case in worker.EVERY_METHOD]
    for case in [*worker.cases(BACKEND, topology), *longer, "continued"]:
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
        bad_steps = len(worker.data(case)[0]) // worker.N
        assert found.variables(case)[-1] == bad_steps
        assert all(np.isfinite(v).all() for v in found.variables(case))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@slow
def test_training_goes_on_with_fewer_and_with_more_devices(outcome, topology):
    found = outcome(topology)
    variables, _ = expected("sam-global", found.num_devices)
    models.assert_close(found.variables("continued"), variables, rtol=0, atol=1e-6)

    wrapper = keras.saving.load_model(found.folder / "from_many_0.keras")
    models.assert_close(values(variables_of(wrapper)), found.variables("sam-global"), atol=1e-7)
    worker.fit(wrapper, *(a[: worker.N] for a in worker.data("sam-global")))
    whole = variables_of(one_device(steps=25))
    models.assert_close(values(variables_of(wrapper)), values(whole), rtol=0, atol=1e-6)


#: What the process that is left says in its last lines.
LOST = {
    "tensorflow": "The tasks have crashed. Check the task logs",
    "jax": "Gloo all-reduce failed",
    "torch": "Check the logs of the remote worker",
}


@slow
def test_when_a_process_is_killed_the_other_ends_and_a_backup_goes_on(tmp_path):
    topology = "workers" if BACKEND == "tensorflow" else "processes"

    def processes(fate):
        ports = ",".join(free_ports(2))

        def command(rank):
            return ["-m", "tests.distributed.interrupted", topology, rank, ports, tmp_path, fate]

        return Processes(command, 2, tmp_path)

    with processes("dies") as both:
        assert both.all[1].wait(timeout=200) == -signal.SIGKILL
        assert both.all[0].wait(timeout=200) != 0, both.output()
        assert LOST[BACKEND] in both.outputs[0].read_text()
    assert not list(tmp_path.glob("*.npz"))

    with processes("lives") as both:
        assert both.wait(timeout=200) == [0, 0], both.output()
    weights = values(one_device(steps=15).model.weights)
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        models.assert_close([found[name] for name in found], weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", worker.COUNTED[BACKEND])
@slow
def test_a_step_sends_one_gradient_per_evaluation_or_per_step(outcome, case):
    """Global scope: each gradient is averaged. Replica scope: only the direction is."""
    found = outcome("data_parallel" if BACKEND == "jax" else "processes")
    variables = one_device(steps=10).trainable_variables
    num_weights = sum(int(np.prod(v.shape)) for v in variables)
    sizes = found.replicas(case, "messages of a step")[0]
    name, scope = case.split("-")
    method, parts = ("sam", 2) if name == "parts" else (name, 1)
    gradients = scaling_model.messages(method, scope, parts)
    # XLA puts the two perturbed gradients of BSAM into one message.
    messages = 2 if (BACKEND, case) == ("jax", "bsam-global") else gradients
    assert sum(size >= num_weights for size in sizes) == messages, sizes
    # Metrics, losses and norms are a handful of numbers beside them.
    assert gradients * num_weights <= sum(sizes) <= gradients * num_weights + 30, sizes


@pytest.mark.skipif(BACKEND == "tensorflow", reason="each process computes it by itself")
@slow
def test_a_product_with_the_hessian_sends_one_message(outcome):
    found = outcome(worker.ALL_CASES[BACKEND])
    variables = one_device(steps=10).trainable_variables
    num_weights = sum(int(np.prod(v.shape)) for v in variables)
    (size,) = found.replicas("sam-global", "messages of a product")[0]
    assert num_weights <= size <= num_weights + 30


@pytest.mark.skipif(BACKEND != "jax", reason="a matter of keras.distribution")
@pytest.mark.parametrize(
    "case", [case for t, case in ALL if t == "model_parallel" and case in worker.EVERY_METHOD]
)
@slow
def test_weights_and_their_momentum_keep_their_layouts(outcome, case):
    layouts = outcome("model_parallel").replicas(case, "layouts")[0].tolist()
    num_weights = len(one_device(steps=10).trainable_variables)
    weights, momentum = layouts[:num_weights], layouts[-num_weights:]
    assert weights[0] == "P(None, 'model')"
    assert "model" not in "".join(weights[1:])
    assert momentum == weights


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a matter of tf.distribute")
@pytest.mark.parametrize("topology", TOPOLOGIES)
@slow
def test_eigenvalues_are_the_same_in_and_outside_of_the_scope(outcome, topology):
    found = outcome(topology)
    for i, value in enumerate(found.replicas("watched-global", "outside_of_the_scope")[0]):
        inside = found.replicas("watched-global", f"hessian_lambda_{i + 1}")[0]
        np.testing.assert_allclose(inside[-1], value, rtol=1e-5)


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
    if case in ("bsam-global", "parts-replica"):  # Takes seconds.
        step((tf.constant(x), tf.constant(y)))  # XLA compiles all of it.


@slow
def test_what_cannot_be_done_on_several_replicas_is_refused(outcome):
    found = outcome(worker.ALL_CASES[BACKEND])
    expected = {"sum": r"reduction='sum'", "float8": "float8.*on one device"}
    if BACKEND == "tensorflow":
        for name in (*worker.UNABLE, "steps_per_execution"):
            expected[name] = f"with 2 replicas cannot.*{name}=2"
    assert found.keys("refused") == sorted(expected)
    for name, pattern in expected.items():
        for message in found.replicas("refused", name):
            assert re.search(pattern, str(message)), message


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


def test_no_process_outlives_its_block(tmp_path):
    with Processes(lambda rank: ["-c", "import time; time.sleep(60)"], 2, tmp_path) as both:
        groups = {process.pid for process in both.all}
        assert groups <= set(left_behind())
    assert not groups & set(left_behind())


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

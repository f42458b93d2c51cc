"""Starts the processes of a topology, and leaves none behind."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_ports(number):
    """Ports on which nothing listens. All are taken at once, so that they differ."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [str(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def environment():
    """One thread per process is plenty; nothing leads to another cluster or a GPU."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TF_CONFIG", "XLA_FLAGS")}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu",
        # Nothing here runs long enough to be worth the time that XLA takes to make it fast.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }


#: The ids of all processes that were started. Each leads a group of its own.
groups: set[int] = set()


def left_behind():
    """Those groups in which a process still runs."""
    alive = []
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, 0)
            alive.append(group)
    return alive


class Processes:
    """A group of processes that run the same command: use it in a `with` statement.

    At its end they are killed, and what they started themselves along with them.

    Args:
        command: function of the rank that gives the arguments of Python.
        number: Integer, how many processes.
        folder: where their output goes.
        variables: function of the rank that gives environment variables. Defaults to none.
    """

    def __init__(self, command, number, folder, variables=lambda rank: {}):
        self.folder = pathlib.Path(folder)
        self.outputs = [self.folder / f"output_{rank}.txt" for rank in range(number)]
        self.all = []
        for rank, output in enumerate(self.outputs):
            with output.open("w") as file:
                self.all.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command(rank))],
                        cwd=ROOT,
                        env={**environment(), **variables(rank)},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        groups.update(process.pid for process in self.all)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        for process in self.all:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait(self, timeout):
        """Wait until all have ended, or one has failed. Their exit codes."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            codes = [process.poll() for process in self.all]
            if None not in codes or any(codes):
                return codes
            time.sleep(0.1)
        return [process.poll() for process in self.all]

    def output(self):
        """The last lines that each process wrote."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in self.outputs)

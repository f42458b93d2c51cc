"""Starts the processes of a topology, and leaves none behind."""

import os
import pathlib
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
    defaults = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    inherited = {k: v for k, v in os.environ.items() if k not in ("TF_CONFIG", "XLA_FLAGS")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**inherited, **defaults, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


class Processes:
    """A group of processes that run the same command: use it in a `with` statement.

    Args:
        command: function of the rank that gives the arguments of Python.
        number: Integer, how many processes.
        folder: where their output goes.
    """

    def __init__(self, command, number, folder):
        self.folder = pathlib.Path(folder)
        self.outputs = [self.folder / f"output_{rank}.txt" for rank in range(number)]
        self.all = []
        for rank, output in enumerate(self.outputs):
            with output.open("w") as file:
                self.all.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command(rank))],
                        cwd=ROOT,
                        env=environment(),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
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

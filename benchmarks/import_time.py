"""How long `import keras_sharp` takes, once Keras is imported.

    python benchmarks/import_time.py --backend jax --rounds 9

Each round is a process of its own. Modules are compiled to bytecode before the first one counts,
as pip does on installation.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = """
import sys, time
start = time.perf_counter()
import keras
middle = time.perf_counter()
before = len(sys.modules)
import keras_sharp
end = time.perf_counter()
print(1000 * (middle - start), 1000 * (end - middle), len(sys.modules) - before)
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    backends = ("tensorflow", "jax", "torch")
    parser.add_argument("--backend", nargs="+", choices=backends, default=backends)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"{'':10} {'keras':>10} {'+ keras_sharp: median (lowest to highest)':>45} {'modules':>8}")
    for backend in args.backend:
        with tempfile.TemporaryDirectory() as bytecode:
            rounds = [measure(backend, bytecode) for _ in range(args.rounds + 1)][1:]
        of_keras, ours, modules = zip(*rounds, strict=True)
        ms = f"{statistics.median(ours):.0f} ms ({min(ours):.0f} to {max(ours):.0f})"
        print(f"{backend:>10} {statistics.median(of_keras):7.0f} ms {ms:>45} {modules[0]:8.0f}")


def measure(backend, bytecode):
    """The milliseconds of Keras, those that keras_sharp adds, and the modules that it adds."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    environment |= {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


if __name__ == "__main__":
    main()

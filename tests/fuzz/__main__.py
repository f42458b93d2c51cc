"""Trains random models with random settings, and compares with plain Keras and with the formulas.

    python -m tests.fuzz --backend jax --cases 1000 --start 0
    python -m tests.fuzz --backend jax --case '{"blocks": ["lstm"], "rho": 0.1}'

Each case is made from one number. For one that fails, the line that repeats it is printed, and
the case once more without all that takes no part in the failure.
"""

import argparse
import os
import sys


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"))
    parser.add_argument("--cases", type=int, default=1000, help="how many; default: 1000")
    parser.add_argument("--start", type=int, default=0, help="the seed of the first; default: 0")
    parser.add_argument("--case", help="one case as JSON, in place of seeds")
    parser.add_argument("--lean", action="store_true", help="at a fraction of the cost")
    parser.add_argument("--no-shrink", action="store_true", help="leave failing cases as they are")
    args = parser.parse_args()
    if args.backend:
        os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    # Compiling takes most of the time, and what is compiled runs a few times only.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"

    from tests.fuzz import fuzzer  # Keras decides on its backend when it is imported.

    return fuzzer.run(args)


if __name__ == "__main__":
    sys.exit(main())

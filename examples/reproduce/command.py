"""The command line of all scripts of this folder: imports no Keras, since it picks the backend."""

import argparse
import os
import pathlib
import sys

BACKENDS = ("tensorflow", "jax", "torch")

# The data sets of the examples are one folder up.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


def parse(description, **more):
    """Read the arguments, and set the backend before Keras is imported.

    Args:
        description: the docstring of the script.
        **more: further options of a script, and for each a dictionary of
            arguments of `argparse.ArgumentParser.add_argument`.

    Returns:
        A namespace with `quick`, `seeds` and `output`, and the further ones.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="default: as Keras")
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works")
    parser.add_argument("--seeds", type=int, help="trainings with the chosen settings")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("results") / "reproduce",
        help="the folder for JSON and picture; what is in the JSON already is not run again",
    )
    for name, arguments in more.items():
        parser.add_argument(f"--{name}", **arguments)
    args = parser.parse_args()
    if args.seeds is not None and args.seeds < 2:
        parser.error(f"--seeds must be at least 2, for a standard error. Received: {args.seeds}")
    if args.backend:
        os.environ["KERAS_BACKEND"] = args.backend
    return args

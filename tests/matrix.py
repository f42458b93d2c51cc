"""Runs the tests with each Python and each backend alone, in environments of their own.

    python tests/matrix.py
    python tests/matrix.py --python 3.12 --backend jax -- tests/test_methods.py
    python tests/matrix.py --backend jax --install keras==3.10.0 jax==0.6.0

The environments are made in `build/matrix`, with the versions of `constraints.txt`, or with what
follows `--install` and the newest of all else. The other two backends are absent. What stands
after `--` goes to pytest; without it, all tests run that are not marked slow.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys

import run as tests

ENVIRONMENTS = tests.ROOT / "build" / "matrix"
PYTHONS = ("3.11", "3.12", "3.13")


def main():
    args = parse_arguments(sys.argv[1:])
    rows = []
    for version in args.python:
        python = find_python(version)
        for backend in args.backend:
            name = "-".join([version, backend, *args.install])
            print(f"\n==== Python {version}, {backend} alone {' '.join(args.install)}", flush=True)
            rows.append((version, backend, *try_one(python, name, backend, args)))
    print("\n| Python | backend | versions | tests | seconds | verdict |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print("|", " | ".join(row), "|")
    return int(any(row[-1] != "ok" for row in rows))


def parse_arguments(arguments):
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="3.X")
    parser.add_argument("--backend", nargs="+", choices=tests.BACKENDS, default=tests.BACKENDS)
    parser.add_argument("--install", nargs="+", default=[], metavar="PACKAGE==VERSION")
    args = parser.parse_args(arguments[:split])
    args.pytest = arguments[split + 1 :]
    return args


def find_python(version):
    """A Python of this version on PATH or among those of pyenv; None if there is none."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    candidates = [f"python{version}", *pyenv.glob(f"versions/{version}.*/bin/python")]
    for candidate in candidates:
        try:
            # The command may be there without a Python behind it, or without what makes
            # environments.
            subprocess.run([candidate, "-c", "import ensurepip"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    return None


def try_one(python, name, backend, args):
    """Install and test: the versions, the outcomes, the seconds, and "ok" or what is wrong."""
    if python is None:
        return "", "", "", "no such Python here"
    environment = ENVIRONMENTS / re.sub(r"[^\w.-]+", "_", name)
    try:
        python = install(python, environment, backend, args.install)
    except subprocess.CalledProcessError as error:
        return "", "", "", f"NOT INSTALLED (exit status {error.returncode})"
    versions, present = look(python, backend)
    if present:
        return versions, "", "", f"NOT ALONE ({', '.join(present)})"
    counts, seconds, verdict = tests.run(backend, True, args.pytest, python)
    for failure in counts["failures"]:
        print(f"failed: {failure}")
    return versions, tests.describe(counts), f"{seconds:.0f}", verdict


def install(python, environment, backend, packages):
    """An environment with the package, its tools and one backend: its Python."""
    subprocess.run([python, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    versions = packages or ["-c", tests.ROOT / "constraints.txt"]
    subprocess.run([*pip, *versions, "-e", f"{tests.ROOT}[dev,{backend}]"], check=True)
    return python


def look(python, backend):
    """The versions of Keras and the backend, and which of the other backends are installed."""
    others = [other for other in tests.BACKENDS if other != backend]
    script = (
        "from importlib import metadata, util;"
        f"print(*(f'{{name}} {{metadata.version(name)}}' for name in ('keras', {backend!r})));"
        f"print(*(name for name in {others!r} if util.find_spec(name)))"
    )
    done = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    versions, present = done.stdout.splitlines()
    return versions, present.split()


if __name__ == "__main__":
    sys.exit(main())

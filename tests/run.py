"""Runs the tests once per backend, each in a process of its own.

    python tests/run.py
    python tests/run.py --backend jax --quick
    python tests/run.py --backend torch -- tests/test_methods.py -k gsam -x

As many backends run at a time as there are processor cores; each line of output
says whose it is. What stands after `--` goes to pytest. Without paths there, it runs all of
`tests/`, the doctests of the package, and the code in README.md and docs/.

With all backends, each slow test is run by one of them (see `shares`); with one, all are.
"""

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import shares

ROOT = pathlib.Path(__file__).resolve().parent.parent
BACKENDS = ("tensorflow", "jax", "torch")
#: What the last run of each backend came to, in the format of JUnit.
REPORTS = ROOT / "build" / "reports"
#: Which slow tests each backend has, and which of them it leaves to others.
SHARES = ROOT / "build" / "shares"


def main():
    args = parse_arguments(sys.argv[1:])
    backends = args.backend or BACKENDS
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        left_out = {}
        if set(backends) == set(BACKENDS) and not args.quick:
            slow = pool.map(lambda backend: list_slow(backend, args.pytest), backends)
            left_out = shares.left_to_others(dict(zip(backends, slow, strict=True)))
        outcomes = pool.map(
            lambda backend: run(backend, args.quick, args.pytest, left_out=left_out.get(backend)),
            backends,
        )
        results = dict(zip(backends, outcomes, strict=True))
    print("\n==== summary ====")
    for backend, (counts, seconds, verdict) in results.items():
        print(f"{backend:>10}  {describe(counts):<40} {seconds:6.0f} s  {verdict}")
    for backend, (counts, _, _) in results.items():
        for name in counts["failures"]:
            print(f"{backend:>10}  failed: {name}")
    total = {
        key: sum(r[0][key] for r in results.values()) for key in ("passed", "failed", "skipped")
    }
    print(describe(total))
    return int(any(verdict != "ok" for _, _, verdict in results.values()))


def parse_arguments(arguments):
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backend", action="append", choices=BACKENDS, help="may be repeated; default: all three"
    )
    parser.add_argument("--quick", action="store_true", help="leave out the tests marked slow")
    args = parser.parse_args(arguments[:split])
    args.pytest = arguments[split + 1 :]
    return args


def list_slow(backend, pytest_arguments):
    """The names of the slow tests that a backend has."""
    path = SHARES / f"{backend}.txt"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "tests.shares", "-m", "slow", "-qq"]
    command += ["--collect-only", f"--list-slow={path}", *pytest_arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(backend), capture_output=True, text=True, check=False
    )
    if not path.exists():
        sys.exit(f"The tests of {backend} could not be collected:\n{done.stdout}{done.stderr}")
    return path.read_text(encoding="utf-8").splitlines()


def run(backend, quick, pytest_arguments, python=sys.executable, left_out=None):
    """Run pytest on one backend: the counts, the seconds, and "ok" or what is wrong.

    Tests whose names are in `left_out` are left to another backend.
    """
    report = REPORTS / f"{backend}.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-m", "not slow" if quick else ""]
    command += [*pytest_arguments, f"--junitxml={report}"]
    if left_out is not None:
        path = SHARES / f"{backend}_leaves_out.txt"
        path.write_text("\n".join(left_out), encoding="utf-8")
        command += ["-p", "tests.shares", f"--leave-out={path}"]
    start = time.perf_counter()
    code = show(command, backend)
    seconds = time.perf_counter() - start
    counts = read_counts(report)
    if counts["passed"] + counts["failed"] == 0:
        verdict = f"NO TEST RAN (exit status {code})"
    elif code != 0:
        verdict = f"FAILED (exit status {code})"
    else:
        verdict = "ok"
    return counts, seconds, verdict


def show(command, backend):
    """Run a command, and print each line of its output as it comes: its exit status."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(backend),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:
            print(f"{backend:>10} | {line}", end="", flush=True)
    return process.returncode


def environment(backend):
    """The environment of one run. Which GPUs are visible is left as it is."""
    defaults = {
        # JAX compiles thousands of tiny programs, which run a few times: it need not try hard, nor
        # compile one of them twice.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / "build" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # On a GPU, take memory as needed: another process may want some, too.
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # Threads of PyTorch wait for each other in a loop: beside another program on the same
        # cores, two of them take ten times as long as one.
        "OMP_NUM_THREADS": "1",
        # A crash of a library, in the tests or in a program that they start, says where.
        "PYTHONFAULTHANDLER": "1",
        "MPLBACKEND": "Agg",
    }
    return {**defaults, **os.environ, "KERAS_BACKEND": backend}


def read_counts(report):
    """How many tests passed, failed and were skipped, and the names of those that failed.

    None if pytest wrote no report.
    """
    counts = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    if report.exists():
        tree = ElementTree.parse(report)
        for case in tree.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                counts["failures"].append(f"{case.get('classname')}::{case.get('name')}")
        for suite in tree.iter("testsuite"):
            failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped = int(suite.get("skipped", 0))
            counts["failed"] += failed
            counts["skipped"] += skipped
            counts["passed"] += int(suite.get("tests", 0)) - failed - skipped
    return counts


def describe(counts):
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))


if __name__ == "__main__":
    sys.exit(main())

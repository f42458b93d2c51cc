"""Where all backends run: each slow test once, on a backend that has it."""

import os
import subprocess
import sys

from tests import shares
from tests.run import ROOT

TESTS = """
import pytest

@pytest.mark.slow
def test_shared(): pass

@pytest.mark.slow
@pytest.mark.skipif(True, reason="not on this backend")
def test_of_another_backend(): pass

@pytest.mark.slow(everywhere=True)
def test_of_each_backend(): pass

def test_quick(): pass
"""


def test_each_slow_test_is_run_once_where_it_is():
    names = [f"test_{i}" for i in range(90)]
    slow = {"tensorflow": names[:60], "jax": names[30:], "torch": names[40:50]}
    left_out = shares.left_to_others(slow)
    run = {backend: set(slow[backend]) - set(left_out[backend]) for backend in slow}
    assert sorted(name for of_one in run.values() for name in of_one) == sorted(names)
    assert set(names[:30]) <= run["tensorflow"]
    assert set(names[60:]) <= run["jax"]
    # None is left to a backend that does not have it, and each of the others takes some.
    assert all(set(left_out[backend]) <= set(slow[backend]) for backend in slow)
    assert all(run[backend] & set(names[40:50]) for backend in slow)


def test_the_home_of_a_test_does_not_depend_on_the_others():
    names = ["test_a", "test_b"]
    of_both, of_one = (
        shares.left_to_others(dict.fromkeys(("tensorflow", "jax", "torch"), names[:n]))
        for n in (2, 1)
    )
    assert of_one == {b: [name for name in of_both[b] if name == "test_a"] for b in of_both}


def test_slow_tests_are_listed_and_left_out(tmp_path):
    file, listed = tmp_path / "test_some.py", tmp_path / "listed.txt"
    file.write_text(TESTS)

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", tmp_path]
        command += ["-p", "no:cacheprovider", "-W", "ignore", "-p", "tests.shares", *arguments]
        done = subprocess.run([*command, file], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout

    run("--collect-only", "--list-slow", listed)
    assert listed.read_text().splitlines() == ["test_some.py::test_shared"]
    printed = run("-v", "--leave-out", listed)
    assert "2 passed, 1 skipped, 1 deselected" in printed
    assert "test_shared" not in printed

"""A plugin of pytest: each slow test is run by one backend, of those that have it.

Where all backends run, as in CI, two thirds of the slow tests are left out on each of them, which
are not the same ones. First each backend lists those that it has, which a mark does not skip:

    python -m pytest -p tests.shares --collect-only -q -m slow --list-slow FILE

Of the lists, `left_to_others` makes for each backend the names that it leaves out:

    python -m pytest -p tests.shares --leave-out FILE
"""

import pathlib
import zlib

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("shares of the slow tests")
    group.addoption("--list-slow", type=pathlib.Path, help="where to write their names")
    group.addoption("--leave-out", type=pathlib.Path, help="the names of tests not to run")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if path := config.getoption("--list-slow"):
        names = [item.nodeid for item in items if is_shared(item) and not is_skipped(item)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names), encoding="utf-8")
    if path := config.getoption("--leave-out"):
        names = set(path.read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in names])
        items[:] = [item for item in items if item.nodeid not in names]


def is_shared(item):
    marks = list(item.iter_markers("slow"))
    return bool(marks) and not any(mark.kwargs.get("everywhere") for mark in marks)


def is_skipped(item):
    """Whether a mark says so: what a test decides while it runs is not known yet."""
    return any(item.iter_markers("skip")) or any(
        condition for mark in item.iter_markers("skipif") for condition in mark.args
    )


def left_to_others(slow):
    """The names that each backend leaves to another one.

    Args:
        slow: dictionary from backends to the names of their slow tests.

    Returns:
        A dictionary from backends to lists of names.
    """
    homes = {}
    for name in sorted({name for names in slow.values() for name in names}):
        backends = [backend for backend, names in slow.items() if name in names]
        # By the name, so that another test more or less moves no other one.
        homes[name] = backends[zlib.crc32(name.encode()) % len(backends)]
    return {
        backend: [name for name in names if homes[name] != backend]
        for backend, names in slow.items()
    }

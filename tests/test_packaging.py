"""What is installed: the two distributions, and what `import keras_sharp` loads.

`make dist` does the rest, with a network: it checks the distributions with twine, and installs
the wheel in an empty environment.
"""

import ast
import email
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import keras
import pytest
from hatchling import build

import keras_sharp

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAME = f"keras_sharp-{keras_sharp.__version__}"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build_wheel(source, target):
    """As `python -m build` does, in the environment of the tests: the wheel in a folder."""
    before = pathlib.Path.cwd()
    os.chdir(source)
    try:
        return target / build.build_wheel(str(target))
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked."""
    target = tmp_path_factory.mktemp("sdist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        archive = target / build.build_sdist(str(target))
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target / NAME


def names(wheel):
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "keras_sharp").rglob("*.py")}
    info = f"{NAME}.dist-info"
    assert names(wheel) == {
        *modules,
        "keras_sharp/py.typed",
        f"{info}/METADATA",
        f"{info}/RECORD",
        f"{info}/WHEEL",
        f"{info}/licenses/LICENSE",
    }


def test_the_wheel_says_what_it_is_and_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as file:
        metadata = email.message_from_bytes(file.read(f"{NAME}.dist-info/METADATA"))
    assert metadata["Name"] == "keras-sharp"
    assert metadata["Version"] == keras_sharp.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Description-Content-Type"] == "text/markdown"
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Issues", "Changelog"} <= set(urls)
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert [re.split(r"[<>=]", r)[0] for r in needed] == ["keras", "numpy"], "a backend is a choice"


@pytest.mark.slow
def test_the_wheel_trains_where_nothing_of_the_checkout_is(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, "--target", site, wheel], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    script = ROOT / "tests" / "first_step.py"
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"keras_sharp {keras_sharp.__version__} of {site / 'keras_sharp'}" in done.stdout


def test_the_source_distribution_builds_the_same_wheel(wheel, sdist, tmp_path):
    again = build_wheel(sdist, tmp_path)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(again) as theirs:
        assert set(ours.namelist()) == set(theirs.namelist())
        for name in ours.namelist():
            assert ours.read(name) == theirs.read(name), name


def test_the_source_distribution_holds_what_its_pages_point_to(sdist):
    pages = [sdist / "README.md", sdist / "CONTRIBUTING.md", *sorted(sdist.glob("docs/**/*.md"))]
    assert len(pages) > 2, "docs/ is missing"
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    missing = [
        (page.relative_to(sdist).as_posix(), link)
        for page, link in links
        if not (page.parent / link).exists()
    ]
    assert missing == []


def test_the_source_distribution_holds_what_its_tests_need(sdist):
    for name in ("tests/run.py", "conftest.py", "constraints.txt", "Makefile", "LICENSE"):
        assert (sdist / name).is_file(), name


def test_versions_agree():
    assert f"\nversion: {keras_sharp.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{keras_sharp.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def imported_at_once(path):
    """The packages that a module imports when it is imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_modules_import_what_is_declared_and_engines_their_backend():
    """Keras itself brings optree, and loads matplotlib and scipy where they are installed."""
    declared = {*sys.stdlib_module_names, "keras_sharp", "keras", "numpy"}
    for path in sorted((ROOT / "keras_sharp").rglob("*.py")):
        backend = re.match("_(tensorflow|jax|torch)", path.name)
        own = {backend[1], "optree"} if backend else set()
        assert set(imported_at_once(path)) <= declared | own, path


def test_import_loads_nothing_but_the_package_and_the_engine_of_the_backend():
    """Keras has loaded its backend already."""
    script = (
        "import sys, keras; before = set(sys.modules); import keras_sharp;"
        "print(*sorted(set(sys.modules) - before))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    new = done.stdout.split()
    packages = {name.partition(".")[0] for name in new} - sys.stdlib_module_names
    assert packages == {"keras_sharp"}
    engines = {name for name in new if name.startswith("keras_sharp.engine._")}
    of_backends = {name for name in engines if re.search("tensorflow|jax|torch", name)}
    assert of_backends
    assert all(keras.backend.backend() in name for name in of_backends), of_backends

"""The notebooks run from top to bottom, and what is stored in them is what they show."""

import importlib.util
import json
import pathlib
import re

import nbclient
import nbformat
import numpy as np
import pytest

from tests.models import BACKEND

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "examples" / "notebooks"
# By its path: pytest has loaded tests/run.py by the name of `run`.
_spec = importlib.util.spec_from_file_location("notebook_runner", FOLDER / "run.py")
runner = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runner)

#: Where each one runs in its small setting. Each was run on all three backends
#: when it was written; here that would take minutes more, most of them for
#: compiling. Many devices has a part for each backend; the others go where they
#: are quick, or, with TensorFlow Datasets, where TensorFlow is loaded already.
RUNS_ON = {
    "quickstart": ["torch"],
    "see_the_sharpness": ["torch"],
    "which_method_which_rho": ["jax"],
    "fine_tune_keras_hub": ["tensorflow"],
    "many_devices": ["tensorflow", "jax", "torch"],
}
#: Cells that show nothing: they install, define or compute something for the next
#: one, or need a TPU.
SILENT = {
    "quickstart": {"install", "valley"},
    "see_the_sharpness": {"install"},
    "which_method_which_rho": {"install"},
    "fine_tune_keras_hub": {"install"},
    "many_devices": {"install", "settings", "compare", "tpu"},
}
HERE = [name for name, backends in RUNS_ON.items() if BACKEND in backends]

each_notebook = pytest.mark.parametrize("name", runner.NAMES)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def test_every_notebook_runs_somewhere():
    assert sorted(RUNS_ON) == sorted(runner.NAMES)
    assert sorted(p.stem for p in FOLDER.glob("*.ipynb")) == sorted(runner.NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_it_runs_from_top_to_bottom_without_a_network(name, monkeypatch, tmp_path):
    if name == "quickstart":  # its images are there already, as after a download
        noise = np.random.default_rng(0).integers(0, 256, (300, 28, 28), "uint8")
        arrays = {"x_train": noise, "x_test": noise}
        labels = {key.replace("x", "y"): np.arange(300) % 10 for key in arrays}
        np.savez(tmp_path / "fashion_mnist.npz", **arrays, **labels)
        monkeypatch.setenv("KERAS_SHARP_DATA", str(tmp_path))
    else:
        monkeypatch.delenv("KERAS_SHARP_DATA", raising=False)
    # A machine with a network has none in there: nobody answers at this port.
    found = runner.execute(name, BACKEND, quick=True, https_proxy="http://127.0.0.1:9")
    cells = [cell for cell in found.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(pictures(cell)) for cell in cells) >= 2
    if name == "quickstart":
        assert "200 training and 100 test images of the shape (28, 28, 1)" in json.dumps(found)


def pictures(cell):
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="one backend is enough")
def test_an_error_in_a_cell_is_an_error(monkeypatch, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    monkeypatch.setattr(runner, "HERE", tmp_path)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        runner.execute("wrong", BACKEND)


@each_notebook
def test_it_opens_in_colab(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    address = "https://colab.research.google.com/github/keras-sharp/keras-sharp/blob/main"
    first = notebook.cells[0].source
    assert re.findall(r"\)\]\((https://colab[^)]*)\)", first) == [
        f"{address}/examples/notebooks/{name}.ipynb"
    ]
    install = code_cells(name)[0].source
    assert 'find_spec("keras_sharp") is None' in install
    assert "git+https://github.com/keras-sharp/keras-sharp" in install


@each_notebook
def test_links_between_notebooks_lead_somewhere(name):
    for cell in read(name).cells:
        for target in re.findall(r"\]\(([^):#]+)\)", cell.source):
            assert (FOLDER / target).exists(), target


@each_notebook
def test_outputs_are_stored_from_one_run_of_this_source(name):
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    notebook = read(name)
    assert notebook.metadata.keras_sharp.source == runner.fingerprint(notebook)
    assert {cell.id for cell in cells if not cell.outputs} == SILENT[name]
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
    assert sum(bool(pictures(cell)) for cell in cells) >= 3


@each_notebook
def test_nothing_stored_tells_of_a_machine(name):
    for cell in code_cells(name):
        assert "execution" not in cell.metadata  # times
        stored = [output for output in cell.outputs if output.get("name") != "stderr"]
        assert stored == cell.outputs
        for output in cell.outputs:
            data = output.get("data", {})
            text = json.dumps({"text": output.get("text"), **data, "image/png": None})
            assert not re.search(r"/(work|tmp|home|root|usr|opt|content)\b", text), text[:300]
            assert not re.search(r"0x[0-9a-f]{6,}|Warning|INFO:", text), text[:300]


@each_notebook
def test_the_readme_names_it(name):
    readme = (FOLDER.parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"examples/notebooks/{name}.ipynb" in readme

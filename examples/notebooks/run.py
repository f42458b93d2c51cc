"""Runs notebooks from top to bottom, each in a Jupyter kernel of its own.

    python examples/notebooks/run.py
    python examples/notebooks/run.py quickstart --backend torch --quick
    python examples/notebooks/run.py many_devices --store --backend jax tensorflow torch

The first error ends it, with the cell and its traceback. With `--store` the
outputs go into the file, without what would differ from machine to machine.
Of several backends, the first one's are stored, and those of the others in the
cells that have their name as a tag.

The notebooks take Fashion-MNIST from `keras.datasets` and CIFAR-10 from
TensorFlow Datasets. Without a network, let KERAS_SHARP_DATA name a folder with
`fashion_mnist.npz` and `cifar10.npz`, which are put where those two would put
what they download. Else the digits of scikit-learn take their place.
"""

import argparse
import gzip
import hashlib
import os
import pathlib
import socket
import struct
import sys
import tempfile
import time

import nbclient
import nbformat
import numpy as np
import sklearn.datasets

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAMES = (
    "quickstart",
    "see_the_sharpness",
    "which_method_which_rho",
    "fine_tune_keras_hub",
    "many_devices",
)
BACKENDS = ("tensorflow", "jax", "torch")
#: Of CIFAR-10.
CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CLASSES += ["dog", "frog", "horse", "ship", "truck"]


def execute(name, backend, quick=False, **environment):
    """Run a notebook in an empty folder.

    Args:
        name: String, the name of the notebook.
        backend: String, that of Keras.
        quick: Boolean, whether to run it in its small setting.
        **environment: further variables of the environment.

    Returns:
        The notebook, with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        variables = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "KERAS_SHARP_QUICK": "1" if quick else "",
            "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **environment,
        }
        variables.pop("MPLBACKEND", None)  # The notebook has one of its own, which shows pictures.
        variables.update(put_data(pathlib.Path(folder, "data"), notebook, variables))
        client = nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        return client.execute(env=variables)


def put_data(folder, notebook, variables):
    """Put the data that a notebook asks for where they are when they were downloaded before.

    Returns:
        A dictionary: the variables of the environment that name the place.
    """
    code = "\n".join(cell.source for cell in notebook.cells)
    source = variables.get("KERAS_SHARP_DATA")
    if "fashion_mnist.load_data" in code and source:
        put_fashion_mnist(folder / "datasets" / "fashion-mnist", load_npz(source, "fashion_mnist"))
        return {"KERAS_HOME": str(folder)}
    offline = variables["KERAS_SHARP_QUICK"] or not is_online()
    if 'tfds.load("cifar10"' in code and (source or offline):
        put_cifar10(folder, load_npz(source, "cifar10") if source else digits_in_color())
        return {"TFDS_DATA_DIR": str(folder)}
    return {}


def is_online():
    try:
        socket.create_connection(("storage.googleapis.com", 443), timeout=3).close()
    except OSError:
        return False
    return True


def load_npz(folder, name):
    """More images than any of the notebooks takes."""
    with np.load(pathlib.Path(folder) / f"{name}.npz") as arrays:
        return {s: (arrays[f"x_{s}"][:12000], arrays[f"y_{s}"][:12000]) for s in ("train", "test")}


def digits_in_color():
    """The digits of scikit-learn in the size of CIFAR-10: for want of anything better."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1) * (255 / 16)
    images = images.repeat(4, 1).repeat(4, 2).repeat(3, 3).astype("uint8")
    return {"train": (images[:1200], labels[:1200]), "test": (images[1200:], labels[1200:])}


def put_fashion_mnist(folder, splits):
    """Write the files that `keras.datasets` downloads."""
    folder.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for kind, array in zip(("images-idx3", "labels-idx1"), splits[split], strict=True):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            with gzip.open(folder / f"{prefix}-{kind}-ubyte.gz", "wb", compresslevel=1) as f:
                f.write(header + array.astype("uint8").tobytes())


def put_cifar10(folder, splits):
    """Write the files of TensorFlow Datasets, by its own builder."""
    import tensorflow_datasets as tfds  # takes seconds

    def examples(images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"id": f"{i:05}", "image": image, "label": int(label)}

    tfds.disable_progress_bar()
    builder = tfds.builder("cifar10", data_dir=folder)
    builder.info.features["label"].names = CLASSES
    builder._split_generators = lambda manager: {k: examples(*v) for k, v in splits.items()}
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def store(name, runs):
    """Write the outputs of runs, notebooks by their backend, into the file."""
    path = HERE / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    main = next(iter(runs.values()))
    if fingerprint(notebook) != fingerprint(main):
        raise RuntimeError(f"{path.name} was changed while it ran. Run it again.")
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            tags = cell.metadata.get("tags", [])
            run = next((run for backend, run in runs.items() if backend in tags), main)
            # Warnings and progress tell of one machine on one day.
            outputs = [o for o in run.cells[i].outputs if o.get("name") != "stderr"]
            cell.outputs = [clean(output) for output in outputs]
            cell.execution_count = main.cells[i].execution_count
    notebook.metadata["keras_sharp"] = {"source": fingerprint(notebook), "backends": list(runs)}
    nbformat.write(notebook, path)


def fingerprint(notebook):
    """Of the code: outputs that were stored with another one come from other code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def clean(output):
    """An output without what counts runs, and without `<Figure size ...>` beside a picture."""
    if "execution_count" in output:
        output.execution_count = None
    if "image/png" in output.get("data", {}):
        output.data.pop("text/plain", None)
    return output


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", help="default: all")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["jax"])
    parser.add_argument("--quick", action="store_true", help="in the small setting of the tests")
    parser.add_argument("--store", action="store_true", help="keep what the notebooks show")
    args = parser.parse_args()
    for name in args.name or NAMES:
        runs = {}
        for backend in args.backend:
            print(f"{name} on {backend} ... ", end="", flush=True)
            start = time.perf_counter()
            runs[backend] = execute(name, backend, args.quick)
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
        if args.store:
            store(name, runs)


if __name__ == "__main__":
    sys.exit(main())

"""The examples run as a user would run them, in a small setting."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import datasets  # noqa: E402


def run(script, *arguments, cwd):
    return start([EXAMPLES / script, *arguments], cwd)


def start(command, cwd):
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_quickstart_prints_its_table_and_saves_its_picture(tmp_path):
    backend = keras.backend.backend()
    arguments = ["--backend", backend, "--dataset", "digits", "--epochs", "1", "--seed", "3"]
    done = run("quickstart.py", *arguments, "--method", "sgd", "bsam", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"Backend: {backend}")
    assert lines[1].startswith("Data: digits of scikit-learn")
    header = next(i for i, line in enumerate(lines) if "sharpness" in line)
    for line, name in zip(lines[header + 1 : header + 3], ["sgd", "bsam"], strict=True):
        found, accuracy, loss, sharpness, time = line.split()
        assert found == name
        assert 0 < float(accuracy) < 1
        assert float(loss) > 0
        assert np.isfinite(float(sharpness))
        assert time.endswith("x")
    assert (tmp_path / "results" / "quickstart.png").stat().st_size > 10_000


def test_quickstart_refuses_a_method_that_does_not_exist(tmp_path):
    done = run("quickstart.py", "--method", "sma", cwd=tmp_path)
    assert done.returncode != 0
    assert "sma" in done.stderr


@pytest.mark.slow
def test_see_the_sharpness_prints_its_table_and_saves_its_pictures(tmp_path):
    backend = keras.backend.backend()
    small = ["--epochs", "1", "--train", "200", "--probe", "50", "--points", "3"]
    done = run(
        "see_the_sharpness.py", "--backend", backend, "--dataset", "digits", *small, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    rows = {row[0]: row[1:6] for row in rows if row and row[0] in ("SGD", "SAM", "BSAM")}
    assert list(rows) == ["SGD", "SAM", "BSAM"]
    for accuracy, first, fifth, ratio, sharpness in rows.values():
        assert 0 < float(accuracy) < 1
        assert float(first) > float(fifth)
        assert float(ratio) == pytest.approx(float(first) / float(fifth), rel=0.05)
        assert float(sharpness) > 0
    for picture in ("eigenvalues", "density", "lines", "planes"):
        path = tmp_path / "results" / f"see_the_sharpness_{picture}.png"
        assert path.stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="nothing in it is of a backend")
def test_choose_rho_recommends_one_and_trains_with_it(tmp_path):
    small = ["--dataset", "digits", "--train", "600", "--epochs", "20", "--method", "asam"]
    done = run("choose_rho.py", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (recommended,) = [line for line in done.stdout.splitlines() if "<- recommended" in line]
    rho = float(recommended.split()[0])
    assert 0.05 <= rho <= 5.0
    plain, sharp = done.stdout.splitlines()[-2:]
    assert plain.strip().startswith("no adversary: test accuracy 0.")
    assert sharp.strip().startswith(f"asam, rho {rho:.3g}")
    assert (tmp_path / "results" / "choose_rho.png").stat().st_size > 10_000


def test_the_distributed_example_runs_on_one_machine(tmp_path):
    backend = keras.backend.backend()
    if backend == "torch":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        command = []
    script = EXAMPLES / "distributed" / f"train_{backend}.py"
    done = start([*command, script], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [line.split()[-1] for line in done.stdout.splitlines() if "loss" in line]
    assert len(losses) == (2 if backend == "torch" else 1)
    assert len(set(losses)) == 1
    assert float(losses[0]) < 1.5


@pytest.fixture
def nothing_at_hand(monkeypatch, tmp_path):
    """As on the machine of a user without a network: no file, no server."""
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "examples" / "datasets.py"))
    monkeypatch.setattr(datasets, "is_online", lambda *host: False)
    monkeypatch.delenv("KERAS_SHARP_DATA", raising=False)
    return tmp_path


def test_without_file_and_network_the_digits_are_taken(nothing_at_hand, capsys):
    (x, y), (x_test, y_test) = datasets.load_images(num_train=100, num_test=50)
    assert x.shape == (100, 8, 8, 1)
    assert x_test.shape == (50, 8, 8, 1)
    assert (x.dtype, y.dtype) == ("float32", "int64")
    assert 0 <= x.min() < x.max() <= 1
    assert set(y) | set(y_test) == set(range(10))
    assert "digits of scikit-learn" in capsys.readouterr().out


def test_a_named_data_set_that_cannot_be_had_is_an_error(nothing_at_hand):
    with pytest.raises(OSError, match=r"fashion_mnist.*KERAS_SHARP_DATA"):
        datasets.load_images("fashion_mnist")


def test_a_file_in_the_named_folder_is_read(nothing_at_hand, monkeypatch, capsys):
    images = np.arange(2 * 28 * 28, dtype="uint8").reshape(2, 28, 28)
    labels = np.array([1, 2], "uint8")
    path = nothing_at_hand / "mnist.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:1], y_test=labels[:1])
    monkeypatch.setenv("KERAS_SHARP_DATA", str(nothing_at_hand))
    (x, y), (x_test, _) = datasets.load_images("mnist")
    np.testing.assert_allclose(x[..., 0] * 255, images, atol=1e-4)
    assert y.tolist() == [1, 2]
    assert len(x_test) == 1
    assert "mnist from mnist.npz" in capsys.readouterr().out


def test_images_in_color_keep_their_channels(nothing_at_hand, monkeypatch):
    """`keras.datasets.cifar10` has labels of the shape (n, 1)."""
    arrays = (np.full((3, 32, 32, 3), 255, "uint8"), np.array([[0], [1], [2]], "uint8"))
    monkeypatch.setattr(datasets, "is_online", lambda: True)
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: (arrays, arrays))
    (x, y), _ = datasets.load_images("cifar10", num_train=2)
    assert x.shape == (2, 32, 32, 3)
    assert y.tolist() == [0, 1]
    assert x.max() == 1


def test_with_a_network_keras_downloads(nothing_at_hand, monkeypatch, capsys):
    """The real path, with the loader faked at its edge."""
    arrays = (np.zeros((3, 28, 28), "uint8"), np.array([0, 1, 2], "uint8"))
    monkeypatch.setattr(datasets, "is_online", lambda *host: True)
    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", lambda: (arrays, arrays))
    (x, _), _ = datasets.load_images()
    assert x.shape == (3, 28, 28, 1)
    assert "downloaded by keras.datasets" in capsys.readouterr().out

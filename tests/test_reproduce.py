"""The reproductions: fair, resumable, and the page says what the files say."""

import ast
import json
import math
import pathlib
import sys

import numpy as np
import pytest

from tests.models import BACKEND
from tests.test_examples import EXAMPLES, start

pytest.importorskip("scipy")
REPRODUCE = EXAMPLES / "reproduce"
sys.path.insert(0, str(REPRODUCE))

import experiment  # noqa: E402
import report  # noqa: E402

STORED = sorted(report.RESULTS.glob("*.json"))
EVERY_STORED = pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)


# What is stored


def check_schema(content, name):
    """A file of results, as `report` reads it."""
    assert content["name"] == name
    assert content["settings"]["backend"] in ("tensorflow", "jax", "torch")
    for run in content["runs"]:
        assert set(run) >= {"stage", "method", "epochs", "seed", "setting", "seconds"}
        assert run["method"] in experiment.METHODS
        assert run["setting"]["learning_rate"] > 0
        results = {key: value for key, value in run.items() if key.endswith(("accuracy", "loss"))}
        assert results
        assert all(isinstance(value, float) for value in results.values())
        # Settings are chosen without a look at the test data.
        assert ("test_accuracy" in run) == (run["stage"] != "search")


@EVERY_STORED
def test_the_stored_results_are_complete(path):
    check_schema(json.loads(path.read_text(encoding="utf-8")), path.stem)
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "seeds"), [("moons", 10), ("mnist_cnn", 3), ("sam_vs_sgd", 3), ("label_noise", 5)]
)
def test_every_method_had_the_same_budget_and_its_best_setting(name, seeds):
    content = report.load(report.RESULTS, name)
    for data in report.conditions(content):
        for method in experiment.METHODS:
            where = {"method": method, "data": data}
            searched = report.entries(content, stage="search", **where)
            assert len(searched) == content["settings"]["searched"]
            finals = report.entries(content, stage="final", **where)
            assert len({str(run["setting"]) for run in finals}) == 1
            for epochs in report.lengths(content):
                found = [run["seed"] for run in finals if run["epochs"] == epochs]
                assert found == list(range(seeds))
            best = max(run["validation_accuracy"] for run in searched)
            chosen = [run for run in searched if run["setting"] == finals[0]["setting"]]
            assert [run["validation_accuracy"] for run in chosen] == [best]


def test_the_tables_of_the_pages_are_those_of_the_files():
    pages = [page.read_text(encoding="utf-8") for page in report.PAGES]
    for page in pages:
        assert page == report.fill(page), "run `python examples/reproduce/report.py`"
    for name in report.TABLES:
        assert f"<!-- table: {name} -->\n|" in "".join(pages)


def test_the_demo_has_the_settings_that_were_chosen():
    source = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
    (settings,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "SETTINGS"
    )
    content = report.load(report.RESULTS, "label_noise")
    assert settings.pop("sgd") == report.entries(content, stage="control")[0]["setting"]
    for method, setting in settings.items():
        assert setting == report.entries(content, stage="final", method=method)[0]["setting"]


def test_the_page_shows_every_picture():
    page = report.PAGE.read_text(encoding="utf-8")
    for path in STORED:
        assert f"(results/{path.stem}.png)" in page


# How it is made


def test_a_latin_hypercube_has_each_value_once():
    space = experiment.search_space("gsam", (0.01, 1.0))
    assert list(space) == ["learning_rate", "rho", "alpha"]
    settings = experiment.latin_hypercube(space, 5)
    for name, (low, high) in space.items():
        values = sorted(setting[name] for setting in settings)
        np.testing.assert_allclose(values, np.geomspace(low, high, 5), rtol=0.01)
    assert settings == experiment.latin_hypercube(space, 5)
    assert list(experiment.search_space("sgd", (0.01, 1.0))) == ["learning_rate"]


def test_what_was_run_is_not_run_again(tmp_path, capsys):
    calls = []

    def trainer(method, setting, seed, epochs, test):
        calls.append((setting["learning_rate"], seed))
        result = {"validation_loss": math.nan, "validation_accuracy": setting["learning_rate"]}
        return {**result, "test_accuracy": 0.5} if test else result

    def go_on(settings):
        study = experiment.Study(tmp_path / "toy.json", settings, 3)
        settings = [{"learning_rate": rate} for rate in (0.1, 0.9, 0.3)]
        best = study.search(trainer, "sgd", settings, epochs=1)
        return study.run(trainer, "final", "sgd", best, seed=0, epochs=1)

    first = go_on({"images": 5})
    assert first["setting"] == {"learning_rate": 0.9}
    assert calls == [(0.1, 100), (0.9, 100), (0.3, 100), (0.9, 0)]
    assert go_on({"images": 5})["test_accuracy"] == first["test_accuracy"]
    assert len(calls) == 4
    with pytest.raises(ValueError, match=r"toy\.json holds runs with other settings"):
        go_on({"images": 6})


def test_a_training_does_not_depend_on_the_one_before():
    """The same network, reset, with another method and setting in between."""
    import keras

    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    y = (x[:, 0] > 0).astype("int64")
    data = dict.fromkeys(("train", "validation", "test"), (x, y))

    def make_network():
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, "softmax")])

    def make_trainer():
        return experiment.Trainer(make_network, "sparse_categorical_crossentropy", data, 8)

    trainer, setting = make_trainer(), {"learning_rate": 0.1, "rho": 0.2}
    trainer("sgd", {"learning_rate": 1.0}, seed=5, epochs=1, test=False)
    again = trainer("bsam", setting, seed=1, epochs=2, test=True)
    expected = make_trainer()("bsam", setting, seed=1, epochs=2, test=True)
    assert again == pytest.approx(expected, rel=1e-5)
    assert set(again) == {
        "train_loss",
        "validation_loss",
        "validation_accuracy",
        "test_loss",
        "test_accuracy",
    }


def test_the_verdict_is_that_of_paired_differences():
    noise = np.array([0.0, 5.0, -5.0])  # of the seeds, the same for both methods
    other = noise + np.array([0.0, 0.1, -0.1])
    assert report.verdict(noise + 1.0, other, False) == "holds"
    assert report.verdict(noise + 1.0, other, True) == "the other way round"
    assert report.verdict(noise[::-1] + 1.0, noise, False) == "no difference seen"
    assert report.verdict([1.0], [0.0], False) == "no difference seen"


# The scripts


def run(name, tmp_path, *arguments):
    done = start([REPRODUCE / f"{name}.py", "--output", tmp_path, *arguments], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("moons", "jax"),
        ("mnist_cnn", "tensorflow"),
        ("sam_vs_sgd", "torch"),
        ("which_rho", "torch"),
        ("label_noise", "torch"),
    ],
)
def test_the_scripts_run(name, backend, tmp_path):
    """Each on one backend: what differs between backends is tested elsewhere."""
    if backend != BACKEND:
        pytest.skip(f"runs on {backend}")
    printed = run(name, tmp_path, "--quick")
    assert printed.rstrip().endswith(f"Picture: {tmp_path / name}.png")
    content = report.load(tmp_path, name)
    check_schema(content, name)
    assert content["settings"]["backend"] == backend
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    if name != "which_rho":
        assert {run["method"] for run in content["runs"]} == set(experiment.METHODS)
    # What is done is not done again, and another size is refused.
    if name == "moons":
        assert "[" not in run(name, tmp_path, "--quick")


def test_a_single_seed_is_refused(tmp_path):
    done = start([REPRODUCE / "moons.py", "--seeds", "1"], cwd=tmp_path)
    assert done.returncode != 0
    assert "standard error" in done.stderr
    assert not pathlib.Path(tmp_path / "results").exists()

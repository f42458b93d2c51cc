"""The reproductions: fair, resumable, and the page says what the files say."""

import ast
import json
import math
import pathlib
import sys

import numpy as np
import pytest
from keras import ops

import keras_sharp
from tests.models import BACKEND, on
from tests.test_examples import EXAMPLES, start

pytest.importorskip("scipy")
REPRODUCE = EXAMPLES / "reproduce"
sys.path.insert(0, str(REPRODUCE))

import experiment  # noqa: E402
import full_batch  # noqa: E402
import report  # noqa: E402
import reports  # noqa: E402
import results  # noqa: E402
from report import front  # noqa: E402  (it tells where that is)

STORED = sorted(results.RESULTS.glob("*.json"))
EVERY_STORED = pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)


# What is stored


def check_schema(content, name, methods=results.NAMES):
    """A file of results, as `report` reads it."""
    assert content["name"] == name
    assert content["settings"]["backend"] in ("tensorflow", "jax", "torch")
    for run in content["runs"]:
        assert set(run) >= {"stage", "method", "epochs", "seed", "setting", "seconds"}
        assert run["method"] in methods
        assert run["setting"]["learning_rate"] > 0
        found = {key: value for key, value in run.items() if key.endswith(("accuracy", "loss"))}
        assert found
        assert all(isinstance(value, float) for value in found.values())
        # Settings are chosen without a look at the test data.
        if "validation_loss" in run:
            assert ("test_loss" in run) == (run["stage"] != "search")


@EVERY_STORED
def test_the_stored_results_are_complete(path):
    check_schema(json.loads(path.read_text(encoding="utf-8")), path.stem)
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "seeds"), [("moons", 10), ("mnist_cnn", 3), ("sam_vs_sgd", 3), ("label_noise", 5)]
)
def test_every_method_had_the_same_budget_and_its_best_setting(name, seeds):
    content = results.load(results.RESULTS, name)
    for data in results.conditions(content):
        for method in experiment.METHODS:
            where = {"method": method, "data": data}
            searched = results.entries(content, stage="search", **where)
            assert len(searched) == content["settings"]["searched"]
            finals = results.entries(content, stage="final", **where)
            assert len({str(run["setting"]) for run in finals}) == 1
            for epochs in results.lengths(content):
                found = [run["seed"] for run in finals if run["epochs"] == epochs]
                assert found == list(range(seeds))
            best = max(run["validation_accuracy"] for run in searched)
            chosen = [run for run in searched if run["setting"] == finals[0]["setting"]]
            assert [run["validation_accuracy"] for run in chosen] == [best]


STORED_FRONTS = sorted(front.RESULTS.glob("pareto_*.json"))


@pytest.mark.parametrize("path", STORED_FRONTS, ids=lambda path: path.stem)
def test_the_stored_fronts_are_fair(path):
    """Each contestant that is done had as many settings, its best one, and five seeds."""
    content = json.loads(path.read_text(encoding="utf-8"))
    check_schema(content, path.stem, {run["method"] for run in content["runs"]})
    done = []
    for name in dict.fromkeys(run["method"] for run in content["runs"]):
        searched = results.entries(content, stage="search", method=name)
        finals = results.entries(content, stage="final", method=name)
        assert len(searched) <= content["settings"]["searched"] == 6
        if not finals:
            continue
        assert len(searched) == 6
        best = max(run["validation_accuracy"] for run in searched)
        (chosen,) = (run for run in searched if run["setting"] == finals[0]["setting"])
        assert chosen["validation_accuracy"] == best
        assert all(run["setting"] == chosen["setting"] for run in finals)
        assert [run["seed"] for run in finals] == list(range(len(finals)))
        done += [name] * (len(finals) == 5)
    assert done[:2] == ["sgd", "sam"]
    assert "cpu_s" not in content or set(done) <= set(content["cpu_s"])
    for seconds in content.get("cpu_s", {}).values():
        assert len(seconds) == len(content["cpu_s"]["sgd"]) >= 9


def test_the_gallery_shows_the_front_once_there_is_one():
    gallery = (results.ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    is_there = bool(front.load())
    assert ("(pareto.png)" in gallery) == front.PICTURE.exists() == is_there


def test_every_variant_of_the_adversary_had_the_same_budget_and_its_best_setting():
    content = results.load(results.RESULTS, "inner_maximization")
    settings = content["settings"]
    for method in {run["method"] for run in content["runs"]}:
        found, accuracies = results.entries(content, stage="search", method=method), {}
        for run in found:
            accuracies.setdefault(str(run["setting"]), []).append(run["validation_accuracy"])
        assert len(accuracies) == settings["searched"]
        assert {len(values) for values in accuracies.values()} == {settings["search_seeds"]}
        finals = results.entries(content, stage="final", method=method)
        assert [run["seed"] for run in finals] == list(range(5))
        (chosen,) = {str(run["setting"]) for run in finals}
        assert chosen == max(accuracies, key=lambda key: np.mean(accuracies[key]))


def test_every_diagonal_network_had_the_same_budget():
    content = results.load(results.RESULTS, "diagonal_networks")
    for scale in content["settings"]["scales"]:
        for method in ("gd", "n_sam", "one_sam"):
            curve = reports.diagonal_networks.curve(content, method, scale)
            assert [len(runs) for runs in curve] == [10] * 5
            losses = [np.mean([run["validation_loss"] for run in runs]) for runs in curve]
            chosen = reports.diagonal_networks.chosen(content, method, scale)
            assert np.mean([run["validation_loss"] for run in chosen]) == min(losses)


def test_the_tables_of_the_pages_are_those_of_the_files():
    pages = [page.read_text(encoding="utf-8") for page in report.PAGES]
    for page in pages:
        assert page == report.fill(page), "run `python examples/reproduce/report.py`"
    for name in report.TABLES:
        assert f"<!-- table: {name} -->\n|" in "".join(pages)


def test_every_page_with_a_table_is_found():
    names = {page.relative_to(results.ROOT).as_posix() for page in report.PAGES}
    assert {"README.md", "docs/reproductions.md", "docs/how_to/label_noise.md"} <= names


def test_the_picture_of_all_results_has_each_method_in_each_situation():
    found = list(reports.does_it_help.situations())
    names = [name for name, *_ in found]
    assert len(names) == len(set(names)) == 11
    for _, sgd, methods in found:
        assert len(sgd) >= 3
        assert {len(values) for values in methods.values()} == {len(sgd)}
    (panel,) = reports.does_it_help.picture().axes
    assert [label.get_text() for label in panel.get_yticklabels()] == names
    # By hand, of the file: the gain of SAM over SGD where labels are wrong.
    runs = results.load(results.RESULTS, "label_noise")["runs"]
    final = [r for r in runs if r["stage"] == "final"]
    sam, sgd = (
        {r["seed"]: 100 * r["test_accuracy"] for r in final if r["method"] == method}
        for method in ("sam", "sgd")
    )
    gain = np.mean([sam[seed] - sgd[seed] for seed in sgd])
    assert f"| {gain:+.2f} ± " in reports.does_it_help.table()[3]


def test_the_demo_has_the_settings_that_were_chosen():
    source = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
    (settings,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "SETTINGS"
    )
    content = results.load(results.RESULTS, "label_noise")
    assert settings.pop("sgd") == results.entries(content, stage="control")[0]["setting"]
    for method, setting in settings.items():
        assert setting == results.entries(content, stage="final", method=method)[0]["setting"]


def test_the_page_shows_every_picture():
    page = report.PAGE.read_text(encoding="utf-8")
    for path in STORED:
        assert f"(results/{path.stem}.png)" in page


# The front


def toy_front(**accuracies):
    """The content of a file, of accuracies by seed; the names end with the cost, in tenths."""
    runs, seconds = [], {}
    for name, values in {"sgd_10": [0.5, 0.6], **accuracies}.items():
        method, tenths = name.rsplit("_", 1)
        seconds[method] = [0.1 * int(tenths), 0.3 * int(tenths)]
        setting = {"learning_rate": 0.1, "rho": 0.2}
        tried = [{**setting, "rho": rho} for rho in (0.1, 0.2, 0.4)]
        search = {"stage": "search", "method": method, "seed": 100}
        runs += [{**search, "setting": one} for one in tried]
        stages = ("final", "control") if method == "sgd" else ("final",)
        for stage in stages:
            for seed in (1, 0):
                run = {"stage": stage, "method": method, "seed": seed, "setting": setting}
                runs.append({**run, "test_accuracy": values[seed]})
    return {"runs": runs, "cpu_s": seconds}


def test_a_row_has_the_gain_of_each_seed_and_the_cost_of_each_round():
    sgd, sam = front.rows(toy_front(sam_18=[0.7, 0.7]))
    assert (sgd.name, sam.name) == ("sgd", "sam")
    np.testing.assert_allclose(sam.gain, [20, 10])
    np.testing.assert_allclose(sam.cost, [1.8, 1.8])
    assert sam.setting == 0.2
    assert not sam.at_border


def test_a_chosen_setting_at_the_border_is_told():
    content = toy_front(sam_18=[0.7, 0.7])
    content["runs"] = [run for run in content["runs"] if run["setting"]["rho"] != 0.4]
    assert all(row.at_border for row in front.rows(content))
    assert front.table(content)[-1].endswith("rho 0.2, at the border |")


def test_who_has_not_run_with_every_seed_is_not_shown():
    content = toy_front(sam_18=[0.7, 0.7], late_13=[0.7, 0.7])
    content["runs"].pop()
    assert [row.name for row in front.rows(content)] == ["sgd", "sam"]


def test_the_front_holds_those_that_nobody_beats():
    content = toy_front(
        sam_18=[0.70, 0.80], dear_20=[0.65, 0.75], cheap_12=[0.60, 0.70], poor_13=[0.55, 0.65]
    )
    found = front.front(front.rows(content))
    assert [row.name for row in found] == ["sgd", "cheap", "sam"]


def test_the_share_of_a_gain_has_an_error():
    gain, of = np.array([1.0, 2.0, 3.0]), np.array([4.0, 4.0, 4.0])
    part, error = front.share(gain, of)
    assert part == 0.5
    # With an exact denominator, the jackknife is the standard error of the mean.
    assert error == pytest.approx(np.std(gain, ddof=1) / np.sqrt(3) / 4)
    assert front.share(of, of) == (1.0, 0.0)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AsyncSAM", "half of the steps"])
def test_a_training_does_not_depend_on_what_a_contestant_remembers(name):
    """The memory of a method, and where its random numbers begin, are those of the seed."""
    import keras

    from keras_sharp import methods, policies

    random = np.random.default_rng(0)
    x, y = random.normal(size=(32, 4)).astype("float32"), np.arange(32) % 2
    make = {
        "AsyncSAM": methods.AsyncSAM,
        "half of the steps": lambda: policies.WithProbability("sam", 0.5),
    }

    def make_trainer():
        return experiment.Trainer(
            lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, "softmax")]),
            "sparse_categorical_crossentropy",
            dict.fromkeys(("train", "validation", "test"), (x, y)),
            8,
            contestants=make,
        )

    def train(trainer, seed):
        setting = {"learning_rate": 0.1, "rho": 2.0}
        return trainer(name, setting, seed, epochs=2, test=False)["validation_loss"]

    trainer = make_trainer()
    first, other = train(trainer, 1), train(trainer, 2)
    assert isinstance(trainer.model.method, type(make[name]()))
    assert trainer.model.method.rho == 2.0
    assert train(trainer, 1) == first != other
    anew = make_trainer()
    train(anew, 3)
    assert train(anew, 1) == first


def test_images_are_augmented_anew_and_none_is_left_out():
    x, y = np.arange(10.0).reshape(10, 1), np.arange(10)

    def augment(random, images):
        return images + random.integers(1, 1000) / 1000

    data = experiment.Augmented(x, y, 4, augment, seed=0)

    def epoch():
        batches = [data[i] for i in range(len(data))]
        data.on_epoch_end()
        assert [len(labels) for _, labels in batches] == [4, 4, 2]
        return tuple(np.concatenate(part) for part in zip(*batches, strict=True))

    (images, labels), (more, labels_then) = epoch(), epoch()
    assert sorted(labels) == sorted(labels_then) == list(range(10))
    assert list(labels) != list(labels_then)
    np.testing.assert_array_equal(np.floor(images[:, 0]), labels)
    assert not np.array_equal(images[np.argsort(labels)], more[np.argsort(labels_then)])


def test_the_verdict_is_that_of_paired_differences():
    noise = np.array([0.0, 5.0, -5.0])  # of the seeds, the same for both methods
    other = noise + np.array([0.0, 0.1, -0.1])
    assert results.verdict(noise + 1.0, other, False) == "holds"
    assert results.verdict(noise + 1.0, other, True) == "the other way round"
    assert results.verdict(noise[::-1] + 1.0, noise, False) == "no difference seen"
    assert results.verdict([1.0], [0.0], False) == "no difference seen"


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_each_loss_has_an_adversary_of_its_own(rho):
    """On quadratics `0.5 * a * w**2`, with the step along the gradient itself."""
    a, w = np.array([[1.0, 2.0], [3.0, 0.5]]), np.array([1.0, -2.0])

    def quadratic(row):
        row = ops.convert_to_tensor(row, "float32")
        return lambda w: 0.5 * ops.sum(row * w[0] ** 2)

    losses = [quadratic(row) for row in a]
    sam = keras_sharp.methods.SAM(neighborhood="unnormalized")
    rates = [0.1, 0.2, 0.05]
    (found,) = full_batch.make_descent(losses, sam)([w], rho, rates)
    for rate in rates:
        w = w - rate * np.mean([row * (w + rho * row * w) for row in a], 0)
    np.testing.assert_allclose(ops.convert_to_numpy(found), w, rtol=1e-5)


def test_bends_are_where_the_slope_changes():
    # |x|, a neuron that is bent at 0.505, one at 0.5 the other way round, and one outside.
    w = np.array([[1.0, -1.0, 2.0, 2.0, 1.0], [0, 0, -1.01, -1.0, -5], [1.0, 1.0, 1.0, -0.75, 1.0]])
    places, changes = reports.relu_1d.bends(w, (-1, 1), 0.01)
    np.testing.assert_allclose(places, [0, (1.5 * 0.5 + 2 * 0.505) / 3.5])
    np.testing.assert_allclose(changes, [2, 0.5])
    places, changes = reports.relu_1d.bends(w, (-1, 1), 0.001)
    np.testing.assert_allclose(places, [0, 0.5, 0.505])
    np.testing.assert_allclose(changes, [2, -1.5, 2])
    assert reports.relu_1d.bends(w, (0.7, 1), 0.01)[0].size == 0


# The scripts


def run(name, tmp_path, *arguments):
    done = start([REPRODUCE / f"{name}.py", "--output", tmp_path, *arguments], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("moons", marks=on("jax")),
        pytest.param("mnist_cnn", marks=on("tensorflow")),
        pytest.param("sam_vs_sgd", marks=on("torch")),
        pytest.param("which_rho", marks=on("torch")),
        pytest.param("label_noise", marks=on("torch")),
        pytest.param("inner_maximization", marks=on("jax")),
        pytest.param("diagonal_networks", marks=on("tensorflow", "jax")),
        pytest.param("relu_1d", marks=on("torch")),
        pytest.param("m_sharpness", marks=on("tensorflow")),
        pytest.param("switching", marks=on("torch")),
        pytest.param("scale_invariance", marks=on("jax", "torch")),
        pytest.param("surrogate_gap", marks=on("torch")),
        pytest.param("which_sharpness", marks=on("jax")),
    ],
)
def test_the_scripts_run(name, tmp_path):
    """Each on one backend: what differs between backends is tested elsewhere."""
    printed = run(name, tmp_path, "--quick")
    assert printed.rstrip().endswith(f"Picture: {tmp_path / name}.png")
    content = results.load(tmp_path, name)
    check_schema(content, name)
    assert content["settings"]["backend"] == BACKEND
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    stored = results.load(results.RESULTS, name)["runs"]
    found, all_of_them = ({run["method"] for run in runs} for runs in (content["runs"], stored))
    # Where each moment is a contestant, one is enough to see.
    assert found < all_of_them if name == "switching" else found == all_of_them
    # What is done is not done again, and another size is refused.
    if name == "moons":
        assert "[" not in run(name, tmp_path, "--quick")


@pytest.mark.slow
@on("torch")
@pytest.mark.parametrize("place", front.PLACES)
def test_the_front_runs(place, tmp_path):
    program = results.ROOT / "benchmarks" / "pareto.py"
    arguments = ["--place", place, "--quick", "--output", tmp_path]
    done = start([program, *arguments], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"Picture: {tmp_path / 'pareto.png'}")
    content = front.load(tmp_path)[place]
    check_schema(content, f"pareto_{place}", {*experiment.METHODS, "AsyncSAM", "From(SAM, 0.7)"})
    assert len(front.rows(content)) == 4
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_a_single_seed_is_refused(tmp_path):
    done = start([REPRODUCE / "moons.py", "--seeds", "1"], cwd=tmp_path)
    assert done.returncode != 0
    assert "standard error" in done.stderr
    assert not pathlib.Path(tmp_path / "results").exists()

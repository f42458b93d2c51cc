"""Callbacks that watch: SharpnessProbe and HessianProbe."""

import csv
import math
import sys

import keras
import numpy as np
import pytest

from keras_sharp import SharpnessAwareModel, curvature, sharpness
from keras_sharp.callbacks import HessianProbe, SharpnessProbe
from tests import models
from tests.models import BACKEND, assert_same, values

AS_WRITTEN = pytest.mark.usefixtures("as_written")
X, Y = models.regression(16)
PROBES = {"sharpness": SharpnessProbe, "hessian": lambda *a, **k: HessianProbe(*a, **{"k": 2, **k})}
EVERY_PROBE = pytest.mark.parametrize("probe", PROBES)


def compiled(model, optimizer=None):
    model.compile(optimizer or keras.optimizers.SGD(0.05), "mse")
    return model


def fit(model, epochs, callbacks, **kwargs):
    kwargs = {"batch_size": 8, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **kwargs).history


# Numbers


@AS_WRITTEN
def test_the_logs_have_the_measures_of_the_weights_at_the_end_of_each_epoch():
    names = ["max_sharpness", "min_sharpness", "average_sharpness", "m_sharpness", "gradient_angle"]
    probe = SharpnessProbe(X, Y, measures=names, rho=0.2, neighborhood="adaptive", batch_size=8)
    model, seen = compiled(SharpnessAwareModel(models.batchnorm_net(), "sam")), []

    def measure_again(epoch, logs):
        arguments = {"rho": 0.2, "neighborhood": "adaptive"}
        seen.append(
            {name: getattr(sharpness, name)(model, X, Y, **arguments) for name in names[:2]}
        )
        seen[-1]["average_sharpness"] = sharpness.average_sharpness(model, X, Y, **arguments).value
        seen[-1]["m_sharpness"] = sharpness.m_sharpness(model, X, Y, m=8, **arguments)
        seen[-1]["gradient_angle"] = sharpness.gradient_angle(model, X, Y, **arguments)

    again = keras.callbacks.LambdaCallback(on_epoch_end=measure_again)
    history = fit(model, 2, [probe, again])
    for name in names:
        np.testing.assert_allclose(history[name], [s[name] for s in seen], rtol=1e-3, atol=1e-6)
        assert probe.history[name] == history[name]
    assert probe.history["epoch"] == [0, 1]


@AS_WRITTEN
def test_the_logs_have_the_eigenvalues_of_the_hessian():
    model = compiled(models.linear(features=3))
    hessian = 2 * X.T.astype("float64") @ X / len(X)
    expected = np.linalg.eigvalsh(hessian)[::-1]
    probe = HessianProbe(X, Y, k=3, trace=True, density=True)
    history = fit(model, 2, [probe])
    for i in range(3):
        np.testing.assert_allclose(history[f"hessian_lambda_{i + 1}"], expected[i], rtol=1e-3)
    np.testing.assert_allclose(history["hessian_ratio"], expected[0] / expected[2], rtol=2e-3)
    np.testing.assert_allclose(history["hessian_trace"], expected.sum(), rtol=0.2)
    assert all(isinstance(d, curvature.SpectralDensity) for d in probe.history["density"])
    assert len(probe.history["density"]) == 2
    assert "density" not in history


@AS_WRITTEN
def test_the_ratio_is_to_the_fifth_eigenvalue_and_nan_below_zero():
    model = compiled(models.mlp())
    probe = HessianProbe(X, Y, k=7)
    history = fit(model, 1, [probe])
    first, fifth = (history[f"hessian_lambda_{i}"][0] for i in (1, 5))
    assert history["hessian_ratio"][0] == pytest.approx(
        first / fifth if fifth > 0 else math.nan, nan_ok=True
    )
    assert "hessian_ratio" not in fit(model, 1, [HessianProbe(X, Y, k=1)])


@EVERY_PROBE
@pytest.mark.parametrize("wrapped", [True, False])
def test_in_compiled_training_a_probe_sees_the_weights_of_now(probe, wrapped):
    """On JAX, `fit` keeps the state to itself for as long as an epoch lasts. Compiles once."""
    traces = []

    def loss(y, y_pred):
        traces.append(1)
        return keras.ops.mean((y - y_pred) ** 2)

    inner = models.mlp()
    model = SharpnessAwareModel(inner, "sam") if wrapped else inner
    model.compile(keras.optimizers.SGD(0.05), loss)
    callback, counts = PROBES[probe](X, Y), []
    count = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: counts.append(len(traces))
    )
    history = fit(model, 3, [callback, count])
    name = callback.names[0]
    if probe == "hessian":
        expected = curvature.eigenvalues(model, X, Y, k=2).values[0]
    else:
        expected = sharpness.max_sharpness(model, X, Y)
    assert history[name][-1] == pytest.approx(expected, rel=1e-3)
    assert len(set(history[name])) == 3
    if BACKEND != "torch":
        assert counts[1] == counts[2]


@AS_WRITTEN
@EVERY_PROBE
def test_a_probe_does_not_change_the_training(probe):
    one, other = (
        compiled(SharpnessAwareModel(models.dropout_net(dropout_seed=3), "bsam")) for _ in range(2)
    )
    history = fit(one, 2, [PROBES[probe](X, Y)])
    assert fit(other, 2, [])["loss"] == history["loss"]
    assert_same(one.variables, values(other.variables), bits=True)
    assert_same(one.optimizer.variables, values(other.optimizer.variables), bits=True)


# When, and for whom


@AS_WRITTEN
@EVERY_PROBE
def test_a_probe_looks_at_the_first_epoch_the_last_one_and_every_so_often(probe):
    callback = PROBES[probe](X, Y, every=3)
    history = fit(compiled(models.linear()), 6, [callback])
    assert callback.history["epoch"] == [0, 3, 5]
    assert len(history[callback.names[0]]) == 3


@AS_WRITTEN
@EVERY_PROBE
def test_a_second_training_has_a_history_of_its_own(probe):
    callback, model = PROBES[probe](X, Y), compiled(models.linear())
    fit(model, 2, [callback])
    fit(model, 3, [callback], initial_epoch=2)
    assert callback.history["epoch"] == [2]


@AS_WRITTEN
def test_loggers_and_early_stopping_use_the_numbers(tmp_path):
    path = tmp_path / "log.csv"
    stop = keras.callbacks.EarlyStopping("max_sharpness", mode="max", patience=0, min_delta=1e9)
    probes = [SharpnessProbe(X, Y), HessianProbe(X, Y, k=2)]
    history = fit(compiled(models.linear()), 5, [*probes, keras.callbacks.CSVLogger(path), stop])
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == len(history["loss"]) == 2
    for probe in probes:
        for name in probe.names:
            assert [float(row[name]) for row in rows] == pytest.approx(history[name])


@AS_WRITTEN
def test_measures_may_be_functions():
    probe = SharpnessProbe(
        X, Y, measures={"loss_there": lambda surface: surface.loss(surface.weights)}
    )
    model = compiled(models.linear())
    history = fit(model, 1, [probe])
    assert history["loss_there"][0] == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-5)
    assert SharpnessProbe(X, Y, measures="m_sharpness").names == ["m_sharpness"]


@AS_WRITTEN
@EVERY_PROBE
def test_verbose_prints_the_numbers(probe, capsys):
    callback = PROBES[probe](X, Y, verbose=1)
    fit(compiled(models.linear()), 1, [callback])
    printed = capsys.readouterr().out
    assert printed.startswith("\nEpoch 1: ")
    assert all(f"{name}: " in printed for name in callback.names)


@EVERY_PROBE
def test_a_model_that_is_not_built_is_built(probe):
    model = SharpnessAwareModel(models.Subclassed(), "sam")
    history = fit(compiled(model), 1, [PROBES[probe](X, Y)])
    assert len(history["loss"]) == 1


class Diverges(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            v = self.model.trainable_variables[0]
            v.assign(np.full(v.shape, np.nan))


@AS_WRITTEN
@EVERY_PROBE
def test_training_that_diverges_goes_on_with_a_warning_and_nan(probe):
    callback = PROBES[probe](X, Y)
    with pytest.warns(UserWarning, match="epoch 2: The loss .* is not finite"):
        history = fit(compiled(models.linear()), 2, [callback, Diverges()])
    for name in callback.names:
        assert np.isnan(history[name]).tolist() == [False, True]


# Bad input


@EVERY_PROBE
@pytest.mark.parametrize("every", [0, -1, 1.5, "2", None, True], ids=repr)
def test_every_is_a_number_of_epochs(probe, every):
    with pytest.raises(ValueError, match=r"`every` must be an integer >= 1\. Received: every="):
        PROBES[probe](X, Y, every=every)


@pytest.mark.parametrize("k", [0, -1, 2.5, "5", None, True], ids=repr)
def test_the_number_of_eigenvalues_is_an_integer(k):
    with pytest.raises(ValueError, match="`k` must be an integer >= 1"):
        HessianProbe(X, Y, k=k)


@pytest.mark.parametrize("name", ["trace", "density"])
def test_trace_and_density_are_switches(name):
    with pytest.raises(ValueError, match=f"`{name}` must be True or False"):
        HessianProbe(X, Y, **{name: 10})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"measures": ["max_sharpnes"]}, "Did you mean 'max_sharpness'"),
        ({"measures": []}, "`measures` must be a list of names"),
        ({"measures": {"mine": 3.0}}, "or a dictionary of functions"),
        ({"rho": -0.1}, "`rho`, the radius"),
        ({"neighborhood": "adaptiv"}, "Did you mean 'adaptive'"),
    ],
)
def test_what_to_measure_must_make_sense(arguments, match):
    with pytest.raises(ValueError, match=match):
        SharpnessProbe(X, Y, **arguments)


def refused(callback, match, model=None):
    model = model or compiled(models.linear())
    before = values(model.variables)
    with pytest.raises(ValueError, match=match):
        fit(model, 1, [callback])
    assert_same(model.variables, before, bits=True)


@AS_WRITTEN
@EVERY_PROBE
def test_bad_data_are_refused_before_the_first_epoch(probe):
    make = PROBES[probe]
    refused(make(X[:0], Y[:0]), "There are no data")
    refused(make(X[:, :2], Y), "cannot be computed on these data")
    refused(make(np.full_like(X, np.nan), Y), "is not finite")


@AS_WRITTEN
def test_more_eigenvalues_than_weights_are_refused_before_the_first_epoch():
    refused(HessianProbe(X, Y, k=4), r"Received: k=4 and 3 weights")


# TensorBoard


def test_tensorboard_shows_scalars_and_spectra(tmp_path):
    pytest.importorskip("tensorflow")
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing import event_accumulator

    def events(run):
        found = event_accumulator.EventAccumulator(str(tmp_path / run)).Reload()
        return found, found.Tags()["tensors"]

    probe = HessianProbe(X, Y, k=2, density=True, log_dir=str(tmp_path))
    board = keras.callbacks.TensorBoard(str(tmp_path))
    model = compiled(SharpnessAwareModel(models.mlp(), "sam", extra_logs=["sharpness"]))
    history = fit(model, 2, [probe, board])

    found, tags = events("train")
    for name in ("rho", "sharpness", "hessian_lambda_1", "hessian_lambda_2"):
        written = [_array(event) for event in found.Tensors(f"epoch_{name}")]
        np.testing.assert_allclose(written, history[name], rtol=1e-6)

    found, tags = events("spectra")
    assert set(tags) == {"hessian_eigenvalues", "hessian_density"}
    for epoch, event in enumerate(found.Tensors("hessian_eigenvalues")):
        buckets = _array(event)  # Rows of left end, right end and count.
        seen = [history[f"hessian_lambda_{i}"][epoch] for i in (1, 2)]
        assert event.step == epoch
        assert buckets[:, 2].sum() == 2
        np.testing.assert_allclose((buckets[0, 0], buckets[-1, 1]), sorted(seen), rtol=1e-6)
    images = [_array(event) for event in found.Tensors("hessian_density")]
    assert len(images) == 2
    assert all(image[2].startswith(b"\x89PNG") for image in images)
    assert images[0][2] != images[1][2]


def _array(event):
    from tensorboard.util import tensor_util

    return tensor_util.make_ndarray(event.tensor_proto)


@pytest.mark.parametrize("missing", ["tensorboard", "tensorflow.summary"])
def test_a_log_dir_without_what_writes_it_is_refused(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    probe = HessianProbe(X, Y, k=2, log_dir=str(tmp_path))
    with pytest.raises(ImportError, match=r"pip install tensorflow tensorboard"):
        fit(compiled(models.mlp()), 1, [probe])

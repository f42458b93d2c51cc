"""A backup is complete or not there, whenever the process ends."""

import os
import pathlib
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from keras import layers

from keras_sharp import SharpnessAwareModel, callbacks
from keras_sharp.callbacks import AtomicBackupAndRestore
from tests import models
from tests.models import assert_same, values

AS_WRITTEN = pytest.mark.usefixtures("as_written")


class PowerFails(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    def __init__(self, epoch, batch=0):
        super().__init__()
        self.at, self.epoch = (epoch, batch), None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise PowerFails


def make(wrapped=True):
    model = models.batchnorm_net()
    if wrapped:
        model = SharpnessAwareModel(model, "sam")
    model.compile(keras.optimizers.Adam(0.05), "mse")
    return model


def fit(model, *others, epochs=3, **kwargs):
    x, y = models.regression(9)
    return model.fit(
        x, y, batch_size=3, epochs=epochs, shuffle=False, verbose=0, callbacks=[*others], **kwargs
    )


def state(model):
    return values([*model.variables, *model.optimizer.variables])


# As BackupAndRestore


@AS_WRITTEN
@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "plain"])
def test_a_run_that_was_interrupted_goes_on(wrapped, tmp_path):
    def others():
        return [callbacks.SwitchMethod({1: "bsam"})] if wrapped else []

    straight = make(wrapped)
    expected = fit(straight, *others())
    with pytest.raises(PowerFails):
        fit(make(wrapped), AtomicBackupAndRestore(tmp_path), *others(), Interrupt(2, batch=1))
    again = make(wrapped)
    history = fit(again, AtomicBackupAndRestore(tmp_path), *others())
    assert history.epoch == [2]
    assert_same(state(again), state(straight), bits=True)
    assert history.history["loss"] == expected.history["loss"][2:]


@AS_WRITTEN
def test_a_second_fit_begins_where_it_is_told(tmp_path):
    """In Keras it begins with the epoch that the first one was resumed with."""
    with pytest.raises(PowerFails):
        fit(make(), AtomicBackupAndRestore(tmp_path), Interrupt(2))
    again = make()
    fit(again, AtomicBackupAndRestore(tmp_path))
    assert fit(again, epochs=1).epoch == [0]


@AS_WRITTEN
@pytest.mark.parametrize("save_freq", [2, 5])
def test_backups_come_after_so_many_batches(save_freq, tmp_path, monkeypatch):
    model, saved = make(), []
    backup = AtomicBackupAndRestore(tmp_path, save_freq=save_freq)
    monkeypatch.setattr(
        SharpnessAwareModel,
        "save_weights",
        lambda self, path, **kwargs: (
            saved.append(int(self.optimizer.iterations)) or pathlib.Path(path).touch()
        ),
    )
    fit(model, backup)
    assert saved == list(range(save_freq, 10, save_freq))


@AS_WRITTEN
def test_an_epoch_that_was_broken_off_begins_again_from_its_weights(tmp_path):
    broken = make()
    backup = AtomicBackupAndRestore(tmp_path, save_freq=1)
    with pytest.raises(PowerFails):
        fit(broken, backup, Interrupt(1, batch=2))
    again = make()
    with pytest.raises(PowerFails):
        fit(again, AtomicBackupAndRestore(tmp_path, save_freq=1), Interrupt(1))
    assert_same(again.get_weights(), broken.get_weights(), bits=True)


@AS_WRITTEN
@pytest.mark.parametrize(("delete", "double"), [(True, True), (False, True), (False, False)])
def test_what_is_left_when_training_has_ended(delete, double, tmp_path):
    folder = tmp_path / "backup"
    fit(
        make(),
        AtomicBackupAndRestore(folder, double_checkpoint=double, delete_checkpoint=delete),
    )
    left = sorted(os.listdir(folder)) if folder.exists() else []
    epochs = [] if delete else [2, 3] if double else [3]
    assert left == [f"backup-{e:06d}-epoch-{e:06d}.weights.h5" for e in epochs]
    assert folder.exists() is not delete


@AS_WRITTEN
def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fit(make(), AtomicBackupAndRestore(tmp_path), epochs=1)
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"backup_dir": ""}, "`backup_dir` must be a folder"),
        ({"backup_dir": "gs://bucket/backup"}, "on a local disk"),
        ({"save_freq": "batch"}, "`save_freq` must be 'epoch' or .* Received: save_freq='batch'"),
        ({"save_freq": False}, "`save_freq` must be"),
        ({"save_freq": 0}, "`save_freq` must be"),
        ({"double_checkpoint": 2}, "`double_checkpoint` must be True or False"),
        ({"delete_checkpoint": None}, "`delete_checkpoint` must be True or False"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        AtomicBackupAndRestore(**{"backup_dir": tmp_path, **arguments})


@AS_WRITTEN
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="On the others, Keras builds before callbacks"
)
def test_a_model_that_is_not_built_is_refused(tmp_path):
    model = SharpnessAwareModel(keras.Sequential([layers.Dense(1)]))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"needs a model that has some.* Build it before `fit`"):
        fit(model, AtomicBackupAndRestore(tmp_path))


# At any moment


def two_epochs(tmp_path, **kwargs):
    """A backup after two epochs, and the state then."""
    model = make()
    backup = AtomicBackupAndRestore(tmp_path, **kwargs)
    with pytest.raises(PowerFails):
        fit(model, backup, Interrupt(2))
    return state(model)


def restored(tmp_path, **kwargs):
    """The epoch and the state with which training would go on."""
    model = make()

    class Look(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            raise LookedAt(epoch, state(self.model))

    with pytest.raises(LookedAt) as found:
        fit(model, AtomicBackupAndRestore(tmp_path, **kwargs), Look(), epochs=9)
    return found.value.args


class LookedAt(Exception):
    pass


def half_a_file(self, path, **kwargs):
    pathlib.Path(path).write_bytes(b"\x89HDF")
    raise PowerFails


def fail(*args, **kwargs):
    raise PowerFails


#: What is never reached, from the first moment of a backup to the last.
MOMENTS = {
    "while_it_is_written": (SharpnessAwareModel, "save_weights", half_a_file),
    "before_it_is_on_the_disk": (os, "fsync", fail),
    "before_it_takes_its_place": (os, "replace", fail),
    "before_the_old_one_goes": (os, "remove", fail),
}


@AS_WRITTEN
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_backup_is_there_at_every_moment(moment, tmp_path, monkeypatch):
    """Weights and epoch belong together: those before the backup, or those after it."""
    expected = two_epochs(tmp_path)
    model = make()
    backup = AtomicBackupAndRestore(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(*MOMENTS[moment])
        with pytest.raises(PowerFails):
            fit(model, backup)
    epoch, found = restored(tmp_path)
    if moment == "before_the_old_one_goes":
        assert epoch == 3
        assert_same(found, state(model), bits=True)
    else:
        assert epoch == 2
        assert_same(found, expected, bits=True)
    fit(make(), AtomicBackupAndRestore(tmp_path))
    assert not tmp_path.exists()  # Nothing is left over.


@AS_WRITTEN
def test_a_damaged_file_is_passed_over_with_a_warning(tmp_path):
    two_epochs(tmp_path, double_checkpoint=True)
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"cannot be read .* from the one before it"):
        epoch, _ = restored(tmp_path, double_checkpoint=True)
    assert epoch == 1


@AS_WRITTEN
def test_without_a_second_backup_a_damaged_file_is_an_error(tmp_path):
    two_epochs(tmp_path)
    (only,) = tmp_path.iterdir()
    only.write_bytes(b"")
    with pytest.raises(OSError, match="open file"):
        fit(make(), AtomicBackupAndRestore(tmp_path))


SAVE_AGAIN_AND_AGAIN = """
import sys
import keras
import numpy as np
from keras_sharp.callbacks import AtomicBackupAndRestore

model = keras.Sequential([keras.Input((500,)), keras.layers.Dense(500)])
model.compile("sgd", "mse")
backup = AtomicBackupAndRestore(sys.argv[1])
backup.set_model(model)
backup.on_train_begin()
print("ready", flush=True)
epoch = 0
while True:
    model.set_weights([np.full_like(w, epoch + 1) for w in model.get_weights()])
    backup.on_epoch_end(epoch)
    epoch += 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_process_that_is_killed_leaves_a_backup(seed, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", SAVE_AGAIN_AND_AGAIN, str(tmp_path)], stdout=subprocess.PIPE
    )
    try:
        while child.stdout.readline().strip() != b"ready":
            assert child.poll() is None
        time.sleep(0.3 + np.random.default_rng(seed).uniform(0, 0.2))
    finally:
        child.kill()  # SIGKILL: nothing in the process can do anything about it.
        child.communicate()
    model = keras.Sequential([keras.Input((500,)), layers.Dense(500)])
    model.compile("sgd", "mse")
    backup = AtomicBackupAndRestore(tmp_path)
    backup.set_model(model)
    _, epoch, path = backup._backups()[-1]
    model.load_weights(path)
    for weight in values(model.weights):
        np.testing.assert_array_equal(weight, epoch)

"""Backups of a training that survive the loss of power while one is written."""

import os
import re
import warnings

import keras

from keras_sharp import engine
from keras_sharp.identifiers import check_boolean

_NAME = "backup-{number:06d}-epoch-{epoch:06d}.weights.h5"
_PATTERN = re.compile(r"backup-(\d+)-epoch-(\d+)\.weights\.h5")
_INCOMPLETE = "incomplete.weights.h5"


class AtomicBackupAndRestore(keras.callbacks.Callback):
    """Backs training up, and goes on from there after an interruption at any moment.

    As `keras.callbacks.BackupAndRestore`, with the same arguments. That one
    writes over the last backup, in place: a process that is killed while it
    does so leaves a file that cannot be read, or the weights of one epoch with
    the number of another. Here a backup is written beside the last one, and
    takes its place when it is complete and on the disk. The epoch is a part of
    the name of the file, so that weights and epoch cannot come apart.

    What comes back: the weights, the optimizer, the state of the model, and,
    for a `keras_sharp.SharpnessAwareModel`, the method with its memory and
    hyperparameters. It works with any Keras model. Make the model and call
    `fit` as in the first run.

    With `save_freq` in batches an epoch that was broken off begins again with
    its first batch, from the weights that it had reached, as in Keras. The
    order of the examples is not a part of a backup: with `shuffle=True`, `fit`
    draws a new one.

    Args:
        backup_dir: String or path, a folder on a local disk, for one training
            alone.
        save_freq: `"epoch"`, to save at the end of each epoch; or an integer
            >= 1, to save after so many batches. Defaults to `"epoch"`.
        double_checkpoint: Boolean. Whether to keep the backup before the last
            one as well, and to go on from there if the disk has damaged the
            last. Defaults to `False`.
        delete_checkpoint: Boolean. Whether to delete the backups when training
            has come to its end. Defaults to `True`.

    Raises:
        ValueError: if an argument is not one of these; and before the first
            epoch, if the model is not built.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = keras_sharp.SharpnessAwareModel(model, "sam")
    >>> model.compile("sgd", "mse")
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> backup = keras_sharp.callbacks.AtomicBackupAndRestore(folder, delete_checkpoint=False)
    >>> x, y = np.ones((8, 4)), np.ones((8, 1))
    >>> history = model.fit(x, y, epochs=2, callbacks=[backup], verbose=0)
    >>> history = model.fit(x, y, epochs=3, callbacks=[backup], verbose=0)  # The third alone.
    >>> history.epoch
    [2]
    """

    def __init__(
        self, backup_dir, save_freq="epoch", double_checkpoint=False, delete_checkpoint=True
    ):
        super().__init__()
        if not backup_dir or "://" in str(backup_dir):
            raise ValueError(
                "`backup_dir` must be a folder on a local disk, where a file can take the place of "
                f"another in one moment. Received: backup_dir={backup_dir!r}. Files of an object "
                "store are complete or not there: use keras.callbacks.BackupAndRestore for those."
            )
        is_number = isinstance(save_freq, int) and not isinstance(save_freq, bool)
        if save_freq != "epoch" and not (is_number and save_freq >= 1):
            raise ValueError(
                "`save_freq` must be 'epoch' or a number of batches, an integer >= 1. Received: "
                f"save_freq={save_freq!r}"
            )
        check_boolean("double_checkpoint", double_checkpoint)
        check_boolean("delete_checkpoint", delete_checkpoint)
        self.backup_dir = os.fspath(backup_dir)
        self.save_freq = save_freq
        self.double_checkpoint = double_checkpoint
        self.delete_checkpoint = delete_checkpoint
        self._epoch, self._last_batch, self._unsaved_batches = 0, -1, 0

    def on_train_begin(self, logs=None):
        if not self.model.built:
            raise ValueError(
                "AtomicBackupAndRestore restores the weights as training begins, and needs a model "
                f"that has some. Received: {self.model!r}. Build it before `fit`: give it a "
                "keras.Input, or call it on a batch."
            )
        self._unsaved_batches = 0
        engine.start_at_epoch(self.model, self._restore())

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._last_batch = epoch, -1

    def on_train_batch_end(self, batch, logs=None):
        self._unsaved_batches += batch - self._last_batch  # Several, with steps_per_execution.
        self._last_batch = batch
        if self.save_freq != "epoch" and self._unsaved_batches >= self.save_freq:
            self._save()

    def on_epoch_end(self, epoch, logs=None):
        self._epoch = epoch + 1
        if self.save_freq == "epoch":
            self._save()

    def on_train_end(self, logs=None):
        engine.start_at_epoch(self.model, None)  # The next `fit` begins where it is told.
        if self.delete_checkpoint and os.path.isdir(self.backup_dir):
            for path in [self._path(_INCOMPLETE), *(path for _, _, path in self._backups())]:
                if os.path.exists(path):
                    os.remove(path)
            if not os.listdir(self.backup_dir):
                os.rmdir(self.backup_dir)

    def _path(self, name):
        return os.path.join(self.backup_dir, name)

    def _backups(self):
        """What backups there are, from the oldest to the newest: number, epoch, path."""
        if not os.path.isdir(self.backup_dir):
            return []
        found = map(_PATTERN.fullmatch, os.listdir(self.backup_dir))
        return sorted((int(m[1]), int(m[2]), self._path(m[0])) for m in found if m)

    def _save(self):
        os.makedirs(self.backup_dir, exist_ok=True)
        old = self._backups()
        number = old[-1][0] + 1 if old else 1
        self.model.save_weights(self._path(_INCOMPLETE), overwrite=True)
        _flush(self._path(_INCOMPLETE))
        name = _NAME.format(number=number, epoch=self._epoch)
        os.replace(self._path(_INCOMPLETE), self._path(name))
        _flush(self.backup_dir)
        kept_beside = 1 if self.double_checkpoint else 0
        for _, _, path in old[: len(old) - kept_beside]:
            os.remove(path)
        self._unsaved_batches = 0

    def _restore(self):
        """Load the newest backup that can be read. The epoch to go on with, `None` without any."""
        backups = self._backups()
        while backups:
            _, epoch, path = backups.pop()
            try:
                self._load(path)
            except OSError as error:
                if not backups:
                    raise
                warnings.warn(
                    f"The backup {path!r} cannot be read ({error}). Training goes on from the one "
                    "before it.",
                    stacklevel=2,
                )
            else:
                return epoch
        return None

    def _load(self, path):
        optimizer = self.model.optimizer
        if not optimizer.built:  # Else there would be nothing to load its state into.
            optimizer.build(self.model.trainable_variables)
        self.model.load_weights(path)


def _flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    is_folder = os.path.isdir(path)
    if is_folder and os.name == "nt":  # Windows cannot, and need not.
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

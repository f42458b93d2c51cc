"""One process of a training with backups, in which the second process may be killed.

python -m tests.distributed.interrupted TOPOLOGY RANK PORTS FOLDER dies|lives
"""

import os
import pathlib
import signal
import sys
import time

from tests.distributed.worker import N, Place, data, make

EPOCHS = 3


def main(topology, rank, ports, folder, fate):
    place = Place(topology, rank, ports, timeout=20)
    import keras
    import numpy as np

    class Killed(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if self.epoch == 1 and batch == 2 and place.rank == 1 and fate == "dies":
                # JAX runs ahead of its devices: the other process may be an epoch behind.
                while not (folder / "backup_0" / "training_metadata.json").exists():
                    time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGKILL)

    folder = pathlib.Path(folder)
    with place.scope():
        wrapper = make("sam-global", place.seed())
    x, y, batch_size = place.share(*(a[:N] for a in data("sam-global")))
    # The process that is left may be about to write when it learns of the loss.
    backup = keras.callbacks.BackupAndRestore(folder / f"backup_{rank}", double_checkpoint=True)
    wrapper.fit(
        x,
        y,
        batch_size=batch_size,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[backup, Killed()],
    )
    weights = [keras.ops.convert_to_numpy(v) for v in wrapper.model.weights]
    np.savez(folder / f"{rank}.npz", *weights)


if __name__ == "__main__":
    main(*sys.argv[1:])

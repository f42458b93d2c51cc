"""KerasTuner searches for method and rho, and gives the best model back."""

import importlib.util

import keras
import numpy as np
import pytest

import keras_sharp
from keras_sharp import callbacks, methods
from tests import models

keras_tuner = pytest.importorskip("keras_tuner", reason="KerasTuner is not installed")
pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow" and not importlib.util.find_spec("tensorboard"),
    reason="on TensorFlow, KerasTuner needs TensorBoard, which is not installed",
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int64") + (X[:, 1] > 0)
TRAIN, VALIDATION = (X[:64], Y[:64]), (X[64:], Y[64:])
STEPS_PER_EPOCH = 2


def build(hp, inputs=()):
    name = hp.Choice("method", ["sam", "asam", "gsam", "adaptive_gsam", "bsam"])
    rho = hp.Float("rho", 0.01, 1.0, sampling="log")
    network = keras.Sequential(
        [
            *inputs,
            keras.layers.Dense(8, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(3),
        ]
    )
    model = keras_sharp.SharpnessAwareModel(network, methods.METHODS[name](rho=rho))
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    if model.built:  # As docs/how_to/keras_tuner.md advises.
        model.optimizer.build(model.trainable_variables)
    return model


def build_with_inputs(hp):
    return build(hp, [keras.Input((6,))])


class Watch(keras.callbacks.Callback):
    """What each epoch of each trial came to."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.epochs, self.stop_after = [], stop_after

    def __deepcopy__(self, memo):
        return self  # KerasTuner copies callbacks for each trial.

    def on_epoch_end(self, epoch, logs=None):
        method = self.model.method
        predictions = self.model.predict(X, verbose=0)
        rho = float(keras.ops.convert_to_numpy(method.rho))
        steps = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        self.epochs.append((logs["val_loss"], type(method), rho, steps, predictions))
        if len(self.epochs) == self.stop_after:
            raise KeyboardInterrupt


def search(tuner, *watching, epochs=3):
    data = {"validation_data": VALIDATION, "epochs": epochs, "verbose": 0}
    tuner.search(*TRAIN, **data, callbacks=list(watching))


def random_search(folder, build=build_with_inputs, max_trials=2):
    return keras_tuner.RandomSearch(
        build, objective="val_loss", max_trials=max_trials, seed=1, directory=folder
    )


def check_best(tuner, epochs):
    """The best model is that of the best epoch, and can go on."""
    _, method, rho, steps, predictions = min(epochs, key=lambda epoch: epoch[0])
    (values,) = (hp.values for hp in tuner.get_best_hyperparameters(1))
    assert methods.METHODS[values["method"]] is method
    assert values["rho"] == pytest.approx(rho)
    (model,) = tuner.get_best_models(1)
    assert type(model.method) is method
    assert float(keras.ops.convert_to_numpy(model.method.rho)) == pytest.approx(rho)
    np.testing.assert_array_equal(model.predict(X, verbose=0), predictions)
    if tuner.hypermodel.build(tuner.get_best_hyperparameters(1)[0]).built:
        assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == steps
    model.fit(*TRAIN, verbose=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping variable loading:UserWarning")
@pytest.mark.parametrize(
    "build", [build_with_inputs, models.slow(build)], ids=["built", "built by fit"]
)
def test_a_search_gives_its_best_model_back(build, tmp_path):
    watch = Watch()
    tuner = random_search(tmp_path, build)
    search(tuner, watch)
    assert len(watch.epochs) == 2 * 3
    # Both trials, and no two alike: the search did search.
    assert len({rho for _, _, rho, _, _ in watch.epochs}) == 2
    check_best(tuner, watch.epochs)
    check_best(random_search(tmp_path, build), watch.epochs)  # As in another process.


@pytest.mark.slow
def test_an_interrupted_search_goes_on(tmp_path):
    first, second = Watch(stop_after=5), Watch()
    with pytest.raises(KeyboardInterrupt):
        search(random_search(tmp_path), first)
    tuner = random_search(tmp_path)
    search(tuner, second)
    assert len(second.epochs) == 3  # The first trial was done; the second starts anew.
    check_best(tuner, [*first.epochs[:3], *second.epochs])


@pytest.mark.slow  # Two dozen models: where they are compiled, it takes minutes.
def test_hyperband_goes_on_with_the_rho_and_the_step_that_a_trial_had(tmp_path):
    seen = []

    class Start(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            rho = float(keras.ops.convert_to_numpy(self.model.method.rho))
            self.before = rho, int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

        def on_epoch_begin(self, epoch, logs=None):
            if self.before is not None:
                seen.append((epoch, *self.before))
                self.before = None

    tuner = keras_tuner.Hyperband(
        build_with_inputs, "val_loss", max_epochs=4, factor=2, seed=1, directory=tmp_path
    )
    halve = callbacks.RhoScheduler(lambda epoch, rho: rho / 2)
    tuner.search(*TRAIN, validation_data=VALIDATION, verbose=0, callbacks=[Start(), halve])
    later = [(epoch, rho, steps) for epoch, rho, steps in seen if epoch > 0]
    assert later
    started = [rho for epoch, rho, _ in seen if epoch == 0]
    for epoch, rho, steps in later:
        # The best epoch of the trial before, which need not be its last, was loaded.
        assert 0 < steps <= STEPS_PER_EPOCH * epoch
        halved = rho * 2 ** (steps / STEPS_PER_EPOCH)
        assert any(halved == pytest.approx(first, rel=1e-4) for first in started)

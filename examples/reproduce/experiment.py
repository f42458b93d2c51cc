"""What the reproductions share: fair searches, many trainings of one network, a resumable JSON."""

import json
import time

import keras
import numpy as np

import keras_sharp

#: The order of tables and pictures.
METHODS = ("sgd", "sam", "asam", "gsam", "adaptive_gsam", "bsam")

#: Where the radius is searched, in units of the weights, and in units of their size.
RHO = (0.01, 0.5)
SCALED_RHO = (0.05, 2.5)


def search_space(method, learning_rate, rho=RHO, scaled_rho=SCALED_RHO, alpha=(0.1, 1.0)):
    """The ranges of the numbers that a method has, each `(low, high)`."""
    space = {"learning_rate": learning_rate}
    if method != "sgd":
        space["rho"] = scaled_rho if method in ("asam", "adaptive_gsam") else rho
    if method in ("gsam", "adaptive_gsam"):
        space["alpha"] = alpha
    return space


def latin_hypercube(space, count, seed=0):
    """As many settings for a method with one number as for a method with three.

    Each number takes `count` values, evenly spread over its range on a
    logarithmic scale, each of them once.

    Args:
        space: dictionary of pairs `(low, high)`.
        count: Integer, how many settings.
        seed: Integer, which values meet.

    Returns:
        A list of dictionaries.
    """
    random = np.random.default_rng(seed)
    columns = {}
    for name, (low, high) in space.items():
        levels = [float(f"{level:.3g}") for level in np.geomspace(low, high, count)]
        columns[name] = list(random.permutation(levels)) if columns else levels
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, map(float, row), strict=True)) for row in rows]


class Trainer:
    """Trains one network again and again, with any method, setting and seed.

    Weights, optimizer and statistics start anew each time. The numbers of a
    method live in variables, so that only another method compiles another
    step: run all settings of a method before the next one.

    Args:
        make_network: function without arguments that returns a `keras.Model`.
        loss: the loss, as for `compile`.
        data: dictionary with the pairs `(x, y)` for `"train"`, `"validation"`
            and `"test"`.
        batch_size: Integer.
        weight_decay: Float, as for the optimizer. Defaults to `None`.
        measure: function of the network that returns a dictionary of further
            numbers, for all runs but those of the search. Defaults to `None`.
        follow: function of the network that returns a dictionary of numbers,
            called after each epoch of all runs but those of the search, whose
            values are kept as lists. Defaults to `None`.
        augment: function of a NumPy generator and a batch of training images
            that returns other ones. Defaults to `None`.
        contestants: dictionary from further names, to be given for a method,
            to functions without arguments that make the method or policy.
            Defaults to `None`.
        num_micro_batches: Integer, as for `SharpnessAwareModel`. Defaults to
            `1`.
    """

    def __init__(
        self,
        make_network,
        loss,
        data,
        batch_size,
        weight_decay=None,
        measure=None,
        follow=None,
        augment=None,
        contestants=None,
        num_micro_batches=1,
    ):
        self.make_network, self.data, self.batch_size = make_network, data, batch_size
        self.measure, self.follow, self.augment = measure, follow, augment
        self.contestants = contestants or {}
        self._loss, self._weight_decay = loss, weight_decay
        self.model = keras_sharp.SharpnessAwareModel(
            make_network(), method=None, num_micro_batches=num_micro_batches
        )
        self.compile(self.model)
        self._method = "sgd"
        # The first `fit` of a model builds it, which draws random numbers. After this, a seed
        # gives the same training whatever came before it.
        x, y = data["train"]
        self.model.fit(x[:batch_size], y[:batch_size], batch_size=batch_size, verbose=0)

    def compile(self, model):
        """Compile a model as that of the trainings."""
        model.compile(
            keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=self._weight_decay),
            self._loss,
            metrics=["accuracy"],
            # On a CPU, the convolutions of XLA are slower than those of TensorFlow itself.
            jit_compile="auto" if keras.backend.backend() == "jax" else False,
        )

    def __call__(self, method, setting, seed, epochs, test):
        """Train once.

        Args:
            method: one of `METHODS`, or of the contestants.
            setting: dictionary with `"learning_rate"` and the numbers of the
                method.
            seed: Integer, of the initial weights and the order of the images.
            epochs: Integer. The learning rate falls to 0 along a cosine.
            test: Boolean, whether to look at the test data.

        Returns:
            A dictionary of floats, and of lists of floats.
        """
        self.reset(method, setting, seed)
        seen = []
        peak = setting["learning_rate"]
        schedule = keras.callbacks.LearningRateScheduler(
            lambda epoch, _: peak * (1 + np.cos(np.pi * epoch / epochs)) / 2
        )
        callbacks = [schedule]
        if test and self.follow is not None:
            callbacks.append(
                keras.callbacks.LambdaCallback(
                    on_epoch_end=lambda *_: seen.append(self.follow(self.model.model))
                )
            )
        logs = self.fit(self.model, self.data["train"], seed, epochs, callbacks).history
        result = {"train_loss": logs["loss"][-1]}
        for name in ("validation", "test") if test else ("validation",):
            x, y = self.data[name]
            loss, accuracy = self.model.evaluate(x, y, batch_size=1000, verbose=0)
            result |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        if test and self.measure is not None:
            result |= self.measure(self.model.model)
        result = {name: float(value) for name, value in result.items()}
        return result | {name: [float(one[name]) for one in seen] for name in (seen or [{}])[0]}

    def fit(self, model, data, seed, epochs=1, callbacks=()):
        """Train a model on `(x, y)` as in the trainings, with the images augmented anew."""
        options = {"epochs": epochs, "callbacks": list(callbacks), "verbose": 0}
        if self.augment is None:
            return model.fit(*data, batch_size=self.batch_size, **options)
        return model.fit(Augmented(*data, self.batch_size, self.augment, seed), **options)

    def reset(self, method, setting, seed):
        """Start anew: the arguments are those of a call."""
        numbers = {name: value for name, value in setting.items() if name != "learning_rate"}
        if method != self._method:
            make = self.contestants.get(method, lambda: None if method == "sgd" else method)
            self.model.method = make()
            self._method = method
        for name, value in numbers.items():
            setattr(self.model.method, name, value)
        keras.utils.set_random_seed(seed)
        self.model.model.set_weights(self.make_network().get_weights())
        memory = self.model.method_state
        for variable in [
            *self.model.optimizer.variables,
            self.model.highest_learning_rate,
            *memory,
        ]:
            variable.assign(np.zeros(variable.shape))
        if self.model.method.draws_random_numbers:
            memory[-1].assign(seed)  # Where its random numbers begin.
        self.model.optimizer.learning_rate = setting["learning_rate"]


class Augmented(keras.utils.PyDataset):
    """Batches of images, shuffled and augmented anew in each epoch.

    Args:
        x, y: images and labels.
        batch_size: Integer.
        augment: see `Trainer`.
        seed: Integer, of the order and of the augmentation.
    """

    def __init__(self, x, y, batch_size, augment, seed):
        super().__init__()
        self._x, self._y, self._batch_size, self._augment = x, y, batch_size, augment
        self._random = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self._x) // self._batch_size)

    def __getitem__(self, index):
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        return self._augment(self._random, self._x[chosen]), self._y[chosen]

    def on_epoch_end(self):
        self._order = self._random.permutation(len(self._x))


class Study:
    """All runs of an experiment, kept in a JSON as soon as they are done.

    A run that is in the file is not done again: what was stopped goes on.

    Args:
        path: the `pathlib.Path` of the JSON.
        settings: dictionary of plain values, all that the runs have in
            common.
        total: Integer, how many runs there will be.

    Raises:
        ValueError: if the file holds runs with other settings.
    """

    def __init__(self, path, settings, total):
        self.path, self.total = path, total
        settings = {**settings, "backend": keras.backend.backend()}
        self.content = {"name": path.stem, "settings": settings, "runs": []}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content["settings"] != json.loads(json.dumps(settings)):
                raise ValueError(
                    f"{path} holds runs with other settings, which cannot be mixed with new ones. "
                    f"Received: {settings}, and in the file {self.content['settings']}. Choose "
                    "another folder with --output, or delete the file."
                )
        self._seconds = []

    def run(self, trainer, stage, method, setting, seed, epochs, **tags):
        """Train once, unless that has been done.

        Args:
            trainer: a `Trainer`, or a function that makes one.
            stage: `"search"`, `"final"`, or the name of a curve.
            method: see `Trainer`.
            setting: see `Trainer`.
            seed: see `Trainer`.
            epochs: see `Trainer`.
            **tags: what else tells this run from others.

        Returns:
            The entry in the JSON, a dictionary.
        """
        key = {
            **tags,
            "stage": stage,
            "method": method,
            "epochs": epochs,
            "seed": seed,
            "setting": setting,
        }
        for entry in self.content["runs"]:
            if {name: entry[name] for name in key if name in entry} == key:
                return entry
        start = time.perf_counter()
        result = trainer(method, setting, seed, epochs, test=stage != "search")
        self._seconds.append(time.perf_counter() - start)
        entry = {**key, "seconds": round(self._seconds[-1], 2), **_rounded(result)}
        self.content["runs"].append(entry)
        self.save()
        self._report(entry)
        return entry

    def search(self, trainer, method, settings, epochs, seeds=(100,), **tags):
        """The best of some settings on the validation data, on average over the seeds.

        By accuracy; of equal ones, by the loss.
        """

        def quality(setting):
            runs = [
                self.run(trainer, "search", method, setting, seed, epochs, **tags) for seed in seeds
            ]
            # NaN, of a training that failed, is no loss that max could compare.
            losses = np.nan_to_num([run["validation_loss"] for run in runs], nan=np.inf)
            return np.mean([run["validation_accuracy"] for run in runs]), -np.mean(losses)

        return max(settings, key=quality)

    def save(self, **extra):
        """Write the JSON, with further entries at its top."""
        self.content = {**self.content, **extra}
        head = {name: value for name, value in self.content.items() if name != "runs"}
        # One run per line, to be read by people as well.
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in self.content["runs"])
        text = json.dumps(head, indent=2)[:-2] + f',\n  "runs": [\n{lines}\n  ]\n}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path)  # A file that is stopped half-way is none.

    def _report(self, entry):
        done = len(self.content["runs"])
        left = np.mean(self._seconds) * max(self.total - done, 0) / 60
        where = " ".join(f"{entry[name]}" for name in ("data", "stage", "method") if name in entry)
        numbers = " ".join(f"{name} {value:g}" for name, value in entry["setting"].items())
        known = (
            f"{data}_{what}" for what in ("accuracy", "loss") for data in ("test", "validation")
        )
        name = next(name for name in (*known, "train_loss") if name in entry)
        print(
            f"[{done:>3}/{self.total}] {where:<34} {numbers:<44} seed {entry['seed']:<3} "
            f"{name.split('_')[1]} {entry[name]:.4f}  {entry['seconds']:.1f} s, "
            f"{left:.0f} min to go",
            flush=True,
        )


def _rounded(result):
    """Six digits, and four in lists: more would only be noise in the file."""
    return {
        name: [round(v, 4) for v in value] if isinstance(value, list) else float(f"{value:.6g}")
        for name, value in result.items()
    }

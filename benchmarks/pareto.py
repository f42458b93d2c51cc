"""What the cheaper ways keep of SAM's gain, and what they cost: the front between SGD and SAM.

    python benchmarks/pareto.py --backend jax
    python benchmarks/pareto.py --place fine_tune --quick
    python benchmarks/pareto.py --backend jax --output benchmarks/results

Gain: the accuracy beyond that of SGD, five seeds each. One number of each contestant is
searched, with as many values for each, on a validation split: the learning rate of SGD, and the
rho of the others, which keep the usual rate of the place. SGD with that rate is the control.

Cost: CPU time of `fit` over that of plain Keras with SGD, on the network and the batches of the
place and on one core. A block is a training in miniature, so that what begins late, or looks at
every tenth step, takes the right share of dear steps. One block of each contestant makes a round,
in reversed order in every other one; the figure is the median over the rounds.

What is done is in the JSON of its place, and is not done again.
"""

import os
import pathlib
import sys

if hasattr(os, "sched_setaffinity"):  # One core, before a backend counts them.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "reproduce"))

import command  # noqa: E402

NAMES = ("noise", "fine_tune", "cifar10")
args = command.parse(
    __doc__, place={"choices": NAMES, "nargs": "+", "default": NAMES, "help": "default: all"}
)

import gc  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from typing import ClassVar, NamedTuple  # noqa: E402

import datasets  # noqa: E402
import front  # noqa: E402
import noise  # noqa: E402
import numpy as np  # noqa: E402
from experiment import Study, Trainer  # noqa: E402

from keras_sharp import SharpnessAwareModel, methods, policies  # noqa: E402

SEEDS = args.seeds or (2 if args.quick else 5)
ROUNDS, STEPS = (2, 4) if args.quick else (15, 20)


class Contestant(NamedTuple):
    """How a method or a policy is made, and where its rho is searched.

    Attributes:
        make: function without arguments.
        low, high: the ends of the range, in those of SAM's range.
    """

    make: object
    low: float = 1.0
    high: float = 1.0


#: What asks rarely or late, or climbs along a gradient that is not that of the batch, is searched
#: up to a larger rho than SAM.
CONTESTANTS = {
    "sam": Contestant(methods.SAM),
    "AsyncSAM": Contestant(methods.AsyncSAM, 2, 5),
    "Every(SAM, 5)": Contestant(lambda: policies.Every("sam", 5), 2, 5),
    "MomentumSAM": Contestant(methods.MomentumSAM, 4, 10),
    "LookSAM(k=5)": Contestant(lambda: methods.LookSAM(k=5), 2, 2),
    "SAM(ascent_share=0.25)": Contestant(lambda: methods.SAM(ascent_share=0.25)),
    "From(SAM, 0.7)": Contestant(lambda: policies.From("sam", 0.7), 2, 2),
    "Every(SAM, 10)": Contestant(lambda: policies.Every("sam", 10), 2, 5),
    "LookSAM(k=10)": Contestant(lambda: methods.LookSAM(k=10), 2, 2),
    "From(Every(SAM, 5), 0.5)": Contestant(
        lambda: policies.From(policies.Every("sam", 5), 0.5), 2, 5
    ),
    "From(SAM, 0.5)": Contestant(lambda: policies.From("sam", 0.5), 2, 2),
    "WhenGradientNorm(SAM)": Contestant(lambda: policies.WhenGradientNorm("sam"), 2, 2),
    "ESAM": Contestant(methods.ESAM),
}
if args.quick:
    CONTESTANTS = {name: CONTESTANTS[name] for name in ("sam", "AsyncSAM", "From(SAM, 0.7)")}


class Place:
    """Data, network and ranges; derive from it, and give it what `Noise` has."""

    def known(self, settings):
        """Runs with these settings that another program has done, as a list."""
        del settings
        return []


class Noise(Place):
    """Fashion-MNIST with 40 % wrong labels, as in examples/reproduce/label_noise.py."""

    settings = noise.settings(args.quick, [0.4])
    usual, learning_rate, rho = noise.USUAL, noise.LEARNING_RATE, noise.RHO

    def make_trainer(self, contestants):
        trainer = noise.make_trainer(self.settings, 0.4, contestants)
        trainer.follow = None  # The end is enough.
        return trainer

    def known(self, settings):
        """What label_noise.py has run with these settings: SGD and SAM."""
        file = ROOT / "docs" / "results" / "label_noise.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        if {**content["settings"], "shares": [0.4]} != settings:
            return []
        found = [
            {key: value for key, value in run.items() if not isinstance(value, list)}
            for run in content["runs"]
            if run["data"] == "noise 0.4" and run["method"] in ("sgd", "sam")
        ]
        for run in found:
            del run["data"]
        return found


class FineTune(Place):
    """A network trained on five classes of Fashion-MNIST learns the others, of few images each."""

    settings: ClassVar = {
        "data": "digits" if args.quick else "fashion_mnist",
        "images": 800 if args.quick else 20_000,  # Half of them have the classes that come first.
        "per_class": 10 if args.quick else 20,
        "validation": 50 if args.quick else 1000,
        "filters": [4, 8] if args.quick else [32, 64, 128],
        "epochs_before": 1 if args.quick else 5,
        "epochs": 2 if args.quick else 40,
        "batch_size": 10 if args.quick else 25,
        "searched": 2 if args.quick else 6,
    }
    usual, learning_rate, rho = 0.1, (0.01, 1.0), (0.05, 1.0)

    def make_trainer(self, contestants):
        settings = self.settings
        (x, y), test = datasets.load_images(settings["data"], settings["images"])
        first, second = y < 5, y >= 5
        before = Trainer(
            lambda: datasets.make_network(x.shape[1:], settings["filters"], 5),
            noise.LOSS,
            {"train": (x[first], y[first]), "validation": (x[first], y[first])},
            batch_size=128,
        )
        before("sgd", {"learning_rate": 0.1}, 0, settings["epochs_before"], test=False)
        body = before.model.model.get_weights()[:-2]

        def make_network():
            network = before.make_network()
            network.set_weights([*body, *network.get_weights()[-2:]])  # The head is new.
            return network

        x, y = x[second], y[second] - 5
        few = np.sort([np.flatnonzero(y == label)[: settings["per_class"]] for label in range(5)])
        few = few.reshape(-1)
        rest = np.setdiff1d(np.arange(len(y)), few)[: settings["validation"]]
        of_these = test[1] >= 5
        return Trainer(
            make_network,
            noise.LOSS,
            {
                "train": (x[few], y[few]),
                "validation": (x[rest], y[rest]),
                "test": (test[0][of_these], test[1][of_these] - 5),
            },
            settings["batch_size"],
            contestants=contestants,
        )


class Cifar10(Place):
    """Few images of CIFAR-10, flipped and shifted, until a small ResNet knows them by heart."""

    settings: ClassVar = {
        "data": "digits" if args.quick else "cifar10",
        "train": 200 if args.quick else 4000,
        "validation": 100 if args.quick else 2000,
        "test": 100 if args.quick else 10_000,
        "width": 4 if args.quick else 16,
        "stem": 2,
        "epochs": 2 if args.quick else 40,
        "batch_size": 50 if args.quick else 64,
        "searched": 2 if args.quick else 6,
    }
    usual, learning_rate, rho = 0.1, (0.01, 0.6), (0.03, 0.5)

    def make_trainer(self, contestants):
        settings = self.settings
        n, more = settings["train"], settings["validation"]
        (x, y), test = datasets.load_images(settings["data"], n + more, settings["test"])
        return Trainer(
            lambda: datasets.make_resnet(x.shape[1:], settings["width"], settings["stem"]),
            noise.LOSS,
            {"train": (x[:n], y[:n]), "validation": (x[n:], y[n:]), "test": test},
            settings["batch_size"],
            augment=flip_and_shift,
            contestants=contestants,
        )


def flip_and_shift(random, images, by=4):
    """Half of the images mirrored, and each moved by up to `by` pixels, with 0 around."""
    flipped = np.where(random.random((len(images), 1, 1, 1)) < 0.5, images[:, :, ::-1], images)
    padded = np.pad(flipped, ((0, 0), (by, by), (by, by), (0, 0)))
    rows, columns = random.integers(0, 2 * by + 1, (2, len(images)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
    # A window has its rows and columns behind the channels.
    return np.moveaxis(windows[np.arange(len(images)), rows, columns], 1, -1)


PLACES = {"noise": Noise, "fine_tune": FineTune, "cifar10": Cifar10}


def search_space(place, method):
    """The settings that are tried with a contestant."""
    if method == "sgd":
        name, ends = "learning_rate", place.learning_rate
    else:
        contestant = CONTESTANTS[method]
        low, high = place.rho
        name, ends = "rho", (contestant.low * low, contestant.high * high)
    return noise.around(name, ends, place.settings["searched"], place.usual)


def measure(trainer):
    """CPU seconds of the blocks of each contestant, a list with one entry per round."""
    size = STEPS * trainer.batch_size
    data = [np.resize(a, (size, *a.shape[1:])) for a in trainer.data["train"]]
    models = {"sgd": trainer.make_network()}
    for name, contestant in CONTESTANTS.items():
        models[name] = SharpnessAwareModel(trainer.make_network(), contestant.make())
    seconds = {name: [] for name in models}
    for model in models.values():
        trainer.compile(model)
        for _ in range(2):  # These compile, and are not counted.
            trainer.fit(model, data, seed=0)
    for number in range(ROUNDS):
        for name in list(models) if number % 2 == 0 else reversed(models):
            models[name].optimizer.iterations.assign(0)  # A training begins.
            gc.collect()
            start = time.process_time()
            trainer.fit(models[name], data, seed=0)
            seconds[name].append(round(time.process_time() - start, 4))
    return seconds


def main():
    for name in args.place:
        place = PLACES[name]()
        searched = place.settings["searched"]
        total = (1 + len(CONTESTANTS)) * (searched + SEEDS) + SEEDS
        study = Study(args.output / f"pareto_{name}.json", place.settings, total)
        study.content["runs"] = study.content["runs"] or place.known(study.content["settings"])
        trainer = place.make_trainer({name: c.make for name, c in CONTESTANTS.items()})
        epochs = place.settings["epochs"]
        if set(study.content.get("cpu_s", ())) != {"sgd", *CONTESTANTS}:
            study.save(cpu_s=measure(trainer))
        for method in ("sgd", *CONTESTANTS):
            best = study.search(trainer, method, search_space(place, method), epochs)
            for seed in range(SEEDS):
                study.run(trainer, "final", method, best, seed, epochs)
            if method == "sgd":
                control = {"learning_rate": place.usual}
                for seed in range(SEEDS):
                    study.run(trainer, "control", method, control, seed, epochs)
    front.show(args.output)


if __name__ == "__main__":
    main()

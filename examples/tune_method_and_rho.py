"""Which method, and which rho? KerasTuner searches for both.

    pip install keras-tuner tensorboard scikit-learn
    python examples/tune_method_and_rho.py
    python examples/tune_method_and_rho.py --backend jax --search bayesian --trials 15

Trains a small network on the digits of scikit-learn, 40 % of them with a wrong label, once
for each method and rho of a grid, and without an adversary. The validation split has as many
wrong labels; only the test images, which no choice has seen, have none. A search that was
interrupted goes on where it was: call the script again.
"""

import importlib.util
import os
import sys

from common import parse, save

args = parse(
    __doc__,
    epochs=40,
    quick_epochs=2,
    dataset=("digits", "auto, fashion_mnist, mnist or digits: see examples/datasets.py"),
    label_noise=(0.4, "the share of wrong labels"),
    search=("grid", "grid, random or bayesian"),
    trials=(0, "how many trainings at most; 0 is all of a grid, or 30"),
)

import keras  # noqa: E402
from datasets import load_images, make_network, mislabel  # noqa: E402

import keras_sharp  # noqa: E402

needed = ["keras_tuner"]
if keras.backend.backend() == "tensorflow":
    needed.append("tensorboard")  # There, KerasTuner imports it in every trial.
missing = [name.replace("_", "-") for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"This example needs more packages: pip install {' '.join(missing)}")

import keras_tuner  # noqa: E402

#: From which rho to which, for each method. ASAM and Adaptive-GSAM measure the perturbation
#: relative to the weights, and want about ten times as much.
RANGES = {
    "sam": (0.02, 1.4),
    "asam": (0.2, 7.0),
    "gsam": (0.02, 1.4),
    "adaptive_gsam": (0.2, 7.0),
    "bsam": (0.02, 0.7),
}
TITLES = {"none": "no adversary", "adaptive_gsam": "Adaptive-GSAM"}
TUNERS = {
    "grid": keras_tuner.GridSearch,
    "random": keras_tuner.RandomSearch,
    "bayesian": keras_tuner.BayesianOptimization,
}
if args.search not in TUNERS:
    sys.exit(f"--search is one of {', '.join(TUNERS)}. Received: {args.search}")
if args.quick:
    RANGES = {name: RANGES[name] for name in ("sam", "asam")}


def build(hp, input_shape):
    """The compiled model for a choice of hyperparameters, as KerasTuner asks for it."""
    keras.utils.set_random_seed(args.seed)  # the same initial weights in every trial
    name = hp.Choice("method", ["none", *RANGES])
    method = None
    if name != "none":
        # Each method has a rho of its own, which is there only if the method is. The method is
        # made here: trials that share one would share its rho.
        with hp.conditional_scope("method", [name]):
            step = 30 if args.quick else 2  # each rho of the grid is so many times the last
            rho = hp.Float(f"rho_{name}", *RANGES[name], step=step, sampling="log")
        method = keras_sharp.methods.METHODS[name](rho=rho)
    model = keras_sharp.SharpnessAwareModel(make_network(input_shape, filters=(16, 32)), method)
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    # The weights of a trial are loaded into a new model, and those of an optimizer that is not
    # built are left out: momentum and the number of steps would start anew.
    model.optimizer.build(model.trainable_variables)
    return model


def choice(trial):
    """Method and rho of a trial; no adversary has no rho."""
    values = trial.hyperparameters.values
    return values["method"], values.get(f"rho_{values['method']}")


def title(name):
    return TITLES.get(name, name.upper())


class Progress(TUNERS[args.search]):
    """The tuner, with one line per trial."""

    def on_trial_end(self, trial):
        super().on_trial_end(trial)
        trial = self.oracle.get_trial(trial.trial_id)
        name, rho = choice(trial)
        at = "" if rho is None else f", rho {rho:.3g}"
        result = (
            trial.status.lower()  # The error was printed.
            if trial.score is None
            else f"validation accuracy {trial.score:.4f} after epoch {trial.best_step + 1}"
        )
        print(f"trial {int(trial.trial_id) + 1:>2}: {title(name) + at:<24} {result}", flush=True)


def draw(trials, right):
    """Validation accuracy over rho, a line for each method; `right` labels limit it."""
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    best = max(trials, key=lambda trial: trial.score)
    for i, name in enumerate(RANGES):
        points = sorted((choice(t)[1], 100 * t.score) for t in trials if choice(t)[0] == name)
        if points:
            style = {"color": f"C{i}", "label": title(name), "marker": "o", "ms": 5, "lw": 1.8}
            axes.plot(*zip(*points, strict=True), ls="-" if args.search == "grid" else "", **style)
    if choice(best)[1] is not None:
        ring = {"s": 170, "facecolors": "none", "edgecolors": "black", "linewidths": 1.5}
        axes.scatter(choice(best)[1], 100 * best.score, **ring, label="the best", zorder=3)
    axes.axhline(100 * right, color="0.4", ls=":", lw=1.2, label="without an error")
    plain = next((trial.score for trial in trials if choice(trial)[0] == "none"), None)
    if plain is not None:
        axes.axhline(100 * plain, color="0.4", ls="--", lw=1.2, label=title("none"))
        # With too large a rho nothing is learned. Those lines may leave the picture, in which
        # the others would be one.
        low = plain - max(best.score - plain, 0.03)
        axes.set_ylim(bottom=100 * max(low, min(t.score for t in trials) - 0.01))
    axes.set(xscale="log", xlabel="rho", ylabel="validation accuracy at its best epoch, %")
    axes.set_title(
        f"{args.label_noise:.0%} of the labels are wrong, those of the validation split, too",
        fontsize=11,
    )
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def main():
    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    count, held_out = (150, 50) if args.quick else (800, 600)
    (x, y), test_data = load_images(args.dataset, num_train=count + held_out, num_test=2000)
    labels = mislabel(y, args.label_noise)

    # KerasTuner takes up what it finds in its folder, whatever the settings were: so the settings
    # are in the name of the folder.
    settings = [keras.backend.backend(), args.dataset, args.search, args.epochs, args.seed]
    settings += [args.label_noise, "quick"] if args.quick else [args.label_noise]
    tuner = Progress(
        lambda hp: build(hp, x.shape[1:]),
        objective="val_accuracy",
        max_trials=args.trials or (None if args.search == "grid" else 30),
        seed=args.seed,
        directory=os.path.splitext(args.output)[0],
        project_name="_".join(map(str, settings)),
    )
    print(f"Trials: {tuner.project_dir}; delete this folder to start over")
    tuner.search(
        x[:count],
        labels[:count],
        validation_data=(x[count:], labels[count:]),
        batch_size=32,
        epochs=args.epochs,
        verbose=0,
    )

    trials = [t for t in tuner.oracle.get_best_trials(10_000) if t.score is not None]
    print(f"\n{'the best of':>14} {'rho':>8} {'validation':>11} {'epoch':>6}")
    for name in ("none", *RANGES):
        own = [t for t in trials if choice(t)[0] == name]
        if own:
            # Of two that are as good, the smaller rho.
            trial = min(own, key=lambda t: (-t.score, choice(t)[1] or 0))
            rho = "" if name == "none" else f"{choice(trial)[1]:.3g}"
            epoch = trial.best_step + 1
            print(f"{title(name):>14} {rho:>8} {trial.score:>11.4f} {epoch:>6}")
    save(draw(trials, float((y == labels)[count:].mean())), args.output)

    model = tuner.get_best_models(1)[0]  # with the weights of its best epoch
    name, rho = choice(trials[0])
    found = title(name) if rho is None else f"{title(name)} with rho {rho:.3g}"
    loss, accuracy = model.evaluate(*test_data, batch_size=500, verbose=0)
    print(
        f"\nThe best, {found}, on test images with right labels: "
        f"accuracy {accuracy:.4f}, loss {loss:.4f}"
    )
    plain = next((t for t in trials if choice(t)[0] == "none"), None)
    if plain is not None and rho is not None:
        loss, accuracy = tuner.load_model(plain).evaluate(*test_data, batch_size=500, verbose=0)
        print(f"Without an adversary, at its best epoch: accuracy {accuracy:.4f}, loss {loss:.4f}")


if __name__ == "__main__":
    main()

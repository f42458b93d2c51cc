"""Regression, and a model with two outputs, on tables that scikit-learn ships.

    python examples/regression_and_multi_output.py
    python examples/regression_and_multi_output.py --backend torch --repeats 10

Sharpness-aware training is not about images, nor about classes: any loss will do,
and any number of them. First a regression: how a diabetes progresses in a year,
from ten measurements of a patient. Then a model with two outputs: from what is in
a wine, its grower (a class) and the intensity of its color (a number), each with a
loss and metrics of its own. Each is trained on several splits of the data.
"""

from common import parse, save

args = parse(__doc__, epochs=60, quick_epochs=3, repeats=(5, "how many splits of the data"))

import keras  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.datasets import load_diabetes, load_wine  # noqa: E402

import keras_sharp  # noqa: E402

METHODS = {
    "Adam": None,
    "SAM": keras_sharp.methods.SAM(rho=0.1),
    "ASAM": keras_sharp.methods.ASAM(rho=0.5),
}
COLOR = 9  # the column of the color of a wine


def standardize(a):
    return ((a - a.mean(0)) / a.std(0)).astype("float32")


def fit(network, method, seed, x, y, **compiled):
    """Train on 70 % of the rows; what `evaluate` says of the others."""
    rows = np.random.default_rng(seed).permutation(len(x))
    train, test = np.split(rows, [int(0.7 * len(x))])
    model = keras_sharp.SharpnessAwareModel(network, method)
    model.compile(keras.optimizers.Adam(3e-3), **compiled)

    def take(chosen):
        return x[chosen], keras.tree.map_structure(lambda a: a[chosen], y)

    model.fit(*take(train), batch_size=32, epochs=args.epochs, verbose=0)
    return model.evaluate(*take(test), batch_size=len(test), verbose=0, return_dict=True)


def regression(method, seed):
    """The error for diabetes, in units of its standard deviation."""
    x, y = map(standardize, load_diabetes(return_X_y=True))
    dense = [keras.layers.Dense(64, "relu") for _ in range(2)]
    network = keras.Sequential([keras.Input((10,)), *dense, keras.layers.Dense(1)])
    logs = fit(network, method, seed, x, y[:, None], loss="mse")
    return {"diabetes: error": logs["loss"] ** 0.5}


def two_outputs(method, seed):
    """Accuracy for the grower of a wine, and the error for its color."""
    table, grower = load_wine(return_X_y=True)
    table = standardize(table)
    inputs = keras.Input((12,))
    hidden = keras.layers.Dense(64, "relu")(inputs)
    outputs = {
        "grower": keras.layers.Dense(3, name="grower")(hidden),
        "color": keras.layers.Dense(1, name="color")(hidden),
    }
    logs = fit(
        keras.Model(inputs, outputs),
        method,
        seed,
        np.delete(table, COLOR, axis=1),
        {"grower": grower, "color": table[:, [COLOR]]},
        loss={
            "grower": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "color": "mse",
        },
        loss_weights={"grower": 1.0, "color": 0.5},
        metrics={"grower": ["accuracy"], "color": [keras.metrics.RootMeanSquaredError("rmse")]},
    )
    return {
        "wine: error of the color": logs["color_rmse"],
        "wine: accuracy": logs["grower_accuracy"],
    }


def main():
    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    repeats = 1 if args.quick else args.repeats
    results = {}
    for name, method in METHODS.items():
        runs = []
        for seed in range(args.seed, args.seed + repeats):
            keras.utils.set_random_seed(seed)
            runs.append(regression(method, seed) | two_outputs(method, seed))
        results[name] = {key: np.array([run[key] for run in runs]) for key in runs[0]}
        numbers = ", ".join(f"{key} {v.mean():.3f}" for key, v in results[name].items())
        print(f"{name:>5}  {numbers}", flush=True)
    picture(results)


def picture(results):
    """A panel for each number: one dot per split, and the mean."""
    import matplotlib.pyplot as plt

    keys = list(next(iter(results.values())))
    figure, panels = plt.subplots(1, len(keys), figsize=(11, 3.4), layout="constrained")
    for axes, key in zip(panels, keys, strict=True):
        values = np.stack([r[key] for r in results.values()])
        axes.plot(values, color="0.8", zorder=0)  # a line joins the methods on one split
        for i, row in enumerate(values):
            axes.scatter(np.full(len(row), i), row, color=f"C{i}", s=22)
            axes.hlines(row.mean(), i - 0.2, i + 0.2, color=f"C{i}", lw=3)
        axes.set_xticks(range(len(results)), list(results))
        axes.set_title(key)
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, args.output)


if __name__ == "__main__":
    main()

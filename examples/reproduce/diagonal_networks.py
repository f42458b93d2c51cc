"""Diagonal networks: with an adversary for each example, does SAM find sparser regressions?

    python examples/reproduce/diagonal_networks.py
    python examples/reproduce/diagonal_networks.py --backend jax --output docs/results

The linear regression `beta = w_plus**2 - w_minus**2` of Andriushchenko and Flammarion, 2022: 20
points in 30 dimensions, of which 3 matter, and gradient descent on all points at once. From a small
start it ends with a small 1-norm, which is what such data need; from a large one with a small
2-norm. SAM is said to move it towards the 1-norm, much further with an adversary for each example
(1-SAM) than with one for their mean loss (n-SAM); the perturbation is the gradient, times rho. And
what if the adversary comes later? 40 seconds of CPU time, with JAX.
"""

import command

args = command.parse(__doc__)

import functools  # noqa: E402

import numpy as np  # noqa: E402
import report  # noqa: E402
from experiment import Study  # noqa: E402
from full_batch import make_descent  # noqa: E402
from keras import ops  # noqa: E402

import keras_sharp  # noqa: E402

SETTINGS = {
    "points": 20,
    "dimensions": 30,
    "nonzero": 3,
    "validation": 1000,
    "test": 1000,
    "scales": [0.1, 0.2, 0.4],  # of the weights at the start, all alike
    "steps": 100 if args.quick else 20_000,
    "learning_rate": 0.02,
    # Of gradient descent, as many learning rates as of the others radii.
    "learning_rates": [0.01, 0.02] if args.quick else [0.0025, 0.005, 0.01, 0.02, 0.03],
    "n_sam": [0.01, 0.1] if args.quick else [0.01, 0.03, 0.1, 0.3, 1.0],
    "one_sam": [0.01, 0.03] if args.quick else [0.01, 0.03, 0.1, 0.2, 0.3],
    # 1-SAM with this rho, after as many steps of gradient descent.
    "late_rho": 0.1,
    "late": [10] if args.quick else [10, 100, 1000],
}
SEEDS = args.seeds or (2 if args.quick else 10)


def make_data(seed):
    """Points, and the value of a sparse linear function there, without noise."""
    random = np.random.default_rng(seed)
    beta = np.zeros(SETTINGS["dimensions"])
    beta[: SETTINGS["nonzero"]] = np.abs(random.normal(size=SETTINGS["nonzero"]))
    beta /= np.linalg.norm(beta)
    data = {"beta": beta}
    for name in ("points", "validation", "test"):
        x = random.normal(size=(SETTINGS[name], SETTINGS["dimensions"]))
        data[name] = x, x @ beta
    return data


DATA = [make_data(seed) for seed in range(SEEDS)]
#: All networks are trained at once: of all seeds, from each scale.
NETWORKS = [(seed, scale) for seed in range(SEEDS) for scale in SETTINGS["scales"]]
X, Y = (
    ops.convert_to_tensor(np.stack([DATA[seed]["points"][i] for seed, _ in NETWORKS]), "float32")
    for i in (0, 1)
)


def squares(w, x, y):
    """The losses of examples, summed over the networks: none of them changes another's gradient."""
    plus, minus = w
    predicted = ops.sum(x * (plus**2 - minus**2)[:, None], -1)
    return 0.5 * ops.sum((predicted - y) ** 2, 0)


def of_example(i):
    return lambda w: ops.sum(squares(w, X[:, i : i + 1], Y[:, i : i + 1]))


SAM = keras_sharp.methods.SAM(neighborhood="unnormalized")
DESCENTS = {
    "n_sam": make_descent([lambda w: ops.mean(squares(w, X, Y))], SAM),
    "one_sam": make_descent([of_example(i) for i in range(SETTINGS["points"])], SAM),
}


@functools.cache
def train(method, learning_rate, rho, late):
    """The coefficients of all networks, where `rho` begins after the step `late`."""
    w = [np.stack([np.full(SETTINGS["dimensions"], scale) for _, scale in NETWORKS])] * 2
    if late:
        w = DESCENTS["n_sam"](w, 0.0, np.full(late, learning_rate))
    rates = np.full(SETTINGS["steps"] - late, learning_rate)
    plus, minus = map(ops.convert_to_numpy, DESCENTS[method](w, rho, rates))
    return (plus.astype("float64") ** 2 - minus.astype("float64") ** 2).tolist()


def trainer(scale):
    def run(method, setting, seed, epochs, test):
        del epochs, test  # The same steps for all; the choice looks at the validation data only.
        rho, late = setting.get("rho", 0.0), setting.get("after", 0)
        name = "n_sam" if method == "gd" else method
        networks = train(name, setting["learning_rate"], rho, late)
        beta = np.array(networks[NETWORKS.index((seed, scale))])
        data = DATA[seed]
        losses = {
            f"{name}_loss": float(0.5 * np.mean((x @ beta - y) ** 2))
            for name, (x, y) in (
                ("train", data["points"]),
                ("validation", data["validation"]),
                ("test", data["test"]),
            )
        }
        # In those of the function that made the data.
        norms = {
            f"norm_{p}": float(np.linalg.norm(beta, p) / np.linalg.norm(data["beta"], p))
            for p in (1, 2)
        }
        return losses | norms

    return run


def main():
    rate = SETTINGS["learning_rate"]
    settings = {
        "gd": [{"learning_rate": value} for value in SETTINGS["learning_rates"]],
        **{
            method: [{"learning_rate": rate, "rho": rho} for rho in SETTINGS[method]]
            for method in DESCENTS
        },
    }
    late = [
        {"learning_rate": rate, "rho": SETTINGS["late_rho"], "after": after}
        for after in SETTINGS["late"]
    ]
    runs = [("curve", m, setting) for m, many in settings.items() for setting in many]
    runs += [("late", "one_sam", setting) for setting in late]
    study = Study(args.output / "diagonal_networks.json", SETTINGS, len(runs) * len(NETWORKS))
    for stage, method, setting in runs:
        for seed, scale in NETWORKS:
            study.run(trainer(scale), stage, method, setting, seed, SETTINGS["steps"], scale=scale)
    report.show(args.output, "diagonal_networks")


if __name__ == "__main__":
    main()

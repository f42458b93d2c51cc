"""A ReLU network with its weights rescaled computes the same: what do SAM and ASAM make of it?

    python examples/reproduce/scale_invariance.py
    python examples/reproduce/scale_invariance.py --backend jax --output docs/results

Kwon et al., 2021: multiply what goes into the ReLUs by c, and divide what comes out of them by c:
the network computes the same, but SAM's sharpness is another one. ASAM's is not. Here both
are measured at one network of each start, rescaled; and networks are trained from the rescaled
starts. There the learning rates are rescaled as well, by c² and 1 / c², with which plain gradient
descent passes through the same functions for each c: what remains is the adversary. A minute of CPU
time.
"""

import command

args = command.parse(__doc__)

import datasets  # noqa: E402
import keras  # noqa: E402
import noise  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
from experiment import Study  # noqa: E402
from full_batch import make_descent  # noqa: E402

from keras_sharp import methods, neighborhoods, sharpness  # noqa: E402

SETTINGS = {
    "data": "digits" if args.quick else "fashion_mnist",
    "train": 100 if args.quick else 500,
    "test": 100 if args.quick else 2000,
    "pixels": 8 if args.quick else 14,
    "width": 16 if args.quick else 64,
    "steps": 20 if args.quick else 1000,
    "learning_rate": 0.2,
    "factors": [1.0, 4.0] if args.quick else [0.25, 0.5, 1.0, 2.0, 4.0],
    "rho": {"gd": 0.0, "sam": 0.1, "asam": 1.0},
    "rho_measured": {"sam": 0.05, "asam": 0.5},
}
SEEDS = args.seeds or (2 if args.quick else 5)

(X, Y), TEST = datasets.load_images(SETTINGS["data"], SETTINGS["train"], SETTINGS["test"])
_every = X.shape[1] // SETTINGS["pixels"]
X, TEST = X[:, ::_every, ::_every], (TEST[0][:, ::_every, ::_every], TEST[1])
NETWORK = keras.Sequential(
    [
        keras.Input(X.shape[1:]),
        keras.layers.Flatten(),
        keras.layers.Dense(SETTINGS["width"], "relu"),
        keras.layers.Dense(10),
    ]
)
NETWORK.compile("sgd", noise.LOSS, metrics=["accuracy"])

#: The region of ASAM for which rescaling makes no difference at all: no size of its own, and biases
#: that go along.
ADAPTIVE = neighborhoods.AdaptiveBall(eta=0.0, scale_biases=True)


def loss(w):
    return noise.LOSS(Y, NETWORK.stateless_call(w, [], X)[0])


DESCENTS = {
    "gd": make_descent([loss], methods.SAM()),
    "sam": make_descent([loss], methods.SAM()),
    "asam": make_descent([loss], methods.SAM(neighborhood=ADAPTIVE)),
}


def rescaled(w, c):
    """Kernel and bias before the ReLUs times c, the kernel behind them divided by c."""
    kernel, bias, out, last = w
    return [c * kernel, c * bias, out / c, last]


def make_start(seed):
    keras.utils.set_random_seed(seed)
    return keras.models.clone_model(NETWORK).get_weights()


def trainer(method, setting, seed, epochs, test):
    del test  # Nothing is chosen.
    c, rates = setting["factor"], np.full(epochs, setting["learning_rate"])
    w = DESCENTS[method](
        rescaled(make_start(seed), c), setting["rho"], rates, [c**2, c**2, c**-2, 1]
    )
    NETWORK.set_weights([keras.ops.convert_to_numpy(v) for v in w])
    train, test = (NETWORK.evaluate(*data, verbose=0) for data in ((X, Y), TEST))
    result = {"train_loss": train[0], "test_loss": test[0], "test_accuracy": test[1]}
    if method == "gd":  # One and the same function for each c, but for rounding.
        for name, region in (("sam", "euclidean"), ("asam", ADAPTIVE)):
            rho = SETTINGS["rho_measured"][name]
            result[f"sharpness_{name}"] = sharpness.max_sharpness(
                NETWORK, X, Y, rho=rho, neighborhood=region
            )
    return result


def main():
    total = len(DESCENTS) * len(SETTINGS["factors"]) * SEEDS
    study = Study(args.output / "scale_invariance.json", SETTINGS, total)
    for method in DESCENTS:
        for factor in SETTINGS["factors"]:
            setting = {
                "learning_rate": SETTINGS["learning_rate"],
                "rho": SETTINGS["rho"][method],
                "factor": factor,
            }
            for seed in range(SEEDS):
                study.run(trainer, "final", method, setting, seed, SETTINGS["steps"])
    report.show(args.output, "scale_invariance")


if __name__ == "__main__":
    main()

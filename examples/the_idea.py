"""The idea in pictures: a sharp minimum, a flat one, and where each method goes.

    python examples/the_idea.py
    python examples/the_idea.py --backend torch --rho 0.3

On the left, a loss with a deep and narrow minimum and a wide one: what is the highest loss within
rho? On the right, a network of two weights. All along the bottom of a valley its loss is zero, but
the valley is narrow at one end and wide at the other. Plain gradient descent stays where it comes
down. SAM comes down as well, and then goes on along the bottom to where the valley is wide.
"""

from common import parse, save

args = parse(
    __doc__,
    epochs=400,
    quick_epochs=5,
    rho=(0.3, "how far away the adversary may go"),
)

import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import ops  # noqa: E402

import keras_sharp  # noqa: E402

START = (-1.8, 0.9)


def two_minima(u):
    """On the left a narrow one, on the right a wide one that is a little higher."""
    return 1.0 - np.exp(-((u + 1) ** 2) / 0.08) - 0.85 * np.exp(-((u - 1) ** 2) / 1.2)


def valley(u, v, exp):
    """Zero where v is zero. Its curvature across falls along u, from 4 to 0.4."""
    return 0.5 * v**2 * (0.4 + 3.6 / (1.0 + exp(2.0 * u)))


class TwoWeights(keras.Model):
    """Its output is a function of its weights alone."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(2,), name="w")

    def call(self, x):
        return ops.zeros_like(x) + valley(self.w[0], self.w[1], ops.exp)


def path(method):
    """Where training goes, an array of points."""
    inner = TwoWeights()
    inner.build((None, 1))
    inner.w.assign(START)
    model = keras_sharp.SharpnessAwareModel(inner, method)
    model.compile(keras.optimizers.SGD(0.2), loss=lambda y, y_pred: ops.mean(y_pred, axis=-1))
    points = [START]
    for _ in range(args.epochs):
        model.train_on_batch(np.zeros((1, 1), "float32"), np.zeros((1, 1), "float32"))
        points.append(ops.convert_to_numpy(inner.w.value))
    return np.array(points)


def worst(u, rho):
    """The highest loss within `rho`."""
    return two_minima(u[:, None] + np.linspace(-rho, rho, 201)).max(axis=1)


def main():
    import matplotlib.pyplot as plt

    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=[1, 1.25]
    )
    u = np.linspace(-2, 2.5, 600)
    left.plot(u, two_minima(u), color="0.15", label="loss")
    for rho, color in ((args.rho / 3, "C0"), (args.rho, "C3")):
        left.plot(u, worst(u, rho), color=color, label=f"highest loss within {rho:g}")
    left.set(xlabel="weight", ylabel="loss", title="What the adversary makes of two minima")
    left.legend(frameon=False)

    u, v = np.meshgrid(np.linspace(-2.5, 2.5, 200), np.linspace(-0.6, 1.2, 200))
    levels = np.geomspace(0.005, 3.0, 16)
    right.contourf(u, v, valley(u, v, np.exp), [0.0, *levels], cmap="Greys", norm="symlog")
    for name, method, color, width in (
        ("plain gradient descent", None, "C0", 3),
        (f"SAM, rho {args.rho:g}", keras_sharp.methods.SAM(args.rho), "C3", 0.9),
    ):
        points = path(method)
        right.plot(*points.T, color=color, linewidth=width, label=name)
        right.plot(*points[-1], "o", color=color, zorder=3)
        print(f"{name} ends at ({points[-1][0]:.2f}, {points[-1][1]:.2f})", flush=True)
    right.plot(*START, "o", color="0.15", label="start")
    right.set(xlabel="first weight", ylabel="second weight", title="Along a valley that gets wider")
    right.legend(loc="upper right")
    save(figure, args.output)


if __name__ == "__main__":
    main()

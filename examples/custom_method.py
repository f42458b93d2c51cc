"""Write a method of your own, in fifteen lines.

    python examples/custom_method.py
    python examples/custom_method.py --backend torch --seed 1

A method is a rule: from the gradient at the weights, and at any other point it
asks for, it makes the direction that the optimizer receives. This one penalizes
the norm of the gradient (Zhao et al., 2022, https://arxiv.org/abs/2202.03599):
it steps along a mixture of the gradients at the weights and at SAM's adversary.
With a mixture of 0 it is SGD, with 1 it is SAM. The picture shows what is in between.
"""

from common import parse, save

args = parse(__doc__, epochs=60, quick_epochs=3)

import keras  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.datasets import make_moons  # noqa: E402

import keras_sharp  # noqa: E402


@keras.saving.register_keras_serializable(package="my_methods")
class GradientNormPenalty(keras_sharp.methods.Method):
    rho = keras_sharp.schedules.Hyperparameter()
    mixture = keras_sharp.schedules.Hyperparameter()

    def __init__(self, rho=0.05, mixture=0.8, **kwargs):
        super().__init__(**kwargs)
        self.rho = rho
        self.mixture = mixture

    def direction(self, objective, w, g, rho, mixture):
        at_adversary = self.gradient_at_adversary(objective, w, g, rho)
        weighted = keras_sharp.vectors.scale(mixture, at_adversary)
        return keras_sharp.vectors.add_scaled(weighted, 1.0 - mixture, g)


# That is all. Schedules, micro-batches, mixed precision, frozen weights, several
# devices and `.keras` files are the business of the wrapper.


def train(mixture, train_data):
    keras.utils.set_random_seed(args.seed)
    hidden = [keras.layers.Dense(32, "relu") for _ in range(3)]
    network = keras.Sequential([keras.Input((2,)), *hidden, keras.layers.Dense(1)])
    model = keras_sharp.SharpnessAwareModel(network, GradientNormPenalty(0.2, mixture))
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)],
    )
    model.fit(*train_data, batch_size=32, epochs=args.epochs, verbose=0)
    return network


def main():
    import matplotlib.pyplot as plt

    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    train_data = make_moons(200, noise=0.3, random_state=args.seed)
    test_data = make_moons(5000, noise=0.3, random_state=args.seed + 1)
    grid = np.stack(np.meshgrid(np.linspace(-2, 3, 80), np.linspace(-1.7, 2.2, 80)), -1)
    mixtures = (0.0, 0.5, 1.0)
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axes, mixture in zip(panels, mixtures, strict=True):
        network = train(mixture, train_data)
        loss, accuracy = network.evaluate(*test_data, batch_size=1000, verbose=0)
        rise = keras_sharp.sharpness.max_sharpness(network, *train_data, rho=0.2)
        print(
            f"mixture {mixture:.1f}: test accuracy {accuracy:.3f}, test loss {loss:.3f}, "
            f"sharpness {rise:.3f}",
            flush=True,
        )
        logits = network.predict(grid.reshape(-1, 2), batch_size=1000, verbose=0)
        axes.contourf(
            *grid.transpose(2, 0, 1),
            1 / (1 + np.exp(-logits.reshape(80, 80))),
            np.linspace(0, 1, 11),
            cmap="RdBu",
            alpha=0.8,
        )
        axes.scatter(*train_data[0].T, c=train_data[1], cmap="RdBu", s=12, edgecolors="k", lw=0.4)
        name = {0.0: " (SGD)", 1.0: " (SAM)"}.get(mixture, "")
        axes.set_title(
            f"mixture {mixture}{name}\ntest {accuracy:.1%}, sharpness {rise:.3f}", size=11
        )
        axes.set_axis_off()
    save(figure, args.output)


if __name__ == "__main__":
    main()

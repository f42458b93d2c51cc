"""A GAN, in which generator and discriminator each have an adversary.

    python examples/gan.py
    python examples/gan.py --backend torch --method gsam --seed 1

The step of a GAN is more than loss and gradient of one model: `SharpnessAwareModel` refuses
a model with a `train_step` like this. `keras_sharp.sharpness_aware_gradient` gives each of the
two networks its direction. The data are eight Gaussians on a ring; the usual failure of a GAN
is to leave some of them out. The step is one function, the same on every backend.
The picture shows what the generator makes, without a method and with one.
"""

from common import compiled, parse, save

args = parse(
    __doc__,
    epochs=20,
    method=("sam", "a method of keras_sharp"),
    rho=(0.05, "its radius"),
)

import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import layers, ops  # noqa: E402

import keras_sharp  # noqa: E402

BATCH = 256
STEPS_PER_EPOCH = 100
SPREAD = 0.05
ANGLES = np.arange(8) * np.pi / 4
CENTERS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1)


def real_points(rng, n):
    noise = SPREAD * rng.normal(size=(n, 2))
    return (CENTERS[rng.integers(0, 8, n)] + noise).astype("float32")


def network(inputs, outputs):
    hidden = [layers.Dense(64, "relu") for _ in range(2)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(outputs)])


def update(optimizer, direction, variables, w, slots):
    """The new weights and variables of an optimizer."""
    if keras.backend.backend() != "tensorflow":
        return optimizer.stateless_apply(slots, direction, w)
    optimizer.apply(direction, variables)  # On TensorFlow, Keras has no stateless one.
    return [ops.convert_to_tensor(v) for v in variables], slots


def train(method):
    """A generator, trained from the seed."""
    keras.utils.set_random_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    generator, discriminator = network(4, 2), network(2, 1)
    optimizers = []
    for model in (generator, discriminator):
        optimizers.append(keras.optimizers.Adam(1e-3, beta_1=0.5))
        optimizers[-1].build(model.trainable_variables)

    groups = [generator.trainable_variables, discriminator.trainable_variables]
    groups += [optimizer.variables for optimizer in optimizers]

    def judge(w, points):
        return discriminator.stateless_call(w, [], points)[0]

    def make(w, z):
        return generator.stateless_call(w, [], z)[0]

    def train_step(g, d, g_slots, d_slots, real, z):
        fake = make(g, z)

        def discriminator_loss(d):
            return ops.mean(ops.softplus(-judge(d, real)) + ops.softplus(judge(d, fake)))

        result = keras_sharp.sharpness_aware_gradient(discriminator_loss, d, method)
        d, d_slots = update(optimizers[1], result.direction, groups[1], d, d_slots)

        def generator_loss(g):
            return ops.mean(ops.softplus(-judge(d, make(g, z))))

        result = keras_sharp.sharpness_aware_gradient(generator_loss, g, method)
        g, g_slots = update(optimizers[0], result.direction, groups[0], g, g_slots)
        return g, d, g_slots, d_slots

    train_step = compiled(train_step)
    state = [[ops.copy(v) for v in group] for group in groups]
    for _ in range(args.epochs * STEPS_PER_EPOCH):
        z = rng.normal(size=(BATCH, 4)).astype("float32")
        real, z = (ops.convert_to_tensor(a) for a in (real_points(rng, BATCH), z))
        state = train_step(*state, real, z)
    for variable, value in zip(groups[0], state[0], strict=True):
        variable.assign(value)
    return generator


def main():
    import matplotlib.pyplot as plt

    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    print(f"{args.epochs * STEPS_PER_EPOCH} steps of {BATCH} points")
    rng = np.random.default_rng(args.seed + 1)
    real, z = real_points(rng, 2000), rng.normal(size=(2000, 4)).astype("float32")
    method = keras_sharp.methods.METHODS[args.method](rho=args.rho)
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    panels[0].scatter(*real.T, s=3)
    panels[0].set_title("data")
    named = [("no adversary", keras_sharp.methods.get(None)), (args.method.upper(), method)]
    for axes, (name, method) in zip(panels[1:], named, strict=True):
        fake = train(method).predict(z, batch_size=2000, verbose=0)
        distances = np.linalg.norm(fake[:, None] - CENTERS, axis=-1)
        near = distances.min(-1) < 3 * SPREAD
        # A Gaussian that gets less than a quarter of its share counts as left out.
        counts = np.bincount(distances.argmin(-1)[near], minlength=8)
        met = int(np.sum(counts > len(z) / 32))
        print(f"{name:>12}: {met} of 8 Gaussians, {near.mean():.1%} of the points on one of them")
        axes.scatter(*fake.T, s=3)
        axes.set_title(f"{name}: {met} of 8, {near.mean():.0%} of the points")
    for axes in panels:
        axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal", xticks=[], yticks=[])
    save(figure, args.output)


if __name__ == "__main__":
    main()

"""One rho, many units: what the same number means in each neighborhood.

    python examples/units_of_rho.py
    python examples/units_of_rho.py --backend torch --dataset fashion_mnist --rho 0.2

Trains a small convolutional network with SAM on images of which 40 % have a wrong label. After
the first epoch, on the way and at the end, it measures what one unit of rho does in each
neighborhood: how long the perturbation is, how far the loss rises to first order, and how far it
does rise. From each of the three follows a rho that is worth as much as SAM's, and they are not
the same. The page docs/explanation/units_of_rho.md explains them.
"""

import functools
import json
import pathlib

from common import compiled, parse, save

args = parse(
    __doc__,
    epochs=25,
    quick_epochs=2,
    dataset=("digits", "auto, fashion_mnist, mnist or digits: see examples/datasets.py"),
    method=("sam", "with which the network is trained: sam, asam or adaptive_gsam"),
    rho=(0.365, "of this method: what to convert"),
    train=(1400, "how many images to train on"),
    label_noise=(0.4, "the share of wrong labels"),
    batches=(8, "how many batches to measure on"),
)

import keras  # noqa: E402
import numpy as np  # noqa: E402
from datasets import load_images, make_network, mislabel  # noqa: E402
from keras import ops  # noqa: E402

import keras_sharp  # noqa: E402
from keras_sharp import neighborhoods, vectors  # noqa: E402

BATCH = 64
#: Name, neighborhood, number of micro-batches, and color.
CASES = {
    "SAM": (neighborhoods.Ball(), 1, "C0"),
    "4 micro-batches": (neighborhoods.Ball(), 4, "C9"),
    "ASAM": (neighborhoods.AdaptiveBall(), 1, "C1"),
    "Adaptive-GSAM": (neighborhoods.WeightScaledBall(), 1, "C3"),
    "p = inf": (neighborhoods.Ball(p=float("inf")), 1, "C2"),
}
#: With which neighborhood each method trains.
METHODS = {"sam": "SAM", "asam": "ASAM", "adaptive_gsam": "Adaptive-GSAM"}
#: The lengths of the perturbation at which the rise is measured, in every neighborhood.
LENGTHS = np.geomspace(0.03, 4.0, 5 if args.quick else 10)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Probe:
    """What the adversary sees of a network: the loss of batches in training mode.

    In inference mode BatchNormalization would keep the statistics of other weights.
    """

    def __init__(self, network):
        self.network = network
        self.loss = compiled(self._loss)
        self.gradient = compiled(self._gradient)
        self.rise = compiled(
            lambda rho, e, w, *batch: self._loss(vectors.add_scaled(w, rho, e), *batch)
        )
        # ASAM leaves biases as they are.
        biases = [v.name in ("bias", "beta") for v in network.trainable_variables]

        def step(region, g, w, of_batch):
            e = region.perturbation(g, w, 1.0, biases)
            length = vectors.norm(e)
            flat = vectors.norm([t for t in e if len(t.shape) == 1])
            share = vectors.quotient(flat, length) ** 2
            return e, length, vectors.dot(g, e), vectors.cosine(of_batch, e), share

        self.steps = {
            name: compiled(functools.partial(step, region))
            for name, (region, _, _) in CASES.items()
        }

    def _loss(self, w, state, x, y):
        y_pred, _ = self.network.stateless_call(w, state, x, training=True)
        return LOSS(y, y_pred)

    def _gradient(self, w, state, x, y):
        # Without a method this is the gradient itself, on every backend.
        return keras_sharp.sharpness_aware_gradient(
            lambda v: self._loss(v, state, x, y), w, method=None
        ).direction

    def measure(self, batches):
        """What one unit of rho does in each neighborhood: dictionaries of means over the batches.

        `length` is that of the perturbation, `slope` the rise of the loss to first order, `cosine`
        that of the angle between the perturbation and the gradient of the batch, `share` how much
        of the squared length is in biases and in BatchNormalization, and `rises` how far the loss
        does rise at each of `radii`.
        """
        w = [ops.stop_gradient(v.value) for v in self.network.trainable_variables]
        state = [ops.stop_gradient(v.value) for v in self.network.non_trainable_variables]
        found = {}
        for name, (_, count, _) in CASES.items():
            parts, steps = [], []
            for x, y in batches:
                of_batch = self.gradient(w, state, x, y)
                for part in zip(split(x, count), split(y, count), strict=True):
                    g = of_batch if count == 1 else self.gradient(w, state, *part)
                    parts.append((w, state, *part))
                    steps.append(self.steps[name](g, w, of_batch))
            perturbations, *numbers = zip(*steps, strict=True)
            length, slope, cosine, share = map(mean, numbers)
            radii = LENGTHS / length
            before = mean(self.loss(*part) for part in parts)
            rises = [
                mean(
                    self.rise(ops.convert_to_tensor(rho, "float32"), e, *part)
                    for e, part in zip(perturbations, parts, strict=True)
                )
                - before
                for rho in radii
            ]
            found[name] = {
                "length": length,
                "slope": slope,
                "cosine": cosine,
                "share": share,
                "radii": radii,
                "rises": np.array(rises),
            }
        return found


def split(array, count):
    return [ops.convert_to_tensor(part) for part in np.split(array, count)]


def mean(numbers):
    return float(np.mean([float(ops.convert_to_numpy(t)) for t in numbers]))


def rise_at(case, rho):
    """How far the loss rises at `rho`: between two measured radii, as a power of rho."""
    return np.exp(np.interp(np.log(rho), np.log(case["radii"]), np.log(case["rises"])))


def rho_for_rise(case, rise):
    """The smallest rho at which the loss rises as far."""
    log_rises = np.maximum.accumulate(np.log(case["rises"]))
    return np.exp(np.interp(np.log(rise), log_rises, np.log(case["radii"])))


def convert(found, rho):
    """For each neighborhood the rho that is worth the given one: by length, slope and rise."""
    known = found[METHODS[args.method]]
    return {
        name: (
            rho * known["length"] / case["length"],
            rho * known["slope"] / case["slope"],
            rho_for_rise(case, rise_at(known, rho)),
        )
        for name, case in found.items()
    }


def size(network):
    w = [v.value for v in network.trainable_variables]
    return float(ops.convert_to_numpy(vectors.norm(w))), sum(int(np.prod(t.shape)) for t in w)


def rows(found):
    """The table of one epoch: dictionaries of numbers by the name of the neighborhood."""
    table = {}
    for name, (by_length, by_slope, by_rise) in convert(found, args.rho).items():
        numbers = {key: found[name][key] for key in ("length", "slope", "cosine", "share")}
        # The rise is that at one length for all.
        numbers["rise"] = float(rise_at(found[name], by_length) / by_length)
        numbers |= {"by_length": by_length, "by_slope": by_slope, "by_rise": float(by_rise)}
        table[name] = numbers
    return table


def print_table(table, title):
    worth = f"worth {METHODS[args.method]} at {args.rho:g}"
    print(f"\n{title}")
    print(f"{'':>15} {'one unit of rho gives':>32} {'in biases':>10} {worth:>31}")
    print(
        f"{'':>15} {'length':>8} {'g.e':>8} {'rise':>6} {'cosine':>7} {'and norms':>10} "
        f"{'by length':>11} {'by slope':>9} {'by rise':>9}"
    )
    for name, of in table.items():
        print(
            f"{name:>15} {of['length']:>8.3f} {of['slope']:>8.3f} {of['rise']:>6.3g} "
            f"{of['cosine']:>7.3f} {of['share']:>10.1%} "
            f"{of['by_length']:>11.3g} {of['by_slope']:>9.3g} {of['by_rise']:>9.3g}",
            flush=True,
        )


def picture(measured):
    """The rise over rho and over the length of the perturbation, early and late."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        2, 2, figsize=(13, 8.5), sharey="row", sharex="col", layout="constrained"
    )
    known = METHODS[args.method]
    for row, epoch in zip(panels, (min(measured), max(measured)), strict=True):
        found = measured[epoch]
        worth = convert(found, args.rho)
        level, length = rise_at(found[known], args.rho), args.rho * found[known]["length"]
        row[0].axhline(level, color="0.6", lw=0.8, ls="--")
        row[1].axvline(length, color="0.6", lw=0.8, ls="--")
        ends = []
        for name, case in found.items():
            by_length, _, by_rise = worth[name]
            style = {"color": CASES[name][2], "lw": 2}
            row[0].loglog(case["radii"], case["rises"], **style)
            row[1].loglog(LENGTHS, case["rises"], **style)
            style = {"color": style["color"], "marker": "o", "ms": 7, "zorder": 3}
            row[0].plot(by_rise, level, **style)
            row[1].plot(length, rise_at(case, by_length), **style)
            # Those of the right, where there is room: the others on the left of their lines.
            side = "left" if name in ("p = inf", "Adaptive-GSAM") else "right"
            row[0].text(
                case["radii"][0] * (1.5 if side == "left" else 0.8),
                case["rises"][0],
                f"{name}: {by_rise:.3g}",
                **{"color": style["color"], "ha": side, "va": "center"},
            )
            ends.append((case["rises"][-1], f"{name}: {by_length:.3g}", style["color"]))
        place = 0.0
        for rise, text, color in sorted(ends):
            # As near to the end of the line as the label below leaves room.
            place = max(rise, place * 1.45)
            row[1].text(LENGTHS[-1] * 1.12, place, text, color=color, va="center")
        row[0].set_ylim(top=2.5 * max(rise for rise, _, _ in ends))
        row[0].set_ylabel("rise of the loss of a batch")
        row[0].set_title(f"after epoch {epoch}, over rho", loc="left")
        row[1].set_title(f"after epoch {epoch}, over the length of the perturbation", loc="left")
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
    panels[1, 0].set_xlabel(
        f"rho, in the unit of each neighborhood\n(dots, numbers: with the same rise as {known} at "
        f"{args.rho:g})"
    )
    panels[1, 1].set_xlabel(
        f"length ‖e‖₂\n(dots, numbers: the rho with the same length as {known} at {args.rho:g})"
    )
    panels[1, 1].set_xlim(right=LENGTHS[-1] * 12)
    return figure


def main():
    print(f"Backend: {keras.backend.backend()}, Keras {keras.__version__}")
    count = 256 if args.quick else args.train
    (x, y), _ = load_images(args.dataset, num_train=count)
    y = mislabel(y, args.label_noise)
    keras.utils.set_random_seed(args.seed)
    network = make_network(x.shape[1:])
    model = keras_sharp.SharpnessAwareModel(
        network, keras_sharp.methods.METHODS[args.method](args.rho)
    )
    steps = args.epochs * -(-len(x) // BATCH)
    model.compile(
        keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, steps), momentum=0.9),
        LOSS,
    )
    order = np.random.default_rng(args.seed).permutation(len(x))
    chosen = [order[i * BATCH : (i + 1) * BATCH] for i in range(2 if args.quick else args.batches)]
    batches = [(x[i], y[i]) for i in chosen]
    probe = Probe(network)

    measured, epochs, done = {}, [], 0
    for epoch in sorted({1, max(1, args.epochs // 5), args.epochs}):
        history = model.fit(x, y, batch_size=BATCH, epochs=epoch, initial_epoch=done, verbose=0)
        done = epoch
        measured[epoch] = probe.measure(batches)
        length, n = size(network)
        loss, table = history.history["loss"][-1], rows(measured[epoch])
        print_table(
            table, f"After epoch {epoch}: loss {loss:.3f}, {n:,} weights of the length {length:.2f}"
        )
        epochs.append({"epoch": epoch, "loss": loss, "norm": length, "weights": n, "table": table})
    save(picture(measured), args.output)
    numbers = pathlib.Path(args.output).with_suffix(".json")
    content = vars(args) | {"backend": keras.backend.backend(), "measured": epochs}
    content.pop("output")
    numbers.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print(f"Numbers: {numbers}")


if __name__ == "__main__":
    main()

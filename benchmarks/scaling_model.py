"""What a step sends, and how training would scale by that: a simulation, not a measurement.

    python benchmarks/scaling_model.py            # the tables; draws docs/scaling.png

The counts of `messages` are what `tests/test_distribution.py` counts in real steps. Times follow
from them and from published link speeds, with the usual lower bound for an all-reduce of `b` bytes
on a ring of `n` devices, `2 (n - 1) / n * b / speed`. Latency is left out, and computation and
communication do not overlap.
"""

import pathlib

#: How many gradients a step takes. Plain training is None, as in SharpnessAwareModel.
GRADIENTS = {None: 1, "sam": 2, "asam": 2, "gsam": 2, "adaptive_gsam": 2, "bsam": 3}
BYTES = 4  # of a weight, in float32

#: ResNet-50 on a fast device: its weights, and the seconds of one gradient.
WEIGHTS, SECONDS = 25.6e6, 0.030

#: Bytes per second that a device sends, as published.
LINKS = {
    "NVLink 4 (H100)": 450e9,  # 900 GB/s in both directions
    "ICI (TPU v5p)": 600e9,  # 1,200 GB/s in both directions
    "InfiniBand NDR": 50e9,  # 400 Gb/s
    "Ethernet, 10 Gb/s": 1.25e9,
}


def messages(method, scope, num_micro_batches=1):
    """How many gradients of the size of the model a step adds up over the replicas."""
    if scope == "replica":
        return 1  # The direction.
    return GRADIENTS[method] * num_micro_batches


def seconds_of_messages(count, devices, speed, weights=WEIGHTS):
    """How long so many all-reduces take on a ring."""
    return count * 2 * (devices - 1) / devices * BYTES * weights / speed


def efficiency(method, scope, devices, speed):
    """The share of the time that goes into computing; 1 is perfect scaling."""
    computing = GRADIENTS[method] * SECONDS
    return computing / (computing + seconds_of_messages(messages(method, scope), devices, speed))


CURVES = [
    ("plain", None, "global"),
    ("SAM, global", "sam", "global"),
    ("SAM, replica", "sam", "replica"),
    ("BSAM, global", "bsam", "global"),
    ("BSAM, replica", "bsam", "replica"),
]
PLACES = [
    ("8 GPUs, NVLink 4", 8, "NVLink 4 (H100)"),
    ("TPU v5p, 256 chips", 256, "ICI (TPU v5p)"),
    ("64 machines, InfiniBand", 64, "InfiniBand NDR"),
    ("64 machines, Ethernet", 64, "Ethernet, 10 Gb/s"),
]


def tables():
    """Both tables of docs/scaling.md."""
    lines = ["| method | scope | all-reduces per step | bytes per step, ResNet-50 |"]
    lines += ["|---|---|---|---|"]
    for method in GRADIENTS:
        for scope in ("global", "replica"):
            count = messages(method, scope)
            megabytes = count * BYTES * WEIGHTS / 1e6
            lines.append(f"| {method or 'plain'} | {scope} | {count} | {megabytes:.0f} MB |")
    lines += ["", "| simulated share of computing | " + " | ".join(c[0] for c in CURVES) + " |"]
    lines += ["|---" * (len(CURVES) + 1) + "|"]
    for place, devices, link in PLACES:
        shares = [f"{efficiency(m, s, devices, LINKS[link]):.1%}" for _, m, s in CURVES]
        lines.append(f"| {place} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def draw(path):
    """The share of computing over the number of devices, on two links between machines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    devices = [2**i for i in range(9)]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, link in zip(axes, ("InfiniBand NDR", "Ethernet, 10 Gb/s"), strict=True):
        for name, method, scope in [
            ("BSAM, replica", "bsam", "replica"),
            ("SAM, replica", "sam", "replica"),
            ("plain; all methods, global", None, "global"),
        ]:
            shares = [efficiency(method, scope, n, LINKS[link]) for n in devices]
            axis.plot(devices, shares, "o-", markersize=4, label=name)
        axis.set(xscale="log", xlabel="machines", title=link, ylim=(0, 1.02))
        axis.set_xticks(devices, devices)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:.0%}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of the time that computes")
    axes[0].legend(frameon=False, loc="lower left")
    figure.suptitle("SIMULATION from counted messages and published link speeds; ResNet-50")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    print(tables())
    draw(pathlib.Path(__file__).resolve().parent.parent / "docs" / "scaling.png")

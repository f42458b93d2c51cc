"""What a step costs: from the files of `benchmarks/step_cost.py`."""

import numpy as np
from results import ROOT, load

#: The networks of the benchmarks, and the programs that ran them.
WORKLOADS = {"W1": "CNN with BatchNormalization", "W2": "MLP", "W3": "transformer"}
WORKERS = {
    "tensorflow-jit": "TensorFlow, XLA",
    "tensorflow": "TensorFlow, graph",
    "jax": "JAX",
    "torch": "PyTorch",
}


#: The rows of the table of what costs less, measured on the MLP.
CHEAPER = {
    "sam": "SAM",
    "every_10": '`Every("sam", 10)`',
    "looksam_10": "`LookSAM(k=10)`",
    "looksam_5": "`LookSAM(k=5)`",
    "ascent_share": "`SAM(ascent_share=0.25)`",
    "async_sam": "`AsyncSAM()`",
    "momentum_sam": "`MomentumSAM()`",
    "friendly_sam": "`FriendlySAM()`",
    "wsam": "`WSAM()`",
}
FOLDER = ROOT / "benchmarks" / "results"


def cost():
    """CPU time of a step of SAM and of BSAM, in plain steps: the median over the rounds."""
    blocks = {name: load(FOLDER, name)["blocks"] for name in WORKLOADS}
    lines = [
        f"| SAM / BSAM, in plain steps | {' | '.join(WORKLOADS.values())} |",
        "|---" * (len(WORKLOADS) + 1) + "|",
    ]
    for worker, title in WORKERS.items():
        cells = [
            " / ".join(f"{_ratio(blocks[name], worker, m):.2f}" for m in ("sam", "bsam"))
            for name in WORKLOADS
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def cheaper():
    """CPU time of a step of each of `CHEAPER`, likewise."""
    blocks = load(FOLDER, "cheaper")["blocks"]
    lines = [f"| | {' | '.join(WORKERS.values())} |", "|---" * (len(WORKERS) + 1) + "|"]
    for contestant, name in CHEAPER.items():
        cells = [f"{_ratio(blocks, worker, contestant):.2f}" for worker in WORKERS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _ratio(blocks, worker, contestant):
    """The median over the rounds of the time of a step over that of a plain step."""
    times = {
        (b["contestant"], b["round"]): b["cpu_s"] / b["steps"]
        for b in blocks
        if b["worker"] == worker
    }
    rounds = [n for name, n in times if name == contestant]
    return float(np.median([times[contestant, n] / times["plain", n] for n in rounds]))


TABLES = {"cost": cost, "cheaper": cheaper}

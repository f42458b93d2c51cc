"""Which rho: the advice of the range test against a full grid."""

import numpy as np
from results import NAMES, conditions, entries, mean_and_error, panels


def claims(content):
    del content  # No paper has claimed anything.
    return ()


def grid(content, data):
    """The final validation loss for each rho: a list of arrays with one entry per seed."""
    found = entries(content, stage="search", data=data)
    rhos = sorted({e["setting"]["rho"] for e in found})
    return np.array(rhos), [
        np.array([e["validation_loss"] for e in found if e["setting"]["rho"] == rho])
        for rho in rhos
    ]


def _tests(content, data, share):
    """The range tests of a length, by seed."""
    start = f"{data}, {share:g}, "
    return [test for key, test in content["tests"].items() if key.startswith(start)]


def table(content):
    """The advice of the range test against the best of the grid."""
    lines = [
        "| data | test of | recommended rho, by seed | validation loss at the end with these | "
        "best of the grid | plain training |",
        "|---" * 6 + "|",
    ]
    for data in conditions(content):
        rhos, losses = grid(content, data)
        means = [float(np.mean(values)) for values in losses]
        best = int(np.argmin(means))
        epochs = content["settings"]["epochs"][data]
        for share in content["settings"]["shares"]:
            advice = [test["recommended"] for test in _tests(content, data, share)]
            ours = np.mean([means[int(np.argmin(np.abs(rhos - rho)))] for rho in advice])
            by_seed = ", ".join(f"{rho:g}" for rho in advice)
            lines.append(
                f"| {NAMES[data]} | {share * epochs:g} of {epochs} epochs | {by_seed} | "
                f"{ours:.4f} | {means[best]:.4f} (rho {rhos[best]:g}) | {means[0]:.4f} |"
            )
    return lines


TABLES = {"which_rho": table}


def summary(content):
    return ["", *table(content)]


def picture(content):
    data = conditions(content)
    figure, row = panels(1, len(data), width=4.4)
    for panel, name in zip(row[0], data, strict=True):
        rhos, losses = grid(content, name)
        means, errors = zip(*map(mean_and_error, losses), strict=True)
        panel.axhline(means[0], color="gray", ls="--", label="plain training")
        panel.errorbar(
            rhos[1:], means[1:], errors[1:], marker="o", color="black", label="at the end"
        )
        for i, share in enumerate(content["settings"]["shares"]):
            tests = _tests(content, name, share)
            curve = np.mean([test["val_loss"] for test in tests], 0)[1:]
            panel.plot(rhos[1:], curve, ":", marker=".", color=f"C{i}")
            # What the tests advise, marked where these trainings then end.
            for test in tests:
                end = np.interp(test["recommended"], rhos, means)
                panel.plot(test["recommended"], end, "o", ms=11 - 2 * i, mfc="none", color=f"C{i}")
            panel.plot(
                [], [], ":", marker="o", mfc="none", color=f"C{i}", label=f"test of {share:.0%}"
            )
        panel.set(xlabel="rho", ylabel="validation loss", xscale="log", yscale="log")
        panel.set_title(NAMES[name], loc="left")
    row[0][0].legend(frameon=False, fontsize=8)
    return figure

"""Pictures of what training and probes have found. They need matplotlib.

Every function returns a `matplotlib.figure.Figure`, made with pyplot: a
notebook shows it, and `figure.savefig("name.png")` saves it. Where one thing
can be drawn, a dictionary of several, by the names for the legend, is drawn
side by side.
"""

import numpy as np

from keras_sharp.landscape import PathPlane, Plane

__all__ = [
    "eigenvalue_history",
    "landscape",
    "per_layer",
    "rho_range",
    "spectral_density",
    "training_curves",
]


def training_curves(histories, keys=None):
    """The logs of training over the epochs, one panel per key.

    Args:
        histories: what `fit` returned, a `keras.callbacks.History`; or the
            dictionary `history` of it, or of a
            `keras_sharp.callbacks.SharpnessProbe`. Or a dictionary of
            several.
        keys: list of keys of the logs. Defaults to `None`: all of them, with
            those of the validation dashed beside the others.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to draw.

    Example:

    >>> history = {"loss": [1.0, 0.5, 0.3], "val_loss": [1.1, 0.7, 0.6]}
    >>> figure = keras_sharp.plots.training_curves({"sgd": history})
    """
    runs = _by_name(_logs, histories)
    present = list(dict.fromkeys(key for logs in runs.values() for key in logs if key != "epoch"))
    together = keys is None
    if together:
        keys = [key for key in present if not key.startswith("val_")]
    missing = [key for key in keys if key not in present]
    if missing or not keys:
        raise ValueError(
            f"There are no logs to draw. Received: keys={keys}, of which {missing} are in none of "
            f"the histories. Expected some of {present}."
        )
    figure, panels = _panels(len(keys))
    for panel, key in zip(panels, keys, strict=True):
        for i, (name, logs) in enumerate(runs.items()):
            if key in logs:
                _over_epochs(panel, logs, key, color=f"C{i}", label=name or key)
            if together and f"val_{key}" in logs:
                label = f"{name or key}, validation"
                _over_epochs(panel, logs, f"val_{key}", color=f"C{i}", ls="--", label=label)
        panel.set(xlabel="epoch", ylabel=key)
        _finish(panel, integer=True)
    return figure


def eigenvalue_history(histories):
    """The largest eigenvalues of the Hessian over the epochs, and their ratio.

    Args:
        histories: the attribute `history` of a
            `keras_sharp.callbacks.HessianProbe`. Or a dictionary of several,
            of which the largest eigenvalue is drawn.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to draw.

    Example:

    >>> history = {"epoch": [0, 1], "hessian_lambda_1": [9.0, 7.0], "hessian_lambda_2": [4.0, 5.0]}
    >>> figure = keras_sharp.plots.eigenvalue_history(history)
    """
    runs = _by_name(_logs, histories)
    if not all(logs.get("epoch") and "hessian_lambda_1" in logs for logs in runs.values()):
        raise ValueError(
            "There are no eigenvalues to draw. Received: histories with the keys "
            f"{[list(logs) for logs in runs.values()]}. Expected the `history` of a HessianProbe, "
            "after training."
        )
    with_ratio = all("hessian_ratio" in logs for logs in runs.values())
    figure, panels = _panels(2 if with_ratio else 1)
    for i, (name, logs) in enumerate(runs.items()):
        if name is None:
            keys = [key for key in logs if "hessian_lambda_" in key]
            for j, key in enumerate(keys):
                style = {"color": "C0", "alpha": 1 - 0.75 * j / len(keys)}
                _over_epochs(panels[0], logs, key, label=f"$\\lambda_{{{j + 1}}}$", **style)
        else:
            _over_epochs(panels[0], logs, "hessian_lambda_1", color=f"C{i}", label=name)
        if with_ratio:
            _over_epochs(panels[1], logs, "hessian_ratio", color=f"C{i}", label=name)
    panels[0].set(
        xlabel="epoch",
        ylabel="eigenvalues of the Hessian" if None in runs else "largest eigenvalue $\\lambda_1$",
    )
    if with_ratio:
        counts = {min(5, sum("hessian_lambda_" in key for key in logs)) for logs in runs.values()}
        last = counts.pop() if len(counts) == 1 else "k"
        panels[1].set(xlabel="epoch", ylabel=f"ratio $\\lambda_1 / \\lambda_{{{last}}}$")
    for panel in panels:
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
        _finish(panel, integer=True)
    return figure


def spectral_density(densities, sigma=None):
    """The distribution of the eigenvalues of the Hessian, on a logarithmic scale.

    Args:
        densities: a `keras_sharp.curvature.SpectralDensity`. Or a dictionary
            of several, which are drawn over each other.
        sigma: Float > 0, the width of the Gaussian that each mass is spread
            to. Defaults to `None`: a hundredth of the widest spectrum.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to draw.

    Example:

    >>> Density = keras_sharp.curvature.SpectralDensity
    >>> sgd = Density(np.array([-1.0, 0.0, 9.0]), np.array([0.1, 0.8, 0.1]), products=3)
    >>> figure = keras_sharp.plots.spectral_density({"sgd": sgd})
    """
    spectra = _by_name(lambda density: density, densities)
    low = min(density.nodes[0] for density in spectra.values())
    high = max(density.nodes[-1] for density in spectra.values())
    if sigma is None:
        sigma = 0.01 * (high - low) or 1.0
    grid = np.linspace(low - 4 * sigma, high + 4 * sigma, 2000)
    figure, (panel,) = _panels(1, width=6.5)
    highest, floor = 0.0, np.inf
    for i, (name, density) in enumerate(spectra.items()):
        values = density.density(grid, sigma)
        highest = max(highest, values.max())
        # Down to a bump as high as the smallest mass that is not rounding.
        floor = min(floor, density.weights[density.weights > 1e-7].min() / sigma)
        panel.fill_between(grid, values, color=f"C{i}", alpha=0.12, lw=0)
        panel.plot(grid, values, color=f"C{i}", lw=1.5, label=name)
    panel.set(xlabel="eigenvalue of the Hessian", ylabel="density", yscale="log")
    panel.set_ylim(0.1 * floor, 3 * highest)
    panel.set_xlim(grid[0], grid[-1])
    _finish(panel)
    return figure


def per_layer(found):
    """Largest eigenvalue and trace of each layer's block of the Hessian, as bars.

    Args:
        found: a `keras_sharp.curvature.PerLayer`. Or a dictionary of several,
            whose bars lie side by side.

    Returns:
        A `matplotlib.figure.Figure` with two panels; the lines at the ends of
        the bars are the residuals, and the standard errors.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to draw.

    Example:

    >>> numbers = np.ones((4, 2))
    >>> sgd = keras_sharp.curvature.PerLayer(("first", "last"), [6, 3], *numbers, products=130)
    >>> figure = keras_sharp.plots.per_layer({"sgd": sgd})
    """
    named = _by_name(lambda one: one, found)
    layers = list(dict.fromkeys(name for one in named.values() for name in one.names))
    height, width = 0.8 / len(named), 4.2
    figure, panels = _panels(2, width, height=max(2.4, 0.8 + 0.3 * len(layers)))
    for i, (name, one) in enumerate(named.items()):
        rows = [layers.index(layer) + (i + 0.5) * height - 0.4 for layer in one.names]
        values = ((one.lambda_max, one.residuals), (one.traces, one.standard_errors))
        for panel, (lengths, errors) in zip(panels, values, strict=True):
            panel.barh(rows, lengths, height, xerr=errors, color=f"C{i}", label=name)
    panels[0].set(xlabel="largest eigenvalue $\\lambda_1$")
    panels[1].set(xlabel="trace")
    for panel, labels in zip(panels, (layers, []), strict=True):
        panel.set_yticks(range(len(layers)), labels or [""] * len(layers))
        panel.set_ylim(len(layers) - 0.5, -0.5)  # The first layer at the top.
        panel.axvline(0, color="black", lw=0.8)
        _finish(panel)
    return figure


def rho_range(found):
    """What short trainings with several radii came to, and which is recommended.

    Args:
        found: a `keras_sharp.RhoRange`, from `keras_sharp.rho_range_test`.

    Returns:
        A `matplotlib.figure.Figure` with three panels over rho: the losses;
        the sharpness; what the adversary's step did and what it should have
        done, and the cosine of the gradients. Plain training is the dashed
        line.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:

    >>> rows = np.array([[0.0, 0.01, 0.1], *np.ones((6, 3))])
    >>> found = keras_sharp.RhoRange(*rows, initial_val_loss=2.0, recommended=0.1)
    >>> figure = keras_sharp.plots.rho_range(found)
    """
    figure, (left, middle, right) = _panels(3)
    rho = found.rho[1:]
    for panel, name, label, color in (
        (left, "val_loss", "validation loss", "C0"),
        (left, "loss", "training loss", "C1"),
        (middle, "sharpness", "sharpness", "C2"),
    ):
        values = getattr(found, name)
        _curve(panel, rho, values[1:], color=color, label=label)
        panel.axhline(values[0], color=color, ls="--", lw=1)
    _curve(right, rho, found.gain[1:], color="C3", label="rise of the loss")
    _curve(right, rho, found.predicted_gain[1:], color="C4", ls="--", label="if it were linear")
    cosine = right.twinx()
    _curve(cosine, rho, found.cosine[1:], color="C7", ls=":")
    right.plot([], [], color="C7", ls=":", label="cosine of the gradients")  # for the legend
    cosine.set_ylabel("cosine of the gradients", color="C7")
    cosine.set(ylim=(min(0, found.cosine.min()), 1.02))
    cosine.spines["top"].set_visible(False)
    log = min(found.val_loss.min(), found.loss.min()) > 0
    left.set(ylabel="loss", yscale="log" if log else "linear")
    middle.set(ylabel="sharpness")
    right.set(ylabel="adversary's step")
    for panel in (left, middle):
        panel.plot([], [], color="black", ls="--", lw=1, label="dashed: no adversary")
    for panel in (left, middle, right):
        if found.recommended > 0:
            panel.axvline(found.recommended, color="black", lw=1, alpha=0.6)
        panel.set(xlabel="rho", xscale="log")
        _finish(panel)
    left.set_title(f"recommended: rho = {found.recommended:.3g}", fontsize="medium")
    right.spines["right"].set_visible(True)
    return figure


def landscape(slices, log=True):
    """Slices of the loss: lines over each other, planes side by side.

    Paths are drawn in their plane, each from a circle to a star.

    Args:
        slices: a `keras_sharp.landscape.Line`, `Plane` or `PathPlane`. Or a
            dictionary of several lines, or of several planes. Planes have a
            common scale of colors.
        log: Boolean, whether the scale of the loss is logarithmic, if all
            losses are positive. Defaults to `True`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to draw, or lines and planes are mixed.

    Example:

    >>> line = keras_sharp.landscape.Line(np.array([-1.0, 0.0, 1.0]), np.array([4.0, 1.0, 3.0]))
    >>> figure = keras_sharp.plots.landscape({"sgd": line})
    """
    named = _by_name(lambda one: one, slices)
    planes = {isinstance(one, (Plane, PathPlane)) for one in named.values()}
    if len(planes) > 1:
        raise ValueError("Lines and planes are drawn apart. Received: some of both.")
    losses = np.concatenate([np.ravel(one.losses) for one in named.values()])
    losses = losses[np.isfinite(losses)]
    if not losses.size:
        raise ValueError("There is nothing to draw: no loss in these slices is finite.")
    log = log and losses.min() > 0
    return (_planes if planes.pop() else _lines)(named, losses, log)


def _lines(named, losses, log):
    figure, (panel,) = _panels(1, width=5.5)
    for i, (name, line) in enumerate(named.items()):
        _curve(panel, line.coordinates, line.losses, color=f"C{i}", label=name)
    panel.set(xlabel="coordinate $t$", ylabel="loss", yscale="log" if log else "linear")
    _finish(panel)
    return figure


def _planes(named, losses, log):
    figure, panels = _panels(len(named), height=3.7)
    levels = (np.geomspace if log else np.linspace)(losses.min(), losses.max(), 21)
    for panel, (name, plane) in zip(panels, named.items(), strict=True):
        # Matplotlib has the first axis of an array upwards.
        colors = panel.contourf(
            plane.first,
            plane.second,
            np.ma.masked_invalid(plane.losses.T),
            levels=levels,
            norm="log" if log else "linear",
            cmap="viridis",
        )
        panel.contour(colors, colors="white", linewidths=0.4, alpha=0.5)
        panel.set(title=name)
        if isinstance(plane, PathPlane):
            _paths(panel, plane)
        else:
            panel.plot(0, 0, "+", color="white", ms=9)  # the weights of the model
            panel.set(xlabel="first direction", ylabel="second direction", aspect="equal")
    bar = figure.colorbar(colors, ax=panels, label="loss", shrink=0.9, ticks=levels[::5])
    bar.ax.set_yticklabels([f"{level:.2g}" for level in levels[::5]])
    return figure


def _paths(panel, plane):
    """The paths of trainings, from the circle to the star, in their plane."""
    for i, (name, points) in enumerate(plane.paths.items()):
        # White, or in colors that stand out on the dark ones and on the bright ones.
        style = {"color": "white" if len(plane.paths) == 1 else ["C1", "white", "C3", "C6"][i % 4]}
        panel.plot(*points.T, ".-", lw=1, ms=4, label=name, **style)
        for end, marker, size in ((0, "o", 7), (-1, "*", 13)):
            panel.plot(*points[end], marker, ms=size, mec="black", **style)
    first, second = (f"{share:.0%} of the variance" for share in plane.shares)
    panel.set(xlabel=f"first direction, {first}", ylabel=f"second direction, {second}")
    if len(plane.paths) > 1:
        panel.legend(facecolor="gray", labelcolor="white", edgecolor="none")


def _by_name(read, given):
    """What is given by names, read; one that has no name has the name `None`."""
    several = isinstance(given, dict) and all(
        isinstance(one, (dict, tuple)) or hasattr(one, "history") for one in given.values()
    )
    if several and not given:
        raise ValueError("There is nothing to draw. Received: an empty dictionary.")
    return {name: read(one) for name, one in (given if several else {None: given}).items()}


def _logs(history):
    """The dictionary of a `History` or of a probe, with the epochs where they are known."""
    if isinstance(history, dict):
        logs = history
    else:
        logs = {"epoch": getattr(history, "epoch", None), **history.history}
    return {key: values for key, values in logs.items() if key != "density"}


def _panels(count, width=4.2, height=3.4):
    """A figure with panels in a row."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "keras_sharp.plots needs matplotlib, which is not installed. Install it by "
            "`pip install keras-sharp[plots]`."
        ) from error
    size = (width * count, height)
    figure, panels = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False)
    return figure, list(panels[0])


def _curve(panel, x, y, **style):
    panel.plot(x, y, lw=1.5, marker="o" if len(x) <= 10 else None, ms=3, **style)


def _over_epochs(panel, logs, key, **style):
    """A curve over the epochs, counted from 1; over the entries where these are fewer."""
    values, epochs = logs[key], logs.get("epoch")
    if epochs is None or len(epochs) != len(values):
        epochs = range(len(values))
    _curve(panel, np.array(epochs) + 1, values, **style)


def _finish(panel, integer=False):
    """A legend where there are names; no frame; whole numbers where they are counts."""
    labels = panel.get_legend_handles_labels()[1]
    if len(labels) > 1 or (labels and panel.get_ylabel() != labels[0]):
        panel.legend(framealpha=0.8, edgecolor="none")
    panel.spines[["top", "right"]].set_visible(False)
    if integer:
        panel.xaxis.get_major_locator().set_params(integer=True)

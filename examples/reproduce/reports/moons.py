"""Moons: the claims of the Adaptive-GSAM report."""

from results import ADAPTIVE_GSAM, NAMES, claim, compared, dots, every_table, methods, panels

SHOWN = ("accuracy", "loss")


def claims(content):
    yield claim(
        "Adaptive-GSAM is more accurate than GSAM on moons",
        ADAPTIVE_GSAM,
        "89.0 % against 85.7 %",
        compared(content, "accuracy", "adaptive_gsam", "gsam"),
    )
    yield claim(
        "its test loss is lower",
        ADAPTIVE_GSAM,
        "0.27 against 0.33",
        compared(content, "loss", "adaptive_gsam", "gsam"),
    )


TABLES = {"moons": lambda content: methods(content, SHOWN)}


def summary(content):
    return every_table(content, SHOWN)


def picture(content):
    figure, ((left, right),) = panels(1, 2, width=4.6)
    for panel, name, scale in ((left, "accuracy", 100), (right, "loss", 1)):
        dots(panel, content, name)
        published = {"gsam": (85.7, 0.33), "adaptive_gsam": (89.0, 0.27)}
        for i, method in enumerate(NAMES):
            if method in published:
                value = published[method][scale == 1]
                label = "published" if method == "gsam" else None
                panel.plot(value, i, "x", color=f"C{i}", ms=8, label=label)
        known = {"best possible": ("bayes", "-"), "straight line": ("line", "--")}
        for label, (key, style) in known.items():
            if key in content:
                value = scale * content[key][name][0]
                panel.axvline(value, color="black", lw=1, ls=style, label=label)
    right.legend(frameon=False)
    return figure

"""An adversary for each m examples."""

from results import (
    NUMBERS,
    SAM,
    Comparison,
    claim,
    entries,
    mean_and_error,
    panels,
    row,
    search_over_rho,
)

SHOWN = ("accuracy", "loss")


def finals(content):
    """The final trainings by method and m, SGD first, then SAM by falling m."""
    settings = content["settings"]
    keys = [("sgd", settings["batch_size"]), *(("sam", m) for m in settings["m"])]
    return {key: entries(content, stage="final", method=key[0], m=key[1]) for key in keys}


def claims(content):
    number, runs = NUMBERS["accuracy"], finals(content)
    largest, *smaller = content["settings"]["m"]
    comparisons = [
        Comparison(
            *([number.read(run) for run in runs["sam", m]] for m in (one, largest)),
            number,
            f"m = {one} and {largest}: ",
        )
        for one in smaller
    ]
    text = "SAM is more accurate with a smaller m than with one adversary for the batch"
    yield claim(text, SAM, "a picture", comparisons)


def table(content):
    titles = " | ".join(NUMBERS[name].title for name in SHOWN)
    lines = [f"| | m | chosen setting | {titles} | seeds |", "|---" * (len(SHOWN) + 4) + "|"]
    for (method, m), runs in finals(content).items():
        lines.append(row("SGD | -" if method == "sgd" else f"SAM | {m}", runs, SHOWN))
    return lines


TABLES = {"m_sharpness": table}


def summary(content):
    return ["", *table(content)]


def picture(content):
    """The test accuracy over m, and the validation accuracy over rho that chose."""
    figure, ((left, right),) = panels(1, 2, width=5.2)
    runs, number = finals(content), NUMBERS["accuracy"]
    plain, error = mean_and_error([number.read(run) for run in next(iter(runs.values()))])
    left.axhline(plain, color="C0", label="SGD, the best learning rate")
    left.axhspan(plain - error, plain + error, color="C0", alpha=0.15, lw=0)
    ms = content["settings"]["m"]
    means, errors = zip(
        *(mean_and_error([number.read(run) for run in runs["sam", m]]) for m in ms), strict=True
    )
    left.errorbar(ms, means, errors, marker="o", color="C1", capsize=3, label="SAM, the best rho")
    left.set(xscale="log", xlabel="m, examples per adversary", ylabel="test accuracy, %")
    left.set_xticks(ms, [str(m) for m in ms])
    left.minorticks_off()
    left.legend(frameon=False)
    for i, m in enumerate(ms):
        search_over_rho(right, content, f"m = {m}", f"C{i + 1}", method="sam", m=m)
    return figure

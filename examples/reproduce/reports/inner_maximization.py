"""More ascent steps, and the second-order term."""

from results import (
    NAMES,
    SAM,
    UNDERSTANDING_SAM,
    claim,
    compared,
    dots,
    every_table,
    methods,
    panels,
    search_over_rho,
)

SHOWN = ("accuracy", "loss")


def claims(content):
    for text, source, method in (
        ("two ascent steps are more accurate than one", UNDERSTANDING_SAM, "sam_2_steps"),
        ("and so are five", UNDERSTANDING_SAM, "sam_5_steps"),
        ("and SAM with the second-order term", SAM, "sam_second_order"),
    ):
        comparisons = compared(content, "accuracy", method, "sam")
        yield claim(text, source, "found not to be so", comparisons)


TABLES = {"inner_maximization": lambda content: methods(content, SHOWN)}


def summary(content):
    return every_table(content, SHOWN)


def picture(content):
    """The test accuracies, and the validation accuracy over rho that chose."""
    figure, ((left, right),) = panels(1, 2, width=5.2)
    dots(left, content, "accuracy")
    present = list(dict.fromkeys(run["method"] for run in content["runs"]))
    for i, method in enumerate(present):
        search_over_rho(right, content, NAMES[method], f"C{i}", method=method)
    return figure

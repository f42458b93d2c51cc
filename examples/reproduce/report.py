"""Fills the tables of the pages from the JSON files, and draws the pictures. It imports no Keras.

    python examples/reproduce/report.py

writes the tables of all pages anew, and docs/does_it_help.png, from docs/results/*.json and
benchmarks/results/*.json. What a study says of its file stands in `reports`, one module each:

| name | what |
|---|---|
| `claims(content)` | rows of the table of claims |
| `TABLES` | functions of the content that make the lines of a table, by its name on the pages |
| `summary(content)` | the lines that the script prints in the end |
| `picture(content)` | a figure of matplotlib |

A table stands on a page between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import pathlib
import re
import sys

import results
from reports import (
    diagonal_networks,
    does_it_help,
    inner_maximization,
    label_noise,
    m_sharpness,
    mnist_cnn,
    moons,
    relu_1d,
    sam_vs_sgd,
    scale_invariance,
    step_cost,
    surrogate_gap,
    switching,
    units_of_rho,
    which_rho,
    which_sharpness,
)
from results import RESULTS, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import front

PAGE = ROOT / "docs" / "reproductions.md"

#: The studies by the name of their JSON, in the order of the table of claims.
STUDIES = {
    module.__name__.split(".")[-1]: module
    for module in (
        moons,
        mnist_cnn,
        label_noise,
        sam_vs_sgd,
        which_rho,
        inner_maximization,
        m_sharpness,
        switching,
        diagonal_networks,
        relu_1d,
        which_sharpness,
        surrogate_gap,
        scale_invariance,
    )
}


def claims():
    """Claim, source, published figure, ours, and whether it holds."""
    return [
        "| claim | source | published | ours | holds? |",
        "|---|---|---|---|---|",
        *(
            row
            for name, study in STUDIES.items()
            for row in study.claims(results.load(RESULTS, name))
        ),
    ]


#: The tables of the pages, by the name in their comments: functions that make their lines.
TABLES = {
    "claims": claims,
    **{
        table: lambda name=name, make=make: make(results.load(RESULTS, name))
        for name, study in STUDIES.items()
        for table, make in study.TABLES.items()
    },
    **step_cost.TABLES,
    **units_of_rho.TABLES,
    **does_it_help.TABLES,
    **front.TABLES,
}

_TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
#: The pages that have a table.
PAGES = [
    page
    for page in sorted(
        [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
    )
    if _TABLE.search(page.read_text(encoding="utf-8"))
]


def fill(page):
    """The page with its tables made anew from the JSON files."""
    return _TABLE.sub(lambda m: m[1] + "\n".join(TABLES[m[2]]()) + "\n" + m[3], page)


def show(folder, name):
    """Print the tables of an experiment, and save its picture beside its JSON."""
    content = results.load(folder, name)
    print("\n".join(STUDIES[name].summary(content)))
    save(STUDIES[name].picture(content), pathlib.Path(folder) / f"{name}.png")


def save(figure, path):
    """Save a picture, and say where."""
    figure.savefig(path, dpi=110)
    print(f"\nPicture: {path}")


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"Filled the tables of {page.relative_to(ROOT)}")
    save(does_it_help.picture(), ROOT / "docs" / "does_it_help.png")

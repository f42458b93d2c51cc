"""The tables of the methods, in README.md and docs/methods.md: made from their classes.

    python docs/tables.py

What a method does, its formulas and its paper are those of its docstring; how many
gradients a step takes, forward passes aside, is counted in ten steps of training.
"""

import inspect
import pathlib
import re

import keras
import numpy as np

import keras_sharp
from keras_sharp import methods

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "methods.md")


def call(cls):
    """How a method is made, with the defaults of its own numbers."""
    numbers = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name != "neighborhood"
    }
    return f"`{cls.__name__}({', '.join(f'{name}={value}' for name, value in numbers.items())})`"


def summary(cls):
    """The first line of the docstring."""
    return inspect.getdoc(cls).splitlines()[0].rstrip(".")


def formulas(cls):
    """The first block of code in the docstring, line by line."""
    block = re.search(r"```\n(.*?)```", inspect.getdoc(cls), re.DOTALL)[1]
    return "<br>".join(f"`{' '.join(line.split())}`" for line in block.splitlines())


def paper(cls):
    """The first reference of the docstring."""
    return re.search(r"^\s*- (\[.*?\]\(.*?\))", inspect.getdoc(cls), re.MULTILINE)[1]


def gradients(cls):
    """How many gradients a step takes with the defaults, on average."""
    network = keras.Sequential([keras.Input((30,)), keras.layers.Dense(1)])
    model = keras_sharp.SharpnessAwareModel(network, cls(), extra_logs=["num_gradients"])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    x, y = np.random.default_rng(0).normal(size=(40, 30)), np.zeros((40, 1))
    history = model.fit(x, y, batch_size=4, verbose=0).history
    return f"{history['num_gradients'][0]:.3g}"


def rows(*columns):
    """A row per method."""
    return [
        f"| {' | '.join(column(cls) for column in columns)} |" for cls in methods.METHODS.values()
    ]


def short():
    """What to write, what it does, and what it costs."""
    return [
        "| `keras_sharp.methods` | what it does | gradients per step |",
        "|---|---|---|",
        *rows(call, summary, gradients),
    ]


def long():
    """The formulas as well, and the papers."""
    return [
        "| method | what it does | formulas | gradients per step | paper |",
        "|---|---|---|---|---|",
        *rows(call, summary, formulas, gradients, paper),
    ]


TABLES = {"methods": short, "methods, in full": long}
_TABLE = re.compile(r"(<!-- classes: (.+?) -->\n).*?(<!-- end of classes -->)", re.DOTALL)


def fill(page):
    """The page with its tables made anew."""
    return _TABLE.sub(lambda m: m[1] + "\n".join(TABLES[m[2]]()) + "\n" + m[3], page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"Filled the tables of {page.relative_to(ROOT)}")

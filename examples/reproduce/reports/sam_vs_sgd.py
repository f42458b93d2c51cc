"""SAM and its kin against SGD: test error and sharpness."""

from results import (
    ASAM,
    BSAM,
    GSAM,
    NAMES,
    SAM,
    claim,
    compared,
    conditions,
    dots,
    every_table,
    lengths,
    methods,
    panels,
)

SHOWN = ("error", "loss", "lambda_1", "ratio")
PORT = "[davda54/sam](https://github.com/davda54/sam), CIFAR-10"
#: How often the two methods see the data: each once, and each twice.
ONCE_TWICE = ((1, 1), (2, 2))
CLAIMS = [
    (
        "SAM has a lower test error than SGD",
        f"{SAM}; the figures: {PORT}",
        "2.86 % against 3.20 %",
        "error",
        "sam",
        "sgd",
        ONCE_TWICE,
    ),
    (
        "also than SGD with twice the epochs, which costs the same",
        SAM,
        "-",
        "error",
        "sam",
        "sgd",
        ((1, 2),),
    ),
    (
        "SAM has a lower test loss than SGD",
        "no published figure",
        "-",
        "loss",
        "sam",
        "sgd",
        ONCE_TWICE,
    ),
    (
        "ASAM has a lower test error than SAM",
        f"{ASAM}; the figures: {PORT}",
        "2.55 % against 2.86 %",
        "error",
        "asam",
        "sam",
        ONCE_TWICE,
    ),
    (
        "GSAM has a lower test error than SAM",
        GSAM,
        "-",
        "error",
        "gsam",
        "sam",
        ONCE_TWICE,
    ),
    (
        "BSAM has a lower test error than SAM",
        BSAM,
        "-",
        "error",
        "bsam",
        "sam",
        ONCE_TWICE,
    ),
    (
        "SAM ends with a smaller λ₁ than SGD",
        SAM,
        "-",
        "lambda_1",
        "sam",
        "sgd",
        ONCE_TWICE,
    ),
    (
        "and with a smaller λ₁ / λ₅",
        SAM,
        "-",
        "ratio",
        "sam",
        "sgd",
        ONCE_TWICE,
    ),
    (
        "BSAM ends with a smaller λ₁ than SAM",
        BSAM,
        "-",
        "lambda_1",
        "bsam",
        "sam",
        ONCE_TWICE,
    ),
]


def claims(content):
    for text, source, published, *what in CLAIMS:
        yield claim(text, source, published, compared(content, *what))


TABLES = {
    f"sam_vs_sgd {data} {times}x": lambda content, data=data, times=times: methods(
        content, SHOWN, data, times
    )
    for data in ("cifar10", "fashion_mnist")
    for times in (1, 2)
}


def summary(content):
    return every_table(content, SHOWN)


def picture(content):
    data = conditions(content)
    figure, grid = panels(2 * len(data), 3, width=4.2, height=2.6)
    where = [(d, e) for d in data for e in lengths(content)]
    for row, (name, epochs) in zip(grid, where, strict=True):
        for panel, number in zip(row, ("error", "lambda_1", "ratio"), strict=True):
            dots(panel, content, number, data=name, epochs=epochs)
        row[0].set_title(f"{NAMES[name]}, {epochs} epochs", loc="left")
    return figure

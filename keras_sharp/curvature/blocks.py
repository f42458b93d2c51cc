"""The curvature of each layer by itself: the blocks on the diagonal of a large matrix."""

import itertools
import warnings
from typing import NamedTuple

import numpy as np

from keras_sharp import engine
from keras_sharp.curvature.certificate import Certificate
from keras_sharp.curvature.eigen import eigenvalues
from keras_sharp.curvature.estimates import mean_and_error, random_signs
from keras_sharp.curvature.operators import HessianOperator
from keras_sharp.curvature.products import Products
from keras_sharp.docstrings import filled_in
from keras_sharp.identifiers import check_count


class _PerLayer(NamedTuple):
    names: tuple
    sizes: np.ndarray
    lambda_max: np.ndarray
    residuals: np.ndarray
    traces: np.ndarray
    standard_errors: np.ndarray
    products: int


class PerLayer(_PerLayer):
    """The curvature of each layer, or each block of weights, by itself.

    A tuple of the first seven attributes. The last one is no part of it.

    Attributes:
        names: tuple of strings, the layers or blocks, in the order of the
            model.
        sizes: array of integers, the number of weights of each.
        lambda_max: array, the largest eigenvalue of each block.
        residuals: array: within this distance of each of them there is an
            eigenvalue of the block.
        traces: array, the estimated trace of each block.
        standard_errors: array, those of the traces.
        products: Integer, how many products it took.
        certificate: the `Certificate` of the products, or `None` if they have
            none.
    """

    certificate: Certificate | None = None


@filled_in(HessianOperator)
def per_layer(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    block_of=None,
    num_products=100,
    tol=1e-2,
    max_products=100,
    seed=0,
    verbose="auto",
    **kwargs,
):
    """The largest eigenvalue and the trace of each layer's block of the Hessian.

    ```
    block = second derivatives by the weights of one layer, the others fixed
    lambda_max = largest eigenvalue of P H P, by the Lanczos process
    trace = mean of (P v)' H v               # v with random entries of +1 and -1
    ```

    `P` keeps the weights of the layer, and sets the others to zero. The traces
    of all layers come from the same products, so that many layers cost no more
    than one; their sum is the trace of the Hessian. The largest eigenvalue
    takes some ten to thirty products per layer. That of the Hessian is at least
    that of each block; it is more where layers curve together.

    Layers are compared as they are scaled: of two layers in a row, a network
    with ReLU may have one multiplied and the other divided by a number, which
    changes both values and nothing of what it computes.

    Args:
        model: a compiled and built `keras.Model`, wrapped or not. Or a
            `HessianOperator` or `GaussNewtonOperator` instead of model and
            data.
        x: see `HessianOperator`.
        y: see `HessianOperator`.
        sample_weight: see `HessianOperator`.
        block_of: function of a variable that returns the name of its block, or
            `None` to leave it out. Defaults to `None`: a block for each layer
            that has trainable weights of its own, at any depth, by its path.
        num_products: Integer >= 2, the number of random vectors for the
            traces. Defaults to `100`.
        tol: Float >= 0, the residual to stop at, relative to the eigenvalue
            itself. Defaults to `1e-2`.
        max_products: Integer >= 1, how many products the eigenvalue of one
            block takes at most. Defaults to `100`.
        seed: Integer, the seed of all random vectors. Defaults to `0`.
        verbose: 0, 1 or `"auto"`: whether progress is shown: never, always,
            or when it takes longer than five seconds. Defaults to `"auto"`.
        **kwargs: `batch_size`, `variables` and `certify`, see
            `HessianOperator`.

    Returns:
        A `PerLayer`, which `keras_sharp.plots.per_layer` draws. A warning says
        so if an eigenvalue is not as accurate as asked for.

    Raises:
        ValueError: see `HessianOperator`; or if an argument is not one of
            these, or no variable is left.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="last")])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.diag([1.0, 3.0]), np.ones((2, 1))
    >>> found = keras_sharp.curvature.per_layer(model, x, y)
    >>> found.names, found.sizes.tolist()
    (('last',), [3])
    >>> found = keras_sharp.curvature.per_layer(model, x, y, block_of=lambda v: v.name)
    >>> found.names, found.lambda_max.round(3)
    (('kernel', 'bias'), array([9., 2.]))

    Reference:
        - [Dong et al., 2020](https://arxiv.org/abs/1911.03852), on traces by layer.
    """
    if block_of is not None and not callable(block_of):
        raise ValueError(
            "`block_of` must be a function of a variable that returns the name of its block. "
            f"Received: block_of={block_of!r}"
        )
    check_count("num_products", num_products, at_least=2)
    check_count("max_products", max_products, at_least=1)
    if not tol >= 0:
        raise ValueError(f"`tol` must be a number >= 0. Received: tol={tol!r}")
    if hasattr(model, "matvec") and not hasattr(model, "variables"):
        raise ValueError(
            "The rows of the matrix must be those of the variables of a model. Received: a "
            f"{type(model).__name__}. Expected a model, a HessianOperator or a GaussNewtonOperator."
        )
    with Products(model, (x, y, sample_weight), kwargs, num_products, verbose) as operator:
        blocks = _blocks(operator.source, block_of)
        operator.expect(num_products + len(blocks) * max_products)
        rng, samples = np.random.default_rng(seed), []
        for _ in range(num_products):
            v = random_signs(rng, operator)
            curved = v.astype("float64") * operator.matvec(v)
            samples.append([np.sum(curved[rows]) for rows in blocks.values()])
        traces, standard_errors = np.transpose([mean_and_error(s) for s in np.transpose(samples)])
        options = {"tol": tol, "max_products": max_products, "seed": seed}
        found = [_largest(name, operator, rows, options) for name, rows in blocks.items()]
    result = PerLayer(
        tuple(blocks),
        np.array([len(rows) for rows in blocks.values()]),
        np.array([one.values[0] for one in found]),
        np.array([one.residuals[0] for one in found]),
        traces,
        standard_errors,
        operator.count,
    )
    return operator.certified(result)


class _Block:
    """A block on the diagonal of a matrix: `P H P`, on the rows that `P` keeps."""

    def __init__(self, operator, rows):
        self._operator, self._rows = operator, rows
        self.size, self.dtype = len(rows), operator.dtype

    def matvec(self, v):
        embedded = np.zeros(self._operator.size, self.dtype)
        embedded[self._rows] = v
        return self._operator.matvec(embedded)[self._rows]


def _largest(name, operator, rows, options):
    """The largest eigenvalue of a block; what there is to warn of, with its name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = eigenvalues(_Block(operator, rows), k=1, verbose=0, **options)
    for warning in caught:
        warnings.warn(f"The block {name!r}: {warning.message}", warning.category, stacklevel=3)
    return found


def _blocks(operator, block_of):
    """The rows of each block, arrays of integers by its name."""
    names = _layers_of(operator) if block_of is None else map(block_of, operator.variables)
    ends = itertools.accumulate(int(np.prod(v.shape)) for v in operator.variables)
    parts: dict = {}
    for name, (start, end) in zip(names, itertools.pairwise([0, *ends]), strict=True):
        if name is not None:
            parts.setdefault(str(name), []).append(np.arange(start, end))
    if not parts:
        raise ValueError(
            "`block_of` leaves no variable. Received: a function that returns None for all of "
            f"{[v.path for v in operator.variables]}."
        )
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _layers_of(operator):
    """For each variable the path of the layer that it belongs to, another for each layer."""
    owners: dict = {}
    for layer in [*engine.all_layers(operator.model), operator.model]:
        inner = {id(v) for part in engine.all_layers(layer) for v in part.variables}
        owners |= {id(v): layer for v in layer.variables if id(v) not in inner | owners.keys()}
    names: dict = {}  # By the id of the layer.
    for v in operator.variables:
        layer = owners[id(v)]
        path = v.path.rpartition("/")[0]
        name = path.removeprefix(f"{operator.model.name}/") or layer.name
        # Layers of two models inside may have the same path.
        same = sum(other == name or other.startswith(f"{name} (") for other in names.values())
        names.setdefault(id(layer), f"{name} ({same + 1})" if same else name)
    return [names[id(owners[id(v)])] for v in operator.variables]

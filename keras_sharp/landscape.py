"""Slices of the loss surface: along a line, in a plane, between two models, around a path.

The loss is the one that `evaluate` reports, in inference mode: the statistics
of BatchNormalization stay as they are. `keras_sharp.plots.landscape` draws the
slices.
"""

import math
import os
from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops

from keras_sharp import engine, vectors
from keras_sharp.docstrings import filled_in
from keras_sharp.identifiers import check_count
from keras_sharp.snapshots import Snapshots, principal_directions
from keras_sharp.surface import as_surface
from keras_sharp.weights import is_bias, is_norm

__all__ = [
    "Line",
    "PathPlane",
    "Plane",
    "around_path",
    "between",
    "line",
    "plane",
    "random_direction",
]


class Line(NamedTuple):
    """The loss along a line.

    Attributes:
        coordinates: array of shape `(n,)`: `t` of the weights `w + t * direction`.
        losses: array of shape `(n,)`.
    """

    coordinates: np.ndarray
    losses: np.ndarray


class Plane(NamedTuple):
    """The loss in a plane.

    Attributes:
        first: array of shape `(n,)`, the coordinates in the first direction.
        second: array of shape `(n,)`, those in the second direction.
        losses: array of shape `(n, n)`: `losses[i, j]` is the loss at
            `first[i]` and `second[j]`.
    """

    first: np.ndarray
    second: np.ndarray
    losses: np.ndarray


class PathPlane(NamedTuple):
    """The loss in the plane of the paths of one training, or of several.

    Attributes:
        first: array of shape `(n,)`, the coordinates in the first direction.
        second: array of shape `(n,)`, those in the second direction.
        losses: array of shape `(n, n)`: `losses[i, j]` is the loss at
            `first[i]` and `second[j]`.
        paths: a dictionary. By the name of each training, an array of shape
            `(number of snapshots, 2)`: where the snapshots are in the plane. A
            single path is named `"path"`.
        shares: array of shape `(2,)`: of all that the snapshots differ by, the
            share of the variance that each direction explains.
    """

    first: np.ndarray
    second: np.ndarray
    losses: np.ndarray
    paths: dict
    shares: np.ndarray


def line(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    direction="random",
    span=(-1.0, 1.0),
    num_points=21,
    seed=0,
    batch_size=256,
    verbose=0,
):
    """The loss along a line through the weights of a model.

    ```
    losses = [L(w + t * direction) for t in np.linspace(*span, num_points)]
    ```

    Args:
        model: a compiled and built `keras.Model`, wrapped or not. Or a
            `keras_sharp.surface.LossSurface`, without the data.
        x: the inputs: an array or a nested structure of arrays; or all the
            data, as a `tf.data.Dataset`, a `keras.utils.PyDataset` or a
            `torch.utils.data.DataLoader`.
        y: the targets, likewise.
        sample_weight: the weights of the examples, likewise.
        direction: `"random"`, what `random_direction` returns; a list with one array
            per trainable variable; or one long vector, such as an eigenvector
            from `keras_sharp.curvature.eigenvalues`. Defaults to `"random"`.
        span: pair of floats, the first and the last coordinate. Defaults to
            `(-1.0, 1.0)`. An eigenvector has length 1, a random direction
            about that of the weights.
        num_points: Integer >= 2. An odd number in a symmetric `span` has the
            weights themselves among the points. Defaults to `21`.
        seed: Integer, the seed of a random direction. Defaults to `0`.
        batch_size: Integer, how many examples of an array are in memory at
            once. Defaults to `256`.
        verbose: Integer. `1` shows a progress bar. Defaults to `0`.

    Returns:
        A `Line`.

    Raises:
        ValueError: if the model is not compiled or not built, or has no
            trainable weights; if there are no data, or the loss on them is
            not finite; if an argument is not one of these.

    Example:

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.compile("sgd", "mse")
    >>> model.set_weights([np.array([[2.0]])])
    >>> x, y = np.ones((4, 1)), np.zeros((4, 1))
    >>> keras_sharp.landscape.line(model, x, y, direction=[[[1.0]]], num_points=3)
    Line(coordinates=array([-1.,  0.,  1.]), losses=array([1., 4., 9.]))

    Reference:
        - [Li et al., 2018](https://arxiv.org/abs/1712.09913)
    """
    coordinates = _coordinates(span, num_points)
    surface = as_surface(model, x, y, sample_weight, batch_size)
    (direction,) = _directions(surface, direction, 1, seed)
    losses = _losses(surface, [(t,) for t in coordinates], [direction], verbose)
    return Line(coordinates, losses)


@filled_in(line)
def plane(
    model,
    x=None,
    y=None,
    sample_weight=None,
    *,
    directions="random",
    span=(-1.0, 1.0),
    num_points=21,
    seed=0,
    batch_size=256,
    verbose=0,
):
    """The loss in a plane through the weights of a model.

    ```
    losses[i, j] = L(w + first[i] * directions[0] + second[j] * directions[1])
    ```

    Args:
        model: see `line`.
        x: see `line`.
        y: see `line`.
        sample_weight: see `line`.
        directions: `"random"`, or a pair of directions, each of which is
            what `line` takes; or an array of shape `(size, 2)`, such as the
            eigenvectors from `keras_sharp.curvature.eigenvalues`. Defaults to
            `"random"`.
        span: see `line`. The same for both directions.
        num_points: see `line`. In each direction, so that the loss is
            computed `num_points**2` times.
        seed: see `line`.
        batch_size: see `line`.
        verbose: see `line`.

    Returns:
        A `Plane`.

    Raises:
        ValueError: see `line`.

    Example:

    The two sharpest directions:

    ```python
    top = keras_sharp.curvature.eigenvalues(model, x, y, k=2, return_vectors=True)
    plane = keras_sharp.landscape.plane(model, x, y, directions=top.vectors)
    keras_sharp.plots.landscape(plane)
    ```

    Reference:
        - [Li et al., 2018](https://arxiv.org/abs/1712.09913)
    """
    coordinates = _coordinates(span, num_points)
    surface = as_surface(model, x, y, sample_weight, batch_size)
    directions = _directions(surface, directions, 2, seed)
    points = [(s, t) for s in coordinates for t in coordinates]
    losses = _losses(surface, points, directions, verbose)
    return Plane(coordinates, coordinates, losses.reshape(num_points, num_points))


@filled_in(line)
def between(
    model,
    other,
    x=None,
    y=None,
    sample_weight=None,
    *,
    span=(0.0, 1.0),
    num_points=21,
    batch_size=256,
    verbose=0,
):
    """The loss on the straight line from one model to another.

    ```
    losses = [L((1 - t) * w + t * w_other) for t in np.linspace(*span, num_points)]
    ```

    The statistics of BatchNormalization are interpolated along with the
    weights, so that the ends are the two models as they are.

    Args:
        model: a compiled and built `keras.Model`, wrapped or not, at `t = 0`.
        other: likewise, of the same architecture, at `t = 1`.
        x: see `line`.
        y: see `line`.
        sample_weight: see `line`.
        span: pair of floats, the first and the last `t`. Defaults to
            `(0.0, 1.0)`.
        num_points: see `line`.
        batch_size: see `line`.
        verbose: see `line`.

    Returns:
        A `Line`.

    Raises:
        ValueError: see `line`; and if the weights of the models differ in
            their shapes.

    Reference:
        - [Goodfellow et al., 2015](https://arxiv.org/abs/1412.6544)
    """
    coordinates = _coordinates(span, num_points)
    surface, end = (as_surface(m, x, y, sample_weight, batch_size) for m in (model, other))
    w, state = surface.weights, surface.state
    shapes, other_shapes = _shapes(w + state), _shapes(end.weights + end.state)
    if shapes != other_shapes:
        raise ValueError(
            "There is a line between models of the same architecture only. Received: models whose "
            f"weights have the shapes {shapes} and {other_shapes}."
        )
    pairs = list(zip(state, end.state, strict=True))

    def state_at(t):
        return [a + t * (b - a) if _is_float(a) else a for a, b in pairs]

    direction = [b - a for a, b in zip(w, end.weights, strict=True)]
    points = [(t,) for t in coordinates]
    return Line(coordinates, _losses(surface, points, [direction], verbose, state_at))


@filled_in(line)
def around_path(
    model,
    path,
    x=None,
    y=None,
    sample_weight=None,
    *,
    margin=0.25,
    num_points=21,
    batch_size=256,
    verbose=0,
):
    """The loss around the way that training took, in the plane in which it went farthest.

    ```
    d_1, d_2 = the first two principal components of the snapshots
    losses[i, j] = L(w_end + first[i] * d_1 + second[j] * d_2)
    ```

    The plane goes through the weights at the end of the path, of the first one
    of several. The components are those of the snapshots of all paths together,
    so that the ways of two methods from the same start are seen in one picture.
    Other snapshots are not in the plane: drawn is the point of it that is
    nearest to them, whose loss may be another one. `shares` tells how much is
    seen. Read no purpose into the form of a path: a random walk in many
    dimensions looks like an arc, too, with shares of 61 % and 15 %.

    Everywhere the loss is that of the state which the model has now, such as
    the statistics of BatchNormalization. So the loss at the start of a path is
    not the one that training began with; nor is it at the end of another model.

    Args:
        model: see `line`. One that was trained, or another of the same
            architecture: it stands where it is, the plane is that of the path.
        path: a `keras_sharp.callbacks.WeightPath` after training; its
            directory, as a string or path; or a list of snapshots of your own,
            each a list with one array per trainable variable. Or a dictionary
            of several, by names.
        x: see `line`.
        y: see `line`.
        sample_weight: see `line`.
        margin: Float >= 0, how much is seen on each side beyond the paths, as
            a share of their extent. Defaults to `0.25`.
        num_points: see `line`. In each direction, so that the loss is
            computed `num_points**2` times.
        batch_size: see `line`.
        verbose: see `line`.

    Returns:
        A `PathPlane`, which `keras_sharp.plots.landscape` draws.

    Raises:
        ValueError: see `line`; and if the snapshots do not fit the model, are
            not finite, or do not differ in two directions.

    Example:

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((4, 1)), np.zeros((4, 1))
    >>> snapshots = [[[[w]], [b]] for w, b in [(3.0, 1.0), (1.0, 1.0), (0.0, 0.0)]]
    >>> plane = keras_sharp.landscape.around_path(model, snapshots, x, y, num_points=5)
    >>> plane.paths["path"].round(3)
    array([[-3.161, -0.088],
           [-1.247, -0.667],
           [ 0.   ,  0.   ]])

    References:
        - [Li et al., 2018](https://arxiv.org/abs/1712.09913), section 7.
        - [Antognini and Sohl-Dickstein, 2018](https://arxiv.org/abs/1806.08805),
          on random walks.
    """
    check_count("num_points", num_points, at_least=2)
    if not (isinstance(margin, (int, float)) and 0 <= margin < math.inf):
        raise ValueError(f"`margin` must be a finite number >= 0. Received: margin={margin!r}")
    surface = as_surface(model, x, y, sample_weight, batch_size)
    paths = {name: _snapshots(one, surface) for name, one in _named_paths(path).items()}
    ends = np.cumsum([len(snapshots) for snapshots in paths.values()])
    together = [snapshot for snapshots in paths.values() for snapshot in snapshots]
    found = principal_directions(together, origin=ends[0] - 1)
    low, high = found.coordinates.min(axis=0), found.coordinates.max(axis=0)
    beyond = margin * (high - low)
    first, second = np.linspace(low - beyond, high + beyond, num_points).T
    losses = _losses(
        surface,
        [(s, t) for s in first for t in second],
        [_as_weights(direction, surface) for direction in found.directions],
        verbose,
        origin=_as_weights(next(iter(paths.values()))[-1], surface),
    )
    drawn = np.split(found.coordinates, ends[:-1])
    return PathPlane(
        first,
        second,
        losses.reshape(num_points, num_points),
        dict(zip(paths, drawn, strict=True)),
        found.shares,
    )


def _named_paths(given):
    if isinstance(given, dict) and not given:
        raise ValueError("There is no path. Received: an empty dictionary.")
    return given if isinstance(given, dict) else {"path": given}


def _snapshots(path, surface):
    """The snapshots of a path, however it is given."""
    if isinstance(path, (str, os.PathLike)):
        path = Snapshots(path)
    path = getattr(path, "snapshots", path)
    if not len(path):
        raise ValueError(
            "A path has no snapshots. Pass a keras_sharp.callbacks.WeightPath after training, or "
            "the directory that it has written to. Received: an empty one, or a folder without "
            "files `snapshot-*.npz`."
        )
    expected = _shapes(surface.weights)
    for snapshot in path:
        shapes = [np.shape(array) for array in snapshot]
        if shapes != expected:
            raise ValueError(
                "A path must be one of the weights of the model. Received: a snapshot of arrays of "
                f"the shapes {shapes}. Expected one array per trainable variable, of the shapes "
                f"{expected}."
            )
    return path


def random_direction(model, seed=0):
    """A random direction in which every filter is as long as the weights of that filter.

    ```
    d = normal random numbers
    d[..., j] = d[..., j] / ‖d[..., j]‖ * ‖w[..., j]‖      # each filter or unit j
    d = 0                                                  # biases and normalization
    ```

    With it, slices of networks whose weights have different sizes can be
    compared. They do not change where a whole layer is multiplied by a number
    and the next one divided by it, nor where each filter is multiplied by a
    number of its own that a normalization behind it takes out.

    What a filter is depends on the layer: all weights of one output, which
    are those of one entry of the last axis in most layers. It is another axis
    in transposed convolutions; a pair of them, channel and multiplier, in
    depthwise ones; in `EinsumDense`, and so in the attention layers, those
    that the equation has in the output; in `Embedding` the first, one filter
    per token. In recurrent kernels each unit of each gate is a filter. Layers
    that are not from `keras.layers` are taken to have it last.

    Args:
        model: a built `keras.Model`, wrapped or not.
        seed: Integer. Defaults to `0`.

    Returns:
        A list with one NumPy array per trainable variable.

    Reference:
        - [Li et al., 2018](https://arxiv.org/abs/1712.09913), section 4.
    """
    return _random_direction(model, model.trainable_variables, np.random.default_rng(seed))


def _random_direction(model, variables, random):
    axes, direction = _filter_axes(model), []
    for v in variables:
        w = ops.convert_to_numpy(ops.cast(engine.read(v), "float32"))
        d = random.normal(size=w.shape)
        own = axes.get(id(v), (-1,))
        if w.ndim < 2 or own is None or is_bias(v) or is_norm(v):
            d[...] = 0.0
        else:
            d *= _filter_lengths(w, own) / _filter_lengths(d, own)
        direction.append(d.astype("float32"))
    return direction


def _filter_lengths(kernel, axes):
    within = set(range(kernel.ndim)) - {axis % kernel.ndim for axis in axes}
    return np.sqrt(np.sum(np.square(kernel, dtype="float64"), axis=tuple(within), keepdims=True))


#: The axes that number the filters of a weight, by layer and the name of the weight, where they
#: are not the last one; `None` for a weight that is no kernel.
_FILTER_AXES = {
    layers.DepthwiseConv1D: {"kernel": (-2, -1)},
    layers.DepthwiseConv2D: {"kernel": (-2, -1)},
    layers.SeparableConv1D: {"depthwise_kernel": (-2, -1)},
    layers.SeparableConv2D: {"depthwise_kernel": (-2, -1)},
    layers.Conv1DTranspose: {"kernel": (-2,)},
    layers.Conv2DTranspose: {"kernel": (-2,)},
    layers.Conv3DTranspose: {"kernel": (-2,)},
    layers.Embedding: {"embeddings": (0,), "lora_embeddings_a": (0,)},
    layers.PReLU: {"alpha": None},
}


def _filter_axes(model):
    """The axes that number the filters, by the id of each weight where it is not the last one."""
    axes: dict = {}
    for layer in engine.all_layers(model):
        if table := _filters_of(layer):
            inner = {id(v) for part in engine.all_layers(layer) for v in part.variables}
            own = [v for v in layer.variables if id(v) not in inner and v.name in table]
            axes.update((id(v), table[v.name]) for v in own)
    return axes


def _filters_of(layer):
    """The entry of `_FILTER_AXES` for a layer, or nothing."""
    if isinstance(layer, layers.EinsumDense):
        return {"kernel": _einsum_axes(layer.equation)}
    return next((t for known, t in _FILTER_AXES.items() if isinstance(layer, known)), {})


def _einsum_axes(equation):
    """The axes of the kernel that reach the output: the others are summed over."""
    kernel, output = equation.split(",")[1].split("->")
    return tuple(axis for axis, letter in enumerate(kernel) if letter in output)


def _directions(surface, given, count, seed):
    """A list of `count` directions, each a list of tensors."""
    if isinstance(given, str):
        if given != "random":
            raise ValueError(
                f"A direction must be 'random', a list of arrays or one vector. Received: {given!r}"
            )
        random = np.random.default_rng(seed)
        given = [_random_direction(surface.model, surface.variables, random) for _ in range(count)]
    elif count == 1:
        given = [given]
    elif getattr(given, "ndim", 0) == 2:  # The columns of a matrix.
        given = given.T
    if len(given) != count:
        raise ValueError(
            f"A plane has {count} directions. Received: {len(given)} of them. Expected a pair, or "
            f"a matrix of {count} columns."
        )
    return [_as_weights(direction, surface) for direction in given]


def _as_weights(direction, surface):
    """A direction as a list of tensors in the shapes and dtypes of the weights."""
    shapes = _shapes(surface.weights)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    if getattr(direction, "ndim", None) == 1 and len(direction) == ends[-1]:
        parts = np.split(np.asarray(direction), ends[:-1])
        direction = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    if len(direction) != len(shapes) or _shapes(map(np.asarray, direction)) != shapes:
        raise ValueError(
            "A direction must be a list with one array per trainable variable, or a vector of all "
            f"their entries. Received: {_shapes(map(np.asarray, direction))}. Expected arrays of "
            f"the shapes {shapes}, or a vector of the length {ends[-1]}."
        )
    return [
        ops.convert_to_tensor(np.asarray(d), dtype=v.dtype)
        for d, v in zip(direction, surface.variables, strict=True)
    ]


def _shapes(arrays):
    return [tuple(a.shape) for a in arrays]


def _is_float(tensor):
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))


def _coordinates(span, num_points):
    check_count("num_points", num_points, at_least=2)
    try:
        first, last = map(float, span)
    except (TypeError, ValueError):
        first = last = math.nan
    if not -math.inf < first < last < math.inf:
        raise ValueError(
            "`span` must be a pair of finite numbers, the first and the last coordinate. "
            f"Received: span={span!r}"
        )
    return np.linspace(first, last, num_points)


def _losses(surface, points, directions, verbose, state_at=None, origin=None):
    """The loss at each point, given by its coordinates in the directions.

    They are counted from the weights that the model has, or from `origin`.
    """
    surface.check()
    w = surface.weights if origin is None else origin
    progress = keras.utils.Progbar(len(points), verbose=verbose, unit_name="point")
    losses = []
    for point in points:
        at = w
        for t, direction in zip(point, directions, strict=True):
            at = vectors.add_scaled(at, float(t), direction)
        losses.append(surface.loss(at, None if state_at is None else state_at(float(point[0]))))
        progress.update(len(losses))
    return np.array(losses)

"""The weights of a training on its way, in memory or on disk, and the plane that shows most."""

import collections.abc
import os
import re
from typing import NamedTuple

import numpy as np

_NAME = "snapshot-{position:09d}.npz"
_PATTERN = re.compile(r"snapshot-(\d+)\.npz")
_INCOMPLETE = "incomplete.npz"

#: How many weights are looked at together: all snapshots of them are in memory in float64.
_AT_ONCE = 2**20


class Snapshots(collections.abc.Sequence):
    """The weights at some moments, in their order: each a sequence with one array per variable.

    Args:
        directory: String or path, a folder whose files hold them. What it
            holds already is there. Defaults to `None`: they are in memory.
    """

    def __init__(self, directory=None):
        self._directory = "" if directory is None else os.fspath(directory)
        self._is_on_disk = directory is not None
        self._kept = {}
        if directory is not None and os.path.isdir(directory):
            found = map(_PATTERN.fullmatch, os.listdir(directory))
            self._kept = {int(m[1]): _Stored(self._path(m[0])) for m in found if m}

    @property
    def positions(self):
        """When each was taken: a list of integers, ascending."""
        return sorted(self._kept)

    def __len__(self):
        return len(self._kept)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._kept[position] for position in self.positions[index]]
        return self._kept[self.positions[index]]

    def keep(self, position, arrays):
        """Add a snapshot, or put it in the place of the one at this position."""
        if not self._is_on_disk:
            self._kept[position] = arrays
            return
        os.makedirs(self._directory, exist_ok=True)
        # Complete or not there: whoever is interrupted leaves no file that cannot be read.
        np.savez(self._path(_INCOMPLETE), *arrays)
        path = self._path(_NAME.format(position=position))
        os.replace(self._path(_INCOMPLETE), path)
        self._kept[position] = _Stored(path)

    def thin(self):
        """Drop every second one; the first stays."""
        for position in self.positions[1::2]:
            dropped = self._kept.pop(position)
            if self._is_on_disk:
                os.remove(dropped.path)

    def _path(self, name):
        return os.path.join(self._directory, name)


class _Stored(collections.abc.Sequence):
    """The arrays of a file, each read when it is asked for: a few variables at a time."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        with np.load(self.path) as file:
            return len(file.files)

    def __getitem__(self, index):
        with np.load(self.path) as file:
            return file[file.files[index]]


class Principal(NamedTuple):
    """The two directions in which snapshots differ most.

    Attributes:
        directions: pair of lists, each with one array per variable. Their
            length is 1, and they are perpendicular to each other.
        coordinates: array of shape `(n, 2)`: those of the snapshots, as seen
            from the one that is the origin.
        shares: array of shape `(2,)`, the share of the variance that each
            direction explains.
    """

    directions: list
    coordinates: np.ndarray
    shares: np.ndarray


def principal_directions(snapshots, origin):
    """The principal components of snapshots, through the products of these with each other.

    ```
    D = snapshots, one in each row, minus their mean
    D D' = U diag(values) U'                       # as many rows as snapshots
    directions[k] = D' u_k / sqrt(values[k])
    ```

    Args:
        snapshots: list of n sequences of arrays of the same shapes.
        origin: Integer, the index of the one that has the coordinates 0.

    Returns:
        A `Principal`.

    Raises:
        ValueError: if there are no two directions.
    """
    shapes = [np.shape(array) for array in snapshots[0]]
    products = sum(d @ d.T for j in range(len(shapes)) for d in _deviations(snapshots, j))
    if not np.all(np.isfinite(products)):
        raise ValueError(
            "The weights of some snapshots are not finite, or too large to be squared: the "
            f"training diverged. Received: snapshots of which {np.isnan(products.diagonal()).sum()}"
            f" of {len(products)} are affected. Lower the learning rate, or leave these out."
        )
    values, u = np.linalg.eigh(products)
    values, u = values[:-3:-1], u[:, :-3:-1]
    # What rounding to float32 leaves beside a straight line is no direction.
    if len(values) < 2 or not values[1] > 1e-12 * values[0] > 0:
        raise ValueError(
            "A plane needs snapshots that differ in two directions. Received: "
            f"{len(products)} snapshots, which lie on one line or at one point. Keep more of them; "
            "on a line, use `landscape.between`."
        )
    coordinates = u * np.sqrt(values)
    coordinates = coordinates - coordinates[origin]
    # The sign is arbitrary: the way begins at the left, at the bottom.
    sign = np.where(coordinates[0] > 0, -1.0, 1.0)
    combine = (sign * u / np.sqrt(values)).T
    directions: list[list] = [[], []]
    for j, shape in enumerate(shapes):
        parts = [combine @ d for d in _deviations(snapshots, j)]
        for direction, row in zip(directions, np.concatenate(parts, axis=1), strict=True):
            direction.append(row.reshape(shape))
    return Principal(directions, sign * coordinates, values / np.trace(products))


def _deviations(snapshots, j):
    """The snapshots of the variable j minus their mean, some columns after the other."""
    rows = np.stack([np.ravel(snapshot[j]) for snapshot in snapshots])
    for start in range(0, rows.shape[1], _AT_ONCE):
        part = rows[:, start : start + _AT_ONCE].astype("float64")
        yield part - part.mean(axis=0)

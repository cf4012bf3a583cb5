"""Voxels at which a network is judged while it trains: enough of them near every structure, however small."""

from collections.abc import Sequence
from math import ceil, prod

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy.ndimage import binary_dilation, find_objects

_CELL = 8
"""Voxels along each edge of the cells that are near a structure or not."""


def balanced_voxels(
    rng: np.random.Generator, labels: Integer[np.ndarray, "X Y Z"], classes: int, count: int
) -> tuple[Integer[np.ndarray, "N 3"], Float[np.ndarray, " N"]]:
    """Half of the voxels anywhere, half near structures, near each of those present as many.

    Args:
        classes: Logits a location: 1 for binary (any label above 0), otherwise classes including background.
        count: N.

    Returns:
        Indices (N, 3), and weights (N,) against the density of the draw: sums of weights over the voxels of a kind
        estimate, without bias, how many there are in the scan.
    """
    shape = labels.shape
    volume = float(prod(shape))
    near = [cells for cells in _near(labels, classes) if cells.any()]
    voxels_of = _extents(shape)
    # Half of them, shared by the structures.
    each = count // 2 // len(near) if near else 0
    drawn = [_anywhere(rng, shape, count - each * len(near))]
    sizes = [float((cells * voxels_of).sum()) for cells in near]
    drawn += [_in_cells(rng, cells, voxels_of, shape, each) for cells in near]
    voxels = np.concatenate(drawn)
    where = tuple((voxels // _CELL).T)
    density = np.full(len(voxels), len(drawn[0]) / volume)
    for cells, size in zip(near, sizes, strict=True):
        density += each / size * cells[where]
    return voxels, 1 / density


def _anywhere(rng: np.random.Generator, shape: Sequence[int], count: int) -> Integer[np.ndarray, "N 3"]:
    return np.stack([rng.integers(n, size=count) for n in shape], axis=1)


def _in_cells(
    rng: np.random.Generator,
    cells: Bool[np.ndarray, "x y z"],
    voxels_of: Integer[np.ndarray, "x y z"],
    shape: Sequence[int],
    count: int,
) -> Integer[np.ndarray, "N 3"]:
    """Voxels of these cells, each with even odds."""
    index = np.argwhere(cells)
    share = voxels_of[cells].astype(np.float64)
    chosen = index[rng.choice(len(index), size=count, p=share / share.sum())] * _CELL
    extent = np.minimum(np.array(shape) - chosen, _CELL)
    return np.asarray(chosen + (rng.random((count, 3)) * extent).astype(np.int64))


def _extents(shape: Sequence[int]) -> Integer[np.ndarray, "x y z"]:
    """Voxels of each cell: fewer at the end of an axis."""
    x, y, z = (np.minimum(n - np.arange(ceil(n / _CELL)) * _CELL, _CELL) for n in shape)
    return np.asarray(x[:, None, None] * y[:, None] * z)


def _near(labels: Integer[np.ndarray, "X Y Z"], classes: int) -> list[Bool[np.ndarray, "x y z"]]:
    """Per structure, the cells that hold it and those next to them."""
    if classes == 1:
        labels, classes = (labels > 0).astype(np.uint8), 2
    grid = [ceil(n / _CELL) for n in labels.shape]
    out = []
    for number, box in enumerate(find_objects(labels, max_label=classes - 1), 1):
        cells = np.zeros(grid, bool)
        if box is not None:
            mask = labels[box] == number
            for axis, part in enumerate(box):
                edges = np.arange(-(-part.start // _CELL) * _CELL, part.stop, _CELL) - part.start
                mask = np.logical_or.reduceat(mask, np.unique([0, *edges]), axis=axis)
            first = [part.start // _CELL for part in box]
            cells[tuple(slice(a, a + n) for a, n in zip(first, mask.shape, strict=True))] = mask
            cells = binary_dilation(cells, np.ones((3, 3, 3), bool))
        out.append(cells)
    return out

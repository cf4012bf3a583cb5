"""Where small islands may hide between the sites of a lattice: two cheap guesses from logits.

A field that is smooth over a few voxels announces an island some way off: its logits come closer to the
decision around it. One evaluated voxel recovers the whole island.
"""

from itertools import product

import numpy as np
from jaxtyping import Float, Int

from ossnet.field.octree.lattice import Lattice, Triple

# Share of the largest |logit| next to it that a minimum must fall below.
_DEPTH = 0.9


def unsaturated_children(lattice: Lattice, stride: Triple, margin: float) -> Int[np.ndarray, "N 3"]:
    """Voxels of the next lattice in the cells that have a corner with a margin below `margin`.

    Args:
        lattice: The coarser lattice, with margins.
        stride: Stride of the next lattice.
        margin: Logit beyond which a field is taken to be far from every surface.
    """
    values = _margins(lattice)
    around = np.pad(values, ((0, 1),) * 3, mode="edge")
    x, y, z = values.shape
    near = np.zeros(values.shape, dtype=bool)
    for dx, dy, dz in product((0, 1), repeat=3):
        near |= around[dx : dx + x, dy : dy + y, dz : dz + z] < margin
    corners = (np.argwhere(near) + lattice.window.low) * lattice.stride
    ratio = [c // f for c, f in zip(lattice.stride, stride, strict=True)]
    children = np.indices(ratio).reshape(3, -1).T * stride
    return (corners[:, None] + children).reshape(-1, 3)


def island_seeds(lattice: Lattice, stride: Triple, margin: float | None) -> Int[np.ndarray, "N 3"]:
    """Voxels where a separable quadratic puts the minimum of |logit| around local minima amid a single label.

    Args:
        lattice: The coarser lattice, with margins.
        stride: Stride of the next lattice, on which the voxels lie.
        margin: Only minima below it; None: all.
    """
    window = lattice.window
    # Beyond the volume all is as at its border: slices at the ends, or one slice alone, have minima like others.
    ends = [(int(a == 0), int(b == n)) for a, b, n in zip(window.low, window.high, lattice.full, strict=True)]
    values, labels = (np.pad(sites, ends, mode="edge") for sites in (_margins(lattice), lattice.labels()))
    if min(values.shape) < 3:
        return np.empty((0, 3), dtype=np.int64)
    middle = (slice(1, -1),) * 3
    here, label = values[middle], labels[middle]
    lowest = np.ones(here.shape, dtype=bool) if margin is None else here < margin
    alike = np.ones(here.shape, dtype=bool)
    highest = here.copy()
    for shift in product((0, 1, 2), repeat=3):
        part = tuple(slice(s, s + n) for s, n in zip(shift, here.shape, strict=True))
        lowest &= here <= values[part]
        alike &= label == labels[part]
        np.maximum(highest, values[part], out=highest)
    # A saturated field is level but for the ripples of interpolation: none of its minima is a hint.
    found = np.argwhere(lowest & alike & (here < _DEPTH * highest)) + 1
    voxels = np.empty((len(found), 3), dtype=np.int64)
    for axis in range(3):
        step = np.eye(3, dtype=np.int64)[axis]
        before, at, after = (values[tuple((found + d * step).T)] for d in (-1, 0, 1))
        curvature = before - 2 * at + after
        offset = np.divide(before - after, 2 * curvature, out=np.zeros_like(at), where=curvature > 0)
        site = found[:, axis] - ends[axis][0] + window.low[axis] + offset
        place = np.clip(site, 0, lattice.full[axis] - 1) * lattice.stride[axis]
        voxels[:, axis] = np.rint(place / stride[axis]).astype(np.int64) * stride[axis]
    return voxels


def _margins(lattice: Lattice) -> Float[np.ndarray, "X Y Z"]:
    if lattice.margins is None:
        return np.full(lattice.window.size, np.inf, dtype=np.float32)
    return np.asarray(lattice.box(lattice.margins))

"""Marching cubes in a narrow band: field values are asked only where a surface passes.

A vertex of marching cubes lies on the edge between two neighbouring voxels of which one is inside. Only such
voxels are asked; all others are known to be inside or outside by their label, and their value moves no
vertex.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from skimage import measure

Triple = tuple[int, int, int]
Values = Callable[[Float[np.ndarray, "N 3"]], Float[np.ndarray, " N"]]

# Voxels of one slab: bounds the dense float array that marching cubes needs.
_SLAB = 2**22
# Smallest and largest distance of a value from the level, relative to the median: no vertex falls onto a
# voxel, where several would coincide.
_NEAREST, _FURTHEST = 1e-3, 1e3


@dataclass(frozen=True)
class Surface:
    """Triangles in voxel indices, oriented outward.

    Attributes:
        vertices: (V, 3) float64.
        faces: (F, 3) indices of vertices.
        fixed: (V,) True for vertices that close the surface at the end of the volume, half a voxel beyond the
            outermost voxel centres: the field is not asked there.
    """

    vertices: Float[np.ndarray, "V 3"]
    faces: Int[np.ndarray, "F 3"]
    fixed: Bool[np.ndarray, " V"]


def narrow_band(mask: Bool[np.ndarray, "X Y Z"]) -> Bool[np.ndarray, "X Y Z"]:
    """Voxels with a 6-neighbour on the other side; beyond its end a volume counts as outside."""
    other = ndimage.binary_dilation(~mask, border_value=1) & mask
    return np.asarray(other | (ndimage.binary_dilation(mask) & ~mask))


def marching_cubes(mask: Bool[np.ndarray, "X Y Z"], values: Values) -> Surface:
    """The closed surface of a mask, its vertices placed by field values.

    Args:
        mask: Inside (True) or outside, for every voxel.
        values: Asked for voxels in the narrow band: above 0 inside. Where the sign contradicts the mask, the
            mask holds.

    Returns:
        The surface; empty when nothing is inside. It is closed also where the structure leaves the volume.
    """
    box = ndimage.find_objects(mask.astype(np.uint8))
    if not box:
        return Surface(np.empty((0, 3)), np.empty((0, 3), dtype=np.int64), np.empty(0, dtype=bool))
    # One more voxel around what is inside: a ring of the volume, or one that stands for what lies beyond it.
    low = np.array([s.start - 1 for s in box[0]])
    high = np.array([s.stop + 1 for s in box[0]])
    around = _padded(mask, low, high, fill=False)
    band = narrow_band(around)
    sites = np.argwhere(band)
    in_volume = ((sites + low >= 0) & (sites + low < mask.shape)).all(axis=1)
    asked = sites[in_volume]
    answers = np.asarray(values((asked + low).astype(np.float64)), dtype=np.float32)
    scale = float(np.median(np.abs(answers))) or 1.0
    size = np.clip(np.nan_to_num(np.abs(answers), nan=scale), _NEAREST * scale, _FURTHEST * scale)
    inside = around[tuple(asked.T)]
    signed = np.where(inside, size, -size).astype(np.float32)

    vertices, faces, count = [], [], 0
    thickness = max(2, _SLAB // max(1, around[0].size))
    order = np.argsort(asked[:, 0], kind="stable")
    asked, signed = asked[order], signed[order]
    for start in range(0, around.shape[0] - 1, thickness):
        stop = min(start + thickness + 1, around.shape[0])
        part = np.where(around[start:stop], np.float32(_FURTHEST * scale), np.float32(-_FURTHEST * scale))
        begin, end = np.searchsorted(asked[:, 0], (start, stop))
        i, j, k = asked[begin:end].T
        part[i - start, j, k] = signed[begin:end]
        first = low + np.array([start, 0, 0])
        _close_at_ends(part, around[start:stop], first, np.array(mask.shape))
        if part.min() > 0 or part.max() < 0:
            continue
        cubes: Any = measure.marching_cubes
        found, triangles, _, _ = cubes(part, level=0.0, gradient_direction="descent")
        vertices.append(found.astype(np.float64) + first)
        faces.append(triangles.astype(np.int64) + count)
        count += len(found)
    seams = np.arange(thickness, around.shape[0] - 1, thickness) + low[0]
    points, triangles = _merged(np.concatenate(vertices), np.concatenate(faces), seams)
    fixed = np.asarray(((points < 0) | (points > np.array(mask.shape) - 1)).any(axis=1))
    return Surface(points, outward(points, triangles), fixed)


def outward(points: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"]) -> Int[np.ndarray, "F 3"]:
    """The faces, all turned around if the volume that they enclose would be negative."""
    a, b, c = (points[faces[:, i]] for i in range(3))
    return faces if float(np.einsum("ij,ij->", a, np.cross(b, c))) >= 0 else faces[:, ::-1].copy()


def _padded(
    mask: Bool[np.ndarray, "X Y Z"], low: Int[np.ndarray, "3"], high: Int[np.ndarray, "3"], fill: bool
) -> Bool[np.ndarray, "x y z"]:
    """The box from low to high, which may reach beyond the volume."""
    out = np.full(tuple(high - low), fill)
    first, last = np.maximum(low, 0), np.minimum(high, mask.shape)
    part = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    place = tuple(slice(a - lo, b - lo) for a, b, lo in zip(first, last, low, strict=True))
    out[place] = mask[part]
    return out


def _close_at_ends(
    part: Float[np.ndarray, "x y z"],
    inside: Bool[np.ndarray, "x y z"],
    low: Int[np.ndarray, "3"],
    shape: Int[np.ndarray, "3"],
) -> None:
    """Give voxels beyond the volume the opposite value of their neighbour in it: the cap lies halfway."""
    for axis in range(3):
        values, mask = np.moveaxis(part, axis, 0), np.moveaxis(inside, axis, 0)
        if low[axis] < 0:
            values[0][mask[1]] = -values[1][mask[1]]
        if low[axis] + len(values) > shape[axis]:
            values[-1][mask[-2]] = -values[-2][mask[-2]]


def _merged(
    points: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"], seams: Int[np.ndarray, " S"]
) -> tuple[Float[np.ndarray, "v 3"], Int[np.ndarray, "F 3"]]:
    """Join the vertices that two slabs made, of the same values, on the plane between them."""
    doubled = np.flatnonzero(np.isin(points[:, 0], seams))
    if not len(doubled):
        return points, faces
    _, first, inverse = np.unique(points[doubled], axis=0, return_index=True, return_inverse=True)
    stands_for = np.arange(len(points))
    stands_for[doubled] = doubled[first[inverse.reshape(-1)]]
    kept, renamed = np.unique(stands_for, return_inverse=True)
    return points[kept], renamed.reshape(-1)[faces]

"""Marching cubes in a narrow band: field values are asked only where a surface passes.

A vertex of marching cubes lies on the edge between two neighbouring voxels of which one is inside. Only such
voxels are asked; all others are known to be inside or outside by their label, and their value moves no
vertex.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from scipy import ndimage
from skimage import measure

Triple = tuple[int, int, int]
Values = Callable[[Float[np.ndarray, "N 3"]], Float[np.ndarray, " N"]]

# Voxels of one slab: bounds the dense float array that marching cubes needs.
_SLAB = 2**20
# Smallest and largest distance of a value from the level, relative to the median: no vertex falls onto a
# voxel, where several would coincide, also as far as float32 tells them apart.
_NEAREST, _FURTHEST = 1e-3, 10.0
# Of values inside, so that none are as large as those outside: where both diagonals of a cube's face are as far from
# the level, its two sides may be cut in different ways.
_NO_TIE = 1.001


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


def bounding_box(labels: Integer[np.ndarray, "X Y Z"], label: int) -> tuple[slice, slice, slice] | None:
    """The smallest box around a structure, found plane by plane; None where it is absent."""
    planes = np.zeros(labels.shape[0], dtype=bool)
    shadow = np.zeros(labels.shape[1:], dtype=bool)
    for x, plane in enumerate(labels):
        inside = plane == label
        planes[x] = inside.any()
        shadow |= inside
    sides = [np.flatnonzero(seen) for seen in (planes, shadow.any(axis=1), shadow.any(axis=0))]
    if not len(sides[0]):
        return None
    first, second, third = (slice(int(side[0]), int(side[-1]) + 1) for side in sides)
    return first, second, third


def narrow_band(mask: Bool[np.ndarray, "X Y Z"]) -> Int[np.ndarray, "N 3"]:
    """Voxels with a 6-neighbour on the other side; beyond its end a mask counts as outside."""
    thickness = max(1, _SLAB // max(1, mask[0].size))
    found = []
    for start in range(0, len(mask), thickness):
        first = max(start - 1, 0)
        part = mask[first : start + thickness + 1]
        band = ndimage.binary_dilation(~part, border_value=1) & part
        band |= ndimage.binary_dilation(part) & ~part
        # The planes at the ends are there for their neighbours only.
        sites = np.argwhere(band[start - first : start - first + thickness])
        sites[:, 0] += start
        found.append(sites)
    return np.concatenate(found)


def marching_cubes(mask: Bool[np.ndarray, "X Y Z"], values: Values, corner: Triple, shape: Triple) -> Surface:
    """The closed surface of a mask, its vertices placed by field values.

    Args:
        mask: Inside (True) or outside, for every voxel of a box of the volume; outside all of it is outside.
        values: Asked for voxels in the narrow band: above 0 inside. Where the sign contradicts the mask, the
            mask holds.
        corner: The box's first voxel.
        shape: Voxels of the volume.

    Returns:
        The surface, in voxel indices of the volume; empty when nothing is inside. It is closed also where the
        structure leaves the volume.
    """
    if not mask.any():
        return Surface(np.empty((0, 3)), np.empty((0, 3), dtype=np.int64), np.empty(0, dtype=bool))
    # One more voxel around: a ring of the volume, or one that stands for what lies beyond it.
    around, low = np.pad(mask, 1), np.array(corner) - 1
    sites = narrow_band(around)
    in_volume = ((sites + low >= 0) & (sites + low < shape)).all(axis=1)
    asked = sites[in_volume]
    answers = np.asarray(values((asked + low).astype(np.float64)), dtype=np.float32)
    scale = float(np.median(np.abs(answers))) or 1.0
    size = np.clip(np.nan_to_num(np.abs(answers), nan=scale), _NEAREST * scale, _FURTHEST * scale)
    inside = around[tuple(asked.T)]
    signed = np.where(inside, _NO_TIE * size, -size).astype(np.float32)

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
        _close_at_ends(part, around[start:stop], first, np.array(shape))
        if part.min() > 0 or part.max() < 0:
            continue
        cubes: Any = measure.marching_cubes
        found, triangles, _, _ = cubes(part, level=0.0, gradient_direction="descent")
        vertices.append(found.astype(np.float64) + first)
        faces.append(triangles.astype(np.int64) + count)
        count += len(found)
    seams = np.arange(thickness, around.shape[0] - 1, thickness) + low[0]
    points, triangles = _merged(np.concatenate(vertices), np.concatenate(faces), seams)
    fixed = np.asarray(((points < 0) | (points > np.array(shape) - 1)).any(axis=1))
    return Surface(points, outward(points, triangles), fixed)


def outward(points: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"]) -> Int[np.ndarray, "F 3"]:
    """The faces, all turned around if the volume that they enclose would be negative."""
    a, b, c = (points[faces[:, i]] for i in range(3))
    return faces if float(np.einsum("ij,ij->", a, np.cross(b, c))) >= 0 else faces[:, ::-1].copy()


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

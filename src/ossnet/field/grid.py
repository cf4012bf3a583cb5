"""Output grids: which locations of the world an answer is wanted at."""

from dataclasses import dataclass
from itertools import product
from numbers import Integral, Real
from typing import Any

import numpy as np
from jaxtyping import Float

from ossnet.errors import SettingsError
from ossnet.volume import Affine, Orientation, Shape, spacing_of

Box = tuple[tuple[int, int, int], tuple[int, int, int]]


@dataclass(frozen=True)
class Grid:
    """Voxels of an answer.

    Attributes:
        shape: Voxels along each axis.
        affine: (4, 4) voxel index → world mm.
    """

    shape: Shape
    affine: Affine

    @classmethod
    def with_shape(cls, base: "Grid", shape: Shape) -> "Grid":
        """Another number of voxels over the same extent in the world (outer voxel faces coincide)."""
        if min(shape) < 1:
            raise SettingsError(
                "shape", f"{shape} has an axis without voxels", "Give at least one voxel an axis"
            )
        scale = np.array(base.shape) / np.array(shape)
        step = np.eye(4)
        step[:3, :3] = np.diag(scale)
        step[:3, 3] = scale / 2 - 0.5
        return cls(shape, base.affine @ step)

    @classmethod
    def with_spacing(cls, base: "Grid", spacing: float | tuple[float, float, float]) -> "Grid":
        """Voxels of a given size in mm; the extent is that of `base` to within half a voxel, centred on it."""
        wanted = np.broadcast_to(np.asarray(spacing, dtype=float), (3,))
        if not (np.isfinite(wanted).all() and (wanted > 0).all()):
            raise SettingsError(
                "spacing", f"{spacing} mm is not above 0", "Give mm per voxel, one or three values"
            )
        have = np.array(spacing_of(base.affine))
        x, y, z = (max(1, round(float(v))) for v in np.array(base.shape) * have / wanted)
        scale = wanted / have
        step = np.eye(4)
        step[:3, :3] = np.diag(scale)
        step[:3, 3] = (np.array(base.shape) - 1) / 2 - scale * (np.array([x, y, z]) - 1) / 2
        return cls((x, y, z), base.affine @ step)

    def part(self, first: Shape, shape: Shape) -> "Grid":
        """Some of the voxels, from `first` on."""
        shift = np.eye(4)
        shift[:3, 3] = first
        return Grid(shape, self.affine @ shift)

    def to(self, other: "Grid") -> Float[np.ndarray, "4 4"]:
        """The 4×4 map from voxel indices here to voxel indices of another grid.

        Grids that differ by whole voxels map integers to integers, also where a file's float32 rounded one of
        the affines: a map that is within a thousandth of a voxel of such a one everywhere on the grid is it.
        """
        out: np.ndarray = np.linalg.inv(other.affine) @ self.affine
        near: np.ndarray = np.round(out)
        furthest = np.abs(out - near)[:3] @ [*self.shape, 1]
        return near if bool((furthest < 1e-3).all()) else out

    def spans(self, other: "Grid") -> bool:
        """Whether both cover the same part of the world, axis by axis, to within a voxel of the other."""
        corners = np.array(list(product((0, 1), repeat=3)))
        mapped = (corners * self.shape - 0.5) @ self.to(other)[:3, :3].T + self.to(other)[:3, 3]
        return bool((np.abs(mapped - (corners * other.shape - 0.5)) <= 1).all())


def box_shape(box: Box) -> Shape:
    """Voxels along each axis of a box."""
    x, y, z = (high - low for low, high in zip(*box, strict=True))
    return x, y, z


def _is_array(values: Any, shape: tuple[int, ...]) -> bool:
    try:
        return bool(np.shape(values) == shape)
    except ValueError:  # rows of different lengths
        return False


def check_box(box: Box, shape: Shape) -> Box:
    """A box ((x0, y0, z0), (x1, y1, z1)) of voxels, ends excluded, inside a grid.

    Raises:
        SettingsError: It is empty or leaves the grid.
    """
    if not _is_array(box, (2, 3)):
        raise SettingsError("region", f"{box} is not two corners", "Write ((x0, y0, z0), (x1, y1, z1))")
    (x0, y0, z0), (x1, y1, z1) = box
    if not all(isinstance(n, Integral) for corner in box for n in corner):
        raise SettingsError("region", f"{box} has fractions of voxels", "Give whole numbers")
    for low, high, size in zip((x0, y0, z0), (x1, y1, z1), shape, strict=True):
        if not 0 <= low < high <= size:
            raise SettingsError(
                "region",
                f"{box} is not inside the grid of {shape} voxels",
                "Give two corners, the second excluded",
            )
    return box


def moved_triple(name: str, values: Any, orientation: Orientation) -> Any:
    """Per-axis values of the stored grid in the oriented axes.

    Raises:
        SettingsError: They are not three numbers.
    """
    if not _is_array(values, (3,)) or np.asarray(values).dtype.kind not in "iuf":
        raise SettingsError(name, f"{values!r} is not one number an axis", "Give three")
    if name == "shape" and not all(float(value).is_integer() for value in values):
        raise SettingsError(name, f"{values!r} has fractions of voxels", "Give whole numbers")
    return orientation.moved(values)


def moved_spacing(spacing: Any, orientation: Orientation) -> float | tuple[float, float, float]:
    """One voxel size, or those per axis of the stored grid in the oriented axes (errors as for `moved_triple`)."""
    if isinstance(spacing, Real):
        return float(spacing)
    return tuple(map(float, moved_triple("spacing", spacing, orientation)))  # type: ignore[return-value]


def oriented_box(box: Box, grid: Grid, orientation: Orientation) -> Box:
    """A box of voxels as they are stored, on the grid in another axis order.

    Raises:
        SettingsError: It is empty or leaves the grid.
    """
    x, y, z = (grid.shape[i] for i in np.argsort(orientation.axes))
    return moved_box(check_box(box, (x, y, z)), orientation.matrix((x, y, z)))


def moved_box(box: Box, matrix: Float[np.ndarray, "4 4"]) -> Box:
    """A box after an axis permutation with flips, `matrix` mapping new voxel indices to old ones."""
    inverse = np.linalg.inv(matrix)
    corners = np.array(list(product(*zip(box[0], (np.array(box[1]) - 1).tolist(), strict=True))), dtype=float)
    moved = np.rint(corners @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    low, high = moved.min(axis=0), moved.max(axis=0) + 1
    return (int(low[0]), int(low[1]), int(low[2])), (int(high[0]), int(high[1]), int(high[2]))

"""Scans and label maps with their place in the world.

Letters: C channels, X Y Z voxels in file order, N locations.
Voxel centres lie at integer indices; world coordinates are millimetres, RAS+ as NIfTI defines them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Integer, Num

from ossnet.errors import VolumeError

Affine = Float[np.ndarray, "4 4"]
Shape = tuple[int, int, int]
MARK = "ossnet"
"""How the `origin` of our own results begins."""
VALUES = "values"
"""At the end of the `origin` of results that hold the values of the training's label files where these have gaps."""

# Not typing.Self: the checks that tests add to each function do not know it outside of a checked class.
_P = TypeVar("_P", bound="_Placed")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class FileHeader:
    """What a label map written for a scan takes over from the scan's file.

    `qform_code` and `sform_code` are NIfTI transform codes, `units` the raw `xyzt_units` byte,
    `version` 1 or 2 for NIfTI-1 or NIfTI-2. `to_qform`: rows of the 4×4 map, in mm, from where the affine puts
    voxels to where the qform of the same file does; None where the two agree.
    """

    qform_code: int = 1
    sform_code: int = 1
    units: int = 2
    version: int = 1
    to_qform: tuple[tuple[float, ...], ...] | None = None


def flipped(array: np.ndarray, flips: tuple[bool, bool, bool]) -> np.ndarray:
    """Mirror the last three axes; a view."""
    axes = [array.ndim - 3 + axis for axis, flip in enumerate(flips) if flip]
    mirrored: np.ndarray = np.flip(array, tuple(axes))
    return mirrored


@dataclass(frozen=True)
class Orientation:
    """A permutation of the voxel axes followed by flips: how one voxel order becomes another.

    `axes[i]` is the stored axis that becomes axis i; `flips[i]` says whether the new axis i is then reversed.
    """

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    def moved(self, values: Sequence[Number]) -> tuple[Number, Number, Number]:
        """One value a stored axis, such as a shape or a spacing, in the order of the new axes."""
        x, y, z = (values[axis] for axis in self.axes)
        return x, y, z

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Reorder the last three axes of `array` (..., X, Y, Z); a view, no copy."""
        lead = array.ndim - 3
        moved = array.transpose(*range(lead), *(lead + a for a in self.axes))
        return flipped(moved, self.flips)

    def undo(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `apply`; a view, no copy."""
        lead = array.ndim - 3
        unflipped = flipped(array, self.flips)
        return unflipped.transpose(*range(lead), *(lead + a for a in np.argsort(self.axes)))

    def matrix(self, stored_shape: Shape) -> Affine:
        """The 4×4 map from new voxel indices to stored voxel indices."""
        out = np.zeros((4, 4))
        out[3, 3] = 1.0
        for new, (stored, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            out[stored, new] = -1.0 if flip else 1.0
            out[stored, 3] = stored_shape[stored] - 1 if flip else 0.0
        return out


def closest_canonical(affine: Affine) -> Orientation:
    """The flips and swaps that bring voxel axes nearest to right, anterior, superior (RAS+).

    Each voxel axis is assigned to one world axis so that the summed |cosine| is largest: for a sheared or
    strongly oblique affine the nearest axis of each alone need not be a permutation.
    """
    columns = affine[:3, :3]
    cosines = columns / np.linalg.norm(columns, axis=0)
    permutations = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]

    def rank(axes: tuple[int, int, int]) -> tuple[float, ...]:
        # axes[w] = voxel axis that runs along world axis w. Where several fit alike (45 degrees), the directions
        # that would come out decide: they do not depend on the stored order, as the voxel axes' numbers do.
        chosen = cosines[:, axes]
        directions = np.where(np.diag(chosen) < 0, -1, 1) * chosen
        return (round(float(np.trace(directions)), 6), *np.round(directions, 6).ravel().tolist())

    axes = max(permutations, key=rank)
    flips = tuple(bool(cosines[w, axes[w]] < 0) for w in range(3))
    return Orientation(axes, (flips[0], flips[1], flips[2]))


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Length of each voxel axis in mm."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def transform(points: Float[np.ndarray, "N 3"], affine: Affine) -> Float[np.ndarray, "N 3"]:
    """Map points by a 4×4 affine, in float64."""
    moved: np.ndarray = points @ affine[:3, :3].T.astype(np.float64) + affine[:3, 3]
    return moved


def largest_corner_gap(one: Affine, other: Affine, shape: Shape) -> float:
    """Largest distance in mm between the eight corner voxels of a grid under two affines."""
    corners = np.array(list(product(*((0.0, float(n - 1)) for n in shape))))
    return float(np.linalg.norm(transform(corners, one) - transform(corners, other), axis=1).max())


@dataclass(frozen=True, repr=False, eq=False)
class _Placed:
    """Voxels with an affine: what volumes and label maps share."""

    data: np.ndarray
    affine: Affine
    source: Path | None = None
    header: FileHeader = field(default_factory=FileHeader)
    origin: str = ""

    def __post_init__(self) -> None:
        where, affine = self.source or "volume", np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4):
            raise VolumeError(
                where, f"its affine is {affine.shape}, not 4 × 4", "Give the map from voxels to mm"
            )
        if self.data.size == 0:
            raise VolumeError(where, f"it has no voxels {self.data.shape}", "Give at least one voxel an axis")
        object.__setattr__(self, "affine", affine)
        # In this order: numpy warns of determinants of NaN.
        if not np.isfinite(self.affine).all() or np.linalg.det(self.affine[:3, :3]) == 0:
            raise VolumeError(
                self.source or "volume",
                "the affine is not invertible, so voxels have no place in the world",
                "Rewrite the header with a valid sform or qform",
            )

    def __repr__(self) -> str:
        shape, spacing = (" × ".join(f"{n:g}" for n in three) for three in (self.shape, self.spacing))
        channels = f", {len(self.data)} channels" if self.data.ndim == 4 and len(self.data) > 1 else ""
        source = f", {self.source}" if self.source else ""
        return f"{type(self).__name__}({shape} voxels of {spacing} mm{channels}, {self.data.dtype}{source})"

    @property
    def shape(self) -> Shape:
        """Voxels along X, Y, Z."""
        x, y, z = self.data.shape[-3:]
        return x, y, z

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along X, Y, Z in mm."""
        return spacing_of(self.affine)

    def to_world(self, locations: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
        """Voxel indices (N, 3) to world mm."""
        return transform(locations, self.affine)

    def to_voxel(self, points: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
        """World mm (N, 3) to (fractional) voxel indices."""
        return transform(points, np.linalg.inv(self.affine))

    def reoriented(self: _P, orientation: Orientation) -> _P:
        """The same voxels at the same places in the world, stored in another axis order (a view)."""
        return replace(
            self,
            data=orientation.apply(self.data),
            affine=self.affine @ orientation.matrix(self.shape),
        )

    def in_order_of(self: _P, other: "OnGrid") -> _P:
        """The same voxels at the same places in the world, axes stored as those of a grid that they lie on (a view)."""
        if same_place(self, other) is None:
            return self
        own = closest_canonical(other.affine)
        turned = self.reoriented(closest_canonical(self.affine))
        data = own.undo(turned.data)
        x, y, z = data.shape[-3:]
        return replace(turned, data=data, affine=turned.affine @ np.linalg.inv(own.matrix((x, y, z))))


def _require_array(data: Any, kinds: str, where: Path | str, what: str) -> None:
    """Refuse what is no numpy array of these kinds of values, in 64 bits at most."""
    found = data.dtype if isinstance(data, np.ndarray) else type(data).__name__
    if not isinstance(data, np.ndarray) or data.dtype.kind not in kinds or data.dtype.itemsize > 8:
        raise VolumeError(where, f"its data is {found}", f"Give a numpy array of {what}")


@dataclass(frozen=True, repr=False, eq=False)
class Volume(_Placed):
    """A scan.

    Attributes:
        data: (C, X, Y, Z), any real dtype, in the file's voxel order.
        affine: (4, 4) float64, voxel index → world mm.
        source: The (first) file it came from.
        header: What written results take over.
        origin: What made it, at most 79 letters, for the file that is written (`descrip` of a NIfTI header).
    """

    data: Num[np.ndarray, "C X Y Z"]

    def __post_init__(self) -> None:
        _require_array(self.data, "iufb", self.source or "volume", "numbers")
        if self.data.ndim != 4:
            raise VolumeError(
                self.source or "volume",
                f"its data has {self.data.ndim} axes instead of 4 (channels, x, y, z)",
                "Give data[None] for a scan of one channel",
            )
        super().__post_init__()

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.data.shape[0])

    def save(self, path: Path | str) -> None:
        """Write as NIfTI (`.nii`, `.nii.gz`), atomically; several channels become the fourth axis."""
        from ossnet.files.nifti import write_volume

        write_volume(self, Path(path))


@dataclass(frozen=True, repr=False, eq=False)
class LabelMap(_Placed):
    """A segmentation.

    Attributes:
        data: (X, Y, Z) integers, 0 is background; or truth values.
        affine: (4, 4) float64, voxel index → world mm.
        names: Label value → name.
        origin: What made it, at most 79 letters; read from and written into files (`descrip` of a NIfTI header).
        cropped: Whether it may be a part of its scan with background beyond, as 3D Slicer saves segmentations.
        values: Label value → the one that stands for it in files, for those that differ: networks number structures
            without gaps, BraTS 2020 has 1, 2 and 4.
    """

    data: Integer[np.ndarray, "X Y Z"] | Bool[np.ndarray, "X Y Z"]
    names: Mapping[int, str] = field(default_factory=dict)
    cropped: bool = False
    values: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_array(self.data, "iub", self.source or "label map", "whole numbers")
        if self.data.ndim != 3:
            raise VolumeError(
                self.source or "label map", f"its data has {self.data.ndim} axes", "Give (x, y, z)"
            )
        super().__post_init__()

    def in_order_of(self, other: "OnGrid") -> "LabelMap":
        """As of any voxels; what is cropped is surrounded by background where it lies on voxels of the other grid."""
        turned = super().in_order_of(other)
        if not self.cropped or turned.shape == other.shape:
            return turned
        first = np.rint(transform(turned.affine[None, :3, 3], np.linalg.inv(other.affine))[0])
        moved = other.affine @ np.block([[np.eye(3), first[:, None]], [np.zeros(3), 1.0]])
        if same_place(turned, replace(turned, affine=moved)):
            return turned
        start = first.astype(int)
        stop = start + turned.shape
        data = np.zeros(other.shape, turned.data.dtype)
        if (start < 0).any() or (stop > data.shape).any():
            return turned
        data[tuple(map(slice, start, stop))] = turned.data
        return replace(turned, data=data, affine=other.affine, cropped=False)

    @property
    def holds_classes(self) -> bool:
        """Whether it is a result of ours with the numbers of classes, whatever values label files have."""
        return self.origin.startswith(MARK) and not self.holds_values

    @property
    def holds_values(self) -> bool:
        """Whether it is a result of ours with the values of the training's label files, which are not 1 to K."""
        return self.origin.startswith(MARK) and self.origin.split()[-1] == VALUES

    def as_in_files(self, *, reuse: bool = False) -> "LabelMap":
        """The label map as it is saved: with the values of label files (`values`).

        Args:
            reuse: Write over `data` where its type holds them; the label map must not be used any more.
        """
        if not self.values:
            return self
        highest = max(int(self.data.max(initial=0)), *self.values)
        table = np.arange(highest + 1)
        table[list(self.values)] = list(self.values.values())
        table = table.astype(np.min_scalar_type(int(table.max())))
        data = (
            self.data if reuse and self.data.dtype == table.dtype else np.empty(self.data.shape, table.dtype)
        )
        numbers = self.data.view(np.uint8) if self.data.dtype == bool else self.data
        for new, old in zip(data, numbers, strict=True):  # plane by plane: `table[old]` is a copy
            new[...] = table[old]
        names = {self.values.get(value, value): name for value, name in self.names.items()}
        origin = f"{self.origin} {VALUES}" if self.origin.startswith(MARK) else self.origin
        return replace(self, data=data, names=names, values={}, origin=origin)

    def volumes_ml(self) -> dict[int, float]:
        """Volume of each structure present, in millilitres."""
        voxel_ml = abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000
        voxels: Counter[int] = Counter()
        # Plane by plane and without the background: sorting the whole map would need its size several times.
        for plane in self.data:
            values, counts = np.unique(plane[plane != 0], return_counts=True)
            voxels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        return {label: voxels[label] * voxel_ml for label in sorted(voxels)}

    def structures(self) -> dict[int, str]:
        """Value → name of all structures that are there or might have been."""
        found = {*self.names, *(int(value) for plane in self.data for value in np.unique(plane))} - {0}
        return {value: self.names.get(value) or f"label {value}" for value in sorted(found)}

    def surface_voxels(self) -> int:
        """Foreground voxels with a 6-neighbour of another label; beyond the grid lies background."""
        padded = np.pad(self.data, 1)
        inner = (slice(1, -1),) * 3
        surface = np.zeros(self.data.shape, dtype=bool)
        for axis in range(3):
            for shift in (-1, 1):
                surface |= np.roll(padded, shift, axis)[inner] != self.data
        return int((surface & (self.data != 0)).sum())

    def surface_mm2(self) -> float:
        """Size of all surfaces together in mm²: each surface voxel counts as one mean face of a voxel."""
        voxel_mm3 = abs(float(np.linalg.det(self.affine[:3, :3])))
        return self.surface_voxels() * float(voxel_mm3 ** (2 / 3))

    def save(self, path: Path | str) -> None:
        """Write as NIfTI (`.nii`, `.nii.gz`) or as a segmentation of 3D Slicer (`.seg.nrrd`), atomically.

        In the smallest unsigned type that holds the labels, which are those of label files (`values`).
        """
        from ossnet.files.nifti import write_labels
        from ossnet.files.slicer import write_slicer

        write = write_slicer if str(path).lower().endswith(".seg.nrrd") else write_labels
        write(self.as_in_files(), Path(path))


@runtime_checkable
class OnGrid(Protocol):
    """Voxels somewhere in the world: volumes, label maps, headers."""

    @property
    def shape(self) -> Shape: ...
    @property
    def affine(self) -> Affine: ...


def same_place(one: OnGrid, other: OnGrid, tolerance: float | None = None) -> str | None:
    """None when two grids lie on each other, otherwise the reason.

    Args:
        tolerance: Largest distance of corresponding corner voxels, in mm. None: a tenth of the smallest voxel size,
            at least 0.01 mm.
    """
    if tolerance is None:
        # Converters round voxel sizes: 0.7031 mm for 0.703125 adds up to 0.018 mm along 512 voxels, which is a
        # fortieth of one. What is really misplaced, by a voxel, half of one, or a degree, is further off.
        tolerance = max(0.01, 0.1 * min(*spacing_of(one.affine), *spacing_of(other.affine)))
    if one.shape != other.shape:
        return f"the shapes differ: {one.shape} and {other.shape}"
    gap = largest_corner_gap(one.affine, other.affine, one.shape)
    if not gap <= tolerance:
        return f"corner voxels lie up to {gap:.3g} mm apart"
    return None


def same_names(one: Mapping[int, str], other: Mapping[int, str]) -> str | None:
    """None when names (label value → name) that both have stand for the same values, otherwise those that do not."""
    shared = set(one.values()) & set(other.values())
    pairs = ((one, other), (other, one))
    apart = [", ".join(f"{k} {v}" for k, v in sorted(a.items() - b.items()) if v in shared) for a, b in pairs]
    return " instead of ".join(apart) if all(apart) else None

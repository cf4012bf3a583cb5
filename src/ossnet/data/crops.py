"""Crops of a scan for training, deformed.

One spatial map leads from the crop to the scan: flips, rotation, scaling, elastic deformation and a change of
spacing together. The crop is interpolated once through it; locations go through it analytically, so a target
is read from the label map at the exact place that the crop shows.

Letters: C channels, X Y Z voxels of the scan, A B D voxels of the crop, N locations, K classes, M surface
voxels. "crop" coordinates are voxel indices of the crop, "grid" those of the network's grid, "scan" those of
the scan as it is stored; voxel centres lie at integers in all three.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer, Num
from torch import Tensor

Triple = tuple[int, int, int]
Vector = Float[np.ndarray, " 3"]
Points = Float[np.ndarray, "N 3"]
ToTensor = Callable[[Num[np.ndarray, "C X Y Z"]], Float[Tensor, "C X Y Z"]]


_THIN = 16
"""With fewer voxels along an axis, rotation and bending would move most of a scan out of itself."""

_GROWN = 4
"""Augmentation is twice what it was after so many times the passes after which it began to grow."""

_AS_IN_USE = 0.5
"""Share of the crops in which a smaller scan begins where the crop does, as the network meets it in use."""

_BEND = 0.4
"""Largest displacement of the elastic grid, in distances between its control points."""


@dataclass(frozen=True)
class CropSource:
    """One case to cut crops from.

    Attributes:
        image: (C, X, Y, Z), in the file's type.
        labels: (X, Y, Z); binary: any label above 0 is the structure.
        classes: Logits a location: 1 for binary, otherwise classes including background.
        surfaces: Per structure, voxel indices on both sides of its surface (`surface_voxels`).
        normalise: Stored voxels of any part of the image to network input; elementwise.
        zoom: Voxels of the network's grid per voxel of the scan, per axis.
    """

    image: Num[np.ndarray, "C X Y Z"]
    labels: Integer[np.ndarray, "X Y Z"]
    classes: int
    surfaces: Sequence[Integer[np.ndarray, "_ 3"]]
    normalise: ToTensor
    zoom: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def shape(self) -> Triple:
        """Voxels of the scan."""
        x, y, z = self.labels.shape
        return x, y, z


@dataclass(frozen=True)
class CropSettings:
    """How crops are cut, augmented and asked. Probabilities are per crop."""

    crop: Triple
    """Voxels of a crop on the network's grid."""
    spacing: tuple[float, float, float]
    """mm of the network's grid: rotations are rotations in mm."""
    locations: int = 4096
    """Locations per crop."""
    strides: Triple = (8, 8, 8)
    """Voxels per cell of the coarse targets."""
    near_surface: float = 0.5
    """Share of the locations drawn near surfaces."""
    jitter: tuple[float, ...] = (1.0, 4.0)
    """Standard deviations of the distance from the surface, in voxels of the finest axis, with even odds."""
    on_voxels: float = 0.5
    """Share of the locations that are voxels of the crop; the others lie anywhere."""
    importance: float = 1.0
    """How far weights of locations undo that they crowd near surfaces (`data.crop_locations`): 1 wholly, 0 not."""
    least_near: float = 0.3
    """Share of the weight that the neighbourhoods of all structures together have where a crop shows little of each."""
    centred: float = 0.5
    """Share of the crops that hold a surface voxel at a random place; the others lie anywhere."""
    position: bool = False
    """Examples say where in their scan the locations lie."""
    soft: bool = True
    """Targets by trilinear interpolation of the labels instead of the nearest label."""
    flips: tuple[int, ...] = ()
    """Axes whose two directions are alike in this anatomy."""
    rotation: float = 0.3
    """Largest rotation in radians, in one plane."""
    scaling_all: float = 0.25
    """Largest |log| of the scale that the axes share: an organ differs in volume by factors from person to person."""
    scaling: float = 0.1
    """Largest |log| of a further scale in the plane of the rotation."""
    scaling_across: float = 0.1
    """Largest |log| of a further scale along the remaining axis."""
    elastic: float = 4.0
    """Largest displacement of the elastic grid, in units of the finest spacing."""
    spatial: float = 0.5
    """Probability of rotation, scaling and elastic deformation."""
    intensity: float = 1.0
    """Factor on the probabilities of all intensity changes; 0 for none."""
    contrast: float = 1.0
    """Factor on the ranges of contrast, brightness and gamma."""
    grows: int = 0
    """Passes through the cases after which augmentation begins to grow (`after`); 0: it never does."""

    def after(self, passes: float) -> "CropSettings":
        """As strong as is right when every case was drawn so often.

        At first strong augmentation only slows learning down; later cases are known by heart without it. ACDC, 32
        cases, sampled Dice: 0.886 at best without growth, after 68 passes, and 0.03 less after 350; 0.895 with it,
        after 91, and 0.008 less after 190. 64 left atria were known by heart after 90 passes; from 20 on it was not
        worth it in 60 (0.924 against 0.926, whole scans). 176 hippocampi were drawn 60 times in an hour.
        """
        if not self.grows or passes <= self.grows:
            return self
        share = min((passes / self.grows - 1) / (_GROWN - 1), 1.0)
        return replace(
            self,
            rotation=self.rotation * (1 + share),
            elastic=self.elastic * (1 + share),
            scaling=self.scaling * (1 + 0.67 * share),
            scaling_across=self.scaling_across * (1 + 0.5 * share),
            intensity=self.intensity * (1 + 0.6 * share),
            contrast=self.contrast * (1 + 0.3 * share),
        )


@dataclass(frozen=True)
class SpatialMap:
    """Crop coordinates to grid coordinates.

    In the plane `axes`: grid = centre + matrix · (crop - middle) + elastic; across: the scale alone.

    Attributes:
        axes: The two axes of the plane.
        matrix: (3, 3), zero between the plane and the remaining axis.
        centre: (3,) grid coordinates of the crop's middle.
        middle: (3,) crop coordinates of it.
        elastic: (2, H, W) displacements in grid voxels at control points spread over the plane of the crop,
        or None.
        crop: Voxels of the crop.
    """

    axes: tuple[int, int]
    matrix: Float[np.ndarray, "3 3"]
    centre: Vector
    middle: Vector
    elastic: Float[np.ndarray, "2 H W"] | None
    crop: Triple

    def displacement(self, locations: Points) -> Points:
        """Elastic part, in grid voxels: linear interpolation between the control points."""
        out = np.zeros_like(locations)
        if self.elastic is None:
            return out
        a, b = self.axes
        _, rows, columns = self.elastic.shape
        u = np.clip(locations[:, a] / max(self.crop[a] - 1, 1), 0, 1) * (rows - 1)
        v = np.clip(locations[:, b] / max(self.crop[b] - 1, 1), 0, 1) * (columns - 1)
        i, j = np.minimum(u.astype(np.int64), rows - 2), np.minimum(v.astype(np.int64), columns - 2)
        fu, fv = u - i, v - j
        for axis, field in zip(self.axes, self.elastic, strict=True):
            out[:, axis] = (field[i, j] * (1 - fv) + field[i, j + 1] * fv) * (1 - fu) + (
                field[i + 1, j] * (1 - fv) + field[i + 1, j + 1] * fv
            ) * fu
        return out

    def __call__(self, locations: Points) -> Points:
        """Crop coordinates (N, 3) to grid coordinates (N, 3)."""
        affine = (locations - self.middle) @ self.matrix.T + self.centre
        return np.asarray(affine + self.displacement(locations))

    def inverse(self, points: Points, steps: int = 4) -> Points:
        """Grid to crop coordinates, by fixed-point iteration: the elastic part is a contraction."""
        back = np.linalg.inv(self.matrix).T
        affine: np.ndarray = (points - self.centre) @ back + self.middle
        out = affine
        if self.elastic is not None:
            for _ in range(steps):
                out = affine - self.displacement(out) @ back
        return out


def to_scan(points: Points, zoom: Sequence[float]) -> Points:
    """Grid to scan coordinates."""
    return (points + np.float32(0.5)) / np.asarray(zoom, np.float32) - np.float32(0.5)


def to_grid(points: Points, zoom: Sequence[float]) -> Points:
    """Scan to grid coordinates."""
    return (points + np.float32(0.5)) * np.asarray(zoom, np.float32) - np.float32(0.5)


def inside(points: Points, shape: Triple) -> Bool[np.ndarray, " N"]:
    """Whether scan coordinates lie in a voxel of the scan."""
    return np.asarray(((points >= -0.5) & (points <= np.array(shape) - 0.5)).all(axis=1))


def draw_map(source: CropSource, settings: CropSettings, rng: np.random.Generator) -> SpatialMap:
    """Where the crop lies in the scan and how it is deformed.

    A crop that is not deformed holds voxels of the grid as they are, and across thick slices every crop does:
    interpolation between voxels smooths, and scans in use are not smoothed.
    """
    crop, mm = np.array(settings.crop), np.array(settings.spacing)
    size = np.array(source.shape) * np.array(source.zoom)
    centre = (size - 1) / 2
    # The crop stays inside the scan where it fits; a smaller scan stays inside the crop.
    room = np.abs(size - crop) / 2
    present = [s for s in source.surfaces if len(s)]
    shift = rng.uniform(-1, 1, 3) * room
    if present and rng.random() < settings.centred:
        surface = present[int(rng.integers(len(present)))]
        point = to_grid(surface[int(rng.integers(len(surface)))][None].astype(np.float32), source.zoom)[0]
        place = point + rng.uniform(-0.35, 0.35, 3) * crop - centre
        shift = np.where(size > crop, np.clip(place, -room, room), shift)
    if rng.random() < _AS_IN_USE:
        shift = np.where(size < crop, room, shift)

    allowed = _planes(mm, np.minimum(size, crop))
    a, b = allowed[int(rng.integers(len(allowed)))]
    c = 3 - a - b
    linear = np.eye(3)
    elastic = None
    thick = bool(mm[c] >= 2 * mm.min())
    deformed = rng.random() < settings.spatial
    if deformed:
        angle = rng.uniform(-1, 1) * settings.rotation
        shared = rng.uniform(-1, 1) * settings.scaling_all
        scale = np.exp(shared + rng.uniform(-1, 1) * settings.scaling)
        linear[a, a] = linear[b, b] = scale * np.cos(angle)
        linear[a, b], linear[b, a] = -scale * np.sin(angle), scale * np.sin(angle)
        across = np.exp(shared + rng.uniform(-1, 1) * settings.scaling_across)
        # Voxels further apart than a single slice is thick could all miss it.
        linear[c, c] = across if size[c] > 1 and not thick else 1.0
        linear = linear * mm / mm[:, None]
        if settings.elastic > 0:
            # Between control points displacements differ by less than these are apart: hardly anything is folded.
            most = min(settings.elastic * mm.min(), _BEND * (crop * mm)[[a, b]].min() / 4)
            strength = rng.uniform(0, 1) * most
            elastic = rng.uniform(-1, 1, (2, 5, 5)) * strength / mm[[a, b]].reshape(2, 1, 1)
            elastic = elastic.astype(np.float32)
    on_voxels = np.full(3, not deformed)
    on_voxels[c] |= thick
    shift = np.where(on_voxels, _on_voxels(shift, size - crop), shift)
    for axis in settings.flips:
        if rng.random() < 0.5:
            linear[:, axis] *= -1
    made = SpatialMap(
        (a, b),
        linear.astype(np.float32),
        (centre + shift).astype(np.float32),
        ((crop - 1) / 2).astype(np.float32),
        elastic,
        settings.crop,
    )
    if (size < crop).any() and not _shows(made, size):
        # A few slices at the edge of the crop can be moved out of it.
        middle = centre + np.where(on_voxels, _on_voxels(np.zeros(3), size - crop), 0)
        return replace(made, centre=middle.astype(np.float32), elastic=None)
    return made


def _on_voxels(shift: Vector, more: Vector) -> Vector:
    """The nearest shifts of a crop's middle from the scan's with which its voxels are voxels of the grid.

    Args:
        more: Voxels that the scan has more than the crop, or fewer: the crop stays inside it, or the other way round.
    """
    low, high = np.ceil(np.minimum(more, 0) - 1e-6), np.floor(np.maximum(more, 0) + 1e-6)
    return np.asarray(np.clip(np.rint(more / 2 + shift), low, high) - more / 2)


def _planes(mm: Vector, extent: Vector) -> list[tuple[int, int]]:
    """Planes of rotation and bending: slices far apart are not moved into each other, few slices not out of themselves.

    Args:
        mm: Spacing.
        extent: Voxels of the scan that the crop shows at most.
    """
    every: list[tuple[int, int]] = list(combinations(range(3), 2))
    thick = [p for p in every if extent[list(p)].min() >= _THIN] or every
    near = [p for p in thick if mm[list(p)].max() < 2 * mm.min()]
    return near or [min(thick, key=lambda p: (mm[list(p)].max(), -extent[list(p)].min()))]


def _shows(mapping: SpatialMap, size: Vector) -> bool:
    """Whether the crop shows a third of the scan's middle, along the axes on which the scan is the smaller one."""
    crop = np.array(mapping.crop)
    inner = [
        (n - 1) * np.array([0.2, 0.5, 0.8]) if n < c else middle + c * np.array([-0.2, 0.0, 0.2])
        for n, c, middle in zip(size, crop, mapping.centre, strict=True)
    ]
    points = np.stack(np.meshgrid(*inner, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.float32)
    shown = mapping.inverse(points)
    return float(((shown >= -0.5) & (shown <= crop - 0.5)).all(axis=1).mean()) >= 1 / 3


def _sections(
    source: CropSource, mapping: SpatialMap
) -> tuple[Float[np.ndarray, "AB 3"], Float[np.ndarray, " D"]]:
    """Scan coordinates of the voxels of a crop: in the plane of the map, and along the remaining axis.

    The map moves both apart from each other: voxels of a slice lie at the same places in every slice.
    """
    a, b = mapping.axes
    c, crop = 3 - a - b, mapping.crop
    rows, columns = np.meshgrid(np.arange(crop[a]), np.arange(crop[b]), indexing="ij")
    plane = np.zeros((crop[a] * crop[b], 3), np.float32)
    plane[:, a], plane[:, b], plane[:, c] = rows.ravel(), columns.ravel(), mapping.middle[c]
    across = np.tile(mapping.middle, (crop[c], 1)).astype(np.float32)
    across[:, c] = np.arange(crop[c])
    return to_scan(mapping(plane), source.zoom), to_scan(mapping(across), source.zoom)[:, c]


def cut(source: CropSource, mapping: SpatialMap) -> Float[Tensor, "C A B D"]:
    """The normalised image seen through the map; beyond the scan its border is repeated.

    Along the axis across the plane this is a linear interpolation of slices; in the plane one 2D
    interpolation with slices as channels, a third of the time of a 3D interpolation.
    """
    a, b = mapping.axes
    c = 3 - a - b
    crop, shape = mapping.crop, source.shape
    places, depth = _sections(source, mapping)
    depth = np.clip(depth, 0, shape[c] - 1)

    low, high = [0, 0, 0], [0, 0, 0]
    for axis, values in ((a, places[:, a]), (b, places[:, b]), (c, depth)):
        low[axis] = int(np.clip(np.floor(values.min()), 0, shape[axis] - 1))
        high[axis] = int(np.clip(np.ceil(values.max()), low[axis], shape[axis] - 1)) + 1
    part = source.image[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    box = source.normalise(part).permute(0, 1 + c, 1 + a, 1 + b)  # (C, slices, rows, columns)

    below = np.minimum(depth.astype(np.int64), shape[c] - 1)
    above = np.minimum(below + 1, shape[c] - 1)
    fraction = torch.from_numpy((depth - below).astype(np.float32)).view(1, -1, 1, 1)
    slices = box[:, torch.from_numpy(below - low[c])]
    if bool(fraction.any()):
        slices = torch.lerp(
            slices, box[:, torch.from_numpy(np.minimum(above - low[c], box.shape[1] - 1))], fraction
        )

    extent = np.array([high[b] - low[b], high[a] - low[a]], np.float32)
    xy = (places[:, [b, a]] - np.array([low[b], low[a]], np.float32)) * 2 / np.maximum(extent - 1, 1) - 1
    grid = torch.from_numpy(xy.astype(np.float32)).view(1, crop[a], crop[b], 2)
    channels = len(source.image)
    flat = slices.reshape(1, channels * crop[c], *slices.shape[2:])
    out = F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=True)
    out = out.view(channels, crop[c], crop[a], crop[b])
    order = [0, 0, 0]
    order[c], order[a], order[b] = 1, 2, 3
    return out.permute(0, *order).contiguous()


def cut_labels(source: CropSource, mapping: SpatialMap) -> Integer[np.ndarray, "A B D"]:
    """The labels nearest to the voxels of the crop; beyond the scan those at its border."""
    a, b = mapping.axes
    c, crop = 3 - a - b, mapping.crop
    places, depth = _sections(source, mapping)
    within, along = [1, 1, 1], [1, 1, 1]
    within[a], within[b], along[c] = crop[a], crop[b], crop[c]
    nearest: list[np.ndarray] = [depth] * 3
    for axis, values, shape in ((a, places[:, a], within), (b, places[:, b], within), (c, depth, along)):
        voxels = np.floor(values + 0.5).astype(np.intp)
        nearest[axis] = np.clip(voxels, 0, source.shape[axis] - 1).reshape(shape)
    return np.asarray(source.labels[tuple(nearest)])

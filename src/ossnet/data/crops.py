"""Training examples of the default network: a crop of a scan, locations in it, and their soft targets.

One spatial map leads from the crop to the scan: flips, rotation, scaling, elastic deformation and a change of
spacing together. The crop is interpolated once through it; locations go through it analytically, so a target
is read from the label map at the exact place that the crop shows.

Letters: C channels, X Y Z voxels of the scan, A B D voxels of the crop, N locations, K classes, M surface
voxels. "crop" coordinates are voxel indices of the crop, "grid" those of the network's grid, "scan" those of
the scan as it is stored; voxel centres lie at integers in all three.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer, Num
from scipy.ndimage import gaussian_filter
from torch import Tensor

Triple = tuple[int, int, int]
Vector = Float[np.ndarray, " 3"]
Points = Float[np.ndarray, "N 3"]
ToTensor = Callable[[Num[np.ndarray, "C X Y Z"]], Float[Tensor, "C X Y Z"]]


_CELL = 2
"""Voxels along each edge of the cells in which the density of locations is known."""


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
    """Standard deviations in voxels of the distance from the surface, with even odds."""
    importance: float = 1.0
    """How far the weights of locations undo that they crowd near surfaces (`_weights`): 1 wholly, 0 not at all."""
    centred: float = 0.5
    """Share of the crops that hold a surface voxel at a random place; the others lie anywhere."""
    soft: bool = True
    """Targets by trilinear interpolation of the labels instead of the nearest label."""
    flips: tuple[int, ...] = ()
    """Axes whose two directions are alike in this anatomy."""
    rotation: float = 0.3
    """Largest rotation in radians, in one plane."""
    scaling: float = 0.18
    """Largest |log| of the scale in the plane of the rotation."""
    scaling_across: float = 0.1
    """Largest |log| of the scale along the remaining axis."""
    elastic: float = 4.0
    """Largest displacement of the elastic grid, in units of the finest spacing."""
    spatial: float = 0.8
    """Probability of rotation, scaling and elastic deformation."""
    intensity: float = 1.0
    """Factor on the probabilities of all intensity changes; 0 for none."""


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


def surface_voxels(labels: Integer[np.ndarray, "X Y Z"], classes: int) -> list[Integer[np.ndarray, "_ 3"]]:
    """Per structure (1, or classes - 1), the indices (M, 3) of the voxels on both sides of its surface.

    These are voxels with a 6-neighbour on the other side. Both sides, because locations drawn around the inner one
    alone are inside more often than a location near the surface is, and a network trained on them draws
    structures too large. Structures that are absent have M = 0.
    """
    out = []
    for k in range(1, max(classes, 2)):
        mask = labels > 0 if classes == 1 else labels == k
        surface = np.zeros(mask.shape, dtype=bool)
        for axis in range(3):
            lead: list[Any] = [slice(None)] * 3
            trail: list[Any] = [slice(None)] * 3
            lead[axis], trail[axis] = slice(1, None), slice(None, -1)
            differs = mask[tuple(lead)] != mask[tuple(trail)]
            surface[tuple(lead)] |= differs
            surface[tuple(trail)] |= differs
        out.append(np.argwhere(surface).astype(np.int32))
    return out


def example(source: CropSource, settings: CropSettings, rng: np.random.Generator) -> dict[str, Tensor]:
    """One training example; everything random comes from `rng`.

    Returns:
        image: (C, A, B, D) float32.
        locations: (N, 3) float32, crop coordinates.
        importance: (N,) float32, what each of them counts; 1 on average.
        targets: (N,) occupancy in [0, 1] for binary, (N, K) class distributions otherwise.
        coarse: (1 or K, a, b, d), the targets at the centres of the coarse cells.
        weights: (a, b, d), 1 for coarse cells whose centre lies in the scan.
    """
    mapping = draw_map(source, settings, rng)
    image = cut(source, mapping)
    image = change_intensities(image, settings, rng)
    locations, importance = draw_locations(source, settings, mapping, rng)
    cells = [
        np.arange(n // s) * s + (s - 1) / 2 for n, s in zip(settings.crop, settings.strides, strict=True)
    ]
    centres = np.stack(np.meshgrid(*cells, indexing="ij"), axis=-1).astype(np.float32)
    places = to_scan(mapping(centres.reshape(-1, 3)), source.zoom)
    coarse = targets_at(source, places, settings.soft)
    grid = tuple(len(c) for c in cells)
    return {
        "image": image,
        "locations": torch.from_numpy(locations),
        "importance": torch.from_numpy(importance),
        "targets": torch.from_numpy(
            targets_at(source, to_scan(mapping(locations), source.zoom), settings.soft)
        ),
        "coarse": torch.from_numpy(np.ascontiguousarray(coarse.reshape(*grid, -1).transpose(3, 0, 1, 2))),
        "weights": torch.from_numpy(inside(places, source.shape).astype(np.float32).reshape(grid)),
    }


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
    """Where the crop lies in the scan and how it is deformed."""
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

    planes = list(combinations(range(3), 2))
    # Slices far apart are not rotated into each other.
    allowed = [p for p in planes if mm[list(p)].max() < 2 * mm.min()] or [(0, 1)]
    a, b = allowed[int(rng.integers(len(allowed)))]
    c = 3 - a - b
    linear = np.eye(3)
    elastic = None
    if rng.random() < settings.spatial:
        angle = rng.uniform(-1, 1) * settings.rotation
        scale = np.exp(rng.uniform(-1, 1) * settings.scaling)
        linear[a, a] = linear[b, b] = scale * np.cos(angle)
        linear[a, b], linear[b, a] = -scale * np.sin(angle), scale * np.sin(angle)
        linear[c, c] = np.exp(rng.uniform(-1, 1) * settings.scaling_across)
        linear = linear * mm / mm[:, None]
        if settings.elastic > 0:
            strength = rng.uniform(0, 1) * settings.elastic * mm.min()
            elastic = rng.uniform(-1, 1, (2, 5, 5)) * strength / mm[[a, b]].reshape(2, 1, 1)
            elastic = elastic.astype(np.float32)
    for axis in settings.flips:
        if rng.random() < 0.5:
            linear[:, axis] *= -1
    return SpatialMap(
        (a, b),
        linear.astype(np.float32),
        (centre + shift).astype(np.float32),
        ((crop - 1) / 2).astype(np.float32),
        elastic,
        settings.crop,
    )


def cut(source: CropSource, mapping: SpatialMap) -> Float[Tensor, "C A B D"]:
    """The normalised image seen through the map; beyond the scan its border is repeated.

    Along the axis across the plane this is a linear interpolation of slices; in the plane one 2D
    interpolation with slices as channels, a third of the time of a 3D interpolation.
    """
    a, b = mapping.axes
    c = 3 - a - b
    crop, shape = mapping.crop, source.shape
    # Places of the plane's pixels: the same in every slice.
    rows, columns = np.meshgrid(np.arange(crop[a]), np.arange(crop[b]), indexing="ij")
    plane = np.zeros((crop[a] * crop[b], 3), np.float32)
    plane[:, a], plane[:, b], plane[:, c] = rows.ravel(), columns.ravel(), mapping.middle[c]
    places = to_scan(mapping(plane), source.zoom)
    across = np.tile(mapping.middle, (crop[c], 1)).astype(np.float32)
    across[:, c] = np.arange(crop[c])
    depth = np.clip(to_scan(mapping(across), source.zoom)[:, c], 0, shape[c] - 1)

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


def draw_locations(
    source: CropSource, settings: CropSettings, mapping: SpatialMap, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "N 3"], Float[np.ndarray, " N"]]:
    """Locations in the crop that lie in the scan, `near_surface` of them close to a surface; and their weights."""
    crop = np.array(settings.crop, np.float32)
    wanted = round(settings.locations * settings.near_surface)
    near, kept = np.zeros((0, 3), np.float32), 1.0
    candidates = [
        _surface_in_crop(s, source, mapping, rng, 4 * wanted) for s in source.surfaces if len(s) and wanted
    ]
    candidates = [c for c in candidates if len(c)]
    if candidates:
        pick = rng.integers(len(candidates), size=2 * wanted)
        rank = rng.random(2 * wanted)
        near = np.empty((2 * wanted, 3), np.float32)
        for i, points in enumerate(candidates):
            mine = pick == i
            near[mine] = points[(rank[mine] * len(points)).astype(np.int64)]
        sigma = np.array(settings.jitter, np.float32)[rng.integers(len(settings.jitter), size=2 * wanted)]
        near += rng.standard_normal((2 * wanted, 3), dtype=np.float32) * sigma[:, None]
        valid = _valid(near, source, mapping)
        near, kept = valid[:wanted], len(valid) / len(near)
    parts, missing, drawn, valid_draws = [near], settings.locations - len(near), 0, 0
    while missing > 0:
        uniform = rng.random((2 * missing, 3), dtype=np.float32) * crop - np.float32(0.5)
        drawn += len(uniform)
        uniform = _valid(uniform, source, mapping)
        valid_draws += len(uniform)
        parts.append(uniform[:missing])
        missing -= len(parts[-1])
    locations = np.concatenate(parts)
    if not 0 < len(near) < len(locations) or settings.importance == 0:
        return locations, np.ones(len(locations), np.float32)
    everywhere = (len(locations) - len(near)) * drawn / (valid_draws * float(crop.prod()))
    crowd = everywhere + len(near) / kept * _near_density(candidates, settings, locations)
    weights = crowd**-settings.importance
    return locations, np.asarray(weights / weights.mean(), np.float32)


def _near_density(
    candidates: Sequence[Float[np.ndarray, "_ 3"]], settings: CropSettings, locations: Points
) -> Float[np.ndarray, " N"]:
    """How densely locations near surfaces are drawn where `locations` lie, a draw and voxel.

    A location near a surface is drawn for its label: the end of a vessel is asked often in a scan whose label
    follows the vessel so far, and seldom in one whose label ends earlier. A network that is trained on these as they
    come learns the odds of the draw, and draws everything longer than it was labelled. Weights against this
    density give it the odds of the voxels, while the surface is still looked at closely.

    The density is that of the candidates, smoothed as the draw smooths them; right to a few percent.
    """
    shape = [-(-n // _CELL) for n in settings.crop]
    counts = np.zeros(math.prod(shape), np.float32)
    for points in candidates:
        found = np.bincount(_cells(points, shape), minlength=len(counts))
        counts += found.astype(np.float32) / (len(points) * len(candidates) * _CELL**3)
    grid = counts.reshape(shape)
    smooth = [gaussian_filter(grid, s / _CELL, mode="constant", truncate=3) for s in settings.jitter]
    density: np.ndarray = np.mean(smooth, axis=0, dtype=np.float32).ravel()
    return np.asarray(density[_cells(locations, shape)])


def _cells(locations: Points, shape: Sequence[int]) -> Integer[np.ndarray, " N"]:
    """Flat indices of the cells that locations lie in."""
    x, y, z = (
        np.clip(((locations[:, i] + 0.5) / _CELL).astype(np.int64), 0, n - 1) for i, n in enumerate(shape)
    )
    return np.asarray((x * shape[1] + y) * shape[2] + z)


def _valid(locations: Points, source: CropSource, mapping: SpatialMap) -> Float[np.ndarray, "V 3"]:
    crop = np.array(mapping.crop, np.float32)
    here = ((locations >= -0.5) & (locations <= crop - 0.5)).all(axis=1)
    here &= inside(to_scan(mapping(locations), source.zoom), source.shape)
    return locations[here]


def _surface_in_crop(
    surface: Integer[np.ndarray, "M 3"],
    source: CropSource,
    mapping: SpatialMap,
    rng: np.random.Generator,
    limit: int,
) -> Float[np.ndarray, "V 3"]:
    """At most about `limit` surface voxels that the crop shows, in crop coordinates."""
    if len(surface) > 4 * limit:
        surface = surface[rng.integers(len(surface), size=4 * limit)]
    points = mapping.inverse(to_grid(surface.astype(np.float32), source.zoom))
    crop = np.array(mapping.crop, np.float32)
    return points[((points >= -0.5) & (points <= crop - 0.5)).all(axis=1)]


def targets_at(
    source: CropSource, points: Points, soft: bool
) -> Float[np.ndarray, "N"] | Float[np.ndarray, "N K"]:
    """Occupancy (N,) or class distribution (N, K) at scan coordinates; beyond the scan its border is
    repeated."""
    shape, labels = source.shape, source.labels
    if not soft:
        nearest = [np.clip(np.floor(points[:, i] + 0.5).astype(np.int64), 0, shape[i] - 1) for i in range(3)]
        found, weights = labels[tuple(nearest)][:, None], np.ones((len(points), 1), np.float32)
    else:
        steps, fractions = [], []
        for i in range(3):
            x = np.clip(points[:, i], 0, shape[i] - 1)
            first = np.minimum(x.astype(np.int64), max(shape[i] - 2, 0))
            steps.append((first, np.minimum(first + 1, shape[i] - 1)))
            fractions.append((1 - (x - first), x - first))
        corners = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        found = np.stack([labels[steps[0][i], steps[1][j], steps[2][k]] for i, j, k in corners], axis=1)
        weights = np.stack(
            [fractions[0][i] * fractions[1][j] * fractions[2][k] for i, j, k in corners], axis=1
        )
    if source.classes == 1:
        return np.asarray(((found > 0) * weights).sum(axis=1), np.float32)
    shares = [((found == k) * weights).sum(axis=1) for k in range(source.classes)]
    return np.stack(shares, axis=1).astype(np.float32)


def change_intensities(
    image: Float[Tensor, "C A B D"], settings: CropSettings, rng: np.random.Generator
) -> Float[Tensor, "C A B D"]:
    """Blur, low resolution, noise, contrast, brightness and gamma, each with its own probability."""

    def happens(probability: float) -> bool:
        return bool(rng.random() < probability * settings.intensity)

    mm = np.array(settings.spacing)
    close = mm < 2 * mm.min()
    if happens(0.1):
        image = blur(image, tuple(float(rng.uniform(0.4, 1.0)) if c else 0.0 for c in close))
    if happens(0.1):
        factor = rng.uniform(0.5, 1.0)
        image = low_resolution(image, tuple(factor if c else 1.0 for c in close))
    if happens(0.15):
        noise = rng.standard_normal(tuple(image.shape), dtype=np.float32)
        image = image + torch.from_numpy(noise) * float(rng.uniform(0.02, 0.3))
    for channel in range(len(image)):
        if happens(0.3):
            factor, shift = float(np.exp(rng.uniform(-0.3, 0.3))), float(rng.uniform(-0.3, 0.3))
            image = _with_channel(image, channel, image[channel] * factor + shift)
        if happens(0.3):
            exponent = float(np.exp(rng.uniform(-0.4, 0.4)))
            image = _with_channel(
                image, channel, gamma(image[channel], exponent, invert=bool(rng.random() < 0.25))
            )
    return image


def _with_channel(image: Tensor, channel: int, values: Tensor) -> Tensor:
    if len(image) == 1:
        return values[None]
    return torch.cat([image[:channel], values[None], image[channel + 1 :]])


def gamma(image: Float[Tensor, "A B D"], exponent: float, invert: bool) -> Float[Tensor, "A B D"]:
    """A power of the values scaled to [0, 1], then the mean and standard deviation of before."""
    if invert:
        return -gamma(-image, exponent, invert=False)
    low, high = image.aminmax()
    extent = high - low
    if float(extent) < 1e-6:
        return image
    out = ((image - low) / extent).pow(exponent)
    std, mean = torch.std_mean(image)
    std_out, mean_out = torch.std_mean(out)
    return (out - mean_out) * (std / std_out.clamp(min=1e-6)) + mean


def blur(image: Float[Tensor, "C A B D"], sigma: tuple[float, ...]) -> Float[Tensor, "C A B D"]:
    """Gaussian blur with a standard deviation in voxels per axis (at most 1: three taps a side suffice)."""
    out = image
    for axis, s in enumerate(sigma, start=1):
        if s <= 0 or image.shape[axis] < 2:
            continue
        taps = np.exp(-0.5 * (np.arange(4) / s) ** 2)
        taps = taps / (taps[0] + 2 * taps[1:].sum())
        n = image.shape[axis]
        total = out * float(taps[0])
        for distance in (1, 2, 3):
            for sign in (-1, 1):
                index = (torch.arange(n) + sign * distance).clamp(0, n - 1)
                total = total + out.index_select(axis, index) * float(taps[distance])
        out = total
    return out


def low_resolution(image: Float[Tensor, "C A B D"], factor: tuple[float, ...]) -> Float[Tensor, "C A B D"]:
    """As if scanned at `factor` times the resolution per axis, and interpolated back."""
    shape = tuple(image.shape[1:])
    small = tuple(max(1, round(n * f)) for n, f in zip(shape, factor, strict=True))
    down = F.interpolate(image[None], small, mode="nearest")
    return F.interpolate(down, shape, mode="trilinear", align_corners=False)[0]


def without_augmentation(settings: CropSettings) -> CropSettings:
    """The same crops and locations, as scanned."""
    return replace(settings, spatial=0.0, intensity=0.0, flips=())

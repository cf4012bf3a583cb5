"""Where a training crop is asked, and what is right there.

Letters and coordinates as in `data.crops`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy.ndimage import find_objects, gaussian_filter

from ossnet.data.crops import CropSettings, CropSource, Points, SpatialMap, inside, to_grid, to_scan

_CELL = 2
"""Voxels along each edge of the cells in which the density of locations is known; one across thick slices."""

_LITTLE = (0.03, 0.06)
"""With less than the second share of the weight near it, times the number of structures, a crop shows little of a
structure, with the first or less as good as nothing. Hearts have 0.04 to 0.17, atria and hippocampi 0.15 to 0.26."""


def surface_voxels(labels: Integer[np.ndarray, "X Y Z"], classes: int) -> list[Integer[np.ndarray, "_ 3"]]:
    """Per structure (1, or classes - 1), the indices (M, 3) of the voxels on both sides of its surface.

    These are voxels with a 6-neighbour on the other side. Both sides, because locations drawn around the inner one
    alone are inside more often than a location near the surface is, and a network trained on them draws
    structures too large. Structures that are absent have M = 0.
    """
    out = []
    if classes == 1:
        labels, classes = (labels > 0).astype(np.uint8), 2
    for k, box in enumerate(find_objects(labels, max_label=classes - 1), 1):
        if box is None:
            out.append(np.zeros((0, 3), np.int32))
            continue
        low = [max(s.start - 1, 0) for s in box]
        mask = labels[tuple(slice(a, s.stop + 1) for a, s in zip(low, box, strict=True))] == k
        surface = np.zeros(mask.shape, dtype=bool)
        for axis in range(3):
            lead: list[Any] = [slice(None)] * 3
            trail: list[Any] = [slice(None)] * 3
            lead[axis], trail[axis] = slice(1, None), slice(None, -1)
            differs = mask[tuple(lead)] != mask[tuple(trail)]
            surface[tuple(lead)] |= differs
            surface[tuple(trail)] |= differs
        out.append((np.argwhere(surface) + low).astype(np.int32))
    return out


def draw_locations(
    source: CropSource, settings: CropSettings, mapping: SpatialMap, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "N 3"], Float[np.ndarray, " N"]]:
    """Locations in the crop that lie in the scan, `near_surface` of them close to a surface; and their weights.

    Weights, 1 on average, undo that locations crowd near surfaces (`_density`). But where a crop shows little of a
    structure, all that lies near it would then count next to nothing, and a network that answers background (or the
    organ that the structure lies in) everywhere would hear of no mistake: spots of 5 voxels in a crop of 96³ were
    never found with a tenth of the weight, and within 60 steps with three tenths. There the neighbourhood of the
    structure counts more: `least_near` of the whole for all structures together.
    """
    crop = np.array(settings.crop, np.float32)
    wanted = round(settings.locations * settings.near_surface)
    near, kept = np.zeros((0, 3), np.float32), 1.0
    present = [s for s in source.surfaces if len(s) and wanted]
    shown = [_surface_in_crop(s, source, mapping, rng, max(4 * wanted // len(present), 64)) for s in present]
    shown = [points for points in shown if len(points)]
    group = np.zeros(0, np.int64)
    if shown:
        group = rng.integers(len(shown), size=2 * wanted)
        rank = rng.random(2 * wanted)
        near = np.empty((2 * wanted, 3), np.float32)
        for i, points in enumerate(shown):
            mine = group == i
            near[mine] = points[(rank[mine] * len(points)).astype(np.int64)]
        sigma = _sigmas(settings)[rng.integers(len(settings.jitter), size=2 * wanted)]
        near += rng.standard_normal((2 * wanted, 3), dtype=np.float32) * sigma
        near = _partly_on_voxels(near, source, settings, rng)
        valid = np.flatnonzero(_valid(near, source, mapping))
        kept = len(valid) / len(near)
        near, group = near[valid[:wanted]], group[valid[:wanted]]
    parts, missing, drawn, valid_draws = [near], settings.locations - len(near), 0, 0
    while missing > 0:
        uniform = rng.random((2 * missing, 3), dtype=np.float32) * crop - np.float32(0.5)
        drawn += len(uniform)
        uniform = _partly_on_voxels(uniform, source, settings, rng)
        uniform = uniform[_valid(uniform, source, mapping)]
        valid_draws += len(uniform)
        parts.append(uniform[:missing])
        missing -= len(parts[-1])
    locations = np.concatenate(parts)
    if not 0 < len(near) < len(locations) or settings.importance == 0:
        return locations, np.ones(len(locations), np.float32)
    voxels = float(crop.prod()) * valid_draws / drawn
    everywhere = (len(locations) - len(near)) / voxels
    crowd = everywhere + len(near) / kept * _density(
        shown, settings, locations, np.full(len(shown), 1 / len(shown))
    )
    weights = crowd**-settings.importance
    shares = np.bincount(group, weights[: len(near)], len(shown)) / weights.sum()
    least, enough = _LITTLE
    lack = np.clip((enough - shares * len(shown)) / (enough - least), 0, 1)
    if lack.any():
        share = settings.least_near * lack.mean()
        weights *= 1 + voxels * share / (1 - share) * _density(shown, settings, locations, lack / lack.sum())
    return locations, np.asarray(weights / weights.mean(), np.float32)


def _sigmas(settings: CropSettings) -> Float[np.ndarray, "J 3"]:
    """`settings.jitter` in voxels of each axis: as many mm along all of them."""
    mm = np.array(settings.spacing, np.float32)
    return np.asarray(np.array(settings.jitter, np.float32)[:, None] * (mm.min() / mm))


def _partly_on_voxels(
    locations: Points, source: CropSource, settings: CropSettings, rng: np.random.Generator
) -> Points:
    """`settings.on_voxels` of the locations moved to the centre of their voxel of the crop; beyond it none comes in.

    Whole scans are asked there, where features of fine maps are hardly mixed, while a location anywhere mixes those of
    two slices that may lie 10 mm apart. Along an axis on which a scan is resampled it is asked between voxels too.
    """
    moved = (rng.random(len(locations)) < settings.on_voxels)[:, None] & (np.array(source.zoom) == 1)
    return np.asarray(np.where(moved, np.floor(locations + np.float32(0.5)), locations))


def _density(
    shown: Sequence[Float[np.ndarray, "_ 3"]],
    settings: CropSettings,
    locations: Points,
    odds: Float[np.ndarray, " S"],
) -> Float[np.ndarray, " N"]:
    """How densely locations near surfaces are drawn where `locations` lie, a draw and voxel.

    Args:
        shown: Points of the surface of each structure.
        odds: How often each of them is drawn from; 1 together.

    A location near a surface is drawn for its label: the end of a vessel is asked often in a scan whose label
    follows the vessel so far, and seldom in one whose label ends earlier. A network that is trained on these as they
    come learns the odds of the draw, and draws everything longer than it was labelled. Weights against this
    density give it the odds of the voxels, while the surface is still looked at closely.

    The density is that of the points, smoothed as the draw smooths them. Cells blur it: right to a few percent,
    but for the first two voxels outside a structure, which count 11 to 18 % too much. Finer cells cost a tenth of a
    step, and shift logits there by 0.16 at most.
    """
    mm = settings.spacing
    cell = [1 if thickness >= 2 * min(mm) else _CELL for thickness in mm]
    shape = [-(-n // c) for n, c in zip(settings.crop, cell, strict=True)]
    counts = np.zeros(math.prod(shape), np.float32)
    for points, share in zip(shown, odds, strict=True):
        found = np.bincount(_cells(points, cell, shape), minlength=len(counts))
        counts += found.astype(np.float32) * (share / (len(points) * math.prod(cell)))
    grid = counts.reshape(shape)
    smooth = [gaussian_filter(grid, s / cell, mode="constant", truncate=3) for s in _sigmas(settings)]
    density: np.ndarray = np.mean(smooth, axis=0, dtype=np.float32).ravel()
    return np.asarray(density[_cells(locations, cell, shape)])


def _cells(locations: Points, cell: Sequence[int], shape: Sequence[int]) -> Integer[np.ndarray, " N"]:
    """Flat indices of the cells that locations lie in."""
    x, y, z = (
        np.clip(((locations[:, i] + 0.5) / c).astype(np.int64), 0, n - 1)
        for i, (c, n) in enumerate(zip(cell, shape, strict=True))
    )
    return np.asarray((x * shape[1] + y) * shape[2] + z)


def _valid(locations: Points, source: CropSource, mapping: SpatialMap) -> Bool[np.ndarray, " N"]:
    """Whether crop coordinates lie in the crop and in the scan."""
    crop = np.array(mapping.crop, np.float32)
    here = ((locations >= -0.5) & (locations <= crop - 0.5)).all(axis=1)
    return np.asarray(here & inside(to_scan(mapping(locations), source.zoom), source.shape))


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


def nearest_labels(source: CropSource, points: Points) -> Integer[np.ndarray, " N"]:
    """Labels of the voxels nearest to scan coordinates; beyond the scan those at its border."""
    nearest = [
        np.clip(np.floor(points[:, i] + 0.5).astype(np.int64), 0, n - 1) for i, n in enumerate(source.shape)
    ]
    return np.asarray(source.labels[tuple(nearest)])


def targets_at(
    source: CropSource, points: Points, soft: bool
) -> Float[np.ndarray, "N"] | Float[np.ndarray, "N K"]:
    """Occupancy (N,) or class distribution (N, K) at scan coordinates; beyond the scan its border is
    repeated."""
    shape, labels = source.shape, source.labels
    if not soft:
        found, weights = nearest_labels(source, points)[:, None], np.ones((len(points), 1), np.float32)
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

"""Which locations a network is trained and validated on (SPEC §3 "Sampling").

Letters: N locations, X Y Z voxels of the (oriented) scan. Locations returned are integer voxel indices on the
network's grid; labels are looked up in the scan's own label map, so that a fitted copy is never made.
"""

from collections.abc import Sequence

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Bool, Int64, Integer

from ossnet.data.preparation import Fit
from ossnet.volume import Shape

Flips = tuple[bool, bool, bool]
NO_FLIPS: Flips = (False, False, False)


def uniform_locations(
    rng: np.random.Generator, shape: Shape, count: int, include_last: bool = True
) -> Int64[np.ndarray, "N 3"]:
    """Uniform draws with replacement.

    Args:
        include_last: False draws floor(u * (S - 1)) as released, which never reaches the last voxel (SPEC §7.6).
    """
    top = np.array(shape) - (0 if include_last else 1)
    drawn: Int64[np.ndarray, "N 3"] = np.floor(rng.random((count, 3)) * np.maximum(top, 1)).astype(np.int64)
    return drawn


def released_border(mask: Bool[np.ndarray, "X Y Z"], kernel: int = 13) -> Bool[np.ndarray, "X Y Z"]:
    """The released border map: voxels with a Sobel response, widened by a max pool (SPEC §3, §7.8).

    Args:
        kernel: Pool size in voxels; 13 gives a band of 14 voxels at a flat face, 25 one of 26.
    """
    # int32 sums are exact; cancelling responses of single voxels must stay zero as they do in the original.
    grown = mask.astype(np.int32)
    edge = np.zeros(mask.shape, dtype=bool)
    for axis in range(3):
        edge |= ndi.sobel(grown, axis=axis, mode="reflect") != 0
    return np.asarray(ndi.maximum_filter(edge, size=kernel, mode="constant", cval=0))


def euclidean_border(
    mask: Bool[np.ndarray, "X Y Z"], spacing: tuple[float, float, float], width_mm: float
) -> Bool[np.ndarray, "X Y Z"]:
    """Voxels whose centre lies at most width_mm / 2 from the surface of the mask's voxels, on both sides."""
    near: Bool[np.ndarray, "X Y Z"] = np.where(
        mask, _near(~mask, spacing, width_mm / 2), _near(mask, spacing, width_mm / 2)
    )
    return near


def _near(
    mask: Bool[np.ndarray, "X Y Z"], spacing: tuple[float, float, float], reach_mm: float
) -> Bool[np.ndarray, "X Y Z"]:
    """Voxels whose centre lies at most so far from a voxel of the mask, which is a box and no point.

    The square of such a distance is a sum over axes, so it is made smaller along one axis after the other.
    """
    square = np.where(mask, np.float32(0), np.float32(np.inf))
    for axis, size in enumerate(spacing):
        before = np.moveaxis(square.copy(), axis, 0)
        along = np.moveaxis(square, axis, 0)
        for steps in range(1, min(int(reach_mm / size + 0.5 + 1e-6) + 1, len(along))):
            gap = np.float32(((steps - 0.5) * size) ** 2)
            np.minimum(along[steps:], before[:-steps] + gap, out=along[steps:])
            np.minimum(along[:-steps], before[steps:] + gap, out=along[:-steps])
    return np.asarray(square <= reach_mm**2 * (1 + 1e-6))


def border_voxels(
    labels: Integer[np.ndarray, "X Y Z"],
    spacing: tuple[float, float, float],
    classes: int,
    kernel: int = 13,
    width_mm: float | None = None,
) -> list[Integer[np.ndarray, " _"]]:
    """Flat indices of the border band, one list for each structure (one in all for binary networks).

    Args:
        classes: 1 for binary (any label above 0), otherwise the number of classes including background.
        width_mm: Euclidean band of this width instead of the released one.
    """
    masks = [labels > 0] if classes == 1 else [labels == k for k in range(1, classes)]
    kind = np.int32 if labels.size < 2**31 else np.int64
    return [
        np.flatnonzero(
            released_border(mask, kernel) if width_mm is None else euclidean_border(mask, spacing, width_mm)
        ).astype(kind)
        for mask in masks
    ]


def border_locations(
    rng: np.random.Generator,
    voxels: Integer[np.ndarray, " M"],
    fit: Fit,
    count: int,
    flips: Flips = NO_FLIPS,
) -> Int64[np.ndarray, "N 3"]:
    """Draws without replacement from a border band, at most `count`; all of it when it is smaller.

    The band is stored on the scan's grid. Where the network's grid is a resized one, a network voxel belongs to
    the band when the scan voxel it takes its label from does.
    """
    if len(voxels) == 0 or count <= 0:
        return np.zeros((0, 3), dtype=np.int64)
    if not fit.resizes:
        if len(voxels) > count:
            voxels = voxels[rng.choice(len(voxels), count, replace=False, shuffle=False)]
        return np.asarray(_unravel(voxels, fit.source, flips) + np.array(fit.offset))
    tables = zip(fit.nearest(), fit.source, strict=True)
    first, many = zip(*(_preimages(table, n) for table, n in tables), strict=True)
    # Network voxels of the band, numbered scan voxel by scan voxel; a shrunken grid has none of most of these.
    places = _unravel(voxels, fit.source, flips)
    ends = np.cumsum(np.prod([m[places[:, a]] for a, m in enumerate(many)], axis=0))
    total = int(ends[-1])
    drawn = np.arange(total) if total <= count else rng.choice(total, count, replace=False, shuffle=False)
    owner = np.searchsorted(ends, drawn, side="right")
    index, rest = places[owner], ends[owner] - 1 - drawn
    found = np.empty_like(index)
    for axis in range(3):
        rest, slot = np.divmod(rest, many[axis][index[:, axis]])
        found[:, axis] = first[axis][index[:, axis]] + slot
    return found


def sample_locations(
    rng: np.random.Generator,
    fit: Fit,
    count: int,
    border: Sequence[Integer[np.ndarray, " _"]] = (),
    border_share: float = 0.5,
    include_last: bool = True,
    flips: Flips = NO_FLIPS,
) -> Int64[np.ndarray, "N 3"]:
    """`count` locations on the network's grid: uniform ones, and a share from the border band, shuffled.

    Args:
        border: Band voxels of each structure (`border_voxels`); empty for uniform sampling. Several structures
            get equal parts of the share.
    """
    near = []
    wanted = int(count * border_share)
    present = [voxels for voxels in border if len(voxels)]
    for index, voxels in enumerate(present):
        part = (wanted * (index + 1)) // len(present) - (wanted * index) // len(present)
        near.append(border_locations(rng, voxels, fit, part, flips))
    taken = sum(len(part) for part in near)
    everything = np.concatenate([*near, uniform_locations(rng, fit.target, count - taken, include_last)])
    rng.shuffle(everything, axis=0)
    return everything


def labels_at(
    labels: Integer[np.ndarray, "X Y Z"], fit: Fit, locations: Int64[np.ndarray, "N 3"]
) -> Integer[np.ndarray, " N"]:
    """Labels at locations of the network's grid: nearest voxel as released, background in the padding."""
    if fit.resizes:
        index = np.stack([table[locations[:, a]] for a, table in enumerate(fit.nearest())])
        return np.asarray(labels[tuple(index)])
    index = locations - np.array(fit.offset)
    inside = ((index >= 0) & (index < np.array(fit.source))).all(axis=1)
    out = np.zeros(len(locations), dtype=labels.dtype)
    out[inside] = labels[tuple(index[inside].T)]
    return out


def low_res_labels(labels: Integer[np.ndarray, "X Y Z"], fit: Fit, grid: Shape, classes: int) -> np.ndarray:
    """Adaptive max pool to the encoder's low-resolution grid: which structures a cell holds (SPEC §3).

    Returns:
        (1, *grid) for binary (classes = 1, any label above 0), (classes - 1, *grid) otherwise, one channel a
        structure; float32 of 0 and 1.
    """
    masks = [labels > 0] if classes == 1 else [labels == k for k in range(1, classes)]
    pooled = []
    for mask in masks:
        for axis, cells in enumerate(grid):
            mask = np.stack([_cell(mask, fit, axis, c, cells) for c in range(cells)], axis=axis)
        pooled.append(mask)
    return np.stack(pooled).astype(np.float32)


def _cell(mask: np.ndarray, fit: Fit, axis: int, cell: int, cells: int) -> np.ndarray:
    size, source = fit.target[axis], fit.source[axis]
    start, stop = cell * size // cells, -(-(cell + 1) * size // cells)
    if fit.resizes:
        seen = fit.nearest()[axis][start:stop]
    else:
        seen = np.arange(max(start - fit.offset[axis], 0), min(stop - fit.offset[axis], source))
    return np.asarray(mask.take(seen, axis=axis).any(axis=axis))


def _unravel(flat: np.ndarray, shape: Shape, flips: Flips) -> np.ndarray:
    index = np.stack(np.unravel_index(flat, shape), axis=1).astype(np.int64)
    for axis, flip in enumerate(flips):
        if flip:
            index[:, axis] = shape[axis] - 1 - index[:, axis]
    return index


def _preimages(table: Integer[np.ndarray, " S"], source: int) -> tuple[np.ndarray, np.ndarray]:
    """For each scan voxel: the first network voxel that takes its label from it, and how many do."""
    many = np.bincount(table, minlength=source)
    return np.concatenate([[0], np.cumsum(many)[:-1]]), many

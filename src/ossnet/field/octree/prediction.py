"""Predictions of labels: of the children of a cell from the sites around it, and of a lattice from a coarse
array.

A prediction is never trusted, only asked about where it changes: it decides how many locations
are evaluated.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped

from ossnet.errors import SettingsError

Triple = tuple[int, int, int]


def catmull_rom(ratio: int) -> Float[np.ndarray, "r 4"]:
    """Weights of the sites -1, 0, 1, 2 for positions 0, 1/ratio, …: cubic, interpolating.

    Source: E. Catmull, R. Rom, A class of local interpolating splines, 1974.
    """
    t = np.arange(ratio) / ratio
    weights = [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2]
    return np.stack(weights, axis=1) / 2


def cubic_b_spline(ratio: int) -> Float[np.ndarray, "r 4"]:
    """As `catmull_rom`, with the smoothing cubic B-spline; at ratio 1 it leaves the values as they are."""
    if ratio == 1:
        return catmull_rom(1)
    t = np.arange(ratio) / ratio
    weights = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    return np.stack(weights, axis=1) / 6


@lru_cache(maxsize=32)
def _kernel(ratio: Triple, smooth: bool) -> Float[np.ndarray, "64 children"]:
    """Values of the children of a cell as one matrix product of its 4×4×4 neighbourhood (C order both)."""
    a, b, c = (cubic_b_spline(r) if smooth else catmull_rom(r) for r in ratio)
    full = np.einsum("ai,bj,ck->ijkabc", a, b, c)
    return np.ascontiguousarray(full.reshape(64, -1), dtype=np.float32)


def child_labels(
    labels: Shaped[np.ndarray, "n 64"], margins: Float[np.ndarray, "n 64"] | None, ratio: Triple
) -> tuple[Shaped[np.ndarray, "n children"], Float[np.ndarray, "n children"] | None]:
    """Predict the children of cells from the 4×4×4 sites around each.

    Class c is given the field +margin where the label is c and -margin elsewhere: with two classes that is
    the logit itself, with more it stands in for the difference to the best other class, at the cost of one
    number a site however many classes there are. The field is interpolated (Catmull-Rom); with labels alone
    the margin is 1 and a cubic B-spline takes its place, because an interpolating kernel would ring.

    Args:
        labels: Labels of the neighbourhoods.
        margins: Their margins, or None when only labels are known.
        ratio: Children of a cell along each axis.

    Returns:
        The labels of the children and, with margins, theirs.
    """
    kernel = _kernel(ratio, margins is None)
    plain = np.ones(labels.shape, dtype=np.float32) if margins is None else margins
    lowest, highest = labels.min(axis=1), labels.max(axis=1)
    # Every class between the two extremes may be present; with two classes nothing else can be.
    only_two = ((labels == lowest[:, None]) | (labels == highest[:, None])).all(axis=1)
    field = np.where(labels == highest[:, None], plain, -plain) @ kernel
    out = np.where(field > 0, highest[:, None], lowest[:, None])
    best = np.abs(field)

    rows = np.flatnonzero(~only_two)
    if len(rows):
        some, weights = labels[rows], plain[rows]
        top = np.full((len(rows), kernel.shape[1]), -np.inf, dtype=np.float32)
        winner = np.zeros(top.shape, dtype=labels.dtype)
        for label in np.unique(some):
            own = some == label
            where = np.flatnonzero(own.any(axis=1))
            value = np.where(own[where], weights[where], -weights[where]) @ kernel
            better = value > top[where]
            top[where] = np.where(better, value, top[where])
            winner[where] = np.where(better, label, winner[where])
        out[rows], best[rows] = winner, np.maximum(top, 0)
    return out, None if margins is None else best


def mixed_cells(
    labels: Shaped[np.ndarray, "X Y Z"], first: Triple, size: Triple
) -> Bool[np.ndarray, "x y z"]:
    """True for the cells whose eight corners do not share one label; past the last site the last one counts.

    Args:
        labels: Labels of the sites.
        first: Low corner of the first cell asked for.
        size: Cells asked for along each axis.
    """
    index = [
        np.minimum(np.arange(a, a + n + 1), sites - 1)
        for a, n, sites in zip(first, size, labels.shape, strict=True)
    ]
    around = labels[np.ix_(*index)]
    x, y, z = size
    out = np.zeros(size, dtype=bool)
    for dx, dy, dz in [(0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]:
        out |= around[:-1, :-1, :-1] != around[dx : dx + x, dy : dy + y, dz : dz + z]
    return out


def smooth_axis(values: Float[np.ndarray, "X Y Z"], axis: int, ratio: int) -> Float[np.ndarray, "x y z"]:
    """Catmull-Rom interpolation along one axis: `ratio` values a site, the end value beyond the ends."""
    if ratio == 1:
        return values
    moved = np.moveaxis(values, axis, 0)
    around = np.concatenate((moved[:1], moved, moved[-1:], moved[-1:]))
    n = len(moved)
    out = np.zeros((n, ratio, *moved.shape[1:]), dtype=np.float32)
    for phase, weights in enumerate(catmull_rom(ratio).astype(np.float32)):
        for offset, weight in enumerate(weights):
            if weight:
                out[:, phase] += weight * around[offset : offset + n]
    return np.moveaxis(out.reshape(n * ratio, *moved.shape[1:]), 0, axis)


def resample_prediction(
    start: Num[np.ndarray, "..."], shape: Triple, places: tuple[Float[np.ndarray, " _"], ...], classes: int
) -> tuple[Shaped[np.ndarray, "X Y Z"], Float[np.ndarray, "X Y Z"] | None]:
    """Read a coarse array of predictions at the voxels of a lattice.

    Cell i of an axis of a cells covers the voxels from i·n/a to (i + 1)·n/a of an axis of n voxels, its value
    lies at its middle. Labels are read from the cell that holds the voxel's centre, logits by trilinear
    interpolation.

    Args:
        start: (a, b, c) integers or booleans: labels. (a, b, c) floats: logits; (K, a, b, c): logits of K
            classes.
        shape: Voxels of the volume.
        places: Voxel indices wanted, along each axis.
        classes: Number of classes.

    Returns:
        The labels, and with logits their margins.

    Raises:
        SettingsError: If the array has another form or holds labels beyond the classes.
    """
    start = np.asarray(start)
    is_float = start.dtype.kind == "f"
    if (start.ndim != 3 and not (start.ndim == 4 and is_float and len(start) == classes)) or 0 in start.shape:
        raise SettingsError(
            "start",
            f"an array of shape {start.shape} and type {start.dtype} predicts nothing for {classes} classes",
            "Give (a, b, c) labels, (a, b, c) logits, or (K, a, b, c) logits of all classes",
        )
    size = start.shape[-3:]
    centres = [(at + 0.5) * a / n for at, a, n in zip(places, size, shape, strict=True)]
    if not is_float:
        index = [np.minimum(c.astype(np.int64), a - 1) for c, a in zip(centres, size, strict=True)]
        labels = start[np.ix_(*index)].astype(np.int64)
        if labels.min() < 0 or labels.max() >= classes:
            raise SettingsError(
                "start", f"holds labels beyond the {classes} classes", "Set classes, or mend it"
            )
        return labels, None
    if not np.isfinite(start).all():
        raise SettingsError("start", "holds values that are not finite", "Mend the prediction")
    values = start.astype(np.float32)
    for axis, (centre, a) in enumerate(zip(centres, size, strict=True)):
        at = np.clip(centre - 0.5, 0, a - 1)
        below = np.minimum(at.astype(np.int64), max(a - 2, 0))
        rest = (at - below).astype(np.float32).reshape(-1, *[1] * (2 - axis))
        dim = values.ndim - 3 + axis
        lower, upper = values.take(below, axis=dim), values.take(np.minimum(below + 1, a - 1), axis=dim)
        values = lower + rest * (upper - lower)
    if values.ndim == 3:
        return values > 0, np.abs(values)
    top = np.partition(values, -2, axis=0)[-2:]
    return values.argmax(axis=0), top[1] - top[0]

"""Statistics of grey values.

Not to be confused with `data.intensities`, which changes them in training.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Num

_SAMPLE = 1 << 20  # voxels from which percentiles of floating point images are taken
_HISTOGRAM = 1 << 20  # integer images with at most as many grey levels are counted exactly


@dataclass(frozen=True)
class Intensities:
    """Grey values of one channel over some voxels, in the units of the file.

    Percentiles are exact for integer images with up to 2^20 levels and otherwise those of 2^20 voxels, drawn: evenly
    spaced ones may all lie in one slice. `std` is the unbiased estimate, as in the paper's normalisation.
    """

    voxels: int
    mean: float
    std: float
    low: float
    """0.5th percentile."""
    median: float
    high: float
    """99.5th percentile."""
    minimum: float
    maximum: float


def intensities(values: Num[np.ndarray, "..."]) -> Intensities:
    """Statistics of some voxels' values (any shape, at least one voxel)."""
    flat = values.ravel(order="K")  # the file's order: no copy
    low, high = flat.min(), flat.max()
    span = int(high) - int(low) + 1 if flat.dtype.kind in "iu" else 0
    if 0 < span <= _HISTOGRAM:
        counts = np.bincount(
            (flat.astype(np.int64) - int(low)) if flat.dtype.itemsize > 1 else _shifted(flat, low)
        )
        levels = np.arange(len(counts)) + float(low)
        n = int(counts.sum())
        mean = float(counts @ levels) / n
        variance = float(counts @ (levels - mean) ** 2) / max(n - 1, 1)
        ranks = np.cumsum(counts)
        percentiles = [
            float(levels[np.searchsorted(ranks, q * (n - 1), side="right")]) for q in (0.005, 0.5, 0.995)
        ]
    else:
        n = flat.size
        mean = float(flat.mean(dtype=np.float64))
        variance = max(float(np.square(flat - mean, dtype=np.float64).sum()) / max(n - 1, 1), 0.0)
        some = flat if n <= _SAMPLE else flat[np.random.default_rng(0).integers(n, size=_SAMPLE)]
        percentiles = [float(q) for q in np.percentile(some, [0.5, 50, 99.5])]
    return Intensities(
        voxels=int(n),
        mean=mean,
        std=math.sqrt(variance),
        low=percentiles[0],
        median=percentiles[1],
        high=percentiles[2],
        minimum=float(low),
        maximum=float(high),
    )


def _shifted(flat: np.ndarray, low: Any) -> np.ndarray:
    """8-bit values from 0 on, without widening them."""
    return (flat.astype(np.int16) - int(low)) if flat.dtype.kind == "i" else flat - low

"""The strides of the octree's lattices, and the part of each lattice that a region needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from numbers import Integral
from typing import Any, Literal

import numpy as np

from ossnet.errors import SettingsError
from ossnet.field.octree.lattice import Triple, Window, lattice_size

Box = tuple[Triple, Triple]
Path = Sequence[int | Triple] | Literal["auto"]

# Voxels from which on a stride of 16 pays at the start. At 256×256×160 the whole stride-8 lattice is 20,480
# locations, more than the surface of most tumours has voxels; a left atrium's scan has 2 million voxels.
_LARGE = 2**22


def choose_path(shape: Triple) -> tuple[Triple, ...]:
    """The strides of `path="auto"`, from the shape alone.

    16, 8, 4, 1 for volumes of 2^22 voxels (161³) and more, otherwise 8, 4, 1.
    Along an axis of fewer than 4 strides the stride is halved until there are 4: a stack of ten thick slices
    is not sampled at its first and ninth only.
    """
    strides = (16, 8, 4, 1) if prod(shape) >= _LARGE else (8, 4, 1)
    limits = _limits(shape)
    path = [tuple(min(s, limit) for limit in limits) for s in strides]
    unique = [p for i, p in enumerate(path) if i == 0 or p != path[i - 1]]
    return tuple((a, b, c) for a, b, c in unique)


def _limits(shape: Triple) -> list[int]:
    """The largest strides with which an axis is met four times."""
    return [max(1, 2 ** int(np.log2(max(1, n / 4)))) for n in shape]


def strides_within(mm: float, spacing: Sequence[float], shape: Triple) -> Triple:
    """The largest strides up to 8 whose sites lie at most `mm` apart along each axis, 1 where no other does.

    Along few voxels they are smaller, as in `choose_path`.
    """
    x, y, z = (
        max([s for s in (2, 4, 8) if s * each <= mm and s <= limit], default=1)
        for each, limit in zip(spacing, _limits(shape), strict=True)
    )
    return x, y, z


def check_path(path: Path, shape: Triple) -> tuple[Triple, ...]:
    """The strides along each axis, coarse to fine, ending at 1.

    Raises:
        SettingsError: If a stride is not a multiple of the next, or the last is not 1.
    """
    if isinstance(path, str):
        if path != "auto":
            raise SettingsError("path", f"{path!r} is not known", "Give strides such as (8, 4, 1), or 'auto'")
        return choose_path(shape)
    steps = [_stride(given) for given in path] if isinstance(path, Sequence | np.ndarray) else []
    good = bool(steps) and steps[-1] == (1, 1, 1) and all(s >= 1 for step in steps for s in step)
    for coarse, fine in pairwise(steps):
        good = good and coarse != fine and all(c % f == 0 for c, f in zip(coarse, fine, strict=True))
    if not good:
        raise SettingsError(
            "path",
            f"{path!r} is not a way from coarse to fine",
            "Let each stride divide the one before, end at 1",
        )
    return tuple(steps)


def _stride(given: Any) -> Triple:
    """One stride for all axes, or one each; zeros for what is none."""
    values = (given,) * 3 if isinstance(given, Integral) else given
    several = isinstance(values, Sequence | np.ndarray) and len(values) == 3
    if not several or not all(isinstance(value, Integral) for value in values):
        return 0, 0, 0
    x, y, z = values
    return int(x), int(y), int(z)


def check_region(region: Box | None, shape: Triple) -> Window:
    """The wanted voxels: the whole volume without a region.

    Raises:
        SettingsError: If the region is empty or leaves the volume.
    """
    if region is None:
        return Window((0, 0, 0), shape)
    low, high = region
    if (
        len(low) != 3
        or len(high) != 3
        or not all(0 <= a < b <= n for a, b, n in zip(low, high, shape, strict=True))
    ):
        raise SettingsError(
            "region",
            f"{region} is not a box within {shape}",
            "Give ((x0, y0, z0), (x1, y1, z1)), ends exclusive",
        )
    return Window(low, high)


@dataclass(frozen=True)
class Part:
    """What a region needs of one lattice.

    Attributes:
        kept: The sites that are kept and closed.
        wanted: Those of them that must come out as on the whole lattice.
    """

    kept: Window
    wanted: Window


def parts(
    path: tuple[Triple, ...], shape: Triple, region: Window, growth: Sequence[int], *, predicted: bool
) -> tuple[Part, ...]:
    """What a region needs of every lattice, coarse to fine.

    A level is predicted from the 4×4×4 sites around each cell of the coarser one, and the hints look one site
    further. Closing a level asks first what the prediction lists, then what the answers to that list: two
    sites around the wanted ones, everything that the first two steps depend on lies within what is kept.

    Args:
        path: Strides, coarse to fine.
        shape: Voxels of the volume.
        region: Voxels wanted.
        growth: Further sites wanted around, on every level.
        predicted: Whether the coarsest lattice is predicted; evaluated whole, it has no closure that
            something could reach it by.
    """
    out: list[Part] = []
    needed = region
    for level in range(len(path) - 1, -1, -1):
        lattice = lattice_size(shape, path[level])
        if level == 0 and not predicted:
            out.insert(0, Part(needed, needed))
            break
        # A site further than the finer level reads, where that reads values: with the sites that it reads,
        # all their neighbours are certain, hence also which of them were evaluated.
        more = growth[level] + (level + 1 < len(path))
        wanted = needed.grown(more, more, lattice)
        kept = wanted.grown(2, 2, lattice)
        if level == 0:
            out.insert(0, Part(kept, wanted))
            break
        coarser = path[level - 1]
        ratio = (coarser[0] // path[level][0], coarser[1] // path[level][1], coarser[2] // path[level][2])
        cells = kept.cells(ratio)
        out.insert(0, Part(cells.sites(ratio, lattice), wanted))
        needed = cells.grown(2, 3, lattice_size(shape, coarser))
    return tuple(out)

"""Stages, widths and crops of the default network, chosen from the spacing and size of the scans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from ossnet.networks.boxes import Triple, triple
from ossnet.networks.multiscale import MultiscaleSpec, Spacing, Stage


@dataclass(frozen=True)
class MultiscalePlan:
    """A network, what it is trained on, and why."""

    spec: MultiscaleSpec
    crop: Triple
    """Voxels of a training crop, multiples of the largest stride."""
    reasons: tuple[str, ...]
    """One line per decision, for the user."""


CROP_VOXELS = 1_000_000
"""Voxels of a crop: on one CPU core 0.3 s a step in bf16, 0.8 s in float32, and 0.3 GB."""

SMALL_SCAN = 200_000
"""Up to this many voxels the first stage keeps the full resolution."""

LARGE = ((16, 0, 1, 16), (48, 0, 1, 48), (96, 2, 0, 48), (160, 3, 0, 48))
"""Width, trunk and lateral blocks, and features of each stage."""

SMALL = ((16, 0, 1, 16), (32, 0, 1, 32), (64, 2, 0, 48), (96, 2, 0, 48))
"""The same for small scans: their coarse maps have a few hundred cells, and steps are a third cheaper with no loss
of accuracy (hippocampus, 4 minutes of a core: 0.879 both)."""


_DIVISIBLE = 8
"""Fewer cells than this along an axis are not halved."""


def _finest(mm: Sequence[float], cells: Sequence[int]) -> float:
    """The length of the shortest cells, of the axes that can be halved if there are any.

    What has few cells keeps them, and would soon seem the finest: the slices of a thin slab, a 2D image's only one.
    """
    return min([m for m, n in zip(mm, cells, strict=True) if n >= _DIVISIBLE] or mm)


def plan_stages(spacing: Spacing, shape: Triple, count: int, fine: bool) -> tuple[tuple[Triple, Triple], ...]:
    """(stride, kernel) of each stage.

    An axis is halved when its cells are not yet longer than those of the finest axis by a factor of 2 or
    more, and while at least 4 cells remain; kernels reach along an axis under the same rule. So 10 mm slices
    stay whole until the cells in the slice have grown to that size. Axes that cannot be halved any more are not
    measured against.

    Args:
        count: Number of stages.
        fine: The first stage keeps the full resolution.
    """
    mm, cells, out = list(spacing), list(shape), []
    for i in range(count):
        divisible = [n >= _DIVISIBLE for n in cells]
        finest = _finest(mm, cells)
        close = [m < 2 * finest for m in mm]
        stride = [
            2 if c and d and not (fine and i == 0) else 1 for c, d in zip(close, divisible, strict=True)
        ]
        mm = [m * s for m, s in zip(mm, stride, strict=True)]
        finest = min([m for m, d in zip(mm, divisible, strict=True) if d] or [finest])
        cells = [ceil(n / s) for n, s in zip(cells, stride, strict=True)]
        kernel = [3 if m < 2 * finest and n > 1 else 1 for m, n in zip(mm, cells, strict=True)]
        out.append((triple(stride), triple(kernel)))
    return tuple(out)


def plan_crop(shape: Triple, stride: Triple, voxels: int) -> Triple:
    """The largest crop of at most about `voxels`, shaped like the scans, each axis a multiple of `stride`."""
    full = [s * ceil(n / s) for n, s in zip(shape, stride, strict=True)]
    scale = 1.0
    while True:
        crop = [max(s, s * round(n * scale / s)) for n, s in zip(full, stride, strict=True)]
        if prod(crop) <= voxels or crop == list(stride):
            return triple(crop)
        scale *= 0.98


def plan(
    spacing: Spacing,
    median_shape: Triple,
    channels: int,
    classes: int,
    *,
    crop_voxels: int = CROP_VOXELS,
    like: MultiscaleSpec | None = None,
) -> MultiscalePlan:
    """Choose stages and crop for a data set.

    Args:
        spacing: mm of the training grid.
        median_shape: Voxels of the median scan on that grid.
        channels: Channels of a scan.
        classes: Logits a location: 1, or number of structures + 1.
        crop_voxels: Voxels of a crop that the machine affords.
        like: A network whose stages are taken over.
    """
    reasons: list[str] = []
    if like is not None:
        spec = replace(like, channels=channels, classes=classes, spacing=spacing)
    else:
        spec = _choose_spec(spacing, median_shape, channels, classes, reasons)
    cells = ", ".join(
        "×".join(f"{m * s:g}" for m, s in zip(spacing, stride, strict=True)) for stride in spec.strides
    )
    reasons.append(f"stages: cells of {cells} mm")
    if spec.patch != (5, 5, 5):
        reasons.append(
            f"raw patch {'×'.join(map(str, spec.patch))}: voxels are far apart, or alone, along the other axes"
        )
    crop = plan_crop(median_shape, spec.strides[-1], crop_voxels)
    whole = all(c >= n for c, n in zip(crop, median_shape, strict=True))
    reasons.append(
        f"crop {'×'.join(map(str, crop))} voxels: "
        + ("a whole median scan" if whole else f"about {crop_voxels:,} voxels in the shape of the scans")
    )
    return MultiscalePlan(spec, crop, tuple(reasons))


def _choose_spec(
    spacing: Spacing, median_shape: Triple, channels: int, classes: int, reasons: list[str]
) -> MultiscaleSpec:
    """A network for scans of this kind (arguments as for `plan`); `reasons` grow."""
    fine = prod(median_shape) <= SMALL_SCAN
    sizes = SMALL if fine else LARGE
    shapes = plan_stages(spacing, median_shape, len(sizes), fine)
    stages = tuple(Stage(*shape, *size) for shape, size in zip(shapes, sizes, strict=True))
    finest = _finest(spacing, median_shape)
    patch = triple(
        [
            1 if n == 1 or s >= 4 * finest else 3 if s >= 2 * finest else 5
            for s, n in zip(spacing, median_shape, strict=True)
        ]
    )
    if fine:
        reasons.append(
            f"first stage at full resolution: the scans are small ({'×'.join(map(str, median_shape))})"
        )
    return MultiscaleSpec(channels, classes, spacing, stages, patch)

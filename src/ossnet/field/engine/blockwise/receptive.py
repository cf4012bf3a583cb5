"""What a place of the default network depends on: voxels of the scan, cells of its stages."""

from math import ceil

from ossnet.networks.boxes import Triple, triple
from ossnet.networks.multiscale import MultiscaleSpec


def receptive_halo(spec: MultiscaleSpec) -> Triple:
    """Voxels around a location on which its answer depends, per axis, rounded up to the largest stride.

    Cut a scan to a region with this margin (at multiples of the largest stride), and every answer in the
    region stays what it is.
    """
    last = spec.strides[-1]
    need = image_margin(spec, 0, len(spec.stages))
    return triple(ceil(n / s) * s for n, s in zip(need, last, strict=True))


def reach_of(spec: MultiscaleSpec, stage: int, blocks: int) -> Triple:
    """Cells that residual blocks of a stage look to each side: two convolutions a block."""
    return triple(2 * blocks * (k // 2) for k in spec.stages[stage].kernel)


def trunk_margin(spec: MultiscaleSpec, stage: int, margin: Triple, trunk_of_last: bool = True) -> Triple:
    """Voxels of image around a box that make the trunk of `stage` right in `margin` voxels around it."""
    need = list(margin)
    for i in reversed(range(stage + 1)):
        if i < stage or trunk_of_last:
            reach = reach_of(spec, i, spec.stages[i].trunk)
            need = [n + r * s for n, r, s in zip(need, reach, spec.strides[i], strict=True)]
    # The first convolution alone overlaps, by one voxel a side where its kernel is wider than its stride.
    return triple(n + 1 for n in need)


def image_margin(spec: MultiscaleSpec, first: int, stop: int) -> Triple:
    """Voxels of image around a box that the maps of stages `first` to `stop` need for samples in the box."""
    margins = [
        trunk_margin(spec, i, need)
        for i, need in zip(range(first, stop), map_margins(spec, first, stop), strict=True)
    ]
    return triple(max(ns) for ns in zip((0, 0, 0), *margins, strict=True))


def map_margins(spec: MultiscaleSpec, first: int, stop: int) -> list[Triple]:
    """For each of these stages, voxels around a box in which its map must be worked on for samples in the box.

    Whole cells of the next stage: what is repeated from there fits.
    """
    need, out = [0, 0, 0], []
    for i in range(first, stop):
        # One cell for interpolation, then the lateral blocks; finer maps read coarser ones that far out.
        need = [max(n, s) for n, s in zip(need, spec.strides[i], strict=True)]
        reach = reach_of(spec, i, spec.stages[i].lateral)
        need = [n + r * s for n, r, s in zip(need, reach, spec.strides[i], strict=True)]
        # The repeated coarser cell can begin up to one cell further out.
        if i + 1 < len(spec.stages):
            need = [ceil(n / s) * s for n, s in zip(need, spec.strides[i + 1], strict=True)]
        out.append(triple(need))
    return out


def ratio(spec: MultiscaleSpec, fine: int, coarse: int) -> Triple:
    """Cells of a finer stage per cell of a coarser one."""
    return triple(c // f for f, c in zip(spec.strides[fine], spec.strides[coarse], strict=True))

"""Arithmetic of boxes: (start, stop) along each axis, half-open, in voxels or in cells of a stage."""

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, prod

from torch import Tensor

Triple = tuple[int, int, int]
Box = tuple[Triple, Triple]


def triple(values: Iterable[int]) -> Triple:
    x, y, z = values
    return x, y, z


def pairs(box: Box) -> Iterator[tuple[int, int]]:
    return zip(box[0], box[1], strict=True)


def clip(ends: Sequence[tuple[int, int]], shape: Triple) -> Box:
    return (
        triple([max(a, 0) for a, _ in ends]),
        triple([min(b, n) for (_, b), n in zip(ends, shape, strict=True)]),
    )


def nearest(ends: Sequence[tuple[int, int]], shape: Triple) -> Box:
    """What a box has in common with a volume, or the voxels of the volume next to it: never empty."""
    firsts = [min(max(a, 0), n - 1) for (a, _), n in zip(ends, shape, strict=True)]
    stops = [max(min(b, n), a + 1) for (_, b), a, n in zip(ends, firsts, shape, strict=True)]
    return triple(firsts), triple(stops)


def multiply(box: Box, stride: Triple) -> Box:
    return (
        triple([a * s for a, s in zip(box[0], stride, strict=True)]),
        triple([b * s for b, s in zip(box[1], stride, strict=True)]),
    )


def divide(box: Box, stride: Triple) -> Box:
    """Cells that cover a box of voxels."""
    return (
        triple([a // s for a, s in zip(box[0], stride, strict=True)]),
        triple([ceil(b / s) for b, s in zip(box[1], stride, strict=True)]),
    )


def slices(box: Box, origin: Triple) -> tuple[slice, slice, slice]:
    x, y, z = (slice(a - o, b - o) for (a, b), o in zip(pairs(box), origin, strict=True))
    return x, y, z


def cut(x: Tensor, box: Box, origin: Triple) -> Tensor:
    """A box of a tensor whose first cell is `origin`."""
    return x[(slice(None), slice(None), *slices(box, origin))]


def size_of(box: Box) -> Triple:
    return triple(b - a for a, b in pairs(box))


def voxels_of(box: Box) -> int:
    return prod(size_of(box))


def holds(outer: Box, inner: Box) -> bool:
    return all(a <= c and d <= b for (a, b), (c, d) in zip(pairs(outer), pairs(inner), strict=True))


def join(one: Box, other: Box) -> Box:
    """The smallest box around both."""
    return triple(map(min, one[0], other[0])), triple(map(max, one[1], other[1]))


def within(ends: Sequence[tuple[int, int]], outer: Box) -> Box:
    """What a box has in common with another."""
    return (
        triple(max(a, low) for (a, _), low in zip(ends, outer[0], strict=True)),
        triple(min(b, high) for (_, b), high in zip(ends, outer[1], strict=True)),
    )


def meet(corner: Sequence[int], size: Triple, outer: Box) -> Box:
    """The part of a box of a size that lies in another."""
    return within([(c, c + n) for c, n in zip(corner, size, strict=True)], outer)

"""Scans that are read in boxes, and which boxes are worth reading for the locations of a question.

Letters: C channels, X Y Z voxels of the network's grid, N locations.
Boxes are (low, high) along each axis, high excluded.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Num
from torch import Tensor

from ossnet.networks.boxes import Triple

WINDOW = 1 << 21
"""Voxels of a box around locations, at most, unless a single location needs more."""


@runtime_checkable
class Source(Protocol):
    """A normalised and fitted scan."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """C, X, Y, Z."""

    @property
    def held(self) -> Tensor | None:
        """All of it, where it is in memory."""

    def read(self, low: Triple, high: Triple) -> Float[Tensor, "C x y z"]:
        """A box of it, float32."""


class Held:
    """A `Source` that is in memory already.

    Args:
        image: (C, X, Y, Z) float32; kept, not copied.
    """

    def __init__(self, image: Float[Tensor, "C X Y Z"]) -> None:
        c, x, y, z = image.shape
        self.shape = (c, x, y, z)
        self.held = image

    def read(self, low: Triple, high: Triple) -> Float[Tensor, "C x y z"]:
        """A view."""
        return self.held[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]


def windows(
    places: Num[Tensor, "N 3"], shape: Triple, before: int, after: int, share: int
) -> Iterator[tuple[slice, Triple, Triple]]:
    """Runs of consecutive locations, each with a box (low, high) around them that is worth reading for them.

    Args:
        places: Inside the grid.
        shape: X, Y, Z.
        before: Voxels that a location needs before the one below it, along each axis.
        after: And after it.
        share: Voxels that may be read for a location; runs that are more scattered are cut in two.
    """
    waiting = [(0, len(places))] if len(places) else []
    while waiting:
        start, stop = waiting.pop()
        part = places[start:stop]
        least, most = part.amin(0).floor().long().tolist(), part.amax(0).floor().long().tolist()
        x0, y0, z0 = (max(n - before, 0) for n in least)
        x1, y1, z1 = (min(n + after + 1, size) for n, size in zip(most, shape, strict=True))
        count = stop - start
        if count == 1 or (x1 - x0) * (y1 - y0) * (z1 - z0) <= min(WINDOW, share * count):
            yield slice(start, stop), (x0, y0, z0), (x1, y1, z1)
        else:
            middle = start + count // 2
            waiting += [(middle, stop), (start, middle)]

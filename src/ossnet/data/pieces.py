"""How large the pieces are that structures come in."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer
from scipy.ndimage import find_objects, label


class Piece(NamedTuple):
    """A connected part of a structure."""

    structure: int
    extent_mm: float
    """The largest along an axis."""
    voxels: int


def pieces_of(labels: Integer[np.ndarray, "X Y Z"], classes: int, spacing: Sequence[float]) -> list[Piece]:
    """All pieces of all structures in a scan.

    Args:
        classes: Logits a location: 1 for binary (any label above 0), otherwise classes including background.
        spacing: mm.
    """
    if classes == 1:
        labels, classes = (labels > 0).astype(np.uint8), 2
    out = []
    for number, box in enumerate(find_objects(labels, max_label=classes - 1), 1):
        if box is None:
            continue
        pieces, count = label(labels[box] == number, np.ones((3, 3, 3)))
        voxels = np.bincount(pieces.ravel(), minlength=count + 1)
        for piece, part in enumerate(find_objects(pieces), 1):
            extent = max((p.stop - p.start) * mm for p, mm in zip(part, spacing, strict=True))
            out.append(Piece(number, float(extent), int(voxels[piece])))
    return out


def small_extent(pieces: Iterable[Piece]) -> float | None:
    """The extent in mm within which pieces hold a quarter of their structure; of the structure with the smallest.

    By volume, since drawn by hand or by a threshold even a whole brain has splinters. None without pieces.
    """
    by_structure: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_structure.setdefault(piece.structure, []).append(piece)
    found = []
    for several in by_structure.values():
        ordered = sorted(several, key=lambda p: p.extent_mm)
        held = np.cumsum([p.voxels for p in ordered])
        found.append(ordered[int(np.searchsorted(held, held[-1] / 4))].extent_mm)
    return min(found, default=None)

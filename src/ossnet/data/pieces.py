"""How large the pieces are that structures come in."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer
from scipy.ndimage import find_objects, label

_SPECK = 8
"""Pieces of fewer voxels are slips of the pen."""


def piece_extents(
    labels: Integer[np.ndarray, "X Y Z"], classes: int, spacing: Sequence[float]
) -> list[float]:
    """Largest extent in mm, along an axis, of every connected piece of every structure.

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
            if voxels[piece] >= _SPECK:
                out.append(max((p.stop - p.start) * mm for p, mm in zip(part, spacing, strict=True)))
    return out

"""Islands: connected parts of a structure that a user may want gone. Nothing here runs unless it is asked for."""

from dataclasses import replace
from math import prod
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int
from scipy import ndimage

from ossnet.errors import SettingsError
from ossnet.volume import LabelMap

Labels = TypeVar("Labels", bound=LabelMap)


def connected_parts(
    mask: Bool[np.ndarray, "X Y Z"],
) -> tuple[Int[np.ndarray, "X Y Z"], Int[np.ndarray, " P"]]:
    """6-connected parts numbered from 1 (int32), 0 elsewhere, and the voxels of each, 0 for number 0."""
    parts, count = ndimage.label(mask)
    # Plane by plane: counting all at once would widen the parts to 64 bits.
    sizes = np.zeros(count + 1, np.int64)
    for plane in parts:
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
    sizes[0] = 0
    return parts, sizes


def island_bytes(labels: LabelMap) -> int:
    """Memory that `without_islands` takes: a copy, and the parts of the structure with the largest box."""
    boxes = [box for box in ndimage.find_objects(labels.data) if box is not None]
    voxels = max((prod(s.stop - s.start for s in box) for box in boxes), default=0)
    return labels.data.nbytes + 6 * voxels


def check_smallest(smallest_ml: float) -> None:
    """Refuse a volume that is negative or not a number.

    Raises:
        SettingsError: It is one.
    """
    if not 0 <= smallest_ml < np.inf:
        raise SettingsError("smallest_ml", f"is {smallest_ml}", "Give millilitres, 0 or more")


def without_islands(labels: Labels, *, largest: bool = False, smallest_ml: float = 0.0) -> Labels:
    """The label map without small 6-connected components; what is removed becomes background.

    Args:
        labels: (X, Y, Z) any labels; every structure is looked at by itself.
        largest: Of each structure its largest component alone (the first of equals).
        smallest_ml: Components below this volume are removed, in millilitres.

    Raises:
        SettingsError: A volume that is negative or not a number.
    """
    check_smallest(smallest_ml)
    voxel_ml = abs(float(np.linalg.det(labels.affine[:3, :3]))) / 1000
    out = labels.data.copy()
    boxes = ndimage.find_objects(labels.data)
    for label, box in enumerate(boxes, 1):
        if box is None:
            continue
        parts, sizes = connected_parts(labels.data[box] == label)
        keep = sizes * voxel_ml >= smallest_ml * (1 - 1e-9)  # volumes are rounded
        if largest:
            keep &= np.arange(len(sizes)) == sizes.argmax()
        keep[0] = True  # other structures in the box
        for plane, part in zip(out[box], parts, strict=True):
            plane[~keep[part]] = 0
    return replace(labels, data=out)

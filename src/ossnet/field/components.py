"""Islands: connected parts of a structure that a user may want gone. Nothing here runs unless it is asked for."""

from dataclasses import replace
from typing import TypeVar

import numpy as np
from scipy import ndimage

from ossnet.errors import SettingsError
from ossnet.volume import LabelMap

Labels = TypeVar("Labels", bound=LabelMap)


def without_islands(labels: Labels, *, largest: bool = False, smallest_ml: float = 0.0) -> Labels:
    """The label map without small 6-connected components; what is removed becomes background.

    Args:
        labels: (X, Y, Z) any labels; every structure is looked at by itself.
        largest: Of each structure its largest component alone (the first of equals).
        smallest_ml: Components below this volume are removed, in millilitres.

    Raises:
        SettingsError: A volume that is negative or not a number.
    """
    if not 0 <= smallest_ml < np.inf:
        raise SettingsError("smallest_ml", f"is {smallest_ml}", "Give millilitres, 0 or more")
    voxel_ml = abs(float(np.linalg.det(labels.affine[:3, :3]))) / 1000
    out = labels.data.copy()
    boxes = ndimage.find_objects(labels.data)
    for label, box in enumerate(boxes, 1):
        if box is None:
            continue
        parts, count = ndimage.label(labels.data[box] == label)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        sizes[0] = 0
        keep = sizes * voxel_ml >= smallest_ml * (1 - 1e-9)  # volumes are rounded
        if largest:
            keep &= np.arange(count + 1) == sizes.argmax()
        keep[0] = True  # other structures in the box
        out[box][~keep[parts]] = 0
    return replace(labels, data=out)

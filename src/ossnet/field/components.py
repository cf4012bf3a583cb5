"""Islands: connected parts of a structure that a user may want gone. Nothing here runs unless it is asked for."""

from dataclasses import replace
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int, Integer
from scipy import ndimage, sparse

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


def _numbers(labels: LabelMap) -> Integer[np.ndarray, "X Y Z"]:
    """Masks as numbers; without a copy."""
    return labels.data.view(np.uint8) if labels.data.dtype == bool else labels.data


def check_smallest(smallest_ml: float) -> None:
    """Refuse a volume that is negative or not a number.

    Raises:
        SettingsError: It is one.
    """
    if not 0 <= smallest_ml < np.inf:
        raise SettingsError("smallest_ml", f"is {smallest_ml}", "Give millilitres, 0 or more")


def without_islands(
    labels: Labels, *, largest: bool = False, smallest_ml: float = 0.0, reuse: bool = False
) -> Labels:
    """The label map without small 6-connected components; what is removed becomes background.

    Plane by plane: beside the label map it takes memory for a few planes.

    Args:
        labels: (X, Y, Z) any labels; every structure is looked at by itself.
        largest: Of each structure its largest component alone (the first of equals).
        smallest_ml: Components below this volume are removed, in millilitres.
        reuse: Remove them from `labels` itself, which must not be used any more, instead of a copy.

    Raises:
        SettingsError: A volume that is negative or not a number.
    """
    check_smallest(smallest_ml)
    voxel_ml = abs(float(np.linalg.det(labels.affine[:3, :3]))) / 1000
    out = labels.data if reuse and labels.data.flags.writeable else labels.data.copy()
    for label, box in enumerate(ndimage.find_objects(_numbers(labels)), 1):
        if box is None:
            continue
        component, sizes = _components(out[box], label)
        keep = sizes * voxel_ml >= smallest_ml * (1 - 1e-9)  # volumes are rounded
        if largest:
            keep &= np.arange(len(sizes)) == sizes.argmax()
        if keep.all():
            continue
        first = 0
        for plane in out[box]:
            parts, count = ndimage.label(plane == label)
            kept = np.concatenate([[True], keep[component[first : first + count]]])  # other structures stay
            plane[~kept[parts]] = 0
            first += count
    return replace(labels, data=out)


def _components(
    data: Integer[np.ndarray, "X Y Z"] | Bool[np.ndarray, "X Y Z"], label: int
) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " C"]]:
    """The component of each part of a structure within a plane, and the voxels of each component.

    Parts in the order of planes, and within each as `ndimage.label` numbers them; components in the order of their
    first part.
    """
    sizes, touching, first, before = [], [np.zeros((0, 2), np.int64)], 0, None
    for plane in data:
        parts, count = ndimage.label(plane == label)
        sizes.append(np.bincount(parts.ravel(), minlength=count + 1)[1:])
        if before is not None:
            below, known = before
            both = (below > 0) & (parts > 0)
            pairs = np.unique(below[both].astype(np.int64) * (count + 1) + parts[both])
            touching.append(np.stack([known + pairs // (count + 1), first + pairs % (count + 1)], 1) - 1)
        before, first = (parts, first), first + count
    pairs = np.concatenate(touching)
    graph = sparse.coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (first, first))
    _, component = sparse.csgraph.connected_components(graph, directed=False)
    return component, np.bincount(component, np.concatenate(sizes)).astype(np.int64)

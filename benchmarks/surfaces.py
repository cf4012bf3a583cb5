"""Surface voxels of label maps, as figures count them: the border of the scan is no surface."""

import numpy as np


def surface_voxels(labels: np.ndarray) -> tuple[int, int]:
    """Foreground voxels with a 6-neighbour of another label (B1), and all voxels with one (B2)."""
    touched = np.zeros(labels.shape, dtype=bool)
    for axis in range(3):
        moved, other = np.moveaxis(labels, axis, 0), np.moveaxis(touched, axis, 0)
        differ = moved[1:] != moved[:-1]
        other[1:] |= differ
        other[:-1] |= differ
    return int((touched & (labels > 0)).sum()), int(touched.sum())

"""Whether a scan is anything like those that a model was trained on."""

import numpy as np

from ossnet.field.grid import Grid
from ossnet.field.model import Model
from ossnet.volume import spacing_of

LARGER, SMALLER = 1.5, 0.5
"""Of the largest and the smallest training scan: beyond these a scan was cut in another way."""


def unlike_training(model: Model, grid: Grid) -> str | None:
    """What is to be said of a scan that shows far more, or far less, than the training scans did; None otherwise.

    Args:
        grid: The scan's, in the axis order that the network sees.
    """
    known = model.metadata.get("extent_mm")
    if known is None:
        return None
    smallest, largest = np.array(known["smallest"]), np.array(known["largest"])
    extent = np.array(grid.shape) * np.array(spacing_of(grid.affine))
    size, low, high = (
        " × ".join(f"{v:.0f}" if v >= 10 else f"{v:.2g}" for v in values)
        for values in (extent, smallest, largest)
    )
    if (extent > LARGER * largest).any():
        return f"it shows {size} mm, the training scans showed at most {high} mm; cut it out as they were"
    if (extent < SMALLER * smallest).any():
        return f"it shows {size} mm, the training scans showed at least {low} mm"
    return None

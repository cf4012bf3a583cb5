"""A ball to cut crops from."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from ossnet.data.crop_locations import surface_voxels
from ossnet.data.crops import CropSettings, CropSource

ISO = CropSettings((16, 24, 16), (1.0, 1.0, 1.0), locations=300, strides=(4, 4, 4), elastic=2.0)
AS_SCANNED = replace(ISO, spatial=0.0, intensity=0.0)
"""The same crops and locations, without augmentation."""


def as_is(part: Num[np.ndarray, "C X Y Z"]) -> Float[Tensor, "C X Y Z"]:
    return torch.from_numpy(part.astype(np.float32))


def ball(
    shape: tuple[int, int, int] = (30, 34, 26),
    classes: int = 1,
    zoom: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> CropSource:
    """A ball; the image holds the coordinates of its voxels, so that it says where it was read."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(np.float32)
    centre = (np.array(shape) - 1) / 2
    distance = np.linalg.norm(grid - centre[:, None, None, None], axis=0)
    labels = (distance < 8).astype(np.uint8)
    if classes > 1:
        labels += (distance < 5).astype(np.uint8)
    return CropSource(grid, labels, classes, surface_voxels(labels, classes), as_is, zoom)

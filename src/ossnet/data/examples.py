"""Training examples of the default network: a crop of a scan, locations in it, and their soft targets."""

import numpy as np
import torch
from torch import Tensor

from ossnet.data.crop_locations import draw_locations, targets_at
from ossnet.data.crops import CropSettings, CropSource, cut, draw_map, inside, to_scan
from ossnet.data.intensities import change_intensities


def example(source: CropSource, settings: CropSettings, rng: np.random.Generator) -> dict[str, Tensor]:
    """One training example; everything random comes from `rng`.

    Returns:
        image: (C, A, B, D) float32.
        locations: (N, 3) float32, crop coordinates.
        importance: (N,) float32, what each of them counts; 1 on average.
        places: (N, 3) float32, scan coordinates of the locations, if `settings.position`. In a mirrored crop those
            of the mirrored scan.
        shape: (3,) float32, voxels of the scan, if `settings.position`.
        targets: (N,) occupancy in [0, 1] for binary, (N, K) class distributions otherwise.
        coarse: (1 or K, a, b, d), the targets at the centres of the coarse cells.
        weights: (a, b, d), 1 for coarse cells whose centre lies in the scan.
    """
    mapping = draw_map(source, settings, rng)
    image = cut(source, mapping)
    image = change_intensities(image, settings, rng)
    locations, importance = draw_locations(source, settings, mapping, rng)
    cells = [
        np.arange(n // s) * s + (s - 1) / 2 for n, s in zip(settings.crop, settings.strides, strict=True)
    ]
    centres = np.stack(np.meshgrid(*cells, indexing="ij"), axis=-1).astype(np.float32)
    places = to_scan(mapping(centres.reshape(-1, 3)), source.zoom)
    coarse = targets_at(source, places, settings.soft)
    grid = tuple(len(c) for c in cells)
    points = to_scan(mapping(locations), source.zoom)
    made = {
        "image": image,
        "locations": torch.from_numpy(locations),
        "importance": torch.from_numpy(importance),
        "targets": torch.from_numpy(targets_at(source, points, settings.soft)),
        "coarse": torch.from_numpy(np.ascontiguousarray(coarse.reshape(*grid, -1).transpose(3, 0, 1, 2))),
        "weights": torch.from_numpy(inside(places, source.shape).astype(np.float32).reshape(grid)),
    }
    if settings.position:
        # Rotations are small: an axis whose direction turned was mirrored.
        mirrored, last = np.diagonal(mapping.matrix) < 0, np.array(source.shape, np.float32) - 1
        made["places"] = torch.from_numpy(np.where(mirrored, last - points, points))
        made["shape"] = torch.from_numpy(last + 1)
    return made

"""What a segmentation will take, said before anything runs."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from ossnet.field.engine import prepare
from ossnet.field.grid import Grid
from ossnet.field.model import Model
from ossnet.volume import Affine, Shape, spacing_of

SURFACE_LOCATIONS = 2.5
"""Locations asked per surface voxel (foreground voxel with a neighbour of another label)."""


@dataclass(frozen=True)
class Forecast:
    """Expected locations, wall-clock seconds on this machine, and peak bytes above the loaded scan."""

    locations: int
    seconds: float
    memory_bytes: int
    chunk: int


def surface_voxels(model: Model, shape: Shape, affine: Affine) -> float:
    """Surface voxels to expect: the training set's surface in mm², in voxel faces of this grid."""
    surface = model.metadata.get("surface_mm2")
    sx, sy, sz = spacing_of(affine)
    face = (sx * sy * sz) ** (2 / 3)
    if surface is None:
        # A structure that fills a tenth of the scan, shaped between ball and twig.
        volume = 0.1 * float(np.prod(shape)) * sx * sy * sz
        surface = 1.5 * 4.836 * volume ** (2 / 3)
    return float(surface) / float(face)


def forecast(
    model: Model, shape: Shape, affine: Affine, *, memory: str | int | None = None, device: str = "cpu"
) -> Forecast:
    """Work out what `segment` will take on the scan's own grid.

    Args:
        shape: Voxels as stored.
        affine: Voxel index → world mm.
        memory: The grant, as for `Field`.

    The encoder and a few chunks of locations are timed on noise: seconds are this machine's, now.
    """
    orientation = model.preparation.orient(affine)
    x, y, z = (shape[a] for a in orientation.axes)
    grid = Grid((x, y, z), affine @ orientation.matrix(shape))
    fit = model.preparation.fit_for(grid.shape, spacing_of(grid.affine))
    started = time.perf_counter()
    image = torch.randn(model.channels, *fit.target)
    answer = prepare(
        model.network,
        image,
        device="cuda" if device != "cpu" and torch.cuda.is_available() else "cpu",
        precision="auto",
        memory=memory,
        **model.engine_options(),
    )
    encoder = time.perf_counter() - started
    if getattr(answer, "dense", False):
        locations = int(np.prod(grid.shape))
    else:
        lattice = float(np.prod([-(-n // 8) for n in grid.shape]))
        locations = int(lattice + SURFACE_LOCATIONS * surface_voxels(model, grid.shape, grid.affine))
    rng = np.random.default_rng(0)
    some = torch.from_numpy(rng.integers(0, fit.target, (2 * answer.chunk, 3)))
    answer(some[: answer.chunk])
    started = time.perf_counter()
    answer(some)
    per_location = (time.perf_counter() - started) / len(some)
    octree_bytes = 3 * float(np.prod(grid.shape))
    return Forecast(
        locations,
        encoder + locations * per_location,
        int(answer.fixed_bytes + answer.chunk * answer.bytes_per_location + octree_bytes),
        answer.chunk,
    )

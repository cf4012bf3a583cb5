"""What a segmentation will take, said before anything runs.

Letters: N locations, K classes.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ossnet.data.preparation import Fit
from ossnet.field.binding import Binding, surface_voxels
from ossnet.field.engine.answer import Answer
from ossnet.field.engine.blockwise.answer import BlockwiseAnswer
from ossnet.field.engine.scan import Scan
from ossnet.field.grid import Box, Grid, moved_spacing, oriented_box
from ossnet.field.labelling import Labelling
from ossnet.field.memory import LIBRARIES, label_bytes, parse_size
from ossnet.field.model import Model
from ossnet.field.octree.lattice import lattice_size
from ossnet.field.octree.strides import choose_path
from ossnet.volume import Affine, Shape, spacing_of

SECONDS_PER_VOXEL = 8e-9
"""The octree's own time, and the two looks at every voxel that normalising takes."""

SWEEPS = 12
"""Questions that a surface is gone over with: blocks that were not kept are computed again in each."""


@dataclass(frozen=True)
class Forecast:
    """Expected locations, wall-clock seconds on this machine, and peak bytes above the loaded scan and model."""

    locations: int
    seconds: float
    memory_bytes: int
    chunk: int


def locations_for(shape: Shape, surface: int | float, classes: int, predicted: bool = False) -> float:
    """Locations that the octree asks, as `Field` sets it: its first lattice and what lies at surfaces.

    Both sides of every surface, and a seventh for wrong predictions and small islands. Where structures touch each
    other both sides are surface voxels themselves: the more structures, the less for each.

    Args:
        shape: Voxels of the answer.
        surface: Surface voxels (foreground voxels with a neighbour of another label).
        classes: K, background included.
        predicted: The network's coarse logits stand for the first lattice, but for what lies at surfaces.
    """
    lattice = (
        0 if predicted else math.prod(-(-n // s) for n, s in zip(shape, choose_path(shape)[0], strict=True))
    )
    each = 1.15 + 1.15 * math.pow(max(classes - 1, 1), -0.65)
    return lattice + surface * each


def forecast(
    model: Model,
    shape: Shape,
    affine: Affine,
    *,
    memory: str | int | None = None,
    device: str | torch.device = "auto",
    spacing: float | tuple[float, float, float] | None = None,
    region: Box | None = None,
    dense: bool = False,
    probabilities: bool = False,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    chunk: int | None = None,
) -> Forecast:
    """Work out what `segment` will take.

    Args:
        shape: Voxels as stored.
        affine: Voxel index → world mm.
        memory: The grant, as for `Field`.
        spacing: Voxel size in mm of the answer; None: the scan's own grid.
        region: Looked at to see whether it lies on the answer's grid; it takes less than the whole, which is said.
        dense: All voxels are asked.
        probabilities: A map of them is wanted as well.
        device, precision, chunk: As for `Field`.

    The encoder and a few chunks of locations are timed on noise: seconds are this machine's, now.

    Raises:
        SettingsError: A device or a precision that is not there, or a region outside of the grid.
        ResourceError: The grant does not hold what segmenting such a scan takes.
    """
    orientation = model.preparation.orient(affine)
    x, y, z = (shape[a] for a in orientation.axes)
    grid = Grid((x, y, z), affine @ orientation.matrix(shape))
    target = grid if spacing is None else Grid.with_spacing(grid, moved_spacing(spacing, orientation))
    if region is not None:
        oriented_box(region, target, orientation)

    def stand_in(one: Model) -> Scan:
        fit = one.preparation.fit_for(grid.shape, spacing_of(grid.affine))
        # On the network's grid: boxes of it cost what those of an image that is held do, without its memory.
        scan = Scan(_noise(one.channels, fit.target), Fit.none(fit.target))
        scan.origin = fit
        return scan

    started = time.perf_counter()
    bound = Binding(
        model,
        grid,
        stand_in,
        device=device,
        grant=None if memory is None else parse_size(memory),
        precision=precision,
        chunk=chunk,
    )
    labelling = Labelling(bound, target, strategy="dense" if dense else "auto")
    labelling.prepare()
    asking, classes = labelling.bytes, labelling.classes
    if probabilities:
        # Made when the label map is there already.
        maps = 4 * max(model.classes, 1) * math.prod(target.shape)
        asking = max(asking, maps + label_bytes(target.shape, classes))
        bound.make_room(asking, "probabilities of all voxels")
    if bound.device.type == "cuda":
        torch.cuda.synchronize(bound.device)
    seconds = time.perf_counter() - started
    surface = surface_voxels(model, target.shape, target.affine)
    coarse, predicted = bound.answer.coarse, False
    if labelling.strategy == "dense":
        locations = float(math.prod(target.shape))
    elif labelling.stride is not None:
        sites = math.prod(lattice_size(target.shape, labelling.stride))
        locations = min(sites + locations_for(target.shape, surface, classes, True), math.prod(target.shape))
    else:
        predicted = coarse is not None and coarse.is_floating_point()
        locations = locations_for(target.shape, surface, classes, predicted)
    # Blocks of the network's maps are met on the scan's own grid, whatever is asked.
    own_surface = surface_voxels(model, grid.shape, grid.affine)
    kept_bytes, seconds = float(bound.held), seconds + SECONDS_PER_VOXEL * math.prod(target.shape)
    for answer in bound.answers:
        each, blocks, kept = _measured(answer, own_surface, predicted)
        seconds += blocks + locations * each
        kept_bytes += answer.fixed_bytes + kept + answer.chunk * answer.bytes_per_location
    encoding = bound.held + sum(answer.encoding_bytes for answer in bound.answers)
    peak = max(kept_bytes + asking, encoding, bound.held_peak) + LIBRARIES
    return Forecast(int(locations), seconds, int(peak), bound.answer.chunk)


def _noise(channels: int, shape: Shape) -> Float[np.ndarray, "C X Y Z"]:
    """Noise that takes no memory: rows of one vector, each begun somewhere else."""
    x, y, z = shape
    steps = (31, 17, 1)
    values = np.random.default_rng(0).standard_normal(31 * x + 17 * y + z, dtype=np.float32)
    strides = (0, *(values.itemsize * s for s in steps))
    # Torch warns of read-only ones.
    return np.lib.stride_tricks.as_strided(values, (channels, x, y, z), strides)


def _measured(answer: Answer, surface: float, predicted: bool) -> tuple[float, float, float]:
    """Seconds for a location; for maps that are made where locations are asked: seconds for all, and their bytes."""
    some = _patch(answer.shape, 2 * answer.chunk)
    computed = answer.computed if isinstance(answer, BlockwiseAnswer) else 0
    started = time.perf_counter()
    answer(some).cpu()
    first = time.perf_counter() - started
    started = time.perf_counter()
    answer(some).cpu()
    again = time.perf_counter() - started
    if not isinstance(answer, BlockwiseAnswer) or answer.computed == computed:
        return again / len(some), 0.0, 0.0
    each_block = max(first - again, 0.0) / (answer.computed - computed)
    # Those that a ball with that surface meets; some of its voxels have two or three faces to the outside.
    edge = 2 * math.sqrt(surface / (1.2 * 4 * math.pi))
    met = math.prod(min(n, edge + b) / b for n, b in zip(answer.padded, answer.block, strict=True))
    every = math.prod(-(-n // b) for n, b in zip(answer.padded, answer.block, strict=True))
    met = min(met, every)
    # A first lattice that is not predicted looks into every block once.
    blocks = met if predicted else every
    size = sum(m.bytes for maps in answer.blocks.values() for m in maps) / max(len(answer.blocks), 1)
    room = math.inf if answer.room is None else answer.room
    kept = min((blocks - len(answer.blocks)) * size, room - answer.fixed_bytes)
    again_and_again = SWEEPS * max(met - room / max(size, 1.0), 0.0)
    return again / len(some), (blocks + again_and_again) * each_block, max(kept, 0.0)


def _patch(shape: Shape, count: int) -> Int[Tensor, "N 3"]:
    """Voxels of two neighbouring planes, in the order that the octree asks them in."""
    edge = math.ceil(math.sqrt(count / 2))
    axes = [np.arange(2), np.arange(edge), np.arange(edge)]
    place = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)[:count]
    low = [(n - len(a)) // 2 for n, a in zip(shape, axes, strict=True)]
    return torch.from_numpy(np.clip(place + low, 0, np.array(shape) - 1))

"""Questions on another grid than the network's: mapped, asked, background outside the scan.

Letters: N locations, K classes.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from ossnet.field.engine.answer import Answer
from ossnet.field.grid import Grid
from ossnet.volume import Affine

Ask = Callable[[Num[np.ndarray, "N 3"]], Tensor]

_ROUNDED = 1e-6
"""Voxels that a place on the face of the scan may lie outside by rounding."""

CERTAIN = 1000.0
"""The logit of what needs no asking: a probability of 1 in float32, at any temperature up to 50."""


def ask_at(answer: Answer, locations: Num[np.ndarray, "N 3"], to_network: Affine) -> Float[Tensor, "N *K"]:
    """Logits at locations that an affine maps to the network's grid.

    Integers stay integers where the map moves whole voxels, which saves interpolation.
    """
    locations = np.asarray(locations)
    if locations.dtype.kind in "iu" and bool((to_network == np.rint(to_network)).all()):
        matrix = to_network.astype(np.int64)
        identity = bool((matrix == np.eye(4, dtype=np.int64)).all())
        mapped = locations if identity else locations.astype(np.int64) @ matrix[:3, :3].T + matrix[:3, 3]
        return answer(torch.from_numpy(np.ascontiguousarray(mapped)))
    mapped = locations.astype(np.float64) @ to_network[:3, :3].T + to_network[:3, 3]
    return answer(torch.from_numpy(mapped.astype(np.float32)))


def asker(answer: Answer, grid: Grid, scan: Grid, scan_to_network: Affine) -> Ask:
    """A function of voxel indices of a grid, for the octree and the mesh: logits, background outside the scan."""
    to_scan = grid.to(scan)
    to_network = scan_to_network @ to_scan
    inside_all = _covers(scan, grid, to_scan)

    def ask(voxels: Num[np.ndarray, "N 3"]) -> Tensor:
        logits = ask_at(answer, voxels, to_network)
        if inside_all:
            return logits
        place = np.asarray(voxels) @ to_scan[:3, :3].T + to_scan[:3, 3]
        outside = ((place < -0.5 - _ROUNDED) | (place > np.array(scan.shape) - 0.5 + _ROUNDED)).any(axis=1)
        return _background(logits, outside)

    return ask


def probabilities(logits: Float[np.ndarray, "N *K"], temperature: float = 1.0) -> Float[np.ndarray, "N *K"]:
    """(N,) of one structure, (N, K) of K classes.

    Args:
        temperature: Divides the logits (`Model.temperature`).
    """
    tensor = torch.from_numpy(logits) / temperature
    return (tensor.sigmoid() if tensor.ndim == 1 else tensor.softmax(dim=1)).numpy()


def _background(logits: Float[Tensor, "N *K"], outside: Bool[np.ndarray, " N"]) -> Float[Tensor, "N *K"]:
    logits, where = logits.clone(), torch.from_numpy(outside).to(logits.device)
    logits[where] = -CERTAIN
    if logits.ndim > 1:
        logits[where, 0] = CERTAIN
    return logits


def _covers(scan: Grid, grid: Grid, to_scan: Affine) -> bool:
    """Whether every voxel centre of a grid lies in a voxel of the scan."""
    corners = np.array(list(product(*((0.0, n - 1.0) for n in grid.shape))))
    place = corners @ to_scan[:3, :3].T + to_scan[:3, 3]
    return bool((place >= -0.5 - _ROUNDED).all() and (place <= np.array(scan.shape) - 0.5 + _ROUNDED).all())

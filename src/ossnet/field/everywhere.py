"""Every voxel asked, or every site of a lattice, piece by piece.

Letters: N locations, X Y Z voxels.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from jaxtyping import Integer

from ossnet.errors import SettingsError
from ossnet.field.asking import Ask
from ossnet.field.grid import Box, box_shape
from ossnet.field.memory import question_locations
from ossnet.field.octree.lattice import Triple, Window, lattice_size
from ossnet.field.octree.tree import NOT_A_NUMBER
from ossnet.field.progress import Report
from ossnet.volume import Shape


def slabs(
    shape: Shape, box: Box | None = None, voxels: int = 2**16
) -> Sequence[tuple[Box, Integer[np.ndarray, "N 3"]]]:
    """Pieces of a box, runs of planes or of rows of a plane, and their voxel indices (N, 3) in C order."""
    (x0, y0, z0), (x1, y1, z1) = box or ((0, 0, 0), shape)
    planes = max(1, voxels // max((y1 - y0) * (z1 - z0), 1))
    rows = max(1, voxels // max(z1 - z0, 1)) if planes == 1 else y1 - y0
    return _Slabs(
        [
            ((x, y, z0), (min(x + planes, x1), min(y + rows, y1), z1))
            for x in range(x0, x1, planes)
            for y in range(y0, y1, rows)
        ]
    )


class _Slabs(Sequence[tuple[Box, np.ndarray]]):
    """Made one at a time: all voxel indices of a large scan together would need more memory than the scan."""

    def __init__(self, boxes: list[Box]) -> None:
        self._boxes = boxes

    def __len__(self) -> int:
        return len(self._boxes)

    def __getitem__(self, index: Any) -> Any:
        box = self._boxes[index]
        axes = [np.arange(low, high, dtype=np.int32) for low, high in zip(*box, strict=True)]
        return box, np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def label_everywhere(
    ask: Ask, shape: Shape, region: Box | None, classes: int, progress: Report | None = None
) -> tuple[Integer[np.ndarray, "X Y Z"], int]:
    """Labels of a grid or of a region of it, and the number of locations asked.

    Args:
        classes: Including background.

    Raises:
        SettingsError: An answer is not a number.
    """
    low, high = region or ((0, 0, 0), shape)
    size = box_shape((low, high))
    out = np.empty(size, dtype=np.uint8 if classes <= 256 else np.uint16)
    done, total = 0, prod(size)
    for box, voxels in slabs(shape, region, question_locations(classes)):
        logits = ask(voxels)
        if logits.isnan().any():
            raise SettingsError(*NOT_A_NUMBER)
        labels = (logits > 0) if logits.ndim == 1 else logits.argmax(dim=1)
        part = tuple(slice(a - o, b - o) for a, b, o in zip(*box, low, strict=True))
        out[part] = labels.cpu().numpy().reshape(box_shape(box))
        done += len(voxels)
        if progress:
            progress(done, total - done)
    return out, done


def label_lattice(
    ask: Ask,
    shape: Shape,
    stride: Triple,
    sites: Window | None,
    classes: int,
    progress: Report | None = None,
) -> tuple[Integer[np.ndarray, "X Y Z"], int]:
    """Labels of every `stride`-th voxel along each axis, and the number of locations asked.

    Args:
        sites: Part of the lattice that is asked; all others are background. None: all of it.
        classes: Including background.
    """
    lattice = lattice_size(shape, stride)
    if sites is None:
        sites = Window((0, 0, 0), lattice)
    steps = np.array(stride, np.int32)
    found, asked = label_everywhere(
        lambda voxels: ask(voxels * steps), lattice, (sites.low, sites.high), classes, progress
    )
    out = np.zeros(lattice, found.dtype)
    out[tuple(slice(a, b) for a, b in zip(sites.low, sites.high, strict=True))] = found
    return out, asked

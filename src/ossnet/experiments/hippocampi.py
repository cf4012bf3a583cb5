"""The shipped model on the hippocampi of the MNI brain, which it never saw.

No reference labels come with the template, so nothing is scored here: there is a picture, and there are volumes.
"""

import time
from dataclasses import dataclass

import numpy as np

from ossnet.colours import colour
from ossnet.field.model import Model
from ossnet.reports.render import Surface, surface_of
from ossnet.volume import LabelMap, Volume

MODEL = "hippocampus"
CENTRES = {"left": (-27.0, -22.0, -15.0), "right": (27.0, -22.0, -15.0)}
"""World mm (MNI) of the boxes cut out around each hippocampus."""
BOX = (36, 50, 36)
"""Voxels of 1 mm, as the training scans have them."""
_SHOWN = ((-50.0, -58.0, -44.0), (50.0, 12.0, 20.0))
"""World mm of the box that is shown."""


@dataclass(frozen=True)
class Hippocampi:
    """Both hippocampi of one brain.

    Attributes:
        volume: The part of the scan around both.
        crops: Side → what was cut out and segmented.
        labels: On that part: 1 anterior, 2 posterior.
        volumes_ml: Side → structure → volume.
        evaluated: Locations asked.
        asked: Voxels of the two boxes together.
        seconds: Wall-clock time of segmenting both.
        surfaces: In MNI mm, names with the side.
        validation: Structure → what the card says of it on scans with reference labels.
    """

    volume: Volume
    crops: dict[str, Volume]
    labels: LabelMap
    volumes_ml: dict[str, dict[str, float]]
    evaluated: int
    asked: int
    seconds: float
    surfaces: tuple[Surface, ...]
    validation: dict[str, str]


def segment_hippocampi(brain: Volume) -> Hippocampi:
    """Cut out both sides, segment each, and put the results together.

    Args:
        brain: (1, X, Y, Z) in MNI space, 1 mm, axes right, anterior, superior.
    """
    model = Model.load(MODEL)
    together = np.zeros(brain.shape, np.uint8)
    volumes: dict[str, dict[str, float]] = {}
    surfaces: list[Surface] = []
    crops: dict[str, Volume] = {}
    evaluated, seconds = 0, 0.0
    for side, centre in CENTRES.items():
        low = np.rint(brain.to_voxel(np.array([centre]))[0]).astype(int) - np.array(BOX) // 2
        part = crops[side] = _cut(brain, low, low + BOX)
        started = time.perf_counter()
        found = model.field(part).segment()
        seconds += time.perf_counter() - started
        evaluated += found.evaluated
        x, y, z = (slice(a, a + n) for a, n in zip(low.tolist(), BOX, strict=True))
        np.maximum(together[x, y, z], found.data, out=together[x, y, z])
        ml = found.volumes_ml()
        volumes[side] = {name: ml.get(label, 0.0) for label, name in model.label_names.items()}
        for label, name in model.label_names.items():
            surface = surface_of(found, label, f"{side} {name}", colour(label), 10_000)
            surfaces += [surface] if surface is not None else []
    corners = np.rint(brain.to_voxel(np.array(_SHOWN))).astype(int)
    shown = _cut(brain, corners[0], corners[1])
    x, y, z = (slice(a, b) for a, b in corners.T.tolist())
    return Hippocampi(
        volume=shown,
        crops=crops,
        labels=LabelMap(np.ascontiguousarray(together[x, y, z]), shown.affine, names=model.label_names),
        volumes_ml=volumes,
        evaluated=evaluated,
        asked=len(CENTRES) * int(np.prod(BOX)),
        seconds=seconds,
        surfaces=tuple(surfaces),
        validation={k: v["dice"] for k, v in model.metadata.get("metrics", {}).items()},
    )


def _cut(brain: Volume, low: np.ndarray, high: np.ndarray) -> Volume:
    x, y, z = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    affine = brain.affine.copy()
    affine[:3, 3] = brain.to_world(low[None].astype(np.float64))[0]
    return Volume(np.ascontiguousarray(brain.data[:, x, y, z]), affine)

"""The octree for any function: `refine(function, shape)`."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, Num

from ossnet.errors import SettingsError
from ossnet.field.octree.lattice import Triple
from ossnet.field.octree.released_stages import START_STATES, ReleasedStages
from ossnet.field.octree.strides import Box, Path
from ossnet.field.octree.tree import Octree, decide

Function = Callable[[Any], Any]


@dataclass(frozen=True)
class Refinement:
    """What `refine` found.

    Attributes:
        labels: (X, Y, Z) of the volume, or of the region; uint8, uint16 for more than 127 classes.
        evaluated: Locations asked.
        rounds: Questions asked, each one or more calls of the function.
    """

    labels: Integer[np.ndarray, "X Y Z"]
    evaluated: int
    rounds: int


def refine(
    function: Function,
    shape: Triple,
    stride: int | Triple | None = None,
    start: Num[np.ndarray, "..."] | str | None = None,
    *,
    segmentation: Float[np.ndarray, "a b c"] | Float[np.ndarray, "K a b c"] | None = None,
    classes: int = 2,
    path: Path = "auto",
    batch: int = 2**16,
    region: Box | None = None,
    certain: bool = True,
    margin: float | None = None,
    seeds: bool = False,
    trust: float | None = None,
    safety: int = 2,
    doubt: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Refinement:
    """The label map of a function of position, asking it near its surfaces only.

    Every 6-connected component of the true label map that was hit by one evaluated voxel comes out exactly;
    one that no voxel hit is missing, whole: an object smaller than the stride can slip through
    (`field.octree.tree`). The answer for a voxel must not depend on what else is asked with it.

    >>> import numpy as np
    >>> def ball(voxels):  # logits: positive inside a ball of radius 20.5
    ...     return 20.5 - np.linalg.norm(voxels - np.array([32.0, 30.0, 28.0]), axis=1)
    >>> found = refine(ball, (64, 64, 64))
    >>> everywhere = ball(np.argwhere(np.ones((64, 64, 64)))) > 0
    >>> bool((found.labels.reshape(-1) == everywhere).all()), found.evaluated, everywhere.size
    (True, 9675, 262144)

    Args:
        function: Takes (N, 3) voxel indices (int32) and returns (N,) integer labels, (N,) float logits, or
            (N, K) float logits or log-probabilities, as numpy or torch. Logits cost fewer locations than
            labels.
        shape: Voxels along X, Y, Z.
        stride: First stride of the path stride, …, 8, 4, 1. None: `path` decides.
        start: None or "lattice": the coarsest lattice is evaluated whole. An array of any size over the same
            space, labels or logits: a prediction, with a sparse safety lattice; see `Octree`. "predict": so
            with `segmentation`. "original", "released", "paper": the released algorithm, for comparison; see
            `ReleasedStages`.
        segmentation: Low-resolution logits for the named start states.
        classes: Number of classes, background included.
        path: Strides from coarse to fine, or "auto".
        batch: Locations for one call of the function.
        region: ((x0, y0, z0), (x1, y1, z1)), ends exclusive: what the whole volume's answer has in this box,
            at the cost of the box.
        margin: Hint for small islands, see `Octree`.
        seeds: Hint for small islands, see `Octree`.
        trust: Stop short of certainty, see `Octree`.
        safety: With a prediction: every how many sites of the coarsest lattice are asked all the same.
        doubt: With predicted logits: sites of the coarsest lattice that are asked for them, see `Octree`.
        progress: Called with the locations asked so far and those known to follow on this lattice.

    Raises:
        SettingsError: For settings or answers that have no meaning.
    """
    _require_triple("shape", shape)
    if stride is not None:
        path = path_from(stride)
    octree = _questions(
        shape, start, segmentation, classes, path, region, certain, margin, seeds, trust, safety, doubt
    )
    while (voxels := octree.query()) is not None:
        labels, margins = ask(function, voxels, batch)
        octree.update(labels, margins)
        if progress is not None:
            progress(octree.evaluated, octree.pending)
    return Refinement(octree.labels(), octree.evaluated, octree.rounds)


def path_from(stride: int | Triple) -> Path:
    """The path that begins at a stride: 16, 8, 4, 1 cut off above it; 2 goes straight to 1.

    Raises:
        SettingsError: It is not a number of voxels, nor one an axis.
    """
    given: Any = (stride,) * 3 if isinstance(stride, Integral) else stride
    _require_triple("stride", given)
    first = (int(given[0]), int(given[1]), int(given[2]))
    steps = [first]
    for s in (8, 4, 1):
        step = (min(s, first[0]), min(s, first[1]), min(s, first[2]))
        if step != steps[-1]:
            steps.append(step)
    return steps


def _require_triple(name: str, values: Any) -> None:
    if np.shape(values) != (3,) or not all(isinstance(n, Integral) and int(n) >= 1 for n in values):
        raise SettingsError(name, f"is {values!r}", "Give three whole numbers, one an axis")


def ask(
    function: Function, voxels: Int[np.ndarray, "N 3"], batch: int
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"] | None]:
    """Labels and margins at voxels, asked `batch` at a time: only these are kept for many classes.

    Raises:
        SettingsError: A batch of none, or answers that have no meaning.
    """
    if batch < 1:
        raise SettingsError("batch", f"is {batch}", "Give at least 1")
    parts = [decide(function(voxels[i : i + batch])) for i in range(0, len(voxels), batch)]
    labels = np.concatenate([part[0] for part in parts])
    margins = [part[1] for part in parts if part[1] is not None]
    if margins and len(margins) != len(parts):
        raise SettingsError("function", "answers labels and logits in turn", "Return one kind")
    return labels, np.concatenate(margins) if margins else None


def _questions(
    shape: Triple,
    start: Num[np.ndarray, "..."] | str | None,
    segmentation: Float[np.ndarray, "..."] | None,
    classes: int,
    path: Path,
    region: Box | None,
    certain: bool,
    margin: float | None,
    seeds: bool,
    trust: float | None,
    safety: int,
    doubt: float | None,
) -> Octree | ReleasedStages:
    if isinstance(start, str) and start in START_STATES:
        if region is not None or classes != 2:
            raise SettingsError(
                "start", f"{start!r} is for whole volumes and one structure", "Use 'lattice' or 'predict'"
            )
        return ReleasedStages(shape, start, segmentation)
    if isinstance(start, str):
        if start not in ("lattice", "predict"):
            names = ", ".join(("lattice", "predict", *START_STATES))
            raise SettingsError("start", f"{start!r} is not a start state", f"Choose one of {names}")
        if start == "predict" and segmentation is None:
            raise SettingsError(
                "start", "'predict' needs a segmentation", "Pass segmentation=, or use 'lattice'"
            )
        start = segmentation if start == "predict" else None
    return Octree(
        shape,
        classes,
        path,
        start,
        safety=safety,
        doubt=doubt,
        region=region,
        certain=certain,
        margin=margin,
        seeds=seeds,
        trust=trust,
    )

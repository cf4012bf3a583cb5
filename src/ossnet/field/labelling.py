"""From a bound model to a label map: which locations are asked, in which order, and what that takes.

Letters: K classes, X Y Z voxels.
"""

from itertools import product
from math import prod
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Integer
from torch import Tensor

from ossnet.errors import SettingsError
from ossnet.field.asking import ask_at
from ossnet.field.binding import Binding
from ossnet.field.engine.answer import Coverable
from ossnet.field.everywhere import label_everywhere, label_lattice
from ossnet.field.grid import Box, Grid, box_shape
from ossnet.field.memory import affords_lattice, lattice_bytes, question_locations
from ossnet.field.octree.lattice import Triple, Window, lattice_size
from ossnet.field.octree.refinement import ask as ask_all
from ossnet.field.octree.refinement import path_from, refine
from ossnet.field.octree.released_stages import START_STATES, ReleasedStages
from ossnet.field.octree.strides import Path, check_path, parts, strides_within
from ossnet.field.octree.tree import Octree
from ossnet.field.progress import Report
from ossnet.volume import spacing_of

THOROUGH: dict[str, Any] = {"safety": 0, "doubt": 8.0, "margin": 2.0, "seeds": True}
"""How the octree looks for islands smaller than its lattice: where the coarse logits are not certain that there is
none. It overlooks a tenth of those that it would overlook otherwise (`benchmarks/agreement.py`), and scans of any size
are looked at in detail only near their structures."""

_STAGES_BYTES = 6
"""Of the released stages for each voxel of the network's grid."""

Labels = Integer[np.ndarray, "X Y Z"]


Strategy = Literal["auto", "octree", "dense", "original", "released", "paper"]


def check_strategy(strategy: str, classes: int, own_grid: bool) -> None:
    """Refuse a strategy that there is none of, and the released ones where they have no answer.

    Args:
        classes: The model's.
        own_grid: All of the scan's own grid is wanted, and nothing else.

    Raises:
        SettingsError: It is refused.
    """
    if strategy not in get_args(Strategy):
        known = ", ".join(get_args(Strategy))
        raise SettingsError("strategy", f"{strategy!r} is unknown", f"Use one of {known}")
    if strategy in START_STATES and not own_grid:
        raise SettingsError(
            "strategy", f"{strategy!r} answers on the scan's own grid only", 'Use strategy="octree"'
        )
    if strategy in START_STATES and classes > 1:
        raise SettingsError("strategy", f"{strategy!r} is for one structure", 'Use strategy="octree"')


class Labelling:
    """One label map that is about to be made: `prepare` it, then `run` it.

    Args:
        bound: Who is asked.
        grid: Of the label map.
        region: Only these voxels of it.
        strategy: "octree", "dense", or "auto" for the octree unless asking everywhere costs no more.
        options: Further arguments of `refine`.

    Attributes:
        strategy: The one that is taken.
        stride: Strides of a lattice that is asked whole, because hardly a piece of a structure slips through it
            (`Model.piece_gap_mm`); None where the network's prediction shows all structures.
    """

    def __init__(
        self,
        bound: Binding,
        grid: Grid,
        region: Box | None = None,
        strategy: str = "auto",
        **options: Any,
    ) -> None:
        self.bound, self.grid, self.region = bound, grid, region
        self.options = {**THOROUGH, **options}
        self.classes = max(bound.model.classes, 2)
        gap = bound.model.piece_gap_mm
        self.stride = None if gap is None else strides_within(gap, spacing_of(grid.affine), grid.shape)
        able = isinstance(bound.answer, Coverable) and "start" not in options
        self._local = region if able else None
        """The region, where only what it depends on is encoded and looked at."""
        self.strategy = self._resolved(strategy)
        self._lattice: Triple | None = None
        if self.strategy == "octree" and not {"start", "path"} & options.keys():
            self._lattice = self.stride
        if self._lattice is not None:
            self.options["path"] = path_from(self._lattice)

    def _resolved(self, strategy: str) -> str:
        if strategy != "auto":
            return strategy
        if self.bound.answer.dense:
            return "dense"
        if self.stride is None:
            return "octree"
        affordable = affords_lattice(self.bound.grant, lattice_size(self.grid.shape, self.stride))
        return "octree" if self.stride != (1, 1, 1) and affordable else "dense"

    @property
    def bytes(self) -> int:
        """What it takes beside the answer."""
        asking = self.bound.asking_bytes(self.grid, self.region)
        if self._lattice is None:
            return asking
        asked = None
        if self._local is not None:
            _, window = _first_sites(self.grid, self._local, path_from(self._lattice))
            asked = box_shape((window.low, window.high))
        return asking + lattice_bytes(lattice_size(self.grid.shape, self._lattice), asked)

    def prepare(self) -> None:
        """Leave memory to it, and encode what it will ask about.

        Raises:
            ResourceError: The grant does not hold it.
        """
        shape = self.grid.shape if self.region is None else box_shape(self.region)
        # For the scan's own label map the paper's variants left room when they were bound.
        if isinstance(self.bound.answer, Coverable) or prod(shape) > prod(self.bound.grid.shape):
            self.bound.make_room(self.bytes, f"a label map of {shape} voxels")
        path: Path = [1] if self.strategy == "dense" else self.options.get("path", "auto")
        self.bound.cover(None if self.region is None else needed(self.bound, self.grid, self.region, path))

    def run(self, progress: Report | None = None) -> tuple[Labels, int]:
        """The labels of the region, and how many locations were asked."""
        if self.strategy == "dense":
            return label_everywhere(
                self.bound.asker(self.grid), self.grid.shape, self.region, self.classes, progress
            )
        return self._grown(dict(self.options), progress)

    def _grown(self, options: dict[str, Any], progress: Report | None) -> tuple[Labels, int]:
        """By the octree."""
        ask, shape, region = self.bound.asker(self.grid), self.grid.shape, self.region
        start, looked, local = options.pop("start", None), 0, self._local
        if start is None:
            path = options.get("path", "auto")
            reach = None if local is None else _first_sites(self.grid, local, path)[1]
            start, looked = self._start(reach, options, progress)
        if looked:
            options["doubt"] = None  # the lattice was asked: there is none
        batch = options.pop("batch", question_locations(self.classes))
        if start is None or local is None:
            found = refine(
                ask,
                shape,
                start=start,
                classes=self.classes,
                region=region,
                progress=progress,
                batch=batch,
                **options,
            )
            return found.labels, looked + found.evaluated
        tree = Octree(shape, self.classes, start=start, region=region, **options)
        reach = tree.reach
        while (voxels := tree.query()) is not None:
            if tree.reach != reach:
                # Something entered the region unseen: a larger box decides, and its prediction is not there yet.
                reach = tree.reach
                self.bound.cover(_box_of(self.bound, self.grid, tree.path[0], reach, local[1]))
                start, more = self._start(reach, options, progress)
                looked += more
                tree.restart(start)
                continue
            tree.update(*ask_all(ask, voxels, batch))
            if progress is not None:
                progress(tree.evaluated, tree.pending)
        return tree.labels(), looked + tree.evaluated

    def _start(
        self, reach: Window | None, options: dict[str, Any], progress: Report | None
    ) -> tuple[np.ndarray | None, int]:
        """What predicts the octree's first lattice, and the locations that were asked for it.

        Args:
            reach: Only for these sites of it; None: all.
        """
        path = options.get("path", "auto")
        if self.stride is not None and path == path_from(self.stride):
            ask = self.bound.asker(self.grid)
            return label_lattice(ask, self.grid.shape, self.stride, reach, self.classes, progress)
        box = None
        if reach is not None and self._local is not None:
            steps = check_path(path, self.grid.shape)[0]
            box = _box_of(self.bound, self.grid, steps, reach, self._local[1])
        coarse = self.bound.prediction(box)
        if coarse is None or not self._prediction_pays(coarse):
            return None, 0
        coarse = coarse.detach().cpu()
        return np.asarray(coarse.float().numpy() if coarse.is_floating_point() else coarse.numpy()), 0

    def _prediction_pays(self, coarse: Tensor) -> bool:
        """A coarse array predicts the octree's first lattice where it covers the output grid and is fine enough."""
        fit = self.bound.fit
        # A scan with a border around it lies in a part of the coarse array.
        if not (fit.resizes or fit.source == fit.target) or not self.grid.spans(self.bound.grid):
            return False
        return bool((np.array(self.grid.shape) <= 16 * np.array(coarse.shape[-3:])).all())


def label_as_released(
    bound: Binding, stages: ReleasedStages, progress: Report | None = None
) -> tuple[Labels, int, tuple[int, ...]]:
    """The released algorithm on the network's grid, then back to the scan's: cut, or nearest voxel.

    Returns:
        Labels, locations asked, and those of each stage.
    """
    identity, batch = np.eye(4), question_locations(1)
    while (voxels := stages.query()) is not None:
        stages.update(*ask_all(lambda some: ask_at(bound.answer, some, identity), voxels, batch))
        if progress:
            progress(stages.evaluated, stages.pending)
    grid, fit = stages.labels(), bound.fit
    index = []
    for axis, (n, s) in enumerate(zip(fit.source, fit.target, strict=True)):
        if fit.resizes:
            index.append(np.minimum(((np.arange(n) + 0.5) * s / n).astype(int), s - 1))
        else:
            index.append(np.arange(n) + fit.offset[axis])
    return grid[np.ix_(*index)], stages.evaluated, tuple(stages.evaluated_per_stage)


def prepare_released(bound: Binding, strategy: str, reevaluate: bool) -> ReleasedStages:
    """The released stages, with room for them; all of the scan is encoded.

    Raises:
        ResourceError: The grant does not hold them.
    """
    # Two grids of the network's size, and what a stage makes of them.
    stages_bytes = _STAGES_BYTES * prod(bound.fit.target)
    bound.make_room(bound.asking_bytes(bound.grid) + stages_bytes, "the released stages")
    bound.cover(None)
    coarse = bound.answer.coarse
    segmentation = None if coarse is None else coarse.float().cpu().numpy()
    return ReleasedStages(bound.fit.target, strategy, segmentation, reevaluate=reevaluate)  # type: ignore[arg-type]


def needed(bound: Binding, grid: Grid, region: Box, path: Path) -> Box:
    """Voxels of the network's grid whose prediction and answers decide what the octree finds in a region."""
    return _box_of(bound, grid, *_first_sites(grid, region, path), region[1])


def _box_of(bound: Binding, grid: Grid, stride: Triple, sites: Window, end: Triple) -> Box:
    """Voxels of the network's grid that sites of a lattice lie in, and all up to the end of a region."""
    low, high = np.array(sites.low) * stride, (np.array(sites.high) - 1) * stride
    to_fitted = bound.fit.matrix() @ grid.to(bound.grid)
    corners = np.array(list(product(*zip(low, np.maximum(high, np.array(end) - 1), strict=True))))
    place = corners @ to_fitted[:3, :3].T + to_fitted[:3, 3]
    x0, y0, z0 = (int(v) for v in np.floor(place.min(axis=0)))
    x1, y1, z1 = (int(v) + 1 for v in np.ceil(place.max(axis=0)))
    return (x0, y0, z0), (x1, y1, z1)


def _first_sites(grid: Grid, region: Box, path: Path) -> tuple[Triple, Window]:
    """The first stride, and the sites whose prediction decides what the octree finds in a region."""
    steps = check_path(path, grid.shape)
    kept = parts(steps, grid.shape, Window(*region), [0] * len(steps), predicted=True)[0].kept
    return steps[0], kept

"""A model bound to one scan: everything that can be asked, asked here.

Letters: N locations, K classes, X Y Z voxels.
"""

import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float, Integer, Num

from ossnet.errors import SettingsError
from ossnet.field.asking import ask_at, probabilities
from ossnet.field.binding import Binding
from ossnet.field.engine.prepare import Precision
from ossnet.field.engine.scan import Scan
from ossnet.field.everywhere import slabs
from ossnet.field.grid import Box, Grid, box_shape, moved_spacing, moved_triple, oriented_box
from ossnet.field.labelling import (
    Labelling,
    Strategy,
    check_strategy,
    label_as_released,
    needed,
    prepare_released,
)
from ossnet.field.memory import parse_size, question_locations
from ossnet.field.mesh.extract import check_mesh_options, extract_mesh, mesh_bytes
from ossnet.field.model import Model
from ossnet.field.octree.refinement import path_from, refine
from ossnet.field.octree.released_stages import START_STATES
from ossnet.field.octree.tree import NOT_A_NUMBER
from ossnet.field.progress import Report, reporting
from ossnet.volume import (
    Affine,
    LabelMap,
    Orientation,
    Shape,
    Volume,
    closest_canonical,
    same_names,
    same_place,
    transform,
)

if TYPE_CHECKING:
    import trimesh

Method = TypeVar("Method", bound=Callable[..., Any])

Points = Num[np.ndarray, "N 3"] | Sequence[Sequence[float | int] | Num[np.ndarray, "3"]]
"""Three numbers a point."""

OCTREE_OPTIONS = frozenset(signature(refine).parameters) - {
    "function",
    "shape",
    "classes",
    "region",
    "progress",
    "segmentation",
}
"""Arguments of `refine` that `Field.segment` passes on."""

MESH_OPTIONS = frozenset(signature(extract_mesh).parameters) - {
    "function",
    "shape",
    "affine",
    "labels",
    "label",
    "classes",
}
"""Arguments of `extract_mesh` that `Field.mesh` takes."""


@dataclass(frozen=True, repr=False, eq=False)
class Segmentation(LabelMap):
    """A label map with how it was found.

    Its `data` is a view with strides of its own where a memory grant does not hold the label map twice.

    Attributes:
        evaluated: Locations asked.
        seconds: Wall-clock time of `segment`, the encoder not included.
        strategy: How the locations were chosen.
    """

    evaluated: int = 0
    seconds: float = 0.0
    strategy: str = ""
    stages: tuple[int, ...] = field(default=())


def _in_turn(method: Method) -> Method:
    """One at a time where memory is granted (`Binding.turn`)."""

    @wraps(method)
    def waiting(self: "Field", *args: Any, **options: Any) -> Any:
        with self._bound.turn:
            return method(self, *args, **options)

    return cast(Method, waiting)


class Field:
    """What a model answers for one scan.

    Several threads may ask the same field at once; where memory is granted, label maps, probabilities of all voxels and
    meshes are made one after the other. Several fields on one GPU belong into one thread.

    Args:
        model: A trained model.
        volume: The scan; its channels in the order the model was trained with.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        memory: Grant for everything above the loaded volume and the model, bytes or as "2GB"; None: no bound.
        precision: "fp32", "bf16", or "auto": bf16 where the machine computes in it; the paper's variants answer close
            calls again in fp32.
        preprocessed: Take the values of the volume as they are (the reference cases).
        chunk: Locations a pass; None chooses.

    Raises:
        VolumeError: The scan does not have the model's channels.
        ResourceError: The grant does not hold what segmenting this scan takes. With the default network, which
            encodes nothing before it is asked, `segment` says so instead.
    """

    def __init__(
        self,
        model: Model,
        volume: Volume,
        *,
        device: str | torch.device = "auto",
        memory: str | int | None = None,
        precision: Precision = "auto",
        preprocessed: bool = False,
        chunk: int | None = None,
    ) -> None:
        if not isinstance(volume, Volume):
            raise SettingsError(
                "volume", f"it is a {type(volume).__name__}", "Read the scan: ossnet.read(path)"
            )
        model.require_channels(volume.channels, volume.source or "scan")
        self.model, self.volume = model, volume
        self._orientation: Orientation = model.preparation.orient(volume.affine)
        oriented = volume.reoriented(self._orientation)
        self.grid = Grid(oriented.shape, oriented.affine)
        """The scan's grid in the axis order that the network sees."""
        self._bound = Binding(
            model,
            self.grid,
            lambda one: Scan.bound(volume, one.preparation, preprocessed),
            device=device,
            grant=None if memory is None else parse_size(memory),
            precision=precision,
            chunk=chunk,
        )

    def __repr__(self) -> str:
        """In a line."""
        size = " × ".join(map(str, self.volume.shape))
        return f"<Field of {self.model!r} on {self.volume.source or 'a scan'}, {size} voxels, {self.device}>"

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self._bound.device

    @property
    def encoder_seconds(self) -> float:
        """Wall-clock time of preparing and encoding the scan; the default network encodes when it is asked."""
        return self._bound.encoder_seconds

    # Asking at points ---------------------------------------------------------------------------------------------

    def logits(self, points: Points, space: Literal["voxel", "world"] = "voxel") -> Float[np.ndarray, "N *K"]:
        """Logits at points: (N,) for one structure, (N, K) for K classes including background.

        Args:
            points: (N, 3), voxel indices of the scan as stored (fractions allowed), or world mm. Outside the scan they
                count as the nearest point of its border.
            space: What the points are.

        Raises:
            SettingsError: Points that are not (N, 3) finite numbers, or another space.
        """
        points = _checked(points, space)
        if space == "world":
            points = transform(points, np.linalg.inv(self.volume.affine))
        points = points.clip(-0.5, np.array(self.volume.shape) - 0.5)
        to_fitted = self._bound.fit.matrix() @ np.linalg.inv(self._orientation.matrix(self.volume.shape))
        logits = ask_at(self._bound.answer, points, to_fitted)
        return logits.float().cpu().numpy()

    def probability(
        self, points: Points, space: Literal["voxel", "world"] = "voxel"
    ) -> Float[np.ndarray, "N *K"]:
        """Probabilities at points: (N,) for one structure, (N, K) for K classes including background.

        They are those of `logits` divided by `Model.temperature`.
        """
        return probabilities(self.logits(points, space), self.model.temperature)

    # Segmenting ---------------------------------------------------------------------------------------------------

    @_in_turn
    def segment(
        self,
        *,
        spacing: float | tuple[float, float, float] | None = None,
        shape: Shape | None = None,
        like: Volume | LabelMap | None = None,
        region: Box | None = None,
        strategy: Strategy = "auto",
        progress: Report | bool | None = None,
        reevaluate: bool = False,
        **octree: Any,
    ) -> Segmentation:
        """The label map on the scan's grid, or on another one.

        Args:
            spacing: Voxel size in mm of a grid over the same extent.
            shape: Number of voxels of a grid over the same extent.
            like: The grid of this volume; what lies outside the scan is background.
            region: ((x0, y0, z0), (x1, y1, z1)), ends excluded, voxels of the output grid: only this box.
            strategy: "octree" asks near surfaces only and equals asking everywhere, but for whole components that
                no location hit; "dense" asks everywhere; "auto" is "octree" unless asking everywhere costs no more.
                Where structures come in small pieces (`Model.piece_gap_mm`) the octree asks a whole lattice first that
                hardly a piece slips through. "original", "released" and "paper" are the released algorithm and its
                improved start state in both readings, on the network's grid (SPEC §5, §7.1).
            progress: Called with the locations asked so far and those known to follow; True: a bar on a terminal.
            reevaluate: For the released strategies: ask again as the released code does (SPEC §7.21).
            octree: Further arguments of `refine`, for strategies "auto" and "octree". `doubt=None, safety=2,
                margin=None, seeds=False` asks a little less and overlooks more islands of a few voxels, `safety=1` asks
                the whole first lattice.

        Raises:
            SettingsError: Arguments that exclude each other, or belong to another strategy.
            ResourceError: The grant does not hold the label map.
        """
        own_grid = spacing is None and shape is None and like is None and region is None
        check_strategy(strategy, self.model.classes, own_grid)
        _check_names(Field.segment, octree, OCTREE_OPTIONS)
        _check_heeded(strategy, octree, reevaluate)
        octree = _named_start(octree)
        if (stride := octree.pop("stride", None)) is not None:
            octree["path"] = path_from(stride)
        bound, how = self._bound, str(strategy)
        stages: tuple[int, ...] = ()
        if strategy in START_STATES:
            released = prepare_released(bound, strategy, reevaluate)
            started = time.perf_counter()
            with reporting(progress) as report:
                labels, evaluated, stages = label_as_released(bound, released, report)
            how = released.start_state
            grid, orientation = self.grid, self._orientation
        else:
            grid, orientation = self._target(spacing, shape, like)
            box = None if region is None else oriented_box(region, grid, orientation)
            labelling = Labelling(bound, grid, box, strategy, **octree)
            how = labelling.strategy
            labelling.prepare()
            started = time.perf_counter()
            with reporting(progress) as report:
                labels, evaluated = labelling.run(report)
            if box is not None:
                grid = grid.part(box[0], labels.shape)
        stored = orientation.undo(labels)
        twice = bound.grant is None or bound.kept_bytes + 2 * labels.nbytes <= bound.grant
        x, y, z = stored.shape
        return Segmentation(
            data=np.ascontiguousarray(stored) if twice else stored,
            affine=_stored_affine(grid, orientation, (x, y, z)),
            header=(like or self.volume).header,
            names=self.model.label_names,
            values=self.model.moved_values,
            evaluated=evaluated,
            seconds=time.perf_counter() - started,
            strategy=how,
            stages=stages,
        )

    @_in_turn
    def probability_map(
        self,
        *,
        spacing: float | tuple[float, float, float] | None = None,
        shape: Shape | None = None,
        like: Volume | LabelMap | None = None,
        region: Box | None = None,
        progress: Report | bool | None = None,
        beside: int = 0,
    ) -> Volume:
        """Probabilities, asked everywhere: (1, X, Y, Z), or (K, X, Y, Z) with background first.

        Args:
            spacing: As for `segment`, and so are `shape`, `like` and `region`.
            progress: As for `segment`.
            beside: Bytes of the grant that the caller needs meanwhile, of a label map for example.

        Raises:
            SettingsError: Arguments that exclude each other, or an answer that is not a number.
            ResourceError: The grant does not hold the probabilities.
        """
        grid, orientation = self._target(spacing, shape, like)
        box = None if region is None else oriented_box(region, grid, orientation)
        low, size = (0, 0, 0) if box is None else box[0], grid.shape if box is None else box_shape(box)
        classes = max(self.model.classes, 1)
        self._bound.make_room(4 * classes * prod(size) + beside, "probabilities of all voxels")
        self._bound.cover(None if box is None else needed(self._bound, grid, box, [1]))
        # Written through a view in the network's axis order: turning them round afterwards would need them twice.
        x, y, z = (size[i] for i in np.argsort(orientation.axes))
        out = np.empty((classes, x, y, z), dtype=np.float32)
        turned = orientation.apply(out)
        ask, done = self._bound.asker(grid), 0
        with reporting(progress) as report:
            for piece, voxels in slabs(grid.shape, box, question_locations(classes)):
                logits = ask(voxels)
                if logits.isnan().any():
                    raise SettingsError(*NOT_A_NUMBER)
                found = probabilities(logits.float().cpu().numpy(), self.model.temperature)
                part = np.moveaxis(found.reshape(*box_shape(piece), -1), -1, 0)
                turned[(slice(None), *(slice(a - o, b - o) for a, b, o in zip(*piece, low, strict=True)))] = (
                    part
                )
                done += len(voxels)
                if report:
                    report(done, out[0].size - done)
        affine = _stored_affine(grid.part(low, size), orientation, (x, y, z))
        return Volume(out, affine, self.volume.source, (like or self.volume).header)

    @_in_turn
    def mesh(
        self,
        structure: str | int = 1,
        *,
        faces: int | None = None,
        smooth: int = 0,
        labels: LabelMap | None = None,
        **options: Any,
    ) -> "trimesh.Trimesh":
        """The closed surface of one structure, in world mm.

        Args:
            structure: Its name or label.
            faces: Simplify to about this many triangles.
            smooth: Rounds of Taubin smoothing.
            labels: What `segment` gave for the scan's own grid, if it was called already; also changed since, read
                from a file, or stored in another voxel order.
            options: Further arguments of `extract_mesh`.

        Raises:
            SettingsError: No such structure or option, labels that do not lie on the scan or number structures
                otherwise than the model, or the extra `mesh` is not installed.
            ResourceError: The grant does not hold the label map and the mesh.
        """
        label = self.model.label_of(structure)
        # Before the scan is segmented, which may take long.
        _check_names(Field.mesh, options, MESH_OPTIONS)
        check_mesh_options(faces, smooth, **options)
        oriented = self._orientation.apply(self.segment().data if labels is None else self._as_stored(labels))
        if self._bound.grant is not None:
            size = mesh_bytes(oriented, label, options.get("min_voxels", 0))
            self._bound.make_room(oriented.nbytes + size, "this mesh")
        return extract_mesh(
            self._bound.asker(self.grid),
            self.grid.shape,
            self.grid.affine,
            labels=oriented,
            label=label,
            classes=max(self.model.classes, 2),
            faces=faces,
            smooth=smooth,
            **options,
        )

    def _as_stored(self, labels: Any) -> Integer[np.ndarray, "X Y Z"]:
        """Labels that lie on the scan, in its voxel order whatever theirs is."""
        if not isinstance(labels, LabelMap):
            raise SettingsError(
                "labels", f"it is a {type(labels).__name__}", "Read it: ossnet.read_labels(path)"
            )
        turned = self.model.as_classes(labels).in_order_of(self.volume)
        if reason := same_place(self.volume, turned):
            raise SettingsError("labels", f"they do not lie on the scan: {reason}", "Give those of this scan")
        if reason := same_names(turned.names, self.model.label_names):
            raise SettingsError(
                str(labels.source or "labels"),
                f"they number structures otherwise than the model: {reason}",
                "Correct their numbers or their names",
            )
        return turned.data

    # Grids ------------------------------------------------------------------------------------------------------

    def _target(
        self,
        spacing: float | tuple[float, float, float] | None,
        shape: Shape | None,
        like: Volume | LabelMap | None,
    ) -> tuple[Grid, Orientation]:
        if sum(x is not None for x in (spacing, shape, like)) > 1:
            raise SettingsError("segment", "spacing, shape and like exclude each other", "Give one of them")
        if like is not None:
            if not isinstance(like, Volume | LabelMap):
                raise SettingsError("like", f"it is a {type(like).__name__}", "Read it: ossnet.read(path)")
            # Octrees start at a corner: the same one, whatever order the voxels of `like` are stored in.
            orientation = closest_canonical(like.affine)
            oriented = like.reoriented(orientation)
            return Grid(oriented.shape, oriented.affine), orientation
        if spacing is not None:
            return Grid.with_spacing(self.grid, moved_spacing(spacing, self._orientation)), self._orientation
        if shape is not None:
            x, y, z = (int(n) for n in moved_triple("shape", shape, self._orientation))
            return Grid.with_shape(self.grid, (x, y, z)), self._orientation
        return self.grid, self._orientation


def _check_heeded(strategy: str, octree: Mapping[str, Any], reevaluate: bool) -> None:
    """Refuse options of other strategies."""
    if reevaluate and strategy not in START_STATES:
        raise SettingsError("reevaluate", f"{strategy!r} does not use it", "Leave it out")
    if octree and strategy not in ("auto", "octree"):
        raise SettingsError(
            min(octree), f"{strategy!r} does not use it", 'Leave it out, or use strategy="octree"'
        )


def _named_start(octree: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the octree without a start that is another strategy, or what is done anyway."""
    start = octree.get("start")
    if isinstance(start, str) and start in START_STATES:
        raise SettingsError("start", f"{start!r} is the released algorithm", f'Use strategy="{start}"')
    # The network's own prediction is where the octree starts, if it has one.
    return {k: v for k, v in octree.items() if k != "start" or not isinstance(v, str) or v != "predict"}


def _check_names(method: Callable[..., Any], given: Mapping[str, Any], known: Set[str]) -> None:
    """Refuse further arguments of a method that it has not."""
    if unknown := sorted(given.keys() - known):
        near = get_close_matches(unknown[0], [*known, *signature(method).parameters], 1)
        fix = f"Perhaps {near[0]} is meant" if near else f"Known are {', '.join(sorted(known))}"
        raise SettingsError(method.__name__, f"there is no option {unknown[0]}", fix)


def _checked(points: Any, space: str) -> Float[np.ndarray, "N 3"]:
    if space not in ("voxel", "world"):
        raise SettingsError("space", f"{space!r} is unknown", "Use voxel (indices) or world (mm)")
    out = np.asarray(points, dtype=np.float64)
    if out.ndim != 2 or out.shape[1] != 3:
        raise SettingsError(
            "points", f"their shape is {out.shape} instead of (N, 3)", "One point is [[x, y, z]]"
        )
    if not np.isfinite(out).all():
        raise SettingsError("points", "some are not finite", "Leave them out")
    return out


def _stored_affine(grid: Grid, orientation: Orientation, stored_shape: Shape) -> Affine:
    return grid.affine @ np.linalg.inv(orientation.matrix(stored_shape))

"""A model bound to one scan: everything that can be asked, asked here.

Letters: N locations, K classes, X Y Z voxels.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Integer, Num

from ossnet.errors import ResourceError, SettingsError, VolumeError
from ossnet.field.asking import Ask, ask_at, asker, probabilities
from ossnet.field.engine.answer import Answer, Coverable
from ossnet.field.engine.prepare import Precision, precision_among, prepare
from ossnet.field.engine.scan import Scan
from ossnet.field.everywhere import label_everywhere, label_lattice, slabs
from ossnet.field.forecast import surface_voxels
from ossnet.field.grid import Box, Grid, box_shape, check_box, moved_box
from ossnet.field.memory import (
    LIBRARIES,
    affords_lattice,
    asking_bytes,
    lattice_bytes,
    parse_size,
    question_locations,
    require,
)
from ossnet.field.mesh.extract import check_mesh_options, extract_mesh, mesh_bytes
from ossnet.field.model import Model
from ossnet.field.octree.lattice import Triple, Window
from ossnet.field.octree.refinement import ask as ask_all
from ossnet.field.octree.refinement import path_from, refine
from ossnet.field.octree.released_stages import START_STATES, ReleasedStages
from ossnet.field.octree.strides import Path, check_path, parts, strides_within
from ossnet.field.octree.tree import Octree
from ossnet.field.progress import Report, reporting
from ossnet.field.together import MeanAnswer
from ossnet.volume import (
    Affine,
    LabelMap,
    Orientation,
    Shape,
    Volume,
    closest_canonical,
    same_place,
    spacing_of,
)

if TYPE_CHECKING:
    import trimesh

_STAGES_BYTES = 6
"""Of the released stages for each voxel of the network's grid."""

Strategy = Literal["auto", "octree", "dense", "original", "released", "paper"]

THOROUGH: dict[str, Any] = {"safety": 0, "doubt": 8.0, "margin": 2.0, "seeds": True}
"""How the octree looks for islands smaller than its lattice: where the coarse logits are not certain that there is
none. It overlooks a tenth of those that it would overlook otherwise (`benchmarks/agreement.py`), and scans of any size
are looked at in detail only near their structures."""


OCTREE_OPTIONS = frozenset(signature(refine).parameters) - {
    "function",
    "shape",
    "classes",
    "region",
    "progress",
}
"""Arguments of `refine` that `Field.segment` passes on."""


@dataclass(frozen=True, repr=False)
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


class Field:
    """What a model answers for one scan. Reading is thread-safe.

    Args:
        model: A trained model.
        volume: The scan; its channels in the order the model was trained with.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        memory: Grant for everything above the loaded volume and the model, bytes or as "2GB"; None: no bound.
        precision: "fp32", "bf16", or "auto": bf16 where the machine computes in it, close calls again in fp32.
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
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        preprocessed: bool = False,
        chunk: int | None = None,
    ) -> None:
        if not isinstance(volume, Volume):
            raise SettingsError(
                "volume", f"it is a {type(volume).__name__}", "Read the scan: ossnet.read(path)"
            )
        if volume.channels != model.channels:
            names = f" ({', '.join(model.channel_names)})" if model.channel_names else ""
            raise VolumeError(
                volume.source or "scan",
                f"it has {volume.channels} channel(s), the model takes {model.channels}{names}",
                "Give one file with all channels, or one file a channel, in the order of the training",
            )
        self.model, self.volume = model, volume
        self.device = _device(device)
        self._grant = None if memory is None else parse_size(memory)
        started = time.perf_counter()
        self._orientation: Orientation = model.preparation.orient(volume.affine)
        oriented = volume.reoriented(self._orientation)
        self.grid = Grid(oriented.shape, oriented.affine)
        """The scan's grid in the axis order that the network sees."""
        self._held = 0
        """Bytes of the grant that images take."""
        models = (model, *model.others)
        # Models that want the scan alike read it together.
        scans: list[Scan] = []
        for one in models:
            alike = [s for m, s in zip(models, scans, strict=False) if m.preparation == one.preparation]
            scans.append(alike[0] if alike else Scan.bound(volume, one.preparation, preprocessed))
        self._fit = scans[0].fit
        self._fitted: Shape = self._fit.target
        with self._told_of_shares(len(models)):
            answers = [
                self._bound(one, scan, precision, chunk, len(models))
                for one, scan in zip(models, scans, strict=True)
            ]
        back = np.linalg.inv(self._fit.matrix())
        self._answer: Answer = answers[0]
        if len(models) > 1:
            reserve = -(-self._asking_bytes(self.grid) // len(models))
            self._answer = MeanAnswer(answers, [_exact(s.fit.matrix() @ back) for s in scans], reserve)
        self.encoder_seconds = time.perf_counter() - started
        """Wall-clock time of preparing and encoding the scan; the default network encodes when it is asked."""

    def _bound(
        self, model: Model, scan: Scan, precision: Precision, chunk: int | None, models: int
    ) -> Answer:
        """One model's answer for the scan, in its share of the grant."""
        grant = None if self._grant is None else self._grant // models
        reserve, libraries = -(-self._asking_bytes(self.grid) // models), -(-LIBRARIES // models)
        if scan.held is None and scan.pays_to_hold(self.device, grant, reserve + libraries):
            scan.hold(self.device)
            if grant is not None:
                grant -= scan.image_bytes
                self._held += scan.image_bytes
        return prepare(
            model.network,
            scan,
            device=self.device,
            precision=precision_among(model.network, precision, models),
            chunk=chunk,
            memory=grant,
            reserve=reserve,
            libraries=libraries,
            **model.engine_options(),
        )

    @contextmanager
    def _told_of_shares(self, models: int) -> Iterator[None]:
        """Of several models each refuses its share; who granted the whole is told so."""
        try:
            yield
        except ResourceError as error:
            if models == 1 or self._grant is None:
                raise
            raise ResourceError(
                f"{models} models share the memory that is granted. Of each share: {error}"
            ) from error

    def _asking_bytes(self, grid: Grid, region: Box | None = None) -> int:
        surface = surface_voxels(self.model, grid.shape, grid.affine)
        shape = grid.shape if region is None else box_shape(region)
        return asking_bytes(shape, max(self.model.classes, 2), surface)

    # Asking at points ---------------------------------------------------------------------------------------------

    def logits(
        self, points: Num[np.ndarray, "N 3"], space: Literal["voxel", "world"] = "voxel"
    ) -> Float[np.ndarray, "N *K"]:
        """Logits at points: (N,) for one structure, (N, K) for K classes including background.

        Args:
            points: Voxel indices of the scan as stored (fractions allowed), or world mm. Outside the scan they count as
                the nearest point of its border.
            space: What the points are.

        Raises:
            SettingsError: Points that are not (N, 3) finite numbers, or another space.
        """
        points = _checked(points, space)
        to_fitted = self._fit.matrix() @ np.linalg.inv(self._orientation.matrix(self.volume.shape))
        if space == "world":
            to_fitted = to_fitted @ np.linalg.inv(self.volume.affine)
        logits = ask_at(self._answer, points, to_fitted)
        return logits.float().cpu().numpy()

    def probability(
        self, points: Num[np.ndarray, "N 3"], space: Literal["voxel", "world"] = "voxel"
    ) -> Float[np.ndarray, "N *K"]:
        """Probabilities at points: (N,) for one structure, (N, K) for K classes including background."""
        return probabilities(self.logits(points, space))

    # Segmenting ---------------------------------------------------------------------------------------------------

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
            octree: Further arguments of `refine`; `doubt=None, safety=2, margin=None, seeds=False` asks a little
                less and overlooks more islands of a few voxels, `safety=1` asks the whole first lattice.

        Raises:
            SettingsError: Arguments that exclude each other.
            ResourceError: The grant does not hold the label map.
        """
        if strategy not in get_args(Strategy):
            known = ", ".join(get_args(Strategy))
            raise SettingsError("strategy", f"{strategy!r} is unknown", f"Use one of {known}")
        if unknown := sorted(octree.keys() - OCTREE_OPTIONS):
            near = get_close_matches(unknown[0], [*OCTREE_OPTIONS, *signature(Field.segment).parameters], 1)
            fix = f"Perhaps {near[0]} is meant" if near else f"Known are {', '.join(sorted(OCTREE_OPTIONS))}"
            raise SettingsError("segment", f"there is no option {unknown[0]}", fix)
        how: str = strategy
        if strategy in START_STATES:
            if spacing is not None or shape is not None or like is not None or region is not None:
                raise SettingsError(
                    "strategy", f"{strategy!r} answers on the scan's own grid only", 'Use strategy="octree"'
                )
            # Two grids of the network's size, and what a stage makes of them.
            self._make_room(
                self._asking_bytes(self.grid) + _STAGES_BYTES * int(np.prod(self._fitted)),
                "the released stages",
            )
            self._cover(self.grid, None)
            started = time.perf_counter()
            with reporting(progress) as report:
                labels, evaluated, stages = self._released(strategy, report, reevaluate)
            grid, orientation = self.grid, self._orientation
        else:
            grid, orientation = self._target(spacing, shape, like)
            box = self._oriented_region(region, grid, orientation)
            if "stride" in octree:
                octree["path"] = path_from(octree.pop("stride"))
            how = self._resolve(strategy, grid)
            stride = self._piece_stride(grid)
            if how == "octree" and stride is not None and not {"start", "path"} & set(octree):
                octree["path"] = path_from(stride)
                self._make_room_for_labels(grid, box, lattice_bytes(grid.shape, stride))
            else:
                self._make_room_for_labels(grid, box)
            self._cover(grid, box, [1] if how == "dense" else octree.get("path", "auto"))
            started = time.perf_counter()
            with reporting(progress) as report:
                labels, evaluated = self._fill(grid, box, how, report, octree)
            stages = ()
            if box is not None:
                grid = grid.part(box[0], labels.shape)
        stored = orientation.undo(labels)
        twice = self._grant is None or self._kept_bytes + 2 * labels.nbytes <= self._grant
        x, y, z = stored.shape
        return Segmentation(
            data=np.ascontiguousarray(stored) if twice else stored,
            affine=_stored_affine(grid, orientation, (x, y, z)),
            header=(like or self.volume).header,
            names=self.model.label_names,
            evaluated=evaluated,
            seconds=time.perf_counter() - started,
            strategy=how,
            stages=stages,
        )

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
            SettingsError: Arguments that exclude each other.
            ResourceError: The grant does not hold the probabilities.
        """
        grid, orientation = self._target(spacing, shape, like)
        box = self._oriented_region(region, grid, orientation)
        low, size = (0, 0, 0) if box is None else box[0], grid.shape if box is None else box_shape(box)
        classes = max(self.model.classes, 1)
        self._make_room(4 * classes * int(np.prod(size)) + beside, "probabilities of all voxels")
        self._cover(grid, box, [1])
        # Written through a view in the network's axis order: turning them round afterwards would need them twice.
        x, y, z = (size[i] for i in np.argsort(orientation.axes))
        out = np.empty((classes, x, y, z), dtype=np.float32)
        turned = orientation.apply(out)
        ask, done = self.asker(grid), 0
        with reporting(progress) as report:
            for piece, voxels in slabs(grid.shape, box, question_locations(classes)):
                found = probabilities(ask(voxels).float().cpu().numpy())
                part = np.moveaxis(found.reshape(*box_shape(piece), -1), -1, 0)
                turned[(slice(None), *(slice(a - o, b - o) for a, b, o in zip(*piece, low, strict=True)))] = (
                    part
                )
                done += len(voxels)
                if report:
                    report(done, out[0].size - done)
        affine = _stored_affine(grid.part(low, size), orientation, (x, y, z))
        return Volume(out, affine, self.volume.source, (like or self.volume).header)

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
            labels: What `segment` gave for the scan's own grid, if it was called already; also changed since, or
                stored in another voxel order.
            options: Further arguments of `extract_mesh`.

        Raises:
            SettingsError: No such structure, labels that do not lie on the scan, or the extra `mesh` is not installed.
            ResourceError: The grant does not hold the label map and the mesh.
        """
        label = self._label(structure)
        # Before the scan is segmented, which may take long.
        check_mesh_options(faces, smooth, **options)
        oriented = self._orientation.apply(self.segment().data if labels is None else self._as_stored(labels))
        if self._grant is not None:
            self._make_room(oriented.nbytes + mesh_bytes(oriented, label), "this mesh")
        return extract_mesh(
            self.asker(self.grid),
            self.grid.shape,
            self.grid.affine,
            labels=oriented,
            label=label,
            classes=max(self.model.classes, 2),
            faces=faces,
            smooth=smooth,
            **options,
        )

    def _as_stored(self, labels: LabelMap) -> Integer[np.ndarray, "X Y Z"]:
        """Labels that lie on the scan, in its voxel order whatever theirs is."""
        own = closest_canonical(self.volume.affine)
        turned = labels.reoriented(closest_canonical(labels.affine))
        if reason := same_place(self.volume.reoriented(own), turned):
            raise SettingsError("labels", f"they do not lie on the scan: {reason}", "Give those of this scan")
        return own.undo(turned.data)

    def _label(self, structure: str | int) -> int:
        names = self.model.label_names
        for value, name in names.items():
            if structure == value or (isinstance(structure, str) and structure.lower() == name.lower()):
                return value
        raise SettingsError(
            "structure",
            f"{structure!r} is none of this model's",
            f"Choose one of {', '.join(f'{k} ({v})' for k, v in names.items())}",
        )

    # Memory and regions -------------------------------------------------------------------------------------------

    def _make_room_for_labels(self, grid: Grid, region: Box | None, beside: int = 0) -> None:
        """For the scan's own label map the paper's variants left room when they were bound."""
        shape = grid.shape if region is None else box_shape(region)
        if isinstance(self._answer, Coverable) or np.prod(shape) > np.prod(self.grid.shape):
            self._make_room(self._asking_bytes(grid, region) + beside, f"a label map of {shape} voxels")

    def _make_room(self, size: int, what: str) -> None:
        """Leave so many bytes of the grant to what is about to be made, or refuse it."""
        require(self._grant, self._held + LIBRARIES + size, what)
        if isinstance(self._answer, Coverable):
            with self._told_of_shares(1 + len(self.model.others)):
                self._answer.set_aside(size)
        working = self._answer.chunk * self._answer.bytes_per_location
        require(self._grant, self._kept_bytes + working + size, what)

    @property
    def _kept_bytes(self) -> int:
        """Of the grant, what the scan, the network's maps and the libraries take."""
        return self._held + LIBRARIES + self._answer.fixed_bytes

    def _cover(self, grid: Grid, region: Box | None, path: Path = "auto") -> None:
        """Have the answer prepare what will be asked about, and count that as encoding."""
        if isinstance(self._answer, Coverable):
            started = time.perf_counter()
            self._answer.cover(None if region is None else self._needed(grid, region, path))
            self.encoder_seconds += time.perf_counter() - started

    def _needed(self, grid: Grid, region: Box, path: Path) -> Box:
        """Voxels of the network's grid whose prediction and answers decide what the octree finds in a region."""
        steps, kept = _first_sites(grid, region, path)
        low, high = np.array(kept.low) * steps, (np.array(kept.high) - 1) * steps
        to_fitted = self._fit.matrix() @ grid.to(self.grid)
        corners = np.array(list(product(*zip(low, np.maximum(high, np.array(region[1]) - 1), strict=True))))
        place = corners @ to_fitted[:3, :3].T + to_fitted[:3, 3]
        x0, y0, z0 = (int(v) for v in np.floor(place.min(axis=0)))
        x1, y1, z1 = (int(v) + 1 for v in np.ceil(place.max(axis=0)))
        return (x0, y0, z0), (x1, y1, z1)

    # Parts --------------------------------------------------------------------------------------------------------

    def asker(self, grid: Grid) -> Ask:
        """A function of voxel indices of a grid, for the octree and the mesh: logits, background outside the scan."""
        return asker(self._answer, grid, self.grid, self._fit.matrix())

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
            if np.ndim(spacing):
                spacing = _moved_triple("spacing", spacing, self._orientation)
            return Grid.with_spacing(self.grid, spacing), self._orientation
        if shape is not None:
            x, y, z = (int(n) for n in _moved_triple("shape", shape, self._orientation))
            return Grid.with_shape(self.grid, (x, y, z)), self._orientation
        return self.grid, self._orientation

    def _oriented_region(self, region: Box | None, grid: Grid, orientation: Orientation) -> Box | None:
        """A region of the stored output grid in the oriented one."""
        if region is None:
            return None
        x, y, z = (grid.shape[i] for i in np.argsort(orientation.axes))
        return moved_box(check_box(region, (x, y, z)), orientation.matrix((x, y, z)))

    def _resolve(self, strategy: Strategy, grid: Grid) -> str:
        if strategy != "auto":
            return strategy
        if getattr(self._answer, "dense", False):
            return "dense"
        stride = self._piece_stride(grid)
        if stride is None or (stride != (1, 1, 1) and affords_lattice(self._grant, grid.shape, stride)):
            return "octree"
        return "dense"

    def _piece_stride(self, grid: Grid) -> Triple | None:
        """Strides of a lattice that meets small pieces; None where the network's prediction shows all structures."""
        gap = self.model.piece_gap_mm
        return None if gap is None else strides_within(gap, spacing_of(grid.affine))

    def _fill(
        self, grid: Grid, region: Box | None, how: str, progress: Report | None, options: dict[str, Any]
    ) -> tuple[Integer[np.ndarray, "X Y Z"], int]:
        classes = max(self.model.classes, 2)
        options = {**THOROUGH, **options}
        ask = self.asker(grid)
        if how == "dense":
            return label_everywhere(ask, grid.shape, region, classes, progress)
        start, looked = options.pop("start", None), 0
        predicted = start is None
        local = region is not None and predicted and isinstance(self._answer, Coverable)
        if predicted:
            start, looked = self._start(grid, region if local else None, options, progress)
        if looked:
            options["doubt"] = None  # the lattice was asked: there is none
        batch = options.pop("batch", question_locations(classes))
        if start is None or not local:
            found = refine(
                ask,
                grid.shape,
                start=start,
                classes=classes,
                region=region,
                progress=progress,
                batch=batch,
                **options,
            )
            return found.labels, looked + found.evaluated
        tree = Octree(grid.shape, classes, start=start, region=region, **options)
        while (voxels := tree.query()) is not None:
            if tree.grown:
                # A larger box decides, and its prediction is not there yet.
                self._cover(grid, None)
                start, more = self._start(grid, None, options, progress)
                again = {**options, "batch": batch, "start": start}
                labels, evaluated = self._fill(grid, region, "octree", progress, again)
                return labels, looked + more + evaluated
            tree.update(*ask_all(ask, voxels, batch))
            if progress is not None:
                progress(tree.evaluated, tree.pending)
        return tree.labels(), looked + tree.evaluated

    def _start(
        self, grid: Grid, region: Box | None, options: dict[str, Any], progress: Report | None
    ) -> tuple[np.ndarray | None, int]:
        """What predicts the octree's first lattice, and the locations that were asked for it.

        Args:
            region: Only there, and as far around as the octree looks.
        """
        stride = self._piece_stride(grid)
        if stride is not None and options.get("path") == path_from(stride):
            sites = None if region is None else _first_sites(grid, region, options["path"])[1]
            ask, classes = self.asker(grid), max(self.model.classes, 2)
            return label_lattice(ask, grid.shape, stride, sites, classes, progress)
        if self._answer.coarse is not None and self._prediction_pays(grid):
            return self._prediction(), 0
        return None, 0

    def _prediction(self) -> np.ndarray:
        """The answer's coarse logits, or labels."""
        assert self._answer.coarse is not None
        coarse = self._answer.coarse.detach().cpu()
        return np.asarray(coarse.float().numpy() if coarse.is_floating_point() else coarse.numpy())

    def _prediction_pays(self, grid: Grid) -> bool:
        """A coarse array predicts the octree's first lattice where it covers the output grid and is fine enough."""
        coarse, fit = self._answer.coarse, self._fit
        # A scan with a border around it lies in a part of the coarse array.
        if coarse is None or not (fit.resizes or fit.source == self._fitted) or not grid.spans(self.grid):
            return False
        return bool((np.array(grid.shape) <= 16 * np.array(coarse.shape[-3:])).all())

    def _released(
        self, strategy: str, progress: Report | None, reevaluate: bool
    ) -> tuple[Integer[np.ndarray, "X Y Z"], int, tuple[int, ...]]:
        """The released algorithm on the network's grid, then back to the scan's: cut, or nearest voxel."""
        if self.model.classes > 1:
            raise SettingsError("strategy", f"{strategy!r} is for one structure", 'Use strategy="octree"')
        coarse = self._answer.coarse
        segmentation = None if coarse is None else coarse.float().cpu().numpy()
        stages = ReleasedStages(self._fitted, strategy, segmentation, reevaluate=reevaluate)  # type: ignore[arg-type]
        identity, batch = np.eye(4), question_locations(1)
        while (voxels := stages.query()) is not None:
            stages.update(*ask_all(lambda some: ask_at(self._answer, some, identity), voxels, batch))
            if progress:
                progress(stages.evaluated, stages.pending)
        grid = stages.labels()
        index = []
        for axis, (n, s) in enumerate(zip(self._fit.source, self._fitted, strict=True)):
            if self._fit.resizes:
                index.append(np.minimum(((np.arange(n) + 0.5) * s / n).astype(int), s - 1))
            else:
                index.append(np.arange(n) + self._fit.offset[axis])
        return grid[np.ix_(*index)], stages.evaluated, tuple(stages.evaluated_per_stage)


def _first_sites(grid: Grid, region: Box, path: Path) -> tuple[Triple, Window]:
    """The first stride, and the sites whose prediction decides what the octree finds in a region."""
    steps = check_path(path, grid.shape)
    kept = parts(steps, grid.shape, Window(*region), [0] * len(steps), predicted=True)[0].kept
    return steps[0], kept


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


def _device(name: str | torch.device) -> torch.device:
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError("device", f"{name!r} is no device", "Use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device", f"{name} is not there", "Use cpu, or install torch with CUDA")
    return device


def _exact(matrix: Affine) -> Affine:
    """A map of whole voxels without the rounding that computing it left."""
    near: np.ndarray = np.round(matrix)
    return near if bool(np.abs(matrix - near).max() < 1e-9) else matrix


def _moved_triple(name: str, values: Any, orientation: Orientation) -> Any:
    """Per-axis values of the stored grid in the oriented axes."""
    if np.shape(values) != (3,):
        raise SettingsError(name, f"{values!r} is not one value an axis", "Give three")
    return tuple(values[a] for a in orientation.axes)


def _stored_affine(grid: Grid, orientation: Orientation, stored_shape: Shape) -> Affine:
    return grid.affine @ np.linalg.inv(orientation.matrix(stored_shape))

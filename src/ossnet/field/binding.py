"""Models bound to one scan, and what they may take of the memory that was granted."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from threading import RLock
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ossnet.errors import ResourceError, SettingsError
from ossnet.field.asking import Ask, asker
from ossnet.field.engine.answer import Answer, Coverable
from ossnet.field.engine.prepare import Precision, hold_where_it_pays, precision_among, prepare
from ossnet.field.engine.scan import Scan
from ossnet.field.grid import Box, Grid, box_shape
from ossnet.field.memory import LIBRARIES, asking_bytes, require, require_free
from ossnet.field.model import Model
from ossnet.field.together import MeanAnswer
from ossnet.networks.machine import computes_in_bf16
from ossnet.volume import Affine, Shape, spacing_of


class Binding:
    """A model's answer for one scan, and the account of its memory.

    Args:
        model: With the others that answer together with it.
        grid: The scan's own, in the axis order that the network sees.
        scan_for: The scan as a model sees it; models of the same preparation share one.
        device: As for `Field`, and so are `precision` and `chunk`.
        grant: Bytes above the loaded scan and the model; None: no bound.

    Attributes:
        device: Where the work is done.
        answer: Asked on the first model's grid: its own answer, or the mean of all.
        answers: Of each model.
        fit: How the scan lies on the first model's grid.
        count: How many answer together, mirrored ones included.
        held: Bytes of the grant that images take.
        held_peak: And that they took while they were made.
        turn: Held while something is made that a grant has to hold: what is set aside is for one at a time.
        encoder_seconds: Wall-clock time of preparing and encoding so far.

    Raises:
        SettingsError: A device or a precision that is not there, or a chunk that is not a number of locations.
        ResourceError: The grant does not hold what segmenting the scan takes; with the default network, which encodes
            nothing before it is asked, `cover` says so.
    """

    def __init__(
        self,
        model: Model,
        grid: Grid,
        scan_for: Callable[[Model], Scan],
        *,
        device: str | torch.device = "auto",
        grant: int | None = None,
        precision: Precision = "auto",
        chunk: int | None = None,
    ) -> None:
        if precision not in get_args(Precision):
            raise SettingsError("precision", f"{precision!r} is unknown", "Use auto, fp32 or bf16")
        if chunk is not None and not (isinstance(chunk, Integral) and chunk >= 1):
            raise SettingsError("chunk", f"it is {chunk!r}", "Give a number of locations, at least 1")
        self.model, self.grid, self.device, self.grant = model, grid, chosen_device(device), grant
        self.held = self.held_peak = 0
        self.turn: AbstractContextManager[Any] = nullcontext() if grant is None else RLock()
        started = time.perf_counter()
        models = model.answering
        self.count = len(models)
        scans: list[Scan] = []
        for one in models:
            alike = [s for m, s in zip(models, scans, strict=False) if m.preparation == one.preparation]
            scans.append(alike[0] if alike else scan_for(one))
        self.fit = scans[0].fit
        beside = self.asking_bytes(grid) + LIBRARIES
        for one, scan in zip(models, scans, strict=True):
            left = None if grant is None else grant - self.held
            if size := hold_where_it_pays(one.network, scan, self.device, left, beside):
                self.held_peak = max(self.held_peak, self.held + scan.hold_bytes)
                self.held += size
        with self._told_of_shares():
            self.answers = [
                self._bound(one, scan, precision, chunk) for one, scan in zip(models, scans, strict=True)
            ]
        self.answer: Answer = self.answers[0]
        if len(models) > 1:
            back = np.linalg.inv(self.fit.matrix())
            to_grids = [_exact(scan.fit.matrix() @ back) for scan in scans]
            self.answer = MeanAnswer(
                self.answers, to_grids, model.counts, self._share(self.asking_bytes(grid))
            )
        self.encoder_seconds = time.perf_counter() - started

    def _share(self, size: int) -> int:
        """Of bytes that all need together, what one model leaves."""
        return -(-size // self.count)

    def _bound(self, model: Model, scan: Scan, precision: Precision, chunk: int | None) -> Answer:
        """One model's answer, in its share of the grant."""
        grant = None if self.grant is None else (self.grant - self.held) // self.count
        reserve, libraries = self._share(self.asking_bytes(self.grid)), self._share(LIBRARIES)
        return prepare(
            model.network,
            scan,
            device=self.device,
            precision=precision_among(model.network, precision, self.count),
            chunk=chunk,
            memory=grant,
            reserve=reserve,
            libraries=libraries,
            among=self.count,
            **model.engine_options(),
        )

    @contextmanager
    def _told_of_shares(self) -> Iterator[None]:
        """Of several models each refuses its share; who granted the whole is told so."""
        try:
            yield
        except ResourceError as error:
            if self.count == 1 or self.grant is None:
                raise
            asked = "models" if self.model.others else "answers, mirrored and not,"
            raise ResourceError(
                f"{self.count} {asked} share the memory that is granted. Of each share: {error}"
            ) from error

    def asker(self, grid: Grid) -> Ask:
        """A function of voxel indices of a grid: logits, background outside the scan."""
        return asker(self.answer, grid, self.grid, self.fit.matrix())

    def asking_bytes(self, grid: Grid, region: Box | None = None) -> int:
        """What a label map of a grid takes beside the answer, or of a region of it."""
        surface = surface_voxels(self.model, grid.shape, grid.affine)
        shape = grid.shape if region is None else box_shape(region)
        return asking_bytes(shape, max(self.model.classes, 2), surface)

    def make_room(self, size: int, what: str) -> None:
        """Leave so many bytes of the grant to what is about to be made.

        Raises:
            ResourceError: The grant, or the machine, does not hold it.
        """
        require_free(size, what)
        require(self.grant, self.held + LIBRARIES + size, what)
        if isinstance(self.answer, Coverable):
            with self._told_of_shares():
                self.answer.set_aside(size)
        working = self.answer.chunk * self.answer.bytes_per_location
        require(self.grant, self.kept_bytes + working + size, what)

    @property
    def kept_bytes(self) -> int:
        """Of the grant, what the scan, the network's maps and the libraries take."""
        return self.held + LIBRARIES + self.answer.fixed_bytes

    def cover(self, box: Box | None) -> None:
        """Have the answer prepare what will be asked about, and count that as encoding.

        Args:
            box: Voxels of the network's grid; None: all.
        """
        if isinstance(self.answer, Coverable):
            started = time.perf_counter()
            self.answer.cover(box)
            self.encoder_seconds += time.perf_counter() - started

    def prediction(self, box: Box | None) -> Tensor | None:
        """What predicts the octree's first lattice in a box (as for `cover`), if the network has it."""
        return self.answer.prediction(box) if isinstance(self.answer, Coverable) else self.answer.coarse


def chosen_device(name: str | torch.device) -> torch.device:
    """A device by its name; "auto" is CUDA where there is one.

    Raises:
        SettingsError: There is no such device, or none that is used.
    """
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise SettingsError("device", f"{name!r} is not a device", "Use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise SettingsError("device", f"{str(name)!r} is not one that is used", "Use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError("device", f"{name} is not there", "Use cpu, or install torch with CUDA")
    return device


def precision_of(model: Model, precision: Precision, device: str | torch.device) -> Literal["fp32", "bf16"]:
    """What a model is computed in; bf16 where one of several is.

    Raises:
        SettingsError: There is no such device.
    """
    models, place = (model, *model.others), chosen_device(device)
    kinds = (precision_among(one.network, precision, len(models)) for one in models)
    return "bf16" if any(computes_in_bf16(kind, place) for kind in kinds) else "fp32"


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


def _exact(matrix: Affine) -> Affine:
    """A map of whole voxels without the rounding that computing it left."""
    near: np.ndarray = np.round(matrix)
    return near if bool(np.abs(matrix - near).max() < 1e-9) else matrix

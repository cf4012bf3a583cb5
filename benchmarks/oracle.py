"""Networks do all their work, and a known object answers: costs at full size without training a network.

An ellipsoid cut into sectors around its long axis, one a class, or a structure as it was drawn. The answers of the
engine are computed and put aside; the octree gets logits that fall off with the distance to the nearest surface, as a
trained network's do.

Letters: N locations, K classes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from surfaces import surface_voxels
from torch import Tensor, nn
from torch.nn import functional as F

from ossnet.data.preparation import Preparation
from ossnet.field.engine.answer import Answer, Coverable
from ossnet.field.engine.prepare import PREPARERS, prepare_multiscale, prepare_ossnet
from ossnet.field.model import Model
from ossnet.files.reading import read_labels, read_volume
from ossnet.networks.multiscale import MultiscaleNetwork
from ossnet.networks.multiscale_plan import plan
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.variants import spec_for
from ossnet.volume import Shape, Volume

SHAPE = np.array([1.0, 0.9, 1.2])
"""Half axes of the ellipsoid, in units of its size."""


class Truth(Protocol):
    """A known object in a scan."""

    shape: Shape

    def logits(self, places: Tensor) -> Tensor:
        """(N,) for one class, (N, K) otherwise; one unit a voxel, at most 8."""

    def labels(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Labels of a box of voxels."""

    @property
    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Voxels around the object."""

    def surface(self) -> int:
        """Foreground voxels with a 6-neighbour of another label."""

    def scan(self) -> Volume:
        """A scan of the object."""


class Drawn:
    """What a label map shows, all labels as one structure, in its scan."""

    def __init__(self, scan: Path, labels: Path) -> None:
        self._scan = read_volume(scan)
        inside = read_labels(labels).data > 0
        x, y, z = inside.shape
        self.shape = (x, y, z)
        found = [np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {i}))) for i in range(3)]
        self._low = np.maximum([f[0] - 10 for f in found], 0)
        self._high = np.minimum([f[-1] + 11 for f in found], inside.shape)
        self._inside = inside[self._part(*self.box)]
        distance = distance_transform_edt(self._inside) - distance_transform_edt(~self._inside)
        self._logits = torch.from_numpy((distance - 0.5 * np.sign(distance)).clip(-8, 8).astype(np.float32))

    def logits(self, places: Tensor) -> Tensor:
        """(N,): the distance to the surface in voxels, between voxel centres by trilinear interpolation."""
        extent = torch.tensor(self._logits.shape)
        at = (places.float() - torch.from_numpy(self._low).float()) * 2 / (extent - 1) - 1
        grid = at.flip(1).view(1, 1, 1, -1, 3)
        return F.grid_sample(
            self._logits[None, None], grid, padding_mode="border", align_corners=True
        ).flatten()

    def labels(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Labels of a box of voxels within `box`."""
        return self._inside[self._part(low - self._low, high - self._low)].astype(np.uint8)

    @property
    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Voxels around the object."""
        return self._low, self._high

    def surface(self) -> int:
        """Foreground voxels with a 6-neighbour in the background."""
        return surface_voxels(self._inside.astype(np.uint8))[0]

    def scan(self) -> Volume:
        """The scan."""
        return self._scan

    @staticmethod
    def _part(low: np.ndarray, high: np.ndarray) -> tuple[slice, ...]:
        return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


class Sectors:
    """An ellipsoid in sectors.

    Args:
        shape: Voxels of the scan.
        classes: K, background included.
        surface: About this many foreground voxels shall have a neighbour of another label.
    """

    def __init__(self, shape: Shape, classes: int, surface: int) -> None:
        self.shape, self.classes = shape, classes
        self.middle = np.array(shape) / 2 + [0.3, -0.2, 0.1]
        low, high = 1.0, 0.5 * min(shape) / SHAPE.max() - 1
        for _ in range(12):
            self.size = (low + high) / 2
            low, high = (self.size, high) if self.surface() < surface else (low, self.size)

    def logits(self, places: Tensor) -> Tensor:
        """(N,) for one class, (N, K) otherwise; one unit a voxel, at most 8."""
        p = places.double() - torch.from_numpy(self.middle)
        radius = (p / torch.from_numpy(SHAPE * self.size)).square().sum(1).sqrt()
        outer = ((1 - radius) * self.size * SHAPE.mean()).clamp(-8, 8).float()
        if self.classes <= 2:
            return outer if self.classes == 1 else torch.stack([-outer, outer], 1)
        parts = self.classes - 1
        turn = (torch.atan2(p[:, 1], p[:, 0]) / (2 * np.pi) + 0.5) * parts
        sector = turn.floor().long() % parts
        aside = turn - turn.floor() - 0.5
        gap = p[:, :2].norm(dim=1) * torch.sin((0.5 - aside.abs()) * 2 * np.pi / parts)
        other = (sector + torch.where(aside > 0, 1, -1)) % parts
        out = torch.full((len(p), self.classes), -8.0)
        out[:, 0] = -outer
        own = outer[:, None]
        out.scatter_(1, other[:, None] + 1, own - gap.clamp(max=8).float()[:, None])
        return out.scatter_(1, sector[:, None] + 1, own)

    def labels(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Labels of a box of voxels."""
        axes = [torch.arange(int(a), int(b)) for a, b in zip(low, high, strict=True)]
        out = []
        for x in axes[0]:
            logits = self.logits(
                torch.stack(torch.meshgrid(x[None], *axes[1:], indexing="ij"), -1).reshape(-1, 3)
            )
            found = logits > 0 if logits.ndim == 1 else logits.argmax(1)
            out.append(found.reshape(len(axes[1]), len(axes[2])).numpy().astype(np.uint8))
        return np.stack(out)

    @property
    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Voxels around the object."""
        reach = SHAPE * self.size + 2
        low = np.maximum(np.floor(self.middle - reach), 0).astype(int)
        return low, np.minimum(np.ceil(self.middle + reach) + 1, self.shape).astype(int)

    def surface(self) -> int:
        """Foreground voxels with a 6-neighbour of another label."""
        return surface_voxels(self.labels(*self.box))[0]

    def scan(self) -> Volume:
        """A noisy int16 scan of the object, 1 mm voxels."""
        rng = np.random.default_rng(0)
        out = np.empty((1, *self.shape), dtype=np.int16)
        noise = rng.normal(0, 50, self.shape[1:]).astype(np.int16)
        for x in range(self.shape[0]):
            out[0, x] = np.roll(noise, (7 * x, 3 * x), axis=(0, 1))
        low, high = self.box
        inside = self.labels(low, high) > 0
        out[0][tuple(slice(a, b) for a, b in zip(low, high, strict=True))] += (200 * inside).astype(np.int16)
        return Volume(out, np.eye(4))


def truth_of(job: Mapping[str, Any]) -> Truth:
    """What a job of a benchmark names: the liver of a CT in a folder (`ct`), or sectors (`shape`, `surface`)."""
    if "ct" in job:
        folder = Path(job["ct"])
        return Drawn(folder / "volume-0.nii.gz", folder / "segmentation-0.nii.gz")
    x, y, z = job["shape"]
    return Sectors((x, y, z), 1, job["surface"])


def model_for(
    family: str,
    shape: tuple[int, int, int],
    classes: int,
    surface: int,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Model:
    """An untrained network of full size, for scans with such a spacing in mm."""
    torch.manual_seed(0)
    k = 1 if classes == 2 else classes
    names = {label: f"part {label}" for label in range(1, classes)}
    surfaces = {"surface_mm2": float(surface)}
    if family == "C":
        network: nn.Module = OSSNet(spec_for("C", 1, k, shape))
        return Model(network, Preparation(fit="pad", shape=shape), names, metadata=surfaces)
    network = MultiscaleNetwork(plan(spacing, shape, 1, k).spec)
    return Model(network, Preparation(orientation="file"), names, metadata=surfaces)


class Oracle:
    """An answer that does what the network's does, and then says what the object says.

    Args:
        work: Whether the network is asked at all.
    """

    def __init__(self, answer: Answer, truth: Truth, work: bool = True) -> None:
        self.answer, self.truth, self.work = answer, truth, work

    def __getattr__(self, name: str) -> Any:
        return getattr(self.answer, name)

    def __call__(self, locations: Tensor) -> Tensor:
        if self.work:
            self.answer(locations)
        return self.truth.logits(locations)

    @property
    def coarse(self) -> Tensor | None:
        """The object's prediction in the form of the network's."""
        known = self.answer.coarse
        if known is None:
            return None
        cells = known.shape[-3:]
        axes = [(torch.arange(c) + 0.5) * (n / c) - 0.5 for c, n in zip(cells, self.truth.shape, strict=True)]
        planes = []
        for x in axes[0]:
            logits = self.truth.logits(
                torch.stack(torch.meshgrid(x[None], *axes[1:], indexing="ij"), -1).reshape(-1, 3)
            )
            planes.append(logits if known.is_floating_point() else logits.argmax(1))
        out = torch.stack(planes).view(*cells, -1)
        if known.ndim == 4:
            return out.permute(3, 0, 1, 2).contiguous()
        return out[..., 0].to(known.dtype)


class CoverableOracle(Oracle):
    """As `Oracle`, for answers that are prepared for a part of their scan."""

    def cover(self, box: Any = None) -> None:
        """See `Coverable`."""
        self.answer.cover(box)  # type: ignore[attr-defined]

    def prediction(self, box: Any = None) -> Any:
        """See `Coverable`: what the object is known to be there, not what the network says."""
        self.cover(box)
        return self.coarse


@contextmanager
def installed(truth: Truth, work: bool = True) -> Iterator[None]:
    """Meanwhile every network is bound as an oracle for the object; see `Oracle`."""

    def prepared(make: Any) -> Any:
        def prepare(*arguments: Any, **options: Any) -> Oracle:
            answer = make(*arguments, **options)
            return (CoverableOracle if isinstance(answer, Coverable) else Oracle)(answer, truth, work)

        return prepare

    PREPARERS[OSSNet] = prepared(prepare_ossnet)
    PREPARERS[MultiscaleNetwork] = prepared(prepare_multiscale)
    try:
        yield
    finally:
        PREPARERS[OSSNet], PREPARERS[MultiscaleNetwork] = prepare_ossnet, prepare_multiscale

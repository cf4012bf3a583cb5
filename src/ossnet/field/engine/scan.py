"""A scan as its network sees it, read in boxes: what is asked about is converted, the rest stays as it was loaded.

Letters: C channels, X Y Z voxels of the oriented scan, S shape of the network's grid, N locations.
Boxes are (low, high) in voxels of the network's grid, ends excluded.
"""

from collections.abc import Iterator
from functools import partial
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from ossnet.data.preparation import Fit, Preparation, as_float, reduce_by_two
from ossnet.errors import VolumeError
from ossnet.field.engine.gather import PatchRows
from ossnet.field.engine.sources import WINDOW, windows
from ossnet.field.memory import free_bytes
from ossnet.volume import Shape, Volume

_LARGEST = np.float64(np.finfo(np.float32).max)


class Scan:
    """Boxes of a scan on the network's grid, float32, normalised and fitted.

    Args:
        data: (C, X, Y, Z) any real type, oriented; a view, kept as it is.
        fit: How it lies on the network's grid.
        preparation: With `statistics` how values are normalised; None: they are taken as they are.
    """

    def __init__(
        self, data: Num[np.ndarray, "C X Y Z"], fit: Fit, preparation: Preparation | None = None
    ) -> None:
        self.data, self.fit = data, fit
        self.origin = fit
        """What `hold` starts from; another one where voxels of the network's grid stand in for a scan (`forecast`)."""
        self.shape: tuple[int, int, int, int] = (len(data), *fit.target)
        self.held: Tensor | None = None
        """The whole image, where it is in memory: what `of` was given or `hold` made."""
        self._normalise = None
        if preparation is not None:
            statistics = preparation.statistics(_as_stored(data))
            self._normalise = partial(preparation.normalise_, statistics=statistics)

    @classmethod
    def of(cls, image: Float[Tensor, "C X Y Z"]) -> "Scan":
        """An image that is prepared and in memory already."""
        x, y, z = image.shape[1:]
        made = cls(np.empty((len(image), 0, 0, 0), dtype=np.float32), Fit.none((x, y, z)))
        made.held = image
        return made

    @classmethod
    def bound(cls, volume: Volume, preparation: Preparation, preprocessed: bool = False) -> "Scan":
        """A volume in the orientation and on the grid of a model; its voxels are not copied.

        Args:
            preprocessed: Take the values as they are: no normalisation.

        Raises:
            VolumeError: Voxels are NaN, infinite or too large for float32: `read` refuses these, arrays from elsewhere
                may hold some.
        """
        # Plane by plane: a mask of the whole scan is memory that nobody granted.
        planes = (plane for channel in _as_stored(volume.data) for plane in channel)
        if volume.data.dtype.kind == "f" and not all((abs(plane) <= _LARGEST).all() for plane in planes):
            raise VolumeError(
                volume.source or "scan",
                "voxels are NaN or infinite, or too large for float32",
                "Replace them, for example by numpy.nan_to_num",
            )
        oriented = volume.reoriented(preparation.orient(volume.affine))
        fit = preparation.fit_for(oriented.shape, oriented.spacing, str(volume.source or "scan"))
        return cls(oriented.data, fit, None if preprocessed else preparation)

    @property
    def image_bytes(self) -> int:
        """Memory of the whole image."""
        return 4 * prod(self.shape)

    @property
    def hold_bytes(self) -> int:
        """Memory that `hold` takes while it works: the scan as float32, beside it as it is stored, or fitted."""
        source = 4 * len(self.data) * prod(self.origin.source)
        return source + max(source, self.image_bytes if self.origin.source != self.origin.target else 0)

    def pays_to_hold(self, device: torch.device, grant: int | None, beside: int = 0) -> bool:
        """Whether the whole image is worth its memory, and leaves half of what there is.

        It is where it is resized, once instead of box by box, and on a GPU, which waits for every box otherwise.

        Args:
            grant: Bytes; None: no limit but what is free.
            beside: Bytes that others need at the same time.
        """
        if device.type == "cpu" and not self.origin.resizes:
            return False
        free = free_bytes(device)
        return 2 * (self.hold_bytes + beside) <= (free if grant is None else min(grant, free))

    def hold(self, device: torch.device | str = "cpu") -> Float[Tensor, "C SX SY SZ"]:
        """The whole image, in memory on a device from now on."""
        if self.held is None:
            image = as_float(self.data, device)
            if self._normalise is not None:
                image = self._normalise(image)
            self.held = self.fit.volume(image)
        self.held = self.held.to(device)
        return self.held

    def read(self, low: Shape, high: Shape) -> Float[Tensor, "C x y z"]:
        """A box within the grid."""
        if self.held is not None:
            return self.held[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        return self._resized(low, high) if self.fit.resizes else self._padded(low, high)

    def halved(self) -> Float[Tensor, "C HX HY HZ"]:
        """The image at half the resolution (`reduce_by_two`); every axis of S is even."""
        c, x, y, z = self.shape
        out = torch.empty(c, x // 2, y // 2, z // 2)
        step = max(WINDOW // (y * z) // 2, 1)
        for start in range(0, x // 2, step):
            stop = min(start + step, x // 2)
            out[:, start:stop] = reduce_by_two(self.read((2 * start, 0, 0), (2 * stop, y, z)))
        return out

    def _source(self, low: list[int], high: list[int]) -> Tensor:
        """A box of the oriented scan, normalised."""
        box = self.data[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        part = as_float(box)
        return part if self._normalise is None else self._normalise(part)

    def _padded(self, low: Shape, high: Shape) -> Tensor:
        """Voxels of the scan with zeros around them."""
        first, last, padding = [], [], []
        for a, b, offset, n in zip(low, high, self.fit.offset, self.fit.source, strict=True):
            start, stop = max(a - offset, 0), min(b - offset, n)
            if start >= stop:
                return torch.zeros(len(self.data), *(v - u for u, v in zip(low, high, strict=True)))
            first.append(start)
            last.append(stop)
            padding.append((start - (a - offset), b - offset - stop))
        part = self._source(first, last)
        around = [n for pair in reversed(padding) for n in pair]
        return F.pad(part, around) if any(around) else part

    def _resized(self, low: Shape, high: Shape) -> Tensor:
        """Interpolated a few planes at a time: a finer scan has many voxels for one of the grid."""
        sides = [b - a for a, b in zip(low, high, strict=True)]
        under = [max(1 / scale, 1.0) for scale in self.fit.scale]
        plane = len(self.data) * sides[1] * sides[2] * prod(under)
        step = max(int(WINDOW // plane), 1)
        out = torch.empty(len(self.data), *sides)
        for first in range(0, sides[0], step):
            last = min(first + step, sides[0])
            start, stop = (low[0] + first, *low[1:]), (low[0] + last, *high[1:])
            out[:, first:last] = self._interpolated(start, stop)
        return out

    def _interpolated(self, low: Shape, high: Shape) -> Tensor:
        """Trilinear as `Fit.volume`, without aligned corners."""
        below, above, rest, first, last = [], [], [], [], []
        for a, b, scale, n in zip(low, high, self.fit.scale, self.fit.source, strict=True):
            at = np.clip((np.arange(a, b) + 0.5) / scale - 0.5, 0, n - 1)
            under = np.floor(at).astype(np.int64)
            over = np.minimum(under + 1, n - 1)
            first.append(int(under[0]))
            last.append(int(over[-1]) + 1)
            below.append(torch.from_numpy(under - under[0]))
            above.append(torch.from_numpy(over - under[0]))
            rest.append(torch.from_numpy((at - under).astype(np.float32)))
        out = self._source(first, last)
        for axis in range(3):
            weight = rest[axis].view(-1, *[1] * (2 - axis))
            out = torch.lerp(
                out.index_select(axis + 1, below[axis]), out.index_select(axis + 1, above[axis]), weight
            )
        return out


class WindowRows(PatchRows):
    """`PatchRows` of a scan that is not in memory as a whole: boxes of it are read where locations are asked.

    Args:
        scan: On the CPU.
        kind, large_pool: See `PatchRows`.
    """

    _REACH = 7
    """Voxels that patches need to each side."""
    _SHARE = 8 * (2 * _REACH + 1) ** 3

    def __init__(self, scan: Scan, kind: str, large_pool: str = "avg") -> None:
        self.scan, self._options = scan, (kind, large_pool)
        x, y, z = scan.shape[1:]
        self._grid: Shape = (x, y, z)
        super().__init__(scan.read((0, 0, 0), (1, 1, 1)), kind, large_pool)  # type: ignore[arg-type]

    def rows(self, locations: Float[Tensor, "N 3"], out: Float[Tensor, "N K"]) -> None:
        """See `PatchRows.rows`."""
        for part, own, local in self._windows(locations):
            own.rows(local, out[part])

    def spectra(
        self, locations: Float[Tensor, "N 3"], transform: Float[Tensor, "14 7"], out: Float[Tensor, "14 N K"]
    ) -> None:
        """See `PatchRows.spectra`."""
        for part, own, local in self._windows(locations):
            own.spectra(local, transform, out[:, part])

    def _windows(self, locations: Tensor) -> Iterator[tuple[slice, PatchRows, Tensor]]:
        for part, low, high in windows(locations, self._grid, self._REACH, self._REACH, self._SHARE):
            # Exact: a float32 index less a smaller whole number keeps its fraction to the last bit.
            local = (locations[part] - locations.new_tensor(low)).contiguous()
            yield part, PatchRows(self.scan.read(low, high), *self._options), local  # type: ignore[arg-type]


def _as_stored(data: Num[np.ndarray, "C X Y Z"]) -> Num[np.ndarray, "C U V W"]:
    """The same voxels in the order they lie in memory: flattening them then needs no copy."""
    turned = data[(slice(None), *(slice(None, None, -1 if s < 0 else 1) for s in data.strides[1:]))]
    order = sorted(range(1, 4), key=lambda axis: -turned.strides[axis])
    return turned.transpose(0, *order)

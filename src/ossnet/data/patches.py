"""Patches: the full-resolution voxels around locations (SPEC §2 "Patches").

Letters: C channels, N locations. Voxels outside the volume count as zero.
A volume is never unfolded: patches are gathered by index from one padded, channels-last copy of it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

PATCH = 7
Kind = Literal["none", "small", "small+large"]
Pool = Literal["avg", "max"]


class _Rows:
    """Runs of voxels along the last axis of a padded, channels-last volume, gathered by their start.

    Args:
        image: (C, X, Y, Z).
        before, after: Zero padding. One voxel more after than patches on the grid need, for interpolation.
        step: Distance of neighbouring patch voxels.
    """

    def __init__(self, image: Float[Tensor, "C X Y Z"], before: int, after: int, step: int) -> None:
        self.before, self.step = before, step
        self.last = [n - 1 for n in image.shape[1:]]
        channels, x, y, z = image.shape
        # Written once, in its place: padding first and turning the axes then would hold the volume three times.
        self.padded = image.new_zeros(*(n + before + after + 1 for n in (x, y, z)), channels)
        inside = self.padded[before : before + x, before : before + y, before : before + z]
        inside.copy_(image.permute(1, 2, 3, 0))

    def gather(self, corner: Tensor, size: int, step: int) -> Tensor:
        """(N, size, size, size, C) from padded corner indices (N, 3) int64."""
        _, y, z, c = self.padded.shape
        flat = self.padded.view(-1)
        runs = flat.numel() // c - (size - 1) * step
        rows = flat.as_strided((runs, size, c), (c, step * c, 1))
        span = torch.arange(size, device=corner.device) * step
        first = (corner[:, 0] * y + corner[:, 1]) * z + corner[:, 2]
        offsets = (span[:, None] * (y * z) + span[None, :] * z).reshape(-1)
        starts = (first[:, None] + offsets[None, :]).reshape(-1)
        return rows.index_select(0, starts).view(len(corner), size, size, size, c)

    def __call__(self, locations: Tensor) -> Tensor:
        """(N, C, 7, 7, 7) patches around locations; between voxels by trilinear interpolation (SPEC §7.34)."""
        if locations.is_floating_point():
            low = torch.stack(
                [axis.clamp(0, last) for axis, last in zip(locations.unbind(1), self.last, strict=True)], 1
            )
            base = low.floor()
            fraction = low - base
            if bool((fraction != 0).any()):
                return self._between(base.long(), fraction)
            locations = base.long()
        return self.gather(locations.long(), PATCH, self.step).permute(0, 4, 1, 2, 3)

    def _between(self, base: Tensor, fraction: Tensor) -> Tensor:
        # All voxels of a patch share the fraction of its location, so interpolation is separable. With a step
        # of 1 neighbouring patch voxels share their support: 8³ voxels instead of 2³ × 7³.
        fraction = fraction.to(self.padded.dtype)
        if self.step == 1:
            wide = self.gather(base, PATCH + 1, 1)
            for axis in (1, 2, 3):
                weight = fraction[:, axis - 1].view(-1, 1, 1, 1, 1)
                wide = torch.lerp(wide.narrow(axis, 0, PATCH), wide.narrow(axis, 1, PATCH), weight)
            return wide.permute(0, 4, 1, 2, 3)
        total = torch.zeros((), device=base.device)
        for corner in range(8):
            bits = torch.tensor([(corner >> a) & 1 for a in range(3)], device=base.device)
            weight = torch.where(bits.bool(), fraction, 1 - fraction).prod(1)
            total = total + self.gather(base + bits, PATCH, self.step) * weight.view(-1, 1, 1, 1, 1)
        return total.permute(0, 4, 1, 2, 3)


class PatchSource:
    """Gathers the patches of one volume.

    Args:
        image: (C, X, Y, Z) float, the full-resolution volume as the network sees it.
        kind: Which patches; channels are all small ones, then all large ones.
        large_pool: How a 14³ patch becomes 7³: `avg` (paper) or `max` (released inference, SPEC §7.3).
    """

    def __init__(self, image: Float[Tensor, "C X Y Z"], kind: Kind, large_pool: Pool = "avg") -> None:
        self.kind = kind
        self._small = _Rows(image, 3, 3, 1) if kind != "none" else None
        self._large = None
        if kind == "small+large":
            # Pooling first and gathering every second voxel reads an eighth of gathering 14³ and pooling.
            padded = F.pad(image, [7, 6] * 3)[None]
            pooled = F.avg_pool3d(padded, 2, 1) if large_pool == "avg" else F.max_pool3d(padded, 2, 1)
            self._large = _Rows(pooled[0], 0, 0, 2)
            self._large.last = [n - 1 for n in image.shape[1:]]

    def __call__(self, locations: Tensor) -> Float[Tensor, "N C2 7 7 7"] | None:
        """Patches around locations (N, 3), integer or float voxel indices; None for networks without patches."""
        if self._small is None:
            return None
        small = self._small(locations)
        return small if self._large is None else torch.cat([small, self._large(locations)], dim=1)

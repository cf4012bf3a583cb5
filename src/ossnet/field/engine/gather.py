"""Patches as rows of a matrix, read from the volume as it lies: no padded copy, no unfolding.

Letters: C channels, N locations, P = C or 2C patch channels (all small ones, then all large ones).
Voxels outside of the volume count as zero. What each location gets does not depend on the others.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ossnet.data.patches import Kind, Pool
from ossnet.networks.native import library
from ossnet.networks.variants import PATCH_SIZE

VALUES = PATCH_SIZE**3
_PIECE = 256


class PatchRows:
    """Gathers the patches of one volume, flattened in the order (P, 7, 7, 7).

    The numbers of `ossnet.data.patches.PatchSource`, without its padded copies and written to where they are
    used.

    Args:
        image: (C, X, Y, Z) float32; kept, not copied.
        kind: Which patches, not "none".
        large_pool: How a 14³ patch becomes 7³.
    """

    def __init__(self, image: Float[Tensor, "C X Y Z"], kind: Kind, large_pool: Pool = "avg") -> None:
        self.image = image
        pools = [0, {"avg": 1, "max": 2}[large_pool]]
        self.pools = torch.tensor(pools[: 2 if kind == "small+large" else 1], dtype=torch.int32)
        self.channels = len(image) * len(self.pools)
        # What the compiled loops read: kept as tensors so that their memory stays where it is.
        self._shape = torch.tensor(image.shape)
        self._strides = torch.tensor(image.stride())

    @property
    def bytes_per_location(self) -> int:
        """Scratch memory of the tensor operations; on a CPU there is next to none."""
        edge = 15 if len(self.pools) > 1 else 8
        return 0 if self.image.device.type == "cpu" else edge**3 * (2 * 8 + 3 * 4 * len(self.image))

    def rows(self, locations: Float[Tensor, "N 3"], out: Float[Tensor, "N K"]) -> None:
        """Patches into the first P · 343 columns of `out`, float32 or bfloat16.

        Args:
            locations: float32 voxel indices inside the volume, contiguous.
        """
        loaded = library() if self._native() else None
        if loaded is None:
            for part in self._pieces(len(locations)):
                out[part, : self.channels * VALUES] = self._patches(locations[part]).flatten(1)
            return
        failed = loaded.ossnet_patches(
            *self._arguments(locations), out.data_ptr(), out.stride(0),
            int(out.dtype == torch.bfloat16), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("out of memory while gathering patches")

    def spectra(
        self, locations: Float[Tensor, "N 3"], transform: Float[Tensor, "14 7"], out: Float[Tensor, "14 N K"]
    ) -> None:
        """`transform` of each patch along its first axis; `out` is contiguous, K = P · 49."""
        loaded = library() if self._native() else None
        if loaded is None:
            for part in self._pieces(len(locations)):
                planes = self._patches(locations[part]).permute(2, 0, 1, 3, 4).reshape(PATCH_SIZE, -1)
                out[:, part] = torch.mm(transform, planes).view(len(out), -1, out.shape[2])
            return
        failed = loaded.ossnet_patch_spectra(
            *self._arguments(locations), transform.data_ptr(), out.data_ptr(), out.stride(0), out.stride(1),
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("out of memory while gathering patches")

    def _pieces(self, count: int) -> list[slice]:
        """On a CPU few locations at a time: what is passed from operation to operation stays in the cache."""
        size = _PIECE if self.image.device.type == "cpu" else max(count, 1)
        return [slice(start, start + size) for start in range(0, count, size)]

    def _native(self) -> bool:
        return self.image.device.type == "cpu" and library() is not None

    def _arguments(self, locations: Tensor) -> tuple[int, ...]:
        return (
            self.image.data_ptr(), self._shape.data_ptr(), self._strides.data_ptr(), locations.data_ptr(),
            len(locations), self.pools.data_ptr(), len(self.pools),
        )  # fmt: skip

    def _patches(self, locations: Tensor) -> Tensor:
        """(N, P, 7, 7, 7) by tensor operations."""
        low = locations.floor()
        fraction = locations - low
        # On a GPU a look at the fractions would wait for it; there both ways cost nearly the same.
        between = locations.device.type != "cpu" or bool(fraction.any())
        voxels = low.long()
        small = (
            _interpolated(self._cube(voxels - 3, 8), fraction, 1) if between else self._cube(voxels - 3, 7)
        )
        if len(self.pools) == 1:
            return small
        wide = self._cube(voxels - 7, 15 if between else 14)
        pool = F.avg_pool3d if self.pools[1] == 1 else F.max_pool3d
        large = _interpolated(pool(wide, 2, 1), fraction, 2) if between else pool(wide, 2)
        return torch.cat([small, large], 1)

    def _cube(self, corner: Tensor, edge: int) -> Tensor:
        """(N, C, edge, edge, edge) voxels from each corner (N, 3) int64."""
        c, *shape = self.image.shape
        if corner.device.type == "cpu":
            limit = corner.new_tensor(shape) - edge
            if bool(((corner >= 0) & (corner <= limit)).all()):
                return self._inner_cube(corner, edge)
        step = torch.arange(edge, device=corner.device)
        index = torch.zeros(len(corner), 1, dtype=torch.long, device=corner.device)
        inside: Tensor | None = None
        for axis, size in enumerate(shape):
            along = corner[:, axis, None] + step
            bounded = along.clamp(0, size - 1)
            index = (index[:, :, None] + (bounded * self.image.stride(axis + 1))[:, None, :]).flatten(1)
            here = bounded == along
            inside = here if inside is None else (inside[:, :, None] & here[:, None, :]).flatten(1)
        # One channel as it lies in memory, from its first voxel to its last.
        length = 1 + sum((n - 1) * s for n, s in zip(shape, self.image.stride()[1:], strict=True))
        flat = self.image.as_strided((c, length), (self.image.stride(0), 1))
        out = torch.stack([row.index_select(0, index.flatten()).view(index.shape) for row in flat], 1)
        if inside is not None and (out.device.type != "cpu" or not bool(inside.all())):
            out = out * inside[:, None]
        return out.view(len(corner), c, edge, edge, edge)

    def _inner_cube(self, corner: Tensor, edge: int) -> Tensor:
        """`_cube` where all voxels exist: whole runs along the last axis instead of single voxels."""
        c, x, y, z = self.image.stride()
        step = torch.arange(edge)
        channel = torch.arange(len(self.image)) * c
        offsets = (channel[:, None, None] + (step * x)[None, :, None] + (step * y)[None, None, :]).flatten()
        starts = (corner @ corner.new_tensor([x, y, z]))[:, None] + offsets
        last = sum((n - 1) * s for n, s in zip(self.image.shape, self.image.stride(), strict=True))
        runs = self.image.as_strided((last + 1 - (edge - 1) * z, edge), (1, z))
        return runs.index_select(0, starts.flatten()).view(len(corner), -1, edge, edge, edge)


def _interpolated(wide: Tensor, fraction: Tensor, step: int) -> Tensor:
    """(N, C, W, W, W) to (N, C, 7, 7, 7): position i lies between i · step and the next, along each axis."""
    for axis in range(3):
        low = wide.narrow(axis + 2, 0, (PATCH_SIZE - 1) * step + 1)
        high = wide.narrow(axis + 2, 1, (PATCH_SIZE - 1) * step + 1)
        if step > 1:
            keep = torch.arange(0, (PATCH_SIZE - 1) * step + 1, step, device=wide.device)
            low, high = low.index_select(axis + 2, keep), high.index_select(axis + 2, keep)
        wide = torch.lerp(low, high, fraction[:, axis].view(-1, 1, 1, 1, 1))
    return wide

"""A box of a feature map, kept as a table that locations are interpolated from."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ossnet.networks.boxes import Box, Triple, slices
from ossnet.networks.multiscale import corners


@dataclass(frozen=True)
class MapPart:
    """A box of a map as a table of cells, for trilinear samples."""

    table: Tensor
    """(cells, channels), rows in C order of the box."""
    whole: Triple
    """Cells of the whole map."""
    origin: Triple
    stored: Triple

    @classmethod
    def of(
        cls, values: Float[Tensor, "F X Y Z"], whole: Triple, origin: Triple, dtype: torch.dtype
    ) -> "MapPart":
        x, y, z = values.shape[1:]
        table = values.to(dtype).flatten(1).t().contiguous()
        return cls(table, whole, origin, (x, y, z))

    @property
    def channels(self) -> int:
        return self.table.shape[1]

    @property
    def bytes(self) -> int:
        return self.table.numel() * self.table.element_size()

    def sample(self, cells: Tensor) -> Tensor:
        """(N, channels) float32 at cell indices of the whole map."""
        index, weight = corners(cells, self.whole, self.origin, self.stored)
        out = F.embedding_bag(index, self.table, per_sample_weights=weight.to(self.table.dtype), mode="sum")
        return out.float()

    def cut(self, box: Box) -> Tensor:
        """(1, channels, *box) as a map again."""
        grid = self.table.view(*self.stored, -1)[slices(box, self.origin)]
        return grid.permute(3, 0, 1, 2)[None].contiguous()

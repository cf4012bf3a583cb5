"""Coarse maps of the default network over a box of a scan, tile by tile.

Letters as in `blockwise.answer`; boxes are (start, stop) per axis, half-open, in cells of a stage or in voxels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import ceil, prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ossnet.field.engine.blockwise.map_part import MapPart
from ossnet.field.engine.blockwise.receptive import ratio, reach_of, trunk_margin
from ossnet.networks.boxes import (
    Box,
    Triple,
    cut,
    divide,
    meet,
    multiply,
    pairs,
    size_of,
    slices,
    triple,
    within,
)
from ossnet.networks.multiscale import MultiscaleNetwork


@dataclass(frozen=True)
class CoarseEncoder:
    """The stages from the coarse one on (`MultiscaleNetwork.coarse_stage`), over a box.

    Attributes:
        network: In evaluation mode.
        read: Voxels (1, C, *box) of the scan.
        crop: The box, in voxels; multiples of the largest stride, or the end of the padded scan.
        padded: Voxels of the padded scan.
        work: Bytes of working memory of a tile, about.
        dtype: Of the maps: float32, or bfloat16 for convolutions in it as well.
        device: Where the network is.
    """

    network: MultiscaleNetwork
    read: Callable[[Box], Float[Tensor, "1 C X Y Z"]]
    crop: Box
    padded: Triple
    work: int
    dtype: torch.dtype
    device: torch.device

    def maps(self) -> list[MapPart]:
        """Maps of the coarse stages over the crop, from fine to coarse."""
        spec, first = self.network.spec, self.network.coarse_stage
        trunk: list[Tensor] = []
        for i in range(first, len(spec.stages)):
            x = self._entered(i, trunk[-1] if trunk else None)
            for block in self.network.stage(i).trunk:
                x = self._refined(i, block, x)
            trunk.append(x)
            del x
        maps: list[MapPart] = []
        above: Tensor | None = None
        for i in reversed(range(first, len(spec.stages))):
            above = self._mapped(i, trunk.pop(), above)
            whole = triple(n // s for n, s in zip(self.padded, spec.strides[i], strict=True))
            maps.append(MapPart.of(above[0], whole, self._span(i)[0], self.dtype))
        return maps[::-1]

    def _span(self, i: int) -> Box:
        """Cells of stage i that are computed."""
        return divide(self.crop, self.network.spec.strides[i])

    def _entered(self, i: int, before: Tensor | None) -> Tensor:
        """Start of the trunk of stage i: from the trunk above, for the first coarse stage from the scan."""
        spec, network = self.network.spec, self.network
        if before is not None:
            trunk, step, origin = before, spec.stages[i].stride, self._span(i - 1)[0]

            def from_trunk(box: Box) -> Tensor:
                return network.stage(i).enter(cut(trunk, multiply(box, step), origin))

            cost = 4 * spec.stages[i - 1].width * prod(step)
            return self._tiled(from_trunk, self._span(i), spec.stages[i].width, (0, 0, 0), cost)

        def from_scan(box: Box) -> Tensor:
            x = self.read(multiply(box, spec.strides[i]))
            for j in range(i):
                x = network.stage(j).descend(x)
            return network.stage(i).enter(x)

        margin = trunk_margin(spec, i, (0, 0, 0), trunk_of_last=False)
        halo = triple(ceil(m / s) for m, s in zip(margin, spec.strides[i], strict=True))
        widest = max(spec.stages[j].width * prod(ratio(spec, j, i)) for j in range(i + 1))
        # The scan is float32, whatever the maps are.
        scan = 4 // self.dtype.itemsize * spec.channels * prod(spec.strides[i])
        return self._tiled(from_scan, self._span(i), spec.stages[i].width, halo, 4 * widest + scan)

    def _refined(self, i: int, block: nn.Module, x: Tensor) -> Tensor:
        """A residual block of the trunk of stage i further.

        One by one: tiles of all blocks at once have halos that are computed two or three times over in large scans.
        """
        span, width = self._span(i), self.network.spec.stages[i].width

        def refine(box: Box) -> Tensor:
            out: Tensor = block(cut(x, box, span[0]))
            return out

        return self._tiled(refine, span, width, reach_of(self.network.spec, i, 1), 4 * width)

    def _mapped(self, i: int, x: Tensor, above: Tensor | None) -> Tensor:
        """Map of stage i."""
        spec, span = self.network.spec, self._span(i)
        stage = spec.stages[i]
        step = spec.stages[i + 1].stride if i + 1 < len(spec.stages) else (1, 1, 1)
        origin = divide(span, step)[0]

        def lateral(box: Box) -> Tensor:
            # Boxes are widened to whole cells of the coarser map, and the surplus is cut off again.
            cells = zip(pairs(box), step, strict=True)
            wide = within([(a // n * n, ceil(b / n) * n) for (a, b), n in cells], span)
            upper = None if above is None else cut(above, divide(wide, step), origin)
            out = self.network.stage(i).map(cut(x, wide, span[0]), upper, step)
            return out[(slice(None), slice(None), *slices(box, wide[0]))]

        return self._tiled(lateral, span, stage.features, reach_of(spec, i, stage.lateral), 4 * stage.width)

    def _tiled(
        self, function: Callable[[Box], Tensor], span: Box, channels: int, halo: Triple, cost: int
    ) -> Tensor:
        """(1, channels, *size of span), computed tile by tile.

        Args:
            function: Output cells of a box (start, stop), right where no cell within `halo` is cut off.
            span: The cells wanted; what a tile reads is cut off at its ends.
            cost: Values at work per output cell.
        """
        size = size_of(span)
        tile = list(size)
        itemsize = self.dtype.itemsize
        while (
            prod(min(n + 2 * h, s) for n, h, s in zip(tile, halo, size, strict=True)) * cost * itemsize
            > self.work
        ):
            axis = max(range(3), key=lambda a: tile[a])
            if tile[axis] <= 4:
                break
            tile[axis] = ceil(tile[axis] / 2)
        out = torch.empty(1, channels, *size, dtype=self.dtype, device=self.device)
        starts = (range(a, b, t) for (a, b), t in zip(pairs(span), tile, strict=True))
        for corner in product(*starts):
            box = meet(corner, triple(tile), span)
            wide = within([(a - h, b + h) for (a, b), h in zip(pairs(box), halo, strict=True)], span)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                result = function(wide)
            every = (slice(None), slice(None))
            out[(*every, *slices(box, span[0]))] = result[(*every, *slices(box, wide[0]))].to(self.dtype)
        return out

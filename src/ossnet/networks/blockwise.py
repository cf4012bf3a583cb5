"""The default network bound to one scan: coarse maps of all of it, fine maps in blocks where they are asked.

Every map is computed in tiles with halos wide enough for the exact result, cut at the scan's border where the
network itself pads. So tiles, blocks and what was asked before change nothing but rounding (about 1e-6 in
float32), and memory is bounded for a scan of any size.

Letters: C channels, S shape of the network's grid, N locations, K classes.
Boxes are (start, stop) per axis, half-open, in cells of a stage or in voxels.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from ossnet.errors import ResourceError, SettingsError
from ossnet.networks.multiscale import (
    MultiscaleNetwork,
    MultiscaleSpec,
    Triple,
    corners,
    gather_patches,
    offsets_in_cells,
    to_cells,
)

Box = tuple[Triple, Triple]

WORK_BYTES = 256 << 20
"""Working memory of a tile when nothing is granted: smaller tiles recompute more of their halos."""

ROWS = 64
"""A broken tile of rows can add up in another order: questions are filled up to multiples of this."""


def receptive_halo(spec: MultiscaleSpec) -> Triple:
    """Voxels around a location on which its answer depends, per axis, rounded up to the largest stride.

    Cut a scan to a region with this margin (at multiples of the largest stride), and every answer in the
    region stays what it is.
    """
    last = spec.strides[-1]
    need = _image_margins(spec, 0, len(spec.stages))
    return _triple(ceil(n / s) * s for n, s in zip(need, last, strict=True))


class BlockwiseEncoder:
    """A trained network and one scan, as a function of position. Safe from one thread at a time.

    Args:
        network: On `device`; put into evaluation mode.
        volume: (C, *S) float32, normalised and fitted. Kept, not copied.
        block: Voxels of a fine block per axis, rounded up to the coarse stride; None chooses by `budget`.
        device: Where the work is done; None: that of the volume.
        budget: Bytes granted above the volume and the weights; None: no limit on what is kept.
        precision: Of convolutions and products. "bf16" stores maps in bfloat16 as well.
        chunk: Locations decoded at once.

    Attributes:
        shape: S.
        classes: 1 for binary, otherwise K including background.
        coarse: float32 logits on a coarse grid over the same space as the scan: (x, y, z) for binary,
            (K, x, y, z) otherwise.

    Raises:
        SettingsError: The volume does not fit the network.
        ResourceError: The budget does not hold the coarse maps.
    """

    def __init__(
        self,
        network: MultiscaleNetwork,
        volume: Float[Tensor, "C X Y Z"],
        *,
        block: int | None = None,
        device: torch.device | str | None = None,
        budget: int | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        chunk: int = 8192,
    ) -> None:
        spec = network.spec
        if volume.shape[0] != spec.channels:
            raise SettingsError(
                "image",
                f"it has {volume.shape[0]} channels, the network was trained with {spec.channels}",
                "Give the channels it was trained with",
            )
        self.device = torch.device(device) if device is not None else volume.device
        self.network, self.volume = network.eval(), volume.to(self.device)
        self.spec, self.chunk, self.budget = spec, chunk, budget
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        x, y, z = volume.shape[1:]
        self.shape: Triple = (x, y, z)
        self.classes = spec.classes
        stride = spec.strides[-1]
        self.padded = _triple(ceil(n / s) * s for n, s in zip(self.shape, stride, strict=True))
        self.work = WORK_BYTES if budget is None else max(16 << 20, min(WORK_BYTES, budget // 4))
        self.blocks: OrderedDict[Triple, list[_Part]] = OrderedDict()
        self.computed = 0
        """Fine blocks computed so far."""
        self._check_budget()
        with torch.inference_mode():
            self._coarse = self._coarse_maps()
            self.coarse: Tensor | None = self._coarse_logits()
        self.block = self._block_shape(block)

    @property
    def bytes_per_location(self) -> int:
        """Working memory that grows with the chunk."""
        spec = self.spec
        features = sum(s.features for s in spec.stages) + spec.patch_features + 6
        return 4 * (2 * features + 8 * 3 * 2 + 4 * spec.decoder_width) + 16 * spec.channels * prod(spec.patch)

    @property
    def fixed_bytes(self) -> int:
        """Memory held without the scan: coarse maps, and the fine blocks that are kept."""
        kept = [m.bytes for m in self._coarse] + [m.bytes for maps in self.blocks.values() for m in maps]
        return sum(kept)

    @torch.inference_mode()
    def __call__(self, locations: Num[Tensor, "N 3"]) -> Float[Tensor, "N *K"]:
        """Logits (N,) for binary, (N, K) otherwise, float32 on the device.

        Args:
            locations: Voxel indices on the network's grid, any device; outside it they count as the nearest
                point of its border.
        """
        last = torch.tensor([n - 1 for n in self.shape], dtype=torch.float32, device=self.device)
        places = torch.minimum(locations.to(self.device, torch.float32).clamp(min=0), last)
        out = torch.empty(len(places), self.classes, dtype=torch.float32, device=self.device)
        if len(places):
            order, runs = self._by_block(places)
            for first in range(0, len(order), self.chunk):
                chosen = order[first : first + self.chunk]
                out[chosen] = self._decode(
                    places[chosen], self._runs_within(runs, first, first + len(chosen))
                )
        return out[:, 0] if self.classes == 1 else out

    def _by_block(self, places: Tensor) -> tuple[Tensor, list[tuple[Triple, int, int]]]:
        """An order with the locations of a block next to each other, and its runs (block, first, stop)."""
        edge = torch.tensor(self.block, device=self.device)
        index = (places + 0.5).floor().long() // edge
        counts = [ceil(n / b) for n, b in zip(self.padded, self.block, strict=True)]
        flat = (index[:, 0] * counts[1] + index[:, 1]) * counts[2] + index[:, 2]
        order = torch.argsort(flat, stable=True)
        keys, lengths = torch.unique_consecutive(flat[order], return_counts=True)
        runs, first = [], 0
        for key, length in zip(keys.tolist(), lengths.tolist(), strict=True):
            block = (key // (counts[1] * counts[2]), key // counts[2] % counts[1], key % counts[2])
            runs.append((block, first, first + length))
            first += length
        return order, runs

    @staticmethod
    def _runs_within(
        runs: Sequence[tuple[Triple, int, int]], first: int, stop: int
    ) -> Iterator[tuple[Triple, int, int]]:
        for block, a, b in runs:
            if a < stop and b > first:
                yield block, max(a, first) - first, min(b, stop) - first

    def _decode(self, places: Tensor, runs: Iterator[tuple[Triple, int, int]]) -> Tensor:
        missing = -len(places) % ROWS
        fine = len(self.spec.stages) - len(self._coarse)
        width = sum(s.features for s in self.spec.stages[:fine])
        sampled = torch.empty(len(places), width, dtype=torch.float32, device=self.device)
        for block, a, b in runs:
            start = 0
            for part, stride in zip(self._fine(block), self.spec.strides[:fine], strict=True):
                sampled[a:b, start : start + part.channels] = part.sample(to_cells(places[a:b], stride))
                start += part.channels
        parts = [sampled]
        parts += [
            part.sample(to_cells(places, stride))
            for part, stride in zip(self._coarse, self.spec.strides[fine:], strict=True)
        ]
        patches = gather_patches(self.volume[None], places[None], self.spec.patch)[0]
        rows = [torch.cat(parts, dim=-1), patches, offsets_in_cells(places, self.spec)]
        if missing:
            rows = [torch.cat([r, r[-1:].expand(missing, -1)]) for r in rows]
        with self._autocast():
            logits: Tensor = self.network.decoder(*rows)
        return logits[: len(places)].float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _fine(self, block: Triple) -> list["_Part"]:
        """Fine maps of a block and of the cells next to it, for interpolation; kept while memory allows."""
        if block in self.blocks:
            self.blocks.move_to_end(block)
            return self.blocks[block]
        maps = self._compute_block(block)
        self.computed += 1
        size = sum(m.bytes for m in maps)
        if self.budget is not None:
            while self.blocks and self.fixed_bytes + size + self.work > self.budget:
                self.blocks.popitem(last=False)
        self.blocks[block] = maps
        return maps

    def _compute_block(self, block: Triple) -> list["_Part"]:
        spec, first = self.spec, self.network.coarse_stage
        unit = spec.strides[first]
        box = _clip(tuple((i * b, (i + 1) * b) for i, b in zip(block, self.block, strict=True)), self.padded)
        halo = self._halo(first)
        wide = _clip([(a - h, b + h) for (a, b), h in zip(_pairs(box), halo, strict=True)], self.padded)
        with self._autocast():
            x = self._read(wide)
            trunk = []
            for i in range(first):
                x = self.network.stage(i).descend(x)
                trunk.append(x)
            above: Tensor = self._coarse[0].cut(_divide(wide, unit))
            maps: list[_Part] = []
            for i in reversed(range(first)):
                stage = self.network.stage(i)
                above = stage.map(trunk.pop(), above, spec.stages[i + 1].stride)
                stride = spec.strides[i]
                whole = _triple(n // s for n, s in zip(self.padded, stride, strict=True))
                cells = _divide(box, stride)
                keep = _clip([(a - 1, b + 1) for a, b in _pairs(cells)], whole)
                origin = _divide(wide, stride)[0]
                part = above[(0, slice(None), *_slices(keep, origin))]
                maps.append(_Part.of(part, whole, keep[0], self.dtype))
        return maps[::-1]

    def _halo(self, first: int) -> Triple:
        """Voxels around a block of fine stages: enough for every map, a multiple of the coarse stride."""
        need = _image_margins(self.spec, 0, first)
        return _triple(ceil(n / s) * s for n, s in zip(need, self.spec.strides[first], strict=True))

    def _block_shape(self, block: int | None) -> Triple:
        first = self.network.coarse_stage
        unit, halo = self.spec.strides[first], self._halo(first)
        if block is not None:
            return _triple(min(ceil(block / u) * u, n) for u, n in zip(unit, self.padded, strict=True))
        cells = [prod(s) for s in self.spec.strides]
        # Bytes a voxel of the widest stage: input, branch, its activation and the output at once.
        stages = zip(self.spec.stages[: first or 1], cells, strict=False)
        cost = 4 * self.spec.channels + max(4 * self.dtype.itemsize * s.width / c for s, c in stages)
        shape = list(self.padded)
        while prod(n + 2 * h for n, h in zip(shape, halo, strict=True)) * cost > self.work:
            axis = max(range(3), key=lambda a: shape[a] / unit[a])
            if shape[axis] <= unit[axis]:
                break
            shape[axis] = max(unit[axis], ceil(shape[axis] / 2 / unit[axis]) * unit[axis])
        return _triple(shape)

    def _coarse_maps(self) -> list["_Part"]:
        """Maps of the coarse stages over the whole scan, from fine to coarse."""
        spec, first = self.spec, self.network.coarse_stage
        shapes = [
            _triple(n // s for n, s in zip(self.padded, stride, strict=True)) for stride in spec.strides
        ]
        trunk: list[Tensor] = []
        for i in range(first, len(spec.stages)):
            x = self._entered(i, shapes[i], trunk[-1] if trunk else None)
            trunk.append(self._refined(i, shapes[i], x))
            del x
        maps: list[_Part] = []
        above: Tensor | None = None
        for i in reversed(range(first, len(spec.stages))):
            above = self._mapped(i, shapes[i], trunk.pop(), above)
            maps.append(_Part.of(above[0], shapes[i], (0, 0, 0), self.dtype))
        return maps[::-1]

    def _entered(self, i: int, shape: Triple, before: Tensor | None) -> Tensor:
        """Start of the trunk of stage i: from the trunk above, for the first coarse stage from the scan."""
        spec, network = self.spec, self.network
        if before is not None:
            trunk, step = before, spec.stages[i].stride

            def from_trunk(box: Box) -> Tensor:
                return network.stage(i).enter(_cut(trunk, _multiply(box, step)))

            cost = 4 * spec.stages[i - 1].width * prod(step)
            return self._tiled(from_trunk, shape, spec.stages[i].width, (0, 0, 0), cost)

        def from_scan(box: Box) -> Tensor:
            x = self._read(_multiply(box, spec.strides[i]))
            for j in range(i):
                x = network.stage(j).descend(x)
            return network.stage(i).enter(x)

        margin = _chain(spec, i, (0, 0, 0), trunk_of_last=False)
        halo = _triple(ceil(m / s) for m, s in zip(margin, spec.strides[i], strict=True))
        widest = max(spec.stages[j].width * prod(_ratio(spec, j, i)) for j in range(i + 1))
        return self._tiled(from_scan, shape, spec.stages[i].width, halo, 4 * widest)

    def _refined(self, i: int, shape: Triple, x: Tensor) -> Tensor:
        """End of the trunk of stage i."""
        stage = self.spec.stages[i]
        if not stage.trunk:
            return x

        def blocks(box: Box) -> Tensor:
            out: Tensor = self.network.stage(i).trunk(_cut(x, box))
            return out

        return self._tiled(blocks, shape, stage.width, _reach(self.spec, i, stage.trunk), 4 * stage.width)

    def _mapped(self, i: int, shape: Triple, x: Tensor, above: Tensor | None) -> Tensor:
        """Map of stage i."""
        spec = self.spec
        stage = spec.stages[i]
        step = spec.stages[i + 1].stride if i + 1 < len(spec.stages) else (1, 1, 1)

        def lateral(box: Box) -> Tensor:
            # Boxes are widened to whole cells of the coarser map, and the surplus is cut off again.
            cells = zip(_pairs(box), step, strict=True)
            wide = _clip([(a // n * n, ceil(b / n) * n) for (a, b), n in cells], shape)
            upper = None if above is None else _cut(above, _divide(wide, step))
            out = self.network.stage(i).map(_cut(x, wide), upper, step)
            return out[(slice(None), slice(None), *_slices(box, wide[0]))]

        return self._tiled(lateral, shape, stage.features, _reach(spec, i, stage.lateral), 4 * stage.width)

    def _tiled(
        self, function: Callable[[Box], Tensor], shape: Triple, channels: int, halo: Triple, cost: int
    ) -> Tensor:
        """(1, channels, *shape), computed tile by tile.

        Args:
            function: Output cells of a box (start, stop), right where no cell within `halo` is cut off.
            cost: Values at work per output cell.
        """
        tile = list(shape)
        itemsize = self.dtype.itemsize
        while (
            prod(min(n + 2 * h, s) for n, h, s in zip(tile, halo, shape, strict=True)) * cost * itemsize
            > self.work
        ):
            axis = max(range(3), key=lambda a: tile[a])
            if tile[axis] <= 4:
                break
            tile[axis] = ceil(tile[axis] / 2)
        out = torch.empty(1, channels, *shape, dtype=self.dtype, device=self.device)
        for corner in product(*(range(0, n, t) for n, t in zip(shape, tile, strict=True))):
            box = _clip([(c, c + t) for c, t in zip(corner, tile, strict=True)], shape)
            wide = _clip([(a - h, b + h) for (a, b), h in zip(_pairs(box), halo, strict=True)], shape)
            with self._autocast():
                result = function(wide)
            every = (slice(None), slice(None))
            out[(*every, *_slices(box, (0, 0, 0)))] = result[(*every, *_slices(box, wide[0]))].to(self.dtype)
        return out

    def _read(self, box: Box) -> Tensor:
        """(1, C, *box) voxels; beyond the scan's end its last voxels are repeated."""
        start, stop = box
        inner = [min(b, n) for b, n in zip(stop, self.shape, strict=True)]
        # A box can lie in the padding altogether.
        first = [min(a, n - 1) for a, n in zip(start, self.shape, strict=True)]
        part = self.volume[
            (slice(None), *(slice(a, max(b, a + 1)) for a, b in zip(first, inner, strict=True)))
        ]
        padding: list[int] = []
        for axis in reversed(range(3)):
            padding += [0, stop[axis] - start[axis] - part.shape[axis + 1]]
        return F.pad(part[None], padding, mode="replicate") if any(padding) else part[None]

    def _coarse_logits(self) -> Tensor:
        """Coarse logits on a grid that covers the scan itself, without the padding."""
        stage = self.network.coarse_stage
        stride = self.spec.strides[stage]
        table = self._coarse[0]
        grid = [ceil(n / s) for n, s in zip(self.shape, stride, strict=True)]
        axes = [
            (torch.arange(g, dtype=torch.float32, device=self.device) + 0.5) * (n / g) - 0.5
            for g, n in zip(grid, self.shape, strict=True)
        ]
        weight, bias = self.network.coarse.weight.flatten(1).float(), self.network.coarse.bias.float()
        planes = []
        for x in axes[0]:
            places = torch.stack(torch.meshgrid(x[None], axes[1], axes[2], indexing="ij"), -1).reshape(-1, 3)
            planes.append(F.linear(table.sample(to_cells(places, stride)), weight, bias))
        logits = torch.stack(planes).view(*grid, -1)
        return logits[..., 0].contiguous() if self.classes == 1 else logits.permute(3, 0, 1, 2).contiguous()

    def _check_budget(self) -> None:
        if self.budget is None:
            return
        first = self.network.coarse_stage
        stage = self.spec.stages[first]
        cells = prod(self.padded) / prod(self.spec.strides[first])
        needed = int(cells * 2 * stage.width * self.dtype.itemsize) + self.work
        if needed > self.budget:
            raise ResourceError(
                f"{self.budget / 1e6:.0f} MB of memory are granted, at least {needed / 1e6:.0f} MB are "
                "needed for the coarse features of this scan. Grant more, or segment a region."
            )


@dataclass(frozen=True)
class _Part:
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
    ) -> "_Part":
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
        grid = self.table.view(*self.stored, -1)[_slices(box, self.origin)]
        return grid.permute(3, 0, 1, 2)[None].contiguous()


def _reach(spec: MultiscaleSpec, stage: int, blocks: int) -> Triple:
    """Cells that residual blocks of a stage look to each side: two convolutions a block."""
    return _triple(2 * blocks * (k // 2) for k in spec.stages[stage].kernel)


def _chain(spec: MultiscaleSpec, stage: int, margin: Triple, trunk_of_last: bool = True) -> Triple:
    """Voxels of image around a box that make the trunk of `stage` right in `margin` voxels around it."""
    need = list(margin)
    for i in reversed(range(stage + 1)):
        if i < stage or trunk_of_last:
            reach = _reach(spec, i, spec.stages[i].trunk)
            need = [n + r * s for n, r, s in zip(need, reach, spec.strides[i], strict=True)]
    # The first convolution alone overlaps, by one voxel a side where its kernel is wider than its stride.
    return _triple(n + 1 for n in need)


def _image_margins(spec: MultiscaleSpec, first: int, stop: int) -> Triple:
    """Voxels of image around a box that the maps of stages `first` to `stop` need for samples in the box."""
    need, out = [0, 0, 0], (0, 0, 0)
    for i in range(first, stop):
        # One cell for interpolation, then the lateral blocks; finer maps read coarser ones that far out.
        need = [max(n, s) for n, s in zip(need, spec.strides[i], strict=True)]
        reach = _reach(spec, i, spec.stages[i].lateral)
        need = [n + r * s for n, r, s in zip(need, reach, spec.strides[i], strict=True)]
        # The repeated coarser cell can begin up to one cell further out.
        if i + 1 < len(spec.stages):
            need = [ceil(n / s) * s for n, s in zip(need, spec.strides[i + 1], strict=True)]
        out = _triple(max(a, b) for a, b in zip(out, _chain(spec, i, _triple(need)), strict=True))
    return out


def _ratio(spec: MultiscaleSpec, fine: int, coarse: int) -> Triple:
    """Cells of a finer stage per cell of a coarser one."""
    return _triple(c // f for f, c in zip(spec.strides[fine], spec.strides[coarse], strict=True))


def _triple(values: Iterator[int] | Sequence[int]) -> Triple:
    x, y, z = values
    return x, y, z


def _pairs(box: Box) -> Iterator[tuple[int, int]]:
    return zip(box[0], box[1], strict=True)


def _clip(pairs: Sequence[tuple[int, int]], shape: Triple) -> Box:
    return (
        _triple([max(a, 0) for a, _ in pairs]),
        _triple([min(b, n) for (_, b), n in zip(pairs, shape, strict=True)]),
    )


def _multiply(box: Box, stride: Triple) -> Box:
    return (
        _triple([a * s for a, s in zip(box[0], stride, strict=True)]),
        _triple([b * s for b, s in zip(box[1], stride, strict=True)]),
    )


def _divide(box: Box, stride: Triple) -> Box:
    """Cells that cover a box of voxels."""
    return (
        _triple([a // s for a, s in zip(box[0], stride, strict=True)]),
        _triple([ceil(b / s) for b, s in zip(box[1], stride, strict=True)]),
    )


def _slices(box: Box, origin: Triple) -> tuple[slice, slice, slice]:
    x, y, z = (slice(a - o, b - o) for (a, b), o in zip(_pairs(box), origin, strict=True))
    return x, y, z


def _cut(x: Tensor, box: Box) -> Tensor:
    return x[(slice(None), slice(None), *_slices(box, (0, 0, 0)))]

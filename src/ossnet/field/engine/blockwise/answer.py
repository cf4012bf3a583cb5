"""The default network bound to one scan: coarse maps of what is covered, fine maps in blocks where they are asked.

Every map is computed in tiles with halos wide enough for the exact result, cut at the scan's border where the
network itself pads. So tiles, blocks and what was asked before change nothing but rounding (about 1e-6 in
float32), and memory is bounded for a scan of any size. A box of the scan is covered when the coarse maps that its
answers depend on are there: nothing is at first, questions about a region encode that region with its halo only.

Letters: C channels, S shape of the network's grid, N locations, K classes.
Boxes are (start, stop) per axis, half-open, in cells of a stage or in voxels.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from math import ceil, prod
from threading import RLock
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from ossnet.errors import ResourceError, SettingsError, is_out_of_memory
from ossnet.field.engine.blockwise.coarse_maps import CoarseEncoder
from ossnet.field.engine.blockwise.map_part import MapPart
from ossnet.field.engine.blockwise.receptive import image_margin, map_margins, receptive_halo
from ossnet.field.engine.sources import Held, Source, windows
from ossnet.networks.boxes import (
    Box,
    Triple,
    clip,
    cut,
    divide,
    holds,
    join,
    meet,
    nearest,
    pairs,
    slices,
    triple,
    voxels_of,
    within,
)
from ossnet.networks.machine import exact_float32
from ossnet.networks.multiscale import (
    MultiscaleNetwork,
    gather_patches,
    offsets_in_cells,
    positions_in_scan,
    to_cells,
)

WORK_BYTES = 64 << 20
"""Working memory of a tile, at most: larger ones leave the caches and encode more where nothing is asked, smaller ones
compute more of their halos again."""

MANY_CLASSES = 8
"""With more, the coarse prediction is given as labels: logits of a hundred classes are larger than the scan."""

MARGIN = 32
"""Voxels around questions that are covered with them: the next ones lie there."""

_SHARE = 2048
"""Voxels of the scan that may be read for the patch of a location."""

ROWS = 64
"""A broken tile of rows can add up in another order: questions are filled up to multiples of this."""


_NOTHING: Box = ((0, 0, 0), (0, 0, 0))


class BlockwiseAnswer:
    """A trained network and one scan, as a function of position. Threads that ask at once take turns.

    Args:
        network: On `device`; put into evaluation mode.
        volume: (C, *S) float32, normalised and fitted, or a source of its boxes. Kept, not copied.
        block: Voxels of a fine block per axis, rounded up to the coarse stride; None chooses by `budget`.
        device: Where the work is done; None: that of the volume.
        budget: Bytes granted above the volume and the weights; None: no limit but `most_kept`.
        libraries: Of these, bytes that the libraries below take for themselves.
        precision: Of convolutions and products. "bf16" stores maps in bfloat16 as well.
        chunk: Locations decoded at once, at most.
        keep: Keep the maps of fine blocks for questions to come, as the budget allows; False: those of the last block.
        most_kept: About so many bytes of them without a budget: what the machine can spare; None: no limit.

    Attributes:
        shape: S.
        classes: 1 for binary, otherwise K including background.

    Raises:
        SettingsError: The volume does not fit the network.
        ResourceError: The budget holds no work at all; `cover` and `set_aside` say so of the maps of a box.
    """

    dense = False

    def __init__(
        self,
        network: MultiscaleNetwork,
        volume: Float[Tensor, "C X Y Z"] | Source,
        *,
        block: int | None = None,
        device: torch.device | str | None = None,
        budget: int | None = None,
        libraries: int = 0,
        precision: Literal["fp32", "bf16"] = "fp32",
        chunk: int = 8192,
        keep: bool = True,
        most_kept: int | None = None,
    ) -> None:
        spec = network.spec
        if volume.shape[0] != spec.channels:
            raise SettingsError(
                "image",
                f"it has {volume.shape[0]} channels, the network was trained with {spec.channels}",
                "Give the channels it was trained with",
            )
        home = volume.device if isinstance(volume, Tensor) else torch.device("cpu")
        self.device = torch.device(device) if device is not None else home
        self.network = network.eval()
        self._turn = RLock()
        """Whoever asks moves what is covered and which blocks are kept."""
        self.source: Source = Held(volume.to(self.device)) if isinstance(volume, Tensor) else volume
        self.spec, self.budget = spec, budget
        self.reserve, self.libraries = libraries, libraries
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        _, x, y, z = self.source.shape
        self.shape: Triple = (x, y, z)
        self.classes = spec.classes
        stride = spec.strides[-1]
        self.padded = triple(ceil(n / s) * s for n, s in zip(self.shape, stride, strict=True))
        self._wanted, self._keep, self._most_kept = (chunk, block), keep, most_kept
        self.blocks: OrderedDict[Triple, list[MapPart]] = OrderedDict()
        self.computed = 0
        """Fine blocks computed so far."""
        self.core: Box = _NOTHING
        """Voxels that are covered."""
        self.crop: Box = self.core
        """Voxels that coarse maps were computed from: the core with its halo."""
        self._coarse: list[MapPart] = []
        self._prediction: Tensor | None = None
        self._encoded = 0
        """Voxels that coarse maps were computed from so far, in all."""
        self.work, self.chunk, self.block = WORK_BYTES, chunk, self.padded
        self.set_aside(0)

    @property
    def bytes_per_location(self) -> int:
        """Working memory that grows with the chunk."""
        spec = self.spec
        features = sum(s.features for s in spec.stages) + spec.patch_features + spec.place_features
        wide = 2 * features + 8 * 3 * 2 + 4 * spec.decoder_width + 3 * spec.classes
        return 4 * wide + 16 * spec.channels * prod(spec.patch)

    @property
    def fixed_bytes(self) -> int:
        """Memory held without the scan: coarse maps, and the fine blocks that are kept."""
        with self._turn:
            fine = (m for maps in self.blocks.values() for m in maps)
            return sum(m.bytes for m in (*self._coarse, *fine))

    @property
    def room(self) -> int | None:
        """Bytes for maps, of what is granted; None without a limit."""
        if self.budget is None:
            return None
        return self.budget - self.reserve - self.work - self.chunk * self.bytes_per_location

    def set_aside(self, size: int) -> None:
        """See `Coverable`; what is done at once becomes smaller or larger with it, kept blocks give way."""
        with self._turn:
            self._set_aside(size)

    def _set_aside(self, size: int) -> None:
        before = self.reserve, self.work, self.chunk
        self.reserve = size + self.libraries
        chunk, block = self._wanted
        room = None if self.budget is None else self.budget - self.reserve
        self.work = WORK_BYTES if room is None else max(16 << 20, min(WORK_BYTES, room // 4))
        while room is not None and chunk > 4 * ROWS and 8 * chunk * self.bytes_per_location > room:
            chunk //= 2
        self.chunk = chunk
        if self._coarse and self.budget is not None and self._needed_bytes(self.crop) > self.budget:
            # What is covered gives way too: less of it may be wanted next.
            self._uncover()
        try:
            self._check_budget(self.crop)
        except ResourceError:
            self.reserve, self.work, self.chunk = before
            raise
        shape = self._block_shape(block)
        if shape != self.block:
            self.blocks.clear()
        self.block = shape
        self._make_room(0)

    def _uncover(self) -> None:
        self.blocks.clear()
        self._coarse, self._prediction = [], None
        self.core = self.crop = _NOTHING

    def _make_room(self, size: int) -> None:
        """Give up the blocks that were used least lately, until so many bytes fit."""
        if not self._keep:
            self.blocks.clear()
        while self.room is not None and self.blocks and self.fixed_bytes + size > self.room:
            self.blocks.popitem(last=False)
        if self.budget is None and self._most_kept is not None:
            # Blocks are much of a size: adding them all up for each would take longer than it is worth.
            while self.blocks and (len(self.blocks) + 1) * size > self._most_kept:
                self.blocks.popitem(last=False)

    @property
    def encoding_bytes(self) -> int:
        """What covering the whole scan takes while it lasts."""
        return self._encoding_bytes(((0, 0, 0), self.padded))

    def _encoding_bytes(self, crop: Box) -> int:
        first = self.network.coarse_stage
        cells = voxels_of(crop) / prod(self.spec.strides[first])
        return int(cells * 2 * self.spec.stages[first].width * self.dtype.itemsize) + self.work

    @property
    def coarse(self) -> Tensor | None:
        """A prediction on a coarse grid over the same space as the scan; background where nothing is covered.

        float32 logits (x, y, z) for binary and (K, x, y, z) for K classes; int16 labels (x, y, z) for more
        classes than `MANY_CLASSES`. None as long as nothing is covered.
        """
        with self._turn:
            if self._coarse and self._prediction is None:
                with torch.inference_mode():
                    self._prediction = self._coarse_prediction()
            return self._prediction

    def cover(self, box: Box | None = None) -> None:
        """Encode what answers and predictions in a box depend on: the box with the receptive field around it.

        Args:
            box: Voxels; what was covered before stays covered where it lies near and the budget holds both. None: the
                whole scan.

        Raises:
            ResourceError: The budget does not hold the maps.
        """
        with self._turn:
            self._cover(box)

    def prediction(self, box: Box | None = None) -> Tensor | None:
        """`coarse` with a box covered, whatever others cover meanwhile (arguments and errors as for `cover`)."""
        with self._turn:
            self._cover(box)
            return self.coarse

    def _cover(self, box: Box | None) -> None:
        if box is not None:
            # A prediction is interpolated from the coarse cells around it.
            cell = self.spec.strides[self.network.coarse_stage]
            box = nearest([(a - c, b + c) for (a, b), c in zip(pairs(box), cell, strict=True)], self.shape)
        else:
            box = ((0, 0, 0), self.shape)
        if self._coarse and holds(self.core, box):
            return
        box, crop = self._with_halo(box)
        if self._coarse:
            joined = self._with_halo(join(self.core, box))
            # What lies between is encoded too as soon as going to and fro would have cost as much.
            pays = voxels_of(joined[1]) <= self._encoded + voxels_of(crop)
            if pays and (self.budget is None or self._needed_bytes(joined[1]) <= self.budget):
                box, crop = joined
        self._check_budget(crop)
        self._uncover()
        self.core, self.crop = box, crop
        self._encoded += voxels_of(crop)
        with torch.inference_mode(), exact_float32(self.device):
            self._coarse = CoarseEncoder(
                self.network, self._read, crop, self.padded, self.work, self.dtype, self.device
            ).maps()

    def _with_halo(self, box: Box) -> tuple[Box, Box]:
        """What is covered for a box, and the voxels that its coarse maps are computed from."""
        halo, last = receptive_halo(self.spec), self.spec.strides[-1]
        around = zip(pairs(box), halo, last, strict=True)
        crop = clip([(a // s * s - h, ceil(b / s) * s + h) for (a, b), h, s in around], self.padded)
        # Nearly all of it: then all of it, and nothing is encoded twice.
        if 4 * voxels_of(crop) > 3 * prod(self.padded):
            return ((0, 0, 0), self.shape), ((0, 0, 0), self.padded)
        return box, crop

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
            with self._turn, exact_float32(self.device):
                self._answer(places, out)
        return out[:, 0] if self.classes == 1 else out

    def _answer(self, places: Tensor, out: Tensor) -> None:
        self._cover_places(places)
        order, runs = self._by_block(places)
        for first in range(0, len(order), self.chunk):
            chosen = order[first : first + self.chunk]
            out[chosen] = self._decode(places[chosen], self._runs_within(runs, first, first + len(chosen)))

    def _cover_places(self, places: Tensor) -> None:
        low = triple(places.amin(0).floor().long().tolist())
        high = triple((places.amax(0).floor().long() + 1).tolist())
        if not (self._coarse and holds(self.core, (low, high))):
            self.cover((triple(n - MARGIN for n in low), triple(n + MARGIN for n in high)))

    def _by_block(self, places: Tensor) -> tuple[Tensor, list[tuple[Triple, int, int]]]:
        """An order with the locations of a block next to each other, and its runs (block, first, stop).

        Blocks that are kept come first: those to be computed take their room.
        """
        edge = torch.tensor(self.block, device=self.device)
        index = (places + 0.5).floor().long() // edge
        counts = [ceil(n / b) for n, b in zip(self.padded, self.block, strict=True)]
        flat = (index[:, 0] * counts[1] + index[:, 1]) * counts[2] + index[:, 2]
        kept = [(x * counts[1] + y) * counts[2] + z for x, y, z in self.blocks]
        flat += prod(counts) * ~torch.isin(flat, torch.tensor(kept, dtype=flat.dtype, device=self.device))
        order = torch.argsort(flat, stable=True)
        keys, lengths = torch.unique_consecutive(flat[order], return_counts=True)
        runs, first = [], 0
        for key, length in zip((keys % prod(counts)).tolist(), lengths.tolist(), strict=True):
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
        where = [offsets_in_cells(places, self.spec)]
        if self.spec.position:
            where.append(positions_in_scan(places, places.new_tensor(self.shape)))
        rows = [torch.cat(parts, dim=-1), self._patches(places), torch.cat(where, dim=-1)]
        if missing:
            rows = [torch.cat([r, r[-1:].expand(missing, -1)]) for r in rows]
        with self._autocast():
            logits: Tensor = self.network.decoder(*rows)
        return logits[: len(places)].float()

    def _patches(self, places: Tensor) -> Tensor:
        """Raw voxels around each location; boxes are read where the scan is not in memory."""
        patch = self.spec.patch
        if self.source.held is not None:
            return gather_patches(self.source.held[None], places[None], patch)[0]
        out = torch.empty(len(places), self.spec.channels * prod(patch), device=self.device)
        reach = max(patch) // 2
        # The voxel nearest to a location is the one below it or the next.
        for part, low, high in windows(places, self.shape, reach, reach + 1, _SHARE):
            box = self.source.read(low, high).to(self.device)
            out[part] = gather_patches(box[None], (places[part] - places.new_tensor(low))[None], patch)[0]
        return out

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _fine(self, block: Triple) -> list[MapPart]:
        """Fine maps of a block and of the cells next to it, for interpolation; kept while memory allows."""
        if block in self.blocks:
            self.blocks.move_to_end(block)
            return self.blocks[block]
        try:
            maps = self._compute_block(block)
        except (MemoryError, RuntimeError) as error:
            if not (self.blocks and is_out_of_memory(error)):
                raise
            maps = None
        if maps is None:
            # Outside the handler, which holds the tensors of the attempt. Kept blocks are a convenience.
            self.blocks.clear()
            maps = self._compute_block(block)
        self.computed += 1
        size = sum(m.bytes for m in maps)
        self._make_room(size)
        self.blocks[block] = maps
        return maps

    def _compute_block(self, block: Triple) -> list[MapPart]:
        spec, first = self.spec, self.network.coarse_stage
        # What lies beyond the core is wrong, and never asked.
        box = meet(triple(i * b for i, b in zip(block, self.block, strict=True)), self.block, self.crop)
        wide = self._around(box, self._halo(first))
        # Each map is worked on no further out than the finer one, or the samples, reach.
        parts = [self._around(box, margin) for margin in map_margins(spec, 0, first)]
        with self._autocast():
            x = self._read(wide)
            trunk = []
            for i in range(first):
                x = self.network.stage(i).descend(x)
                trunk.append(x)
            above: Tensor | None = None
            maps: list[MapPart] = []
            for i in reversed(range(first)):
                stride, coarser = spec.strides[i], spec.strides[i + 1]
                span = divide(parts[i], coarser)
                if above is None:
                    above = self._coarse[0].cut(span)
                else:
                    above = cut(above, span, divide(parts[i + 1], coarser)[0])
                x = cut(trunk.pop(), divide(parts[i], stride), divide(wide, stride)[0])
                above = self.network.stage(i).map(x, above, spec.stages[i + 1].stride)
                whole = triple(n // s for n, s in zip(self.padded, stride, strict=True))
                cells = divide(box, stride)
                keep = within([(a - 1, b + 1) for a, b in pairs(cells)], divide(self.crop, stride))
                part = above[(0, slice(None), *slices(keep, divide(parts[i], stride)[0]))]
                maps.append(MapPart.of(part, whole, keep[0], self.dtype))
        return maps[::-1]

    def _around(self, box: Box, margin: Triple) -> Box:
        """A box of voxels with a margin, as far as coarse maps were computed."""
        return within([(a - m, b + m) for (a, b), m in zip(pairs(box), margin, strict=True)], self.crop)

    def _halo(self, first: int) -> Triple:
        """Voxels of the scan around a block that its maps depend on: whole cells of all fine stages."""
        need, cell = image_margin(self.spec, 0, first), self.spec.strides[max(first - 1, 0)]
        return triple(ceil(n / s) * s for n, s in zip(need, cell, strict=True))

    def _block_shape(self, block: int | None) -> Triple:
        first = self.network.coarse_stage
        unit, halo = self.spec.strides[first], self._halo(first)
        if block is not None:
            return triple(min(ceil(block / u) * u, n) for u, n in zip(unit, self.padded, strict=True))
        # Bytes a voxel: of the scan and the trunk of every stage; of a map the input, the branch, its activation and
        # the output at once.
        each = [
            self.dtype.itemsize * stage.width / prod(stride)
            for stage, stride in zip(self.spec.stages[: first or 1], self.spec.strides, strict=False)
        ]
        held, margins = 4 * self.spec.channels + sum(each), map_margins(self.spec, 0, first or 1)
        shape = list(self.padded)

        def needed() -> float:
            maps = [4 * size * voxels(margin) for size, margin in zip(each, margins, strict=True)]
            return held * voxels(halo) + max(maps)

        def voxels(margin: Triple) -> int:
            return prod(n + 2 * m for n, m in zip(shape, margin, strict=True))

        while needed() > self.work:
            axis = max(range(3), key=lambda a: shape[a] / unit[a])
            if shape[axis] <= unit[axis]:
                break
            shape[axis] = max(unit[axis], ceil(shape[axis] / 2 / unit[axis]) * unit[axis])
        return triple(shape)

    def _read(self, box: Box) -> Tensor:
        """(1, C, *box) voxels; beyond the scan's end its last voxels are repeated."""
        start, stop = box
        inner = [min(b, n) for b, n in zip(stop, self.shape, strict=True)]
        # A box can lie in the padding altogether.
        first = [min(a, n - 1) for a, n in zip(start, self.shape, strict=True)]
        part = self.source.read(
            triple(first), triple(max(b, a + 1) for a, b in zip(first, inner, strict=True))
        )
        part = part.to(self.device)
        padding: list[int] = []
        for axis in reversed(range(3)):
            padding += [0, stop[axis] - start[axis] - part.shape[axis + 1]]
        return F.pad(part[None], padding, mode="replicate") if any(padding) else part[None]

    def _coarse_prediction(self) -> Tensor:
        """`coarse`: on a grid that covers the scan itself, without the padding."""
        stage = self.network.coarse_stage
        stride = self.spec.strides[stage]
        table = self._coarse[0]
        axes, covered = [], []
        for n, s, low, high in zip(self.shape, stride, *self.core, strict=True):
            cells = ceil(n / s)
            at = (torch.arange(cells, dtype=torch.float32, device=self.device) + 0.5) * (n / cells) - 0.5
            inside = ((at >= low) & (at <= high - 1)).nonzero()[:, 0]
            first = int(inside[0]) if len(inside) else 0
            axes.append(at)
            covered.append(slice(first, first + len(inside)))
        weight, bias = self.network.coarse.weight.flatten(1).float(), self.network.coarse.bias.float()
        grid = [len(at) for at in axes]
        many = self.classes > MANY_CLASSES
        kind = torch.int16 if many else torch.float32
        out = torch.full((1 if many else self.classes, *grid), 0 if many else -1.0, dtype=kind)
        if self.classes > 1 and not many:
            out[0] = 1.0
        x, y, z = (at[part] for at, part in zip(axes, covered, strict=True))
        for i in range(len(x)):
            places = torch.stack(torch.meshgrid(x[i : i + 1], y, z, indexing="ij"), -1).reshape(-1, 3)
            found = F.linear(table.sample(to_cells(places, stride)), weight, bias)
            values = found.argmax(1, keepdim=True) if many else found
            part = (slice(None), covered[0].start + i, covered[1], covered[2])
            out[part] = values.T.reshape(len(out), len(y), len(z)).to(kind)
        return (out[0] if many or self.classes == 1 else out).to(self.device)

    def _check_budget(self, crop: Box) -> None:
        """Refuse what the budget does not hold: coarse maps of a box, and room to work."""
        if self.budget is None:
            return
        if (needed := self._needed_bytes(crop)) > self.budget:
            raise ResourceError(
                f"{self.budget / 1e6:.3g} MB of memory are granted, at least {ceil(needed / 1e6)} MB are "
                "needed for this scan. Grant more."
            )

    def _needed_bytes(self, crop: Box) -> int:
        """Of the budget, what coarse maps of a box and room to work take."""
        first = self.network.coarse_stage
        stages = self.spec.stages[first:]
        cells = [voxels_of(crop) / prod(s) for s in self.spec.strides[first:]]
        held = sum(n * s.features for n, s in zip(cells, stages, strict=True)) * self.dtype.itemsize
        asked = held + self.reserve + self.work + self.chunk * self.bytes_per_location
        return int(max(self._encoding_bytes(crop) + self.libraries, asked))

"""The default network: multi-scale features sampled at a location, and a small decoder.

    scan ──► stage 0 ──► stage 1 ──► stage 2 ──► stage 3          trunk, coarser from stage to stage
               │            │            │            │
             map 0 ◄──── map 1 ◄──── map 2 ◄──── map 3            lateral blocks, optionally fed from above
               └────────────┴──────┬─────┴────────────┘
    location ──► trilinear samples of the maps + raw patch + offset in mm ──► residual MLP ──► logits

The trunk up to a coarse stage is strided convolutions and little else, so a coarse map of a whole scan is
cheap; the lateral blocks of the fine stages are needed only where a location is asked (`field.engine.blockwise`).
No layer uses statistics of its input: what is answered at a location depends on the scan within the receptive
field alone, and never on the crop or block it was computed in.

Letters: B crops, C channels, X Y Z voxels, N locations, K logits a location.
Locations are voxel indices on the network's grid, voxel centres at integers. A cell of a stage with
accumulated stride S covers S voxels; its centre lies at voxel `S * (cell + 0.5) - 0.5`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod, sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ossnet.errors import SettingsError
from ossnet.networks.boxes import Triple, triple
from ossnet.networks.convolution import convolve

Spacing = tuple[float, float, float]


RELU_GAIN = sqrt(2)
"""Restores the second moment that a ReLU halves."""


@dataclass(frozen=True)
class Stage:
    """One resolution of the network."""

    stride: Triple
    """Cells of the stage above (voxels for the first) that one cell covers, per axis."""
    kernel: Triple
    """Extent of the stage's convolutions in cells, per axis: 1 or 3."""
    width: int
    """Channels of the trunk."""
    trunk: int
    """Residual blocks on the way to the next stage: every coarser stage and every answer depends on them."""
    lateral: int
    """Residual blocks on the way to the stage's map only: computed where locations are asked."""
    features: int
    """Channels of the map that is sampled at a location."""


@dataclass(frozen=True)
class MultiscaleSpec:
    """Everything that fixes the network's weights and what they mean."""

    channels: int
    """Channels of a scan."""
    classes: int
    """Logits a location: 1 for one structure (sigmoid), K >= 2 for K - 1 structures and background
    (softmax)."""
    spacing: Spacing
    """Spacing in mm of the grid that the network works on."""
    stages: tuple[Stage, ...]
    """From fine to coarse."""
    patch: Triple = (5, 5, 5)
    """Voxels of the raw patch around the nearest voxel of a location."""
    patch_features: int = 32
    """Features of the raw patch."""
    decoder_width: int = 128
    decoder_blocks: int = 3
    top_down: bool = True
    """Coarser maps feed finer ones."""
    position: bool = False
    """The decoder is told where in the scan a location lies (`positions_in_scan`)."""

    def __post_init__(self) -> None:
        if self.channels < 1 or self.classes < 1 or not self.stages:
            raise SettingsError(
                "multiscale", "channels, classes and stages must be at least one", "Raise them"
            )
        if len(self.spacing) != 3 or not all(s > 0 for s in self.spacing):
            raise SettingsError(
                "multiscale.spacing", f"{self.spacing} mm must be above 0", "Give mm per voxel"
            )
        if any(p < 1 or p % 2 == 0 for p in self.patch):
            raise SettingsError("multiscale.patch", f"{self.patch} must be odd", "Use 1, 3, 5 or 7 per axis")
        for stage in self.stages:
            if any(s not in (1, 2) for s in stage.stride) or any(k not in (1, 3) for k in stage.kernel):
                raise SettingsError(
                    "multiscale.stages", "strides are 1 or 2, kernels 1 or 3", "Change the stage"
                )

    @property
    def strides(self) -> tuple[Triple, ...]:
        """Voxels per cell of each stage."""
        out, total = [], (1, 1, 1)
        for stage in self.stages:
            total = _product(total, stage.stride)
            out.append(total)
        return tuple(out)

    @property
    def place_features(self) -> int:
        """Features of a location that depend on where it lies alone: offsets, and the position if asked for."""
        return 9 if self.position else 6

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MultiscaleSpec":
        """The inverse of `to_dict`; lists stand for tuples."""
        known = dict(values)
        stages = tuple(
            Stage(**{**stage, "stride": triple(stage["stride"]), "kernel": triple(stage["kernel"])})
            for stage in known.pop("stages")
        )
        x, y, z = (float(s) for s in known.pop("spacing"))
        patch = triple(known.pop("patch"))
        return cls(stages=stages, spacing=(x, y, z), patch=patch, **known)


def _product(one: Triple, other: Triple) -> Triple:
    return one[0] * other[0], one[1] * other[1], one[2] * other[2]


class Convolution(nn.Conv3d):
    """A convolution with a learned gain per output channel, in place of a normalisation.

    Its weight holds directions: rows start with unit length, which keeps the variance of white input, and
    Muon turns them at constant norm; the gain carries the scale. An `nn.Conv3d`, so that optimisers find it.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: Triple, stride: Triple, padding: Triple, gain: float
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding)
        self.steps, self.margins = stride, padding
        nn.init.normal_(self.weight, std=1 / sqrt(inputs * prod(kernel)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.gain = nn.Parameter(torch.full((outputs,), gain))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.gain.view(-1, 1, 1, 1, 1)
        return convolve(x, weight, self.bias, self.steps, self.margins)


class Pointwise(nn.Module):
    """A linear map of the channels of each cell.

    Not an `nn.Conv3d`: no normalisation or gain follows, so its weight must not be stepped on as
    "directions".
    """

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class Residual(nn.Module):
    """`relu(x + conv(relu(conv(x))))`; the last gain starts small: a stack starts near the identity."""

    def __init__(self, width: int, kernel: Triple) -> None:
        super().__init__()
        padding = triple([k // 2 for k in kernel])
        self.one = Convolution(width, width, kernel, (1, 1, 1), padding, RELU_GAIN)
        self.two = Convolution(width, width, kernel, (1, 1, 1), padding, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(F.relu(self.one(x))))


class StageModule(nn.Module):
    """Trunk and lateral part of one stage."""

    def __init__(self, spec: MultiscaleSpec, index: int) -> None:
        super().__init__()
        stage = spec.stages[index]
        first = index == 0
        inputs = spec.channels if first else spec.stages[index - 1].width
        # The first strided convolution overlaps (4 voxels, stride 2): at the finest level a box of 2 voxels
        # would be blind to where in the cell an edge lies. Even extents keep cells centred on the voxels
        # they cover.
        extent = [
            (4 if first else 2) if s == 2 else (k if first else 1)
            for s, k in zip(stage.stride, stage.kernel, strict=True)
        ]
        padding = triple([(e - s) // 2 for e, s in zip(extent, stage.stride, strict=True)])
        self.down = Convolution(inputs, stage.width, triple(extent), stage.stride, padding, RELU_GAIN)
        self.trunk = nn.Sequential(*(Residual(stage.width, stage.kernel) for _ in range(stage.trunk)))
        self.above: Pointwise | None = None
        if spec.top_down and index + 1 < len(spec.stages):
            coarser = spec.stages[index + 1].features
            self.above = Pointwise(coarser, stage.width, 0.5 / sqrt(coarser))
        self.lateral = nn.Sequential(*(Residual(stage.width, stage.kernel) for _ in range(stage.lateral)))
        self.features: nn.Module = nn.Identity()
        if stage.features != stage.width:
            self.features = Pointwise(stage.width, stage.features, 1 / sqrt(stage.width))

    def enter(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B D *T"]:
        """From the stage above (or the scan) to the start of this stage's trunk."""
        return F.relu(self.down(x))

    def descend(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B D *T"]:
        """From the stage above (or the scan) to this stage's trunk."""
        out: Tensor = self.trunk(self.enter(x))
        return out

    def map(
        self, x: Float[Tensor, "B D *T"], above: Float[Tensor, "B E *U"] | None, stride: Triple
    ) -> Tensor:
        """From the trunk, and the map of the next coarser stage, to this stage's map.

        Args:
            stride: Cells of this stage per cell of the coarser one.
        """
        if self.above is not None and above is not None:
            x = F.relu(x + repeat(self.above(above), stride))
        out: Tensor = self.features(self.lateral(x))
        return out


def repeat(x: Float[Tensor, "B C X Y Z"], stride: Triple) -> Tensor:
    """Nearest-neighbour upsampling by whole factors (needs no neighbours, so blocks need no halo for it)."""
    if stride == (1, 1, 1):
        return x
    return F.interpolate(x, scale_factor=[float(s) for s in stride], mode="nearest")


def _decoder_block(width: int) -> nn.Sequential:
    last = nn.Linear(width, width)
    # The block starts as the identity.
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)


class LocationDecoder(nn.Module):
    """Residual MLP from sampled features, raw patch and offsets to logits."""

    def __init__(self, spec: MultiscaleSpec) -> None:
        super().__init__()
        width = spec.decoder_width
        sampled = sum(stage.features for stage in spec.stages)
        self.patch = (
            nn.Linear(spec.channels * prod(spec.patch), spec.patch_features) if spec.patch_features else None
        )
        self.first = nn.Linear(sampled + spec.patch_features + spec.place_features, width)
        self.blocks = nn.ModuleList(_decoder_block(width) for _ in range(spec.decoder_blocks))
        self.last = nn.Linear(width, spec.classes)

    def forward(self, sampled: Tensor, patches: Tensor, places: Tensor) -> Tensor:
        """Sampled (..., F), patches (..., C*P), `place_features` (..., 6 or 9) to logits (..., K)."""
        parts = [sampled, places]
        if self.patch is not None:
            parts.append(self.patch(patches).to(sampled.dtype))
        h = self.first(torch.cat(parts, dim=-1))
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.last(F.silu(h))
        return out


class MultiscaleNetwork(nn.Module):
    """The default network (see the module's docstring)."""

    def __init__(self, spec: MultiscaleSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stages = nn.ModuleList(StageModule(spec, i) for i in range(len(spec.stages)))
        self.decoder = LocationDecoder(spec)
        # Coarse logits: deep supervision in training, the octree's prediction in use.
        coarse = spec.stages[self.coarse_stage].features
        self.coarse = Pointwise(coarse, spec.classes, 1 / sqrt(coarse))

    @property
    def coarse_stage(self) -> int:
        """The stage whose map gives coarse logits: the third, about 8 voxels a cell."""
        return min(2, len(self.spec.stages) - 1)

    def stage(self, index: int) -> StageModule:
        """A stage, typed."""
        out = self.stages[index]
        assert isinstance(out, StageModule)
        return out

    def maps(self, volume: Float[Tensor, "B C X Y Z"]) -> list[Tensor]:
        """Maps of all stages, from fine to coarse; every axis of the volume is a multiple of the largest
        stride."""
        trunk: list[Tensor] = []
        x: Tensor = volume
        for i in range(len(self.stages)):
            x = self.stage(i).descend(x)
            trunk.append(x)
        out: list[Tensor] = []
        above: Tensor | None = None
        for i in reversed(range(len(self.stages))):
            stride = self.spec.stages[i + 1].stride if i + 1 < len(self.stages) else (1, 1, 1)
            above = self.stage(i).map(trunk[i], above, stride)
            out.append(above)
        return out[::-1]

    def coarse_logits(self, maps: Sequence[Tensor]) -> Float[Tensor, "B K X Y Z"]:
        """Logits at the centres of the cells of `coarse_stage`."""
        out: Tensor = self.coarse(maps[self.coarse_stage])
        return out

    def forward(
        self,
        volume: Float[Tensor, "B C X Y Z"],
        locations: Float[Tensor, "B N 3"],
        positions: Float[Tensor, "B N 3"] | None = None,
    ) -> tuple[Float[Tensor, "B N K"], Float[Tensor, "B K x y z"]]:
        """Logits at locations, and coarse logits, of a batch of crops.

        Args:
            positions: Where in their scans the locations lie, for networks that are told (`spec.position`).
        """
        maps = self.maps(volume)
        sampled = torch.cat(
            [sample(m, to_cells(locations, s)) for m, s in zip(maps, self.spec.strides, strict=True)], dim=-1
        )
        patches = gather_patches(volume, locations, self.spec.patch)
        places = offsets_in_cells(locations, self.spec)
        if positions is not None:
            places = torch.cat([places, positions], dim=-1)
        logits = self.decoder(sampled, patches, places)
        return logits, self.coarse_logits(maps)


def to_cells(locations: Float[Tensor, "*B N 3"], stride: Triple) -> Float[Tensor, "*B N 3"]:
    """Voxel indices to indices of cells of a stage."""
    return (locations + 0.5) / _constant(stride, locations.dtype, locations.device) - 0.5


@lru_cache(maxsize=256)
def _constant(values: tuple[int | float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers on a device, made once: a copy to a GPU waits for all that it does, and cannot be captured."""
    with torch.inference_mode(False):  # or it could not be used in training
        return torch.tensor(values, dtype=dtype, device=device)


def offsets_in_cells(locations: Float[Tensor, "*B N 3"], spec: MultiscaleSpec) -> Float[Tensor, "*B N 6"]:
    """Where a location lies in its voxel and in its cell of the first stage.

    Distances from the centres, in units of half the finest voxel extent in mm: physical, and of order one.
    """
    mm = _constant(spec.spacing, locations.dtype, locations.device)
    unit = mm / (0.5 * min(spec.spacing))
    stride = _constant(spec.strides[0], locations.dtype, locations.device)
    # floor(x + 0.5): halves go up everywhere, where round() would alternate between even and odd voxels.
    in_voxel = locations - torch.floor(locations + 0.5)
    cells = (locations + 0.5) / stride
    in_cell = (cells - torch.floor(cells) - 0.5) * stride
    return torch.cat([in_voxel * unit, in_cell * unit], dim=-1)


def positions_in_scan(
    locations: Float[Tensor, "*B N 3"], shape: Float[Tensor, "*B 3"]
) -> Float[Tensor, "*B N 3"]:
    """Where in scans of `shape` voxels locations lie: -1 at one border to 1 at the other, per axis."""
    return (2 * locations + 1) / shape[..., None, :] - 1


def corners(
    cells: Float[Tensor, "N 3"], shape: Triple, origin: Triple = (0, 0, 0), stored: Triple | None = None
) -> tuple[Tensor, Tensor]:
    """Flat indices (N, 8) and weights (N, 8) of trilinear interpolation, clamped to the border of the map.

    Args:
        cells: Cell indices on the whole map.
        shape: Cells of the whole map.
        origin: First cell of the stored part of the map.
        stored: Extent of the stored part; the indices returned count inside it.
    """
    stored = stored or shape
    index = torch.zeros(len(cells), 1, dtype=torch.int64, device=cells.device)
    weight = torch.ones(len(cells), 1, dtype=cells.dtype, device=cells.device)
    for axis in range(3):
        x = cells[:, axis].clamp(0, shape[axis] - 1)
        low = x.floor().clamp(max=max(shape[axis] - 2, 0))
        fraction = (x - low)[:, None]
        first = low.long() - origin[axis]
        second = (first + 1).clamp(max=stored[axis] - 1)
        index = (index[:, :, None] * stored[axis] + torch.stack([first, second], -1)[:, None, :]).flatten(1)
        weight = (weight[:, :, None] * torch.stack([1 - fraction, fraction], -1)).flatten(1)
    return index, weight


def sample(maps: Float[Tensor, "B C X Y Z"], cells: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N C"]:
    """Trilinear samples of maps at cell indices, float32; beyond the border the border's value."""
    batch, channels, x, y, z = maps.shape
    index, weight = corners(cells.reshape(-1, 3), (x, y, z))
    start = torch.arange(batch, device=maps.device).repeat_interleave(cells.shape[1]) * (x * y * z)
    table = maps.float().permute(0, 2, 3, 4, 1).reshape(-1, channels)
    out = F.embedding_bag(index + start[:, None], table, per_sample_weights=weight.float(), mode="sum")
    return out.view(batch, -1, channels)


def gather_patches(
    volume: Float[Tensor, "B C X Y Z"], locations: Float[Tensor, "B N 3"], patch: Triple
) -> Float[Tensor, "B N P"]:
    """Raw voxels around the voxel nearest to each location, channels first; beyond the border the border's
    value."""
    batch, channels, *shape = volume.shape
    count = locations.shape[1]
    nearest = torch.floor(locations + 0.5).long()
    steps: list[Tensor] = []
    for axis in range(3):
        offsets = torch.arange(-(patch[axis] // 2), patch[axis] // 2 + 1, device=volume.device)
        steps.append((nearest[..., axis, None] + offsets).clamp(0, shape[axis] - 1))
    index = (steps[0][..., :, None, None] * shape[1] + steps[1][..., None, :, None]) * shape[2] + steps[2][
        ..., None, None, :
    ]
    flat = volume.reshape(batch, channels, -1)
    out = flat.gather(2, index.view(batch, 1, -1).expand(batch, channels, -1))
    return out.view(batch, channels, count, -1).transpose(1, 2).reshape(batch, count, -1)

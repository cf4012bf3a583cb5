"""The decoder: location, local features and latent in, logits out (SPEC §2).

The released code repeats what belongs to a volume for each of its locations and flattens both to one batch
axis. Here they stay two axes and what belongs to a volume broadcasts: the same numbers in less memory.

Letters: B volumes, N locations, F features, R latent rows, L latent length, K classes.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ossnet.networks.normalisation import ConditionalBatchNorm, Statistics
from ossnet.networks.pade import Pade
from ossnet.networks.patches import LOCAL_FEATURES, PatchEncoder
from ossnet.networks.variants import NetworkSpec, Shape


def normalise_locations(locations: Float[Tensor, "*N 3"], shape: Shape) -> Float[Tensor, "*N 3"]:
    """Voxel indices 0 … S-1 to -1 … 1 along each axis (SPEC §7.4); an axis of one voxel maps to -1."""
    last = locations.new_tensor([max(n - 1, 1) for n in shape])
    return 2 * locations / last - 1


def fourier_features(coordinates: Float[Tensor, "*N 3"], b: Float[Tensor, "1 3 M"]) -> Float[Tensor, "*N W"]:
    """[cos 2πpb | sin 2πpb | p], W = 2M + 3 (released extras D1, D2 only)."""
    phase = 2 * math.pi * (coordinates @ b[0])
    return torch.cat([phase.cos(), phase.sin(), coordinates], dim=-1)


class DecoderBlock(nn.Module):
    """Two linear maps with conditional batch normalisation and a shortcut.

    Attribute names, misspellings included, are those of the released state dict.
    """

    def __init__(self, features_in: int, width: int, latent: int, statistics: Statistics) -> None:
        super().__init__()
        self.linear_layer_1 = nn.Linear(features_in, width)
        self.linear_layer_2 = nn.Linear(width, width)
        self.cnb_1 = ConditionalBatchNorm(latent, width, statistics)
        self.cnb_2 = ConditionalBatchNorm(latent, width, statistics)
        self.activation = Pade()
        self.final_activation = Pade()
        self.residual_mapping: nn.Linear | nn.Identity = (
            nn.Identity() if features_in == width else nn.Linear(features_in, width)
        )

    def forward(self, x: Float[Tensor, "B N F"], latent: Float[Tensor, "B L"]) -> Float[Tensor, "B N W"]:
        """Features of each location, modulated by the latent row of its volume."""
        return self.finish(self.linear_layer_1(x), self.residual_mapping(x), latent)

    def finish(
        self, hidden: Float[Tensor, "B N W"], shortcut: Float[Tensor, "B N W"], latent: Float[Tensor, "B L"]
    ) -> Float[Tensor, "B N W"]:
        """All after the maps that read the block's input: `hidden` = Linear_1 x, `shortcut` = skip x."""
        hidden = self.activation(self.cnb_1(hidden, latent))
        hidden = self.cnb_2(self.linear_layer_2(hidden), latent)
        activated: Tensor = self.final_activation(hidden + shortcut)
        return activated


class Decoder(nn.Module):
    """Five residual blocks over [coordinates | local features | latent row 0], then one linear map."""

    b: Tensor
    formulation: "Callable[[Decoder, Tensor, Tensor | None, Tensor], Tensor] | None" = None
    """Another way to compute the same features of the last block (`networks.lean`)."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.binary = spec.classes == 1
        self.shape = spec.shape
        self.normalise_coordinates = spec.normalise_coordinates
        self.coordinate_features = 2 * spec.fourier + 3 if spec.fourier else 3
        if spec.fourier:
            self.register_buffer("b", 4 * torch.randn(1, 3, spec.fourier))
        self.patch_mapping = PatchEncoder(spec.patch_channels) if spec.patch_channels else None
        local = LOCAL_FEATURES if spec.patch_channels else 0
        features = self.coordinate_features + local + spec.latent_length
        self.blocks = nn.ModuleList(
            DecoderBlock(
                features if i == 0 else spec.width, spec.width, spec.latent_length, spec.cbn_statistics
            )
            for i in range(spec.decoder_blocks)
        )
        self.final_mapping = nn.Sequential(nn.Linear(spec.width, spec.classes, bias=False))

    def forward(
        self,
        locations: Float[Tensor, "B N 3"],
        patches: Float[Tensor, "B N C 7 7 7"] | None,
        latent: Float[Tensor, "B R L"],
    ) -> Float[Tensor, "B N *K"]:
        """Logits, (B, N) for binary, (B, N, K) for K classes.

        Args:
            locations: Voxel indices on the full-resolution grid, fractions allowed.
            patches: Voxels around each location; None for O-Net.
            latent: R = 1 row that does everything, or one for the input and one for each block.
        """
        if (patches is None) != (self.patch_mapping is None):
            raise ValueError(
                "this network takes patches" if patches is None else "this network takes no patches"
            )
        if self.formulation is not None:
            x = self.formulation(self, locations, patches, latent)
        else:
            x = self.features(locations, patches, latent)
        logits: Tensor = self.final_mapping(x)
        return logits.squeeze(-1) if self.binary else logits

    def features(
        self,
        locations: Float[Tensor, "B N 3"],
        patches: Float[Tensor, "B N C 7 7 7"] | None,
        latent: Float[Tensor, "B R L"],
    ) -> Float[Tensor, "B N W"]:
        """What the last block says about each location; arguments as of `forward`."""
        local = None if self.patch_mapping is None else self.patch_mapping(patches)
        coordinates = self.coordinates(locations)
        first, *others = cast(list[DecoderBlock], list(self.blocks))
        row = [latent[:, 0 if latent.shape[1] == 1 else i + 1] for i in range(len(self.blocks))]
        x = first.finish(
            _read(first.linear_layer_1, coordinates, local, latent[:, 0]),
            _shortcut(first.residual_mapping, coordinates, local, latent[:, 0]),
            row[0],
        )
        for block, conditions in zip(others, row[1:], strict=True):
            x = block(x, conditions)
        return x

    def coordinates(self, locations: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N W"]:
        """What the first block is told about the location: W = 3, or more with Fourier features."""
        coordinates = normalise_locations(locations, self.shape) if self.normalise_coordinates else locations
        return coordinates if self.coordinate_features == 3 else fourier_features(coordinates, self.b)


def _shortcut(
    mapping: nn.Linear | nn.Identity, coordinates: Tensor, local: Tensor | None, latent: Tensor
) -> Tensor:
    if isinstance(mapping, nn.Linear):
        return _read(mapping, coordinates, local, latent)
    # An input exactly as wide as the block: the shortcut is the input itself.
    constant = latent[:, None].expand(-1, coordinates.shape[1], -1)
    return torch.cat([coordinates, *([] if local is None else [local]), constant], dim=-1)


def _read(
    linear: nn.Linear,
    coordinates: Float[Tensor, "B N W"],
    local: Float[Tensor, "B N 343"] | None,
    latent: Float[Tensor, "B L"],
) -> Float[Tensor, "B N F"]:
    """`linear` of [coordinates | local | latent], without building that row for every location.

    The latent's part is computed once a volume. The coordinates' part stays in float32 under autocast:
    bfloat16 knows no odd numbers above 256.
    """
    c = coordinates.shape[-1]
    weights = linear.weight
    with torch.autocast(coordinates.device.type, enabled=False):
        constant = F.linear(
            latent.to(weights.dtype), weights[:, weights.shape[1] - latent.shape[-1] :], linear.bias
        )
        out = F.linear(coordinates.to(weights.dtype), weights[:, :c]) + constant[:, None]
    if local is None:
        return out
    return out + F.linear(local, weights[:, c : c + local.shape[-1]])

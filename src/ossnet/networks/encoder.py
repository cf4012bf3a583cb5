"""The 3D residual encoder: half-resolution scan in, latent rows out (SPEC §2).

Letters: B volumes, C channels, X Y Z voxels, R latent rows, L cells of the low-resolution grid.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ossnet.networks.convolution import Conv3d
from ossnet.networks.normalisation import BatchNorm3d
from ossnet.networks.pade import Pade
from ossnet.networks.variants import NetworkSpec


class Encoding(NamedTuple):
    """What the encoder says about a scan."""

    latent: Tensor
    """(B, R, L)."""
    segmentation: Tensor | None
    """Logits on the low-resolution grid (B, 1 or K-1, *grid), without a head None."""


class ResidualBlock3d(nn.Module):
    """Two 3³ convolutions with an average pool between them; halves the resolution."""

    formulation: "Callable[[ResidualBlock3d, Tensor], Tensor] | None" = None
    """Another way to compute the same (`networks.lean`)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.main_mapping = nn.Sequential(
            Conv3d(channels_in, channels_out, 3, padding=1, bias=False),
            BatchNorm3d(channels_out),
            Pade(),
            nn.AvgPool3d(2),
            nn.Dropout(p=0.0),  # never drops (SPEC §7.31); holds its place in the state dict's numbering
            Conv3d(channels_out, channels_out, 3, padding=1, bias=False),
            BatchNorm3d(channels_out),
        )
        self.residual_mapping = (
            nn.Identity() if channels_in == channels_out else Conv3d(channels_in, channels_out, 1, bias=False)
        )
        self.final_activation = Pade()

    def forward(self, x: Float[Tensor, "B C X Y Z"]) -> Float[Tensor, "B D U V W"]:
        """(B, C, X, Y, Z) → (B, D, X/2, Y/2, Z/2)."""
        if self.formulation is not None:
            return self.formulation(self, x)
        # The specification convolves and then averages. A 1³ convolution and an average commute, and this way
        # round the convolution sees an eighth of the voxels.
        skip = self.residual_mapping(F.avg_pool3d(x, 2))
        activated: Tensor = self.final_activation(self.main_mapping(x) + skip)
        return activated


class OutputMapping(nn.Sequential):
    """An output skip-connection: a block's output on the low-resolution grid, with half the channels."""

    def __init__(self, channels: int, grid: tuple[int, int, int]) -> None:
        super().__init__(
            nn.AdaptiveMaxPool3d(grid),
            Conv3d(channels, channels // 2, 5, padding=2, bias=False),
            BatchNorm3d(channels // 2),
            Pade(),
        )


class Encoder(nn.Module):
    """Residual blocks, then latent rows from the last block (O-Net, A, B) or from all of them (C, D)."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.grid = spec.grid
        inputs = (spec.channels, *spec.blocks[:-1])
        self.blocks = nn.ModuleList(ResidualBlock3d(i, o) for i, o in zip(inputs, spec.blocks, strict=True))
        self.output_mappings = (
            nn.ModuleList(OutputMapping(c, spec.grid) for c in spec.blocks) if spec.skip else None
        )
        features = sum(c // 2 for c in spec.blocks) if spec.skip else spec.blocks[-1]
        self.final_mapping = nn.Sequential(
            Conv3d(features, spec.latent_rows, 5, padding=2), BatchNorm3d(spec.latent_rows), Pade()
        )
        # A sequence of one: the released head has a (parameterless) sigmoid behind the convolution.
        self.segmentation_mapping = (
            nn.Sequential(Conv3d(spec.blocks[-1], spec.head_channels, 5, padding=2, bias=False))
            if spec.head
            else None
        )

    def forward(self, volume: Float[Tensor, "B C X Y Z"]) -> Encoding:
        """Encode half-resolution scans whose last block's output has exactly the size of the grid."""
        expected = tuple(n << len(self.blocks) for n in self.grid)
        if tuple(volume.shape[2:]) != expected:
            raise ValueError(f"the encoder takes volumes of {expected} voxels, not {tuple(volume.shape[2:])}")
        x, outputs = volume, []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.output_mappings is not None:
                outputs.append(self.output_mappings[i](x))
        latent = self.final_mapping(torch.cat(outputs, dim=1) if outputs else x)
        segmentation = None if self.segmentation_mapping is None else self.segmentation_mapping(x)
        return Encoding(latent.flatten(2), segmentation)

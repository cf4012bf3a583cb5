"""A trained decoder with everything that one volume fixes folded into its weights.

Once the encoder has run, conditional batch normalisation is an affine map of constants and goes into the
linear map before it; the latent's part of the first block's input is a constant vector and goes into a bias;
patch convolutions are matrices. What is left are products and Padé units. Computed in float64, rounded once.

Letters: L latent length, F features, I inputs, K classes.
"""

from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ossnet.networks.decoder import Decoder, DecoderBlock
from ossnet.networks.kernels import coefficients_of
from ossnet.networks.normalisation import ConditionalBatchNorm


class Affine(NamedTuple):
    """y = x @ weight + bias, and the Padé unit behind it; float64, (I, F) and (F,)."""

    weight: Tensor
    bias: Tensor
    pade: Tensor | None
    """(10,) float32 from `coefficients`; None without a unit."""


class FoldedBlock(NamedTuple):
    """P(P(x @ one + b) @ two + x @ shortcut + b'); the shortcut None is x itself."""

    one: Affine
    two: Affine
    """Its bias includes the shortcut's."""
    shortcut: Tensor | None


class FoldedDecoder(NamedTuple):
    """What is left of a decoder for one volume.

    The first block's input is [coordinates | local features]; its latent part is in the biases.
    """

    convolutions: tuple[nn.Conv3d, nn.Conv3d] | None
    units: tuple[Tensor, Tensor] | None
    """Padé coefficients behind the convolutions."""
    coordinates: int
    """Columns of the input that describe the location."""
    blocks: list[FoldedBlock]
    last: Tensor
    """(F, K) float64."""


def fold(decoder: Decoder, latent: Float[Tensor, "R L"]) -> FoldedDecoder:
    """Specialise a decoder in evaluation mode for one volume.

    Args:
        latent: R = 1 row that does everything, or one for the input and one for each block.
    """
    latent = latent.double()
    blocks = [
        _fold_block(
            cast(DecoderBlock, block), latent[0 if len(latent) == 1 else i + 1], latent[0] if i == 0 else None
        )
        for i, block in enumerate(decoder.blocks)
    ]
    last = cast(nn.Linear, decoder.final_mapping[0]).weight
    if decoder.patch_mapping is None:
        return FoldedDecoder(None, None, decoder.coordinate_features, blocks, last.double().T)
    mapping = decoder.patch_mapping.mapping
    return FoldedDecoder(
        (cast(nn.Conv3d, mapping[0]), cast(nn.Conv3d, mapping[3])),
        (coefficients_of(mapping[1]), coefficients_of(mapping[4])),
        decoder.coordinate_features,
        blocks,
        last.double().T,
    )


def _fold_block(block: DecoderBlock, conditions: Tensor, constant: Tensor | None) -> FoldedBlock:
    """`constant`: the latent row at the end of the block's input, for the first block."""
    one = _normalised(block.linear_layer_1, block.cnb_1, conditions)
    two = _normalised(block.linear_layer_2, block.cnb_2, conditions)
    shortcut, bias = None, two[1]
    mapping = block.residual_mapping
    if isinstance(mapping, nn.Linear):
        shortcut, bias = mapping.weight.double().T, bias + mapping.bias.double()
    if constant is None:
        return FoldedBlock(
            Affine(*one, coefficients_of(block.activation)),
            Affine(two[0], bias, coefficients_of(block.final_activation)),
            shortcut,
        )
    if shortcut is None:
        # An input exactly as wide as the block; the constant's part still goes into the bias.
        shortcut = torch.eye(len(one[0]), dtype=torch.float64, device=constant.device)
    free = len(one[0]) - len(constant)
    one = one[0][:free], one[1] + constant @ one[0][free:]
    shortcut, bias = shortcut[:free], bias + constant @ shortcut[free:]
    return FoldedBlock(
        Affine(*one, coefficients_of(block.activation)),
        Affine(two[0], bias, coefficients_of(block.final_activation)),
        shortcut,
    )


def _normalised(linear: nn.Linear, norm: ConditionalBatchNorm, conditions: Tensor) -> tuple[Tensor, Tensor]:
    """(weight (I, F), bias (F,)) of the linear map with the normalisation behind it."""
    gamma = norm.linear_gamma.weight.double() @ conditions + norm.linear_gamma.bias.double()
    beta = norm.linear_beta.weight.double() @ conditions + norm.linear_beta.bias.double()
    statistics = norm.normalization
    scale = gamma * torch.rsqrt(statistics.running_var.double() + statistics.eps)
    weight = linear.weight.double() * scale[:, None]
    return weight.T, (linear.bias.double() - statistics.running_mean.double()) * scale + beta

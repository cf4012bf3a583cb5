"""The released formulation of the decoder, written from the specification, to compare with.

What belongs to a volume is repeated for each of its locations, patches go through 7³ convolutions, the latent is
part of every row, and Padé units and normalisation are plain tensor operations one after the other (SPEC §2).
The parameters are those of an `OSSNet`; so are the numbers, up to rounding.

Letters: B volumes, N locations, C patch channels, R latent rows, L latent length, F features.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ossnet.networks.decoder import Decoder, DecoderBlock
from ossnet.networks.normalisation import ConditionalBatchNorm
from ossnet.networks.pade import Pade


def released_decode(decoder: Decoder, locations: Tensor, patches: Tensor | None, latent: Tensor) -> Tensor:
    """Logits (B, N, K) of locations (B, N, 3), patches (B, N, C, 7, 7, 7) and latent (B, R, L)."""
    b, n, _ = locations.shape
    rows = [latent[:, i].repeat_interleave(n, dim=0)[:, None] for i in range(latent.shape[1])]  # (B·N, 1, L)
    parts = [locations.reshape(b * n, 1, 3)]
    if decoder.patch_mapping is not None and patches is not None:
        first, unit, _, second, last = decoder.patch_mapping.mapping
        x = released_pade(first(patches.flatten(0, 1)), cast(Pade, unit))
        parts.append(released_pade(second(x), cast(Pade, last)).flatten(1)[:, None])
    x = torch.cat([*parts, rows[0]], dim=-1)
    for i, module in enumerate(decoder.blocks):
        block, row = cast(DecoderBlock, module), rows[0 if len(rows) == 1 else i + 1]
        h = _normalised(block.linear_layer_1(x), row, block.cnb_1)
        h = released_pade(h, block.activation)
        h = _normalised(block.linear_layer_2(h), row, block.cnb_2)
        x = released_pade(h + block.residual_mapping(x), block.final_activation)
    logits: Tensor = cast(nn.Linear, decoder.final_mapping[0])(x)
    return logits.view(b, n, -1)


def released_pade(x: Tensor, unit: Pade) -> Tensor:
    """The formula as it stands."""
    n, d, size = unit.weight_numerator, unit.weight_denominator.abs(), x.abs()
    x2, size2 = x * x, size * size
    x3, size3 = x2 * x, size2 * size
    x4, size4 = x3 * x, size3 * size
    top = n[0] + n[1] * x + n[2] * x2 + n[3] * x3 + n[4] * x4 + n[5] * (x4 * x)
    return top / (1 + d[0] * size + d[1] * size2 + d[2] * size3 + d[3] * size4)


def _normalised(x: Tensor, row: Tensor, norm: ConditionalBatchNorm) -> Tensor:
    """Conditional batch normalisation of (B·N, 1, F) with one γ and one β for each location."""
    s = norm.normalization
    if norm.training:
        s.num_batches_tracked.add_(1)
    y = F.batch_norm(x, s.running_mean, s.running_var, None, None, norm.training, s.momentum, s.eps)
    return norm.linear_gamma(row) * y + norm.linear_beta(row)

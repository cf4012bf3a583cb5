"""The same networks, trained in a third of the time and a fraction of the memory.

`lean(network)` changes how a network computes, not what: parameters, buffers, state dict, batch statistics
and gradients stay, up to rounding. Patch convolutions become matrix products; a Padé unit, with the
normalisation and the addition before it, keeps its input alone for the backward pass; decoder blocks can be
computed again instead of kept. Second derivatives work, through plain tensor operations.

Letters: B volumes, N locations, C patch channels, F features, L latent length.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ossnet.networks.decoder import Decoder, DecoderBlock
from ossnet.networks.encoder import ResidualBlock3d
from ossnet.networks.lean_pade import Shared, columns, lean_pade, normalised_pade
from ossnet.networks.normalisation import (
    BatchNorm3d,
    ConditionalBatchNorm,
    MomentsNorm,
)
from ossnet.networks.pade import Pade, pade
from ossnet.networks.patches import LOCAL_FEATURES, PatchEncoder
from ossnet.networks.streaming import pooled_pade, streams
from ossnet.networks.toeplitz import toeplitz

_WIDTH = 32
"""Products of widths that are no multiple of this run at half the speed."""


def lean(network: nn.Module, enabled: bool = True, recompute: bool = False) -> None:
    """Switch all Padé units, encoder blocks and decoders within `network` to the lean formulation, or back.

    Args:
        enabled: False restores the plain formulation.
        recompute: Keep only the inputs of the decoder's blocks and of the patch encoder, and compute the rest
            again in the backward pass: a third of the memory for a quarter more time.
    """
    for module in network.modules():
        if isinstance(module, Pade):
            module.evaluate = lean_pade if enabled else pade
        if isinstance(module, Decoder):
            module.formulation = (_features_again if recompute else _features) if enabled else None
        if isinstance(module, ResidualBlock3d):
            module.formulation = _residual_block if enabled else None


def _features(
    decoder: Decoder,
    locations: Float[Tensor, "B N 3"],
    patches: Float[Tensor, "B N C 7 7 7"] | None,
    latent: Float[Tensor, "B R L"],
) -> Float[Tensor, "B N F"]:
    """`Decoder.features`, lean."""
    return _run(decoder, locations, patches, latent, recompute=False)


def _features_again(decoder: Decoder, locations: Tensor, patches: Tensor | None, latent: Tensor) -> Tensor:
    return _run(decoder, locations, patches, latent, recompute=True)


def _run(
    decoder: Decoder, locations: Tensor, patches: Tensor | None, latent: Tensor, recompute: bool
) -> Tensor:
    recompute = recompute and torch.is_grad_enabled()
    local = None
    if decoder.patch_mapping is not None and patches is not None:
        local = _again(recompute, None, _local_features, decoder.patch_mapping, patches)
    coordinates = decoder.coordinates(locations)
    x = None
    for i, module in enumerate(decoder.blocks):
        block = cast(DecoderBlock, module)
        row = latent[:, 0 if latent.shape[1] == 1 else i + 1]
        if x is None:
            x = _again(recompute, block, _first_block, block, coordinates, local, latent[:, 0], row)
        else:
            x = _again(recompute, block, _block, block, x, row)
    assert x is not None  # a decoder has at least one block
    return x


def _again(recompute: bool, block: DecoderBlock | None, function: Any, *arguments: Any) -> Tensor:
    """The function's value; its intermediate results are kept, or computed again in the backward pass."""
    if not recompute:
        kept: Tensor = function(*arguments)
        return kept
    # Nothing here draws random numbers, so their state need not be kept either.
    out: Tensor = checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), _averages_kept(block)),
    )
    return out


@contextlib.contextmanager
def _averages_kept(block: DecoderBlock | None) -> Iterator[None]:
    """Computing a block again must not move its running averages again."""
    norms = [] if block is None else [m for m in block.modules() if isinstance(m, MomentsNorm)]
    kept = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, before in zip(norms, kept, strict=True):
                for buffer, value in zip(norm.buffers(), before, strict=True):
                    buffer.copy_(value)


def _local_features(encoder: PatchEncoder, patches: Float[Tensor, "B N C 7 7 7"]) -> Float[Tensor, "B N 343"]:
    """`PatchEncoder` as two matrix products."""
    first, unit, _, second, last = encoder.mapping
    b, n, c = patches.shape[:3]
    flat, matrix = patches.reshape(b * n, -1), toeplitz(cast(nn.Conv3d, first).weight)
    channels_last = patches.permute(0, 1, 3, 4, 5, 2)
    if channels_last.is_contiguous():
        # As patches are gathered: rows in their order instead of a copy.
        flat = channels_last.reshape(b * n, -1)
        matrix = matrix.view(c, LOCAL_FEATURES, -1).transpose(0, 1).reshape(len(matrix), -1)
    x = _product(flat, matrix, cast(nn.Conv3d, first))
    x = unit(x)
    x = cast(Tensor, last(_product(x, toeplitz(cast(nn.Conv3d, second).weight), cast(nn.Conv3d, second))))
    return x[:, :LOCAL_FEATURES].view(b, n, LOCAL_FEATURES)


def _product(x: Float[Tensor, "M I"], matrix: Float[Tensor, "J O"], convolution: nn.Conv3d) -> Tensor:
    """x @ matrix + bias, widths padded with zeros (I may be padded already)."""
    extra = -matrix.shape[1] % _WIDTH
    bias = cast(Tensor, convolution.bias).repeat_interleave(LOCAL_FEATURES)
    matrix = F.pad(matrix, (0, extra, 0, x.shape[1] - matrix.shape[0]))
    return torch.addmm(F.pad(bias, (0, extra)), x, matrix)


def _first_block(
    block: DecoderBlock, coordinates: Tensor, local: Tensor | None, constant: Tensor, latent: Tensor
) -> Tensor:
    """The block that reads [coordinates | local | constant]."""
    parts = [coordinates.to(constant.dtype)] + ([] if local is None else [local])
    # Under autocast the coordinates' products stay in float32: bfloat16 knows no odd numbers above 256.
    if torch.is_autocast_enabled(coordinates.device.type):
        x, width = coordinates, coordinates.shape[-1]
    else:
        width = sum(p.shape[-1] for p in parts)
        x = F.pad(torch.cat(parts, -1), (0, -width % _WIDTH))
        local = None
    hidden = _read(block.linear_layer_1, x, width, local, constant)
    mapping = block.residual_mapping
    if isinstance(mapping, nn.Linear):
        shortcut = _read(mapping, x, width, local, constant)
    else:
        shortcut = torch.cat([*parts, constant[:, None].expand(-1, coordinates.shape[1], -1)], -1)
    return _finish(block, hidden, shortcut, latent)


def _read(
    linear: nn.Linear,
    x: Float[Tensor, "B N I"],
    width: int,
    local: Float[Tensor, "B N J"] | None,
    constant: Float[Tensor, "B L"],
) -> Float[Tensor, "B N F"]:
    """`linear` of [the first `width` values of x | local | constant]; the constant's part once a volume."""
    weight = linear.weight
    length = constant.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        bias = F.linear(constant.to(weight.dtype), weight[:, weight.shape[1] - length :], linear.bias)
        matrix = F.pad(weight[:, :width], (0, x.shape[-1] - width)).T
        out = torch.baddbmm(bias[:, None], x.to(weight.dtype), matrix.expand(len(x), -1, -1))
    if local is None:
        return out
    return torch.add(out, F.linear(local, weight[:, width : width + local.shape[-1]]))


def _block(block: DecoderBlock, x: Tensor, latent: Tensor) -> Tensor:
    return _finish(block, block.linear_layer_1(x), block.residual_mapping(x), latent)


def _finish(block: DecoderBlock, hidden: Tensor, shortcut: Tensor, latent: Tensor) -> Tensor:
    hidden = _normalised_pade(hidden, block.cnb_1, block.activation, latent, None)
    hidden = block.linear_layer_2(hidden)
    return _normalised_pade(hidden, block.cnb_2, block.final_activation, latent, shortcut)


def _normalised_pade(
    x: Float[Tensor, "B N F"],
    norm: ConditionalBatchNorm,
    unit: Pade,
    latent: Float[Tensor, "B L"],
    skip: Float[Tensor, "B N F"] | None,
) -> Float[Tensor, "B N F"]:
    """P(CBN(x) + skip)."""
    with torch.autocast(x.device.type, enabled=False):
        latent = latent.to(norm.linear_gamma.weight.dtype)
        gamma, beta = norm.linear_gamma(latent), norm.linear_beta(latent)
    statistics = norm.normalization
    shared: Shared = "all" if statistics.running_mean.numel() == 1 else "last"
    return normalised_pade(x[:, None], gamma[:, None], beta[:, None], statistics, shared, unit, skip)[:, 0]


def _residual_block(block: ResidualBlock3d, x: Float[Tensor, "B C X Y Z"]) -> Float[Tensor, "B D U V W"]:
    """`ResidualBlock3d`, lean."""
    first, norm, unit, _, _, second, last = block.main_mapping
    skip = block.residual_mapping(_Halve.apply(x))  # type: ignore[no-untyped-call]
    if streams(cast(nn.Conv3d, first), cast(BatchNorm3d, norm), x):
        h = pooled_pade(x, cast(nn.Conv3d, first), cast(BatchNorm3d, norm), cast(Pade, unit))
    else:
        h = _channel_pade(first(x), cast(BatchNorm3d, norm), cast(Pade, unit), None)
        h = _Halve.apply(h)  # type: ignore[no-untyped-call]
    h = second(h)
    return _channel_pade(h, cast(BatchNorm3d, last), block.final_activation, skip)


def _channel_pade(
    x: Float[Tensor, "B C X Y Z"], norm: BatchNorm3d, unit: Pade, skip: Float[Tensor, "B C X Y Z"] | None
) -> Float[Tensor, "B C X Y Z"]:
    """P(BN(x) + skip)."""
    b, c = x.shape[:2]
    width = columns(x.shape[2:])
    rows = x.reshape(b, c, -1, width)
    gamma, beta = (w.view(1, c, 1).expand(b, c, width) for w in (norm.weight, norm.bias))
    skip = None if skip is None else skip.reshape(b * c, -1, width)
    out = normalised_pade(rows, gamma, beta, norm, "channels", unit, skip)
    return out.view(x.shape)


class _Halve(torch.autograd.Function):
    """Mean of 2×2×2 voxels. Keeps nothing, where torch's own keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return F.avg_pool3d(x, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        wide = F.interpolate(gradient / 8, scale_factor=2.0, mode="nearest")
        rest = [n - w for n, w in zip(ctx.shape[2:], wide.shape[2:], strict=True)]
        # An odd axis has a last plane that no mean reads.
        return F.pad(wide, [side for n in reversed(rest) for side in (0, n)]) if any(rest) else wide

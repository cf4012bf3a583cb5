"""The same networks, trained in a third of the time and a fraction of the memory.

`lean(network)` changes how a network computes, not what: parameters, buffers, state dict, batch statistics
and gradients stay, up to rounding. Patch convolutions become matrix products; a Padé unit, with the
normalisation and the addition before it, keeps its input alone for the backward pass; decoder blocks can be
computed again instead of kept. Second derivatives work, through plain tensor operations.

Letters: B volumes, N locations, C patch channels, F features, L latent length.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ossnet.networks.decoder import Decoder, DecoderBlock
from ossnet.networks.encoder import ResidualBlock3d
from ossnet.networks.kernels import affine_pade, affine_pade_backward, coefficients, pade_of
from ossnet.networks.normalisation import (
    BatchNorm3d,
    ConditionalBatchNorm,
    MomentsNorm,
    batch_moments,
    is_distributed,
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


def lean_pade(
    x: Float[Tensor, "*shape"], numerator: Float[Tensor, "6"], denominator: Float[Tensor, "4"]
) -> Float[Tensor, "*shape"]:
    """`pade` that keeps its input only."""
    out: Tensor = _Pade.apply(x, numerator, denominator)  # type: ignore[no-untyped-call]
    return out


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
    columns = _columns(x.shape[2:])
    rows = x.reshape(b, c, -1, columns)
    gamma, beta = (w.view(1, c, 1).expand(b, c, columns) for w in (norm.weight, norm.bias))
    skip = None if skip is None else skip.reshape(b * c, -1, columns)
    out = normalised_pade(rows, gamma, beta, norm, "channels", unit, skip)
    return out.view(x.shape)


Shared = Literal["all", "last", "channels"]


def normalised_pade(
    x: Float[Tensor, "B C N F"],
    gamma: Float[Tensor, "B C F"],
    beta: Float[Tensor, "B C F"],
    statistics: MomentsNorm | BatchNorm3d,
    shared: Shared,
    unit: Pade,
    skip: Float[Tensor, "BC N F"] | None,
) -> Float[Tensor, "B C N F"]:
    """P(γ · (x − mean) / √(variance + ε) + β + skip), keeping x and skip only.

    Args:
        statistics: Whose running averages are used, or moved in training.
        shared: One mean and variance for everything, for each of the last axis, or for each of C.
    """
    if skip is not None and skip.dtype != x.dtype:
        kind = torch.promote_types(x.dtype, skip.dtype)
        x, skip = x.to(kind), skip.to(kind)
    out: Tensor = _NormalisedPade.apply(  # type: ignore[no-untyped-call]
        x, skip, gamma, beta, unit.weight_numerator, unit.weight_denominator, statistics, shared
    )
    return out


# Axes of (B, C, N, F) that a mean is taken over.
_OVER: dict[Shared, tuple[int, ...]] = {"all": (0, 1, 2, 3), "last": (0, 1, 2), "channels": (0, 2, 3)}


class _NormalisedPade(torch.autograd.Function):
    """`normalised_pade`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        skip: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        numerator: Tensor,
        denominator: Tensor,
        statistics: MomentsNorm | BatchNorm3d,
        shared: Shared,
    ) -> Tensor:
        mean, variance = statistics.moments(x, _OVER[shared])
        mean, variance = mean.clone(), variance.clone()  # running ones change later
        inverse = torch.rsqrt(variance + statistics.eps)
        ctx.save_for_backward(x, skip, gamma, beta, numerator, denominator, mean, inverse)
        ctx.training, ctx.eps, ctx.shared = statistics.training, statistics.eps, shared
        if x.dtype not in _KERNELS:
            return _plain((x, skip, gamma, beta, numerator, denominator), mean, inverse, shared)
        scale, shift = _affine(gamma, beta, mean, inverse, shared)
        rows = x.contiguous().flatten(0, 1)
        c = coefficients(numerator, denominator)
        out = affine_pade(rows, scale.flatten(0, 1), shift.flatten(0, 1), _contiguous(skip), c)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, skip, gamma, beta, numerator, denominator, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled() or x.dtype not in _KERNELS:
            saved = (x, skip, gamma, beta, numerator, denominator)

            def again(*own: Tensor | None) -> Tensor:
                m, r = mean, inverse
                if ctx.training:
                    m, variance, _ = batch_moments(cast(Tensor, own[0]), _OVER[ctx.shared])
                    r = torch.rsqrt(variance + ctx.eps)
                return _plain(own, m, r, ctx.shared)

            return *_differentiated(again, gradient, saved, ctx.needs_input_grad), None, None
        scale, shift = _affine(gamma, beta, mean, inverse, ctx.shared)
        rows = x.contiguous().flatten(0, 1)
        d_x, d_scale, d_shift, d_skip, d_c = affine_pade_backward(
            gradient.contiguous().view(rows.shape), rows, scale.flatten(0, 1), shift.flatten(0, 1), _contiguous(skip),
            coefficients(numerator, denominator),
        )  # fmt: skip
        assert d_scale is not None
        assert d_shift is not None
        d_scale, d_shift = d_scale.view(gamma.shape), d_shift.view(gamma.shape)
        wide_mean, wide_inverse = _wide(mean.double(), ctx.shared), _wide(inverse.double(), ctx.shared)
        # scale = gamma · inverse, shift = beta - mean · scale
        d_scale = d_scale - wide_mean * d_shift
        if ctx.training:
            over = tuple(a - (a == 3) for a in _OVER[ctx.shared] if a != 2)  # of (B, C, F)
            d_inverse = (d_scale * gamma).sum(over, keepdim=True)
            d_mean = -(d_shift * scale).sum(over, keepdim=True)
            d_variance = -0.5 * d_inverse * wide_inverse**3
            _add_to_values(d_x.view(x.shape), x, d_mean, d_variance, wide_mean)
        sign = torch.where(denominator >= 0, 1.0, -1.0)
        return (
            d_x.view(x.shape), d_skip, (d_scale * wide_inverse).to(gamma.dtype), d_shift.to(beta.dtype),
            d_c[:6].to(numerator.dtype), (d_c[6:] * sign).to(denominator.dtype), None, None,
        )  # fmt: skip


def _add_to_values(d_x: Tensor, x: Tensor, d_mean: Tensor, d_variance: Tensor, mean: Tensor) -> None:
    """Add, in place, what the values owe to their mean and variance, which are those of the global batch."""
    values = torch.tensor(x.numel() / mean.numel(), dtype=torch.float64, device=x.device)
    if is_distributed():
        packed = torch.cat([d_mean.flatten(), d_variance.flatten(), values[None]])
        dist.all_reduce(packed)
        d_mean, d_variance = (p.view(d_mean.shape) for p in packed[:-1].chunk(2))
        values = packed[-1]
    slope = 2 * d_variance / values
    offset = d_mean / values - slope * mean
    if slope.numel() == 1 and x.device.type == "cpu":  # elsewhere reading a number would wait for the device
        d_x.add_(x, alpha=float(slope)).add_(float(offset))
    else:
        d_x.addcmul_(x, slope[:, :, None].to(x.dtype)).add_(offset[:, :, None].to(x.dtype))


def _wide(statistic: Tensor, shared: Shared) -> Tensor:
    """A mean or variance broadcast to (B, C, F)."""
    return statistic.view((1, -1, 1) if shared == "channels" else (1, 1, -1))


def _affine(
    gamma: Tensor, beta: Tensor, mean: Tensor, inverse: Tensor, shared: Shared
) -> tuple[Tensor, Tensor]:
    """Scale and shift (B, C, F), float32, contiguous."""
    scale = gamma.float() * _wide(inverse, shared)
    return scale.contiguous(), (beta.float() - _wide(mean, shared) * scale).contiguous()


def _plain(arguments: Sequence[Tensor | None], mean: Tensor, inverse: Tensor, shared: Shared) -> Tensor:
    """`normalised_pade` by differentiable tensor operations."""
    x, skip, gamma, beta, numerator, denominator = cast(tuple[Tensor, ...], arguments)
    scale = gamma * _wide(inverse, shared)
    z = x * scale[:, :, None] + (beta - _wide(mean, shared) * scale)[:, :, None]
    if arguments[1] is not None:
        z = z + skip.view(z.shape)
    return pade(z, numerator, denominator).to(x.dtype)


class _Pade(torch.autograd.Function):
    """P(x), any shape, keeping x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        if x.dtype not in _KERNELS:
            return pade(x, numerator, denominator)
        return pade_of(x, coefficients(numerator, denominator))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, numerator, denominator = saved = ctx.saved_tensors
        if torch.is_grad_enabled() or x.dtype not in _KERNELS:
            return _differentiated(pade, gradient, saved, ctx.needs_input_grad)
        rows = x.contiguous().view(1, -1, _columns(x.shape))
        d_x, _, _, _, d_c = affine_pade_backward(
            gradient.contiguous().view(rows.shape),
            rows,
            None,
            None,
            None,
            coefficients(numerator, denominator),
        )
        sign = torch.where(denominator >= 0, 1.0, -1.0)
        return d_x.view(x.shape), d_c[:6].to(numerator.dtype), (d_c[6:] * sign).to(denominator.dtype)


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


_KERNELS = (torch.float32, torch.bfloat16)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _columns(shape: Sequence[int]) -> int:
    """Length of rows to view a tensor as: a few hundred to a few ten thousand values where the shape has them."""
    columns = 1
    for size in reversed(shape):
        if columns >= 256:
            break
        columns *= size
    return max(columns, 1)


def _differentiated(
    function: Callable[..., Tensor],
    gradient: Tensor,
    saved: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients by autograd, for double precision and for second derivatives."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of their own: what one argument owes to another is not this function's business.
        views = [None if s is None else (s.view_as(s) if s.requires_grad else s.detach()) for s in saved]
        out = function(*views)
        asked = [v is not None and v.requires_grad and w for v, w in zip(views, wanted, strict=False)]
        inputs = [v for v, a in zip(views, asked, strict=True) if a and v is not None]
        found = iter(torch.autograd.grad(out, inputs, gradient, create_graph=create))
    return tuple(next(found) if a else None for a in asked)

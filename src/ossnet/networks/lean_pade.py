"""Padé units that keep their input alone, with the normalisation and the addition before them.

Parameters, batch statistics and gradients are those of the plain operations, up to rounding. Second derivatives work,
through plain tensor operations.

Letters: B volumes, C channels, N locations or rows of voxels, F features or columns of voxels.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from ossnet.networks.kernels import affine_pade, affine_pade_backward, coefficients, pade_of
from ossnet.networks.normalisation import BatchNorm3d, MomentsNorm, batch_moments, is_distributed
from ossnet.networks.pade import Pade, pade

Shared = Literal["all", "last", "channels"]
"""Which values have a mean and variance in common: all, those of each of the last axis, or of each channel."""

_KERNELS = (torch.float32, torch.bfloat16)
"""What the fused kernels compute; other types go through plain operations."""


def lean_pade(
    x: Float[Tensor, "*shape"], numerator: Float[Tensor, "6"], denominator: Float[Tensor, "4"]
) -> Float[Tensor, "*shape"]:
    """`pade` that keeps its input only."""
    out: Tensor = _Pade.apply(x, numerator, denominator)  # type: ignore[no-untyped-call]
    return out


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
    values = torch.full((), x.numel() / mean.numel(), dtype=torch.float64, device=x.device)
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
        rows = x.contiguous().view(1, -1, columns(x.shape))
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


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def columns(shape: Sequence[int]) -> int:
    """Length of rows to view a tensor as: a few hundred to a few ten thousand values where the shape has them."""
    length = 1
    for size in reversed(shape):
        if length >= 256:
            break
        length *= size
    return max(length, 1)


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

"""The first half of an encoder block, one volume of the batch at a time, keeping its input only.

The first convolution of a full-size batch is the largest tensor of a training step: 4 volumes of 256³ voxels
and 8 channels are 2.1 GB, and libraries that lay channels out in blocks of 16 make copies of twice that. Here
one volume's share exists at a time. Its convolution is computed four times instead of once (statistics, answer,
and two passes back), which costs a few percent of a step that also asks 2^14 locations a volume.

Letters: B volumes, C channels in, D channels out, X Y Z voxels.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ossnet.networks.kernels import affine_pade, affine_pade_backward, coefficients
from ossnet.networks.normalisation import BatchNorm3d, is_distributed
from ossnet.networks.pade import Pade

LARGE = 1 << 27
"""Values of the convolution's result from which on this pays: 0.5 GB in float32."""


def streams(convolution: nn.Conv3d, norm: BatchNorm3d, x: Float[Tensor, "B C X Y Z"]) -> bool:
    """Whether the first half of a block is computed one volume at a time for this input."""
    values = x.shape[0] * convolution.out_channels * x.shape[2] * x.shape[3] * x.shape[4]
    even = all(n % 2 == 0 for n in x.shape[2:])
    return values >= LARGE and even and norm.training and torch.is_grad_enabled()


def pooled_pade(
    x: Float[Tensor, "B C X Y Z"], convolution: nn.Conv3d, norm: BatchNorm3d, unit: Pade
) -> Float[Tensor, "B D X/2 Y/2 Z/2"]:
    """AvgPool(P(BN(conv(x)))) in training mode, even sizes; the running averages move once.

    Differentiable once. float32 and bfloat16, as autocast asks.
    """
    kind = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
    out: Tensor = _PooledPade.apply(  # type: ignore[no-untyped-call]
        x,
        convolution.weight,
        norm.weight,
        norm.bias,
        unit.weight_numerator,
        unit.weight_denominator,
        norm,
        kind,
    )
    return out


class _PooledPade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        numerator: Tensor,
        denominator: Tensor,
        norm: BatchNorm3d,
        kind: torch.dtype,
    ) -> Tensor:
        mean, variance, values = _moments(x, weight, kind)
        _move_averages(norm, mean, variance, values)
        inverse = torch.rsqrt(variance + norm.eps)
        ctx.save_for_backward(x, weight, gamma, beta, numerator, denominator, mean, inverse)
        ctx.kind, ctx.values = kind, values
        scale, shift = _affine(gamma, beta, mean, inverse)
        c = coefficients(numerator, denominator)
        b, _, *size = x.shape
        out = torch.empty(b, len(weight), *(n // 2 for n in size), dtype=kind, device=x.device)
        for place in range(b):
            h = _convolved(x, place, weight, kind)
            rows = h[0].flatten(2)  # (D, X, Y Z)
            wide = rows.shape[2]
            affine_pade(rows, _row(scale, wide), _row(shift, wide), None, c, rows)
            out[place] = F.avg_pool3d(h, 2)[0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, gamma, beta, numerator, denominator, mean, inverse = ctx.saved_tensors
        scale, shift = _affine(gamma, beta, mean, inverse)
        c = coefficients(numerator, denominator)
        kind, b = ctx.kind, len(x)
        d = len(weight)

        def through_unit(place: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            """Convolution, its gradient where mean and variance are constants, and the sums behind it."""
            h = _convolved(x, place, weight, kind)
            wide = F.interpolate(gradient[place : place + 1].to(kind) / 8, scale_factor=2.0, mode="nearest")
            rows, above = (t[0].flatten(2) for t in (h, wide))
            columns = rows.shape[2]
            found = affine_pade_backward(above, rows, _row(scale, columns), _row(shift, columns), None, c)
            d_h, d_scale, d_shift, _, d_c = found
            times_h, alone = (cast(Tensor, t).sum(1, dtype=torch.float64) for t in (d_scale, d_shift))
            return h, d_h.view(h.shape), times_h, alone, d_c

        # First what the whole batch owes to its mean and variance, then the gradients of each volume.
        with_h = torch.zeros(d, dtype=torch.float64, device=x.device)
        alone = torch.zeros_like(with_h)
        d_units = torch.zeros(10, dtype=torch.float64)
        for place in range(b):
            _, _, times_h, sums, d_c = through_unit(place)
            with_h += times_h
            alone += sums
            d_units += d_c.double().cpu()
        d_gamma = (with_h - mean * alone) * inverse
        everywhere = torch.stack([alone, d_gamma])
        if is_distributed():
            dist.all_reduce(everywhere)
        # d_h = scale · (dz - mean(dz) - ĥ · mean(dz · ĥ)), ĥ = (h - mean) · inverse
        wide_scale = gamma.double() * inverse
        slope = wide_scale * inverse * everywhere[1] / ctx.values
        offset = wide_scale * everywhere[0] / ctx.values - slope * mean
        slope, offset = (-t.to(torch.float32).view(-1, 1, 1, 1) for t in (slope, offset))
        d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight)
        for place in range(b):
            h, d_h, _, _, _ = through_unit(place)
            if kind == torch.float32:
                d_h.addcmul_(h, slope).add_(offset)
            else:
                d_h = d_h.float().addcmul_(h.float(), slope).add_(offset).to(kind)
            del h
            into, of_weight, _ = torch.ops.aten.convolution_backward(
                d_h, x[place : place + 1].to(kind), weight.to(kind), None, [1, 1, 1], [1, 1, 1], [1, 1, 1], False,
                [0, 0, 0], 1, [d_x is not None, True, False],
            )  # fmt: skip
            d_weight += of_weight
            if d_x is not None:
                d_x[place] = into[0]
        sign = torch.where(denominator >= 0, 1.0, -1.0)
        d_units = d_units.to(x.device)
        return (
            d_x, d_weight, d_gamma.to(gamma.dtype), alone.to(beta.dtype), d_units[:6].to(numerator.dtype),
            d_units[6:].to(denominator.dtype) * sign, None, None,
        )  # fmt: skip


def _convolved(x: Tensor, place: int, weight: Tensor, kind: torch.dtype) -> Tensor:
    """The convolution of one volume (1, D, X, Y, Z), contiguous."""
    with torch.autocast(x.device.type, enabled=False):
        return F.conv3d(x[place : place + 1].to(kind), weight.to(kind), padding=1).contiguous()


def _moments(x: Tensor, weight: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance (D,) of the global batch's convolution, float64, and the values behind each."""
    means, variances = [], []
    for place in range(len(x)):
        # One channel at a time: half precision is summed in float32, whose copy is as large as the rest.
        channels = _convolved(x, place, weight, kind)[0]
        both = [torch.var_mean(channel.float(), correction=0) for channel in channels]
        variances.append(torch.stack([v for v, _ in both]).double())
        means.append(torch.stack([m for _, m in both]).double())
    local = float(x[0, 0].numel())
    mean, variance = torch.stack(means), torch.stack(variances)
    packed = torch.cat([mean.sum(0) * local, mean.new_tensor([local * len(x)])])
    if is_distributed():
        dist.all_reduce(packed)
    values = float(packed[-1])
    whole = packed[:-1] / values
    spread = (local * (variance + (mean - whole).square())).sum(0)
    if is_distributed():
        dist.all_reduce(spread)
    return whole, spread / values, values


def _move_averages(norm: BatchNorm3d, mean: Tensor, variance: Tensor, values: float) -> None:
    unbiased = variance * (values / (values - 1))
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
    norm.num_batches_tracked.add_(1)


def _affine(gamma: Tensor, beta: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    scale = gamma.double() * inverse
    return scale.float(), (beta.double() - mean * scale).float()


def _row(values: Tensor, columns: int) -> Tensor:
    """One value a channel as the kernels take it: (D, columns)."""
    return values[:, None].expand(-1, columns).contiguous()

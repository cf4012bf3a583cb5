"""Batch statistics of the global batch, on any device (SPEC §2, §7.7, §7.25).

torch's SyncBatchNorm runs on CUDA only; here means and variances are all-reduced by plain tensor operations,
so two CPU processes (gloo) normalise exactly as one process does with the whole batch.

Letters: B volumes, C channels, N locations, F features, R latent length.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Statistics = Literal["scalar", "feature"]


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes. The gradient of a sum that every process uses is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Through apply, so that a second derivative is reduced as well.
        return _all_reduce_sum(gradients[0].contiguous())


def _all_reduce_sum(x: Tensor) -> Tensor:
    total: Tensor = _AllReduceSum.apply(x)  # type: ignore[no-untyped-call]
    return total


def is_distributed() -> bool:
    """True when several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Moments(NamedTuple):
    """Mean and biased variance of the global batch, and how many values went into each of them."""

    mean: Tensor
    variance: Tensor
    values: Tensor | int


def batch_moments(x: Float[Tensor, "..."], dims: tuple[int, ...]) -> Moments:
    """Mean and biased variance of `x` over `dims` and over all processes, differentiable.

    Processes may hold different numbers of values, none included. Half precision is summed in float32.

    Args:
        x: Values of this process.
        dims: Axes to reduce; the others must agree between the processes.

    Raises:
        ValueError: If the global batch has fewer than two values for each statistic.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    local = 1
    for dim in dims:
        local *= x.shape[dim]
    if not is_distributed():
        if local < 2:
            raise ValueError(f"batch statistics need at least two values, the batch has {local}")
        variance, mean = torch.var_mean(x, dims, correction=0)
        return Moments(mean, variance, local)

    if local == 0:
        # Multiplied by nothing below, but attached to the graph: every process must take part in each
        # reduction.
        mean = variance = x.sum(dims)
    else:
        variance, mean = torch.var_mean(x, dims, correction=0)
    # Chan's formula: moments of the parts give those of the whole without looking at the values again.
    # Float64 because a count above 2^24 has no exact float32.
    packed = torch.stack([torch.full_like(mean, local, dtype=torch.float64), local * mean.double()])
    count, weighted = _all_reduce_sum(packed)
    if bool((count < 2).any()):
        raise ValueError("batch statistics need at least two values in the global batch")
    whole = weighted / count
    spread = local * (variance.double() + (mean.double() - whole).square())
    return Moments(whole.to(x.dtype), (_all_reduce_sum(spread) / count).to(x.dtype), count.detach())


class _BatchStatistics(nn.Module):
    """Batch moments in training, their running averages in evaluation; buffers as in `nn.BatchNorm3d`."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def moments(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mean and biased variance to normalise with, one value a feature; in training the averages move."""
        if not self.training:
            return self.running_mean, self.running_var
        mean, variance, values = batch_moments(x, dims)
        mean, variance = mean.reshape(self.running_mean.shape), variance.reshape(self.running_var.shape)
        with torch.no_grad():
            unbiased = variance.detach() * (values / (values - 1))
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        return mean, variance


class BatchNorm3d(_BatchStatistics):
    """Batch normalisation of (B, C, X, Y, Z) over the global batch; otherwise as `nn.BatchNorm3d`."""

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps, momentum)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "B C X Y Z"]) -> Float[Tensor, "B C X Y Z"]:
        """Normalise each channel; shape and dtype are kept."""
        if self.training and is_distributed():
            mean, variance = self.moments(x, (0, 2, 3, 4))
            scale = self.weight * torch.rsqrt(variance + self.eps)
            shift = self.bias - mean * scale
            return (x * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)).to(x.dtype)
        # One process: torch's fused kernel does the same.
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )


class MomentsNorm(_BatchStatistics):
    """The statistics inside conditional batch normalisation: no affine part of its own.

    Args:
        features: F.
        statistics: "scalar": ONE mean and ONE variance over volumes, locations and features, as the released
            weights have it (SPEC §7.7); "feature": one pair a feature.
    """

    def __init__(self, features: int, statistics: Statistics = "scalar") -> None:
        super().__init__(1 if statistics == "scalar" else features)
        self.dims = (0, 1, 2) if statistics == "scalar" else (0, 1)

    def forward(self, x: Float[Tensor, "B N F"]) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
        """Mean and 1/sqrt(variance + eps), S = 1 or F values each."""
        mean, variance = self.moments(x, self.dims)
        return mean, torch.rsqrt(variance + self.eps)


class ConditionalBatchNorm(nn.Module):
    """CBN(x, l) = γ(l) · BN(x) + β(l): batch normalisation with an affine part made from a latent.

    Attributes are named as in the released state dict (SPEC §2).
    """

    def __init__(self, latent: int, features: int, statistics: Statistics = "scalar") -> None:
        super().__init__()
        self.linear_gamma = nn.Linear(latent, features)
        self.linear_beta = nn.Linear(latent, features)
        self.normalization = MomentsNorm(features, statistics)
        # At first plain batch normalisation, whatever the latent.
        nn.init.zeros_(self.linear_gamma.weight)
        nn.init.ones_(self.linear_gamma.bias)
        nn.init.zeros_(self.linear_beta.weight)
        nn.init.zeros_(self.linear_beta.bias)

    def forward(self, x: Float[Tensor, "B N F"], latent: Float[Tensor, "B R"]) -> Float[Tensor, "B N F"]:
        """Normalise and modulate; every location of a volume gets the same affine map."""
        mean, inverse_deviation = self.normalization(x)
        # γ and β are few and scale everything: not worth rounding to half precision under autocast.
        with torch.autocast(x.device.type, enabled=False):
            latent = latent.to(self.linear_gamma.weight.dtype)
            scale = self.linear_gamma(latent) * inverse_deviation  # (B, F)
            shift = self.linear_beta(latent) - mean * scale
        # One multiply-add over the locations: only x is kept for the backward pass.
        return torch.addcmul(shift[:, None], x.to(scale.dtype), scale[:, None]).to(x.dtype)

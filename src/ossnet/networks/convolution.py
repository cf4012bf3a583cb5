"""Convolutions on a CPU: right ones, by the fast library and in the layout that it is fast in.

In half precision, oneDNN's are wrong where a map is smaller than the kernel, or becomes one cell by a stride (PyTorch's
issue 169688): values on processors with AMX, and gradients of weights on those with AVX-512 alone, come from memory
that nothing was written to. They are computed in float32 here.

Without half precision torch leaves two things to be had on a CPU, both with the same result:

- Maps are convolved faster channels last, forwards and backwards: 1.5 to 2 times for few channels.
- A single map of few values goes to a general routine that is three to six times slower than oneDNN. As two halves,
  a batch of two, it goes to oneDNN like any larger one.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ossnet.networks.boxes import Triple

_Network = TypeVar("_Network", bound=nn.Module)

_SMALL = 20_480
"""Values, without the last axis, up to which torch does not call oneDNN for a single map."""


def convolve(
    x: Float[Tensor, "B C X Y Z"],
    weight: Float[Tensor, "D C k l m"],
    bias: Tensor | None,
    stride: Triple,
    padding: Triple,
) -> Float[Tensor, "B D S T U"]:
    """`F.conv3d`, on a CPU in float32 channels last."""
    if outgrown(x, weight.shape[2:], stride, padding):
        with torch.autocast("cpu", enabled=False):
            exact = F.conv3d(
                x.float(), weight.float(), None if bias is None else bias.float(), stride, padding
            )
        return exact.to(torch.bfloat16)
    if not _in_float32_on_cpu(x):
        return F.conv3d(x, weight, bias, stride, padding)
    # A clone: for a single channel `contiguous` would leave the strides, which say nothing of the layout then.
    weight = weight.clone(memory_format=torch.channels_last_3d)
    if _goes_to_general_routine(x, weight) and x.shape[2] >= 2 * stride[0]:
        return _in_halves(x, weight, bias, stride, padding)
    return F.conv3d(x, weight, bias, stride, padding)


def outgrown(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a map (B, C, …) would be convolved in half precision on a CPU, and is too small for it along an axis."""
    if x.device.type != "cpu" or not (x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")):
        return False
    return any(
        extent < size or (step > 1 and extent + 2 * margin - size < step)
        for extent, size, step, margin in zip(x.shape[2:], kernel, stride, padding, strict=True)
    )


class _Sure:
    """Convolutions in float32 where half precision would be wrong."""

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        plain: Any = super()
        if not outgrown(x, self.kernel_size, self.stride, self.padding):  # type: ignore[attr-defined]
            return plain.forward(x, *more)  # type: ignore[no-any-return]
        with torch.autocast("cpu", enabled=False):
            return plain.forward(x.float(), *more).to(torch.bfloat16)  # type: ignore[no-any-return]


class Conv2d(_Sure, nn.Conv2d): ...


class Conv3d(_Sure, nn.Conv3d): ...


class ConvTranspose2d(_Sure, nn.ConvTranspose2d): ...


class ConvTranspose3d(_Sure, nn.ConvTranspose3d): ...


_SURE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
}


def sure(network: _Network) -> _Network:
    """A network, with torch's convolutions in it, which others built, become those of this module."""
    for module in network.modules():
        if type(module) in _SURE:
            module.__class__ = _SURE[type(module)]
    return network


def _goes_to_general_routine(x: Tensor, weight: Tensor) -> bool:
    return prod(x.shape[:4]) <= _SMALL and len(x) == 1 and min(weight.shape[3:]) <= 3


def _in_float32_on_cpu(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _in_halves(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple) -> Tensor:
    """Both halves of the output along the first axis, each from the input that it reads."""
    extent, step, margin = weight.shape[2], stride[0], padding[0]
    outputs = (x.shape[2] + 2 * margin - extent) // step + 1
    half = -(-outputs // 2)
    reads = (half - 1) * step + extent
    after = half * step + reads - margin - x.shape[2]
    # Negative where the last voxels are read by no output.
    wide = F.pad(x, (0, 0, 0, 0, margin, after))
    halves = torch.cat([wide[:, :, :reads], wide[:, :, half * step :]])
    out = F.conv3d(halves, weight, bias, stride, (0, *padding[1:]))
    return torch.cat(out.chunk(2), dim=2)[:, :, :outputs]

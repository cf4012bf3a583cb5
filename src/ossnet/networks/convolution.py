"""3D convolutions on a CPU, by the fast library and in the layout that it is fast in.

Without half precision torch leaves two things to be had on a CPU, both with the same result:

- Maps are convolved faster channels last, forwards and backwards: 1.5 to 2 times for few channels.
- A single map of few values goes to a general routine that is three to six times slower than oneDNN. As two halves,
  a batch of two, it goes to oneDNN like any larger one.
"""

from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ossnet.networks.boxes import Triple

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
    if not _in_float32_on_cpu(x):
        return F.conv3d(x, weight, bias, stride, padding)
    # A clone: for a single channel `contiguous` would leave the strides, which say nothing of the layout then.
    weight = weight.clone(memory_format=torch.channels_last_3d)
    if _goes_to_general_routine(x, weight) and x.shape[2] >= 2 * stride[0]:
        return _in_halves(x, weight, bias, stride, padding)
    return F.conv3d(x, weight, bias, stride, padding)


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

"""The encoder's pass over one scan: in slabs that fit the memory, normalisation folded, Padé units in place.

Letters: C, D channels, X Y Z voxels of a block's input. Batch of one.
"""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ossnet.data.preparation import reduce_by_two
from ossnet.networks.encoder import Encoder, Encoding, OutputMapping, ResidualBlock3d
from ossnet.networks.kernels import coefficients_of, pade_
from ossnet.networks.normalisation import BatchNorm3d
from ossnet.networks.pade import Pade
from ossnet.volume import Shape

SLAB_BYTES = 1 << 26
"""Working memory of a slab without a grant: larger ones are no faster on a CPU."""


def encode(encoder: Encoder, image: Float[Tensor, "C SX SY SZ"], memory: int | None = None) -> Encoding:
    """What `encoder` in evaluation mode says about a scan.

    Args:
        image: Full resolution; halved here (SPEC §1).
        memory: Bytes for the working memory of a slab; the blocks' outputs come on top (`encoding_bytes`).

    Raises:
        ValueError: If the image does not have the encoder's size.
    """
    expected = tuple(n << (len(encoder.blocks) + 1) for n in encoder.grid)
    if tuple(image.shape[1:]) != expected:
        raise ValueError(f"the encoder takes scans of {expected} voxels, not {tuple(image.shape[1:])}")
    return encode_halved(encoder, reduce_by_two(image), memory)


def encode_halved(
    encoder: Encoder, halved: Float[Tensor, "C HX HY HZ"], memory: int | None = None
) -> Encoding:
    """`encode` of a scan at half its resolution, as the encoder sees it."""
    with torch.no_grad():
        x, outputs = halved[None], []
        for i, block in enumerate(encoder.blocks):
            x = _block(cast(ResidualBlock3d, block), x, memory)
            if encoder.output_mappings is not None:
                outputs.append(_sequence(cast(OutputMapping, encoder.output_mappings[i]), x))
        latent = _sequence(encoder.final_mapping, torch.cat(outputs, 1) if outputs else x)
        head = encoder.segmentation_mapping
        return Encoding(latent.flatten(2), None if head is None else head(x))


def encoding_bytes(encoder: Encoder, shape: Shape) -> int:
    """Memory that the pass holds beside a slab: the halved scan, and input and output of a block."""
    first = cast(nn.Conv3d, cast(ResidualBlock3d, encoder.blocks[0]).main_mapping[0])
    voxels = shape[0] * shape[1] * shape[2]
    return 4 * voxels // 8 * first.in_channels + 4 * voxels // 64 * first.out_channels


def slab_planes(channels: int, width: int, planes: int, area: int, memory: int | None) -> int:
    """Output planes of a block at once.

    Args:
        channels, width: C and D.
        planes: X / 2.
        area: Y · Z.
        memory: Bytes, None for `SLAB_BYTES`.
    """
    granted = SLAB_BYTES if memory is None else memory
    return max(min(granted // plane_bytes(channels, width, area), planes), 1)


def plane_bytes(channels: int, width: int, area: int) -> int:
    """Working memory of a block for each of its output planes; see `slab_planes`."""
    # The input and its padded copy, the convolution's result and two more in the library's own layout.
    return 2 * area * 4 * (2 * channels + 3 * max(width, 16))


def _block(
    block: ResidualBlock3d, x: Float[Tensor, "1 C X Y Z"], memory: int | None
) -> Float[Tensor, "1 D U V W"]:
    convolution, second = cast(nn.Conv3d, block.main_mapping[0]), cast(nn.Conv3d, block.main_mapping[5])
    first = _folded(convolution, cast(BatchNorm3d, block.main_mapping[1]))
    last = _folded(second, cast(BatchNorm3d, block.main_mapping[6]))
    inner, outer = coefficients_of(block.main_mapping[2]), coefficients_of(block.final_activation)
    channels, (whole, y, z) = x.shape[1], x.shape[2:]
    planes, width = whole // 2, convolution.out_channels
    out = x.new_empty(1, width, planes, y // 2, z // 2)
    # Without a grant a GPU takes all planes at once.
    whole_at_once = memory is None and x.device.type != "cpu"
    step = planes if whole_at_once else slab_planes(channels, width, planes, y * z, memory)
    for start in range(0, planes, step):
        stop = min(start + step, planes)
        # Pooled planes that the second convolution reads, and the planes of the input behind them.
        low, high = max(start - 1, 0), min(stop + 1, planes)
        h = _convolved(_planes(x, 2 * low - 1, 2 * high + 1), *first)
        h = F.avg_pool3d(pade_(h, inner), 2)
        h = _convolved(_planes(h, start - 1 - low, stop + 1 - low), *last)
        h += block.residual_mapping(F.avg_pool3d(x[:, :, 2 * start : 2 * stop], 2))
        out[:, :, start:stop] = pade_(h, outer)
    return out


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3³ convolution, padded along Y and Z only."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        # By itself torch takes oneDNN only from some size of C · X · Y on; below, it is four times slower.
        out: Tensor = torch.mkldnn_convolution(x, weight, bias, (0, 1, 1), (1, 1, 1), (1, 1, 1), 1)
        return out
    return F.conv3d(x, weight, bias, padding=(0, 1, 1))


def _planes(x: Tensor, start: int, stop: int) -> Tensor:
    """Planes start … stop - 1 along X, zeros where there are none."""
    inside = x[:, :, max(start, 0) : min(stop, x.shape[2])]
    before, after = max(-start, 0), max(stop - x.shape[2], 0)
    return F.pad(inside, (0, 0, 0, 0, before, after)) if before or after else inside


def _sequence(modules: nn.Sequential, x: Tensor) -> Tensor:
    """Modules one after the other, Padé units in place."""
    for module in modules:
        x = pade_(x.contiguous(), coefficients_of(module)) if isinstance(module, Pade) else module(x)
    return x


def _folded(convolution: nn.Conv3d, norm: BatchNorm3d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution without bias and the normalisation behind it."""
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    bias = norm.bias.double() - norm.running_mean.double() * scale
    weight = convolution.weight.double() * scale.view(-1, 1, 1, 1, 1)
    return weight.to(convolution.weight.dtype), bias.to(convolution.weight.dtype)

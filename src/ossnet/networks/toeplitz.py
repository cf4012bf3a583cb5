"""Convolutions inside a patch as matrix products, exactly.

A 7³ convolution with zero padding inside a 7³ patch is a fixed matrix: block Toeplitz, cut off at the patch's
border. Along one axis it can also be taken apart into 14 smaller products by a discrete Fourier transform.

Letters: O output channels, C input channels, E edge of the patch and of the kernel (odd).
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def toeplitz(weight: Float[Tensor, "O C *kernel"]) -> Float[Tensor, "I J"]:
    """The matrix M with patches.flatten(1) @ M = convolution(patches).flatten(1), "same" zero padding.

    Differentiable any number of times. The patch is as large as the kernel, of any number of axes.

    Returns:
        (C · E^d, O · E^d): rows in the order of (C, *patch), columns in that of (O, *patch).
    """
    o, c, *kernel = weight.shape
    edge, axes = kernel[0], len(kernel)
    size = edge**axes
    # One row a tap, one more of zeros; an embedding, because its backward pass is the fastest sum by index.
    table = F.pad(weight.reshape(o * c, size).T, (0, 0, 0, 1))
    entries = F.embedding(_taps(edge, axes, weight.device), table)  # (in, out, O * C)
    return entries.view(size, size, o, c).permute(3, 0, 2, 1).reshape(c * size, o * size)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # kept for trainings too
def _taps(edge: int, axes: int, device: torch.device) -> Tensor:
    """(E^d, E^d): the tap that leads from a patch voxel to an output voxel, E^d for none."""
    index = torch.arange(edge)
    along = index[:, None] - index[None, :] + edge // 2  # (in, out) of one axis
    valid = (along >= 0) & (along < edge)
    tap = torch.zeros(1, 1, dtype=torch.long)
    inside = torch.ones(1, 1, dtype=torch.bool)
    for _ in range(axes):
        n = len(tap) * edge
        tap = (tap[:, None, :, None] * edge + along[None, :, None, :]).reshape(n, n)
        inside = (inside[:, None, :, None] & valid[None, :, None, :]).reshape(n, n)
    return torch.where(inside, tap, edge**axes).to(device)


class Spectrum(NamedTuple):
    """A zero padded correlation of two rows of 7 values as 14 products: back @ ((into @ x) * (taps @ w)).

    A real DFT of length 10: the 13 values of the full correlation overlap only where they are not wanted. Its
    two real frequencies take one product each, the four complex ones three (Gauss).
    """

    into: Tensor
    """(14, 7) float64."""
    taps: Tensor
    """(14, 7) float64."""
    back: Tensor
    """(7, 14) float64."""


@functools.cache
def spectrum() -> Spectrum:
    """The constants, computed once."""
    n, edge = 10, 7
    into, taps, back = [], [], []
    position = torch.arange(edge, dtype=torch.float64)
    # c[m] = sum_u x[u] w[u - m]; the output at v takes tap u - v + 3, so m = v - 3.
    place = position - 3
    for frequency in range(n // 2 + 1):
        angle = 2 * math.pi * frequency / n
        real, imaginary = (angle * position).cos(), -(angle * position).sin()  # of x and of w
        share = (1 if frequency in (0, n // 2) else 2) / n
        out_real, out_imaginary = share * (angle * place).cos(), -share * (angle * place).sin()
        if frequency in (0, n // 2):
            into.append(real)
            taps.append(real)
            back.append(out_real)
            continue
        # (a + ib)(c + ie) with a, b of x and c, -e of w: k1 = c(a + b), k2 = a(e - c), k3 = b(c + e).
        conjugate = -imaginary
        into += [real + imaginary, real, imaginary]
        taps += [real, conjugate - real, real + conjugate]
        back += [out_real + out_imaginary, out_imaginary, -out_real]
    return Spectrum(torch.stack(into), torch.stack(taps), torch.stack(back, 1))


def spectral_toeplitz(weight: Float[Tensor, "O C 7 7 7"]) -> Float[Tensor, "14 I J"]:
    """For each of the 14 products along the first axis, the matrix of the other two axes, float64.

    Returns:
        (14, C · 49, O · 49): rows in the order of (C, 7, 7), columns in that of (O, 7, 7).
    """
    mixed = torch.einsum("fk,ockyz->focyz", spectrum().taps.to(weight.device), weight.double())
    return torch.stack([toeplitz(part) for part in mixed])

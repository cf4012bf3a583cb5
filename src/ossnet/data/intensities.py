"""Changes of a training crop's values: blur, low resolution, noise, contrast, brightness, gamma."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ossnet.data.crops import CropSettings


def change_intensities(
    image: Float[Tensor, "C A B D"], settings: CropSettings, rng: np.random.Generator
) -> Float[Tensor, "C A B D"]:
    """Blur, low resolution, noise, contrast, brightness and gamma, each with its own probability."""

    def happens(probability: float) -> bool:
        return bool(rng.random() < probability * settings.intensity)

    def factor_within(most: float) -> float:
        return float(np.exp(settings.contrast * rng.uniform(-most, most)))

    mm = np.array(settings.spacing)
    close = mm < 2 * mm.min()
    if happens(0.1):
        image = blur(image, tuple(float(rng.uniform(0.4, 1.0)) if c else 0.0 for c in close))
    if happens(0.1):
        factor = rng.uniform(0.5, 1.0)
        image = low_resolution(image, tuple(factor if c else 1.0 for c in close))
    if happens(0.15):
        noise = rng.standard_normal(tuple(image.shape), dtype=np.float32)
        image = image + torch.from_numpy(noise) * float(rng.uniform(0.02, 0.3))
    for channel in range(len(image)):
        if happens(0.3):
            factor, shift = factor_within(0.3), settings.contrast * float(rng.uniform(-0.3, 0.3))
            image = _with_channel(image, channel, image[channel] * factor + shift)
        if happens(0.3):
            exponent = factor_within(0.4)
            image = _with_channel(
                image, channel, gamma(image[channel], exponent, invert=bool(rng.random() < 0.25))
            )
    return image


def _with_channel(image: Tensor, channel: int, values: Tensor) -> Tensor:
    if len(image) == 1:
        return values[None]
    return torch.cat([image[:channel], values[None], image[channel + 1 :]])


def gamma(image: Float[Tensor, "A B D"], exponent: float, invert: bool) -> Float[Tensor, "A B D"]:
    """A power of the values scaled to [0, 1], then the mean and standard deviation of before."""
    if invert:
        return -gamma(-image, exponent, invert=False)
    low, high = image.aminmax()
    extent = high - low
    if float(extent) < 1e-6:
        return image
    out = ((image - low) / extent).pow(exponent)
    mean, out = image.mean(), out - out.mean()
    # On a CPU in half the time that `torch.std_mean` takes.
    before, after = (image - mean).norm(), out.norm().clamp(min=1e-6)
    return torch.addcmul(mean, out, before / after)


def blur(image: Float[Tensor, "C A B D"], sigma: tuple[float, ...]) -> Float[Tensor, "C A B D"]:
    """Gaussian blur with a standard deviation in voxels per axis (at most 1: three taps a side suffice)."""
    out = image
    for axis, s in enumerate(sigma, start=1):
        if s <= 0 or image.shape[axis] < 2:
            continue
        taps = np.exp(-0.5 * (np.arange(4) / s) ** 2)
        taps = taps / (taps[0] + 2 * taps[1:].sum())
        n = image.shape[axis]
        total = out * float(taps[0])
        for distance in (1, 2, 3):
            for sign in (-1, 1):
                index = (torch.arange(n) + sign * distance).clamp(0, n - 1)
                total = total + out.index_select(axis, index) * float(taps[distance])
        out = total
    return out


def low_resolution(image: Float[Tensor, "C A B D"], factor: tuple[float, ...]) -> Float[Tensor, "C A B D"]:
    """As if scanned at `factor` times the resolution per axis, and interpolated back."""
    shape = tuple(image.shape[1:])
    small = tuple(max(1, round(n * f)) for n, f in zip(shape, factor, strict=True))
    # Both ways between centres of voxels: to the nearest voxel the image would move against its labels.
    down = F.interpolate(image[None], small, mode="trilinear", align_corners=False)
    return F.interpolate(down, shape, mode="trilinear", align_corners=False)[0]

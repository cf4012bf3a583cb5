"""Augmentation as in the paper (SPEC §3): flips, brightness, noise, each with probability one half, in this order.

A plan is drawn first, from the example's own generator, and carried out later where the voxels lie, so that a
scan is copied once at most and the same plan reaches volume, patches, labels and border band.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ossnet.data.sampling import NO_FLIPS, Flips


@dataclass(frozen=True)
class Augmentation:
    """What happens to one example.

    Attributes:
        flips: Axes of the (oriented) scan that are mirrored.
        brightness: Per channel, the factor f of x + f * max(x); None for none.
        noise_std: Standard deviation of the added noise, in units of the normalised scan; 0 for none.
        noise_seed: Seed of the noise field.
    """

    flips: Flips = NO_FLIPS
    brightness: tuple[float, ...] | None = None
    noise_std: float = 0.0
    noise_seed: int = 0


def draw(
    rng: np.random.Generator,
    channels: int,
    probability: float = 0.5,
    flip_axes: tuple[int, ...] = (0, 1),
    brightness: float = 0.15,
    noise_std: float = 0.15,
) -> Augmentation:
    """Draw a plan.

    Args:
        flip_axes: Axes that may be mirrored; one or more distinct ones are (released: 1 or 2 of {H, W}).
        brightness: Largest absolute factor.
    """
    flips = [False, False, False]
    if flip_axes and rng.random() < probability:
        many = int(rng.integers(1, len(flip_axes) + 1))
        for axis in rng.permutation(flip_axes)[:many]:
            flips[axis] = True
    factors = None
    if brightness > 0 and rng.random() < probability:
        factors = tuple(float(f) for f in rng.uniform(-brightness, brightness, channels))
    std = noise_std if noise_std > 0 and rng.random() < probability else 0.0
    seed = int(rng.integers(0, 2**62))
    return Augmentation((flips[0], flips[1], flips[2]), factors, std, seed)


def apply_intensity(
    image: Float[Tensor, "C X Y Z"], plan: Augmentation, top: Float[np.ndarray, " C"]
) -> Float[Tensor, "C X Y Z"]:
    """Brightness and noise on a normalised scan, before padding or resizing.

    Args:
        top: The largest normalised value of each channel.
    """
    if plan.brightness is not None:
        shift = image.new_tensor(np.asarray(plan.brightness) * top)
        image = image + shift.view(-1, 1, 1, 1)
    if plan.noise_std > 0:
        generator = torch.Generator(image.device).manual_seed(plan.noise_seed)
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        image = noise.mul_(plan.noise_std).add_(image)
    return image

"""The training-time module asked chunk by chunk: the reference for the fused engine, on any device."""

from functools import partial

import torch
from jaxtyping import Float, Num
from torch import Tensor

from ossnet.data.patches import PatchSource, Pool
from ossnet.field.engine.answer import clamped, coarse_logits
from ossnet.field.memory import halving
from ossnet.networks.encoder import Encoding
from ossnet.networks.machine import exact_float32
from ossnet.networks.ossnet import OSSNet
from ossnet.volume import Shape

SMALLEST = 16


class PlainAnswer:
    """`OSSNet.decode` as an `Answer` (see there).

    Args:
        network: In evaluation mode, on the device of the image.
        image: (C, *S) float32, normalised and fitted.
        encoding: What the encoder says about it, batch of one.
        chunk: Locations at once.
        large_pool: See `PatchSource`.
    """

    dense = False
    encoding_bytes = 0

    def __init__(
        self,
        network: OSSNet,
        image: Float[Tensor, "C X Y Z"],
        encoding: Encoding,
        chunk: int = 4096,
        large_pool: Pool = "avg",
    ) -> None:
        self.network, self.latent, self.chunk = network, encoding.latent, chunk
        self.shape: Shape = network.spec.shape
        self.classes = network.spec.classes
        self.coarse = coarse_logits(encoding.segmentation, self.classes)
        self.patches = PatchSource(image, network.spec.patches, large_pool)
        self.bytes_per_location = plain_bytes_per_location(network)
        self.fixed_bytes = 4 * (self.latent.numel() + padded_voxels(network, image))

    @torch.no_grad()
    def __call__(self, locations: Num[Tensor, "N 3"]) -> Float[Tensor, "N *K"]:
        """Logits at locations; see `Answer`."""
        locations = clamped(locations.to(self.latent.device), self.shape)
        out: list[Tensor] = []
        done = 0
        while done < len(locations):
            rest = locations[done:]
            logits, self.chunk = halving(partial(self._first, rest), self.chunk, SMALLEST)
            out.append(logits)
            done += len(logits)
        if not out:
            shape = (0,) if self.classes == 1 else (0, self.classes)
            return torch.zeros(shape, device=self.latent.device)
        return torch.cat(out)

    def _first(self, locations: Tensor, size: int) -> Tensor:
        locations = locations[:size]
        # Products over fewer rows than a tile add up in another order: short rounds are filled up, so that an
        # answer never depends on what else is asked.
        missing = SMALLEST - len(locations)
        padded = torch.cat([locations, locations[-1:].expand(missing, 3)]) if missing > 0 else locations
        patches = self.patches(padded)
        with exact_float32(self.latent.device):
            logits = self.network.decode(
                padded[None].float(), None if patches is None else patches[None], self.latent
            )
        return logits[0, : len(locations)].float()


def padded_voxels(network: OSSNet, image: Tensor) -> int:
    """Values in the padded copies that `PatchSource` keeps."""
    c, x, y, z = image.shape
    small = (x + 7) * (y + 7) * (z + 7) if network.spec.patches != "none" else 0
    large = (x + 13) * (y + 13) * (z + 13) if network.spec.patches == "small+large" else 0
    return c * (small + large)


def plain_bytes_per_location(network: OSSNet) -> int:
    """Bytes for each location of a chunk: patches and their features, and a few copies of a block's width."""
    c = network.spec.patch_channels
    patch = 343 * (3 * c + 4 * max(c // 2, 1))
    return 4 * (patch + 6 * network.spec.width + 2 * network.spec.classes) + 8 * 49

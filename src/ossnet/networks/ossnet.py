"""OSS-Net: a scan is encoded once, then asked at any location (paper section 3, SPEC §2).

Letters: B volumes, C channels, N locations, K classes, R latent rows, L latent length.
"""

from itertools import pairwise
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from ossnet.networks.decoder import Decoder
from ossnet.networks.encoder import Encoder, Encoding
from ossnet.networks.normalisation import BatchNorm3d
from ossnet.networks.variants import NetworkSpec

__all__ = ["Encoding", "OSSNet", "Prediction"]


class Prediction(NamedTuple):
    """What a training step needs."""

    logits: Tensor
    """(B, N) for binary, (B, N, K) for K classes."""
    segmentation: Tensor | None
    """Logits of the segmentation head (B, 1 or K-1, *grid), without a head None."""


class OSSNet(nn.Module):
    """The networks of the paper, by declaration: O-Net and variants A to D.

    Parameters and buffers are named as in the released state dicts, so that those load with `strict=True`.
    Everything returned is a logit: apply a sigmoid to binary answers and to the head, a softmax over the last
    axis to K classes.

    The segmentation head is the paper's for one class: does this cell hold any of the structure? For K
    classes it has K-1 channels, one a foreground class, and asks the same of each. These are separate yes-or-
    no questions (sigmoid, binary cross-entropy): a cell of 32³ voxels holds several structures as a rule,
    which a softmax could not say. For K = 2 it is the binary head again, and where no channel answers yes a
    cell is background.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)

    def directions(self) -> list[Tensor]:
        """Weights whose size does not matter, because a normalisation follows; Muon may turn these."""
        rows = [list(m) for m in self.modules() if isinstance(m, nn.Sequential)]
        return [
            layer.weight
            for row in rows
            for layer, following in pairwise(row)
            if isinstance(layer, nn.Conv3d) and isinstance(following, BatchNorm3d)
        ]

    def encode(self, volume: Float[Tensor, "B C X Y Z"]) -> Encoding:
        """Encode scans at half of the full resolution, `spec.encoder_shape` voxels.

        Raises:
            ValueError: If the volume has another size.
        """
        encoding: Encoding = self.encoder(volume)
        return encoding

    def decode(
        self,
        locations: Float[Tensor, "B N 3"],
        patches: Float[Tensor, "B N D 7 7 7"] | None,
        latent: Float[Tensor, "B R L"],
    ) -> Float[Tensor, "B N *K"]:
        """Logits at locations: (B, N) for binary, (B, N, K) for K classes.

        Args:
            locations: Voxel indices on the full-resolution grid (`spec.shape`), fractions allowed.
            patches: D = `spec.patch_channels` channels of voxels around each location (SPEC §1 "Patches"), or
                None where that is 0.
            latent: From `encode`.
        """
        logits: Tensor = self.decoder(locations, patches, latent)
        return logits

    def forward(
        self,
        volume: Float[Tensor, "B C X Y Z"],
        locations: Float[Tensor, "B N 3"],
        patches: Float[Tensor, "B N D 7 7 7"] | None = None,
    ) -> Prediction:
        """Encode and decode in one call, as training does it."""
        latent, segmentation = self.encode(volume)
        return Prediction(self.decode(locations, patches, latent), segmentation)

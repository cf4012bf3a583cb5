"""The patch encoder: full-resolution voxels around a location → 343 local features (SPEC §2).

Letters: B volumes, N locations, C patch channels.
"""

from jaxtyping import Float
from torch import Tensor, nn

from ossnet.networks.convolution import Conv3d
from ossnet.networks.pade import Pade
from ossnet.networks.variants import PATCH_SIZE

LOCAL_FEATURES = PATCH_SIZE**3


class PatchEncoder(nn.Module):
    """Two 7³ convolutions inside the patch, zero padded at the patch's own border."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.mapping = nn.Sequential(
            Conv3d(channels, hidden, PATCH_SIZE, padding=PATCH_SIZE // 2),
            Pade(),
            nn.Dropout(p=0.0),  # never drops (SPEC §7.31); holds its place in the state dict's numbering
            Conv3d(hidden, 1, PATCH_SIZE, padding=PATCH_SIZE // 2),
            Pade(),
        )

    def forward(self, patches: Float[Tensor, "B N C 7 7 7"]) -> Float[Tensor, "B N 343"]:
        """Local features of each patch, in C order of its voxels."""
        b, n = patches.shape[:2]
        features: Tensor = self.mapping(patches.flatten(0, 1))
        return features.reshape(b, n, LOCAL_FEATURES)

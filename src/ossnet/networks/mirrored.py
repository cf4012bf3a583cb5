"""Networks that answer for a scan what others answer for the mirrored scan, mirrored back.

Nothing of the scan is copied for that: the default network's weights are mirrored instead (a few MB), so whoever asks,
in blocks, octrees or on a GPU, does not notice.
"""

from collections.abc import Sequence
from copy import copy, deepcopy

import torch
from torch import Tensor, nn

from ossnet.networks.multiscale import MultiscaleNetwork
from ossnet.networks.unet import UNet


def mirrorable(network: nn.Module) -> bool:
    """Whether `mirrored` knows how: not for the paper's variants, which hold the whole scan in one latent."""
    return isinstance(network, MultiscaleNetwork | UNet)


def mirrored(network: nn.Module, axes: Sequence[int]) -> nn.Module:
    """A network with the same weights that sees scans mirrored; U-Nets share them.

    The same to rounding where the strides divide the scan along these axes: cells are counted from its low border, or,
    in the mirror, from the high one.

    Args:
        network: For which `mirrorable` holds.
        axes: Of the scan: 0, 1, 2.
    """
    if isinstance(network, MultiscaleNetwork):
        out = deepcopy(network)
        _mirror_weights(out, axes)
        return out
    if isinstance(network, UNet):
        # Strided 3³ convolutions look from every second voxel on, so mirrored weights would see others.
        seeing = copy(network)
        seeing.mirror = tuple(sorted({*network.mirror} ^ {*axes}))
        return seeing
    raise TypeError(f"{type(network).__name__} cannot be mirrored")


@torch.no_grad()
def _mirror_weights(network: MultiscaleNetwork, axes: Sequence[int]) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.copy_(module.weight.flip([axis + 2 for axis in axes]))
    spec, decoder = network.spec, network.decoder
    if decoder.patch is not None:
        taps = decoder.patch.weight.view(-1, spec.channels, *spec.patch)
        decoder.patch.weight.copy_(taps.flip([axis + 2 for axis in axes]).flatten(1))
    # Offsets and positions are distances from centres: what lies to one side lies to the other.
    sampled = sum(stage.features for stage in spec.stages)
    places: Tensor = decoder.first.weight[:, sampled : sampled + spec.place_features]
    for axis in axes:
        places[:, axis::3] *= -1

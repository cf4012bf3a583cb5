"""Networks that see scans mirrored."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny

from ossnet.networks.mirrored import mirrorable, mirrored
from ossnet.networks.multiscale import MultiscaleNetwork, MultiscaleSpec, Stage, positions_in_scan
from ossnet.networks.unet import UNet, UNetSpec, segment_slices

AXES = st.lists(st.integers(0, 2), unique=True)


def anisotropic(position: bool, classes: int) -> MultiscaleNetwork:
    """Strides, kernels and patch that differ from axis to axis, and no weight that is zero."""
    stages = (
        Stage((2, 1, 1), (3, 3, 1), width=4, trunk=0, lateral=1, features=3),
        Stage((2, 2, 1), (3, 1, 3), width=6, trunk=1, lateral=0, features=4),
    )
    spec = MultiscaleSpec(2, classes, (0.5, 1.0, 2.0), stages, (5, 3, 1), 4, 8, 1, position=position)
    network = MultiscaleNetwork(spec)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


@settings(max_examples=20)
@given(AXES, st.booleans(), st.sampled_from([1, 3]), st.integers(0, 100))
def test_the_default_network_through_its_weights(
    axes: list[int], position: bool, classes: int, seed: int
) -> None:
    torch.manual_seed(seed)
    network, shape = anisotropic(position, classes), (16, 12, 5)
    volume = torch.randn(1, 2, *shape)
    locations = torch.rand(1, 60, 3) * (torch.tensor(shape) - 1)
    behind = locations.clone()
    behind[..., axes] = (torch.tensor(shape) - 1.0)[axes] - locations[..., axes]
    size = torch.tensor([shape]).float()
    told = [positions_in_scan(p, size) if position else None for p in (locations, behind)]
    dims = [axis + 2 for axis in axes]
    with torch.no_grad():
        logits, coarse = mirrored(network, axes)(volume, locations, told[0])
        wanted, wanted_coarse = network(volume.flip(dims), behind, told[1])
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(coarse, wanted_coarse.flip(dims), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["unet3d", "unet2d", "monai-unet"])
@pytest.mark.parametrize("axes", [(), (0,), (1, 2)])
def test_u_nets_through_the_scan(variant: Any, axes: tuple[int, ...]) -> None:
    pytest.importorskip("monai")
    torch.manual_seed(0)
    network = UNet(UNetSpec(variant=variant, channels=1, filters=(4, 8, 8), slice_axis=1)).eval()
    volume, dims = torch.randn(1, 1, 8, 9, 11), [axis + 2 for axis in axes]
    ask = segment_slices if variant == "unet2d" else lambda net, x: net(x)
    with torch.no_grad():
        found = ask(mirrored(network, axes), volume)
        torch.testing.assert_close(found, ask(network, volume.flip(dims)).flip(dims))
        # Twice is not at all.
        torch.testing.assert_close(ask(mirrored(mirrored(network, axes), axes), volume), ask(network, volume))


def test_the_papers_variants_hold_the_whole_scan() -> None:
    network = tiny.network("C")
    assert not mirrorable(network)
    with pytest.raises(TypeError, match="OSSNet cannot be mirrored"):
        mirrored(network, (0,))


def test_the_network_itself_stays() -> None:
    network = anisotropic(False, 1)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    mirrored(network, (0, 1))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())

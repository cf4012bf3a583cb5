"""The U-Net baselines."""

import builtins
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ossnet.errors import SettingsError
from ossnet.networks.unet import UNet, UNetSpec, segment_slices, to_slices

pytest.importorskip("monai")


@pytest.mark.parametrize(
    ("variant", "filters", "multiple"),
    [("unet3d", (8, 32, 128, 384), (8, 8, 8)), ("unet2d", (128, 256, 384, 512, 640), (16, 16))],
)
def test_filters_of_the_paper(variant: Any, filters: tuple[int, ...], multiple: tuple[int, ...]) -> None:
    spec = UNetSpec(variant=variant, channels=4)
    assert spec.filters == filters
    assert spec.multiple == multiple
    assert UNetSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with torch.device("meta"):
        network = UNet(spec)
    outputs = [m.conv.unit1.conv.out_channels for m in network.encoder]
    assert outputs == list(filters)
    assert [m.conv.unit1.conv.out_channels for m in network.decoder] == list(filters[-2::-1])
    kinds = {type(m).__name__ for m in network.modules() if "Norm" in type(m).__name__}
    assert kinds == {"GroupNorm"}


@settings(max_examples=8)
@given(st.tuples(*[st.integers(3, 13)] * 3), st.integers(1, 3))
def test_inputs_of_any_size(shape: tuple[int, int, int], classes: int) -> None:
    spec = UNetSpec(
        variant="unet3d", channels=2, classes=classes, filters=(4, 8, 8), strides=((2, 2, 1), (2, 2, 2))
    )
    assert spec.multiple == (4, 4, 2)
    network = UNet(spec)
    logits = network(torch.randn(2, 2, *shape))
    assert logits.shape == (2, classes, *shape)
    logits.square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.parameters())


def test_monais_own() -> None:
    """Its filters and strides, any size of input, and Muon only where a normalisation follows."""
    spec = UNetSpec(variant="monai-unet", channels=2, classes=3, strides=((2, 2, 1), *[(2, 2, 2)] * 3))
    assert spec.multiple == (16, 16, 8)
    assert UNetSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    network = UNet(spec)
    assert network(torch.randn(1, 2, 17, 20, 5)).shape == (1, 3, 17, 20, 5)
    turned = {id(p) for p in network.directions()}
    names = [n for n, p in network.named_parameters() if id(p) in turned]
    # Two in each of five units on the way down, one in each of three on the way up (the last has no normalisation).
    assert len(names) == 13
    assert not any("residual" in name for name in names)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_along_each_axis(axis: int) -> None:
    """As many slices as that axis has voxels (SPEC §7.35), each answered where it came from."""
    torch.manual_seed(0)
    network = UNet(UNetSpec(variant="unet2d", channels=2, filters=(4, 8), slice_axis=axis, classes=3)).eval()
    volume = torch.randn(2, 2, 5, 6, 7)
    assert to_slices(volume, axis).shape[0] == 2 * volume.shape[axis + 2]
    with torch.no_grad():
        dense = segment_slices(network, volume)
        assert dense.shape == (2, 3, 5, 6, 7)
        torch.testing.assert_close(segment_slices(network, volume, 3), dense)
        one = network(volume[1:].select(axis + 2, 4))[0]
    torch.testing.assert_close(dense[1].select(axis + 1, 4), one)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[dict[str, Any]] = [
        {"channels": 0},
        {"filters": (8,)},
        {"strides": ((2, 2),)},
        {"slice_axis": 3},
    ]
    for change in wrong:
        with pytest.raises(SettingsError):
            UNetSpec(**({"variant": "unet3d", "channels": 1} | change))
    with pytest.raises(SettingsError, match="unknown key"):
        UNetSpec.from_dict({"variant": "unet3d", "channels": 1, "filter": []})

    original = builtins.__import__

    def without_monai(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("monai"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_monai)
    with pytest.raises(SettingsError, match=r"ossnet\[baselines\]"):
        UNet(UNetSpec(variant="unet3d", channels=1))

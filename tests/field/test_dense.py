"""Dense networks behind the interface of a function of position."""

from math import prod
from typing import Any

import pytest
import torch

from ossnet.errors import ResourceError, SettingsError
from ossnet.field.engine.answer import Answer
from ossnet.field.engine.dense import DenseAnswer, prepare_unet
from ossnet.field.engine.prepare import prepare
from ossnet.field.engine.scan import Scan
from ossnet.networks.unet import UNet, UNetSpec
from ossnet.volume import Shape


def test_trilinear_between_voxels_and_exact_at_them() -> None:
    # A linear function is its own trilinear interpolation.
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (5, 6, 7)), indexing="ij")
    linear = axes[0] - 2 * axes[1] + 0.5 * axes[2]
    answer = DenseAnswer(torch.stack([linear, -linear]))
    assert isinstance(answer, Answer)
    inside = torch.rand(50, 3) * torch.tensor([4.0, 5.0, 6.0])
    expected = inside @ torch.tensor([1.0, -2.0, 0.5])
    torch.testing.assert_close(answer(inside), torch.stack([expected, -expected], 1))
    voxel = torch.tensor([[4, 5, 6], [0, 0, 0], [9, -3, 2]])
    assert answer(voxel)[:, 0].tolist() == [-3.0, 0.0, 5.0]  # the last one from the border


def test_nothing_asked() -> None:
    assert DenseAnswer(torch.zeros(1, 2, 2, 2))(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("window", [None, (16, 16, 8)])
def test_a_unet_is_looked_up(window: tuple[int, int, int] | None) -> None:
    pytest.importorskip("monai")
    torch.manual_seed(0)
    network = UNet(UNetSpec(variant="unet3d", channels=1, classes=3, filters=(4, 8))).eval()
    image = torch.randn(1, 18, 16, 10)
    answer = prepare(network, image, window=window)
    assert answer.shape == (18, 16, 10)
    assert answer.classes == 3
    if window is None:
        locations = torch.tensor([[3, 4, 5], [17, 0, 9]])
        with torch.no_grad():
            dense = network(image[None])[0]
        torch.testing.assert_close(answer(locations), torch.stack([dense[:, 3, 4, 5], dense[:, 17, 0, 9]]))


@pytest.mark.parametrize(
    ("variant", "window", "given", "padded"),
    [
        ("unet3d", (16, 16, 16), (4, 20, 4), (16, 20, 16)),
        ("unet3d", None, (9, 12, 15), (12, 12, 16)),
        ("unet2d", None, (9, 15, 5), (12, 16, 5)),
    ],
)
def test_what_a_scan_is_padded_with_takes_memory(
    variant: Any, window: Shape | None, given: Shape, padded: Shape
) -> None:
    pytest.importorskip("monai")
    network = UNet(UNetSpec(variant=variant, channels=1, filters=(4, 8, 8))).eval()
    less, more = (
        prepare_unet(network, Scan.of(torch.zeros(1, *shape)), window=window).encoding_bytes
        for shape in (given, padded)
    )
    # But for the map itself.
    assert less >= more - 4 * (prod(padded) - prod(given))


def test_a_grant_below_the_map_is_refused() -> None:
    pytest.importorskip("monai")
    network = UNet(UNetSpec(variant="unet3d", channels=1, filters=(4, 8)))
    with pytest.raises(ResourceError, match="at least"):
        prepare(network, torch.zeros(1, 16, 16, 16), memory=1000)
    with pytest.raises(SettingsError, match="channels"):
        prepare(network, torch.zeros(2, 16, 16, 16))

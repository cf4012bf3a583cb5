"""A GPU answers as the CPU does; where there is none, nothing is checked."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import FAMILIES, model, scan

from ossnet.field.engine.scan import Scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_label_maps_agree(family: str, classes: int) -> None:
    made, volume = model(family, classes), scan((23, 21, 18))
    points = np.random.default_rng(0).uniform(-1, 22, (5000, 3))
    cpu, gpu = (made.field(volume, device=device, precision="fp32") for device in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu.logits(points), cpu.logits(points), atol=1e-4, rtol=1e-4)
    found, expected = gpu.segment(), cpu.segment()
    assert found.evaluated == expected.evaluated
    assert (found.data != expected.data).mean() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_draws_nearly_the_same(family: str) -> None:
    made, volume = model(family, 1), scan((23, 21, 18))
    half = made.field(volume, device="cuda").segment()
    full = made.field(volume, device="cuda", precision="fp32").segment()
    assert (half.data != full.data).mean() < 0.02


@pytest.mark.parametrize("family", ["multiscale", "C"])
def test_regions_equal_the_whole(family: str) -> None:
    made, volume = model(family, 3), scan((30, 28, 26))
    field = made.field(volume, device="cuda", precision="fp32")
    low, high = (4, 0, 7), (20, 28, 19)
    part, whole = field.segment(region=(low, high)), field.segment()
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    assert (part.data != whole.data[box]).mean() < 1e-3


def test_meshes_agree() -> None:
    made, volume = model("multiscale", 1), scan((23, 21, 18))
    cpu, gpu = (made.field(volume, device=d, precision="fp32").mesh() for d in ("cpu", "cuda"))
    assert gpu.vertices.shape == cpu.vertices.shape
    # Where the field is flat, a vertex lies far off for a little difference of logits.
    apart = np.linalg.norm(gpu.vertices - cpu.vertices, axis=1)
    assert np.quantile(apart, 0.99) < 1e-2
    assert apart.max() < 0.1


@pytest.mark.parametrize("fit", [{}, {"fit": "spacing", "spacing": (0.8, 1.0, 1.3)}])
def test_an_image_that_it_does_not_hold_is_read_in_boxes(
    fit: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, volume = model("multiscale", 3, **fit), scan((30, 28, 26))
    held = made.field(volume, device="cuda", precision="fp32").segment()
    monkeypatch.setattr(Scan, "pays_to_hold", lambda *_: False)
    read = made.field(volume, device="cuda", precision="fp32").segment()
    assert read.evaluated == held.evaluated
    assert (read.data != held.data).mean() < 1e-3

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.data.balls import ISO

from ossnet.data.intensities import blur, change_intensities, gamma, low_resolution


def test_intensity_changes() -> None:
    image = torch.randn(2, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        change_intensities(image, replace(ISO, intensity=0.0), np.random.default_rng(0)), image
    )
    always = replace(ISO, intensity=10.0)
    changed = change_intensities(image, always, np.random.default_rng(0))
    assert changed.shape == image.shape
    assert bool(torch.isfinite(changed).all())
    assert not torch.equal(changed, image)
    # Slices far apart stay as they are under blur and low resolution.
    flat = torch.arange(12.0).expand(1, 12, 12, 12)
    sigma = (0.8, 0.8, 0.0)
    assert torch.allclose(blur(flat, sigma), flat, atol=1e-5)
    assert torch.allclose(low_resolution(flat, (0.5, 0.5, 1.0)), flat)


@pytest.mark.parametrize("factor", [0.5, 0.6, 0.75, 0.9, 0.97])
def test_low_resolution_moves_nothing(factor: float) -> None:
    ramp = (
        torch.arange(40.0).view(1, 40, 1, 1)
        + 3 * torch.arange(30.0).view(1, 1, 30, 1)
        + torch.zeros(1, 1, 1, 4)
    )
    moved = low_resolution(ramp, (factor, factor, 1.0)) - ramp
    assert moved[:, 4:-4, 4:-4].abs().max() < 1e-4
    noise = torch.randn(1, 40, 30, 4, generator=torch.Generator().manual_seed(0))
    assert low_resolution(noise, (factor, factor, 1.0)).std() < 0.9 * noise.std()


def test_blur_keeps_the_mean_and_lowers_the_variance() -> None:
    image = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    out = blur(image, (1.0, 1.0, 1.0))
    assert float(out.mean()) == pytest.approx(float(image.mean()), abs=0.02)
    assert float(out.std()) < 0.5 * float(image.std())


def test_gamma_keeps_mean_and_deviation() -> None:
    image = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 2
    for invert in (False, True):
        out = gamma(image, 1.6, invert)
        assert float(out.mean()) == pytest.approx(float(image.mean()), abs=1e-3)
        assert float(out.std()) == pytest.approx(float(image.std()), abs=1e-3)
    constant = torch.ones(2, 2, 2)
    assert torch.equal(gamma(constant, 2.0, False), constant)

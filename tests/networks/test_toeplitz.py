"""Products equal to convolutions inside a patch."""

import pytest
import torch
import torch.nn.functional as F

from ossnet.networks.toeplitz import spectral_toeplitz, spectrum, toeplitz


@pytest.mark.parametrize(("channels", "outputs"), [(1, 1), (4, 2)])
def test_matrix_is_the_convolution(channels: int, outputs: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(outputs, channels, 7, 7, 7, dtype=torch.float64)
    patches = torch.randn(5, channels, 7, 7, 7, dtype=torch.float64)
    expected = F.conv3d(patches, weight, padding=3).flatten(1)
    torch.testing.assert_close(patches.flatten(1) @ toeplitz(weight), expected)


def test_gradients_are_those_of_the_convolution() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    patches = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    pull = torch.randn(4, 18, dtype=torch.float64)
    (ours,) = torch.autograd.grad((patches.flatten(1) @ toeplitz(weight)), weight, pull)
    (theirs,) = torch.autograd.grad(F.conv2d(patches, weight, padding=1).flatten(1), weight, pull)
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradgradcheck(lambda w: toeplitz(w).square().sum(), weight)


def test_spectrum_is_the_correlation() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 7, dtype=torch.float64)
    s = spectrum()
    assert s.into.shape == (14, 7)
    ours = s.back @ ((s.into @ x) * (s.taps @ w))
    torch.testing.assert_close(ours, F.conv1d(x[None, None], w[None, None], padding=3)[0, 0])


def test_spectral_matrices_are_the_convolution() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 4, 7, 7, 7, dtype=torch.float64)
    patches = torch.randn(3, 4, 7, 7, 7, dtype=torch.float64)
    s = spectrum()
    planes = torch.einsum("fu,ncuyz->fncyz", s.into, patches).flatten(2)
    products = torch.bmm(planes, spectral_toeplitz(weight)).view(14, 3, 2, 7, 7)
    ours = torch.einsum("vf,fnoyz->novyz", s.back, products)
    torch.testing.assert_close(ours, F.conv3d(patches, weight, padding=3))

"""Convolutions on a CPU equal torch's, forwards and backwards, whatever way they take."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ossnet.networks.convolution import convolve
from ossnet.networks.machine import exact_float32

Triple = tuple[int, int, int]
SIZES = st.tuples(*[st.integers(4, 9)] * 3)


@settings(deadline=None, max_examples=40)
@given(
    shape=SIZES,
    kinds=st.tuples(*[st.sampled_from([(1, 1, 0), (3, 1, 1), (2, 2, 0), (4, 2, 1)])] * 3),
    channels=st.sampled_from([1, 3]),
    maps=st.sampled_from([1, 2]),
)
def test_equals_torch(shape: Triple, kinds: tuple[Triple, Triple, Triple], channels: int, maps: int) -> None:
    kernel, stride, padding = zip(*kinds, strict=True)
    torch.manual_seed(0)
    x = torch.randn(maps, channels, *shape, requires_grad=True)
    weight = torch.randn(5, channels, *kernel, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    got = convolve(x, weight, bias, stride, padding)
    wanted = F.conv3d(x, weight, bias, stride, padding)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    slope = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(got, (x, weight, bias), slope),
        torch.autograd.grad(wanted, (x, weight, bias), slope),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 24])
def test_large_single_maps(channels: int) -> None:
    x = torch.randn(1, channels, 34, 30, 28)
    weight = torch.randn(8, channels, 3, 3, 3)
    got = convolve(x, weight, None, (1, 1, 1), (1, 1, 1))
    torch.testing.assert_close(got, F.conv3d(x, weight, padding=1), rtol=1e-4, atol=1e-3)


def test_half_precision_is_left_to_torch() -> None:
    x, weight = torch.randn(1, 4, 6, 6, 6), torch.randn(4, 4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = convolve(x, weight, None, (1, 1, 1), (1, 1, 1))
    assert got.dtype == torch.bfloat16
    double = convolve(x.double(), weight.double(), None, (1, 1, 1), (1, 1, 1))
    torch.testing.assert_close(double, F.conv3d(x.double(), weight.double(), padding=1))


def test_exact_float32_leaves_other_choices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    before = torch.backends.cudnn.allow_tf32
    with exact_float32(torch.device("cuda")):  # sets flags only, without a GPU too
        assert torch.backends.cudnn.deterministic
        assert torch.backends.cudnn.enabled
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before

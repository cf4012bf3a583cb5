"""Convolutions on a CPU equal torch's, forwards and backwards, whatever way they take."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ossnet.networks.convolution import (
    Conv2d,
    Conv3d,
    ConvTranspose2d,
    ConvTranspose3d,
    convolve,
    sure,
)
from ossnet.networks.machine import exact_float32
from ossnet.networks.unet import UNet, UNetSpec

Triple = tuple[int, int, int]
SIZES = st.tuples(*[st.integers(4, 9)] * 3)


@settings(max_examples=40)
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


def test_exact_float32_is_for_one_thread_at_a_time() -> None:
    """They share the flags: one that began before another ended would restore the other's."""
    begun, done = Event(), Event()

    def other() -> None:
        with exact_float32(torch.device("cuda")):
            begun.set()
            done.wait(60)

    before = torch.backends.cudnn.allow_tf32
    with ThreadPoolExecutor(1) as pool:
        with exact_float32(torch.device("cuda")):
            later = pool.submit(other)
            alone = not begun.wait(0.2)
        assert begun.wait(60)
        done.set()
        later.result()
    assert alone
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("kind", [Conv2d, Conv3d, ConvTranspose2d, ConvTranspose3d])
@pytest.mark.parametrize(
    ("last", "kernel", "stride", "small"),
    [(2, 3, 1, True), (3, 3, 1, False), (3, 3, 2, False), (2, 3, 2, True), (4, 2, 2, False), (4, 5, 1, True)],
)
def test_small_maps_are_convolved_in_float32_on_a_cpu(
    kind: type[nn.Module], last: int, kernel: int, stride: int, small: bool
) -> None:
    torch.manual_seed(0)
    layer = kind(8, 16, kernel, stride, (kernel - 1) // 2)
    x = torch.randn(1, 8, *(9, 8, last)[-2 if kind in (Conv2d, ConvTranspose2d) else -3 :])
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    # Rounded once, at the end.
    assert torch.equal(found, exact.to(torch.bfloat16)) == small


def test_thin_maps_have_right_values_and_gradients_in_half_precision() -> None:
    """oneDNN's come from memory that nothing was written to, on many processors."""
    for extents, kernel, stride in [
        ((20, 18, 2), 3, 2),
        ((2, 12, 9), 3, 1),
        ((9, 10, 3), 2, 2),
        ((6, 6, 2), 4, 2),
        ((3, 8, 8), 5, 1),
    ]:
        x, weight = (
            torch.randn(1, 16, *extents),
            torch.randn(24, 16, kernel, kernel, kernel) / kernel**1.5 / 4,
        )
        padding, steps = ((kernel - 1) // 2,) * 3, (stride,) * 3
        wanted = F.conv3d(x, weight.requires_grad_(), None, steps, padding)
        gradient = torch.randn_like(wanted)
        (of_weight,) = torch.autograd.grad(wanted, weight, gradient)
        junk = [torch.full((n,), float("nan")) for n in (1 << 10, 1 << 12, 1 << 14, 1 << 16)]
        del junk
        with torch.autocast("cpu", torch.bfloat16):
            found = convolve(x, weight, None, steps, padding)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0.05)
        (half,) = torch.autograd.grad(found, weight, gradient.to(found.dtype))
        torch.testing.assert_close(half, of_weight, atol=0.05 * float(of_weight.abs().max()), rtol=0.05)


def test_networks_that_others_built_become_sure() -> None:
    built = sure(nn.Sequential(nn.Conv3d(1, 2, 3), nn.Sequential(nn.ConvTranspose2d(1, 2, 2), nn.ReLU())))
    assert [type(m) for m in built.modules()] == [
        nn.Sequential,
        Conv3d,
        nn.Sequential,
        ConvTranspose2d,
        nn.ReLU,
    ]
    for variant in ("unet3d", "unet2d", "monai-unet"):
        kinds = {type(m) for m in UNet(UNetSpec(variant=variant, channels=1)).modules()}
        assert not kinds & {nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d}

"""One volume at a time computes what the whole batch does: answer, gradients, running averages."""

import copy

import pytest
import torch
from torch import Tensor

from ossnet.networks import kernels, native, streaming
from ossnet.networks.encoder import ResidualBlock3d
from ossnet.networks.lean import lean


@pytest.fixture(params=["native", "tensor operations"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native" and native.library() is None:
        pytest.skip("no C compiler here")
    if request.param != "native":
        monkeypatch.setattr(kernels, "library", lambda: None)


def step(block: ResidualBlock3d, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    block.train()
    out = block(x)
    torch.manual_seed(2)
    (out * torch.randn(out.shape).to(out.dtype)).sum().backward()
    assert x.grad is not None
    grads = {k: p.grad for k, p in block.named_parameters() if p.grad is not None}
    return out.detach(), {**grads, "input": x.grad}


def test_a_streamed_block_is_the_plain_block(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = ResidualBlock3d(3, 5)
    with torch.no_grad():
        for value in plain.parameters():
            value.add_(0.05 * torch.randn_like(value))
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    lean(ours)
    x = torch.randn(3, 3, 8, 10, 6) + 1
    monkeypatch.setattr(streaming, "LARGE", 1)
    expected, usual = step(plain, x)
    found, own = step(ours, x)
    truth = step(exact, x.double())[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert own.keys() == truth.keys()
    for name, gradient in own.items():
        error, plain_error = (float((g - truth[name]).abs().max()) for g in (gradient, usual[name]))
        assert error <= 4 * plain_error + 1e-5 * (1 + float(truth[name].abs().max())), name
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))


def test_half_precision_stays_close(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = ResidualBlock3d(2, 4)
    ours = copy.deepcopy(plain)
    lean(ours)
    monkeypatch.setattr(streaming, "LARGE", 1)
    x = torch.randn(2, 2, 8, 8, 8)
    expected, usual = step(plain, x)
    with torch.autocast("cpu", torch.bfloat16):
        found, own = step(ours, x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    weight = "main_mapping.0.weight"
    assert own[weight].dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(own[weight].flatten(), usual[weight].flatten(), dim=0)
    assert float(cosine) > 0.99


def test_only_large_tensors_in_training_stream() -> None:
    block = ResidualBlock3d(2, 4)
    arguments = block.main_mapping[0], block.main_mapping[1]
    small, large = torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 2, 1, 1, 1).expand(1, 2, 512, 512, 128)
    assert not streaming.streams(*arguments, small)  # type: ignore[arg-type]
    assert streaming.streams(*arguments, large)  # type: ignore[arg-type]
    with torch.no_grad():
        assert not streaming.streams(*arguments, large)  # type: ignore[arg-type]
    block.eval()
    assert not streaming.streams(*arguments, large)  # type: ignore[arg-type]

"""The three ways of computing a Padé unit agree, and with the formula."""

import pytest
import torch

from ossnet.networks import kernels, native
from ossnet.networks.pade import Pade, pade


@pytest.fixture(params=["native", "tensor operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and native.library() is None:
        pytest.skip("no C compiler here")
    if request.param != "native":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return str(request.param)


def unit() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    module = Pade()
    numerator = module.weight_numerator.detach().clone()
    denominator = module.weight_denominator.detach() * torch.tensor([1.0, -1.0, 1.0, -1.0])
    return numerator, denominator, kernels.coefficients(numerator, denominator)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 70000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pade_in_place(way: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    numerator, denominator, c = unit()
    x = (4 * torch.randn(shape)).to(dtype)
    expected = pade(x, numerator, denominator)
    assert kernels.pade_(x, c) is x
    torch.testing.assert_close(x, expected)


def test_pade_in_place_channels_last(way: str) -> None:
    numerator, denominator, c = unit()
    x = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    expected = pade(x, numerator, denominator)
    torch.testing.assert_close(kernels.pade_(x, c), expected)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("skipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_affine_pade(way: str, scaled: bool, skipped: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    numerator, denominator, c = unit()
    x, skip = torch.randn(2, 300, 33).to(dtype), torch.randn(2, 300, 33).to(dtype) if skipped else None
    scale, shift = torch.rand(2, 33) if scaled else None, torch.randn(2, 33)
    z = x.float() * (1 if scale is None else scale[:, None]) + shift[:, None]
    expected = pade(z if skip is None else z + skip, numerator, denominator).to(dtype)
    torch.testing.assert_close(kernels.affine_pade(x, scale, shift, skip, c), expected)
    torch.testing.assert_close(kernels.affine_pade(x, scale, shift, skip, c, out=x), expected)


def test_rows_apart(way: str) -> None:
    numerator, denominator, c = unit()
    wide = torch.randn(1, 20, 40)
    x, shift, before = wide[:, :, :32], torch.randn(1, 32), wide.clone()
    expected = pade(x + shift[:, None], numerator, denominator)
    torch.testing.assert_close(kernels.affine_pade(x, None, shift, None, c, out=x), expected)
    assert torch.equal(wide[:, :, 32:], before[:, :, 32:])


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("skipped", [True, False])
def test_backward(way: str, scaled: bool, skipped: bool) -> None:
    torch.manual_seed(0)
    numerator, denominator, c = unit()
    x, skip = torch.randn(2, 300, 33), torch.randn(2, 300, 33) if skipped else None
    scale, shift = (torch.rand(2, 33), torch.randn(2, 33)) if scaled else (None, None)
    inputs = [x, scale, shift, skip, numerator, denominator]
    leaves = [None if v is None else v.double().requires_grad_() for v in inputs]
    lx, ls, lt, lk, ln, ld = leaves
    z = lx if ls is None else lx * ls[:, None] + lt[:, None]
    y = pade(z if lk is None else z + lk, ln, ld)
    pull = torch.randn(2, 300, 33)
    wanted = torch.autograd.grad(y, [v for v in leaves if v is not None], pull.double())
    found = kernels.affine_pade_backward(pull, x, scale, shift, skip, c)
    ours = [v for v in found[:4] if v is not None]
    sign = torch.where(denominator >= 0, 1.0, -1.0)
    ours += [found[4][:6], found[4][6:] * sign]
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-4, atol=1e-4)


def test_not_a_number_stays(way: str) -> None:
    c = unit()[2]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([float("nan"), 1.0]).to(dtype)
        assert kernels.pade_(x, c).isnan().tolist() == [True, False]


def test_no_compiler_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_compiler", lambda: None)
    native.library.cache_clear()
    try:
        assert native.library() is None
        monkeypatch.setattr(native, "_compiler", lambda: ["false"])
        native.library.cache_clear()
        assert native.library() is None
    finally:
        native.library.cache_clear()


def test_a_compiled_function_that_fails_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("no toolchain")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    monkeypatch.setattr(kernels, "_ENOUGH", 5)
    run = kernels._compiled(lambda x: 2 * x)
    assert run(torch.tensor([1, 2])).tolist() == [2, 4]  # too little to be worth it
    with pytest.warns(UserWarning, match="no toolchain"):
        assert run(torch.tensor([1, 2, 3])).tolist() == [2, 4, 6]
    assert run(torch.tensor([3])).tolist() == [6]


def test_what_a_gpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that torch compiles for a GPU, here without compiling."""
    torch.manual_seed(0)
    _, _, c = unit()
    x, skip, scale, shift = torch.randn(2, 9, 5), torch.randn(2, 9, 5), torch.rand(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(
        kernels._affine_pade(x, scale, shift, skip, c), kernels.affine_pade(x, scale, shift, skip, c)
    )
    pull = torch.randn(2, 9, 5)
    torch.testing.assert_close(
        kernels._affine_pade_backward(pull, x, scale, shift, skip, c),
        kernels.affine_pade_backward(pull, x, scale, shift, skip, c),
        rtol=1e-4,
        atol=1e-5,
    )

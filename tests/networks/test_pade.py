"""The Padé unit against the reference, finite differences and its own limits."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ossnet.networks.pade import INITIAL_DENOMINATOR, INITIAL_NUMERATOR, Pade, pade

Read = Callable[[str], dict[str, Tensor]]
finite = st.floats(-5, 5).map(lambda v: round(v, 3))


def assert_relative(one: Tensor, other: Tensor) -> None:
    """To 1e-5, with an absolute share for values next to a zero, where float32 cancels."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_values_and_gradients_of_the_reference(arrays: Read) -> None:
    case = arrays("pade")
    unit = Pade()
    assert torch.equal(unit.weight_numerator, case["numerator_default"])
    assert torch.equal(unit.weight_denominator, case["denominator_default"])
    x = case["x"].clone().requires_grad_()
    y = unit(x)
    assert_relative(y.detach(), case["y_default"])
    (y * case["grad_weights"]).sum().backward()
    assert_relative(x.grad, case["grad_x"])
    assert_relative(unit.weight_numerator.grad, case["grad_numerator"])
    assert_relative(unit.weight_denominator.grad, case["grad_denominator"])


def test_negative_denominators_count_by_their_size(arrays: Read) -> None:
    case = arrays("pade")
    assert_relative(pade(case["x"], case["numerator_2"], case["denominator_2"]), case["y_2"])


@settings(max_examples=20)
@given(
    x=st.lists(finite.filter(lambda v: abs(v) > 0.01), min_size=1, max_size=4),
    numerator=st.lists(finite, min_size=6, max_size=6),
    # |d| has a kink at 0, where differences mean nothing.
    denominator=st.lists(finite.filter(lambda v: abs(v) > 0.01), min_size=4, max_size=4),
)
def test_first_and_second_derivatives(
    x: list[float], numerator: list[float], denominator: list[float]
) -> None:
    inputs = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, numerator, denominator)]
    assert torch.autograd.gradcheck(pade, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)
    assert torch.autograd.gradgradcheck(pade, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_derivatives_by_central_differences_to_1e_6() -> None:
    numerator = torch.tensor(INITIAL_NUMERATOR, dtype=torch.float64)
    denominator = torch.tensor(INITIAL_DENOMINATOR, dtype=torch.float64)
    x = torch.linspace(-6, 6, 97, dtype=torch.float64) + 0.01
    x.requires_grad_()
    (first,) = torch.autograd.grad(pade(x, numerator, denominator).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)

    def at(shift: float) -> Tensor:
        return pade(x.detach() + shift, numerator, denominator)

    assert torch.allclose(first.detach(), (at(1e-5) - at(-1e-5)) / 2e-5, atol=1e-6, rtol=0)
    h = 1e-3  # fourth order: rounding over h² stays below the bound
    difference = (-at(2 * h) + 16 * at(h) - 30 * at(0.0) + 16 * at(-h) - at(-2 * h)) / (12 * h * h)
    assert torch.allclose(second, difference, atol=1e-6, rtol=1e-6)


def test_a_denominator_of_exactly_zero_can_be_learnt() -> None:
    denominator = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    pade(torch.tensor([2.0], dtype=torch.float64), torch.ones(6, dtype=torch.float64), denominator).backward()
    # P = 63 / 1, dP/d|d_i| = -63 · 2^(i+1)
    assert denominator.grad is not None
    assert denominator.grad.tolist() == [-126, -252, -504, -1008]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type_and_does_not_overflow(dtype: torch.dtype) -> None:
    unit = Pade()
    x = torch.tensor([-30.0, -1.0, 0.5, 30.0])
    y = unit(x.to(dtype))
    assert y.dtype == dtype
    assert torch.allclose(y.float(), unit(x), rtol=1e-2, atol=1e-2)


def test_starts_as_a_leaky_relu() -> None:
    x = torch.linspace(-3, 3, 61)
    assert float((Pade()(x) - torch.nn.functional.leaky_relu(x)).detach().abs().max()) < 0.1

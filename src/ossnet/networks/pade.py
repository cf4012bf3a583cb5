"""The Padé Activation Unit of the paper: a learnt ratio of two polynomials (SPEC §2)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Fitted to a leaky ReLU (SPEC §2).
INITIAL_NUMERATOR = (
    3.35583603e-02,
    5.05000375e-01,
    1.65343934e00,
    2.01001052e00,
    9.31901999e-01,
    1.52424124e-01,
)
INITIAL_DENOMINATOR = (3.30847488e-06, 3.98021568e00, 5.12471206e-07, 3.01830109e-01)


def pade(
    x: Float[Tensor, "*shape"], numerator: Float[Tensor, "6"], denominator: Float[Tensor, "4"]
) -> Float[Tensor, "*shape"]:
    """P(x) = Σ n_i x^i / (1 + Σ |d_i| |x|^(i+1)), elementwise (SPEC §2).

    Differentiable any number of times. Half-precision input is computed in float32 and rounded once: x^5
    leaves the range of float16 at 9 and wastes most of the bits of bfloat16 (SPEC §7.27).

    Args:
        x: Any shape, floating point.
        numerator: n_0 … n_5.
        denominator: d_0 … d_3; their signs do not matter, so the denominator is at least 1.

    Returns:
        Same shape and dtype as `x`.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return pade(x.float(), numerator.float(), denominator.float()).to(x.dtype)
    n, d = numerator, magnitude(denominator)
    size = x.abs()
    top = n[0] + x * (n[1] + x * (n[2] + x * (n[3] + x * (n[4] + x * n[5]))))
    bottom = 1 + size * (d[0] + size * (d[1] + size * (d[2] + size * d[3])))
    return top / bottom


def magnitude(coefficients: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """|c| with gradient +1 at 0, so that a coefficient of exactly 0 can still be learnt (SPEC §2)."""
    return torch.where(coefficients >= 0, coefficients, -coefficients)


class Pade(nn.Module):
    """A Padé unit with its own ten coefficients, shared by all elements of its input."""

    evaluate: "Callable[[Tensor, Tensor, Tensor], Tensor]" = staticmethod(pade)
    """Another way to compute `pade` (`networks.lean`)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_numerator = nn.Parameter(torch.tensor(INITIAL_NUMERATOR))
        self.weight_denominator = nn.Parameter(torch.tensor(INITIAL_DENOMINATOR))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Elementwise; shape and dtype are kept."""
        return self.evaluate(x, self.weight_numerator, self.weight_denominator)

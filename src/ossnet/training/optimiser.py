"""Optimisers: the paper's Lookahead(RAdam), and Muon for convolutions (SPEC §3, §7.13)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer, RAdam

from ossnet.errors import SettingsError
from ossnet.networks.pade import Pade

LEARNING_RATE = 3e-4
"""The paper's, for everything but Padé coefficients."""

PADE_LEARNING_RATE = 1e-2
"""The paper's, for Padé coefficients."""


class Lookahead(Optimizer):
    """Slow weights behind a fast optimiser (SPEC §3).

    After each step of the inner optimiser, if the counter is 0: fast = α·fast + (1-α)·slow, slow = fast. The
    counter starts at 0 and runs modulo k, the slow weights start as the values after the first step, so
    weights are synchronised after steps 1, k+1, 2k+1, …

    Parameter groups are the inner optimiser's own, so schedules and checkpoints work as with any optimiser.

    Args:
        inner: The fast optimiser.
        k: Steps between synchronisations.
        alpha: Share of the fast weights.
    """

    def __init__(self, inner: Optimizer, k: int = 5, alpha: float = 0.8) -> None:
        if k < 1:
            raise SettingsError("lookahead k", f"is {k}", "Give 1 or more")
        if not 0 <= alpha <= 1:
            raise SettingsError("lookahead alpha", f"is {alpha}", "Give a share between 0 and 1")
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.k, self.alpha = inner, k, alpha
        self.param_groups = inner.param_groups
        self.counter = 0
        self.slow: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimiser, and a synchronisation where one is due."""
        loss = self.inner.step(closure)
        if self.counter == 0:
            for parameter in self._parameters():
                slow = self.slow.get(parameter)
                if slow is None:
                    self.slow[parameter] = parameter.detach().clone()
                else:
                    slow.lerp_(parameter, self.alpha)
                    parameter.copy_(slow)
        self.counter = (self.counter + 1) % self.k
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's state, the counter, and the slow weights by parameter number."""
        slow = {i: self.slow[p] for i, p in enumerate(self._parameters()) if p in self.slow}
        return {"inner": self.inner.state_dict(), "counter": self.counter, "slow": slow}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; k and α stay those of this object."""
        self.inner.load_state_dict(state_dict["inner"])
        # The inner optimiser now has a new list of groups. Schedules and wrappers may hold the old one, so
        # its identity is kept.
        self.param_groups[:] = self.inner.param_groups
        self.inner.param_groups = self.param_groups
        self.counter = int(state_dict["counter"])
        parameters = list(self._parameters())
        self.slow = {
            parameters[int(i)]: value.detach().to(parameters[int(i)], copy=True)
            for i, value in state_dict["slow"].items()
        }

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])


class Muon(Optimizer):
    """Momentum whose step is made orthogonal, for convolutions that a normalisation follows.

    Each weight is seen as a matrix, outputs × rest. The step is the nearest matrix with orthonormal rows (or
    columns) to its Nesterov momentum, found by Newton–Schulz iterations, at the weight's own norm; after the
    step the weight is brought back to the norm sqrt(rows). What the layer computes does not depend on that
    norm, since a normalisation follows, so `lr` is a relative step: the angle by which a weight turns.

    Args:
        params: Weights with two axes or more.
        lr: Relative step.
        momentum: Of the averaged gradient.
        iterations: Newton–Schulz iterations.
        renormalise: Bring each weight back to the norm sqrt(rows) after the step. Only right where a
            normalisation follows.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        iterations: int = 4,
        renormalise: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "iterations": iterations, "renormalise": renormalise}
        super().__init__(params, defaults)
        for group in self.param_groups:
            if any(p.ndim < 2 for p in group["params"]):
                raise SettingsError("muon", "a parameter is not a matrix", "Give it to another optimiser")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in _of_a_shape([p for p in group["params"] if p.grad is not None]):
                self._turn(weights, group)
        self.restore_norms()
        return loss

    def _turn(self, weights: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        """Step some weights of one shape."""
        averages, gradients = [], [p.grad for p in weights if p.grad is not None]
        for parameter in weights:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            averages.append(state["momentum"])
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, averages, group["momentum"])
        matrices = [n.flatten(1) for n in nesterov]
        rows, columns = matrices[0].shape
        directions = orthogonalise(
            torch.stack(matrices) if len(matrices) > 1 else matrices[0], group["iterations"]
        )
        turned = directions.reshape(len(weights), *weights[0].shape).unbind()
        # Orthonormal columns have the norm sqrt(columns): bring it to the weight's own.
        size = math.sqrt(max(1.0, rows / columns))
        torch._foreach_add_(list(weights), turned, alpha=-group["lr"] * size)

    @torch.no_grad()
    def restore_norms(self) -> None:
        """Bring each weight to the norm sqrt(rows), where `renormalise` says so.

        To be called as well when averages of weights took their places: directions that turn from step to step
        have an average that is shorter than each of them.
        """
        for group in self.param_groups:
            if group["renormalise"]:
                norms = torch.stack(torch._foreach_norm(group["params"])).clamp_min(1e-12)
                wanted = norms.new_tensor([math.sqrt(len(p)) for p in group["params"]])
                torch._foreach_mul_(group["params"], list((wanted / norms).unbind()))


FAINT = 1e-30
"""Far below what moves a weight, and above the numbers that float32 holds with fewer digits (1e-38)."""

FORGETS = 100
"""Steps after which `forget_faint` is due: what is FAINT at most has not decayed to 1e-38 by then."""


@torch.no_grad()
def forget_faint(optimisers: Iterable[Optimizer]) -> None:
    """Set to 0 what is fainter than FAINT in the averages of gradients.

    Units that no longer answer anything have no gradient, and their averages decay for ever. Numbers below 1e-38 take a
    CPU a hundred times as long: after 8,000 steps on the hippocampus those in Muon's momenta, a tenth of all, had
    doubled the time of a step.
    """
    for optimiser in optimisers:
        inner = optimiser.inner if isinstance(optimiser, Lookahead) else optimiser
        for state in inner.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0:
                    value.masked_fill_(value.abs() < FAINT, 0)


def _of_a_shape(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Weights in groups that are worked on at once: each alone, on a GPU those of a shape, which saves launches."""
    if all(w.device.type == "cpu" for w in weights):
        return [[w] for w in weights]
    groups: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        groups.setdefault(weight.shape, []).append(weight)
    return list(groups.values())


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration X ← aX + b(XXᵀ)X + c(XXᵀ)²X, chosen for speed and not for
convergence:
singular values end between about 0.7 and 1.2 (Jordan et al., "Muon", 2024)."""


def orthogonalise(matrix: Float[Tensor, "*B R C"], iterations: int = 4) -> Float[Tensor, "*B R C"]:
    """About the nearest matrix with orthonormal rows (columns where there are fewer of them).

    The iteration X ← (aI + bA + cA²) X with A = XXᵀ only ever multiplies the start matrix by polynomials in
    its own Gram matrix. These commute, so all iterations run on the small square matrix and the large one is
    multiplied once.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return orthogonalise(matrix.mT, iterations).mT
    x = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)  # singular values at most 1
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    product = None
    for left in reversed(range(iterations)):
        polynomial = b * gram + c * (gram @ gram)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if left:
            gram = polynomial @ gram @ polynomial
    nearest: Tensor = x if product is None else product @ x
    return nearest.to(matrix.dtype)


def parameter_groups(
    network: nn.Module,
    lr: float = LEARNING_RATE,
    pade_lr: float | Literal["released"] = PADE_LEARNING_RATE,
    without: Iterable[Tensor] = (),
) -> list[dict[str, Any]]:
    """Two groups: everything else at `lr`, Padé coefficients at `pade_lr` (SPEC §3).

    Args:
        network: Any module.
        lr: Learning rate.
        pade_lr: Learning rate of the Padé coefficients. "released" = `lr`: the optimiser of the released code
            shares its step size between groups, so that all move at the first one's rate (SPEC §7.13).
        without: Parameters that another optimiser holds.
    """
    own = {id(p) for module in network.modules() if isinstance(module, Pade) for p in module.parameters()}
    others = {id(p) for p in without}
    trained = [p for p in network.parameters() if p.requires_grad and id(p) not in others]
    rest = {"params": [p for p in trained if id(p) not in own], "lr": lr, "name": "weights"}
    pade = {
        "params": [p for p in trained if id(p) in own],
        "lr": lr if pade_lr == "released" else pade_lr,
        "name": "pade",
    }
    return [group for group in (rest, pade) if group["params"]]


def paper_optimiser(
    network: nn.Module,
    lr: float = LEARNING_RATE,
    pade_lr: float | Literal["released"] = PADE_LEARNING_RATE,
    k: int = 5,
    alpha: float = 0.8,
    weight_decay: float = 0.0,
) -> Lookahead:
    """Lookahead(RAdam) as the paper trains: betas (0.9, 0.999), eps 1e-8, no weight decay (SPEC §3)."""
    groups = parameter_groups(network, lr, pade_lr)
    inner = RAdam(groups, lr=lr, weight_decay=weight_decay, decoupled_weight_decay=True)
    return Lookahead(inner, k=k, alpha=alpha)

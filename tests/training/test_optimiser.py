"""Lookahead(RAdam) against the reference, resuming, and Muon."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import network
from torch import Tensor, nn

from ossnet.data.preparation import Preparation
from ossnet.errors import SettingsError
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.variants import NetworkSpec
from ossnet.training.optimiser import (
    FORGETS,
    NEWTON_SCHULZ,
    Lookahead,
    Muon,
    forget_faint,
    orthogonalise,
    paper_optimiser,
    parameter_groups,
)
from ossnet.training.recipes.base import directions
from ossnet.training.recipes.occupancy import OccupancyRecipe
from ossnet.training.settings import make_settings

CASE = Path(__file__).parents[1] / "fixtures" / "released_weights" / "optimiser.npz"


class Two(nn.Module):
    """Parameters of the two kinds: a plain one and, dressed as one, a Padé coefficient."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        from ossnet.networks.pade import Pade

        self.a = nn.Parameter(a.clone())
        self.unit = Pade()
        self.unit.weight_numerator = nn.Parameter(b.clone())
        del self.unit.weight_denominator


@pytest.mark.parametrize("mode", ["separate", "released"])
def test_reference(mode: str) -> None:
    with np.load(CASE) as file:
        case = {key: torch.from_numpy(file[key]) for key in file.files}
    module = Two(case["start_a"], case["start_b"])
    optimiser = paper_optimiser(module, pade_lr="released" if mode == "released" else 1e-2)
    assert [g["lr"] for g in optimiser.param_groups] == [3e-4, 3e-4 if mode == "released" else 1e-2]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [16])
    for step in range(24):
        module.a.grad = case["gradients_a"][step].clone()
        module.unit.weight_numerator.grad = case["gradients_b"][step].clone()
        optimiser.step()
        schedule.step()
        close = {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(module.a.detach(), case[f"{mode}_a"][step], **close)
        torch.testing.assert_close(module.unit.weight_numerator.detach(), case[f"{mode}_b"][step], **close)


def test_synchronises_after_steps_1_6_11() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimiser = Lookahead(torch.optim.SGD([weight], lr=1.0), k=5, alpha=0.8)
    path = []
    for _ in range(11):
        weight.grad = torch.full((1,), -1.0)  # each inner step adds 1
        optimiser.step()
        path.append(round(weight.item(), 4))
    # slow starts as 1; step 6: 0.8·6 + 0.2·1 = 5; step 11: 0.8·10 + 0.2·5 = 9
    assert path == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 9]


@pytest.mark.parametrize("stop", range(1, 8))
def test_resumes_bit_for_bit(stop: int) -> None:
    def train(steps: int, module: nn.Linear, optimiser: Lookahead, first: int = 0) -> None:
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step)
            optimiser.zero_grad()
            module(torch.randn(4, 3, generator=generator)).square().mean().backward()
            optimiser.step()

    torch.manual_seed(0)
    whole = nn.Linear(3, 2)
    parted = copy.deepcopy(whole)
    optimiser = paper_optimiser(whole)
    train(12, whole, optimiser)

    before = paper_optimiser(parted)
    train(stop, parted, before)
    state = copy.deepcopy(before.state_dict())
    resumed = copy.deepcopy(parted)
    after = paper_optimiser(resumed)
    groups = after.param_groups
    schedule = torch.optim.lr_scheduler.MultiStepLR(after, [100])
    after.load_state_dict(state)
    assert after.param_groups is groups is after.inner.param_groups  # who holds the list sees the new values
    train(12 - stop, resumed, after, first=stop)
    schedule.step()
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_state_is_plain_tensors_and_numbers(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    optimiser = paper_optimiser(module)
    module(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    torch.save(optimiser.state_dict(), tmp_path / "state.pt")
    paper_optimiser(module).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_closure_and_added_groups() -> None:
    module, more = nn.Linear(2, 1), nn.Parameter(torch.ones(1))
    optimiser = Lookahead(torch.optim.SGD(module.parameters(), lr=0.1))
    optimiser.add_param_group({"params": [more], "lr": 0.5})

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (module(torch.ones(1, 2)) * more).square().sum()
        loss.backward()
        return loss

    losses = [float(optimiser.step(closure).detach()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert more.item() != 1


def test_settings_that_mean_nothing() -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(SettingsError, match="k"):
        Lookahead(inner, k=0)
    with pytest.raises(SettingsError, match="alpha"):
        Lookahead(inner, alpha=1.5)
    with pytest.raises(SettingsError, match="matrix"):
        Muon([nn.Parameter(torch.ones(3))])


def test_groups_of_a_network() -> None:
    """SPEC §2: 250 Padé coefficients in C for BraTS."""
    with torch.device("meta"):
        network = OSSNet(NetworkSpec(variant="C", channels=4, patches="small", skip=True, head=True))
    weights, pade = parameter_groups(network)
    assert sum(p.numel() for p in pade["params"]) == 250
    assert sum(p.numel() for g in (weights, pade) for p in g["params"]) == 8_695_733
    assert (weights["lr"], pade["lr"]) == (3e-4, 1e-2)
    assert len(parameter_groups(nn.Linear(1, 1))) == 1


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31))
def test_newton_schulz_on_the_gram_matrix(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = matrix / matrix.norm()
    a, b, c = NEWTON_SCHULZ
    for _ in range(4):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    torch.testing.assert_close(orthogonalise(matrix), x, rtol=1e-6, atol=1e-6)


def test_orthogonalised_rows() -> None:
    torch.manual_seed(0)
    for shape in ((16, 432), (432, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(*shape)))
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.25
    assert bool(torch.isfinite(orthogonalise(torch.zeros(3, 5))).all())


def test_muon_turns_a_convolution_by_its_rate() -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(8, 16, 3, bias=False)
    with torch.no_grad():
        conv.weight.mul_(4 / conv.weight.norm())
    before = conv.weight.detach().clone()
    optimiser = Muon(conv.parameters(), lr=0.02)
    conv.weight.grad = torch.randn_like(conv.weight)
    optimiser.step()
    assert float(conv.weight.detach().norm()) == pytest.approx(4, rel=1e-5)  # sqrt(16 rows)
    turned = float((conv.weight.detach() - before).norm() / before.norm())
    assert 0.014 < turned < 0.025


def test_muon_learns_and_resumes() -> None:
    def build() -> tuple[nn.Sequential, Muon]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1, bias=False), nn.GroupNorm(1, 4), nn.Conv3d(4, 1, 1))
        return net, Muon([net[0].weight], lr=0.03)

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 1, 6, 6, 6, generator=generator)
    y = torch.nn.functional.avg_pool3d(x, 3, 1, 1)

    def train(net: nn.Sequential, optimiser: Muon, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            net.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    net, optimiser = build()
    losses = train(net, optimiser, 20)
    assert losses[-1] < 0.8 * losses[0]
    first, optimiser1 = build()
    train(first, optimiser1, 7)
    second, optimiser2 = build()
    second.load_state_dict(first.state_dict())
    optimiser2.load_state_dict(optimiser1.state_dict())
    train(second, optimiser2, 13)
    assert torch.equal(second[0].weight, net[0].weight)


def test_averages_of_turning_weights_get_their_length_back() -> None:
    weight = nn.Parameter(torch.randn(6, 20))
    free = nn.Parameter(torch.randn(6, 20))
    optimiser = Muon([{"params": [weight]}, {"params": [free], "renormalise": False}], lr=0.1)
    kept = free.detach().clone()
    with torch.no_grad():
        weight.mul_(0.7)
    optimiser.restore_norms()
    assert float(weight.detach().norm()) == pytest.approx(6**0.5, rel=1e-6)
    assert torch.equal(free, kept)


def test_settings_of_optimisers_are_heeded_by_all_of_them() -> None:
    made = network("C")
    preparation = Preparation()
    for name in ("lookahead_radam", "adamw", "muon"):
        changes = [f"optimiser.name={name}", "optimiser.weight_decay=0.1", "optimiser.pade_lr=0.5"]
        optimisers = OccupancyRecipe(made, preparation, make_settings("C", changes=changes)).optimisers()
        groups = [group for optimiser in optimisers for group in optimiser.param_groups]
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, made.parameters()))
        assert {g["lr"] for g in groups if g.get("name") == "pade"} == {0.5}
        assert {g["weight_decay"] for g in groups if "weight_decay" in g} == {0.1}


def test_muon_leaves_what_no_normalisation_follows() -> None:
    """The segmentation head and the patches' convolutions of the paper learn the size of their weights."""
    made = network("C")
    turned = {id(p) for p in directions(made)}
    names = {name for name, p in made.named_parameters() if id(p) in turned}
    assert names
    assert all("main_mapping" in n or "output_mappings" in n or "final_mapping" in n for n in names), names


@pytest.mark.parametrize("kind", ["muon", "adamw", "lookahead_radam"])
def test_averages_of_gradients_that_ended_never_become_subnormal(kind: str) -> None:
    """A unit that answers nothing any more: its numbers would take a CPU a hundred times as long."""
    made: dict[bool, Tensor] = {}
    for forgets in (True, False):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 6))
        optimiser = {
            "muon": lambda w: Muon([w], lr=1e-3),
            "adamw": lambda w: torch.optim.AdamW([w], 1e-3, betas=(0.9, 0.99)),
            "lookahead_radam": lambda w: Lookahead(torch.optim.RAdam([w], 1e-3)),
        }[kind](weight)
        inner = optimiser.inner if isinstance(optimiser, Lookahead) else optimiser
        faintest = 1.0
        for step in range(3000):
            weight.grad = torch.randn(4, 6)
            if step > 20:
                weight.grad[0] = 0
            optimiser.step()
            if forgets and step % FORGETS == 0:
                forget_faint([optimiser])
            for value in inner.state[weight].values():
                if value.ndim and bool((value != 0).any()):
                    faintest = min(faintest, float(value[value != 0].abs().min()))
        assert (faintest > torch.finfo(torch.float32).tiny) == forgets
        made[forgets] = weight.detach()
    torch.testing.assert_close(made[True], made[False], rtol=1e-6, atol=1e-7)

"""The state file."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ossnet.errors import ModelError
from ossnet.training.checkpoint import Average, load_state, save_state

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(-1e6, 1e6), st.text(max_size=5)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(0, 9)), inner, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=40)
@given(tree=TREES)
def test_trees_come_back(tmp_path_factory: pytest.TempPathFactory, tree: object) -> None:
    file = tmp_path_factory.mktemp("state") / "s.safetensors"
    save_state({"tree": tree, "tensor": torch.arange(3)}, file)
    back = load_state(file)
    assert back["tree"] == tree
    assert torch.equal(back["tensor"], torch.arange(3))


def test_an_optimiser_comes_back_exactly(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimiser = torch.optim.RAdam([weight])
    for _ in range(7):
        (weight**2).sum().backward()
        optimiser.step()
    save_state({"optimiser": optimiser.state_dict()}, tmp_path / "s.safetensors")
    other = torch.optim.RAdam([torch.nn.Parameter(weight.detach().clone())])
    other.load_state_dict(load_state(tmp_path / "s.safetensors")["optimiser"])
    for mine, theirs in zip(optimiser.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine)


def test_no_state_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no state to resume"):
        load_state(tmp_path / "nothing.safetensors")


def test_the_average_follows_and_forgets_its_start() -> None:
    network = torch.nn.Linear(2, 2)
    average = Average(network, 0.9)
    torch.nn.init.ones_(network.weight)
    for _ in range(100):
        average.update(network)
    torch.testing.assert_close(average.values["weight"], torch.ones(2, 2), atol=1e-3, rtol=0)


def test_the_average_looks_back_on_a_twentieth_of_the_steps() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    average = Average(network, 0.999)
    for step in range(1, 2001):
        torch.nn.init.constant_(network.weight, step)
        average.update(network)
    assert 2000 - float(average.values["weight"]) == pytest.approx(2000 / 21, rel=0.02)

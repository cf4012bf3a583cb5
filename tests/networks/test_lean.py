"""The lean formulation computes what the plain one does: answers, gradients, statistics."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ossnet.networks import kernels, native
from ossnet.networks.lean import lean
from ossnet.networks.lean_pade import lean_pade
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.pade import INITIAL_DENOMINATOR, INITIAL_NUMERATOR, pade
from ossnet.networks.variants import spec_for

SHAPE = (32, 32, 16)


@pytest.fixture(params=["native", "tensor operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and native.library() is None:
        pytest.skip("no C compiler here")
    if request.param != "native":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return str(request.param)


def network_for(variant: str, classes: int = 1) -> OSSNet:
    torch.manual_seed(0)
    network = OSSNet(spec_for(variant, 2, classes, SHAPE, blocks=(4, 8)))
    with torch.no_grad():
        for name, value in network.named_parameters():
            if ".weight_" not in name:
                value.add_(0.05 * torch.randn_like(value))
    return network


def batch(network: OSSNet, count: int = 40) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(1)
    locations = torch.stack([torch.randint(0, n, (2, count)) for n in SHAPE], -1).float()
    channels = network.spec.patch_channels
    # Channels last in memory, as patches are gathered.
    patches = torch.randn(2, count, 7, 7, 7, channels).permute(0, 1, 5, 2, 3, 4) if channels else None
    return torch.randn(2, 2, *(n // 2 for n in SHAPE)), locations, patches


def step(network: OSSNet, pulled: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a training step."""
    network.train()
    logits, segmentation = network(*pulled)
    torch.manual_seed(2)
    loss = (logits * torch.randn(logits.shape)).sum()
    if segmentation is not None:
        loss = loss + (segmentation * torch.randn(segmentation.shape)).sum()
    loss.backward()
    return logits.detach(), {k: p.grad for k, p in network.named_parameters() if p.grad is not None}


def exact_gradients(network: OSSNet, pulled: tuple[Tensor, Tensor, Tensor | None]) -> dict[str, Tensor]:
    """Gradients of the plain step in double precision, with the float32 step's random numbers."""
    network.double()
    volume, locations, patches = pulled
    return step(
        network, (volume.double(), locations.double(), None if patches is None else patches.double())
    )[1]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("variant", "classes"), [("O-Net", 1), ("B", 1), ("C", 3), ("D1", 1)])
def test_a_step_is_the_plain_step(way: str, variant: str, classes: int, recompute: bool) -> None:
    plain = network_for(variant, classes)
    ours, plain_again = copy.deepcopy(plain), copy.deepcopy(plain)
    lean(ours, recompute=recompute)
    given = batch(plain)
    expected, gradients = step(plain, given)
    found, own = step(ours, given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    truth = exact_gradients(plain_again, given)
    assert own.keys() == gradients.keys()
    everything = max(float(g.abs().max()) for g in truth.values())
    for name, gradient in gradients.items():
        # No further from the truth than the plain step is: some gradients are sums that cancel.
        error, usual = (float((g - truth[name]).abs().max()) for g in (own[name], gradient))
        assert error <= 4 * usual + 1e-5 * float(truth[name].abs().max()) + 1e-7 * everything, name
    # Running averages moved once, by the same amounts.
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))


def test_the_state_dict_stays_and_the_switch_goes_back() -> None:
    network = network_for("C")
    keys, given = list(network.state_dict()), batch(network)
    network.eval()
    before = network(*given).logits
    lean(network)
    assert list(network.state_dict()) == keys
    assert network.decoder.formulation is not None
    copy.deepcopy(network)
    lean(network, enabled=False)
    assert torch.equal(network(*given).logits, before)


def test_less_is_kept() -> None:
    def kept(network: OSSNet) -> int:
        held: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return x

        volume, locations, patches = batch(network, 256)
        latent = network.encode(volume).latent.detach()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits = network.decode(locations, patches, latent)
        assert logits.requires_grad
        return sum(held.values())

    network = network_for("C")
    plain = kept(network)
    lean(network)
    ours = kept(network)
    lean(network, recompute=True)
    assert kept(network) < 0.6 * ours < 0.4 * plain


def test_half_precision_under_autocast(way: str) -> None:
    network = network_for("C")
    lean(network)
    given = batch(network)
    exact, _ = step(network, given)
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half, gradients = step(network, given)
    assert all(g.isfinite().all() for g in gradients.values())
    assert float((half - exact).abs().mean()) < 0.05 * float(exact.std())


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5, 6), (0, 4)])
def test_a_unit_alone(way: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    n, d = torch.tensor(INITIAL_NUMERATOR, requires_grad=True), torch.tensor(INITIAL_DENOMINATOR)
    d = (d * torch.tensor([1.0, -1, 0, 1])).requires_grad_()
    pull = torch.randn(shape)
    expected = torch.autograd.grad(pade(x, n, d), (x, n, d), pull)
    found = torch.autograd.grad(lean_pade(x, n, d), (x, n, d), pull)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    n = torch.tensor(INITIAL_NUMERATOR, dtype=torch.float64, requires_grad=True)
    d = torch.tensor([0.3, -2.0, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lean_pade, (x, n, d))


def test_second_derivatives_of_a_network_with_respect_to_the_location() -> None:
    plain = network_for("O-Net").eval()
    ours = copy.deepcopy(plain)
    lean(ours)

    def curvature(network: OSSNet) -> Tensor:
        volume, locations, _ = batch(network, 8)
        locations.requires_grad_()
        logits = network(volume, locations).logits
        (slope,) = torch.autograd.grad(logits.sum(), locations, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), locations)[0]

    torch.testing.assert_close(curvature(ours), curvature(plain), rtol=1e-3, atol=1e-4)


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network = network_for("C")
    lean(network, recompute=True)
    gradients = half_step(network, slice(rank, rank + 1))
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    torch.save([gradients, dict(network.named_buffers())], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def half_step(network: OSSNet, part: slice) -> dict[str, Tensor]:
    volume, locations, patches = batch(network)
    assert patches is not None
    logits = network(volume[part], locations[part], patches[part]).logits
    logits.square().sum().backward()
    return {k: p.grad for k, p in network.named_parameters() if p.grad is not None}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    alone = network_for("C")
    expected = half_step(alone, slice(0, 2))
    for rank in range(2):
        gradients, buffers = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(buffers, dict(alone.named_buffers()), rtol=1e-4, atol=1e-5)
        everything = max(float(g.abs().max()) for g in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * everything, msg=name)

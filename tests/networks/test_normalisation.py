"""Batch statistics: against torch, and of two processes against one."""

from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ossnet.networks.normalisation import (
    BatchNorm3d,
    ConditionalBatchNorm,
    MomentsNorm,
    Statistics,
    batch_moments,
)
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.variants import NetworkSpec

SPEC = NetworkSpec(
    variant="C", channels=2, blocks=(4, 4), grid=(2, 1, 1), patches="small", skip=True, head=True, width=6
)
STATISTICS = get_args(Statistics)
SHARES = (2, 1)
"""Volumes of each process: uneven on purpose."""


def batch(spec: NetworkSpec = SPEC) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(3, spec.channels, *spec.encoder_shape, generator=generator, dtype=torch.float64),
        16 * torch.rand(3, 5, 3, generator=generator, dtype=torch.float64),
        torch.randn(3, 5, spec.patch_channels, 7, 7, 7, generator=generator, dtype=torch.float64),
    )


def network(statistics: Statistics) -> OSSNet:
    torch.manual_seed(5)
    values = SPEC.to_dict() | {"cbn_statistics": statistics}
    net = OSSNet(NetworkSpec.from_dict(values))
    for module in net.modules():  # conditions that differ between volumes
        if isinstance(module, ConditionalBatchNorm):
            nn.init.normal_(module.linear_gamma.weight)
            nn.init.normal_(module.linear_beta.weight)
    return net.double()  # so that only rounding of 1e-16 can hide a wrong sum


def train_step(net: OSSNet, volume: Tensor, locations: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a loss that is a mean over the global batch of 3."""
    out = net(volume, locations, patches)
    assert out.segmentation is not None
    loss = out.logits.square().sum() / 3 + out.segmentation.square().sum() / 3
    # A second derivative has to cross the processes too.
    (slope,) = torch.autograd.grad(loss, net.encoder.blocks[0].main_mapping[0].weight, create_graph=True)
    if dist.is_initialized():
        slope = _Sum.apply(slope)
    # Each process has the whole penalty, so each may only contribute its share of it.
    (loss + slope.square().sum() / (len(SHARES) if dist.is_initialized() else 1)).backward()
    return loss, out.logits


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SHARES))
    start = sum(SHARES[:rank])
    results: dict[str, Any] = {}
    for statistics in STATISTICS:
        net = network(statistics)
        _, logits = train_step(net, *(x[start : start + SHARES[rank]] for x in batch()))
        for parameter in net.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        results[statistics] = {
            "logits": logits.detach(),
            "gradients": {k: p.grad for k, p in net.named_parameters()},
            "buffers": dict(net.named_buffers()),
        }
    # One process without any value still takes part.
    moments = batch_moments(torch.arange(4.0) if rank == 0 else torch.empty(0), (0,))
    results["moments"] = [moments.mean, moments.variance, moments.values]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes computed together."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, (str(folder),), nprocs=len(SHARES))  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(SHARES))]


@pytest.mark.parametrize("statistics", STATISTICS)
def test_two_processes_equal_one(processes: list[dict[str, Any]], statistics: Statistics) -> None:
    parts = [results[statistics] for results in processes]
    alone = network(statistics)
    _, logits = train_step(alone, *batch())
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.cat([p["logits"] for p in parts]), logits.detach(), **close)
    for part in parts:
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(
                part["gradients"][name], parameter.grad, **close, msg=lambda m, n=name: f"{n}: {m}"
            )
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(part["buffers"][name], buffer, **close)


def test_a_process_without_values_takes_part(processes: list[dict[str, Any]]) -> None:
    for results in processes:
        assert [float(value) for value in results["moments"]] == [1.5, 1.25, 4]


def test_batch_norm_equals_torchs() -> None:
    ours, theirs = BatchNorm3d(3), nn.BatchNorm3d(3)
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
            module.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    for _ in range(3):
        x = torch.randn(2, 3, 4, 5, 2) * 3 + 1
        assert torch.equal(ours(x), theirs(x))
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


def test_scalar_statistics_equal_torchs_batch_norm_over_one_channel() -> None:
    """SPEC §2: BatchNorm1d(1) on (B·N, 1, F)."""
    ours = ConditionalBatchNorm(latent=2, features=6)
    theirs = nn.BatchNorm1d(1, affine=False)
    x, latent = torch.randn(2, 5, 6) * 4 + 7, torch.randn(2, 2)
    # Untrained, γ = 1 and β = 0 whatever the latent.
    torch.testing.assert_close(
        ours(x, latent), theirs(x.reshape(10, 1, 6)).reshape(2, 5, 6), rtol=1e-5, atol=1e-5
    )
    assert ours.normalization.running_mean.shape == (1,)
    torch.testing.assert_close(ours.normalization.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.normalization.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(
        ours(x, latent), theirs(x.reshape(10, 1, 6)).reshape(2, 5, 6), rtol=1e-5, atol=1e-5
    )


def test_feature_statistics_are_one_pair_a_feature() -> None:
    norm = MomentsNorm(3, "feature")
    x = torch.randn(2, 50, 3) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([0.0, 10.0, -5.0])
    mean, inverse = norm(x)
    torch.testing.assert_close(mean, x.mean((0, 1)))
    torch.testing.assert_close(inverse, 1 / (x.var((0, 1), correction=0) + 1e-5).sqrt())


def test_gradients_of_conditional_batch_norm() -> None:
    norm = ConditionalBatchNorm(2, 3).double()
    nn.init.normal_(norm.linear_gamma.weight)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    latent = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x, latent))


def test_half_precision_keeps_its_type() -> None:
    norm = ConditionalBatchNorm(2, 3)
    x = torch.randn(2, 400, 3) + 100
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x.bfloat16(), torch.randn(2, 2).bfloat16())
    assert y.dtype == torch.bfloat16
    assert abs(float(y.detach().float().std()) - 1) < 0.05


def test_a_single_value_has_no_variance() -> None:
    with pytest.raises(ValueError, match="at least two"):
        batch_moments(torch.zeros(1, 1, 1), (0, 1, 2))

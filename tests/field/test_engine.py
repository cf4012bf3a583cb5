"""The engine's answers are the network's, whatever else is asked with them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ossnet.data.patches import PatchSource
from ossnet.data.preparation import reduce_by_two
from ossnet.errors import ResourceError, SettingsError
from ossnet.field.engine import gather, products
from ossnet.field.engine.answer import Answer
from ossnet.field.engine.encoding import encode
from ossnet.field.engine.fused import MARGIN, FusedAnswer, close_calls
from ossnet.field.engine.prepare import _on, prepare
from ossnet.field.engine.products import Products
from ossnet.field.memory import MemoryNotice
from ossnet.networks import kernels, native, toeplitz
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.variants import spec_for

SHAPE = (32, 32, 16)


def trained(variant: str, channels: int = 2, classes: int = 1) -> OSSNet:
    """A network whose weights and running statistics are all away from their initial values."""
    torch.manual_seed(0)
    network = OSSNet(spec_for(variant, channels, classes, SHAPE, blocks=(4, 8)))
    return with_noise(network)


def with_noise(network: OSSNet) -> OSSNet:
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point() and ".weight_" not in name:
                value.add_(0.05 * torch.randn_like(value))
    return network.eval()


def direct(network: OSSNet, image: torch.Tensor, locations: torch.Tensor) -> torch.Tensor:
    """What the module says, with everything in one batch."""
    with torch.no_grad():
        latent = network.encode(reduce_by_two(image)[None]).latent
        patches = PatchSource(image, network.spec.patches)(locations)
        return network.decode(locations[None].float(), None if patches is None else patches[None], latent)[0]


def some_locations(count: int) -> torch.Tensor:
    return torch.stack([torch.randint(0, n, (count,)) for n in SHAPE], 1)


@pytest.mark.parametrize("variant", ["O-Net", "A", "B", "C", "D"])
@pytest.mark.parametrize("classes", [1, 3])
def test_answers_are_the_networks(variant: str, classes: int) -> None:
    network, image = trained(variant, classes=classes), torch.randn(2, *SHAPE)
    locations = some_locations(300)
    answer = prepare(network, image, chunk=64)
    assert isinstance(answer, Answer)
    torch.testing.assert_close(answer(locations), direct(network, image, locations), rtol=1e-4, atol=1e-4)


def test_unknown_family_is_refused() -> None:
    with pytest.raises(SettingsError, match="Linear"):
        prepare(torch.nn.Linear(1, 1), torch.zeros(1, 4, 4, 4))


def test_an_image_of_another_shape_is_refused() -> None:
    with pytest.raises(SettingsError, match="image"):
        prepare(trained("C"), torch.zeros(2, 32, 32, 32))


@pytest.fixture(params=["native", "tensor operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled loops, and as on a machine without a compiler."""
    if request.param == "native" and native.library() is None:
        pytest.skip("no C compiler here")
    if request.param != "native":
        for module in (kernels, gather, products):
            monkeypatch.setattr(module, "library", lambda: None)
    return str(request.param)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("variant", ["O-Net", "B", "C", "D1"])
@pytest.mark.parametrize("spectral", [True, False])
def test_fused_equals_the_module(way: str, variant: str, spectral: bool) -> None:
    network, image = trained(variant, channels=3, classes=4), torch.randn(3, *SHAPE)
    with torch.no_grad():
        encoding = network.encode(reduce_by_two(image)[None])
    between = torch.rand(100, 3) * (torch.tensor(SHAPE) - 1)
    for locations in (some_locations(100), between):
        answer = FusedAnswer(network, image, encoding, chunk=48, spectral=spectral)
        expected = direct(network, image, locations)
        torch.testing.assert_close(answer(locations), expected, rtol=1e-4, atol=1e-4)


def test_what_padding_holds_does_not_pile_up(way: str) -> None:
    """A unit that is applied to what it gave, over and over, leaves the numbers: what is padded must not be."""
    network, image, locations = trained("A"), torch.randn(2, *SHAPE), some_locations(32)
    for name, value in network.state_dict().items():
        if name.endswith("weight_numerator"):
            value[0] += 0.1
            value[5] += 0.3
        elif name.endswith("weight_denominator"):
            value[3] -= 0.05
    answer = prepare(network, image, chunk=32)
    first = answer(locations)
    torch.testing.assert_close(first, direct(network, image, locations), rtol=1e-3, atol=1e-3)
    for _ in range(200):
        again = answer(locations)
    assert torch.equal(again, first)


@pytest.mark.parametrize(
    "change", [{"cbn_statistics": "feature"}, {"normalise_coordinates": True}, {"width": 40}]
)
def test_every_declaration(way: str, change: dict[str, object]) -> None:
    torch.manual_seed(0)
    spec = replace(spec_for("A", 1, 1, SHAPE, blocks=(4, 8)), **change)
    network, image, locations = with_noise(OSSNet(spec)), torch.randn(1, *SHAPE), some_locations(60)
    expected = direct(network, image, locations)
    torch.testing.assert_close(prepare(network, image)(locations), expected, rtol=1e-4, atol=1e-4)
    half = prepare(network, image, precision="bf16")(locations)
    assert float((half - expected).abs().max()) < 0.2


def test_an_input_as_wide_as_the_block() -> None:
    # 3 coordinates, 343 local features and 32 latent values: the first block's shortcut is the identity.
    spec = replace(spec_for("A", 1, 1, SHAPE, blocks=(4, 8)), width=3 + 343 + 32)
    network, image, locations = with_noise(OSSNet(spec)), torch.randn(1, *SHAPE), some_locations(60)
    assert isinstance(network.decoder.blocks[0].residual_mapping, torch.nn.Identity)
    expected = direct(network, image, locations)
    torch.testing.assert_close(prepare(network, image)(locations), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_answer_does_not_depend_on_what_else_is_asked(way: str, precision: str) -> None:
    network, image, locations = trained("C"), torch.randn(2, *SHAPE), some_locations(400)
    whole = prepare(network, image, precision=precision)(locations)  # type: ignore[arg-type]
    answer = prepare(network, image, precision=precision, chunk=64)  # type: ignore[arg-type]
    order = torch.randperm(400)
    for part in order.split([1, 2, 30, 100, 267]):
        found = answer(locations[part])
        if precision == "bf16" and has_amx():
            # There the number of rows decides in which order oneDNN adds up; what is close to a decision is exact.
            torch.testing.assert_close(found, whole[part], rtol=0.02, atol=0.02)
            assert torch.equal(found > 0, whole[part] > 0)
        else:
            assert torch.equal(found, whole[part])


def has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def test_bf16_labels_are_those_of_fp32() -> None:
    network, image, locations = trained("C", classes=3), torch.randn(2, *SHAPE), some_locations(3000)
    exact = prepare(network, image)(locations)
    fast = prepare(network, image, precision="bf16")(locations)
    assert torch.equal(fast.argmax(1), exact.argmax(1))
    # What is close to a decision is answered in float32.
    close = close_calls(exact, MARGIN / 2)
    assert bool(close.any())
    torch.testing.assert_close(fast[close], exact[close])


def test_outside_counts_as_the_border() -> None:
    network, image = trained("C"), torch.randn(2, *SHAPE)
    answer = prepare(network, image)
    outside = torch.tensor([[-3.0, 2.0, 40.0], [31.0, 2.0, 15.0]])
    inside = torch.tensor([[0, 2, 15], [31, 2, 15]])
    assert torch.equal(answer(outside), answer(inside))


def test_nothing_asked() -> None:
    answer = prepare(trained("C", classes=3), torch.randn(2, *SHAPE))
    assert answer(torch.zeros(0, 3)).shape == (0, 3)


def test_a_grant_makes_chunks_smaller_and_is_kept() -> None:
    network, image = trained("C"), torch.randn(2, *SHAPE)
    free, bound = prepare(network, image), prepare(network, image, memory="24MB")
    assert bound.chunk < free.chunk
    assert bound.fixed_bytes + bound.chunk * bound.bytes_per_location <= 24e6
    locations = some_locations(50)
    assert torch.equal(bound(locations), free(locations))
    with pytest.raises(ResourceError, match="at least"):
        prepare(network, image, memory="5MB")


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_a_chunk_is_no_way_around_the_grant(engine: str) -> None:
    network, image = trained("D"), torch.randn(2, *SHAPE)
    free = prepare(network, image, chunk=8192, engine=engine)  # type: ignore[arg-type]
    grant = free.fixed_bytes + 600 * free.bytes_per_location
    bound = prepare(network, image, chunk=8192, memory=grant + (200 << 20), engine=engine)  # type: ignore[arg-type]
    assert bound.chunk <= free.chunk
    with pytest.raises(ResourceError, match="at least"):
        prepare(network, image, chunk=4096, memory=free.fixed_bytes, engine=engine)  # type: ignore[arg-type]


def test_an_answer_made_in_inference_mode_leaves_trainings_alone() -> None:
    toeplitz._taps.cache_clear()
    network, image = trained("A"), torch.randn(2, *SHAPE)
    with torch.inference_mode():
        prepare(network, image)
    weight = torch.randn(2, 1, 7, 7, 7, requires_grad=True)
    toeplitz.toeplitz(weight).square().sum().backward()
    assert weight.grad is not None


def test_refused_memory_halves_the_chunk_with_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = Products.allocate

    def refuse(self: Products, rows: int) -> None:
        if rows > 600:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        allocate(self, rows)

    monkeypatch.setattr(Products, "allocate", refuse)
    with pytest.warns(MemoryNotice, match="going on with 512"):
        answer = prepare(trained("C"), torch.randn(2, *SHAPE), chunk=1024)
    assert answer.chunk == 512


@pytest.mark.parametrize("memory", [1, 200_000, None])
@pytest.mark.parametrize("variant", ["A", "C"])
def test_the_encoder_in_slabs_is_the_encoder(way: str, variant: str, memory: int | None) -> None:
    network, image = trained(variant), torch.randn(2, *SHAPE)
    with torch.no_grad():
        expected = network.encode(reduce_by_two(image)[None])
    found = encode(network.encoder, image, memory)
    torch.testing.assert_close(found.latent, expected.latent)
    if variant == "C":
        torch.testing.assert_close(found.segmentation, expected.segmentation)


def test_a_network_stays_where_it_is_when_it_is_asked_elsewhere() -> None:
    """One model, fields on several devices: none takes the network away from another."""
    made = trained("C")
    assert _on(made, torch.device("cpu")) is made
    elsewhere = _on(made, torch.device("meta"))
    assert {p.device.type for p in elsewhere.parameters()} == {"meta"}
    assert {p.device.type for p in made.parameters()} == {"cpu"}

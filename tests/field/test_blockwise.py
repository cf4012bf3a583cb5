import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ossnet.errors import ResourceError, SettingsError
from ossnet.field.engine.blockwise.answer import BlockwiseAnswer
from ossnet.field.engine.blockwise.receptive import receptive_halo
from ossnet.networks.multiscale import MultiscaleNetwork, MultiscaleSpec, Stage, positions_in_scan

STAGES = (
    Stage((2, 2, 2), (3, 3, 3), 4, 0, 1, 4),
    Stage((2, 2, 1), (3, 3, 1), 8, 0, 1, 8),
    Stage((2, 2, 2), (3, 3, 3), 8, 1, 0, 6),
    Stage((2, 2, 2), (3, 3, 3), 8, 1, 1, 6),
)
SPEC = MultiscaleSpec(1, 1, (1.0, 1.0, 2.0), STAGES, (3, 3, 1), decoder_width=16, decoder_blocks=1)


def trained(spec: MultiscaleSpec = SPEC) -> MultiscaleNetwork:
    """Random weights without zeros or small gains, so that errors at borders show."""
    torch.manual_seed(1)
    network = MultiscaleNetwork(spec).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.5)
        for block in network.decoder.blocks:
            torch.nn.init.normal_(block[3].weight, std=0.1)
    return network


def whole(network: MultiscaleNetwork, volume: torch.Tensor, locations: torch.Tensor) -> torch.Tensor:
    """The training-time module on the whole padded volume."""
    padding: list[int] = []
    for n, s in zip(reversed(volume.shape[1:]), reversed(network.spec.strides[-1]), strict=True):
        padding += [0, -n % s]
    size = torch.tensor(volume.shape[1:]).float()
    positions = positions_in_scan(locations, size)[None] if network.spec.position else None
    with torch.inference_mode():
        logits, _ = network(F.pad(volume[None], padding, mode="replicate"), locations[None], positions)
    return logits[0, :, 0] if network.spec.classes == 1 else logits[0]


def random_locations(shape: tuple[int, ...], count: int = 400) -> torch.Tensor:
    return torch.rand(count, 3) * (torch.tensor(shape) - 1.0)


@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(9, 50), st.integers(1, 30)),
    block=st.sampled_from([8, 16, 24]),
    options=st.sampled_from(
        [
            {},
            {"classes": 3},
            {"top_down": False},
            {"channels": 2},
            {"position": True},
            {"stages": STAGES[:2]},
            {"stages": STAGES[:1]},
        ]
    ),
    work=st.sampled_from([1 << 14, 1 << 20]),
)
def test_blocks_equal_the_whole(
    shape: tuple[int, int, int], block: int, options: dict[str, Any], work: int
) -> None:
    network = trained(replace(SPEC, **options))
    volume, locations = torch.randn(network.spec.channels, *shape), random_locations(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ossnet.field.engine.blockwise.answer.WORK_BYTES", work)
        answer = BlockwiseAnswer(network, volume, block=block)
    expected = whole(network, volume, locations)
    assert torch.allclose(answer(locations), expected, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_an_answer_does_not_depend_on_what_else_is_asked() -> None:
    volume = torch.randn(1, 40, 30, 20)
    answer = BlockwiseAnswer(trained(), volume, block=16, chunk=100)
    locations = random_locations((40, 30, 20))
    together = answer(locations)
    for some in (torch.arange(1), torch.arange(13, 50), torch.randperm(400)[:99]):
        fresh = BlockwiseAnswer(trained(), volume, block=16)
        assert torch.equal(fresh(locations[some]), together[some])


def test_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question moves what is covered and which blocks are kept: others are let in where that shows."""
    usual = BlockwiseAnswer._compute_block

    def slow(encoder: BlockwiseAnswer, block: tuple[int, int, int]) -> Any:
        time.sleep(0.002)
        return usual(encoder, block)

    monkeypatch.setattr(BlockwiseAnswer, "_compute_block", slow)
    network, volume = trained(), torch.randn(1, 600, 24, 24)
    extent = torch.tensor([20.0, 23.0, 23.0])
    places = [torch.rand(50, 3) * extent + torch.tensor([x, 0, 0]) for x in (0, 280, 560)]
    alone = [BlockwiseAnswer(network, volume)(p) for p in places]
    for _ in range(3):
        shared = BlockwiseAnswer(network, volume)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(shared, p) for p in places]
            while not all(a.done() for a in asked):
                _ = shared.fixed_bytes  # raises nothing while others change the blocks that it counts
            together = [a.result() for a in asked]
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_only_asked_blocks_are_computed() -> None:
    answer = BlockwiseAnswer(trained(), torch.randn(1, 64, 64, 16), block=16)
    answer(torch.tensor([[3, 3, 3], [10, 10, 12], [60, 60, 3]]))
    assert answer.computed == 2
    answer(torch.tensor([[4, 3, 3]]))
    assert answer.computed == 2


def test_a_region_with_its_halo_answers_as_the_whole() -> None:
    network, volume = trained(), torch.randn(1, 320, 24, 16)
    halo = receptive_halo(network.spec)
    start, stop = (128 - halo[0]), 144 + halo[0]
    assert start > 0
    assert stop < 320
    locations = random_locations((16, 24, 16)) + torch.tensor([128.0, 0.0, 0.0])
    part = BlockwiseAnswer(network, volume[:, start:stop])(locations - torch.tensor([float(start), 0.0, 0.0]))
    assert torch.allclose(part, BlockwiseAnswer(network, volume)(locations), atol=1e-5)


def budget_for(free: BlockwiseAnswer, blocks: int) -> int:
    """What the least work of an encoder takes with chunks of 512, and so many bytes for blocks."""
    return (16 << 20) + sum(m.bytes for m in free._coarse) + 512 * free.bytes_per_location + blocks


def test_memory_is_bounded_by_the_budget() -> None:
    network, volume = trained(), torch.randn(1, 96, 96, 32)
    free = BlockwiseAnswer(network, volume, block=16)
    locations = random_locations((96, 96, 32), 2000)
    expected = free(locations)
    budget = budget_for(free, 300 << 10)
    tight = BlockwiseAnswer(network, volume, block=16, budget=budget, chunk=512)
    assert torch.equal(tight(locations), expected)
    assert tight.fixed_bytes + tight.work + tight.chunk * tight.bytes_per_location <= budget
    assert tight.fixed_bytes < free.fixed_bytes
    with pytest.raises(ResourceError, match="Grant more"):
        BlockwiseAnswer(network, volume, budget=1 << 20)


def test_kept_blocks_give_way_where_a_device_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    network, volume = trained(), torch.randn(1, 48, 40, 24)
    locations = random_locations((48, 40, 24))
    expected = BlockwiseAnswer(network, volume, block=16)(locations)
    encoder, compute = BlockwiseAnswer(network, volume, block=16), BlockwiseAnswer._compute_block
    most = 0

    def scarce(self: BlockwiseAnswer, block: tuple[int, int, int]) -> Any:
        nonlocal most
        if len(self.blocks) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        most = max(most, len(self.blocks))
        return compute(self, block)

    monkeypatch.setattr(BlockwiseAnswer, "_compute_block", scarce)
    torch.testing.assert_close(encoder(locations), expected)
    assert most == 2
    monkeypatch.setattr(BlockwiseAnswer, "_compute_block", lambda *_: 1 / 0)
    encoder.blocks.clear()
    with pytest.raises(ZeroDivisionError):
        encoder(locations)


def test_a_part_of_a_scan_needs_the_budget_of_the_part() -> None:
    network, volume = trained(), torch.randn(1, 4000, 16, 16)
    free = BlockwiseAnswer(network, volume)
    free.cover()
    held = sum(m.bytes for m in free._coarse)
    answer = BlockwiseAnswer(
        network, volume, chunk=256, budget=(16 << 20) + 256 * free.bytes_per_location + held // 2
    )
    answer.cover(((400, 0, 0), (440, 16, 16)))
    locations = random_locations((40, 16, 16)) + torch.tensor([400.0, 0.0, 0.0])
    assert torch.allclose(answer(locations), free(locations), atol=1e-5)
    with pytest.raises(ResourceError, match="Grant more"):
        answer.cover()
    with pytest.raises(ResourceError, match="Grant more"):
        answer.set_aside(held)
    assert torch.allclose(answer(locations), free(locations), atol=1e-5)


def test_what_is_set_aside_takes_the_place_of_blocks() -> None:
    network, volume = trained(), torch.randn(1, 96, 96, 32)
    answer = BlockwiseAnswer(network, volume, block=16, budget=64 << 20, chunk=512)
    locations = random_locations((96, 96, 32), 2000)
    expected, held = answer(locations), answer.fixed_bytes
    assert answer.room is not None
    answer.set_aside(answer.room - held + held // 4)
    assert held // 2 < answer.fixed_bytes <= answer.room < held
    assert torch.equal(answer(locations), expected)


def test_bfloat16_is_close() -> None:
    volume, locations = torch.randn(1, 32, 32, 16), random_locations((32, 32, 16))
    exact = BlockwiseAnswer(trained(), volume)(locations)
    rough = BlockwiseAnswer(trained(), volume, precision="bf16")(locations)
    assert rough.dtype == torch.float32
    assert float((rough - exact).abs().mean()) < 0.05 * float(exact.std())


@pytest.mark.parametrize("classes", [1, 3])
def test_coarse_logits_cover_the_scan(classes: int) -> None:
    network = trained(replace(SPEC, classes=classes))
    answer = BlockwiseAnswer(network, torch.randn(1, 33, 16, 9))
    assert answer.coarse is None
    answer.cover()
    assert answer.coarse is not None
    assert answer.coarse.shape == ((5, 2, 3) if classes == 1 else (3, 5, 2, 3))
    # Where the scan needs no padding, cells are those of the network.
    volume = torch.randn(1, 32, 16, 16)
    with torch.inference_mode():
        _, expected = network(volume[None], torch.zeros(1, 1, 3))
    answer = BlockwiseAnswer(network, volume)
    answer.cover()
    coarse = answer.coarse
    assert coarse is not None
    assert torch.allclose(coarse, expected[0, 0] if classes == 1 else expected[0], atol=1e-5)


def test_the_prediction_of_many_classes_is_labels() -> None:
    network, volume = trained(replace(SPEC, classes=12)), torch.randn(1, 32, 16, 16)
    with torch.inference_mode():
        _, expected = network(volume[None], torch.zeros(1, 1, 3))
    answer = BlockwiseAnswer(network, volume)
    answer.cover()
    coarse = answer.coarse
    assert coarse is not None
    assert not coarse.is_floating_point()
    assert torch.equal(coarse.long(), expected[0].argmax(0))


def test_what_is_covered_grows_with_the_questions() -> None:
    network, volume = trained(), torch.randn(1, 900, 16, 16)
    answer, whole = BlockwiseAnswer(network, volume, block=16), BlockwiseAnswer(network, volume, block=16)
    whole.cover()
    locations = random_locations((20, 16, 16))
    for start in (400.0, 460.0, 0.0, 880.0):
        here = locations + torch.tensor([start, 0.0, 0.0])
        assert torch.allclose(answer(here), whole(here), atol=1e-5)
        covered = answer.core[1][0] - answer.core[0][0]
        assert covered < 900 or start in (0.0, 880.0)
    # The prediction is right wherever it is interpolated in the box, and background where nothing is covered.
    part = BlockwiseAnswer(network, volume)
    part.cover(((400, 0, 0), (440, 16, 16)))
    assert part.coarse is not None
    assert whole.coarse is not None
    assert torch.allclose(part.coarse[49:56], whole.coarse[49:56], atol=1e-5)
    assert bool((part.coarse[:49] < 0).all())


def test_what_lies_between_far_questions_is_encoded_where_that_pays() -> None:
    network, volume = trained(), torch.randn(1, 2000, 16, 16)
    answer, whole = BlockwiseAnswer(network, volume, block=16), BlockwiseAnswer(network, volume, block=16)
    whole.cover()
    near, far = (random_locations((20, 16, 16)) + torch.tensor([x, 0.0, 0.0]) for x in (100.0, 1400.0))
    covered = []
    for _ in range(8):
        for here in (near, far):
            assert torch.allclose(answer(here), whole(here), atol=1e-5)
            covered.append(answer.core[1][0] - answer.core[0][0])
    # Each alone at first; going to and fro for as long as all between would have taken ends it.
    assert covered[0] < 100 > covered[1]
    assert covered[-1] > 1200
    encoded = answer._encoded
    answer(near)
    assert answer._encoded == encoded


def test_far_regions_need_the_budget_of_one() -> None:
    network, volume = trained(), torch.randn(1, 2000, 16, 16)
    free = BlockwiseAnswer(network, volume)
    free.cover()
    held = sum(m.bytes for m in free._coarse)
    budget = (16 << 20) + 256 * free.bytes_per_location + held // 4
    answer = BlockwiseAnswer(network, volume, chunk=256, budget=budget)
    for x in (100.0, 1800.0) * 12:
        here = random_locations((20, 16, 16)) + torch.tensor([x, 0.0, 0.0])
        assert torch.allclose(answer(here), free(here), atol=1e-5)
        assert answer.fixed_bytes <= held // 4 + (1 << 20)
    # A prediction is that of its box, wherever others have asked meanwhile.
    found = answer.prediction(((100, 0, 0), (120, 16, 16)))
    assert found is not None
    assert free.coarse is not None
    assert torch.allclose(found[13:15], free.coarse[13:15], atol=1e-5)


def test_what_is_covered_gives_way_to_what_is_about_to_be_made() -> None:
    """As probabilities of a region after the whole scan was segmented."""
    network, volume = trained(), torch.randn(1, 512, 32, 32)
    near, everywhere = torch.rand(500, 3) * 20, ((0, 0, 0), (512, 32, 32))
    free = BlockwiseAnswer(network, volume, block=16)
    tight = BlockwiseAnswer(network, volume, block=16, budget=60 << 20, chunk=256)
    tight.cover()
    bare, held = (tight._needed_bytes(box) for box in (((0, 0, 0),) * 2, everywhere))
    tight.set_aside((60 << 20) - (bare + held) // 2)
    assert tight.core == ((0, 0, 0), (0, 0, 0))
    assert torch.allclose(tight(near), free(near), atol=1e-5)
    with pytest.raises(ResourceError, match="Grant more"):
        tight.cover()


def test_what_the_machine_cannot_spare_is_not_kept() -> None:
    network, volume = trained(), torch.randn(1, 96, 96, 32)
    locations = random_locations((96, 96, 32), 2000)
    free, bounded = (BlockwiseAnswer(network, volume, block=16, most_kept=most) for most in (None, 200_000))
    assert torch.equal(free(locations), bounded(locations))
    assert len(bounded.blocks) < len(free.blocks)
    assert bounded.fixed_bytes < free.fixed_bytes


def test_nothing_is_kept_for_places_that_are_asked_once() -> None:
    network, volume = trained(), torch.randn(1, 96, 96, 32)
    locations = random_locations((96, 96, 32), 2000)
    kept, once = (BlockwiseAnswer(network, volume, block=16, chunk=512, keep=k) for k in (True, False))
    assert torch.equal(kept(locations), once(locations))
    # Questions come block by block, so no block is computed twice for them.
    assert kept.computed == once.computed == len(kept.blocks) > 10
    assert len(once.blocks) == 1


def test_locations_outside_count_as_the_border_and_none_is_fine() -> None:
    answer = BlockwiseAnswer(trained(), torch.randn(1, 20, 20, 10))
    outside = torch.tensor([[-5.0, 3.0, 40.0]])
    assert torch.equal(answer(outside), answer(torch.tensor([[0, 3, 9]])))
    assert answer(torch.zeros(0, 3)).shape == (0,)


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(SettingsError, match="2 channels"):
        BlockwiseAnswer(trained(), torch.randn(2, 16, 16, 16))


def test_a_box_beside_the_scan_is_no_error() -> None:
    encoder = BlockwiseAnswer(trained(), torch.randn(1, 40, 30, 20))
    encoder.cover(((200, 5, 5), (220, 20, 15)))
    assert encoder.coarse is not None
    assert torch.isfinite(encoder(torch.tensor([[210.0, 10.0, 10.0]]))).all()


def test_what_is_kept_is_asked_first_and_not_computed_again() -> None:
    network, volume = trained(), torch.randn(1, 96, 96, 32)
    free = BlockwiseAnswer(network, volume, block=16)
    locations = random_locations((96, 96, 32), 4000)
    expected = free(locations)
    each = (free.fixed_bytes - sum(m.bytes for m in free._coarse)) // len(free.blocks)
    tight = BlockwiseAnswer(network, volume, block=16, budget=budget_for(free, 40 * each), chunk=512)
    tight(locations)
    kept, before = len(tight.blocks), tight.computed
    assert 30 < kept < len(free.blocks) == before
    assert torch.equal(tight(locations), expected)
    assert tight.computed - before == before - kept

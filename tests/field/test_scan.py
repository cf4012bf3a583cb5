"""A scan read in boxes is the prepared scan, whatever its grid, its order in memory and what is asked."""

from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny

from ossnet.data.preparation import Preparation, prepare_scan, reduce_by_two
from ossnet.errors import ResourceError
from ossnet.field.engine.blockwise.answer import BlockwiseAnswer
from ossnet.field.engine.gather import PatchRows
from ossnet.field.engine.scan import Scan, WindowRows
from ossnet.field.memory import LIBRARIES
from ossnet.field.octree.tree import Octree
from ossnet.volume import Orientation, Volume

FITS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "pad": {"fit": "pad", "shape": (20, 17, 16)},
    "resize": {"fit": "resize", "shape": (20, 9, 16)},
}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("turned", [False, True])
def test_boxes_are_parts_of_the_prepared_scan(fit: str, turned: bool) -> None:
    volume = tiny.scan((14, 12, 9), channels=2)
    if turned:
        volume = volume.reoriented(Orientation((2, 0, 1), (True, False, True)))
    preparation = Preparation(**FITS[fit])
    whole = prepare_scan(volume, preparation).image
    scan = Scan.bound(volume, preparation)
    assert scan.shape == tuple(whole.shape)
    rng = np.random.default_rng(0)
    for _ in range(20):
        low = [int(rng.integers(n)) for n in whole.shape[1:]]
        high = [int(rng.integers(a + 1, n + 1)) for a, n in zip(low, whole.shape[1:], strict=True)]
        box = scan.read((low[0], low[1], low[2]), (high[0], high[1], high[2]))
        expected = whole[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        torch.testing.assert_close(box, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scan.hold(), whole, rtol=1e-6, atol=1e-6)


def test_few_voxels_of_a_finer_scan_are_converted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = tiny.scan((40, 36, 30), channels=2)
    scan = Scan.bound(volume, Preparation(fit="resize", shape=(10, 9, 6)))
    whole = scan.read((0, 0, 0), (10, 9, 6))
    sizes: list[int] = []
    source = Scan._source

    def counted(*arguments: Any) -> torch.Tensor:
        part = source(*arguments)
        sizes.append(part.numel())
        return part

    monkeypatch.setattr(Scan, "_source", counted)
    monkeypatch.setattr("ossnet.field.engine.scan.WINDOW", 20_000)
    assert torch.equal(scan.read((0, 0, 0), (10, 9, 6)), whole)
    assert len(sizes) == 5
    assert max(sizes) <= 20_000


@pytest.mark.parametrize("kind", ["u1", "i2", ">i2", "u2", "f2", "f4", ">f4", "f8"])
@pytest.mark.parametrize("layout", ["C", "F", "part"])
@pytest.mark.parametrize("writable", [True, False])
def test_voxels_of_the_caller_are_never_changed(kind: str, layout: Any, writable: bool) -> None:
    values = np.random.default_rng(0).integers(0, 200, (1, 8, 7, 6)).astype(kind)
    values = values[:, 1:7, ::2, 1:] if layout == "part" else np.asarray(values, order=layout)
    before = values.copy()
    values.flags.writeable = writable
    scan = Scan.bound(Volume(values, np.eye(4)), Preparation(normalise="zscore"))
    scan.read((0, 0, 0), (3, 2, 4))
    image = scan.hold()
    np.testing.assert_array_equal(values, before)
    assert float(image.mean()) == pytest.approx(0, abs=1e-5)
    assert float(image.std()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("fit", FITS)
def test_a_gpu_holds_the_image_where_it_has_twice_the_room(fit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = Scan.bound(tiny.scan((14, 12, 9)), Preparation(**FITS[fit]))
    gpu, cpu, needed = torch.device("cuda"), torch.device("cpu"), scan.hold_bytes + 1000
    for free, pays in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr("ossnet.field.engine.scan.free_bytes", lambda _, free=free: free)
        assert scan.pays_to_hold(gpu, None, 1000) is pays
        assert scan.pays_to_hold(gpu, free, 1000) is pays
        # The CPU reads it as it is stored, unless it is resized.
        assert scan.pays_to_hold(cpu, free, 1000) is (pays and scan.fit.resizes)


def test_half_the_resolution() -> None:
    volume = tiny.scan((16, 12, 10))
    scan = Scan.bound(volume, Preparation())
    torch.testing.assert_close(scan.halved(), reduce_by_two(prepare_scan(volume, Preparation()).image))


@pytest.mark.parametrize("kind", ["small", "small+large"])
@pytest.mark.parametrize("scattered", [False, True])
def test_patches_from_boxes_are_those_of_the_whole(
    kind: Any, scattered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scattered:
        monkeypatch.setattr("ossnet.field.engine.sources.WINDOW", 100)
    volume = tiny.scan((40, 30, 20), channels=2)
    scan = Scan.bound(volume, Preparation())
    whole = prepare_scan(volume, Preparation()).image
    places = torch.rand(64, 3) * torch.tensor([39.0, 29.0, 19.0])
    places[:32] = places[:32].round()
    columns = 2 * 343 * (2 if kind == "small+large" else 1)
    one, other = torch.zeros(64, columns), torch.zeros(64, columns)
    PatchRows(whole, kind).rows(places, one)
    WindowRows(scan, kind).rows(places, other)
    assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["multiscale", "C"])
@pytest.mark.parametrize("classes", [1, 3])
def test_a_grant_changes_nothing_but_memory(family: str, classes: int) -> None:
    model, scan = tiny.model(family, classes), tiny.scan((24, 20, 18))
    free = model.field(scan, device="cpu", precision="fp32").segment()
    bound = model.field(scan, device="cpu", precision="fp32", memory="200MB").segment()
    np.testing.assert_array_equal(bound.data, free.data)
    assert bound.evaluated == free.evaluated


def test_a_tight_grant_gives_the_label_map_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Voxels that are stored the other way round are not copied into file order then."""
    model, scan = tiny.model("multiscale"), tiny.scan(affine=np.diag([-1.0, -1.0, 1.0, 1.0]))
    field = model.field(scan, device="cpu", precision="fp32", memory="200MB")
    expected = field.segment()
    assert expected.data.flags.c_contiguous

    def tighten(*_: int) -> None:
        monkeypatch.setattr("ossnet.field.binding.LIBRARIES", 200_000_000)

    found = field.segment(progress=tighten)
    assert not found.data.flags.c_contiguous
    np.testing.assert_array_equal(found.data, expected.data)


def test_maps_that_are_kept_give_way_to_what_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, scan = tiny.model("multiscale"), tiny.scan((24, 20, 18))
    monkeypatch.setattr("ossnet.field.engine.blockwise.answer.WORK_BYTES", 16 << 20)
    field = model.field(scan, device="cpu", precision="fp32", memory="200MB", chunk=256)
    expected = field.segment()
    assert isinstance(field._bound.answer, BlockwiseAnswer)
    answer = field._bound.answer
    assert answer.room is not None
    blocks = sum(m.bytes for maps in answer.blocks.values() for m in maps)
    assert blocks > 0
    # So much that nothing fits beside it but the coarse maps.
    size = answer.reserve - LIBRARIES + answer.room - (answer.fixed_bytes - blocks)
    monkeypatch.setattr("ossnet.field.binding.asking_bytes", lambda *_: size)
    np.testing.assert_array_equal(field.segment().data, expected.data)
    monkeypatch.setattr("ossnet.field.binding.asking_bytes", lambda *_: size + 1_000_000)
    with pytest.raises(ResourceError, match="at least"):
        field.segment()


def test_what_a_grant_cannot_hold_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("multiscale", 3)
    large = Volume(np.zeros((1, 600, 600, 600), dtype=np.int8), np.eye(4))
    with pytest.raises(ResourceError, match="at least"):
        model.field(large, device="cpu", memory="100MB", preprocessed=True).segment()
    with pytest.raises(ResourceError, match="at least"):
        model.field(large, device="cpu", memory="10MB", preprocessed=True)
    field = model.field(tiny.scan(), device="cpu", memory="200MB")
    with pytest.raises(ResourceError, match="label map"):
        field.segment(shape=(2000, 2000, 2000))
    monkeypatch.setattr("ossnet.field.mesh.extract._SLABS_BYTES", 200_000_000)
    with pytest.raises(ResourceError, match="granted"):
        field.mesh(2)
    large = Volume(np.zeros((1, 300, 300, 300), np.int8), np.eye(4))
    with pytest.raises(ResourceError, match="probabilities"):
        model.field(large, device="cpu", memory="300MB").probability_map()


def test_a_region_is_the_whole_answer_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long scan, so that a region is encoded alone, and a larger one where something enters it unseen."""
    restarts, restart = [0], Octree.restart

    def counted(self: Octree, start: Any) -> None:
        restarts[-1] += 1
        restart(self, start)

    monkeypatch.setattr(Octree, "restart", counted)
    model, scan = tiny.model("multiscale", 3), tiny.scan((1500, 16, 14))
    whole = model.field(scan, device="cpu", precision="fp32")
    expected = whole.segment().data
    rng = np.random.default_rng(3)
    for _ in range(10):
        low = [int(rng.integers(n - 4)) for n in scan.shape]
        high = [int(min(a + rng.integers(4, 40), n)) for a, n in zip(low, scan.shape, strict=True)]
        box = ((low[0], low[1], low[2]), (high[0], high[1], high[2]))
        field = model.field(scan, device="cpu", precision="fp32")
        restarts.append(0)
        found = field.segment(region=box)
        np.testing.assert_array_equal(found.data, expected[tuple(map(slice, low, high))])
        (first, _, _), (last, _, _) = field._bound.answer.crop  # type: ignore[attr-defined]
        assert last - first < 200 + 100 * restarts[-1] or restarts[-1] > 3
        # The octree took a larger box where structures entered this one unseen; asking everywhere never does.
        field = model.field(scan, device="cpu", precision="fp32")
        everywhere = field.segment(region=box, strategy="dense").data
        np.testing.assert_array_equal(everywhere, whole.segment(region=box, strategy="dense").data)
        (first, _, _), (last, _, _) = field._bound.answer.crop  # type: ignore[attr-defined]
        assert last - first < 200
    assert 1 in restarts


def test_points_are_answered_at_the_cost_of_their_place() -> None:
    model, scan = tiny.model("multiscale", 1), tiny.scan((1500, 16, 14))
    whole = model.field(scan, device="cpu", precision="fp32")
    whole.segment()
    near = np.array([[300, 3, 4], [310.5, 7.25, 3]])
    far = np.array([[10, 3, 4], [1460.0, 7.25, 3]])
    field = model.field(scan, device="cpu", precision="fp32")
    for points in (near, far, near):
        np.testing.assert_allclose(field.logits(points), whole.logits(points), atol=1e-5)


def test_progress_ends_at_what_was_asked_and_true_is_quiet_in_a_pipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    field = tiny.model("multiscale").field(tiny.scan(), device="cpu")
    said: list[tuple[int, int]] = []
    found = field.segment(progress=lambda asked, pending: said.append((asked, pending)))
    assert said[-1] == (found.evaluated, 0)
    np.testing.assert_array_equal(field.segment(progress=True).data, found.data)
    field.probability_map(progress=True)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    tiny.model("multiscale").field(tiny.scan(), device="cpu").segment(progress=True)
    assert "Locations" in capsys.readouterr().err


def test_points_outside_count_as_the_border_of_the_scan() -> None:
    """Not as what it is padded with."""
    field = tiny.model("C").field(tiny.scan((24, 20, 18)), precision="fp32")
    outside = [[-3.0, 10.0, 9.0], [12.0, 30.0, 17.5], [40.0, -9.0, 50.0]]
    border = [[-0.5, 10.0, 9.0], [12.0, 19.5, 17.5], [23.5, -0.5, 17.5]]
    np.testing.assert_array_equal(field.logits(outside), field.logits(border))
    world = np.array(outside) @ field.volume.affine[:3, :3].T + field.volume.affine[:3, 3]
    np.testing.assert_allclose(field.logits(world, "world"), field.logits(border), atol=1e-5)

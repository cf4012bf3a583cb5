"""A data set is described in figures, and each of its problems is named."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossnet.data.cases import Case, Dataset
from ossnet.data.fingerprint import FitProposal, fingerprint, orientation_code, propose_fit
from ossnet.data.grey_values import intensities
from ossnet.data.layouts import open_dataset
from ossnet.data.splits import Split
from ossnet.errors import ResourceError
from ossnet.files.nifti import write_labels, write_volume
from ossnet.files.reading import read_volume
from ossnet.volume import FileHeader, LabelMap, Orientation, Volume


def case(
    root: Path, name: str, shape: tuple[int, int, int] = (6, 7, 8), affine: np.ndarray | None = None
) -> Path:
    """A bright box (class 1, 100) with a brighter corner (class 2, 200) on a ramp."""
    place = np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine
    data = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) % 50
    labels = np.zeros(shape, np.uint8)
    labels[1:4, 1:4, 1:4], labels[1:2, 1:2, 1:4] = 1, 2
    data[labels == 1], data[labels == 2] = 100, 200
    write_volume(Volume(data[None], place, header=FileHeader(1, 1)), root / "images" / f"{name}.nii.gz")
    write_labels(LabelMap(labels, place, header=FileHeader(1, 1)), root / "labels" / f"{name}.nii.gz")
    return root


def test_facts_of_a_case(tmp_path: Path) -> None:
    done: list[int] = []
    found = fingerprint(open_dataset(case(tmp_path, "a")), jobs=2, progress=done.append)
    (facts,) = found.cases
    assert (facts.name, facts.shape, facts.spacing, facts.orientation) == (
        "a",
        (6, 7, 8),
        (1.0, 2.0, 3.0),
        "RAS",
    )
    assert facts.voxels == {0: 336 - 27, 1: 24, 2: 3}
    assert facts.volumes_ml == pytest.approx({1: 24 * 6 / 1000, 2: 3 * 6 / 1000})
    assert facts.foreground is not None
    inside = facts.foreground[0]
    assert (inside.voxels, inside.minimum, inside.maximum, inside.median) == (27, 100, 200, 100)
    assert inside.mean == pytest.approx((24 * 100 + 3 * 200) / 27)
    assert (found.problems, found.median_shape, found.median_spacing) == ((), (6, 7, 8), (1.0, 2.0, 3.0))
    assert done == [1]


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(
        [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint64, np.float32, np.float64]
    ),
    seed=st.integers(0, 99),
    size=st.integers(1, 400),
    span=st.sampled_from([1, 100, 10**6]),
)
def test_statistics_equal_numpys(dtype: type, seed: int, size: int, span: int) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=size) * span).clip(-120, 10**8 if span > 100 else 120)
    if np.dtype(dtype).kind == "u":
        values = abs(values)
    values = values.clip(np.iinfo(dtype).min, np.iinfo(dtype).max) if np.dtype(dtype).kind in "iu" else values
    values = values.astype(dtype)
    found = intensities(values)
    wide = values.astype(np.float64)
    assert found.voxels == size
    assert (found.minimum, found.maximum) == (wide.min(), wide.max())
    assert found.mean == pytest.approx(wide.mean(), rel=1e-6, abs=1e-9)
    assert found.std == pytest.approx(wide.std(ddof=1) if size > 1 else 0, rel=1e-5, abs=1e-6)
    counted = np.dtype(dtype).kind in "iu" and wide.max() - wide.min() < 2**20
    method = "lower" if counted else "linear"
    expected = np.percentile(wide, [0.5, 50, 99.5], method=method)
    np.testing.assert_allclose([found.low, found.median, found.high], expected, rtol=1e-6, atol=1e-9)


def test_problems_of_files(tmp_path: Path) -> None:
    for name in "abcdefg":
        case(tmp_path, name)
    images, labels = tmp_path / "images", tmp_path / "labels"
    write_volume(Volume(np.zeros((1, 6, 7, 8), np.int16), np.diag([1.0, 2, 3, 1])), images / "b.nii.gz")
    (images / "c.nii.gz").write_bytes((images / "c.nii.gz").read_bytes()[:-20])
    case(tmp_path / "other", "d", shape=(6, 7, 9))
    (tmp_path / "other" / "labels" / "d.nii.gz").replace(labels / "d.nii.gz")
    (images / "e.nii.gz").write_bytes(b"")
    (labels / "e.nii.gz").write_bytes(b"")
    (labels / "f.nii.gz").unlink()
    found = fingerprint(open_dataset(tmp_path))
    reasons = sorted((str(Path(p.where).relative_to(tmp_path)), p.reason[:25]) for p in found.problems)
    assert reasons == [
        ("images/b.nii.gz", "image is 0 everywhere"),
        ("images/c.nii.gz", "the file ends before all "),
        ("images/e.nii.gz", "the file is empty"),
        ("images/f.nii.gz", "has no label"),
        ("labels/d.nii.gz", "does not lie on its image"),
        ("labels/e.nii.gz", "the file is empty"),
    ]
    assert [c.name for c in found.cases] == ["a", "b", "g"]


def test_a_channel_that_shows_nothing_is_named_by_its_file(tmp_path: Path) -> None:
    case(tmp_path, "a")
    image = tmp_path / "images" / "a.nii.gz"
    scan = read_volume(image)
    image.rename(image.with_name("a_0000.nii.gz"))
    write_volume(replace(scan, data=np.zeros_like(scan.data)), image.with_name("a_0001.nii.gz"))
    (problem,) = fingerprint(open_dataset(tmp_path)).problems
    assert problem.where.endswith("a_0001.nii.gz")
    assert problem.reason == "channel 1 is 0 everywhere"


def test_undeclared_labels(tmp_path: Path) -> None:
    case(tmp_path, "a")
    (tmp_path / "images").rename(tmp_path / "imagesTr")
    (tmp_path / "labels").rename(tmp_path / "labelsTr")
    (tmp_path / "imagesTr" / "a.nii.gz").rename(tmp_path / "imagesTr" / "a_0000.nii.gz")
    value = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "box": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(value))
    (problem,) = fingerprint(open_dataset(tmp_path)).problems
    assert "holds label 2, which the data set does not declare" in problem.reason
    assert "declared are 0, 1" in problem.fix
    value["labels"] = {"background": 0, "box": 1, "corner": 2, "rare": 3, "both": [1, 2]}
    (tmp_path / "dataset.json").write_text(json.dumps(value))
    found = fingerprint(open_dataset(tmp_path))
    assert found.problems == ()
    assert any("no case has label 3 (rare)" in n for n in found.notes)
    assert any("both: of several labels each, which are learnt one by one" in n for n in found.notes)


def test_notes(tmp_path: Path) -> None:
    turned = np.diag([1.0, 2.0, 3.0, 1.0]) @ Orientation((1, 0, 2), (True, False, False)).matrix((7, 6, 8))
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    case(tmp_path, "a")
    case(tmp_path, "b", affine=turned)
    case(tmp_path, "c", affine=tilt)
    empty = LabelMap(np.zeros((6, 7, 8), np.uint8), np.diag([1.0, 2, 3, 1]))
    write_labels(empty, tmp_path / "labels" / "a.nii.gz")
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a", "b"], "val": ["c", "gone"]}]))
    found = fingerprint(open_dataset(tmp_path))
    text = "\n".join(found.notes)
    for note in (
        "different directions",
        "oblique or sheared (up to 17°, c)",
        "voxel sizes differ",
        "1 case has an empty label, for example a",
        "3 cases: too few for five folds",
    ):
        assert note in text
    (problem,) = found.problems
    assert "gone is not in the data set (1 such names)" in problem.reason


def test_thick_slices_and_files_of_no_case_are_told(tmp_path: Path) -> None:
    case(tmp_path, "a", affine=np.diag([1.5, 1.5, 10.0, 1]))
    assert not any("no case" in note for note in fingerprint(open_dataset(tmp_path)).notes)
    write_labels(
        LabelMap(np.zeros((6, 7, 8), np.uint8), np.eye(4)), tmp_path / "other" / "deep" / "stray.nii.gz"
    )
    text = "\n".join(fingerprint(open_dataset(tmp_path)).notes)
    assert "slices lie 10 mm apart, 6.7 times the voxel size in them" in text
    assert "1 image in the folder belongs to no case, for example" in text
    assert "stray.nii.gz" in text


def test_the_fit_of_scans_in_different_orders(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    case(tmp_path, "a", (20, 30, 40), affine)
    order = Orientation((2, 0, 1), (True, False, True))
    labels = LabelMap(np.zeros((20, 30, 40), np.uint8), affine).reoriented(order)
    case(tmp_path, "b", labels.shape, labels.affine)
    found = fingerprint(open_dataset(tmp_path))
    assert found.fit == propose_fit([(20, 30, 40)])
    assert (found.median_shape, found.median_spacing) == ((20, 30, 40), (1, 1, 5))
    text = "\n".join(found.notes)
    assert "slices lie 5 mm apart" in text
    assert "voxel sizes differ" not in text


def test_nan_is_replaced_on_request(tmp_path: Path) -> None:
    case(tmp_path, "a")
    data = np.ones((1, 6, 7, 8), np.float32)
    data[0, 0, 0, :2] = np.nan, 5
    write_volume(Volume(data, np.diag([1.0, 2.0, 3.0, 1.0])), tmp_path / "images" / "a.nii.gz")
    assert "1 of 336 voxels are NaN" in fingerprint(open_dataset(tmp_path)).problems[0].reason
    found = fingerprint(open_dataset(tmp_path, nonfinite="replace"))
    assert (found.problems, found.cases[0].intensities[0].minimum) == ((), 1.0)
    assert "1 of 336 voxels are NaN or infinite; they are replaced" in found.notes[0]


def test_a_patient_on_both_sides_is_noted(tmp_path: Path) -> None:
    for name in ("patient001_ED", "patient001_ES", "patient002_ED"):
        case(tmp_path, name)
    parts = [{"train": ["patient001_ED"], "val": ["patient001_ES", "patient002_ED"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(parts))
    data = open_dataset(tmp_path)
    assert data.splits == (Split(("patient001_ED",), ("patient001_ES", "patient002_ED")),)
    assert any("patient001 on both sides" in n for n in fingerprint(data).notes)


def test_unclear_headers_are_noted_once(tmp_path: Path) -> None:
    for name in "ab":
        place = np.diag([1.0, 2.0, 3.0, 1.0])
        for folder, array in (("images", np.arange(8, dtype=np.int16)), ("labels", np.arange(8) % 2)):
            block = array.reshape(2, 2, 2)
            header = FileHeader(0, 0)
            if folder == "images":
                write_volume(Volume(block[None], place, header=header), tmp_path / folder / f"{name}.nii.gz")
            else:
                write_labels(LabelMap(block, place, header=header), tmp_path / folder / f"{name}.nii.gz")
    with pytest.warns(UserWarning, match="no affine"):
        data = open_dataset(tmp_path)
    (note,) = [n for n in fingerprint(data).notes if "no affine" in n]
    assert note.startswith("2 cases (for example a): no affine is given")


@pytest.mark.parametrize("refusals", [1, 2])
def test_a_case_without_room_beside_others_is_looked_at_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    for name in "abc":
        case(tmp_path, name)
    usual = Dataset.read
    tried: list[str] = []
    done: list[int] = []

    def read(dataset: Dataset, case: Case) -> tuple[Volume, LabelMap]:
        tried.append(case.name)
        if case.name == "b" and tried.count("b") <= refusals:
            raise ResourceError("no room")
        return usual(dataset, case)

    dataset = open_dataset(tmp_path)
    monkeypatch.setattr(Dataset, "read", read)
    with pytest.raises(ResourceError) if refusals == 2 else nullcontext():
        assert [c.name for c in fingerprint(dataset, jobs=2, progress=done.append).cases] == ["a", "b", "c"]
    assert (sorted(tried[:3]), tried[3:]) == (["a", "b", "c"], ["b"])
    assert done == ([1, 2, 3] if refusals == 1 else [1, 2])


def test_json_is_plain(tmp_path: Path) -> None:
    value = fingerprint(open_dataset(case(tmp_path, "a"))).to_json()
    value = json.loads(json.dumps(value, allow_nan=False))
    assert value["case"]["a"]["volumes_ml"] == pytest.approx({"1": 0.144, "2": 0.018})
    assert value["fit"] == {"kind": "pad", "shape": [8, 8, 8], "blocks": 1, "grid": [2, 2, 2]}


def test_the_papers_shapes_follow() -> None:
    assert propose_fit([(240, 240, 155)] * 3) == FitProposal("pad", (256, 256, 160), 4)
    assert propose_fit([(240, 240, 155)]).grid == (8, 8, 5)
    assert propose_fit([(512, 512, 512)]) == FitProposal("pad", (512, 512, 512), 5)
    tall = propose_fit([(512, 512, n) for n in (74, 400, 450, 987)])
    assert tall == FitProposal("resize", (512, 512, 448), 5)
    padded = propose_fit([(512, 512, n) for n in (74, 400, 450, 987)], "pad")
    assert padded == FitProposal("pad", (512, 512, 1024), 6)
    assert propose_fit([(240, 240, 155)] * 3, "resize").kind == "resize"


@given(st.lists(st.tuples(*[st.integers(1, 600)] * 3), min_size=1, max_size=8))
def test_a_fit_suits_the_network(shapes: list[tuple[int, int, int]]) -> None:
    fit = propose_fit(shapes)
    assert all(n % 2 ** (fit.blocks + 1) == 0 for n in fit.shape)
    assert min(fit.grid) >= 1
    assert fit.latent == np.prod(fit.grid)
    if fit.kind == "pad":
        assert (np.array(fit.shape) >= np.max(shapes, axis=0)).all()
        step = 2 ** (fit.blocks + 1)
        assert (np.array(fit.shape) - np.max(shapes, axis=0) < step).all()
    if np.max(shapes) <= 1.9 * np.min(shapes) and np.min(shapes) >= 16:  # near to cubes
        assert min(fit.grid) >= 3
        assert max(fit.grid) <= 12


@pytest.mark.parametrize("code", ["RAS", "LPS", "PSL", "IAR", "SPR"])
def test_orientation_codes(code: str) -> None:
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for voxel, letter in enumerate(code):
        world = ["LR", "PA", "IS"].index(next(p for p in ("LR", "PA", "IS") if letter in p))
        affine[world, voxel] = 2.0 if letter in "RAS" else -2.0
    assert orientation_code(affine) == code

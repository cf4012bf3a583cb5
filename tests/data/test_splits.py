"""Splits are always the same, and nobody is on both sides."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ossnet.data.cases import Case, Dataset
from ossnet.data.layouts import open_dataset
from ossnet.data.splits import Split, folds, read_splits, shared_patients, split, spread
from ossnet.errors import DatasetError, SettingsError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def dataset(
    count: int, layout: str = "nnunet", splits: tuple[Split, ...] | None = None, visits: int = 1
) -> Dataset:
    names = [(f"p{i:03d}", f"p{i:03d}_{v}") for i in range(count) for v in range(visits)]
    cases = tuple(Case(name, (), None, patient if visits > 1 else None) for patient, name in names)
    return Dataset(Path("somewhere"), layout, cases, ("CT",), {0: "background"}, splits=splits)


@given(count=st.integers(5, 60), k=st.integers(2, 5), seed=st.integers(0, 9))
def test_each_case_validates_once(count: int, k: int, seed: int) -> None:
    names = [f"c{i}" for i in range(count)]
    parts = folds(list(reversed(names)), k, seed)
    assert sorted(n for p in parts for n in p.validation) == sorted(names)
    for part in parts:
        assert sorted(part.train + part.validation) == sorted(names)
        assert count // k <= len(part.validation) <= count // k + 1


def test_as_scikit_learn_draws_them() -> None:
    # KFold(5, shuffle=True, random_state=12345).split(range(12)), first fold's test indices
    sklearn = pytest.importorskip("sklearn.model_selection")
    names = [f"case_{i:02d}" for i in range(12)]
    expected = sklearn.KFold(5, shuffle=True, random_state=12345).split(names)
    for part, (train, validation) in zip(folds(names), expected, strict=True):
        assert part == Split(tuple(names[i] for i in train), tuple(names[i] for i in validation))


@given(patients=st.integers(5, 20), visits=st.integers(2, 4))
def test_patients_stay_together(patients: int, visits: int) -> None:
    data = dataset(patients, visits=visits)
    groups = {c.name: c.group for c in data.cases}
    for fold in range(5):
        assert shared_patients(split(data, fold), groups) == ()


@pytest.mark.parametrize(
    ("layout", "count", "sizes"), [("brats2020", 369, (320, 45)), ("lits", 131, (111, 20))]
)
def test_the_papers_sizes(layout: str, count: int, sizes: tuple[int, int]) -> None:
    part = split(dataset(count, layout), "paper")
    assert (len(part.train), len(part.validation)) == sizes
    assert not set(part.train) & set(part.validation)
    assert part == split(dataset(count, layout), "paper")
    with pytest.raises(DatasetError, match="cases"):
        split(dataset(50, layout), "paper")
    with pytest.raises(SettingsError, match="no split"):
        split(dataset(400), "paper")


def test_a_split_file_is_honoured(tmp_path: Path) -> None:
    given_splits = (Split(("p000_0",), ("p001_0", "p002_0")),)
    assert split(dataset(5, splits=given_splits), 0) == given_splits[0]
    with pytest.raises(SettingsError, match="no fold 1"):
        split(dataset(5, splits=given_splits), 1)
    for wrong, reason in (
        (Split(("p000_0", "p001_0"), ("p001_0",)), "trains and validates"),
        (Split(("p000_0",), ("gone",)), "gone is not in the data set"),
    ):
        with pytest.raises(DatasetError, match=reason):
            split(dataset(5, splits=(wrong,)), 0)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "[1]", '[{"train": ["a"]}]', '[{"train": [1], "val": [2]}]']
)
def test_damaged_split_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "splits_final.json").write_text(content)
    with pytest.raises(DatasetError, match="not a list of folds"):
        read_splits(tmp_path / "splits_final.json")


def test_other_choices() -> None:
    assert split(dataset(3), "all").train == ("p000_0", "p001_0", "p002_0")
    with pytest.raises(DatasetError, match="3 patients cannot make 5 folds"):
        split(dataset(3), 0)
    with pytest.raises(SettingsError, match="no fold 7"):
        split(dataset(9), 7)
    with pytest.raises(SettingsError, match="Use 2 or more"):
        folds(["a", "b"], 1)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="needs the reference data beside the checkout")
@pytest.mark.parametrize("folder", ["Dataset004_Hippocampus", "Dataset027_ACDC", "Dataset101_LeftAtrium"])
def test_drawn_folds_equal_the_given_ones(folder: str) -> None:
    given_splits = json.loads((SHARED / folder / "splits_final.json").read_text())
    names = sorted(given_splits[0]["train"] + given_splits[0]["val"])
    groups = {n: n.split("_")[0] for n in names} if "ACDC" in folder else {}
    for part, expected in zip(folds(names, groups=groups), given_splits, strict=True):
        assert (list(part.train), list(part.validation)) == (expected["train"], expected["val"])
    if "Atrium" not in folder:  # its images are packed
        assert split(open_dataset(SHARED / folder), 0).train == tuple(given_splits[0]["train"])


@given(st.integers(1, 40), st.integers(1, 50))
def test_some_of_many_are_spread_evenly(cases: int, count: int) -> None:
    found = spread(range(cases), count)
    assert len(found) == min(count, cases)
    gaps = np.diff([*found, cases])
    assert found[0] == 0
    assert gaps.max() - gaps.min() <= 1

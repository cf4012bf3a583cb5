"""`ossnet evaluate` from the outside: files in, a table, CSV and JSON out, or one message."""

import csv
import json
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tests.files.nrrd_writer import write_nrrd
from typer.testing import CliRunner

from ossnet.cli.main import app
from ossnet.errors import ResourceError
from ossnet.evaluation import scoring
from ossnet.evaluation.matching import Matched, Pair, match
from ossnet.evaluation.tables import Row
from ossnet.volume import LabelMap, Orientation, Volume

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


@dataclass
class Result:
    code: int
    out: str
    error: str


def evaluate(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)
    return Result(result.exit_code, result.stdout, result.stderr)


def labels(*values: int, size: int = 8, affine: np.ndarray = AFFINE) -> LabelMap:
    """A cube of 3³ voxels for each value, one after the other."""
    data = np.zeros((size, size, size), np.uint8)
    for number, value in enumerate(values):
        data[3 * number : 3 * number + 3, 1:4, 1:4] = value
    return LabelMap(data, affine)


def dataset(root: Path, *, named: dict[str, int] | None = None) -> Path:
    """Three cases in nnU-Net's layout: `a` has both structures, `b` the first, `c` none."""
    named = named or {"background": 0, "front": 1, "back": 2}
    first, second = sorted(named.values())[1:3]
    for case, values in {"a": (first, second), "b": (first,), "c": ()}.items():
        labels(*values).save(root / "labelsTr" / f"{case}.nii.gz")
        Volume(np.zeros((1, 8, 8, 8), np.int16), AFFINE).save(root / "imagesTr" / f"{case}_0000.nii.gz")
    (root / "dataset.json").write_text(
        json.dumps(
            {"channel_names": {"0": "MRI"}, "labels": named, "numTraining": 3, "file_ending": ".nii.gz"}
        )
    )
    return root


def predictions(root: Path, suffix: str = "") -> Path:
    for case, values in {"a": (1, 2), "b": (), "c": (1,)}.items():
        labels(*values).save(root / f"{case}{suffix}.nii.gz")
    return root


@pytest.mark.parametrize("suffix", ["", "_seg", "-seg"])
def test_a_data_set_is_scored_case_by_case_and_class_by_class(tmp_path: Path, suffix: str) -> None:
    result = evaluate(predictions(tmp_path / "p", suffix), dataset(tmp_path / "d"), "--json")
    assert result.code == 0, result.error
    told = json.loads(result.out)
    outcomes = {(row["case"], row["name"]): row["outcome"] for row in told["cases"]}
    assert outcomes == {
        ("a", "front"): "scored",
        ("a", "back"): "scored",
        ("b", "front"): "missed",
        ("b", "back"): "absent",
        ("c", "front"): "invented",
        ("c", "back"): "absent",
    }
    front = told["summary"][0]
    assert front["name"] == "front"
    assert front["estimates"]["dice"]["mean"] == pytest.approx(1 / 3)
    assert front["cases"] == 3
    assert (front["missed"], front["invented"]) == (1, 1)


def test_a_case_without_room_beside_others_is_judged_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matched = match(predictions(tmp_path / "p"), dataset(tmp_path / "d"))
    expected, usual = scoring.score(matched), scoring._score_pair
    tried: list[str] = []

    def short(matched: Matched, pair: Pair, tolerance_mm: float) -> list[Row]:
        tried.append(pair.case)
        if tried.count("a") == 1 and pair.case == "a":
            raise ResourceError("no room")
        return usual(matched, pair, tolerance_mm)

    monkeypatch.setattr(scoring, "_score_pair", short)
    done: list[int] = []
    assert repr(scoring.score(matched, done=done.append)) == repr(expected)
    assert (tried[-1], done) == ("a", [1, 2, 3])


def test_the_table_names_structures_and_rules_on_stdout(tmp_path: Path) -> None:
    result = evaluate(predictions(tmp_path / "p"), dataset(tmp_path / "d"))
    assert result.code == 0
    for expected in ("1 front", "2 back", "mean", "HD95", "1 missed", "bootstrap"):
        assert expected in result.out, expected


def test_files_are_written_where_asked_and_nothing_else(tmp_path: Path) -> None:
    given, reference = predictions(tmp_path / "p"), dataset(tmp_path / "d")
    assert evaluate(given, reference, "--out", tmp_path / "o").code == 0
    assert sorted(f.name for f in (tmp_path / "o").iterdir()) == ["scores.csv", "scores.json"]
    with (tmp_path / "o" / "scores.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    for name in ("one.csv", "one.json"):
        assert evaluate(given, reference, "--out", tmp_path / "f" / name).code == 0
    assert sorted(f.name for f in (tmp_path / "f").iterdir()) == ["one.csv", "one.json"]
    assert json.loads((tmp_path / "f" / "one.json").read_text())["tolerance_mm"] == 1.0


def test_two_files_and_folders_of_files_need_no_data_set(tmp_path: Path) -> None:
    labels(1, 3).save(tmp_path / "p" / "x.nii.gz")
    labels(1, 0).save(tmp_path / "l" / "x.nii.gz")
    labels(1).save(tmp_path / "p" / "y.nii.gz")
    labels(1).save(tmp_path / "l" / "y.nii.gz")
    one = json.loads(evaluate(tmp_path / "p" / "x.nii.gz", tmp_path / "l" / "x.nii.gz", "--json").out)
    assert [(row["label"], row["outcome"]) for row in one["cases"]] == [(1, "scored"), (3, "invented")]
    both = json.loads(evaluate(tmp_path / "p", tmp_path / "l", "--json").out)
    assert [(row["case"], row["label"], row["outcome"]) for row in both["cases"]] == [
        ("x", 1, "scored"),
        ("x", 3, "invented"),
        ("y", 1, "scored"),
        ("y", 3, "absent"),
    ]


@pytest.mark.parametrize("suffixes", [("_seg", "_seg"), ("_seg", ""), ("_label", "_mask")])
def test_label_files_may_have_suffixes(tmp_path: Path, suffixes: tuple[str, str]) -> None:
    for case, suffix in zip(("a", "b"), suffixes, strict=True):
        labels(0, 1).save(tmp_path / "labels" / f"{case}{suffix}.nii.gz")
        labels(0, 1).save(tmp_path / "found" / f"{case}.nii.gz")
    found = json.loads(evaluate(tmp_path / "found", tmp_path / "labels", "--json").out)
    assert {row["case"] for row in found["cases"]} == {"a", "b"}


def test_suffixes_that_tell_cases_apart_stay(tmp_path: Path) -> None:
    for case in ("a_label", "a_mask", "b_seg"):
        labels(0, 1).save(tmp_path / "labels" / f"{case}.nii.gz")
        labels(0, 1).save(tmp_path / "found" / f"{case}.nii.gz")
    found = json.loads(evaluate(tmp_path / "found", tmp_path / "labels", "--json").out)
    assert {row["case"] for row in found["cases"]} == {"a_label", "a_mask", "b_seg"}


def test_copies_in_other_formats_are_left_out(tmp_path: Path) -> None:
    for folder in ("labels", "found"):
        labels(0, 1).save(tmp_path / folder / "a.nii.gz")
        write_nrrd(tmp_path / folder / "a.nrrd", labels(0, 1, size=9).data.astype(np.uint8), np.eye(4))
    (row,) = json.loads(evaluate(tmp_path / "found", tmp_path / "labels", "--json").out)["cases"]
    assert (row["case"], row["dice"]) == ("a", 1.0)


def test_one_prediction_is_found_in_a_data_set(tmp_path: Path) -> None:
    given, reference = predictions(tmp_path / "p", "_seg"), dataset(tmp_path / "d")
    told = json.loads(evaluate(given / "a_seg.nii.gz", reference, "--json").out)
    assert [(row["case"], row["name"]) for row in told["cases"]] == [("a", "front"), ("a", "back")]


def test_a_scan_is_not_taken_for_a_label_map(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 900, (8, 9, 7)).astype(np.int16)
    for name in ("p", "l"):
        Volume(grey[None], AFFINE).save(tmp_path / name / "x.nii.gz")
    refused(evaluate(tmp_path / "p", tmp_path / "l"), "x.nii.gz", "grey values", "label map")
    # Many labels, each in one piece, are an atlas.
    atlas = LabelMap(
        np.repeat(np.arange(60, dtype=np.uint8), 3)[:, None, None] * np.ones((1, 2, 2), np.uint8), AFFINE
    )
    for name in ("a", "b"):
        atlas.save(tmp_path / f"{name}.nii.gz")
    assert evaluate(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz").code == 0


def test_label_values_of_files_and_classes_of_a_model_mean_the_same(tmp_path: Path) -> None:
    # Files hold 1 and 4, a trained model answers classes 1 and 2.
    reference = dataset(tmp_path / "d", named={"background": 0, "front": 1, "back": 4})
    for value in (2, 4):
        folder = tmp_path / f"p{value}"
        for case, values in {"a": (1, value), "b": (1,), "c": ()}.items():
            labels(*values).save(folder / f"{case}.nii.gz")
        told = json.loads(evaluate(folder, reference, "--json").out)
        assert [e["estimates"]["dice"]["mean"] for e in told["summary"]] == [1, 1, 1]


def test_values_that_are_classes_too_are_read_in_one_way(tmp_path: Path) -> None:
    """Files hold 1, 3 and 4, which are classes 1, 2 and 3: results of ossnet say that they hold classes."""
    reference = dataset(tmp_path / "d", named={"background": 0, "front": 1, "middle": 3, "back": 4})
    labels(3, 4).save(reference / "labelsTr" / "a.nii.gz")
    replace(labels(2, 3), origin="ossnet 0123").save(tmp_path / "ours" / "a.nii.gz")
    labels(3, 4).save(tmp_path / "theirs" / "a.nii.gz")
    labels(2, 3).save(tmp_path / "classes" / "a.nii.gz")
    for folder in ("ours", "theirs", "classes"):
        told = json.loads(evaluate(tmp_path / folder, reference, "--only-predicted", "--json").out)
        assert [row["dice"] for row in told["cases"] if row["outcome"] == "scored"] == [1, 1]
    labels(2, 4).save(tmp_path / "mixed" / "a.nii.gz")
    refused(evaluate(tmp_path / "mixed", reference, "--only-predicted"), "label 2", "declared are [1, 3, 4]")


def test_results_with_the_values_of_files_are_known_by_their_mark(tmp_path: Path) -> None:
    """Files hold 1, 3 and 4: a result with 3 and 4 that has them from label files, and one with classes."""
    reference = dataset(tmp_path / "d", named={"background": 0, "front": 1, "middle": 3, "back": 4})
    labels(3, 4).save(reference / "labelsTr" / "a.nii.gz")
    for values, origin in (((3, 4), "ossnet 0123 4567 values"), ((2, 3), "ossnet 0123 4567")):
        file = tmp_path / origin / "a.nii.gz"
        replace(labels(*values), origin=origin).save(file)
        for against in (reference, reference / "labelsTr" / "a.nii.gz"):
            told = json.loads(evaluate(file, against, "--json").out)
            scored = [row["dice"] for row in told["cases"] if row["outcome"] == "scored"]
            assert scored == ([1, 1] if against == reference or "values" in origin else [0])


def test_results_for_a_data_set_that_numbers_the_same_structures_otherwise(tmp_path: Path) -> None:
    """BraTS 2020 has 1, 2 and 4, BraTS 2023 has 1 to 3."""
    reference = dataset(tmp_path / "d", named={"background": 0, "front": 1, "back": 2})
    mine = replace(labels(1, 4), origin="ossnet 01 23 values", names={1: "front", 4: "back"})
    mine.save(tmp_path / "p" / "a.nii.gz")
    told = json.loads(evaluate(tmp_path / "p", reference, "--only-predicted", "--json").out)
    assert [row["dice"] for row in told["cases"]] == [1, 1]


def test_weights_of_the_authors_are_judged_by_all_structures_together(tmp_path: Path) -> None:
    reference = dataset(tmp_path / "d")
    both = LabelMap((labels(1, 2).data > 0).astype(np.uint8), AFFINE, names={1: "foreground"})
    replace(both, origin="ossnet 0123").save(tmp_path / "p" / "a.nii.gz")
    told = json.loads(evaluate(tmp_path / "p", reference, "--only-predicted", "--json").out)
    assert [(row["name"], row["dice"]) for row in told["cases"]] == [("front and back", 1)]


def test_labels_of_test_cases_mean_what_the_data_set_says(tmp_path: Path) -> None:
    """`labelsTs` beside a `dataset.json`: names, values and regions are those of the data set."""
    root = dataset(tmp_path / "d", named={"background": 0, "front": 1, "back": 4})
    described = json.loads((root / "dataset.json").read_text())
    described["labels"]["both"] = [1, 4]
    (root / "dataset.json").write_text(json.dumps(described))
    labels(4).save(root / "labelsTs" / "t.nii.gz")
    replace(labels(2), origin="ossnet 0123", names={1: "front", 2: "back"}).save(tmp_path / "p" / "t.nii.gz")
    told = json.loads(evaluate(tmp_path / "p", root / "labelsTs", "--json").out)
    assert {row["name"]: row["dice"] for row in told["cases"]} == {"front": None, "back": 1, "both": 1}
    refused(evaluate(tmp_path / "p", root), f"for test cases give {root / 'labelsTs'}")


@pytest.mark.filterwarnings("default::UserWarning")
def test_our_results_against_labels_that_nothing_describes(tmp_path: Path) -> None:
    """Results hold classes, masks 255: a data set folder says so, single files do not."""
    mine = replace(labels(1), origin="ossnet 0.1.0 model 1234", names={1: "part"})
    mine.save(tmp_path / "results" / "a.nii.gz")
    labels(255).save(tmp_path / "labels" / "a.nii.gz")
    for given in ("a.nii.gz", ""):
        result = evaluate(tmp_path / "results" / given, tmp_path / "labels" / given, "--json")
        assert result.code == 0, result.error
        assert [row["dice"] for row in json.loads(result.out)["cases"]] == [1]
    two = replace(labels(1, 2), origin="ossnet 0.1.0 model 1234", names={1: "front", 2: "back"})
    two.save(tmp_path / "results" / "a.nii.gz")
    labels(5, 7).save(tmp_path / "labels" / "a.nii.gz")
    result = evaluate(tmp_path / "results", tmp_path / "labels", "--json")
    assert [row["dice"] for row in json.loads(result.out)["cases"]] == [1, 1]
    # Values such as 1 and 4 of BraTS: what is compared is said.
    labels(1, 7).save(tmp_path / "labels" / "a.nii.gz")
    result = evaluate(tmp_path / "results", tmp_path / "labels", "--json")
    assert "(1 for 1, 7 for 2)" in " ".join(result.error.split())
    assert [row["dice"] for row in json.loads(result.out)["cases"]] == [1, 1]
    labels(7).save(tmp_path / "labels" / "a.nii.gz")
    refused(
        evaluate(tmp_path / "results", tmp_path / "labels"),
        "label files hold 7, the model has 2 structures",
        "Give the folder of the data set",
    )


@pytest.mark.filterwarnings("default:labels are taken for what")
def test_names_that_tell_values_say_which_label_is_which(tmp_path: Path) -> None:
    """Files of the data set hold 2 and 3, and only 2 in this case: classes are 1 and 2."""
    mine = replace(labels(1), origin="ossnet 0123", names={1: "label 2", 2: "label 3"})
    mine.save(tmp_path / "p" / "a.nii.gz")
    labels(2).save(tmp_path / "l" / "a.nii.gz")
    result = evaluate(tmp_path / "p", tmp_path / "l", "--json")
    assert "(2 for label 2)" in " ".join(result.error.split())
    assert [(row["label"], row["dice"]) for row in json.loads(result.out)["cases"]] == [(1, 1)]
    # Classes, whose mark was lost when they were corrected.
    labels(1, 2).save(tmp_path / "l" / "a.nii.gz")
    replace(labels(1, 2), origin="ossnet 0123", names={1: "label 2", 2: "label 3"}).save(
        tmp_path / "p" / "a.nii.gz"
    )
    told = json.loads(evaluate(tmp_path / "p", tmp_path / "l", "--json").out)
    assert [row["dice"] for row in told["cases"]] == [1, 1]


@pytest.mark.filterwarnings("default:label 1 is liver")
def test_one_number_with_two_names_is_told(tmp_path: Path) -> None:
    for case, name in (("a", "liver"), ("b", "spleen")):
        replace(labels(1), names={1: name}).save(tmp_path / "p" / f"{case}.nii.gz")
        replace(labels(1), names={1: name}).save(tmp_path / "l" / f"{case}.nii.gz")
    result = evaluate(tmp_path / "p", tmp_path / "l")
    assert "label 1 is liver in a, and spleen in b" in " ".join(result.error.split())


@pytest.mark.filterwarnings("default:no file holds a structure")
def test_cases_without_structures_are_counted(tmp_path: Path) -> None:
    for case, values in {"a": (1,), "b": ()}.items():
        labels(*values).save(tmp_path / "p" / f"{case}.nii.gz")
        labels(*values).save(tmp_path / "l" / f"{case}.nii.gz")
    told = json.loads(evaluate(tmp_path / "p", tmp_path / "l", "--json").out)
    assert [row["outcome"] for row in told["cases"]] == ["scored", "absent"]
    assert (told["summary"][0]["cases"], told["summary"][0]["absent"]) == (2, 1)
    result = evaluate(tmp_path / "p" / "b.nii.gz", tmp_path / "l" / "b.nii.gz")
    assert "there is nothing to judge" in " ".join(result.error.split())


def test_letters_may_be_written_in_two_ways(tmp_path: Path) -> None:
    for folder, form in (("p", "NFC"), ("l", "NFD")):
        labels(1).save(tmp_path / folder / f"{unicodedata.normalize(form, 'Müller')}.nii.gz")
    told = json.loads(evaluate(tmp_path / "p", tmp_path / "l", "--json").out)
    assert [(row["case"], row["dice"]) for row in told["cases"]] == [("Müller", 1)]


@pytest.mark.filterwarnings("default:.*belong to no case")
def test_cases_of_the_data_set_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    root = dataset(tmp_path / "d")
    (root / "imagesTr" / "a_0000.nii.gz").unlink()
    predictions(tmp_path / "p")
    with pytest.warns(UserWarning, match=r"a\.nii\.gz has no image"):
        matched = match(tmp_path / "p", root)
    assert [pair.case for pair in matched.pairs] == ["b", "c"]


def test_structures_learnt_as_one_are_judged_as_one(tmp_path: Path) -> None:
    reference = dataset(tmp_path / "d")
    both = labels(1, 2).data > 0
    replace(LabelMap(both.astype(np.uint8), AFFINE), names={1: "front and back"}, origin="ossnet 0123").save(
        tmp_path / "p" / "a.nii.gz"
    )
    told = json.loads(evaluate(tmp_path / "p", reference, "--only-predicted", "--json").out)
    assert [(row["name"], row["dice"]) for row in told["cases"]] == [("front and back", 1)]


def test_structures_that_are_numbered_otherwise_are_refused(tmp_path: Path) -> None:
    ours = replace(labels(1, 2), names={1: "front", 2: "back"}, origin="ossnet 0123")
    ours.save(tmp_path / "ours" / "a.nii.gz")
    swapped = dataset(tmp_path / "d", named={"background": 0, "back": 1, "front": 2})
    replace(labels(2, 1), names={1: "back", 2: "front"}).save(tmp_path / "l" / "a.nii.gz")
    told = (
        "numbers structures otherwise than its reference: 1 front, 2 back instead of 1 back, 2 front. Correct"
    )
    for reference in (swapped, tmp_path / "l", tmp_path / "l" / "a.nii.gz"):
        given = tmp_path / "ours" / ("a.nii.gz" if reference.is_file() else "")
        refused(evaluate(given, reference, "--only-predicted"), str(tmp_path / "ours" / "a.nii.gz"), told)


def test_names_go_with_the_values_of_files(tmp_path: Path) -> None:
    """Files hold 1 and 4, classes are 1 and 2."""
    reference = dataset(tmp_path / "d", named={"background": 0, "front": 1, "back": 4})
    named = {"theirs": (4, ""), "ours": (2, "ossnet 0123")}
    for folder, (value, origin) in named.items():
        names = {1: "front", value: "back"}
        replace(labels(1, value), names=names, origin=origin).save(tmp_path / folder / "a.nii.gz")
        told = json.loads(evaluate(tmp_path / folder, reference, "--only-predicted", "--json").out)
        assert [row["dice"] for row in told["cases"]] == [1, 1]
    # Names that only one side has say nothing.
    replace(labels(1, 4), names={1: "anterior", 4: "posterior"}).save(tmp_path / "other" / "a.nii.gz")
    assert evaluate(tmp_path / "other", reference, "--only-predicted").code == 0


@pytest.mark.filterwarnings("default:.*no label is in both")
def test_labels_that_have_no_value_in_common_are_told(tmp_path: Path) -> None:
    for case, value, other in (("a", 255, 1), ("b", 255, 0)):
        labels(value).save(tmp_path / "p" / f"{case}.nii.gz")
        labels(other).save(tmp_path / "l" / f"{case}.nii.gz")
    result = evaluate(tmp_path / "p", tmp_path / "l")
    assert result.code == 0
    assert "predictions hold 255, and references 1: no label is in both" in result.error
    # It is enough that both hold a label somewhere.
    labels(1).save(tmp_path / "p" / "b.nii.gz")
    assert "no label is in both" not in evaluate(tmp_path / "p", tmp_path / "l").error


def refused(result: Result, *expected: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.error
    assert len(result.error.strip().splitlines()) == 1
    for text in expected:
        assert text in result.error, text


def test_missing_predictions_are_refused_or_left_out_on_request(tmp_path: Path) -> None:
    given, reference = predictions(tmp_path / "p"), dataset(tmp_path / "d")
    (given / "b.nii.gz").unlink()
    refused(
        evaluate(given, reference, "--out", tmp_path / "o"),
        str(given),
        "1 of 3 cases",
        ": b.",
        "--only-predicted",
    )
    assert not (tmp_path / "o").exists()
    told = json.loads(evaluate(given, reference, "--only-predicted", "--json").out)
    assert {row["case"] for row in told["cases"]} == {"a", "c"}


@pytest.mark.filterwarnings("default:.* belong to no case")
def test_predictions_without_a_label_are_named(tmp_path: Path) -> None:
    given, reference = predictions(tmp_path / "p"), dataset(tmp_path / "d")
    labels(1).save(given / "stranger.nii.gz")
    result = evaluate(given, reference, "--json")
    assert result.code == 0
    assert "stranger.nii.gz" in result.error


def test_a_map_may_be_stored_in_another_voxel_order(tmp_path: Path) -> None:
    """As nibabel's `as_reoriented` leaves it, or a program that works in an order of its own."""
    data = np.zeros((6, 8, 10), np.uint8)
    data[1:4, 2:5, 5:8] = 1
    truth = LabelMap(data, AFFINE)
    truth.save(tmp_path / "label.nii.gz")
    truth.reoriented(Orientation((2, 0, 1), (True, False, True))).save(tmp_path / "found.nii.gz")
    result = evaluate(tmp_path / "found.nii.gz", tmp_path / "label.nii.gz", "--json")
    assert result.code == 0, result.error
    (row,) = json.loads(result.out)["cases"]
    assert row["dice"] == 1.0


def test_a_reference_of_slicer_may_be_cropped(tmp_path: Path) -> None:
    drawn = labels(1)
    drawn.reoriented(Orientation((1, 2, 0), (True, False, True))).save(tmp_path / "a.nii.gz")
    moved = AFFINE.copy()
    moved[:3, 3] += AFFINE[:3, :3] @ (0, 1, 1)
    write_nrrd(tmp_path / "drawn" / "a.seg.nrrd", drawn.data[:5, 1:4, 1:4], moved)
    result = evaluate(tmp_path / "a.nii.gz", tmp_path / "drawn" / "a.seg.nrrd", "--json")
    assert result.code == 0, result.error
    assert json.loads(result.out)["cases"][0]["dice"] == 1


def test_a_reference_may_name_a_part_of_its_structures(tmp_path: Path) -> None:
    """A segment that was named by hand beside one with 3D Slicer's own name, and a structure that it does not have."""
    drawn = tmp_path / "drawn.seg.nrrd"
    replace(labels(1, 2), names={1: "front", 2: "Segment_2"}).save(drawn)
    labels(1, 2).save(tmp_path / "a.nii.gz")
    result = evaluate(tmp_path / "a.nii.gz", drawn, "--json")
    assert result.code == 0
    rows = json.loads(result.out)["cases"]
    assert [(row["label"], row["dice"]) for row in rows] == [(1, 1.0), (2, 1.0)]
    replace(labels(1), names={1: "front"}).save(drawn)
    rows = json.loads(evaluate(tmp_path / "a.nii.gz", drawn, "--json").out)["cases"]
    assert [row["outcome"] for row in rows] == ["scored", "invented"]


def test_what_does_not_fit_is_refused_with_file_reason_and_fix(tmp_path: Path) -> None:
    reference = dataset(tmp_path / "d")
    given = predictions(tmp_path / "p")
    refused(evaluate(tmp_path / "nowhere", reference), "nowhere", "no such file")
    refused(evaluate(given, given / "a.nii.gz"), "a.nii.gz", "one prediction")
    labels(1).save(tmp_path / "stranger.nii.gz")
    refused(evaluate(tmp_path / "stranger.nii.gz", reference), "stranger.nii.gz", "is not named", "a.nii.gz")
    (tmp_path / "empty").mkdir()
    refused(evaluate(tmp_path / "empty", reference), "empty", "a.nii.gz")

    labels(1, size=9).save(given / "b.nii.gz")
    refused(evaluate(given, reference), "b.nii.gz", "shapes differ", "resample")
    labels(1, affine=np.diag([1.0, 1.0, 2.5, 1.0])).save(given / "b.nii.gz")
    refused(evaluate(given, reference), "b.nii.gz", "mm apart")
    labels(7).save(given / "b.nii.gz")
    refused(evaluate(given, reference), "b.nii.gz", "label 7", "declare")
    (given / "b.nii.gz").write_bytes((given / "a.nii.gz").read_bytes()[:-20])
    refused(evaluate(given, reference), "b.nii.gz")
    (given / "b_seg.nii.gz").write_bytes((given / "a.nii.gz").read_bytes())
    (given / "b.nii.gz").rename(given / "b.nii")
    labels(1).save(given / "b.nii.gz")
    refused(evaluate(given, reference), "second prediction for b")


def test_regions_are_judged_beside_their_parts(tmp_path: Path) -> None:
    root = dataset(tmp_path / "d")
    described = json.loads((root / "dataset.json").read_text())
    described["labels"]["whole"] = [1, 2]
    (root / "dataset.json").write_text(json.dumps(described))
    given = predictions(tmp_path / "p")
    labels(2, 1).save(given / "a.nii.gz")  # the parts are exchanged: the whole is right
    found = evaluate(given, root, "--region", "back and front=2,1", "--out", tmp_path / "scores.csv")
    assert found.code == 0, found.error
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    of_a = {(row["label"], row["name"]): float(row["dice"]) for row in rows if row["case"] == "a"}
    # What the caller names so is named so.
    assert of_a == {("1", "front"): 0.0, ("2", "back"): 0.0, ("1+2", "back and front"): 1.0}
    assert "1+2" in found.out


def test_a_region_has_one_meaning(tmp_path: Path) -> None:
    given = ["--region", "a=1,2", "--region", "a=1,3"]
    refused(evaluate(predictions(tmp_path / "p"), dataset(tmp_path / "d"), *given), "a is given twice")


@pytest.mark.parametrize("wrong", ["whole", "whole=1", "=1,2", "whole=0,1", "whole=1,x", "whole=1,²"])
def test_a_region_that_is_none_is_refused(tmp_path: Path, wrong: str) -> None:
    found = evaluate(predictions(tmp_path / "p"), dataset(tmp_path / "d"), "--region", wrong)
    assert found.code == 2
    assert "not a name with several labels" in found.error


def test_regions_are_of_values_in_label_files(tmp_path: Path) -> None:
    root = dataset(tmp_path / "d", named={"background": 0, "front": 2, "back": 7})
    given = tmp_path / "p"
    labels(7, 2).save(given / "a.nii.gz")
    found = evaluate(given, root, "--only-predicted", "--region", "whole=2,7", "--json")
    (whole,) = [row for row in json.loads(found.out)["cases"] if row["name"] == "whole"]
    assert (whole["label"], whole["dice"]) == ([1, 2], 1.0)
    found = evaluate(given, root, "--only-predicted", "--region", "whole=1,2")
    assert found.code == 2
    assert "whole has label 1, which the data set does not declare" in found.error


@pytest.mark.filterwarnings("default:.*no file holds")
def test_a_region_of_labels_that_no_file_holds_is_told(tmp_path: Path) -> None:
    labels(1, 2).save(tmp_path / "one.nii.gz")
    labels(1, 2).save(tmp_path / "two.nii.gz")
    for region, told in (("whole=1,2", False), ("whole=1,9", True)):
        found = evaluate(tmp_path / "one.nii.gz", tmp_path / "two.nii.gz", "--region", region)
        assert found.code == 0
        assert ("region whole: no file holds label 9" in found.error) == told

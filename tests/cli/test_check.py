"""`ossnet check` on sound and broken data sets."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ossnet.cli.main import app
from ossnet.files.nifti import write_labels, write_volume
from ossnet.volume import LabelMap, Volume

SHARED = Path(__file__).parents[3] / "shared" / "data"
run = CliRunner()


def dataset(root: Path, count: int = 6) -> Path:
    for number in range(count):
        data = np.random.default_rng(number).integers(0, 200, size=(1, 8, 9, 10)).astype(np.int16)
        labels = (data[0] > 150).astype(np.uint8)
        write_volume(Volume(data, np.eye(4)), root / "images" / f"c{number}.nii.gz")
        write_labels(LabelMap(labels, np.eye(4)), root / "labels" / f"c{number}.nii.gz")
    return root


def test_a_sound_data_set(tmp_path: Path) -> None:
    answer = run.invoke(app, ["check", str(dataset(tmp_path / "set")), "--jobs", "1"])
    assert answer.exit_code == 0, answer.output
    for part in ("set  layout folders", "8 × 9 × 10", "RAS", "1 label 1", "6 of 6", "No problems."):
        assert part in answer.stdout
    assert answer.stderr == ""
    assert max(len(line.rstrip()) for line in answer.stdout.splitlines()) <= 120


def test_help_shows_an_example() -> None:
    assert "ossnet check Dataset004" in run.invoke(app, ["check", "--help"]).stdout


def test_a_line_for_each_case(tmp_path: Path) -> None:
    answer = run.invoke(app, ["check", str(dataset(tmp_path)), "--cases"])
    assert all(f"  c{number} " in answer.stdout for number in range(6))


def test_problems_are_listed_with_their_fix(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    (root / "images" / "c1.nii.gz").write_bytes(b"no image")
    for number in (2, 3):
        (root / "labels" / f"c{number}.nii.gz").unlink()
    answer = run.invoke(app, ["check", str(root)])
    assert answer.exit_code == 1
    assert "3 problems" in answer.stdout
    assert f"{root / 'images' / 'c1.nii.gz'}\n    named .gz but not compressed" in answer.stdout
    assert answer.stdout.count("has no label") == 1  # one reason for both files
    assert "Fix: Add its label file" in answer.stdout


def test_names_with_brackets_are_shown(tmp_path: Path) -> None:
    root = dataset(tmp_path / "a [b] set")
    (root / "images").rename(root / "imagesTr")
    (root / "labels").rename(root / "labelsTr")
    for file in (root / "imagesTr").iterdir():
        file.rename(file.with_name(file.name.replace(".nii", "_0000.nii")))
    described = {"channel_names": {"0": "T1 [post]"}, "labels": {"background": 0, "lesion [/]": 1}}
    (root / "dataset.json").write_text(json.dumps(described))
    answer = run.invoke(app, ["check", str(root), "--cases"])
    assert answer.exit_code == 0, answer.output
    for part in ("a [b] set", "1: T1 [post]", "1: lesion [/]", "1 lesion [/]"):
        assert part in answer.stdout


def test_json(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    value = json.loads(run.invoke(app, ["check", str(root), "--json"]).stdout)
    assert (value["cases"], value["layout"], value["problems"]) == (6, "folders", [])
    (root / "labels" / "c0.nii.gz").unlink()
    answer = run.invoke(app, ["check", str(root), "--json"])
    assert answer.exit_code == 1
    assert json.loads(answer.stdout)["problems"][0]["reason"] == "has no label"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["nowhere"], "no such folder"), ([".", "--layout", "x"], "no layout 'x'"), (["."], "no images")],
)
def test_what_cannot_be_read_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = run.invoke(app, ["check", *arguments])
    assert answer.exit_code == 2
    assert reason in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="needs the reference data beside the checkout")
@pytest.mark.parametrize(
    ("folder", "code", "parts"),
    [
        ("Dataset004_Hippocampus", 0, ["220 of 220", "48 × 64 × 48", "91 in one case and 626,"]),
        ("Dataset027_ACDC", 0, ["40 of 20 patients", "1.5 × 1.5 × 10", "resize"]),
        ("brats", 0, ["flair, t1, t1ce, t2", "256 × 256 × 160", "4 in files is class 3"]),
        ("lits", 0, ["0.743 × 0.743 × 1.6", "1696", "164.3"]),
        ("decathlon/Task01_BrainTumour_mini", 0, ["120 × 120 × 77", "128 × 128 × 80"]),
        ("Dataset101_LeftAtrium", 1, ["80 problems", "has no image"]),
    ],
)
def test_reference_data(folder: str, code: int, parts: list[str]) -> None:
    answer = run.invoke(app, ["check", str(SHARED / folder)])
    assert answer.exit_code == code, answer.output
    for part in parts:
        assert part in answer.stdout

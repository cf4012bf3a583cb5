"""`ossnet mesh`: a file for one structure, a folder for all of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh
from tests import tiny
from tests.cli.refusals import files_in, refused, succeeded
from typer.testing import CliRunner

import ossnet
from ossnet.cli import main
from ossnet.volume import LabelMap


@pytest.fixture(scope="module")
def heart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A scan, and a model of two structures."""
    root = tmp_path_factory.mktemp("heart")
    tiny.model("multiscale", 3).save(root / "model")
    tiny.scan((23, 21, 18), affine=np.diag([-1.0, 1.0, 2.0, 1.0])).save(root / "scan.nii.gz")
    return root / "scan.nii.gz", root / "model"


def mesh(heart: tuple[Path, Path], out: Path, *more: object) -> list[object]:
    return ["mesh", heart[0], "--model", heart[1], "--out", out, *more]


def volume_of(file: Path) -> float:
    return float(trimesh.load_mesh(file).volume)


def test_one_structure_is_a_file(heart: tuple[Path, Path], tmp_path: Path) -> None:
    said = succeeded(*mesh(heart, tmp_path / "two.ply", "--structure", "part 2"))
    assert said.startswith("part 2: ")
    assert "watertight →" in said
    expected = ossnet.load(heart[1]).field(ossnet.read(heart[0])).mesh(2)
    assert volume_of(tmp_path / "two.ply") == pytest.approx(float(expected.volume), rel=1e-4)


def test_all_structures_are_a_folder(heart: tuple[Path, Path], tmp_path: Path) -> None:
    succeeded(*mesh(heart, tmp_path / "all", "--format", "obj"))
    assert {p.name for p in files_in(tmp_path / "all")} == {"scan_part_1.obj", "scan_part_2.obj"}
    succeeded(*mesh(heart, tmp_path / "one.stl", "--structure", "2"))
    assert volume_of(tmp_path / "all" / "scan_part_2.obj") == pytest.approx(
        volume_of(tmp_path / "one.stl"), rel=1e-4
    )


def test_islands_are_left_out_on_request(heart: tuple[Path, Path], tmp_path: Path) -> None:
    scan = ossnet.read(heart[0])
    data = np.zeros(scan.shape, np.uint8)
    data[3:9, 3:9, 3:9], data[14:17, 14:17, 12:15] = 2, 2
    LabelMap(data, scan.affine).save(tmp_path / "drawn.nii.gz")
    pieces = []
    for more in ([], ["--largest"], ["--smallest-ml", "0.1"]):
        chosen = ["--labels", tmp_path / "drawn.nii.gz", "--structure", "2", "--overwrite", *more]
        succeeded(*mesh(heart, tmp_path / "two.ply", *chosen))
        pieces.append(len(trimesh.load_mesh(tmp_path / "two.ply").split()))
    assert pieces == [2, 1, 1]


def test_a_label_map_is_drawn(heart: tuple[Path, Path], tmp_path: Path) -> None:
    scan = ossnet.read(heart[0])
    data = np.zeros(scan.shape, np.uint8)
    data[5:12, 5:12, 5:12] = 2
    LabelMap(data, scan.affine).save(tmp_path / "drawn.nii.gz")
    said = succeeded(*mesh(heart, tmp_path / "out", "--labels", tmp_path / "drawn.nii.gz"))
    assert "not in this scan: part 1" in said
    again = mesh(heart, tmp_path / "out", "--labels", tmp_path / "drawn.nii.gz", "--overwrite", "--json")
    told = json.loads(CliRunner().invoke(main.app, [str(argument) for argument in again]).stdout)
    file = tmp_path / "out" / "scan_part_2.stl"
    assert (told["missing"], list(told["meshes"])) == (["part 1"], ["part 2"])
    assert told["meshes"]["part 2"]["volume_ml"] == pytest.approx(volume_of(file) / 1000, abs=1e-3)
    assert (told["meshes"]["part 2"]["file"], told["meshes"]["part 2"]["watertight"]) == (str(file), True)
    assert {p.name for p in files_in(tmp_path / "out")} == {"scan_part_2.stl"}
    assert volume_of(tmp_path / "out" / "scan_part_2.stl") == pytest.approx(2 * 7**3, rel=0.3)
    only = mesh(heart, tmp_path / "x.stl", "--structure", "1", "--labels", tmp_path / "drawn.nii.gz")
    assert "part 1 was not found in " in refused(tmp_path, *only)


@pytest.mark.filterwarnings("default:.*taken as in label files")
def test_a_label_map_with_the_values_of_label_files_is_drawn(
    heart: tuple[Path, Path], tmp_path: Path
) -> None:
    model = tiny.model("multiscale", 3)
    replace(model, label_names={1: "label 2", 2: "label 7"}).save(tmp_path / "model")
    scan = ossnet.read(heart[0])
    data = np.zeros(scan.shape, np.uint8)
    data[5:12, 5:12, 5:12] = 7
    LabelMap(data, scan.affine).save(tmp_path / "drawn.nii.gz")
    given = (heart[0], tmp_path / "model")
    succeeded(*mesh(given, tmp_path / "out", "--labels", tmp_path / "drawn.nii.gz"))
    assert {p.name for p in files_in(tmp_path / "out")} == {"scan_label_7.stl"}
    # 2 is a label of the model too: the numbers of files are meant, as in results.
    LabelMap(data // 7 * 2, scan.affine).save(tmp_path / "drawn.nii.gz")
    said = succeeded(*mesh(given, tmp_path / "two", "--labels", tmp_path / "drawn.nii.gz"))
    assert "taken as in label files (2 for label 2)" in " ".join(said.split())
    assert {p.name for p in files_in(tmp_path / "two")} == {"scan_label_2.stl"}
    # Numbers of classes stay these where what told so was an island.
    data = (data // 7 * 2).astype(np.uint8)
    data[0, 0, 0] = 1
    LabelMap(data, scan.affine).save(tmp_path / "drawn.nii.gz")
    drawn = ("--labels", tmp_path / "drawn.nii.gz", "--smallest-ml", "0.1")
    succeeded(*mesh(given, tmp_path / "classes", *drawn))
    assert {p.name for p in files_in(tmp_path / "classes")} == {"scan_label_7.stl"}
    data[0, 0, 0] = 9
    LabelMap(data, scan.affine).save(tmp_path / "drawn.nii.gz")
    said = refused(tmp_path, *mesh(given, tmp_path / "three", "--labels", tmp_path / "drawn.nii.gz"))
    assert "holds label 9, which the model does not have. It has 2 (label 2), 7 (label 7)" in said


def test_a_label_map_that_numbers_structures_otherwise_is_refused(
    heart: tuple[Path, Path], tmp_path: Path
) -> None:
    scan = ossnet.read(heart[0])
    swapped = LabelMap(np.ones(scan.shape, np.uint8), scan.affine, names={1: "part 2", 2: "part 1"})
    swapped.save(tmp_path / "swapped.nii.gz")
    drawn = mesh(heart, tmp_path / "x.stl", "--structure", "part 1", "--labels", tmp_path / "swapped.nii.gz")
    said = refused(tmp_path, *drawn)
    assert said.startswith(f"{tmp_path / 'swapped.nii.gz'}: they number structures otherwise than the model")
    assert "1 part 2, 2 part 1 instead of 1 part 1, 2 part 2" in said


def test_structures_of_like_names_are_files_of_their_own(heart: tuple[Path, Path], tmp_path: Path) -> None:
    model = replace(ossnet.load(heart[1]), label_names={1: "tumour (core)", 2: "Tumour core"})
    model.save(tmp_path / "model")
    succeeded("mesh", heart[0], "--model", tmp_path / "model", "--out", tmp_path / "v1.2")
    assert {p.name for p in files_in(tmp_path / "v1.2")} == {
        "scan_tumour_core_1.stl",
        "scan_Tumour_core_2.stl",
    }


def test_files_that_are_there_stay(heart: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x.stl").write_text("mine")
    one = mesh(heart, tmp_path / "x.stl", "--structure", "1")
    assert "x.stl already exists. Name another output, or replace it with --overwrite" in refused(
        tmp_path, *one
    )
    succeeded(*one, "--overwrite")
    assert volume_of(tmp_path / "x.stl") > 0


def test_refusals(heart: tuple[Path, Path], tmp_path: Path) -> None:
    assert "one file, and there are 2 structures" in refused(tmp_path, *mesh(heart, tmp_path / "x.stl"))
    assert "neither a mesh file nor a folder" in refused(tmp_path, *mesh(heart, tmp_path / "x.vtk"))
    assert "'off' is unknown" in refused(tmp_path, *mesh(heart, tmp_path / "x", "--format", "off"))
    assert "none of this model's" in refused(tmp_path, *mesh(heart, tmp_path / "x", "--structure", "liver"))
    assert "none of this model's" in refused(tmp_path, *mesh(heart, tmp_path / "x", "--structure", "²"))
    assert "at least 0" in refused(tmp_path, *mesh(heart, tmp_path / "x", "--smooth", "-1"))
    LabelMap(np.full((23, 21, 18), 7, np.uint8), ossnet.read(heart[0]).affine).save(tmp_path / "seven.nii.gz")
    foreign = mesh(heart, tmp_path / "x", "--labels", tmp_path / "seven.nii.gz")
    assert "holds label 7, which the model does not have" in refused(tmp_path, *foreign)
    (tmp_path / "file").write_text("")
    assert "a file, not a folder" in refused(tmp_path, *mesh(heart, tmp_path / "file"))

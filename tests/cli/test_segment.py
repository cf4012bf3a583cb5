"""`ossnet segment` refuses what it cannot use, and leaves nothing half done."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tests.cli.refusals import ended, files_in, interrupted, refused, started, succeeded
from tests.files.nrrd_writer import write_nrrd
from typer.testing import CliRunner

import ossnet
from ossnet.cli import main
from ossnet.field.model import Model
from ossnet.files.nifti import write_volume
from ossnet.files.reading import read_labels, read_volume
from ossnet.volume import Volume


@pytest.fixture
def scan(balls: Path) -> Path:
    return balls / "imagesTr" / "ball_00_0000.nii.gz"


def segment(scan: Path, model: Path, out: Path, *more: object) -> list[object]:
    return ["segment", scan, "--model", model, "--out", out, *more]


def test_one_scan(scan: Path, model: Path, tmp_path: Path) -> None:
    said = succeeded(*segment(scan, model, tmp_path / "deep" / "seg.nii.gz"))
    assert said.startswith("ball_00: ")
    assert len(said.splitlines()) == 1
    labels = read_labels(tmp_path / "deep" / "seg.nii.gz")
    assert labels.shape == read_volume(scan).shape
    assert dict(labels.names) == {1: "part 1"}
    report = json.loads((tmp_path / "deep" / "seg_report.json").read_text())
    assert report["scans"]["ball_00"]["locations"] > 0
    assert {p.name for p in files_in(tmp_path / "deep")} == {"seg.nii.gz", "seg_report.json"}


def test_segmentations_for_slicer(scan: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = [*segment(scan, model, out), "--seg-nrrd"]
    succeeded(*given)
    assert {file.name for file in out.iterdir()} == {"ball_00.nii.gz", "ball_00.seg.nrrd", "report.json"}
    ours, slicers = read_labels(out / "ball_00.nii.gz"), read_labels(out / "ball_00.seg.nrrd")
    np.testing.assert_array_equal(slicers.data, ours.data)
    np.testing.assert_allclose(slicers.affine, ours.affine, atol=1e-5)
    assert (slicers.names, slicers.origin) == (ours.names, ours.origin)
    assert "1 of 1 are finished already" in succeeded(*given)
    # 3D Slicer saves what was corrected in the same place, without saying what made it first.
    replace(slicers, origin="").save(out / "ball_00.seg.nrrd")
    assert "is not a result of ossnet" in refused(tmp_path, *given, "--overwrite")
    assert "add --seg-nrrd" in refused(tmp_path, *segment(scan, model, tmp_path / "a.seg.nrrd"))


def test_results_have_the_values_of_label_files(scan: Path, model: Path, tmp_path: Path) -> None:
    """BraTS' 4, or a mask of 255, whatever number a network has for it."""
    shutil.copytree(model, tmp_path / "model")
    described = json.loads((model / "model.json").read_text())
    (tmp_path / "model" / "model.json").write_text(json.dumps(described | {"label_values": {"1": 255}}))
    succeeded(*segment(scan, model, tmp_path / "plain"))
    given = [*segment(scan, tmp_path / "model", tmp_path / "out"), "--seg-nrrd"]
    assert "part 1 " in succeeded(*given)
    plain = read_labels(tmp_path / "plain" / "ball_00.nii.gz")
    for file in (tmp_path / "out" / "ball_00.nii.gz", tmp_path / "out" / "ball_00.seg.nrrd"):
        found = read_labels(file)
        np.testing.assert_array_equal(found.data, 255 * plain.data)
        assert (dict(found.names), found.holds_values, found.holds_classes) == ({255: "part 1"}, True, False)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"]["labels"] == {"255": "part 1"}
    assert report["scans"]["ball_00"]["volumes_ml"] == {"part 1": round(plain.volumes_ml()[1], 3)}
    assert "1 of 1 are finished already" in succeeded(*given)
    # In memory as the network answers, in files as the label files.
    labels = ossnet.load(tmp_path / "model").field(ossnet.read(scan), device="cpu").segment()
    np.testing.assert_array_equal(labels.data, plain.data)
    labels.save(tmp_path / "own.nii.gz")
    assert read_labels(tmp_path / "own.nii.gz").data.max() == 255
    replace(labels, data=labels.data > 0).save(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read_labels(tmp_path / "mask.nii.gz").data, 255 * plain.data)
    field = ossnet.load(tmp_path / "model").field(ossnet.read(scan), device="cpu")
    drawn = [
        field.mesh("part 1", labels=one).volume for one in (labels, read_labels(tmp_path / "own.nii.gz"))
    ]
    assert drawn[0] == pytest.approx(drawn[1])
    assert "made by another model" in refused(
        tmp_path, *segment(scan, tmp_path / "model", tmp_path / "plain")
    )
    (tmp_path / "model" / "model.json").write_text(json.dumps(described | {"label_values": {"2": 255}}))
    assert "a value of its own" in refused(tmp_path, *given)


def test_a_scan_of_slicer_gets_the_labels_of_its_nifti_twin(scan: Path, model: Path, tmp_path: Path) -> None:
    volume = read_volume(scan)
    slicer = tmp_path / "scans" / "ball.nrrd"
    write_nrrd(slicer, volume.data[0].astype(np.float32), volume.affine)
    write_volume(replace(volume, data=volume.data.astype(np.float32)), tmp_path / "twin.nii.gz")
    for given, out in ((slicer.parent, tmp_path / "a"), (tmp_path / "twin.nii.gz", tmp_path / "b")):
        succeeded(*segment(given, model, out))
    one, two = read_labels(tmp_path / "a" / "ball.nii.gz"), read_labels(tmp_path / "b" / "twin.nii.gz")
    np.testing.assert_array_equal(one.data, two.data)
    np.testing.assert_allclose(one.affine, two.affine, atol=1e-5)
    assert "1 of 1 are finished already" in succeeded(*segment(slicer.parent, model, tmp_path / "a"))
    write_nrrd(tmp_path / "labels" / "ball.seg.nrrd", two.data.astype(np.uint8), two.affine)
    assert "1.000" in succeeded("evaluate", tmp_path / "a", tmp_path / "labels")


def test_paths_that_are_not_what_they_should_be(scan: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    assert "no such file" in refused(tmp_path, *segment(tmp_path / "none.nii.gz", model, out))
    assert "no such file or folder" in refused(tmp_path, *segment(tmp_path / "none", model, out))
    assert "no images" in refused(tmp_path, *segment(tmp_path / "empty", model, out))
    assert "not the name of an image" in refused(tmp_path, *segment(tmp_path / "file", model, out))
    assert "no such folder" in refused(tmp_path, *segment(scan, tmp_path / "none", out))
    assert "a file, not a folder" in refused(tmp_path, *segment(scan, model, tmp_path / "file"))
    assert "a file, not a folder" in refused(tmp_path, *segment(scan, model, tmp_path / "file" / "x.nii.gz"))
    assert "End it in .nii.gz" in refused(tmp_path, *segment(scan, model, tmp_path / "x.img"))
    assert "--out is needed" in refused(tmp_path, "segment", scan, "--model", model)


def test_scans_are_not_replaced(balls: Path, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.nii.gz", "b.nii.gz"):
        shutil.copy(balls / "imagesTr" / "ball_00_0000.nii.gz", folder / name)
    before = (folder / "a.nii.gz").read_bytes()
    assert "would be replaced" in refused(tmp_path, *segment(folder / "a.nii.gz", model, folder / "a.nii.gz"))
    assert "holds the scans" in refused(tmp_path, *segment(folder / "a.nii.gz", model, folder, "--overwrite"))
    assert "holds the scans" in refused(tmp_path, *segment(folder, model, folder))
    assert "one file for 2 scans" in refused(tmp_path, *segment(folder, model, tmp_path / "seg.nii.gz"))
    twice = ["segment", folder / "a.nii.gz", folder / "a.nii.gz", "--model", model, "--out", tmp_path / "o"]
    assert "two scans are named a" in refused(tmp_path, *twice)
    assert (folder / "a.nii.gz").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--region", "1,2,3"], "six numbers"),
        (["--region", "0,0,0,99,99,99"], "not inside the grid"),
        (["--region", "5,5,5,5,6,6"], "not inside the grid"),
        (["--spacing", "0"], "not above 0"),
        (["--spacing", "nan"], "not above 0"),
        (["--strategy", "fast"], "'fast' is unknown"),
        (["--strategy", "paper", "--spacing", "1"], "own grid only"),
        (["--smallest-ml", "inf"], "Give millilitres"),
        (["--precision", "fp8"], "'fp8' is unknown"),
        (["--device", "abacus"], "not a device"),
        (["--memory", "much"], "not an amount of memory"),
        (["--memory", "1kB"], "at least"),
        (["--channels"], "2 channel(s), the model takes 1"),
    ],
)
def test_options_without_meaning(
    scan: Path, model: Path, tmp_path: Path, given: list[str], said: str
) -> None:
    more = [scan] if given == ["--channels"] else []
    for dry in ([], ["--dry-run"]):
        assert said in refused(tmp_path, *segment(scan, model, tmp_path / "out", *more, *given, *dry))


def test_scans_that_cannot_be_used(scan: Path, model: Path, tmp_path: Path) -> None:
    """Alone: refused without a trace."""
    content, image = scan.read_bytes(), nib.load(scan)
    voxels = np.asarray(image.dataobj)
    (tmp_path / "half.nii.gz").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.nii.gz").write_text("hello")
    Volume(np.stack([voxels, voxels]), image.affine).save(tmp_path / "two.nii.gz")
    holes = voxels.astype(np.float32)
    holes[0] = np.nan
    Volume(holes[None], image.affine).save(tmp_path / "nan.nii.gz")
    for name, said in {
        "half": "the file ends before",
        "text": "not compressed with gzip",
        "two": "it has 2 channel(s), the model takes 1",
        "nan": "--replace-nan",
    }.items():
        message = refused(tmp_path, *segment(tmp_path / f"{name}.nii.gz", model, tmp_path / "out"))
        assert said in message
        assert f"{name}.nii.gz" in message
    code, said = ended(started(*segment(tmp_path / "nan.nii.gz", model, tmp_path / "out", "--replace-nan")))
    assert code == 0, said
    assert said.startswith("warning: ")
    assert "they are replaced" in said


def test_in_a_folder_the_others_are_segmented(scan: Path, model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "scans", tmp_path / "out"
    folder.mkdir()
    shutil.copy(scan, folder / "a.nii.gz")
    (folder / "b.nii.gz").write_bytes(scan.read_bytes()[:300])
    shutil.copy(scan, folder / "c.nii.gz")
    for _ in range(2):  # the second time nothing is left but the broken one
        process = started(*segment(folder, model, out))
        code, said = ended(process)
        assert code == 2, said
        assert said.count("error:") == 1
        assert "b.nii.gz" in said.splitlines()[-1]
        assert {p.name for p in files_in(out)} == {"a.nii.gz", "c.nii.gz", "report.json"}
    assert "2 of 3 are finished already" in said
    asked = CliRunner().invoke(main.app, [str(a) for a in segment(folder, model, out, "--json")])
    assert asked.exit_code == 2
    assert json.loads(asked.stdout)["scans"].keys() == {"a", "b", "c"}
    scans = json.loads((out / "report.json").read_text())["scans"]
    assert "the file ends before" in scans["b"]["error"]
    assert scans["a"]["locations"] == scans["c"]["locations"] > 0


def test_dry_run(scan: Path, model: Path, tmp_path: Path) -> None:
    said = succeeded("segment", scan, "--model", model, "--dry-run")
    assert said.startswith("ball_00: about ")
    forecasts = json.loads(succeeded("segment", scan, "--model", model, "--dry-run", "--json"))
    assert forecasts[0]["scan"] == "ball_00"
    assert forecasts[0]["memory_bytes"] > 0
    shutil.copy(scan, tmp_path / "a.nii.gz")
    shutil.copy(scan, tmp_path / "b.nii.gz")
    before = files_in(tmp_path)
    told = succeeded("segment", tmp_path, "--model", model, "--dry-run")
    assert told.splitlines()[-1].startswith("all 2: about ")
    two = ("--channels", tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    message = refused(tmp_path, "segment", *two, "--model", model, "--dry-run")
    assert "it has 2 channel(s), the model takes 1" in message
    assert files_in(tmp_path) == before
    image = ossnet.read(scan)
    elsewhere = image.affine + np.diag([0, 0, 1.0, 0])
    Volume(image.data, elsewhere).save(tmp_path / "b.nii.gz")
    assert "does not lie on a.nii.gz" in refused(tmp_path, "segment", *two, "--model", model, "--dry-run")


def test_a_dry_run_answers_programs_also_where_no_scan_can_be_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"none")
    dry = ["segment", tmp_path / "a.nii.gz", "--model", model, "--dry-run", "--json"]
    done = CliRunner().invoke(main.app, [str(argument) for argument in dry])
    assert done.exit_code == 2
    assert "not compressed with gzip" in json.loads(done.stdout)[0]["error"]


def test_a_report_says_which_model_made_what(scan: Path, model: Path, tmp_path: Path) -> None:
    other = Model.load(model)
    next(other.network.parameters()).data.mul_(1.5)
    other.save(tmp_path / "other")
    for name, made_by in (("a", model), ("b", tmp_path / "other")):
        shutil.copy(scan, tmp_path / f"{name}.nii.gz")
        succeeded(*segment(tmp_path / f"{name}.nii.gz", made_by, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"]["fingerprint"] == report["scans"]["b"]["model"] == other.fingerprint()
    assert report["scans"]["a"]["model"] == Model.load(model).fingerprint()


def test_a_dry_run_goes_on_after_a_scan_that_cannot_be_read(scan: Path, model: Path, tmp_path: Path) -> None:
    for name in ("a", "c"):
        shutil.copy(scan, tmp_path / f"{name}.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes(b"none")
    dry = ["segment", tmp_path, "--model", model, "--dry-run"]
    done = CliRunner().invoke(main.app, [str(argument) for argument in dry])
    *said, error = done.output.splitlines()
    assert [line.split(":")[0] for line in said] == ["a", "b", "c", "all 2"]
    assert done.exit_code == 2
    assert error.startswith(f"error: {tmp_path / 'b.nii.gz'}")
    entries = json.loads(CliRunner().invoke(main.app, [*map(str, dry), "--json"]).stdout)
    assert ["error" in entry for entry in entries] == [False, True, False]


def test_a_dry_run_looks_at_what_is_there(scan: Path, model: Path, tmp_path: Path) -> None:
    shutil.copy(scan, tmp_path / "a.nii.gz")
    shutil.copy(scan, tmp_path / "b.nii.gz")
    scans, out = [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"], tmp_path / "out"
    dry = ["segment", *scans, "--model", model, "--out", out, "--dry-run"]
    succeeded(*segment(scans[0], model, out))
    before = files_in(tmp_path)
    said = succeeded(*dry).splitlines()
    assert said[0] == "a: finished already"
    assert said[1].startswith("b: about ")
    one, two = json.loads(succeeded(*dry, "--json"))
    assert (one["finished"], one["seconds"], two["finished"]) == (True, 0, False)
    assert succeeded(*dry, "--overwrite").startswith("a: about ")
    assert "made by another model" in refused(tmp_path, *dry, "--largest")
    assert files_in(tmp_path) == before
    shutil.copy(scan, out / "b.nii.gz")
    assert "b.nii.gz already exists and is not a result of ossnet" in refused(tmp_path, *dry, "--overwrite")
    (out / "b.nii.gz").unlink()
    (out / "report.json").write_text("{}")
    assert "not a report of ossnet" in refused(tmp_path, *dry)
    # Without an output nothing is in the way, in whatever folder it is asked.
    assert succeeded("segment", scans[0], "--model", model, "--dry-run").startswith("a: about ")


def test_results_are_no_scans(scan: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeeded(*segment(scan, model, out, "--probabilities"))
    message = refused(tmp_path, *segment(out, model, tmp_path / "again"))
    assert "holds results of ossnet and no scans. Name the folder of the scans" in message
    shutil.copy(scan, out / "new.nii.gz")
    succeeded(*segment(out, model, tmp_path / "again"))
    assert {p.name for p in files_in(tmp_path / "again")} == {"new.nii.gz", "report.json"}


def many(scan: Path, folder: Path) -> Path:
    folder.mkdir()
    for index in range(20):
        shutil.copy(scan, folder / f"scan_{index:02d}.nii.gz")
    return folder


def test_interrupted(scan: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(*segment(many(scan, tmp_path / "scans"), model, out, "--strategy", "dense"))
    code, said = interrupted(process, lambda: len(list(out.glob("scan_*"))) > 1)
    assert code == 130, said
    assert said.splitlines()[-1] == "interrupted; what was finished is kept"
    assert "Traceback" not in said
    done = {file.name: file.stat().st_mtime_ns for file in out.glob("scan_*.nii.gz")}
    assert 1 < len(done) < 20
    assert not list(out.glob(".writing-*"))
    assert len(json.loads((out / "report.json").read_text())["scans"]) == len(done)
    said = succeeded(*segment(tmp_path / "scans", model, out, "--strategy", "dense"))
    assert said.startswith(f"{len(done)} of 20 are finished already")
    assert len(list(out.glob("scan_*.nii.gz"))) == 20
    assert all((out / name).stat().st_mtime_ns == time for name, time in done.items())
    assert len(json.loads((out / "report.json").read_text())["scans"]) == 20


def test_a_full_disk(scan: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said = ended(started(*segment(scan, model, out), limit_bytes=100))
    assert code == 2, said
    assert "the disk is full" in said
    assert "→" not in said  # no file is announced that is not there
    assert "Traceback" not in said
    assert said.count("error:") == 1
    assert not [p for p in files_in(out) if p.is_file()]

"""DICOM series from the command line."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tests import tiny
from tests.cli.refusals import refused, succeeded

from ossnet.data.scans import images_in
from ossnet.field.cohort.jobs import plan_jobs
from ossnet.files.nifti import write_volume
from ossnet.files.reading import read_labels, read_volume

pytest.importorskip("pydicom")

from tests.files.dicom_writer import multi_frame, slice_of, write

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two series of one patient, a folder each, and a model."""
    tiny.model("multiscale").save(tmp_path / "model")
    voxels = tiny.scan((14, 12, 10)).data[0].transpose(2, 1, 0)
    for name in ("t1", "flair"):
        shown = voxels if name == "t1" else voxels[::-1]
        slices = [slice_of(np.ascontiguousarray(s), (0, 0, 2 * k)) for k, s in enumerate(shown)]
        write(tmp_path / "study" / "series" / name, slices)
    return tmp_path / "study"


def test_a_series_gets_the_labels_of_its_nifti_twin(study: Path) -> None:
    model, out = study.parent / "model", study.parent / "out"
    series = study / "series" / "t1"
    write_volume(read_volume(series), study.parent / "twin.nii.gz")
    for scan, name in ((series, "dicom"), (study.parent / "twin.nii.gz", "nifti")):
        succeeded("segment", scan, "--model", model, "--out", out / f"{name}.nii.gz")
    one, two = read_labels(out / "dicom.nii.gz"), read_labels(out / "nifti.nii.gz")
    np.testing.assert_array_equal(one.data, two.data)
    np.testing.assert_allclose(one.affine, two.affine, atol=1e-4)
    assert "s, 0." in succeeded("segment", series, "--model", model, "--dry-run")
    assert "triangles" in succeeded("mesh", series, "--model", model, "--out", out / "part.stl")


def test_a_study_is_a_folder_of_scans(study: Path) -> None:
    assert [case.name for case in images_in(study)] == ["series_flair", "series_t1"]
    model, out = study.parent / "model", study.parent / "out"
    succeeded("segment", study, "--model", model, "--out", out)
    assert {f.name for f in out.glob("*.nii.gz")} == {"series_flair.nii.gz", "series_t1.nii.gz"}
    assert "2 of 2 are finished already" in succeeded("segment", study, "--model", model, "--out", out)
    report = json.loads((out / "report.json").read_text())
    assert len(report["scans"]) == 2


def test_one_target_is_for_the_series_that_is_named(study: Path) -> None:
    """Not for those below it, which a folder as target has too."""
    write(study / "series" / "t1" / "t1", [slice_of(np.zeros((4, 4), np.int16), (0, 0, k)) for k in range(3)])
    root = study / "series" / "t1"
    (job,) = plan_jobs([root], study.parent / "t1.nii.gz")
    assert job.files == (root,)
    assert [job.name for job in plan_jobs([root], study.parent / "out")] == ["t1", "t1_t1"]


def test_another_series_in_its_place_is_another_scan(study: Path) -> None:
    series, model, out = study / "series" / "t1", study.parent / "model", study.parent / "out.nii.gz"
    succeeded("segment", series, "--model", model, "--out", out)
    shutil.rmtree(series)
    (study / "series" / "flair").rename(series)
    message = refused(study, "segment", series, "--model", model, "--out", out)
    assert "made by another model or an earlier ossnet, from another scan or with other options" in message


def test_series_as_channels(study: Path) -> None:
    tiny.model("multiscale", channels=2).save(study.parent / "two")
    both = [study / "series" / name for name in ("t1", "flair")]
    out = study.parent / "out.nii.gz"
    succeeded("segment", *both, "--channels", "--model", study.parent / "two", "--out", out)
    assert read_labels(out).data.shape == (14, 12, 10)


def test_results_do_not_lie_among_slices(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series, model = study / "series" / "t1", study.parent / "model"
    message = refused(study, "segment", series, "--model", model, "--out", series / "seg.nii.gz")
    assert "seg.nii.gz would lie among the slices" in message
    # What another program left there is no scan, and a stray file makes no other scan of it.
    monkeypatch.chdir(series)
    succeeded("segment", ".", "--model", model, "--out", study.parent / "out")
    write_volume(read_volume(series), series / "converted.nii.gz")
    (series / "Thumbs.db").write_text("")
    told = succeeded("segment", series, "--model", model, "--out", study.parent / "out")
    assert "1 of 1 are finished already" in told
    assert [f.name for f in (study.parent / "out").glob("*.nii.gz")] == ["t1.nii.gz"]


def test_results_beside_series_are_no_scans(study: Path) -> None:
    model = study.parent / "model"
    succeeded("segment", study / "series" / "t1", "--model", model, "--out", study / "t1_seg.nii.gz")
    assert [case.name for case in images_in(study)] == ["series_flair", "series_t1"]
    write_volume(read_volume(study / "series" / "t1"), study / "other.nii.gz")
    assert [case.name for case in images_in(study)] == ["other", "series_flair", "series_t1"]


def test_nifti_files_beside_series_need_no_pydicom(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_volume(read_volume(study / "series" / "t1"), study / "other.nii.gz")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    out = study.parent / "out"
    message = refused(study, "segment", study, "--model", study.parent / "model", "--out", out, notes=True)
    assert "not installed" in message
    assert [f.name for f in out.glob("*.nii.gz")] == ["other.nii.gz"]


def test_without_highdicom_nothing_is_segmented(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    out = study.parent / "out"
    given = ["segment", study / "series", "--model", study.parent / "model", "--out", out, "--dicom-seg"]
    assert "they need highdicom, which is not installed" in refused(study.parent, *given)


def test_a_cd_is_a_study(study: Path) -> None:
    """With an index, reports, and folders below folders."""
    report = slice_of(np.zeros((2, 2), np.int16), (0, 0, 0), Modality="SR")
    write(study, [report], names=["DICOMDIR"])
    write(study / "series" / "report", [report], names=["1"])
    deep = study / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    (study / "series" / "t1").rename(deep / "t1")
    assert [case.name for case in images_in(study)] == ["a_b_c_d_t1", "series_flair"]


def test_refusals(study: Path) -> None:
    series, model = study / "series" / "t1", study.parent / "model"
    message = refused(study, "segment", series, "--model", model, "--out", series)
    assert "holds the scans" in message
    next(series.iterdir()).unlink()
    some = sorted(series.iterdir())
    some[3].unlink()
    message = refused(study.parent, "segment", series, "--model", model, "--out", study.parent / "new.nii.gz")
    assert "a slice is missing between" in message
    message = refused(study, "check", study)
    assert "there are no images in it" in message


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "dicom").is_dir(), reason="no reference data")
def test_real_series(tmp_path: Path) -> None:
    with zipfile.ZipFile(SHARED / "dicom" / "ct_ircad17_images_70-81.zip") as archive:
        archive.extractall(tmp_path / "ct")
    found = read_volume(tmp_path / "ct" / "PATIENT_DICOM")
    known = read_volume(SHARED / "lits" / "volume-0.nii.gz")
    part = known.data[0, :, :, 70:82]
    # There the surroundings of the body are blanked.
    np.testing.assert_array_equal(found.data[0][part > -1024], part[part > -1024])
    np.testing.assert_allclose(found.affine[:3, 3], known.affine[:3, 3] + [0, 0, 112], atol=1e-3)
    np.testing.assert_allclose(found.affine[:3, :3], known.affine[:3, :3], atol=1e-5)
    out = tmp_path / "seg.nii.gz"
    series = SHARED / "dicom" / "mr_HCropVolume_Study3"
    told = succeeded("segment", series, "--model", "hippocampus", "--out", out)
    volumes = read_labels(out).volumes_ml()
    assert 0.8 < volumes[1] < 3, told
    assert 0.8 < volumes[2] < 3, told


def test_dicom_segmentations(study: Path) -> None:
    pytest.importorskip("highdicom")
    from tests.files.test_dicom_seg import STUDY

    model, out = study.parent / "model", study.parent / "out"
    voxels = tiny.scan((14, 12, 10)).data[0].transpose(2, 1, 0)
    series = write(
        study.parent / "identified" / "t1",
        [slice_of(np.ascontiguousarray(s), (0, 0, 2 * k), **STUDY) for k, s in enumerate(voxels)],
    )
    given = ["segment", series.parent, "--model", model, "--out", out, "--dicom-seg"]
    succeeded(*given)
    assert {f.name for f in out.iterdir()} == {"t1.nii.gz", "t1.dcm", "report.json"}
    assert "1 of 1 are finished already" in succeeded(*given)
    (out / "t1.dcm").unlink()
    assert "already" not in succeeded(*given)
    assert (out / "t1.dcm").is_file()
    assert "grid of its series" in refused(study.parent, *given, "--spacing", "2")
    write_volume(read_volume(series), study.parent / "twin.nii.gz")
    plain = [
        "segment",
        study.parent / "twin.nii.gz",
        "--model",
        model,
        "--out",
        study.parent / "o",
        "--dicom-seg",
    ]
    assert "not a DICOM series" in refused(study.parent, *plain)
    places = np.array([(0, 0, 3.0 * k) for k in range(len(voxels))])
    frames = write(study.parent / "frames", [multi_frame(voxels, places)], names=["t.dcm"]) / "t.dcm"
    beside = ["segment", frames, "--model", model, "--out", frames.with_name("t.nii.gz")]
    assert "would be replaced" in refused(study.parent, *beside, "--dicom-seg")
    succeeded(*beside)
    nobody = [
        "segment",
        study / "series" / "t1",
        "--model",
        model,
        "--out",
        study.parent / "p",
        "--dicom-seg",
    ]
    assert "no segmentation can be made" in refused(study.parent, *nobody)

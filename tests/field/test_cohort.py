"""Many scans: finished files are final, processes share the work, the report says what was done."""

import gc
import json
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from tests import tiny

import ossnet
from ossnet.errors import DatasetError, InputError, ResourceError, SettingsError, VolumeError
from ossnet.field.cohort import report as reports
from ossnet.field.cohort import run as cohort
from ossnet.field.cohort.jobs import Job, Options, plan_jobs
from ossnet.field.cohort.run import forecast_all, segment_all
from ossnet.field.cohort.sharing import take_gpu
from ossnet.field.model import Model
from ossnet.files.atomic import write_json
from ossnet.files.header import VolumeWarning
from ossnet.files.reading import read_labels, read_volume
from ossnet.volume import LabelMap, Volume


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("multiscale")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Five scans of different sizes."""
    folder = tmp_path / "scans"
    for index in range(5):
        tiny.scan((10 + index, 9, 8)).save(folder / f"scan_{index}.nii.gz")
    return folder


def run(model: Model, scans: Path, out: Path, **options: Any) -> dict[str, Any]:
    return segment_all(model, plan_jobs([scans], out), Options(device="cpu", precision="fp32", **options))


def times(out: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in out.glob("*.nii.gz")}


def test_a_folder(model: Model, scans: Path, tmp_path: Path) -> None:
    said: list[str] = []
    counts: list[int] = []
    jobs = plan_jobs([scans], tmp_path / "out")
    report = segment_all(model, jobs, Options(device="cpu"), say=said.append, done=counts.append)
    assert counts == [1, 2, 3, 4, 5]
    assert [line.split(":")[0] for line in said] == [f"scan_{i}" for i in range(5)]
    for index in range(5):
        labels = read_labels(tmp_path / "out" / f"scan_{index}.nii.gz")
        alone = model.field(read_volume(scans / f"scan_{index}.nii.gz"), device="cpu").segment()
        np.testing.assert_array_equal(labels.data, alone.data)
        assert dict(labels.names) == {1: "part 1"}
        entry = report["scans"][f"scan_{index}"]
        assert entry["locations"] == alone.evaluated
        assert entry["shape"] == list(alone.shape)
        assert entry["volumes_ml"] == {"part 1": round(alone.volumes_ml()[1], 3)}
        assert entry["seconds"] > 0
        assert entry["strategy"] == "octree"
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["scans"] == report["scans"]
    assert written["model"] == {
        "variant": "multiscale",
        "data": None,
        "labels": {"1": "part 1"},
        "mirror": [],
        "others": 0,
        "fingerprint": model.fingerprint(),
    }
    assert set(written["versions"]) >= {"ossnet", "torch", "python"}
    assert written["options"]["device"] == "cpu"


def test_what_is_finished_is_final(model: Model, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(model, scans, out)
    before = times(out)
    (out / "scan_3.nii.gz").unlink()
    (out / ".writing-abcdefgh-scan_3.nii.gz").write_bytes(b"half")  # what a kill leaves
    report = run(model, scans, out)
    now = times(out)
    assert {name for name in before if before[name] != now[name]} == {"scan_3.nii.gz"}
    assert not list(out.glob(".writing-*"))
    assert list(report["scans"]) == list(first["scans"])  # earlier entries are kept
    run(model, scans, out, overwrite=True)
    assert all(times(out)[name] != now[name] for name in now)


def test_results_of_something_else_are_not_taken_for_finished(
    model: Model, scans: Path, tmp_path: Path
) -> None:
    """Another model, other options, another scan: refused before anything is done, unless they may be replaced."""
    out = tmp_path / "out"
    run(model, scans, out)
    before = times(out)
    other = tiny.model("multiscale")
    next(iter(other.network.parameters())).data.add_(0.01)
    assert other.fingerprint() != model.fingerprint()
    for changed, options in ((other, {}), (model, {"spacing": 0.5}), (model, {"largest": True})):
        with pytest.raises(
            SettingsError, match=r"scan_0\.nii\.gz already exists \(and 4 more\), made by another model"
        ):
            run(changed, scans, out, **options)
    tiny.scan((30, 9, 8)).save(scans / "scan_2.nii.gz")
    with pytest.raises(SettingsError, match=r"scan_2\.nii\.gz already exists, made by"):
        run(model, scans, out)
    assert times(out) == before
    assert run(model, scans, out, overwrite=True)["scans"]["scan_2"]["shape"] == [30, 9, 8]
    # What does not decide the result may change; who asks for all voxels to be asked does not get less.
    before = times(out)
    segment_all(model, plan_jobs([scans], out), Options(memory="1GB"))
    assert times(out) == before
    with pytest.raises(SettingsError, match="other options"):
        run(model, scans, out, strategy="dense")
    run(model, scans, out, strategy="dense", overwrite=True)
    before = times(out)
    run(model, scans, out)
    assert times(out) == before


def test_a_precision_that_is_named_decides(
    model: Model, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What "auto" stands for is the machine's matter: whoever does not name one goes on with either."""
    out, jobs = tmp_path / "out", plan_jobs([scans], tmp_path / "out")
    monkeypatch.setattr("ossnet.networks.machine.fast_bf16", lambda device: False)
    entries = segment_all(model, jobs, Options(device="cpu"))["scans"]
    assert entries["scan_0"]["options"] == {"strategy": "octree", "precision": "fp32"}
    before = times(out)
    segment_all(model, jobs, Options(device="cpu", precision="fp32"))
    with pytest.raises(SettingsError, match="other options"):
        segment_all(model, jobs, Options(device="cpu", precision="bf16"))
    monkeypatch.setattr("ossnet.networks.machine.fast_bf16", lambda device: True)
    segment_all(model, jobs, Options(device="cpu"))
    assert times(out) == before
    segment_all(model, jobs, Options(device="cpu", precision="bf16", overwrite=True))
    with pytest.raises(SettingsError, match="other options"):
        segment_all(model, jobs, Options(device="cpu", precision="fp32"))


def test_another_scan_of_the_same_name_and_size_is_another_scan(model: Model, tmp_path: Path) -> None:
    """Also where only a voxel in a pair's second file differs."""
    for ending in (".nii", ".img"):
        out = tmp_path / f"out_{ending[1:]}"
        for patient in ("p1", "p2"):
            scan = tiny.scan()
            if patient == "p2":
                scan = replace(scan, data=scan.data + 1)
            folder = tmp_path / f"{patient}{ending}"
            folder.mkdir()
            image = nib.Nifti1Image if ending == ".nii" else nib.Nifti1Pair
            nib.save(image(scan.data[0], scan.affine), folder / f"T1{ending}")
        (first,) = (tmp_path / f"p1{ending}").glob("T1.[nh][id][ir]")
        (second,) = (tmp_path / f"p2{ending}").glob("T1.[nh][id][ir]")
        segment_all(model, plan_jobs([first], out), Options())
        with pytest.raises(SettingsError, match="from another scan"):
            segment_all(model, plan_jobs([second], out), Options())


def test_probabilities_say_what_made_them(model: Model, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, scans, out, probabilities=True)
    other = tiny.model("multiscale")
    next(iter(other.network.parameters())).data.add_(0.01)
    run(other, scans, out, overwrite=True)  # leaves the maps of the first model
    with pytest.raises(
        SettingsError, match=r"scan_0_probabilities\.nii\.gz already exists \(and 4 more\), made by another"
    ):
        run(other, scans, out, probabilities=True)
    Volume(np.zeros((1, 4, 4, 4), np.float32), np.eye(4)).save(out / "scan_1_probabilities.nii.gz")
    with pytest.raises(SettingsError, match=r"scan_1_probabilities.*not a result of ossnet"):
        run(other, scans, out, probabilities=True, overwrite=True)


def test_probabilities_of_another_temperature_are_others(model: Model, scans: Path, tmp_path: Path) -> None:
    run(model, scans, tmp_path / "out", probabilities=True)
    calibrated = replace(model, metadata={**model.metadata, "temperature": 2.0})
    run(calibrated, scans, tmp_path / "out")
    with pytest.raises(
        SettingsError, match=r"_probabilities\.nii\.gz already exists .* made by another model"
    ):
        run(calibrated, scans, tmp_path / "out", probabilities=True)
    run(calibrated, scans, tmp_path / "out", probabilities=True, overwrite=True)
    before = times(tmp_path / "out")
    run(calibrated, scans, tmp_path / "out", probabilities=True)
    assert times(tmp_path / "out") == before


def test_files_that_are_no_results_are_never_replaced(model: Model, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "labelsTr"
    LabelMap(np.ones((10, 9, 8), np.uint8), np.eye(4)).save(out / "scan_0.nii.gz")
    before = times(out)
    for overwrite in (False, True):
        with pytest.raises(SettingsError, match="not a result of ossnet"):
            run(model, scans, out, overwrite=overwrite)
    assert times(out) == before
    tiny.scan().save(scans / "extra_0000.nii.gz")
    with pytest.raises(SettingsError, match="holds the scans"):
        plan_jobs([scans / "extra_0000.nii.gz"], scans)
    (tmp_path / "side_report.json").write_text('{"EchoTime": 1}')
    jobs = plan_jobs([scans / "scan_0.nii.gz"], tmp_path / "side.nii.gz")
    with pytest.raises(SettingsError, match="not a report of ossnet"):
        segment_all(model, jobs, Options())
    assert not (tmp_path / "side.nii.gz").exists()
    (tmp_path / "folder.nii.gz").mkdir()
    with pytest.raises(SettingsError, match="is a folder"):
        plan_jobs([scans / "scan_0.nii.gz"], tmp_path / "folder.nii.gz")


def test_a_map_that_was_corrected_is_no_result(model: Model, scans: Path, tmp_path: Path) -> None:
    """By whatever program: what it keeps of the header does not make its values ours. Stored otherwise they are."""
    out = tmp_path / "out"
    run(model, scans, out)
    image = nib.load(out / "scan_0.nii.gz")
    labels = np.asarray(image.dataobj)
    image.header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(labels.astype(np.int16), None, image.header), out / "scan_0.nii.gz")
    run(model, scans, out)
    one, two = read_labels(out / "scan_0.nii.gz"), read_labels(out / "scan_1.nii.gz")
    image.header.extensions.clear()  # as ITK does
    corrected = labels.copy()
    corrected[3, 4, 5] ^= 1
    nib.save(nib.Nifti1Image(corrected.astype(np.int16), None, image.header), out / "scan_0.nii.gz")
    replace(two, data=1 - two.data).save(out / "scan_1.nii.gz")
    before = times(out)
    for overwrite in (False, True):
        with pytest.raises(
            SettingsError, match=r"scan_0\.nii\.gz already exists \(and 1 more\) and was changed"
        ):
            run(model, scans, out, overwrite=overwrite)
    assert times(out) == before
    assert read_labels(out / "scan_0.nii.gz").holds_classes
    one.save(out / "scan_0.nii.gz")
    (out / "scan_1.nii.gz").write_bytes((out / "scan_1.nii.gz").read_bytes()[:-20])
    with pytest.raises(SettingsError, match=r"scan_1\.nii\.gz already exists and was changed"):
        run(model, scans, out)


def test_scans_that_are_cut_in_another_way_are_warned_of(model: Model, scans: Path, tmp_path: Path) -> None:
    known = {"smallest": [9.0, 9.0, 8.0], "largest": [11.0, 9.0, 8.0]}
    careful = Model(model.network, model.preparation, model.label_names, metadata={"extent_mm": known})
    with warnings.catch_warnings():
        warnings.simplefilter("error", VolumeWarning)
        run(careful, scans, tmp_path / "near")  # up to 14 mm
    tiny.scan((10, 30, 8)).save(scans / "scan_0.nii.gz")
    tiny.scan((4, 9, 8)).save(scans / "scan_1.nii.gz")
    with pytest.warns(VolumeWarning) as told:
        run(careful, scans, tmp_path / "far")
    said = sorted(str(w.message) for w in told)
    assert (
        "scan_0.nii.gz: it shows 10 × 30 × 8 mm, the training scans showed at most 11 × 9 × 8 mm" in said[0]
    )
    assert "scan_1.nii.gz: it shows 4 × 9 × 8 mm, the training scans showed at least 9 × 9 × 8 mm" in said[1]
    assert len(said) == 2


def test_probabilities_lie_on_the_grid_of_the_labels(model: Model, scans: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"strategy": "dense", "probabilities": True}
    for name, more in {"fine": {"spacing": 0.5}, "part": {"region": ((2, 1, 0), (9, 6, 5))}}.items():
        run(model, scans, tmp_path / name, **options, **more)
        for index in range(5):
            labels = read_labels(tmp_path / name / f"scan_{index}.nii.gz")
            chance = read_volume(tmp_path / name / f"scan_{index}_probabilities.nii.gz")
            np.testing.assert_allclose(chance.affine, labels.affine)
            np.testing.assert_array_equal(chance.data[0] > 0.5, labels.data == 1)


def test_probabilities(model: Model, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, scans, out, strategy="dense")
    before = times(out)
    run(model, scans, out, probabilities=True, strategy="dense")  # not finished: they were not asked for
    assert len(times(out)) == 10
    for index in range(5):
        labels = read_labels(out / f"scan_{index}.nii.gz")
        chance = read_volume(out / f"scan_{index}_probabilities.nii.gz")
        np.testing.assert_array_equal(chance.affine, labels.affine)
        np.testing.assert_array_equal(chance.data[0] > 0.5, labels.data == 1)
    after = times(out)
    assert all(after[name] != before[name] for name in before)
    run(model, scans, out, probabilities=True)
    assert times(out) == after


def test_regions_and_spacings(model: Model, scans: Path, tmp_path: Path) -> None:
    run(model, scans, tmp_path / "whole")
    part = run(model, scans, tmp_path / "part", region=((2, 1, 0), (9, 6, 5)))
    fine = run(model, scans, tmp_path / "fine", spacing=0.5)
    for index in range(5):
        name = f"scan_{index}.nii.gz"
        full, box = read_labels(tmp_path / "whole" / name), read_labels(tmp_path / "part" / name)
        np.testing.assert_array_equal(box.data, full.data[2:9, 1:6, 0:5])
        np.testing.assert_allclose(box.affine[:3, 3], full.to_world(np.array([[2.0, 1.0, 0.0]]))[0])
        np.testing.assert_allclose(read_labels(tmp_path / "fine" / name).spacing, 0.5)
    assert part["scans"]["scan_0"]["shape"] == [7, 5, 5]
    assert fine["scans"]["scan_0"]["spacing_mm"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_processes_share(
    model: Model, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv(names[1], "2")
    monkeypatch.setenv(names[0], "0")
    first = run(model, scans, out)
    assert set(times(out)) == {f"scan_{i}.nii.gz" for i in (0, 2, 4)}
    monkeypatch.setenv(names[0], "1")
    second = run(model, scans, out)
    assert len(times(out)) == 5
    assert set(first["scans"]) | set(second["scans"]) == {f"scan_{i}" for i in range(5)}
    assert (out / "report.0.json").exists()
    assert (out / "report.1.json").exists()
    assert not (out / "report.json").exists()


def test_a_batch_script_alone_does_all_the_work(
    model: Model, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of the job; `srun` was not used
    run(model, scans, tmp_path / "out")
    assert len(times(tmp_path / "out")) == 5


def test_a_scan_that_cannot_be_read_does_not_stop_the_others(
    model: Model, scans: Path, tmp_path: Path
) -> None:
    content = (scans / "scan_2.nii.gz").read_bytes()
    (scans / "scan_2.nii.gz").write_bytes(content[:200])
    Volume(np.zeros((2, 5, 5, 5), np.uint8), np.eye(4)).save(scans / "scan_4.nii.gz")
    with pytest.raises(InputError, match=r"scan_2.*1 more could not be segmented"):
        run(model, scans, tmp_path / "out")
    assert set(times(tmp_path / "out")) == {f"scan_{i}.nii.gz" for i in (0, 1, 3)}
    entries = json.loads((tmp_path / "out" / "report.json").read_text())["scans"]
    assert "scan_2" in entries["scan_2"]["error"]
    assert "2 channel(s)" in entries["scan_4"]["error"]
    (scans / "scan_2.nii.gz").write_bytes(content)
    (scans / "scan_4.nii.gz").unlink()
    report = run(model, scans, tmp_path / "out")
    assert "error" not in report["scans"]["scan_2"]


def test_memory_is_a_matter_of_one_scan(
    model: Model, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = cohort._segment

    def short(model: Model, job: Job, volume: Volume, options: Options, made_by: str) -> Any:
        if job.name == "scan_1":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return usual(model, job, volume, options, made_by)

    monkeypatch.setattr(cohort, "_segment", short)
    with pytest.raises(ResourceError, match=r"scan_1.*memory ran out"):
        run(model, scans, tmp_path / "out")
    assert len(times(tmp_path / "out")) == 4


def test_a_scan_without_room_beside_another_is_read_alone(
    model: Model, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_so_far: list[weakref.ref[Volume]] = []

    def read(files: Any, **options: Any) -> Volume:
        gc.collect()
        if any(volume() is not None for volume in read_so_far):
            raise ResourceError("no room")
        volume = read_volume(files, **options)
        read_so_far.append(weakref.ref(volume))
        return volume

    monkeypatch.setattr(cohort, "read_volume", read)
    run(model, scans, tmp_path / "out")
    assert len(times(tmp_path / "out")) == 5


def test_processes_on_one_folder_share_it_and_its_report(
    model: Model, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started without knowing of each other, as by a job array: one does two scans while the other does its first."""
    out, usual = tmp_path / "out", cohort._segment

    def meanwhile(model: Model, job: Job, volume: Volume, options: Options, made_by: str) -> Any:
        monkeypatch.setattr(cohort, "_segment", usual)
        segment_all(model, plan_jobs([scans / f"scan_{i}.nii.gz" for i in (2, 3)], out), options)
        return usual(model, job, volume, options, made_by)

    monkeypatch.setattr(cohort, "_segment", meanwhile)
    said: list[str] = []
    options = Options(device="cpu", precision="fp32")
    report = segment_all(model, plan_jobs([scans], out), options, say=said.append)
    assert sorted(report["scans"]) == [f"scan_{i}" for i in range(5)]
    assert json.loads((out / "report.json").read_text())["scans"] == report["scans"]
    assert [line for line in said if "another process" in line] == [
        f"scan_{i} was finished by another process" for i in (2, 3)
    ]
    # A kill can lose entries: the label maps say what they can.
    (out / "report.json").unlink()
    again = run(model, scans, out)["scans"]
    for name, entry in report["scans"].items():
        assert again[name].items() <= entry.items()
        assert "volumes_ml" in again[name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ResourceError])
def test_what_was_finished_is_reported_also_when_it_ends_early(
    model: Model,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[], BaseException],
) -> None:
    """An interrupt while a scan is answered; a disk that is full when its label map is written."""
    usual = cohort._segment

    def stopped(model: Model, job: Job, volume: Volume, options: Options, made_by: str) -> Any:
        entry, save = usual(model, job, volume, options, made_by)
        if job.name != "scan_2":
            return entry, save
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt

        def full() -> None:
            raise ResourceError("the disk is full")

        return entry, full

    monkeypatch.setattr(cohort, "_segment", stopped)
    with pytest.raises(error):  # type: ignore[call-overload]
        run(model, scans, tmp_path / "out")
    finished = {name.removesuffix(".nii.gz") for name in times(tmp_path / "out")}
    assert {"scan_0", "scan_1"} <= finished
    reported = set(json.loads((tmp_path / "out" / "report.json").read_text())["scans"])
    assert {"scan_0", "scan_1"} <= reported <= finished


def test_one_file_among_others_has_a_report_of_its_own(model: Model, scans: Path, tmp_path: Path) -> None:
    """Also where it is named as the scan is."""
    out = tmp_path / "drawn" / "scan_0.nii.gz"
    segment_all(model, plan_jobs([scans / "scan_0.nii.gz"], out), Options(device="cpu"))
    assert [p.name for p in sorted(out.parent.iterdir())] == ["scan_0.nii.gz", "scan_0_report.json"]


def test_a_report_says_what_lies_there_after_a_kill(model: Model, scans: Path, tmp_path: Path) -> None:
    run(model, scans, tmp_path / "out")
    old = (tmp_path / "out" / "report.json").read_text()
    other = tiny.model("multiscale")
    other.label_names = {1: "another name"}
    run(other, scans, tmp_path / "out", overwrite=True)
    # Killed before its report was written: the maps are there, what is said of them is not.
    (tmp_path / "out" / "report.json").write_text(old)
    entries = run(other, scans, tmp_path / "out")["scans"]
    for name, entry in entries.items():
        assert entry["origin"] == read_labels(tmp_path / "out" / f"{name}.nii.gz").origin
        assert set(entry["volumes_ml"]) <= {"another name"}


def test_the_first_result_is_reported_at_once(model: Model, scans: Path, tmp_path: Path) -> None:
    reported = []
    jobs = plan_jobs([scans], tmp_path / "out")

    def done(count: int) -> None:
        reported.append((tmp_path / "out" / "report.json").exists())

    segment_all(model, jobs, Options(device="cpu", memory="400MB"), done=done)
    assert reported[1:] == [True] * 4


def test_nan(model: Model, tmp_path: Path) -> None:
    volume = tiny.scan()
    holes = volume.data.astype(np.float32)
    holes[0, 0] = np.nan
    Volume(holes, volume.affine).save(tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="NaN"):
        run(model, tmp_path / "a.nii.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VolumeWarning)
        run(model, tmp_path / "a.nii.gz", tmp_path / "out", replace_nan=True)
    assert (tmp_path / "out" / "a.nii.gz").exists()


def test_channels(tmp_path: Path) -> None:
    two = tiny.model("multiscale", channels=2)
    volume = tiny.scan(channels=2)
    for channel in range(2):
        Volume(volume.data[channel : channel + 1], volume.affine).save(tmp_path / f"a_000{channel}.nii.gz")
    volume.save(tmp_path / "both.nii.gz")
    files = [tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"]
    (job,) = plan_jobs(files, tmp_path / "out", channels_together=True)
    assert job.name == "a"
    options = Options(device="cpu", precision="fp32")
    segment_all(two, [job], options)
    segment_all(two, plan_jobs([tmp_path / "both.nii.gz"], tmp_path / "out"), options)
    one, other = (read_labels(tmp_path / "out" / f"{name}.nii.gz") for name in ("a", "both"))
    np.testing.assert_array_equal(one.data, other.data)


def test_forecasts(model: Model, scans: Path) -> None:
    forecasts, failed = forecast_all(model, plan_jobs([scans], None), Options(device="cpu"))
    assert not failed
    assert [f["scan"] for f in forecasts] == [f"scan_{i}" for i in range(5)]
    assert all(f["locations"] > 0 and f["seconds"] > 0 and f["memory_bytes"] > 0 for f in forecasts)
    several = tiny.model("multiscale", classes=3)
    for work in (forecast_all, segment_all):
        with pytest.raises(SettingsError, match="for one structure"):
            work(several, plan_jobs([scans], scans / "out"), Options(device="cpu", strategy="released"))


def test_plans(scans: Path, tmp_path: Path) -> None:
    single = tmp_path / "x" / "seg.nii.gz"
    (job,) = plan_jobs([scans / "scan_0.nii.gz"], single)
    assert job == Job("scan_0", (scans / "scan_0.nii.gz",), single, alone=True)
    assert job.probabilities.name == "seg_probabilities.nii.gz"
    assert not single.parent.exists()
    with pytest.raises(SettingsError, match="one file for 5 scans"):
        plan_jobs([scans], single)
    with pytest.raises(SettingsError, match="two scans are named"):
        plan_jobs([scans, scans / "scan_0.nii.gz"], tmp_path / "out")
    with pytest.raises(SettingsError, match="holds the scans"):
        plan_jobs([scans / "scan_0.nii.gz"], scans)
    with pytest.raises(SettingsError, match="holds the scans"):
        plan_jobs([scans], scans)
    with pytest.raises(SettingsError, match="neither NIfTI"):
        plan_jobs([scans], tmp_path / "out.nrrd")
    (tmp_path / "a.seg.nrrd").write_bytes(b"")
    with pytest.raises(DatasetError, match="not a scan"):
        plan_jobs([tmp_path / "a.seg.nrrd"], tmp_path / "out")
    with pytest.raises(DatasetError, match="no such file"):
        plan_jobs([tmp_path / "none"], tmp_path / "out")


def test_results_replace_neither_scans_nor_each_other(model: Model, scans: Path, tmp_path: Path) -> None:
    one = scans / "scan_0.nii.gz"
    for work in (segment_all, partial(forecast_all, with_targets=True)):
        with pytest.raises(SettingsError, match="one of the scans and would be replaced"):
            work(model, plan_jobs([one], one), Options())
    tiny.scan().save(scans / "scan_0_probabilities.nii.gz")
    jobs = plan_jobs([scans], tmp_path / "out")
    with pytest.raises(SettingsError, match="a result of scan_0 and of scan_0_probabilities"):
        segment_all(model, jobs, Options(probabilities=True))
    assert not (tmp_path / "out").exists()


def test_a_result_that_cannot_be_written_does_not_stop_the_others(
    model: Model, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LabelMap.save

    def refusing(labels: LabelMap, path: Path) -> None:
        if "scan_1" in str(path):
            raise VolumeError(path, "its name is too long", "Shorten it")
        save(labels, path)

    monkeypatch.setattr(LabelMap, "save", refusing)
    with pytest.raises(VolumeError, match="too long"):
        run(model, scans, tmp_path / "out")
    assert set(times(tmp_path / "out")) == {f"scan_{i}.nii.gz" for i in (0, 2, 3, 4)}
    told = json.loads((tmp_path / "out" / "report.json").read_text())["scans"]
    assert "too long" in told["scan_1"]["error"]
    assert "origin" in told["scan_4"]


def test_a_label_map_is_kept_where_what_belongs_to_it_cannot_be_written(
    model: Model, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(volume: Volume, path: Path) -> None:
        raise VolumeError(path, "its name is too long", "Shorten it")

    with monkeypatch.context() as patch:
        patch.setattr(Volume, "save", refusing)
        with pytest.raises(VolumeError, match="too long"):
            run(model, scans, tmp_path / "out", probabilities=True)
    assert set(times(tmp_path / "out")) == {f"scan_{i}.nii.gz" for i in range(5)}
    report = run(model, scans, tmp_path / "out", probabilities=True)
    assert len(times(tmp_path / "out")) == 10
    assert all("origin" in entry for entry in report["scans"].values())


def test_a_report_that_cannot_be_written_is_no_matter_of_a_scan(
    model: Model, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Path] = []

    def refusing(path: Path, value: Any) -> None:
        if not refused:
            refused.append(path)
            raise InputError(path, "cannot be written", "Choose another place")
        write_json(path, value)

    monkeypatch.setattr(reports, "write_json", refusing)
    report = run(model, scans, tmp_path / "out")
    assert refused == [tmp_path / "out" / "report.json"]
    assert all("origin" in entry for entry in report["scans"].values())
    assert json.loads(refused[0].read_text())["scans"] == report["scans"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_names_that_are_no_text(model: Model, scans: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (scans / "scan_0.nii.gz").rename(scans / f"{name}.nii.gz")
    run(model, scans, tmp_path / "out")
    assert (tmp_path / "out" / f"{name}.nii.gz").is_file()
    assert name in json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["scans"]


def test_nothing_to_do(model: Model, scans: Path, tmp_path: Path) -> None:
    run(model, scans, tmp_path / "out")
    before = times(tmp_path / "out")
    said: list[str] = []
    segment_all(model, plan_jobs([scans], tmp_path / "out"), Options(), say=said.append)
    assert said == ["5 of 5 are finished already"]
    assert times(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("environment", "taken"),
    [({"LOCAL_RANK": "3"}, [1]), ({"SLURM_LOCALID": "0"}, [0]), ({}, [])],
)
def test_processes_take_different_gpus(
    environment: dict[str, str], taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    take_gpu(environment)
    assert found == taken


def test_channels_in_another_order_are_told(scans: Path, tmp_path: Path) -> None:
    described = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "part": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    with pytest.warns(VolumeWarning, match="calls the channels T1, FLAIR, and the model takes flair, t1"):
        plan_jobs([scans], tmp_path / "out", channel_names=("flair", "t1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for names in (("t1", "flair"), ("image",), ()):
            plan_jobs([scans], tmp_path / "out", channel_names=names)


def test_a_limit_beyond_what_is_free_is_told(
    model: Model, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohort, "free_bytes", lambda _: 1_500_000_000)
    jobs = plan_jobs([scans / "scan_0.nii.gz"], tmp_path / "out")
    told = "beware: the memory limit is 2.0 GB, and 1.5 GB are free"
    for limit, expected in (("2GB", [told]), ("1GB", [])):
        said: list[str] = []
        options = Options(device="cpu", memory=limit, overwrite=True)
        segment_all(model, jobs, options, say=said.append)
        assert [line for line in said if "beware" in line] == expected


def test_from_python(model: Model, scans: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    report = ossnet.segment_folder(tmp_path / "model", scans, tmp_path / "out", device="cpu", largest=True)
    assert sorted(report["scans"]) == [f"scan_{i}" for i in range(5)]
    again = ossnet.segment_folder(model, [scans], tmp_path / "out", device="cpu", largest=True)
    assert again["scans"] == report["scans"]
    with pytest.raises(ossnet.InputError, match="there is no option larges"):
        ossnet.segment_folder(model, scans, tmp_path / "out", larges=True)
    scored = ossnet.evaluate(tmp_path / "out", tmp_path / "out", tolerance_mm=2.0)
    assert (scored["tolerance_mm"], {row["dice"] for row in scored["cases"]}) == (2, {1.0})


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (
            {"spacing": tuple(np.full(3, 0.5, np.float32)), "smallest_ml": np.float32(0.25)},
            {"spacing": (0.5, 0.5, 0.5), "smallest_ml": 0.25},
        ),
        (
            {
                "region": np.array([[2, 1, 0], [9, 6, 5]]),
                "memory": np.int64(800_000_000),
                "chunk": np.int32(512),
            },
            {"region": ((2, 1, 0), (9, 6, 5)), "memory": "800MB", "chunk": 512},
        ),
    ],
)
def test_options_may_be_numbers_of_numpy(
    model: Model, scans: Path, tmp_path: Path, given: dict[str, Any], plain: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    ossnet.segment_folder(model, scans, out, device=torch.device("cpu"), **given)
    assert json.loads((out / "report.json").read_text())["options"]["device"] == "cpu"
    before = times(out)
    ossnet.segment_folder(model, scans, out, device="cpu", **plain)
    assert times(out) == before

"""From a data set to a run folder (slow machines: about a minute)."""

import csv
import errno
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import SMALL
from torch import Tensor

import ossnet
from ossnet.data.cache import CachedCase, CaseCache, load_case
from ossnet.data.cases import Case
from ossnet.data.layouts import open_dataset
from ossnet.data.preparation import Preparation
from ossnet.errors import DatasetError, InputError, SettingsError
from ossnet.evaluation.matching import match
from ossnet.evaluation.scoring import score
from ossnet.evaluation.tables import from_csv
from ossnet.field.model import Model
from ossnet.files.lock import alone_in
from ossnet.training import illustration, loop
from ossnet.training.illustration import Events
from ossnet.training.loop import State
from ossnet.training.recipes.multiscale import MultiscaleRecipe
from ossnet.training.recipes.occupancy import OccupancyRecipe
from ossnet.training.run_folder import STATE
from ossnet.training.settings import make_settings, unused
from ossnet.training.train import learnt_early, train
from ossnet.volume import LabelMap, Volume, same_place


class Stop:
    """A listener that interrupts after some steps, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def step(self, state: State, loss: float, fraction: float) -> None:
        if state.step == self.after:
            raise KeyboardInterrupt

    def validated(self, row: dict[str, Any]) -> None:
        pass


def run(data: Path, out: Path, variant: str = "C", changes: Sequence[str] = (), **options: Any) -> Path:
    patches = any(change.startswith("network.patch_shape") for change in changes)
    left_out = unused(variant, patches, make_settings(variant).validation.scheme)
    small = [change for change in SMALL if change.split("=")[0] not in left_out]
    return train(data, out, make_settings(variant, None, None, [*small, *changes]), **options)


def losses(folder: Path) -> list[str]:
    return (folder / "losses.csv").read_text().splitlines()


@pytest.fixture(scope="module")
def finished(balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(balls, tmp_path_factory.mktemp("runs") / "c", changes=["validation.picture=true"])


def test_a_run_folder_holds_what_it_should(finished: Path) -> None:
    for name in ("model/model.json", "model/weights.safetensors", "model/MODEL_CARD.md", "last/model.json"):
        assert (finished / name).is_file(), name
    assert not (finished / "cache").exists()
    assert [file.name for file in sorted((finished / "pictures").iterdir())] == [
        f"step_{step:07d}.png" for step in (2, 4, 6)
    ]
    rows = list(csv.DictReader((finished / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert len(losses(finished)) == 1 + 3 * 2  # 8 training cases, batches of 4
    assert "structures: shell, core" in (finished / "plan.txt").read_text()
    splits = json.loads((finished / "splits.json").read_text())
    assert len(splits["train"]) == 8
    assert not set(splits["train"]) & set(splits["val"])
    judged = json.loads((finished / "validation.json").read_text())
    # One case: two structures, and the region that the data set names.
    assert [(row["label"], row["name"]) for row in judged["cases"]] == [
        (1, "shell"),
        (2, "core"),
        ([1, 2], "ball"),
    ]
    assert [entry["name"] for entry in judged["summary"]] == ["shell", "core", "ball", "mean"]
    dice = [entry["estimates"]["dice"]["mean"] for entry in judged["summary"]]
    assert dice[3] == pytest.approx((dice[0] + dice[1]) / 2)


def test_validation_leaves_its_segmentations(finished: Path, balls: Path) -> None:
    """On the grid of the label files, holding classes: comparing them again gives the same scores."""
    (name,) = json.loads((finished / "splits.json").read_text())["val"][:1]
    made = ossnet.read_labels(finished / "validation" / f"{name}.nii.gz")
    reference = ossnet.read_labels(balls / "labelsTr" / f"{name}.nii.gz")
    assert same_place(made, reference) is None
    assert dict(made.names) == {1: "shell", 2: "core"}
    rows = score(match(finished / "validation", balls, only_predicted=True))
    written = from_csv((finished / "validation.csv").read_text())
    assert [row.case for row in rows] == [row.case for row in written]
    for one, other in zip(rows, written, strict=True):
        assert one.scores.dice == pytest.approx(other.scores.dice, abs=1e-5)


def test_the_model_segments_a_scan(finished: Path, balls: Path, tmp_path: Path) -> None:
    model = ossnet.load(finished)
    scan = ossnet.read(balls / "imagesTr" / "ball_00_0000.nii.gz")
    labels = model.field(scan).segment()
    assert labels.shape == scan.shape
    assert labels.names == {1: "shell", 2: "core"}
    labels.save(tmp_path / "labels.nii.gz")
    assert (ossnet.read_labels(tmp_path / "labels.nii.gz").affine == scan.affine).all()


def test_a_resumed_training_equals_an_uninterrupted_one(finished: Path, balls: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(balls, tmp_path / "c", listener=Stop(3))
    run(balls, tmp_path / "c", resume=True)
    assert losses(tmp_path / "c") == losses(finished)
    one, other = (
        load_file(tmp_path / "c/last/weights.safetensors"),
        load_file(finished / "last/weights.safetensors"),
    )
    assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_number_of_workers_changes_nothing(
    finished: Path, balls: Path, tmp_path: Path, workers: int
) -> None:
    run(balls, tmp_path / "c", changes=[f"runtime.workers={workers}", "validation.dense=false"])
    assert losses(tmp_path / "c") == losses(finished)


def test_examples_are_told_how_often_the_cases_were_drawn(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, plain = set(), MultiscaleRecipe.example

    def example(recipe: MultiscaleRecipe, case: Any, rng: Any, passes: float = 0.0) -> Any:
        told.add(passes)
        return plain(recipe, case, rng, passes)

    monkeypatch.setattr(MultiscaleRecipe, "example", example)
    changes = ["schedule.epochs=3", "schedule.steps_per_epoch=4", "schedule.batch_size=1"]
    run(balls, tmp_path / "run", "multiscale", [*changes, "validation.dense=false"])
    assert told == {0.0, 0.125, 0.25}  # 8 cases count as 32


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("O-Net", []),
        ("B", ["data.target=foreground", "sampling.strategy=border", "data.fit=resize"]),
        ("unet3d", ["schedule.epochs=1"]),
        ("unet3d", ["schedule.epochs=1", "network.patch_shape=16,16,16", "augmentation.spatial=false"]),
        ("unet3d", ["schedule.epochs=1", "network.patch_shape=16,16,16", "network.blocks=4,8,16"]),
        ("monai-unet", ["schedule.minutes=0.02"]),
        ("monai-unet", ["schedule.minutes=0.02", "optimiser.name=muon", "network.blocks=4,8"]),
        ("unet2d", ["schedule.steps_per_epoch=1", "schedule.epochs=1", "schedule.batch_size=1"]),
        ("multiscale", ["schedule.minutes=0.02", "schedule.batch_size=1", "validation.picture=true"]),
        ("multiscale", ["schedule.minutes=0.02", "network.position=true", "augmentation.flip_axes=[0]"]),
    ],
)
def test_every_variant_trains_and_answers(
    balls: Path, tmp_path: Path, variant: str, changes: list[str]
) -> None:
    if "unet" in variant:
        pytest.importorskip("monai")
    out = run(balls, tmp_path / "run", variant, changes)
    rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert rows
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert (out / "validation.csv").is_file()


def test_probabilities_are_calibrated_but_for_the_papers(finished: Path, balls: Path, tmp_path: Path) -> None:
    assert "temperature" not in ossnet.load(finished).metadata
    run(balls, tmp_path / "run", "multiscale")
    model = ossnet.load(tmp_path / "run")
    assert 0.3 < model.metadata["temperature"] <= 3
    assert f"logits divided by {model.temperature:g}" in (tmp_path / "run/model/MODEL_CARD.md").read_text()


def test_a_training_by_minutes_ends_when_it_has_enough(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ossnet.training.schedule.ENOUGH_STEPS", 0)
    changes = ["schedule.minutes=600", "schedule.passes=3", "schedule.batch_size=1", "validation.dense=false"]
    out = run(balls, tmp_path / "run", "multiscale", changes)
    assert len(losses(out)) == 1 + 3 * 8
    rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert rows[-1]["step"] == "24"
    assert "or over 24 steps if they take less" in (out / "plan.txt").read_text()


def test_a_run_folder_belongs_to_one_process(balls: Path, tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"), pytest.raises(InputError, match="another process works in it"):
        run(balls, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_other_settings_of_the_machine(
    finished: Path, balls: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(balls, tmp_path / "c", changes=["runtime.workers=0"], listener=Stop(3))
    run(balls, tmp_path / "c", changes=["runtime.workers=2", "data.cache_gb=1e-6", "seed=7"], resume=True)
    assert losses(tmp_path / "c") == losses(finished)


def test_memory_is_for_training_cases_first(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[int] = []

    class Recorded(CaseCache):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            mapped.append(self.mapped_bytes)

    monkeypatch.setattr("ossnet.training.train.CaseCache", Recorded)
    # Eight of the ten cases fit, of 12 * 22 * 18 voxels with 3 bytes each.
    run(
        balls,
        tmp_path / "c",
        changes=["schedule.epochs=1", "data.cache_gb=0.000125", "validation.dense=false"],
    )
    assert mapped == [0, 2 * 3 * 12 * 22 * 18]


def test_data_without_structures_are_told(tmp_path: Path) -> None:
    root = tmp_path / "empty"
    for index in range(6):
        shape, affine = (20, 20, 20), np.eye(4)
        image = np.random.default_rng(index).normal(size=(1, *shape)).astype(np.float32)
        Volume(image, affine).save(root / "images" / f"a{index}.nii.gz")
        LabelMap(np.zeros(shape, np.uint8), affine).save(root / "labels" / f"a{index}.nii.gz")
    said: list[str] = []
    changes = ["schedule.epochs=1", "runtime.threads=1", "validation.dense=false"]
    train(root, tmp_path / "run", make_settings(None, None, None, changes), say=said.append)
    assert any("hold no structure" in line for line in said)


def test_a_run_is_not_overwritten(finished: Path, balls: Path) -> None:
    with pytest.raises(SettingsError, match="resume"):
        run(balls, finished)


def test_files_of_something_else_stay(balls: Path, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("mine")
    with pytest.raises(SettingsError, match=r"log\.csv: it is there and does not belong to a training"):
        run(balls, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.parametrize("change", ["structures", "spacing"])
def test_a_run_goes_on_with_the_same_data_only(balls: Path, tmp_path: Path, change: str) -> None:
    data, out = Path(shutil.copytree(balls, tmp_path / "data")), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(data, out, "multiscale", listener=Stop(3))
    assert (out / STATE).is_file()
    if change == "structures":
        description = json.loads((data / "dataset.json").read_text())
        description["labels"] = {"background": 0, "shell": 1, "core": 2, "more": 3}
        (data / "dataset.json").write_text(json.dumps(description))
    else:
        for file in data.rglob("*.nii.gz"):
            whole = ossnet.read_labels(file) if "labelsTr" in file.parts else ossnet.read(file)
            replace(whole, affine=np.diag([3.0, 2.0, 2.0, 1.0])).save(file)
    with pytest.raises(SettingsError, match=r"the data set has changed: (structures|preparation)"):
        run(data, out, "multiscale", resume=True)


def test_damaged_files_of_a_run_are_named(finished: Path, balls: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    whole = (out / "splits.json").read_text()
    (out / "splits.json").write_text(whole[:-20])
    with pytest.raises(SettingsError, match=r"splits\.json: it is damaged"):
        run(balls, out, resume=True)
    (out / "splits.json").write_text(whole)
    # Rows that are damaged, and a segmentation that is gone, are made again.
    (out / "validation_rows.json").write_text("{")
    gone = next((out / "validation").glob("*.nii.gz"))
    gone.unlink()
    run(balls, out, resume=True)
    assert gone.is_file()
    assert json.loads((out / "validation_rows.json").read_text())["cases"]


def test_a_label_that_was_corrected_is_judged_again(finished: Path, balls: Path, tmp_path: Path) -> None:
    data, out = (
        Path(shutil.copytree(balls, tmp_path / "data")),
        Path(shutil.copytree(finished, tmp_path / "run")),
    )
    (name,) = json.loads((out / "splits.json").read_text())["val"][:1]
    file = data / "labelsTr" / f"{name}.nii.gz"
    labels = ossnet.read_labels(file)
    replace(labels, data=np.minimum(labels.data, 1)).save(file)  # no core
    run(data, out, resume=True)
    before, after = (from_csv((r / "validation.csv").read_text()) for r in (finished, out))
    assert before[1].scores.reference_ml > 0 == after[1].scores.reference_ml


@pytest.mark.parametrize("fails", [True, False])
def test_pictures_that_fail_or_take_long_end_alone(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def slow(model: Model, case: CachedCase, title: str) -> bytes:
        if fails:
            raise RuntimeError("out of memory")
        return title.encode()

    monkeypatch.setattr(illustration, "illustrate", slow)
    monkeypatch.setattr(loop, "_A_VALIDATION", 0.0)
    changes = ["schedule.minutes=0.05", "validation.dense=false", "validation.picture=true"]
    told = pytest.warns(UserWarning, match="no more pictures: out of memory") if fails else nullcontext()
    with told:
        run(balls, tmp_path / "run", changes=changes)
    assert len(list(csv.DictReader((tmp_path / "run" / "log.csv").read_text().splitlines()))) > 1
    pictures = list((tmp_path / "run").glob("pictures/*.png"))
    assert len(pictures) == (0 if fails else 1)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_names_of_cases_that_are_no_text(balls: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(balls, tmp_path / "data"))
    for file in data.rglob("ball_0*.nii.gz"):
        file.rename(file.with_name(file.name.replace("ball", os.fsdecode(b"b\xe4lle"))))
    run(data, tmp_path / "run", changes=["validation.picture=true"])
    assert (tmp_path / "run" / "validation.json").is_file()


def test_structures_that_the_fold_never_shows_are_told(balls: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(balls, tmp_path / "data"))
    for file in (data / "labelsTr").iterdir():
        labels = ossnet.read_labels(file)
        replace(labels, data=np.minimum(labels.data, 1)).save(file)
    said: list[str] = []
    run(data, tmp_path / "run", say=said.append)
    assert "beware: no training case of this fold holds core: it cannot be learnt" in said


def test_resuming_nothing_is_refused(balls: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no run to resume"):
        run(balls, tmp_path / "nothing", resume=True)


def test_a_training_from_another_goes_on_from_anywhere(
    finished: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "model", tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    changes = ["network.init=first", "schedule.epochs=2", "runtime.checkpoint_seconds=1e6"]
    whole = run(balls, tmp_path / "whole", changes=changes)

    class Kill(Stop):
        def step(self, state: State, loss: float, fraction: float) -> None:
            if state.step == self.after:
                raise MemoryError  # a state is not written

    with pytest.raises(MemoryError):
        run(balls, tmp_path / "killed", changes=changes, listener=Kill(1))
    assert not (tmp_path / "killed" / STATE).exists()
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(KeyboardInterrupt):
        run(balls, tmp_path / "killed", resume=True, listener=Stop(3))
    # Its weights are in the state: the other model is needed no more.
    shutil.rmtree(tmp_path / "first")
    run(balls, tmp_path / "killed", resume=True)
    assert losses(tmp_path / "killed") == losses(whole) != losses(finished)


def test_folds_may_lie_elsewhere(balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net keeps them among its preprocessed files, and raw data may be read-only."""
    *train, last = open_dataset(balls).names
    (tmp_path / "folds.json").write_text(json.dumps([{"train": train, "val": [last]}]))
    monkeypatch.chdir(tmp_path)
    changes = ["data.splits=folds.json", "schedule.epochs=1", "validation.dense=false"]
    run(balls, tmp_path / "run", changes=changes)
    assert json.loads((tmp_path / "run" / "splits.json").read_text())["val"] == [last]
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["data"]["splits"] == str(tmp_path / "folds.json")
    with pytest.raises(DatasetError, match="cannot be read"):
        run(balls, tmp_path / "none", changes=["data.splits=none.json"])
    with pytest.raises(SettingsError, match=r"data\.splits: --fold all takes none of its folds"):
        run(balls, tmp_path / "all", changes=[*changes, "data.fold=all"])
    (tmp_path / "folds.json").write_text(json.dumps([{"train": ["gone"], "val": [last]}]))
    with pytest.raises(DatasetError, match=r"folds\.json, fold 0: gone is not in the data set"):
        run(balls, tmp_path / "wrong", changes=changes)


def test_a_patient_on_both_sides_of_a_given_fold_is_told(balls: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(balls, data)
    *train, last = open_dataset(balls).names
    (data / "cases.json").write_text(json.dumps({train[0]: "P1", last: "P1"}))
    (data / "splits_final.json").write_text(json.dumps([{"train": train, "val": [last]}]))
    run(data, tmp_path / "run", changes=["schedule.epochs=1", "validation.dense=false"])
    assert "beware: scans of P1 are on both sides of the fold" in (tmp_path / "run" / "plan.txt").read_text()


def test_what_more_processes_left_is_removed(balls: Path, tmp_path: Path) -> None:
    for rank in ("0", "3"):
        (tmp_path / "run" / "cache" / rank).mkdir(parents=True)
        (tmp_path / "run" / "cache" / rank / "1.npy").write_bytes(b"")
    run(balls, tmp_path / "run", changes=["schedule.epochs=1"])
    assert not (tmp_path / "run" / "cache").exists()


def test_a_damaged_state_is_refused(finished: Path, balls: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/settings.json").write_bytes((finished / "settings.json").read_bytes())
    content = (finished / "state.safetensors").read_bytes()
    (tmp_path / "r/state.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ossnet.OssnetError, match="damaged"):
        run(balls, tmp_path / "r", resume=True)


def test_an_undefined_loss_is_forgiven_and_many_in_a_row_are_not(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-precision convolutions of some machines give garbage now and then; a diverged training always does."""
    usual = OccupancyRecipe.loss
    spoilt = {2}
    count = 0

    def loss(self: OccupancyRecipe, *arguments: Any) -> Tensor:
        nonlocal count
        count += 1
        if count in spoilt:
            # As a garbled forward pass does, running averages of normalisations become undefined too.
            for buffer in self.network.buffers():
                if buffer.is_floating_point():
                    buffer.fill_(float("nan"))
        found = usual(self, *arguments)
        return found * float("nan") if count in spoilt else found

    monkeypatch.setattr(OccupancyRecipe, "loss", loss)
    out = run(balls, tmp_path / "once", changes=["validation.dense=false"])
    told = [float(line.split(",")[1]) for line in losses(out)[1:]]
    assert [step for step, value in enumerate(told, 1) if np.isnan(value)] == [2]
    rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert int(rows[-1]["skipped"]) == 1
    network = ossnet.load(out / "last").network
    assert all(bool(buffer.isfinite().all()) for buffer in network.buffers())
    spoilt, count = set(range(1, 1000)), 0
    with pytest.raises(SettingsError, match="the loss became nan"):
        run(balls, tmp_path / "always", changes=["schedule.epochs=30"])


def test_what_a_kill_left_unwritten_is_written_when_it_goes_on(
    finished: Path, balls: Path, tmp_path: Path
) -> None:
    (tmp_path / "r").mkdir()
    shutil.copy(finished / "settings.json", tmp_path / "r")
    run(balls, tmp_path / "r", resume=True, changes=["validation.dense=false"])
    assert json.loads((tmp_path / "r" / "splits.json").read_text())["val"]
    assert (tmp_path / "r" / "plan.txt").is_file()


def test_mapped_cases_of_several_caches_stay_what_they_are(balls: Path, tmp_path: Path) -> None:
    dataset = open_dataset(balls)

    def load(case: Case) -> CachedCase:
        return load_case(dataset, case, Preparation(), 3)

    first, second = (CaseCache(dataset.cases[i : i + 2], load, 0, tmp_path / "mapped") for i in (0, 2))
    for cached, case in zip([*first, *second], dataset.cases, strict=False):
        assert isinstance(cached.labels, np.memmap)
        np.testing.assert_array_equal(cached.labels, load(case).labels)
        assert cached.present == {0, 1, 2}


def test_a_full_disk_ends_the_log_and_not_the_training(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    events = Events(tmp_path / "events", 0)
    events.scalars({"iou": 0.5, "step": 3}, 3)

    class Full:
        def add_scalar(self, *_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    events._writer.close()
    events._writer = Full()
    with pytest.warns(UserWarning, match="no more TensorBoard events: No space left"):
        events.scalars({"iou": 0.5}, 4)
    events.scalars({"iou": 0.5}, 5)
    events.close()


def test_a_training_that_was_too_long_says_so() -> None:
    rows = [
        {"step": 100 * i, "seconds": 60.0 * i, "iou": iou} for i, iou in enumerate((0.7, 0.8, 0.75, 0.72), 1)
    ]
    remark = learnt_early(State(step=400, best=0.8, best_step=200, rows=rows))
    assert remark is not None
    assert "after 2 of 4 minutes (IoU 0.800, at the end 0.720)" in remark
    assert learnt_early(State(step=400, best=0.8, best_step=400, rows=rows)) is None
    assert learnt_early(State()) is None

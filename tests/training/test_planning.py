"""What a training picks by itself is said, and true."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from tests.training.conftest import SMALL

from ossnet.data.layouts import open_dataset
from ossnet.data.preparation import Preparation, as_float
from ossnet.errors import SettingsError
from ossnet.files.reading import read_labels, read_volume
from ossnet.networks.multiscale import MultiscaleNetwork
from ossnet.training.planning import TrainingPlan, make_plan
from ossnet.training.settings import make_settings


def planned(data: Path, *changes: str) -> TrainingPlan:
    dataset = open_dataset(data)
    return make_plan(dataset, dataset.cases, make_settings(changes=changes))


def test_the_default_variant_says_what_it_picked(balls: Path) -> None:
    plan = planned(balls, "sampling.locations=64")
    said = "\n".join(plan.reasons)
    for text in (
        "structures: shell, core",
        "mean 0 and deviation 1, since they have no unit",
        "grid: 2 × 1 × 1 mm, the median spacing of the training scans",
        "1 crop a step, 64 locations a crop, half of them near surfaces, of every structure as many; weights",
        "not mirrored, since left and right may differ",
        "Muon for convolutions",
    ):
        assert text in said
    assert "where a location lies" not in said


def test_values_of_label_files_are_noted_where_they_have_gaps(balls: Path, tmp_path: Path) -> None:
    shutil.copytree(balls, tmp_path / "balls")
    assert "label_values" not in planned(tmp_path / "balls").model.metadata
    description = json.loads((tmp_path / "balls" / "dataset.json").read_text())
    description["labels"] |= {"core": 4, "ball": [1, 4]}
    (tmp_path / "balls" / "dataset.json").write_text(json.dumps(description))
    for file in (tmp_path / "balls" / "labelsTr").iterdir():
        labels = read_labels(file)
        replace(labels, data=np.where(labels.data == 2, 4, labels.data).astype(np.uint8)).save(file)
    plan = planned(tmp_path / "balls")
    assert plan.model.label_values == {1: 1, 2: 4}
    assert [plan.model.label_of(given) for given in ("core", "4", 2)] == [2, 2, 2]
    assert any("(4 is 2); results have the values of the label files" in reason for reason in plan.reasons)
    assert planned(tmp_path / "balls", "data.target=foreground").model.label_values == {1: 1}


def test_what_was_set_is_said_as_such(balls: Path) -> None:
    plan = planned(
        balls,
        "data.spacing=1,1,1",
        "schedule.batch_size=2",
        "sampling.importance=0",
        "augmentation.flip_axes=[0,1]",
        "augmentation.spatial=false",
        "optimiser.name=adamw",
        "data.target=foreground",
        "network.position=true",
    )
    said = "\n".join(plan.reasons)
    assert "grid: 1 × 1 × 1 mm, as set" in said
    assert "2 crops a step" in said
    assert "as many" not in said
    assert "weights make" not in said
    assert "crops: not deformed, intensities changed, more after 20 passes" in said
    assert "mirrored along axes 0, 1 (augmentation.flip_axes=[] where sides differ)" in said
    assert "optimiser adamw" in said
    assert "where a location lies in its scan is told" in said


def test_ct_is_clipped_to_the_foreground(balls: Path, tmp_path: Path) -> None:
    copy = tmp_path / balls.name
    shutil.copytree(balls, copy)
    description = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(description | {"channel_names": {"0": "CT"}}))
    plan = planned(copy)
    window = plan.model.preparation.windows[0]
    assert window is not None
    assert 60 < window.low < 100 < window.high < 250
    assert any(f"clipped to {window.low:.0f} to {window.high:.0f}" in reason for reason in plan.reasons)
    assert not any("mean 0" in reason for reason in plan.reasons)
    plan = planned(copy, "data.normalise=zscore")
    assert any(reason.endswith("mean 0 and deviation 1") for reason in plan.reasons)


def test_channels_are_normalised_by_what_they_are(balls: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(balls, tmp_path / balls.name))
    description = json.loads((copy / "dataset.json").read_text())
    names = {"channel_names": {"0": "CT", "1": "PET"}}
    (copy / "dataset.json").write_text(json.dumps(description | names))
    for file in sorted((copy / "imagesTr").glob("*_0000.nii.gz")):
        volume = read_volume(file)
        replace(volume, data=volume.data * 7 + 3).save(file.with_name(file.name.replace("_0000", "_0001")))
    plan = planned(copy)
    preparation = plan.model.preparation
    window, other = preparation.windows
    assert window is not None
    assert other is None
    said = "\n".join(plan.reasons)
    assert f"clipped to {window.low:.0f} to {window.high:.0f} (CT)" in said
    assert "every scan (PET) brought to mean 0" in said
    dataset = open_dataset(copy)
    scan = dataset.image(dataset.cases[0]).data
    seen = preparation.normalise_(as_float(scan), preparation.statistics(scan))
    assert seen[0].max() <= (window.high - window.mean) / window.std + 1e-5
    assert abs(float(seen[1].mean())) < 1e-4
    assert abs(float(seen[1].std()) - 1) < 1e-4
    assert Preparation.model_validate_json(preparation.model_dump_json()) == preparation
    assert planned(copy, "data.normalise=window").model.preparation.windows[1] is not None


def test_scans_that_nothing_describes_are_taken_for_what_they_look_like(balls: Path, tmp_path: Path) -> None:
    for lowest, is_ct in ((-1024, True), (-3, False), (-4096, False)):
        root = tmp_path / str(-lowest)
        for file in sorted((balls / "imagesTr").glob("*.nii.gz")):
            volume = read_volume(file)
            data = volume.data - 100
            data[0, 0, 0, 0] = lowest
            replace(volume, data=data).save(root / "images" / file.name.replace("_0000", ""))
        shutil.copytree(balls / "labelsTr", root / "labels")
        plan = planned(root)
        assert plan.model.preparation.normalise == ("window" if is_ct else "zscore")
        assert any("taken for CT in Hounsfield units" in reason for reason in plan.reasons) == is_ct
    assert planned(tmp_path / "1024", "data.normalise=zscore").model.preparation.normalise == "zscore"


def test_windows_are_made_from_scans_with_a_structure(balls: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(balls, tmp_path / balls.name))
    description = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(description | {"channel_names": {"0": "CT"}}))
    for file in sorted((copy / "labelsTr").glob("*.nii.gz"))[:7]:
        labels = read_labels(file)
        replace(labels, data=np.zeros_like(labels.data)).save(file)
    with mock.patch("ossnet.training.channels._WINDOWED", 2):
        window = planned(copy).model.preparation.windows[0]
    assert window is not None
    assert window.high > 100


def test_mirroring_is_said(balls: Path) -> None:
    dataset = open_dataset(balls)
    said = make_plan(dataset, dataset.cases, make_settings("C", changes=SMALL)).reasons
    assert any("mirrored along axes 0, 1 (augmentation.flip_axes=[]" in reason for reason in said)


def test_a_training_may_start_from_another(balls: Path, tmp_path: Path) -> None:
    first = planned(balls)
    with torch.no_grad():
        for parameter in first.model.network.parameters():
            parameter.add_(1)
    first.model.save(tmp_path / "first")
    second = planned(balls, f"network.init={tmp_path / 'first'}")
    for name, tensor in first.model.network.state_dict().items():
        assert torch.equal(tensor, second.model.network.state_dict()[name])
    assert f"weights start as those of {tmp_path / 'first'}" in second.reasons
    dataset = open_dataset(balls)
    settings = make_settings("C", changes=[f"network.init={tmp_path / 'first'}", *SMALL])
    with pytest.raises(SettingsError, match="another family"):
        make_plan(dataset, dataset.cases, settings)
    with pytest.raises(SettingsError, match="another network: position False instead of True"):
        planned(balls, f"network.init={tmp_path / 'first'}", "network.position=true")
    # A training that goes on needs it no more.
    shutil.rmtree(tmp_path / "first")
    make_plan(dataset, dataset.cases, settings, resumed=tmp_path)


def test_a_training_starts_from_one_on_other_scans(balls: Path, tmp_path: Path) -> None:
    first = planned(balls, "data.spacing=1,1.5,1")
    first.model.save(tmp_path / "first")
    init = f"network.init={tmp_path / 'first'}"
    other = planned(balls, init, "data.target=foreground")
    assert other.model.preparation.spacing == (1, 1.5, 1)
    said = "\n".join(other.reasons)
    assert f"grid: 1 × 1.5 × 1 mm, that of {tmp_path / 'first'}" in said
    assert "those of coarse, decoder.last anew" in said
    known, found = first.model.network.state_dict(), other.model.network.state_dict()
    assert all(
        torch.equal(found[k], v) for k, v in known.items() if not k.startswith(("coarse", "decoder.last"))
    )
    # Its stages whatever the spacing; when the training goes on they are its own.
    network = planned(balls, init, "data.spacing=1,1,5").model.network
    assert isinstance(network, MultiscaleNetwork)
    assert isinstance(first.model.network, MultiscaleNetwork)
    assert network.spec.stages == first.model.network.spec.stages
    other.model.save(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "first")
    dataset = open_dataset(balls)
    settings = make_settings(changes=[init, "data.target=foreground"])
    again = make_plan(dataset, dataset.cases, settings, resumed=tmp_path / "run").model
    assert again.preparation == other.model.preparation
    again.network.load_state_dict(other.model.network.state_dict())


def test_what_was_mirrored_in_training_is_asked_mirrored(balls: Path) -> None:
    assert planned(balls).model.mirror == ()
    mirrored = planned(balls, "augmentation.flip_axes=[2,0,2]")
    assert mirrored.model.mirror == (0, 2)
    assert (
        "inference averages 4 predictions, mirrored and not (augmentation.mirror_in_use)" in mirrored.reasons
    )
    alone = planned(balls, "augmentation.flip_axes=[0]", "augmentation.mirror_in_use=false")
    assert alone.model.mirror == ()
    dataset = open_dataset(balls)
    settings = make_settings("C", changes=[*SMALL, "augmentation.mirror_in_use=true"])
    with pytest.raises(SettingsError, match="variant C cannot be asked mirrored"):
        make_plan(dataset, dataset.cases, settings)


def test_what_comes_after_the_minutes_is_told_where_it_comes(balls: Path) -> None:
    dataset = open_dataset(balls)

    def told(*changes: str) -> bool:
        plan = make_plan(dataset, dataset.cases, make_settings(changes=changes))
        return any("cases left out are segmented after them" in reason for reason in plan.reasons)

    assert told()
    assert not told("data.fold=all")
    assert not told("validation.dense=false")

"""Models that come with the package: small, described, found by name, at work."""

import doctest
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ossnet.field.model
from ossnet.errors import ModelError
from ossnet.field.model import SHIPPED, Model, shipped_models
from ossnet.training.settings import parse_settings
from ossnet.volume import Volume


def test_there_is_one() -> None:
    assert "hippocampus" in shipped_models()


@pytest.mark.parametrize("name", sorted(shipped_models()))
def test_a_shipped_model_is_small_and_says_what_it_is(name: str) -> None:
    folder = SHIPPED / name
    assert (folder / "weights.safetensors").stat().st_size <= 4e6
    card = (folder / "MODEL_CARD.md").read_text()
    for wanted in ("Licence", "Training", "validation cases", "dice", "[", "torch", "not a medical device"):
        assert wanted in card, wanted
    model = Model.load(name)
    assert all(p.dtype == torch.float32 for p in model.network.parameters())
    assert card == model.card()
    # They can be trained with again.
    assert parse_settings(model.metadata["settings"]).variant == model.variant
    # No path of the machine it was made on.
    assert "/" + "work" not in (folder / "model.json").read_text() + card


def test_the_hippocampus_model_answers_on_a_scan_of_another_size() -> None:
    model = Model.load("hippocampus")
    noise = np.random.default_rng(0).normal(100, 20, (1, 30, 44, 31)).astype(np.float32)
    found = model.field(Volume(noise, np.eye(4)), device="cpu").segment()
    assert found.shape == (30, 44, 31)
    assert dict(found.names) == {1: "anterior", 2: "posterior"}


def test_a_folder_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHIPPED / "hippocampus", tmp_path / "hippocampus")
    file = tmp_path / "hippocampus" / "model.json"
    described = json.loads(file.read_text())
    described["labels"] = {"1": "mine", "2": "mine too"}
    file.write_text(json.dumps(described))
    assert Model.load("hippocampus").label_names[1] == "mine"


def test_an_unknown_name_is_told_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hippocampus"):
        Model.load(tmp_path / "liver")


def test_half_precision_changes_close_calls_only(tmp_path: Path) -> None:
    model = Model.load("hippocampus")
    torch.manual_seed(0)
    for parameter in model.network.parameters():
        parameter.data += 1e-3 * torch.randn_like(parameter)  # what 16 bits do not hold
    model.save(tmp_path / "half", half=True)
    model.save(tmp_path / "full")
    half, full = (
        file.stat().st_size
        for file in sorted(tmp_path.glob("*/weights.safetensors"), key=lambda f: f.parent.name == "full")
    )
    assert half < 0.52 * full
    scan = Volume(np.random.default_rng(1).normal(100, 20, (1, 24, 24, 24)).astype(np.float32), np.eye(4))
    places = np.random.default_rng(2).uniform(0, 23, (500, 3))
    answers = [
        Model.load(tmp_path / kind).field(scan, device="cpu", precision="fp32").logits(places)
        for kind in ("half", "full")
    ]
    assert np.abs(answers[0] - answers[1]).max() < 0.1


def test_the_examples_in_the_documentation() -> None:
    failed, tried = doctest.testmod(ossnet.field.model)
    assert failed == 0
    assert tried > 0

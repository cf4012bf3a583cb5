"""`ossnet info` shows models and refuses what is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import tiny
from tests.cli.refusals import refused, succeeded


def test_a_model(model: Path) -> None:
    said = succeeded("info", model)
    assert "variant C" in said
    assert "1 part 1" in said
    described = json.loads(succeeded("info", model, "--json"))
    assert described["family"] == "ossnet"
    assert described["preparation"]["shape"] == [32, 32, 32]


def test_models_that_come_with_the_package_are_listed() -> None:
    assert "hippocampus: anterior, posterior" in succeeded("info").splitlines()
    assert json.loads(succeeded("info", "--json")) == {"hippocampus": ["anterior", "posterior"]}


def test_what_is_no_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert "there is no such folder" in refused(tmp_path, "info", tmp_path / "none")
    assert "holds no model.json" in refused(tmp_path, "info", tmp_path / "empty")
    assert "a file, not a folder" in refused(tmp_path, "info", tmp_path / "file")


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("weights.safetensors", lambda content: content[:100], "weights.safetensors: it cannot be used"),
        ("weights.safetensors", lambda content: content[:-5], "weights.safetensors: it cannot be used"),
        ("model.json", lambda content: b"{", "model.json: it cannot be used"),
        ("model.json", lambda content: b"[]", "model.json: it cannot be used"),
        ("model.json", lambda content: b"\xff\xfe", "model.json: it cannot be used"),
        ("model.json", replaced(b'"format": 1', b'"format": 99'), "Update ossnet"),
        ("model.json", replaced(b'"canonical"', b'"upwards"'), "orientation: Input should be"),
        ("model.json", replaced(b'"ossnet"', b'"transformer"'), "transformer"),
        ("model.json", replaced(b'"classes": 1', b'"classes": 5'), "size mismatch"),
        ("model.json", replaced(b'"labels"', b'"labelled"'), "labels"),
        ("model.json", replaced(b'"channels": [', b'"channels": 1, "was": ['), "channels: Input should be"),
    ],
)
def test_damaged_models(
    model: Path, tmp_path: Path, name: str, damage: Callable[[bytes], bytes], said: str
) -> None:
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / name
    changed = damage(file.read_bytes())
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    assert said in refused(tmp_path, "info", tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("labels", {}, "its labels are none, and its network knows 2 structure(s). Name 1 to 2, each once"),
        ("labels", {"1": "a"}, "its labels are 1 (a), and"),
        ("labels", {"0": "a", "1": "b"}, "its labels are 0 (a), 1 (b), and"),
        ("labels", {"1": "a", "5": "b"}, "its labels are 1 (a), 5 (b), and"),
        ("labels", {"one": "a"}, "labels.one"),
        ("extent_mm", [1, 2, 3], "extent_mm: Input should be"),
        ("extent_mm", {"smallest": [1, 2], "largest": [3, 4, 5]}, "extent_mm.smallest"),
        ("piece_mm", "large", "piece_mm: Input should be"),
        ("surface_mm2", float("nan"), "surface_mm2: Input should be"),
        ("settings", [], "settings: Input should be"),
        ("settings", {"network": {"patch_shape": 3}}, "settings.network.patch_shape: Input should be"),
        ("data", "Dataset004", "data: Input should be"),
        ("regions", {"whole": 3}, "regions.whole: Input should be"),
    ],
)
def test_what_a_model_says_of_itself_is_checked(tmp_path: Path, key: str, value: object, said: str) -> None:
    tiny.model("multiscale", 3).save(tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    told = refused(tmp_path, "info", tmp_path / "model")
    assert told.startswith(f"{file}: ")
    assert said in told

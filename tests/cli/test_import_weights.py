"""`ossnet import-weights` takes the authors' files and refuses all others, without running anything in them."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.refusals import ended, refused, started, succeeded

RELEASED = Path(__file__).parents[1] / "fixtures" / "released_weights"
GRID = ["--output-shape", "3,2,2"]


def test_a_released_file_becomes_a_model(tmp_path: Path) -> None:
    said = succeeded("import-weights", RELEASED / "oss_net_c.pt", "--out", tmp_path / "c", *GRID)
    assert "variant C" in said
    assert json.loads((tmp_path / "c" / "model.json").read_text())["variant"] == "C"
    assert "variant C" in succeeded("info", tmp_path / "c")


def test_models_are_not_replaced(tmp_path: Path) -> None:
    made = "import-weights", RELEASED / "oss_net_c.pt", "--out"
    succeeded(*made, tmp_path / "c", *GRID)
    before = (tmp_path / "c" / "model.json").read_bytes()
    (tmp_path / "run" / "model").mkdir(parents=True)
    for out in (tmp_path / "c", tmp_path / "run"):
        assert "holds a model or a run already" in refused(tmp_path, *made, out, *GRID)
    assert (tmp_path / "c" / "model.json").read_bytes() == before


class Harmful:
    """Would make a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    weights = torch.load(RELEASED / "oss_net_c.pt", weights_only=True)
    harm = tmp_path / "harm"
    torch.save({"a": Harmful(harm)}, tmp_path / "harmful.pt")
    (tmp_path / "pickled.pt").write_bytes(pickle.dumps(Harmful(harm)))
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    content = (RELEASED / "oss_net_c.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    key = next(key for key in weights if key.startswith("decoder") and weights[key].ndim == 2)
    torch.save({k: v for k, v in weights.items() if k != key}, tmp_path / "less.pt")
    torch.save({**weights, key: weights[key][:1]}, tmp_path / "cut.pt")

    def message(name: str) -> str:
        return refused(tmp_path, "import-weights", tmp_path / name, "--out", tmp_path / "out", *GRID)

    assert "no such file" in message("none.pt")
    assert "more than plain tensors" in message("harmful.pt")
    assert "more than plain tensors" in message("pickled.pt")
    assert not harm.exists()
    assert "missing" in message("other.pt")
    assert "a list, not a state dict" in message("list.pt")
    for name in ("empty.pt", "half.pt"):
        assert f"{name}: it cannot be read as weights" in message(name)
    for name in ("less.pt", "cut.pt"):
        assert name in message(name)


@pytest.mark.parametrize("given", ["8,8", "a,b,c", "0,0,0", "-1,2,2", "70,9,9"])
def test_grids_without_meaning(tmp_path: Path, given: str) -> None:
    message = refused(
        tmp_path,
        *("import-weights", RELEASED / "oss_net_c.pt", "--out", tmp_path / "out", "--output-shape", given),
    )
    assert "three numbers" in message


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["import-weights", RELEASED / "oss_net_c.pt", *GRID, "--out"]
    assert "is a file, not a folder" in refused(tmp_path, *arguments, tmp_path / "file")
    code, said = ended(started(*arguments, tmp_path / "model", limit_bytes=1000))
    assert code == 2, said
    assert "the disk is full" in said
    assert "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

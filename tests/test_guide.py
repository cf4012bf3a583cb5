"""What the README and the guide show in Python works as it stands there."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parent.parent
BLOCKS = [
    (name, block)
    for name in ("README.md", "docs/guide.md")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan, and a run folder with a model."""
    root = tmp_path_factory.mktemp("guide")
    scan = tiny.scan((40, 60, 70))
    scan.save(root / "scan.nii.gz")
    made = replace(tiny.model("multiscale"), label_names={1: "liver"})
    made.save(root / "runs" / "liver")
    made.field(scan, device="cpu").segment().save(root / "scan_seg.nii.gz")
    return root


@pytest.mark.parametrize("block", [pytest.param(block, id=name) for name, block in BLOCKS])
def test_code_that_is_shown_runs(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(block, "shown", "exec"), {})

"""The benchmark of kills with one kill (`benchmarks/kill.py` has twenty-five)."""

import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.training.conftest import balls

__all__ = ["balls"]


@pytest.fixture(scope="module")
def kill() -> Iterator[ModuleType]:
    # The benchmark as its command finds it: with its neighbours importable.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("kill")


def test_one_kill(kill: ModuleType, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill, "STARTING_UP", 0.0)
    settings = [*kill.SETTINGS, "schedule.epochs=6", "validation.dense_cases=1"]
    result = kill.kill_training(balls, tmp_path, 1, random.Random(3), settings)
    assert len(result["kills"]) == 1
    for finished in result["trainings finished after their kills, equal bit for bit"]:
        assert all(finished.values())

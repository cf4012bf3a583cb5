"""The benchmark of kills with one kill (`benchmarks/kill.py` has twenty-five)."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.training.conftest import balls

__all__ = ["balls"]


@pytest.fixture(scope="module")
def kill() -> ModuleType:
    file = Path(__file__).parents[1] / "benchmarks" / "kill.py"
    spec = importlib.util.spec_from_file_location("kill_benchmark", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_one_kill(kill: ModuleType, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill, "STARTING_UP", 0.0)
    settings = [*kill.SETTINGS, "schedule.epochs=6", "validation.dense_cases=1"]
    result = kill.kill_training(balls, tmp_path, 1, random.Random(3), settings)
    assert len(result["kills"]) == 1
    for finished in result["trainings finished after their kills, equal bit for bit"]:
        assert all(finished.values())

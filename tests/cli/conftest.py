"""A small data set and a small model for the commands."""

from pathlib import Path

import pytest
from tests import tiny
from tests.training.conftest import balls

__all__ = ["balls"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: variant C with fixed random weights, one channel, one structure."""
    folder = tmp_path_factory.mktemp("models") / "c"
    tiny.model("C").save(folder)
    return folder

"""Reference cases of the released networks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

RELEASED = Path(__file__).parents[1] / "fixtures" / "released_weights"


@pytest.fixture(scope="session")
def released() -> Path:
    """Folder of the reference cases."""
    return RELEASED


@pytest.fixture(scope="session")
def arrays() -> Callable[[str], dict[str, Tensor]]:
    """Reader of one `.npz` as tensors."""

    def read(name: str) -> dict[str, Tensor]:
        with np.load(RELEASED / f"{name}.npz") as file:
            return {key: torch.from_numpy(file[key]) for key in file.files}

    return read

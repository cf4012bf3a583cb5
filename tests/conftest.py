"""Drawn cases are the same in every run, and may take any time, so that a red run says something about the change under
test and not about the machine.

`pytest --hypothesis-profile=default` draws new ones.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As most users have them: `make test` gives each of its workers one. Sums are added up in another order then."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

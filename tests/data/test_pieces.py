import numpy as np
import pytest
from tests import tiny

from ossnet.data.pieces import piece_extents


def test_pieces_of_every_structure_are_measured() -> None:
    labels = np.zeros((40, 30, 20), np.uint8)
    labels[2:22, 2:6, 2:5] = 1
    labels[30:33, 20:23, 10:13] = 1
    labels[30:34, 5:8, 10:13] = 2
    labels[0, 29, 19] = 2  # a slip
    assert sorted(piece_extents(labels, 3, (1.0, 2.0, 3.0))) == [9.0, 9.0, 20.0]
    assert piece_extents(labels * 0, 3, (1.0, 1.0, 1.0)) == []


@pytest.mark.parametrize(("extent", "strategy"), [(3.0, "dense"), (80.0, "octree"), (None, "octree")])
def test_models_of_small_pieces_ask_everywhere(extent: float | None, strategy: str) -> None:
    """The octree would start from a prediction that does not show them."""
    model = tiny.model("multiscale")
    if extent is not None:
        model.metadata["piece_mm"] = extent
    scan = tiny.scan((24, 20, 18))
    found = model.field(scan).segment()
    assert found.strategy == strategy
    assert (found.evaluated == 24 * 20 * 18) == (strategy == "dense")

import numpy as np
import pytest
from tests import tiny

from ossnet.data.pieces import Piece, pieces_of, small_extent


def test_pieces_of_every_structure_are_measured() -> None:
    labels = np.zeros((40, 30, 20), np.uint8)
    labels[2:22, 2:6, 2:5] = 1
    labels[30:33, 20:23, 10:13] = 1
    labels[30:34, 5:8, 10:13] = 2
    found = pieces_of(labels, 3, (1.0, 2.0, 3.0))
    assert sorted(found) == [(1, 9.0, 27), (1, 20.0, 240), (2, 9.0, 36)]
    assert pieces_of(labels * 0, 3, (1.0, 1.0, 1.0)) == []


def test_splinters_do_not_make_a_structure_small() -> None:
    splinters = [Piece(1, 3.0, 8)] * 50
    assert small_extent([*splinters, Piece(1, 90.0, 10_000)]) == 90
    assert small_extent([*splinters, Piece(1, 90.0, 1_000)]) == 3
    assert small_extent([Piece(1, 90.0, 10_000), *(Piece(2, 5.0, 30) for _ in range(3))]) == 5
    assert small_extent([]) is None


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

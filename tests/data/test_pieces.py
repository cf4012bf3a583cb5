from unittest import mock

import numpy as np
import pytest
from scipy.ndimage import label
from tests import tiny

from ossnet.data.pieces import Piece, pieces_of, small_extent
from ossnet.errors import ResourceError
from ossnet.field.memory import affords_lattice
from ossnet.field.octree.strides import strides_within


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


@pytest.mark.parametrize("classes", [1, 3])
def test_a_lattice_that_meets_small_pieces(classes: int) -> None:
    """Every piece of which one voxel lies on it is found exactly, and a region comes out as the whole."""
    model = tiny.model("multiscale", classes)
    model.metadata["piece_mm"] = 3.9
    scan = tiny.scan((25, 20, 18), affine=np.diag([0.5, 0.5, 0.5, 1.0]))
    field = model.field(scan)
    dense = field.segment(strategy="dense").data
    found = field.segment()
    assert found.strategy == "octree"
    assert 13 * 10 * 9 < found.evaluated < dense.size
    pieces = 0
    for value in range(max(classes, 2)):
        numbers, count = label(dense == value)
        hit = np.unique(numbers[::2, ::2, ::2])
        mine = np.isin(numbers, hit[hit > 0])
        assert (found.data[mine] == value).all()
        pieces += count
    assert pieces > 3 * classes
    region = ((3, 4, 2), (17, 15, 13))
    part = model.field(scan).segment(region=region)
    assert (part.data == found.data[3:17, 4:15, 2:13]).all()
    assert model.forecast(scan).locations < dense.size
    # The network's own prediction, asked for by a path.
    plain = field.segment(path=(8, 4, 1))
    assert plain.strategy == "octree"
    assert plain.evaluated < dense.size


def test_a_grant_that_does_not_hold_the_lattice() -> None:
    """All voxels are asked then, slab by slab."""
    model = tiny.model("multiscale")
    model.metadata["piece_mm"] = 3.9
    scan = tiny.scan((25, 20, 18), affine=np.diag([0.5, 0.5, 0.5, 1.0]))
    assert affords_lattice(None, (16, 16, 16))
    free = model.forecast(scan, memory="200MB")
    assert free.locations < scan.data.size
    with mock.patch("ossnet.field.memory._SITE_BYTES", 100_000):
        assert model.forecast(scan, memory="200MB").locations == scan.data.size
        found = model.field(scan, memory="200MB").segment()
    assert found.strategy == "dense"
    assert found.evaluated == scan.data.size


def test_a_region_needs_the_lattice_of_the_region() -> None:
    model = tiny.model("multiscale")
    model.metadata["piece_mm"] = 3.9
    scan = tiny.scan((60, 60, 60), affine=np.diag([0.5, 0.5, 0.5, 1.0]))
    region = ((24, 24, 24), (40, 40, 40))
    whole = model.field(scan).segment(strategy="octree")
    with mock.patch("ossnet.field.memory._SITE_BYTES", 50_000):
        field = model.field(scan, memory="800MB")
        with pytest.raises(ResourceError, match="at least"):
            field.segment(strategy="octree")
        part = field.segment(strategy="octree", region=region)
    assert (part.data == whole.data[24:40, 24:40, 24:40]).all()


def test_strides_within_a_distance() -> None:
    shape = (64, 64, 64)
    assert strides_within(2.0, (1.0, 1.0, 1.0), shape) == (2, 2, 2)
    assert strides_within(2.0, (0.6, 0.5, 5.0), shape) == (2, 4, 1)
    assert strides_within(0.1, (1.0, 1.0, 1.0), shape) == (1, 1, 1)
    assert strides_within(100.0, (1.0, 1.0, 1.0), shape) == (8, 8, 8)
    assert strides_within(100.0, (1.0, 1.0, 1.0), (64, 8, 3)) == (8, 2, 1)

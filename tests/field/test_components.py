"""Islands go when they are told to, and nothing else does."""

import tracemalloc
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from ossnet.errors import SettingsError
from ossnet.field.components import without_islands
from ossnet.volume import LabelMap


def example() -> LabelMap:
    data = np.zeros((12, 10, 8), np.uint8)
    data[1:5, 1:5, 1:5] = 1  # 64 voxels
    data[8:10, 8:10, 1:3] = 1  # 8
    data[2:4, 2:4, 2:4] = 2  # inside the first: 8 voxels, and the only ones of label 2
    data[11, 0, 0] = 2
    return LabelMap(data, np.diag([2.0, 1.0, 5.0, 1.0]))  # 0.01 ml a voxel


def test_the_largest_of_each_structure_stays() -> None:
    labels = example()
    found = without_islands(labels, largest=True)
    assert found.volumes_ml() == pytest.approx({1: 0.56, 2: 0.08})
    assert labels.data[8, 8, 1] == 1  # the input is left alone


def test_a_size_in_millilitres() -> None:
    assert without_islands(example(), smallest_ml=0.05).volumes_ml() == pytest.approx({1: 0.64, 2: 0.08})
    assert without_islands(example(), smallest_ml=0.08).volumes_ml() == pytest.approx({1: 0.64, 2: 0.08})
    assert without_islands(example(), smallest_ml=0.1).volumes_ml() == pytest.approx({1: 0.56})
    assert without_islands(example(), smallest_ml=1.0).volumes_ml() == {}
    with pytest.raises(SettingsError, match="millilitres"):
        without_islands(example(), smallest_ml=float("nan"))


@given(st.integers(0, 10_000))
def test_one_component_a_structure_is_left_and_none_is_invented(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 4, (7, 6, 5)).astype(np.uint16)
    labels = LabelMap(data, np.eye(4))
    assert (without_islands(labels).data == data).all()
    found = without_islands(labels, largest=True).data
    assert ((found == data) | (found == 0)).all()
    for label in np.unique(data[data > 0]):
        _, count = ndimage.label(found == label)
        assert count == 1


@given(st.integers(0, 10_000), st.floats(0.2, 0.8))
def test_components_are_those_of_the_whole(seed: int, share: float) -> None:
    """However their parts in planes hang together."""
    data = np.random.default_rng(seed).random((9, 8, 7)) < share
    labels = LabelMap(data.astype(np.uint8), np.eye(4))
    parts, _ = ndimage.label(data)
    sizes = np.bincount(parts.ravel())[1:]
    expected = parts == 1 + sizes.argmax() if len(sizes) else data
    np.testing.assert_array_equal(without_islands(labels, largest=True).data, expected)
    large = np.isin(parts, 1 + np.flatnonzero(sizes >= 4))
    np.testing.assert_array_equal(without_islands(labels, smallest_ml=0.004).data, large)


def test_masks_of_truth_values() -> None:
    labels = example()
    mask = LabelMap(labels.data == 1, labels.affine)
    assert without_islands(mask, largest=True).data.sum() == 56


@pytest.mark.parametrize("order", ["C", "F"])
def test_hardly_any_memory_is_taken_beside_the_label_map(order: Literal["C", "F"]) -> None:
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (160, 120, 100)], indexing="ij"))
    data = np.zeros((160, 120, 100), np.uint8, order=order)
    for centre in ((60, 60, 50), (130, 30, 30), (20, 100, 80)):
        data[((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(axis=0) < centre[0] ** 2 / 4] = 1
    labels, before = LabelMap(data, np.eye(4)), int(data.sum())
    tracemalloc.start()
    try:
        found = without_islands(labels, largest=True, reuse=True)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.data is data
    assert 0 < int(data.sum()) < before
    assert taken < 40 * 120 * 100 < data.nbytes

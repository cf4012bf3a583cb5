"""Islands go when they are told to, and nothing else does."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from ossnet.errors import SettingsError
from ossnet.field.components import island_bytes, without_islands
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


def test_memory_is_known_before() -> None:
    rng = np.random.default_rng(0)
    data = np.zeros((90, 80, 70), np.uint8)
    data[5:85, 5:75, 5:65] = rng.random((80, 70, 60)) > 0.4
    labels = LabelMap(data, np.eye(4))
    tracemalloc.start()
    try:
        without_islands(labels, largest=True)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.5 * island_bytes(labels) < taken < 1.1 * island_bytes(labels)

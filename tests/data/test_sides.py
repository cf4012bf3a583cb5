"""Structures that belong to a side."""

import numpy as np
import pytest

from ossnet.data.sides import in_pairs, tells_side

SIDED = "left_kidney, Kidney L, hippocampus-rh, lungRight, RIGHT ATRIUM, ear.lt, LKidney, left1, lefthand"
ABROAD = "linke Niere, rein droit, riñón izquierdo, parotid-sin"


@pytest.mark.parametrize("name", f"{SIDED}, {ABROAD}".split(", "))
def test_names_with_a_side(name: str) -> None:
    assert tells_side(name)


@pytest.mark.parametrize(
    "name", ["liver", "label 1", "Larynx", "anterior", "L1x", "r2d", "L5", "vertebrae_L1", "MRI"]
)
def test_names_without_a_side(name: str) -> None:
    assert not tells_side(name)


def blobs(*places: tuple[int, int, int], shape: tuple[int, int, int] = (40, 30, 20)) -> np.ndarray:
    """Balls of radius 5, one a label."""
    labels = np.zeros(shape, np.uint8)
    grid = np.indices(shape)
    for number, place in enumerate(places, 1):
        labels[((grid - np.reshape(place, (3, 1, 1, 1))) ** 2).sum(0) < 25] = number
    return labels


def test_pairs_are_found_by_where_they_lie() -> None:
    assert in_pairs(blobs((8, 15, 10), (32, 15, 10)))
    # Not at the same height, and beside something in the middle.
    assert in_pairs(blobs((8, 13, 10), (20, 5, 10), (32, 17, 11)))
    # Above each other, one within the other, alone, and nothing at all.
    assert not in_pairs(blobs((20, 8, 10), (21, 22, 10)))
    assert not in_pairs(np.maximum(blobs((20, 15, 10)), 2 * (blobs((20, 15, 10))[::-1] > 0)))
    assert not in_pairs(blobs((8, 15, 10)))
    assert not in_pairs(np.zeros((4, 5, 6), np.uint8))

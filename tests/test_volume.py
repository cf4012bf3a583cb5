"""Geometry of volumes: places in the world survive every way of storing them."""

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ossnet.errors import VolumeError
from ossnet.volume import LabelMap, Orientation, Volume, closest_canonical, same_place

ORIENTATIONS = [Orientation(a, f) for a in permutations(range(3)) for f in product([False, True], repeat=3)]
RNG = np.random.default_rng(0)


def random_affine(seed: int) -> np.ndarray:
    """Any invertible affine: rotation, shear, unequal spacing, mirrored or not."""
    rng = np.random.default_rng(seed)
    while True:
        affine = np.eye(4)
        affine[:3, :3] = rng.normal(size=(3, 3)) * rng.uniform(0.3, 5, size=3)
        affine[:3, 3] = rng.uniform(-200, 200, size=3)
        if np.linalg.cond(affine[:3, :3]) < 50:
            return affine


affines = st.integers(0, 2**32 - 1).map(random_affine)


def volume(affine: np.ndarray | None = None, shape: tuple[int, int, int] = (4, 5, 6)) -> Volume:
    return Volume(RNG.normal(size=(2, *shape)).astype(np.float32), np.eye(4) if affine is None else affine)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation_is_undone(orientation: Orientation) -> None:
    data = volume().data
    assert np.array_equal(orientation.undo(orientation.apply(data)), data)
    assert np.shares_memory(orientation.apply(data), data)


@given(affine=affines, orientation=st.sampled_from(ORIENTATIONS), seed=st.integers(0, 99))
def test_reoriented_voxels_stay_where_they_are(
    affine: np.ndarray, orientation: Orientation, seed: int
) -> None:
    scan = volume(affine)
    turned = scan.reoriented(orientation)
    rng = np.random.default_rng(seed)
    index = np.array([[rng.integers(n) for n in turned.shape]])
    (i, j, k), (a, b, c) = (
        index[0],
        np.rint(scan.to_voxel(turned.to_world(index.astype(float))))[0].astype(int),
    )
    assert np.array_equal(turned.data[:, i, j, k], scan.data[:, a, b, c])


@given(affine=affines, orientation=st.sampled_from(ORIENTATIONS))
def test_canonical_is_the_same_however_a_scan_is_stored(affine: np.ndarray, orientation: Orientation) -> None:
    scan = volume(affine)
    stored = scan.reoriented(orientation)
    first, second = (v.reoriented(closest_canonical(v.affine)) for v in (scan, stored))
    assert np.array_equal(first.data, second.data)
    np.testing.assert_allclose(first.affine, second.affine, atol=1e-9)


@given(affine=affines, orientation=st.sampled_from(ORIENTATIONS))
def test_one_grid_in_the_order_of_another(affine: np.ndarray, orientation: Orientation) -> None:
    scan = volume(affine)
    stored = scan.reoriented(orientation)
    again = stored.in_order_of(scan)
    assert np.array_equal(again.data, scan.data)
    np.testing.assert_allclose(again.affine, scan.affine, atol=1e-6)


@given(affine=affines, orientation=st.sampled_from(ORIENTATIONS), start=st.tuples(*[st.integers(0, 3)] * 3))
def test_a_cropped_segmentation_is_surrounded_by_background(
    affine: np.ndarray, orientation: Orientation, start: tuple[int, int, int]
) -> None:
    whole = np.zeros((4, 5, 6), np.uint8)
    box = tuple(slice(first, first + 2) for first in start)
    whole[box] = RNG.integers(1, 5, whole[box].shape)
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ start
    part = LabelMap(whole[box], moved, cropped=True).reoriented(orientation)
    found = part.in_order_of(volume(affine))
    assert not found.cropped
    assert np.array_equal(found.data, whole)
    assert np.array_equal(found.affine, affine)


@pytest.mark.parametrize("start", [(0.5, 0, 0), (-1, 0, 0), (0, 0, 5), (0, 40, 0)])
def test_a_cropped_segmentation_elsewhere_stays_as_it_is(start: tuple[float, float, float]) -> None:
    affine = np.eye(4)
    affine[:3, 3] = start
    part = LabelMap(np.ones((2, 2, 2), np.uint8), affine, cropped=True)
    assert same_place(part.in_order_of(volume()), part) is None
    assert LabelMap(part.data, np.eye(4)).in_order_of(volume()).shape == (2, 2, 2)


@given(affine=affines)
def test_canonical_axes_point_right_anterior_superior(affine: np.ndarray) -> None:
    turned = volume(affine).reoriented(closest_canonical(affine)).affine[:3, :3]
    assert (np.diag(turned) >= 0).all()
    assert closest_canonical(volume(affine).reoriented(closest_canonical(affine)).affine) == Orientation()


@given(affine=affines)
def test_world_and_back(affine: np.ndarray) -> None:
    points = np.random.default_rng(1).uniform(-5, 300, size=(20, 3))
    np.testing.assert_allclose(volume(affine).to_voxel(volume(affine).to_world(points)), points, atol=1e-6)


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.diag([1.0, 1, 0, 1]), np.full((4, 4), np.nan)])
def test_a_place_that_is_none_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(VolumeError, match="not invertible"):
        volume(bad)


def test_volume_of_a_box_in_ml() -> None:
    data = np.zeros((10, 10, 10), np.uint8)
    data[2:6, 3:8, 1:4] = 2  # 4 × 5 × 3 voxels of 2 × 1 × 5 mm
    shear = np.diag([2.0, 1.0, 5.0, 1.0])
    shear[0, 1] = 0.7  # does not change the volume
    assert LabelMap(data, shear).volumes_ml() == pytest.approx({2: 60 * 10 / 1000})


def test_files_have_the_values_of_label_files() -> None:
    data = np.arange(4, dtype=np.uint8).repeat(2).reshape(2, 2, 2)
    labels = LabelMap(data, np.eye(4), names={1: "a", 3: "c"}, values={3: 400}, origin="ossnet 12")
    stored = labels.as_in_files()
    np.testing.assert_array_equal(np.unique(stored.data), [0, 1, 2, 400])
    assert (dict(stored.names), stored.origin, stored.as_in_files()) == (
        {1: "a", 400: "c"},
        "ossnet 12 values",
        stored,
    )
    assert labels.data is data
    assert data.max() == 3
    small = replace(labels, values={3: 200}).as_in_files(reuse=True)
    assert small.data is data
    np.testing.assert_array_equal(np.unique(data), [0, 1, 2, 200])


def test_same_place_measures_at_the_far_corners() -> None:
    one = volume(shape=(101, 5, 6))
    turned = np.eye(4)
    turned[1, 0] = 1.01e-3  # 0.101 mm at voxel 100
    assert same_place(one, one) is None
    assert "0.101 mm" in str(same_place(one, Volume(one.data, turned)))
    turned[1, 0] = 0.9e-3
    assert same_place(one, Volume(one.data, turned)) is None
    assert "shapes differ" in str(same_place(one, volume()))


def test_rounded_voxel_sizes_are_the_same_place() -> None:
    """As two converters write them; small voxels that are shifted by a half are not."""
    data = np.broadcast_to(np.uint8(0), (1, 512, 512, 4))
    one, two = (Volume(data, np.diag([size, size, 3.0, 1.0])) for size in (0.703125, 0.7031))
    assert same_place(one, two) is None
    assert same_place(one, two, 0.01) is not None
    fine, shifted = np.diag([0.05, 0.05, 0.05, 1.0]), np.diag([0.05, 0.05, 0.05, 1.0])
    shifted[0, 3] = 0.025
    assert "0.025 mm" in str(same_place(Volume(data, fine), Volume(data, shifted)))


def test_surface_of_a_box() -> None:
    labels = np.zeros((6, 7, 8), np.uint8)
    labels[1:5, 1:5, 1:5] = 1
    labels[2, 2, 2] = 2  # touches label 1 on all sides
    found = LabelMap(labels, np.diag([2.0, 2.0, 2.0, 1.0]))
    # 4³ voxels without the inner 2³; of these the one of label 2, and its three neighbours inside
    assert found.surface_voxels() == 56 + 1 + 3
    assert found.surface_mm2() == pytest.approx(60 * 4.0)
    full = LabelMap(np.ones((3, 3, 3), np.uint8), np.eye(4))
    assert full.surface_voxels() == 26  # beyond the grid lies background

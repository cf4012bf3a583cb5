from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.data.balls import ISO, ball

from ossnet.data.crop_locations import nearest_labels
from ossnet.data.crops import cut, cut_labels, draw_map, inside, to_grid, to_scan

UNSCALED = {"scaling_all": 0.0, "scaling": 0.0, "scaling_across": 0.0}
SEEDS = st.integers(0, 10_000)
ZOOMS = st.sampled_from([(1.0, 1.0, 1.0), (0.5, 0.5, 1.0), (1.3, 1.0, 0.8)])


@settings(max_examples=25)
@given(seed=SEEDS, zoom=ZOOMS, flips=st.sampled_from([(), (0,), (0, 2)]))
def test_the_crop_shows_what_lies_where_the_map_says(
    seed: int, zoom: tuple[float, float, float], flips: tuple[int, ...]
) -> None:
    source = ball(zoom=zoom)
    mapping = draw_map(source, replace(ISO, flips=flips), np.random.default_rng(seed))
    crop = cut(source, mapping)
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in ISO.crop), indexing="ij"), -1).reshape(-1, 3)
    places = to_scan(mapping(voxels.astype(np.float32)), zoom)
    expected = np.clip(places, 0, np.array(source.shape) - 1)
    assert crop.shape == (3, *ISO.crop)
    np.testing.assert_allclose(crop.numpy().reshape(3, -1).T, expected, atol=2e-3)


@settings(max_examples=25)
@given(seed=SEEDS, zoom=ZOOMS, spacing=st.permutations([1.0, 1.5, 4.0]))
def test_labels_of_a_crop_are_those_where_the_map_says(
    seed: int, zoom: tuple[float, float, float], spacing: list[float]
) -> None:
    x, y, z = spacing
    source, crop = ball(zoom=zoom), (13, 16, 9)
    mapping = draw_map(source, replace(ISO, crop=crop, spacing=(x, y, z)), np.random.default_rng(seed))
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in crop), indexing="ij"), -1).reshape(-1, 3)
    expected = nearest_labels(source, to_scan(mapping(voxels.astype(np.float32)), zoom))
    labels = cut_labels(source, mapping)
    assert labels.shape == crop
    # Places halfway between two voxels are rounded either way.
    assert (labels != expected.reshape(crop)).mean() < 2e-3


@settings(max_examples=25)
@given(seed=SEEDS)
def test_the_map_is_inverted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mapping = draw_map(ball(), replace(ISO, crop=(64, 64, 64), spacing=(1.0, 1.0, 1.5)), rng)
    points = (rng.random((50, 3)) * 60).astype(np.float32)
    np.testing.assert_allclose(mapping.inverse(mapping(points), steps=12), points, atol=0.05)


def test_rotations_keep_distances_in_mm() -> None:
    plan = replace(ISO, spacing=(1.0, 1.5, 1.0), **UNSCALED, elastic=0.0, spatial=1.0)
    mm = np.array(plan.spacing)
    for seed in range(10):
        mapping = draw_map(ball(), plan, np.random.default_rng(seed))
        points = np.random.default_rng(0).random((2, 3)).astype(np.float32) * 10
        before = np.linalg.norm((points[1] - points[0]) * mm)
        after = np.linalg.norm(np.subtract(*mapping(points)) * mm)
        assert after == pytest.approx(before, rel=1e-3)


def test_organs_grow_and_shrink_as_a_whole_but_slices_stay_as_thick_as_they_are() -> None:
    plain = {**UNSCALED, "rotation": 0.0, "elastic": 0.0, "spatial": 1.0, "scaling_all": 0.5}
    drawn = []
    for seed in range(40):
        linear = draw_map(ball(), replace(ISO, **plain), np.random.default_rng(seed)).matrix
        np.testing.assert_allclose(linear, linear[0, 0] * np.eye(3), atol=1e-6)
        drawn.append(np.log(linear[0, 0]))
        thick = replace(ISO, spacing=(1.0, 1.0, 5.0), **plain)
        linear = draw_map(ball(), thick, np.random.default_rng(seed)).matrix
        np.testing.assert_allclose(linear, np.diag([linear[0, 0], linear[0, 0], 1.0]), atol=1e-6)
    assert -0.5 <= min(drawn) < -0.3
    assert 0.3 < max(drawn) <= 0.5


def test_distant_slices_are_not_rotated_into_each_other() -> None:
    plan = replace(ISO, spacing=(1.5, 10.0, 1.5), spatial=1.0)
    for seed in range(10):
        assert draw_map(ball(), plan, np.random.default_rng(seed)).axes == (0, 2)


@settings(max_examples=40)
@given(
    seed=SEEDS,
    crop=st.tuples(*[st.integers(16, 72)] * 3),
    flips=st.sampled_from([(), (0, 1, 2)]),
    centred=st.sampled_from([0.0, 1.0]),
)
def test_a_crop_that_is_not_deformed_holds_voxels_of_the_scan(
    seed: int, crop: tuple[int, int, int], flips: tuple[int, ...], centred: float
) -> None:
    """In use nothing is interpolated; nor does a smaller scan leave the crop, or a smaller crop the scan."""
    source = ball((60, 50, 40))
    plan = replace(ISO, crop=crop, flips=flips, spatial=0.0, centred=centred)
    mapping = draw_map(source, plan, np.random.default_rng(seed))
    corners = np.array([[0, 0, 0], np.array(crop) - 1], np.float32)
    ends = np.sort(mapping(corners), axis=0)
    np.testing.assert_array_equal(ends, np.rint(ends))
    smaller = np.array(crop) <= source.shape
    assert (np.where(smaller, ends[0] >= 0, ends[0] <= 0)).all()
    assert (np.where(smaller, ends[1] < source.shape, ends[1] >= np.array(source.shape) - 1)).all()


@settings(max_examples=25)
@given(seed=SEEDS, depth=st.integers(4, 24), axis=st.integers(0, 2))
def test_thick_slices_are_not_mixed(seed: int, depth: int, axis: int) -> None:
    """Between slices 10 mm apart lies nothing that a scan would show."""
    crop, spacing = [40, 40, 40], [1.5, 1.5, 1.5]
    crop[axis], spacing[axis] = depth, 10.0
    plan = replace(
        ISO, crop=(crop[0], crop[1], crop[2]), spacing=(spacing[0], spacing[1], spacing[2]), spatial=1.0
    )
    mapping = draw_map(ball((48, 48, 48)), plan, np.random.default_rng(seed))
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in crop), indexing="ij"), -1).reshape(-1, 3)
    depths = mapping(voxels.astype(np.float32))[:, axis]
    np.testing.assert_array_equal(depths, np.rint(depths))


def test_grid_and_scan_coordinates_invert_each_other() -> None:
    points = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    np.testing.assert_allclose(to_grid(to_scan(points, (2.0, 0.5, 1.1)), (2.0, 0.5, 1.1)), points, atol=1e-5)


@settings(max_examples=40)
@given(seed=SEEDS, thin=st.integers(1, 12), axis=st.integers(0, 2), spatial=st.sampled_from([0.0, 1.0]))
@example(seed=9, thin=1, axis=0, spatial=1.0)
def test_few_slices_stay_in_sight(seed: int, thin: int, axis: int, spatial: float) -> None:
    """Also at the edge of a much thicker crop: there are voxels to ask about, and they are not rotated out of it."""
    shape = [60, 50, 40]
    shape[axis] = thin
    source = ball((shape[0], shape[1], shape[2]))
    crop = (48, 40, 32)
    mapping = draw_map(
        source, replace(ISO, crop=crop, spatial=spatial, elastic=4.0), np.random.default_rng(seed)
    )
    assert axis not in mapping.axes
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in crop), indexing="ij"), -1).reshape(-1, 3)
    share = inside(mapping(voxels.astype(np.float32)), source.shape).mean()
    assert share > 0.3 * thin / crop[axis]


def test_the_longest_spacing_is_not_rotated_even_where_all_are_apart() -> None:
    for spacing in ((3.0, 0.4, 0.8), (3.0, 1.0, 2.0)):
        plan = replace(ISO, crop=(48, 48, 48), spacing=spacing, spatial=1.0)
        assert draw_map(ball((60, 60, 60)), plan, np.random.default_rng(0)).axes == (1, 2)


@settings(max_examples=25)
@given(seed=SEEDS, extent=st.integers(16, 64))
def test_nothing_is_folded(seed: int, extent: int) -> None:
    plan = replace(ISO, crop=(extent, extent, extent), spatial=1.0, elastic=8.0)
    mapping = draw_map(ball((64, 64, 64)), plan, np.random.default_rng(seed))
    axes = [np.linspace(0, extent - 1, 30) for _ in range(3)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)
    step = np.float32(0.05)
    columns = [
        (mapping(grid + step * np.eye(3, dtype=np.float32)[i]) - mapping(grid)) / step for i in range(3)
    ]
    volume = np.linalg.det(np.stack(columns, axis=-1))
    assert (volume > 0).mean() > 0.99

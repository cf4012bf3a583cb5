"""Scores against shapes whose distances are known, other tools where comparable, and invariances."""

import math
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from skimage.measure import marching_cubes

from ossnet.errors import SettingsError, VolumeError
from ossnet.evaluation.metrics import SurfaceDistances, compare, diagonal_mm, surface_distances
from ossnet.volume import Orientation

SPACING = (0.8, 1.3, 2.5)
AFFINE = np.diag([*SPACING, 1.0])


def box(shape: tuple[int, int, int], low: tuple[int, int, int], high: tuple[int, int, int]) -> np.ndarray:
    """A box of ones from `low` to `high` (exclusive)."""
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 1
    return labels


def ball(
    shape: tuple[int, int, int], centre: tuple[float, ...], radius: float, linear: np.ndarray
) -> np.ndarray:
    """Voxels whose centres lie within `radius` mm of a centre in mm."""
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ linear.T
    return (np.linalg.norm(points - np.array(centre), axis=-1) < radius).astype(np.uint8)


def random_masks(seed: int, shape: tuple[int, int, int] = (9, 8, 7)) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    one, other = (generator.random((2, *shape)) < generator.uniform(0.1, 0.9)).astype(np.uint8)
    one[4, 4, 4] = other[4, 4, 4] = 1
    return one, other


def test_a_map_compared_with_itself_is_perfect() -> None:
    labels = ball((30, 30, 30), (15, 15, 15), 9, np.eye(3))
    scores = compare(labels, labels, AFFINE, [1])[1]
    assert (scores.dice, scores.iou, scores.surface_dice) == (1, 1, 1)
    assert (scores.hd95_mm, scores.assd_mm, scores.volume_difference_ml) == (0, 0, 0)
    assert scores.outcome == "scored"


def test_shifted_boxes_have_the_overlap_and_volumes_that_counting_gives() -> None:
    one, other = box((20, 20, 20), (2, 2, 2), (8, 8, 8)), box((20, 20, 20), (4, 2, 2), (9, 8, 8))
    scores = compare(one, other, AFFINE, [1])[1]
    voxel_ml = math.prod(SPACING) / 1000
    assert scores.dice == pytest.approx(2 * 4 * 36 / (6 * 36 + 5 * 36))
    assert scores.iou == pytest.approx(4 / 7)
    assert scores.volume_difference_ml == pytest.approx(36 * voxel_ml)
    assert scores.volume_difference_percent == pytest.approx(20)
    assert scores.reference_ml == pytest.approx(180 * voxel_ml)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_parallel_plates_are_their_gap_apart_in_mm(axis: int) -> None:
    # Plates through the whole image, so that nearly all area faces the other plate.
    low, high, far = [0, 0, 0], [40, 40, 40], [40, 40, 40]
    low[axis], high[axis], far[axis] = 5, 10, 13
    one = box((40, 40, 40), tuple(low), tuple(high))  # type: ignore[arg-type]
    other = box((40, 40, 40), tuple(low), tuple(far))  # type: ignore[arg-type]
    distances = surface_distances(one > 0, other > 0, np.diag(SPACING))
    assert distances.percentile(100) == pytest.approx(3 * SPACING[axis])
    assert compare(one, other, AFFINE, [1])[1].hd95_mm == pytest.approx(3 * SPACING[axis])
    within = [distances.overlap(t * SPACING[axis]) for t in (2.9, 3.0)]
    assert within[0] < 0.85
    assert within[1] == pytest.approx(1)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.0, 2.0)])
def test_concentric_balls_are_their_radii_apart(spacing: tuple[float, float, float]) -> None:
    linear = np.diag(spacing)
    shape = tuple(round(70 / s) for s in spacing)
    large, small = (ball(shape, (34, 34, 34), radius, linear) for radius in (30, 24))  # type: ignore[arg-type]
    scores = compare(large, small, np.diag([*spacing, 1.0]), [1], tolerance_mm=5)[1]
    assert scores.assd_mm == pytest.approx(6, abs=0.15 * max(spacing))
    assert scores.hd95_mm == pytest.approx(6, abs=0.25 * max(spacing))
    assert scores.surface_dice == pytest.approx(0, abs=0.05)
    assert scores.volume_difference_ml == pytest.approx(4 / 3 * math.pi * (30**3 - 24**3) / 1000, rel=0.01)


def test_surface_areas_are_those_of_marching_cubes() -> None:
    # A flat face counts exactly; on a ball, marching cubes on a mask overestimates by under a tenth.
    plate = box((10, 10, 10), (0, 0, 0), (10, 10, 5)) > 0
    areas = surface_distances(plate, plate, np.diag(SPACING)).areas[0]
    middle = 0.8 * 1.3
    assert np.isclose(areas, middle).sum() >= 2 * 9 * 9
    mask = ball((60, 60, 60), (30, 30, 30), 25, np.eye(3)) > 0
    area = surface_distances(mask, mask, np.eye(3)).areas[0].sum()
    assert 1 < area / (4 * math.pi * 25**2) < 1.1


def test_an_island_far_away_moves_the_maximum_but_not_the_95th_percentile() -> None:
    reference = box((60, 60, 60), (5, 5, 5), (30, 30, 30))
    prediction = reference.copy()
    prediction[55:57, 55:57, 55:57] = 1
    distances = surface_distances(prediction > 0, reference > 0, np.eye(3))
    assert distances.percentile(100) == pytest.approx(27 * math.sqrt(3))
    assert distances.percentile(95) == 0


def test_the_percentile_is_by_area_not_by_site() -> None:
    one = SurfaceDistances((np.array([0.0, 1.0, 9.0]), np.zeros(1)), (np.array([90.0, 4.9, 5.1]), np.ones(1)))
    assert one.percentile(95) == 9
    assert one.percentile(94.8) == 1
    assert one.mean() == pytest.approx((4.9 + 9 * 5.1) / 101)


@pytest.mark.parametrize(
    ("spacing", "radius"),
    [((1.0, 1.0, 1.0), 29.0), ((1.0, 1.0, 1.0), 29.5), ((0.7, 0.7, 1.25), 29.0), ((1.4, 1.4, 10.0), 29.0)],
)
def test_small_gaps_are_measured_below_the_voxel(spacing: tuple[float, float, float], radius: float) -> None:
    linear = np.diag(spacing)
    shape = tuple(round(70 / s) for s in spacing)
    one, other = (ball(shape, (34.3, 34.1, 33.7), r, linear) > 0 for r in (30.0, radius))  # type: ignore[arg-type]
    assert surface_distances(one, other, linear).mean() == pytest.approx(30 - radius, rel=0.15)


def ambiguous(mask: np.ndarray) -> bool:
    """Whether two voxels of the mask, or two of the background, touch along an edge alone.

    Rare in small balls; scikit-image then decides by the orientation what is connected.
    """
    for axis in range(3):
        plane = np.moveaxis(np.pad(mask, 1), axis, 0)
        a, b, c, d = plane[:, :-1, :-1], plane[:, 1:, 1:], plane[:, 1:, :-1], plane[:, :-1, 1:]
        if ((a & b & ~c & ~d) | (c & d & ~a & ~b)).any():
            return True
    return False


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_nearest_distances_match_brute_force_over_skimage_triangles(seed: int) -> None:
    """Areas and places from scikit-image's meshes of the whole mask in all 48 orientations, on average.

    A polygon that is not flat can be cut along more than one diagonal; which one depends on the orientation.
    """
    generator = np.random.default_rng(seed)
    linear = np.diag(SPACING) + generator.uniform(-0.2, 0.2, (3, 3))
    one, other = (
        ball((16, 14, 12), tuple(linear @ generator.uniform(5, 7, 3)), generator.uniform(2, 5), linear) > 0
        for _ in range(2)
    )
    assume(one.any() and other.any() and not (ambiguous(one) or ambiguous(other)))

    def elements(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.pad(mask, 1)
        total, moments = np.zeros(padded.shape), np.zeros((3, *padded.shape))
        for axes, flips in product(permutations(range(3)), product((False, True), repeat=3)):
            turn = Orientation((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))
            back = turn.matrix((padded.shape[0], padded.shape[1], padded.shape[2]))
            volume = np.ascontiguousarray(turn.apply(padded), dtype=np.float32)
            corners, faces, _, _ = marching_cubes(volume, 0.5, method="lorensen")
            corners = corners @ back[:3, :3].T + back[:3, 3]
            cubes = tuple(np.floor(corners[faces].mean(1)).astype(int).T)  # that a triangle lies in
            a, b, c = (corners @ linear.T)[faces].transpose(1, 0, 2)
            areas = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
            np.add.at(total, cubes, areas / 48)
            for moment, places in zip(moments, ((a + b + c) / 3).T, strict=True):
                np.add.at(moment, cubes, areas * places / 48)
        met = total > 0
        return (moments[:, met] / total[met]).T, total[met]

    (a, area_a), (b, area_b) = elements(one), elements(other)
    gaps = np.linalg.norm(a[:, None] - b[None], axis=-1)
    found = surface_distances(one, other, linear)
    assert found.areas[0].sum() == pytest.approx(area_a.sum(), rel=1e-5)
    np.testing.assert_allclose(np.sort(found.distances[0]), np.sort(gaps.min(1)), atol=1e-4)
    np.testing.assert_allclose(np.sort(found.distances[1]), np.sort(gaps.min(0)), atol=1e-4)
    mean = (gaps.min(1) @ area_a + gaps.min(0) @ area_b) / (area_a.sum() + area_b.sum())
    assert found.mean() == pytest.approx(mean, abs=1e-4)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), axes=st.permutations([0, 1, 2]), flips=st.tuples(*[st.booleans()] * 3))
def test_scores_do_not_depend_on_the_stored_orientation(
    seed: int, axes: list[int], flips: tuple[bool, bool, bool]
) -> None:
    one, other = random_masks(seed)
    turn = Orientation((axes[0], axes[1], axes[2]), flips)
    sheared = AFFINE + 0.1 * np.random.default_rng(seed).standard_normal((4, 4))
    sheared[3] = (0, 0, 0, 1)
    here = compare(one, other, sheared, [1], 1.5)[1]
    there = compare(turn.apply(one), turn.apply(other), sheared @ turn.matrix(one.shape), [1], 1.5)[1]  # type: ignore[arg-type]
    for name in ("dice", "hd95_mm", "assd_mm", "surface_dice", "reference_ml"):
        assert getattr(here, name) == pytest.approx(getattr(there, name)), name


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_swapping_the_maps_changes_only_the_sign_of_the_volume(seed: int) -> None:
    one, other = random_masks(seed)
    forth, back = compare(one, other, AFFINE, [1])[1], compare(other, one, AFFINE, [1])[1]
    for name in ("dice", "iou", "hd95_mm", "assd_mm", "surface_dice"):
        assert getattr(forth, name) == pytest.approx(getattr(back, name)), name
    assert forth.volume_difference_ml == pytest.approx(-back.volume_difference_ml)
    assert forth.iou == pytest.approx(forth.dice / (2 - forth.dice))  # type: ignore[operator]


def test_a_mask_and_its_complement_have_the_same_inner_surface() -> None:
    mask = random_masks(3)[0]
    mask[[0, -1]] = mask[:, [0, -1]] = mask[:, :, [0, -1]] = 0
    inside = surface_distances(mask > 0, mask > 0, np.eye(3)).areas[0].sum()
    outside = surface_distances(mask == 0, mask == 0, np.eye(3)).areas[0].sum()
    shell = surface_distances(np.ones(mask.shape, bool), np.ones(mask.shape, bool), np.eye(3)).areas[0].sum()
    assert outside == pytest.approx(inside + shell)


def test_distances_under_shear_are_those_of_the_same_bodies_on_a_straight_grid() -> None:
    """Two balls rasterised on a sheared and on a straight grid: the same bodies, nearly the same scores."""
    shear = np.array([[1.0, 0.6, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]])
    results = []
    for linear in (np.eye(3), shear):
        corner = linear @ np.array([35.0, 35, 35])
        one = ball((70, 70, 70), tuple(corner), 12, linear)
        other = ball((70, 70, 70), tuple(corner + np.array([5.0, 0, 0])), 12, linear)
        affine = np.eye(4)
        affine[:3, :3] = linear
        results.append(compare(one, other, affine, [1], 2)[1])
    straight, sheared = results
    assert sheared.dice == pytest.approx(straight.dice, abs=0.01)
    assert sheared.hd95_mm == pytest.approx(straight.hd95_mm, abs=0.3)
    assert sheared.assd_mm == pytest.approx(straight.assd_mm, abs=0.1)
    assert sheared.surface_dice == pytest.approx(straight.surface_dice, abs=0.03)


def test_an_identity_affine_gives_voxels() -> None:
    one, other = random_masks(5)
    scaled = compare(one, other, np.diag([2.0, 2, 2, 1]), [1])[1]
    assert scaled.hd95_mm == pytest.approx(2 * compare(one, other, np.eye(4), [1])[1].hd95_mm)  # type: ignore[operator]


def test_several_classes_are_scored_each_for_itself_and_strangers_are_ignored() -> None:
    reference = box((20, 20, 20), (2, 2, 2), (8, 8, 8)) + 2 * box((20, 20, 20), (10, 10, 10), (15, 15, 15))
    prediction = reference.copy()
    prediction[18:, 18:, 18:] = 7
    scores = compare(prediction, reference, AFFINE, [2, 1, 300])
    assert list(scores) == [2, 1, 300]
    assert scores[1].dice == scores[2].dice == 1
    assert scores[300].outcome == "absent"


def test_ids_of_an_atlas_cost_no_more_than_small_numbers() -> None:
    shape, ids = (12, 11, 10), {1: 3, 2: 997, 3: 614_454_277, 4: 4_000_000_000}
    draw = np.random.default_rng(3)
    small = [draw.integers(0, 5, shape).astype(np.uint8) for _ in range(2)]
    large = [np.vectorize({0: 0, **ids}.get, otypes=[np.uint32])(labels) for labels in small]
    by_id = compare(*large, AFFINE, [*ids.values(), 900, (997, 614_454_277)])
    by_number = compare(*small, AFFINE, [*ids, 9, (2, 3)])
    assert list(by_id.values()) == list(by_number.values())
    # A prediction may hold none of them.
    empty = np.zeros(shape, np.uint8)
    assert compare(empty, large[1], AFFINE, [4_000_000_000])[4_000_000_000].outcome == "missed"


def test_empty_maps_follow_the_rule() -> None:
    something, nothing = box((10, 20, 30), (2, 2, 2), (5, 5, 5)), np.zeros((10, 20, 30), np.uint8)
    diagonal = math.sqrt((10 * 0.8) ** 2 + (20 * 1.3) ** 2 + (30 * 2.5) ** 2)
    both = compare(nothing, nothing, AFFINE, [1])[1]
    assert both.outcome == "absent"
    assert both.dice is both.iou is both.hd95_mm is both.assd_mm is both.surface_dice is None
    missed, invented = (
        compare(nothing, something, AFFINE, [1])[1],
        compare(something, nothing, AFFINE, [1])[1],
    )
    for scores, outcome in ((missed, "missed"), (invented, "invented")):
        assert scores.outcome == outcome
        assert (scores.dice, scores.iou, scores.surface_dice) == (0, 0, 0)
        assert scores.hd95_mm == scores.assd_mm == pytest.approx(diagonal)
    assert missed.volume_difference_percent == pytest.approx(-100)
    assert invented.volume_difference_percent is None


def test_the_diagonal_of_a_sheared_grid_is_its_longest() -> None:
    linear = np.array([[1.0, 0.9, 0], [0, 1, 0], [0, 0, 1]])
    assert diagonal_mm((10, 10, 1), linear) == pytest.approx(math.hypot(19, 10, 1))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_voxels_as_surfaces_differ_from_ours_by_less_than_a_voxel() -> None:
    """MONAI takes the voxels at the edge as the surface, ours lies between the voxels."""
    pytest.importorskip("monai")
    import torch
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
        compute_iou,
    )

    linear = np.diag(SPACING)
    one = ball((50, 40, 24), (20, 25, 30), 15, linear)
    other = ball((50, 40, 24), (23, 26, 28), 14, linear)
    ours = compare(one, other, AFFINE, [1])[1]
    pair = [torch.from_numpy(m)[None, None].float() for m in (one, other)]
    assert ours.dice == pytest.approx(float(compute_dice(*pair)))
    assert ours.iou == pytest.approx(float(compute_iou(*pair)))
    distance = compute_hausdorff_distance(*pair, percentile=95, spacing=SPACING)
    assert ours.hd95_mm == pytest.approx(float(distance), abs=max(SPACING))
    average = compute_average_surface_distance(*pair, symmetric=True, spacing=SPACING)
    assert ours.assd_mm == pytest.approx(float(average), abs=0.25)


def test_wrong_arguments_are_refused_with_a_reason() -> None:
    one = np.zeros((4, 4, 4), np.uint8)
    with pytest.raises(SettingsError, match="tolerance"):
        compare(one, one, AFFINE, [1], tolerance_mm=-1)
    with pytest.raises(SettingsError, match="0 is background"):
        compare(one, one, AFFINE, [0, 1])
    with pytest.raises(VolumeError, match="not invertible"):
        compare(one, one, np.zeros((4, 4)), [1])
    with pytest.raises((VolumeError, TypeCheckError)):
        compare(one, np.zeros((4, 4, 5), np.uint8), AFFINE, [1])

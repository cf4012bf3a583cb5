"""One scan, stored in any voxel order and placed anywhere: the same structure at the same place in the world."""

from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny

from ossnet.data.preparation import FitWarning
from ossnet.errors import SettingsError
from ossnet.field.field import Field
from ossnet.field.grid import Grid
from ossnet.field.model import Model
from ossnet.files.reading import read_labels, read_volume
from ossnet.volume import (
    LabelMap,
    Orientation,
    Volume,
    closest_canonical,
    largest_corner_gap,
)

ORIENTATIONS = [
    Orientation((a, b, c), (f, g, h))
    for (a, b, c), (f, g, h) in product(permutations(range(3)), product((False, True), repeat=3))
]
SOME = ORIENTATIONS[5::11]
PLACE = np.array([[0.9, 0.2, -0.1, 12], [-0.3, 1.4, 0.2, -40], [0.1, 0.1, 2.2, 7], [0, 0, 0, 1]])
"""Oblique and sheared, voxels of about 1 × 1.4 × 2.2 mm."""


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    pytest.importorskip("monai")
    return {family: tiny.model(family, 3 if family == "multiscale" else 1) for family in tiny.FAMILIES}


def canonical(labels: LabelMap) -> LabelMap:
    return labels.reoriented(closest_canonical(labels.affine))


def assert_same(one: LabelMap, other: LabelMap) -> None:
    """The same label at every place of the world."""
    one, other = canonical(one), canonical(other)
    assert one.shape == other.shape
    assert largest_corner_gap(one.affine, other.affine, one.shape) < 1e-4
    np.testing.assert_array_equal(one.data, other.data)


def stored(volume: Volume, orientation: Orientation) -> Volume:
    """As another scanner would have written it: its own memory, in its own order."""
    moved = volume.reoriented(orientation)
    return Volume(np.ascontiguousarray(moved.data), moved.affine)


def bound(model: Model, volume: Volume) -> Field:
    return model.field(volume, device="cpu", precision="fp32")


def test_there_are_48() -> None:
    assert len({o.matrix((1, 1, 1))[:3, :3].tobytes() for o in ORIENTATIONS}) == 48


def test_every_orientation(models: dict[str, Model]) -> None:
    scan = tiny.scan((10, 9, 7), affine=PLACE)
    first = bound(models["multiscale"], scan).segment()
    assert len(np.unique(first.data)) == 3
    for orientation in ORIENTATIONS:
        found = bound(models["multiscale"], stored(scan, orientation)).segment()
        assert_same(found, first)


FITS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "spacing": {"fit": "spacing", "spacing": (1.3, 1.0, 1.7)},
    "resize": {"fit": "resize", "shape": (32, 32, 32)},
    "pad": {"fit": "pad", "shape": (32, 32, 32)},
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("fit", FITS)
def test_every_family_and_fit(models: dict[str, Model], family: str, fit: str) -> None:
    if family == "C" and fit in ("as it is", "spacing"):
        pytest.skip("the paper's variants work on one shape")
    trained = models[family]
    model = Model(
        trained.network,
        trained.preparation.model_copy(update={"shape": None, "fit": "none", **FITS[fit]}),
        trained.label_names,
        metadata=trained.metadata,
    )
    scan = tiny.scan((14, 12, 9), affine=PLACE)
    first = bound(model, scan).segment()
    assert first.data.any()
    for orientation in SOME:
        assert_same(bound(model, stored(scan, orientation)).segment(), first)


@pytest.mark.parametrize("family", ["multiscale", "C"])
def test_other_grids(models: dict[str, Model], family: str) -> None:
    """A grid of another spacing or shape, and that of another scan, itself stored in any order."""
    scan = tiny.scan(affine=PLACE)
    turned = np.array([[0.95, 0.3, 0, 0], [-0.3, 0.95, 0, 0], [0, 0.1, 1, 0], [0, 0, 0, 1.0]])
    like = tiny.scan((11, 13, 9), affine=turned @ PLACE @ np.diag([1.2, 0.9, 0.8, 1]))
    field = bound(models[family], scan)
    wanted = {
        "spacing": field.segment(spacing=1.6),
        "triple": field.segment(spacing=(1.0, 1.3, 2.0)),
        "shape": field.segment(shape=(9, 15, 7)),
        "like": field.segment(like=like),
    }
    assert all(labels.data.any() for labels in wanted.values())
    for orientation in SOME:
        other = bound(models[family], stored(scan, orientation))
        axes = orientation.axes
        triple = [(1.0, 1.3, 2.0)[a] for a in axes]
        shape = [(9, 15, 7)[a] for a in axes]
        assert_same(other.segment(spacing=1.6), wanted["spacing"])
        assert_same(other.segment(spacing=(triple[0], triple[1], triple[2])), wanted["triple"])
        assert_same(other.segment(shape=(shape[0], shape[1], shape[2])), wanted["shape"])
        found = other.segment(like=stored(like, orientation))
        assert_same(found, wanted["like"])
        assert found.shape == stored(like, orientation).shape
        np.testing.assert_allclose(found.affine, stored(like, orientation).affine)


def test_the_own_grid_given_as_another(models: dict[str, Model]) -> None:
    """`like` the scan itself is the plain answer, even where headers were rounded to float32."""
    scan = tiny.scan(affine=PLACE)
    first = bound(models["multiscale"], scan).segment()
    for orientation in SOME:
        like = stored(scan, orientation)
        rounded = Volume(like.data, like.affine.astype(np.float32).astype(float))
        assert_same(bound(models["multiscale"], scan).segment(like=rounded), first)


def test_regions(models: dict[str, Model]) -> None:
    """A box of the stored grid: the same part of the same answer, at its place."""
    scan = tiny.scan(affine=PLACE)
    box = np.array([[3, 2, 1], [11, 9, 8]])
    first = bound(models["multiscale"], scan).segment().data
    wanted = first[3:11, 2:9, 1:8]
    for orientation in SOME:
        other = stored(scan, orientation)
        matrix = np.linalg.inv(orientation.matrix(scan.shape))
        corners = (box - [[0] * 3, [1] * 3]) @ matrix[:3, :3].T + matrix[:3, 3]
        low, high = np.rint(corners.min(0)).astype(int), np.rint(corners.max(0)).astype(int) + 1
        region = tuple(map(int, low)), tuple(map(int, high))
        for strategy in ("octree", "dense"):
            found = bound(models["multiscale"], other).segment(region=region, strategy=strategy)  # type: ignore[arg-type]
            np.testing.assert_array_equal(found.data, orientation.apply(wanted))
            start = found.to_world(np.zeros((1, 3)))
            np.testing.assert_allclose(start, other.to_world(np.array([low], dtype=float)), atol=1e-9)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_points_of_the_world(models: dict[str, Model], family: str) -> None:
    scan = tiny.scan(affine=PLACE)
    rng = np.random.default_rng(0)
    voxels = rng.uniform(-0.5, np.array(scan.shape) - 0.5, (200, 3))
    points = scan.to_world(voxels)
    first = bound(models[family], scan)
    wanted = first.probability(points, space="world")
    np.testing.assert_allclose(first.probability(voxels), wanted, atol=2e-5)
    for orientation in SOME:
        other = stored(scan, orientation)
        found = bound(models[family], other)
        np.testing.assert_allclose(found.probability(points, space="world"), wanted, atol=2e-5)
        np.testing.assert_allclose(found.probability(other.to_voxel(points)), wanted, atol=2e-5)


def test_probability_maps(models: dict[str, Model]) -> None:
    scan = tiny.scan(affine=PLACE)
    for family in ("multiscale", "C"):
        wanted = bound(models[family], scan).probability_map()
        for orientation in SOME:
            found = bound(models[family], stored(scan, orientation)).probability_map()
            np.testing.assert_array_equal(found.data, orientation.apply(wanted.data))


def test_meshes_take_labels_in_any_voxel_order(models: dict[str, Model]) -> None:
    """A map that was edited elsewhere may be stored in another order, also one of equal shape."""
    field = bound(models["multiscale"], tiny.scan((12, 12, 12), affine=PLACE))
    labels = field.segment()
    expected = field.mesh(labels=labels)
    for orientation in SOME:
        moved = labels.reoriented(orientation)
        found = field.mesh(labels=LabelMap(np.ascontiguousarray(moved.data), moved.affine))
        np.testing.assert_allclose(found.vertices, expected.vertices, atol=1e-6)
    elsewhere = PLACE.copy()
    elsewhere[0, 3] += 1
    with pytest.raises(SettingsError, match="do not lie on the scan: corner voxels"):
        field.mesh(labels=LabelMap(labels.data, elsewhere))


def test_too_large_scans_are_resized_the_same_way(models: dict[str, Model]) -> None:
    scan = tiny.scan((40, 12, 9), affine=PLACE)
    with pytest.warns(FitWarning):
        first = bound(models["C"], scan).segment()
    with pytest.warns(FitWarning):
        assert_same(bound(models["C"], stored(scan, ORIENTATIONS[37])).segment(), first)


def test_through_files(models: dict[str, Model], tmp_path: Path) -> None:
    """NIfTI keeps affines in float32."""
    scan = tiny.scan(affine=PLACE)
    scan.save(tmp_path / "first.nii.gz")
    first = bound(models["multiscale"], read_volume(tmp_path / "first.nii.gz")).segment()
    first.save(tmp_path / "first_seg.nii.gz")
    for number, orientation in enumerate(SOME):
        stored(scan, orientation).save(tmp_path / f"{number}.nii")
        bound(models["multiscale"], read_volume(tmp_path / f"{number}.nii")).segment().save(
            tmp_path / f"{number}_seg.nii"
        )
        assert_same(read_labels(tmp_path / f"{number}_seg.nii"), read_labels(tmp_path / "first_seg.nii.gz"))


@st.composite
def affines(draw: Any) -> np.ndarray:
    """Any rotation, voxels of 0.3 to 5 mm, some shear."""
    numbers = st.floats(-1, 1, allow_subnormal=False)
    q = np.array([draw(numbers) for _ in range(4)]) + np.array([1e-3, 0, 0, 0])
    w, x, y, z = q / np.linalg.norm(q)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    shear = np.eye(3)
    shear[0, 1], shear[0, 2], shear[1, 2] = (0.4 * draw(numbers) for _ in range(3))
    out = np.eye(4)
    out[:3, :3] = rotation @ shear @ np.diag([draw(st.floats(0.3, 5)) for _ in range(3)])
    out[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    return out


@settings(max_examples=15)
@given(affines(), st.sampled_from(ORIENTATIONS))
def test_any_affine(models: dict[str, Model], affine: np.ndarray, orientation: Orientation) -> None:
    scan = tiny.scan((10, 9, 7), affine=affine)
    other = stored(scan, orientation)
    one, two = bound(models["multiscale"], scan), bound(models["multiscale"], other)
    assert_same(one.segment(), two.segment())
    points = scan.to_world(np.array([[1.25, 2.5, 3.0], [8.75, 0.0, 5.5]]))
    np.testing.assert_allclose(
        one.probability(points, space="world"), two.probability(points, space="world"), atol=1e-4
    )


@settings(max_examples=200)
@given(affines(), st.sampled_from(ORIENTATIONS))
def test_the_canonical_order_does_not_depend_on_the_stored_one(
    affine: np.ndarray, orientation: Orientation
) -> None:
    shape = (4, 5, 6)
    one = affine @ closest_canonical(affine).matrix(shape)
    moved = affine @ orientation.matrix(shape)
    new_shape = tuple(shape[a] for a in orientation.axes)
    other = moved @ closest_canonical(moved).matrix(new_shape)  # type: ignore[arg-type]
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("plane", [(0, 1), (0, 2), (1, 2)])
def test_ties_at_45_degrees(plane: tuple[int, int]) -> None:
    """No axis is nearer than another: whichever is taken must not depend on the stored order."""
    affine = np.eye(4)
    a, b = plane
    affine[a, a] = affine[b, b] = affine[a, b] = np.sqrt(0.5)
    affine[b, a] = -np.sqrt(0.5)
    shape = (4, 5, 6)
    wanted = affine @ closest_canonical(affine).matrix(shape)
    for orientation in ORIENTATIONS:
        moved = affine @ orientation.matrix(shape)
        new_shape = tuple(shape[i] for i in orientation.axes)
        found = moved @ closest_canonical(moved).matrix(new_shape)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_moving_a_scan_moves_the_answer(models: dict[str, Model]) -> None:
    """The voxels alone decide what is seen; the affine decides where it is."""
    angle = np.deg2rad(25)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[:3, 3] = [30, -20, 5]
    one, other = tiny.scan(), tiny.scan(affine=turn)
    here, there = bound(models["multiscale"], one), bound(models["multiscale"], other)
    np.testing.assert_array_equal(here.segment().data, there.segment().data)
    points = one.to_world(np.random.default_rng(1).uniform(0, 9, (50, 3)))
    moved = points @ turn[:3, :3].T + turn[:3, 3]
    np.testing.assert_allclose(
        here.probability(points, space="world"), there.probability(moved, space="world"), atol=2e-5
    )


def test_grids_over_the_same_extent_share_a_prediction() -> None:
    base = Grid((20, 30, 12), PLACE)
    assert base.spans(base)
    assert Grid.with_shape(base, (41, 60, 7)).spans(base)
    assert Grid.with_spacing(base, 0.7).spans(base)
    shifted, turned = np.eye(4), np.eye(4)[[1, 0, 2, 3]]
    shifted[0, 3] = 2
    assert not Grid((20, 30, 12), PLACE @ shifted).spans(base)
    assert not Grid((30, 20, 12), PLACE @ turned).spans(base)
    assert not Grid((20, 30, 10), PLACE).spans(base)

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from tests.data.balls import AS_SCANNED, ISO, as_is, ball

from ossnet.data.crop_locations import surface_voxels, targets_at
from ossnet.data.crops import CropSettings, CropSource
from ossnet.data.examples import example

SEEDS = st.integers(0, 10_000)
ZOOMS = st.sampled_from([(1.0, 1.0, 1.0), (0.5, 0.5, 1.0), (1.3, 1.0, 0.8)])


@settings(max_examples=25)
@given(seed=SEEDS, zoom=ZOOMS, classes=st.sampled_from([1, 3]))
def test_examples_are_complete_and_pure(seed: int, zoom: tuple[float, float, float], classes: int) -> None:
    source = ball(classes=classes, zoom=zoom)
    one = example(source, ISO, np.random.default_rng(seed))
    two = example(source, ISO, np.random.default_rng(seed))
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
        assert value.dtype == torch.float32
    assert one["image"].shape == (3, *ISO.crop)
    assert one["locations"].shape == (300, 3)
    assert one["targets"].shape == ((300,) if classes == 1 else (300, 3))
    assert one["coarse"].shape == (classes, 4, 6, 4)
    assert one["weights"].shape == (4, 6, 4)
    assert bool((one["locations"] >= -0.5).all())
    assert bool((one["locations"] <= torch.tensor(ISO.crop) - 0.5).all())
    if classes > 1:
        assert torch.allclose(one["targets"].sum(-1), torch.ones(300), atol=1e-5)


def test_half_of_the_locations_are_near_the_surface_and_of_both_kinds() -> None:
    source = ball()
    plan = replace(AS_SCANNED, crop=(32, 32, 24), jitter=(1.0,))
    made = example(source, plan, np.random.default_rng(0))
    inside = float(made["targets"].mean())
    assert 0.2 < inside < 0.6
    # Without augmentation the image says where each voxel of the crop lies.
    corner = made["image"][:, 0, 0, 0]
    distance = (made["locations"] + corner - (torch.tensor(source.shape) - 1) / 2).norm(dim=1)
    near = (distance - 8).abs() < 3
    assert float(near.float().mean()) > 0.5


def test_soft_targets_interpolate_and_hard_ones_do_not() -> None:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[2:] = 1
    source = CropSource(labels[None].astype(np.float32), labels, 1, surface_voxels(labels, 1), as_is)
    points = np.array([[1.25, 1, 1], [1.75, 2, 2], [9, 0, 0]], np.float32)
    np.testing.assert_allclose(targets_at(source, points, soft=True), [0.25, 0.75, 1])
    np.testing.assert_allclose(targets_at(source, points, soft=False), [0, 1, 1])
    several = replace(source, classes=2)
    np.testing.assert_allclose(targets_at(several, points, soft=True)[0], [0.75, 0.25])


def test_surfaces_are_both_sides() -> None:
    labels = np.zeros((7, 7, 7), np.uint8)
    labels[1:6, 1:6, 1:6] = 1
    labels[3, 3, 3] = 2
    both = (5**3 - 3**3) + 6 * 5**2
    one, two = surface_voxels(labels, 3)
    assert len(one) == both + 7
    assert len(two) == 7
    assert [3, 3, 3] in two.tolist()
    assert len(surface_voxels(labels, 1)[0]) == both
    assert [len(s) for s in surface_voxels(np.zeros((3, 3, 3), np.uint8), 3)] == [0, 0]


def test_locations_near_a_flat_surface_are_inside_half_of_the_time() -> None:
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[:20] = 1
    source = CropSource(labels[None].astype(np.float32), labels, 1, surface_voxels(labels, 1), as_is)
    plan = replace(AS_SCANNED, crop=(32, 32, 32), locations=4000, near_surface=1.0, jitter=(1.0,))
    targets = [example(source, plan, np.random.default_rng(s))["targets"].mean() for s in range(5)]
    assert float(torch.stack(targets).mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("spatial", [0.0, 1.0])
def test_weights_undo_the_crowd_near_surfaces(classes: int, spatial: float) -> None:
    """Whatever is averaged over the locations has the mean of the voxels, although half of them are near surfaces."""
    source = ball(classes=classes)
    plan = replace(ISO, crop=(28, 32, 24), locations=2000, spatial=spatial, intensity=0.0)
    weighted, plain, volume = [], [], []
    for seed in range(40):
        made = example(source, plan, np.random.default_rng(seed))
        targets, weights = made["targets"].reshape(2000, -1)[:, -1], made["importance"]
        assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
        weighted.append(float((targets * weights).mean()))
        plain.append(float(targets.mean()))
        even = example(source, replace(plan, near_surface=0.0), np.random.default_rng(seed))
        assert bool((even["importance"] == 1).all())
        volume.append(float(even["targets"].reshape(2000, -1)[:, -1].mean()))
    truth = float(np.mean(volume))
    assert float(np.mean(weighted)) == pytest.approx(truth, rel=0.1)
    assert float(np.mean(plain)) > 2 * truth
    off = example(source, replace(plan, importance=0.0), np.random.default_rng(0))
    assert bool((off["importance"] == 1).all())


@pytest.mark.parametrize("spatial", [0.0, 1.0])
def test_half_of_the_locations_are_voxels_as_in_use(spatial: float) -> None:
    """Of scans on the network's grid; where one axis is resampled, along the others."""
    plan = replace(ISO, crop=(28, 32, 24), locations=2000, spatial=spatial)
    for near_surface in (0.0, 1.0):
        asked = replace(plan, near_surface=near_surface)
        for zoom in ((1.0, 1.0, 1.0), (1.0, 1.3, 1.0)):
            locations = example(ball(zoom=zoom), asked, np.random.default_rng(0))["locations"]
            share = (locations == locations.round()).double().mean(dim=0)
            assert share.tolist() == pytest.approx([0.5 if z == 1 else 0 for z in zoom], abs=0.05)
    anywhere = example(ball(), replace(plan, on_voxels=0.0), np.random.default_rng(0))["locations"]
    assert float((anywhere == anywhere.round()).double().mean()) < 0.01


def test_planes_at_the_faces_of_a_crop_count_as_all_others() -> None:
    """Locations that lie beyond it are drawn again, and not moved to its last voxels."""
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[:20] = 1
    source = CropSource(labels[None].astype(np.float32), labels, 1, surface_voxels(labels, 1), as_is)
    plan = replace(AS_SCANNED, crop=(16, 16, 16), locations=4000)
    counted = np.zeros((3, 16))
    for seed in range(40):
        made = example(source, plan, np.random.default_rng(seed))
        voxels = np.floor(made["locations"].numpy() + 0.5).clip(max=15).astype(int)
        for axis in range(3):
            counted[axis] += np.bincount(voxels[:, axis], made["importance"].numpy(), 16) / 4000 / 40
    np.testing.assert_allclose(counted[1:], 1 / 16, rtol=0.12)


def test_across_thick_slices_locations_near_a_surface_lie_as_near_in_mm() -> None:
    labels = np.zeros((64, 64, 9), np.uint8)
    labels[32, 32, 4] = 1
    source = CropSource(labels[None].astype(np.float32), labels, 1, [np.array([[32, 32, 4]])], as_is)
    plan = CropSettings((64, 64, 9), (1.5, 1.5, 10.0), spatial=0.0, intensity=0.0, near_surface=1.0)
    for jitter in (1.0, 4.0):
        still = replace(plan, jitter=(jitter,), on_voxels=0.0)
        made = example(source, still, np.random.default_rng(0))
        spread = (made["locations"] * torch.tensor(plan.spacing)).std(dim=0)
        assert spread.tolist() == pytest.approx([1.5 * jitter] * 3, rel=0.05)


def test_across_thick_slices_weights_are_right() -> None:
    """A ball of 30 mm in slices of 10 mm."""
    mm, shape = np.array([1.5, 1.5, 10.0]), (64, 64, 9)
    grid = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij"), axis=-1)
    labels = (np.linalg.norm(grid * mm, axis=-1) < 30).astype(np.uint8)
    signed = distance_transform_edt(labels, mm) - distance_transform_edt(1 - labels, mm)
    source = CropSource(labels[None].astype(np.float32), labels, 1, surface_voxels(labels, 1), as_is)
    plan = CropSettings(shape, (1.5, 1.5, 10.0), spatial=0.0, intensity=0.0)
    edges = np.array([-100, -12, -6, -3, 0, 3, 6, 12, 100])
    found = np.zeros(len(edges) - 1)
    for seed in range(60):
        made = example(source, plan, np.random.default_rng(seed))
        x, y, z = np.floor(made["locations"].numpy() + 0.5).astype(int).T
        found += np.histogram(signed[x, y, z], edges, weights=made["importance"].numpy())[0]
    voxels = np.histogram(signed, edges)[0]
    np.testing.assert_allclose(found / found.sum(), voxels / voxels.sum(), rtol=0.08)


def test_a_scan_without_the_structure_and_one_of_a_single_slice() -> None:
    empty = np.zeros((20, 5, 1), np.int16)
    source = CropSource(empty[None], empty.astype(np.uint8), 1, surface_voxels(empty, 1), as_is)
    made = example(source, ISO, np.random.default_rng(3))
    assert float(made["targets"].sum()) == 0
    assert made["locations"].shape == (300, 3)
    assert bool(torch.isfinite(made["image"]).all())


@settings(max_examples=25)
@given(seed=SEEDS, zoom=ZOOMS)
def test_places_are_those_of_the_scan_or_of_its_mirror_image(
    seed: int, zoom: tuple[float, float, float]
) -> None:
    """The image of the ball says where its voxels lie."""
    source = ball(zoom=zoom)
    plan = replace(AS_SCANNED, position=True, jitter=(1.0,))
    plain = example(source, plan, np.random.default_rng(seed))
    mirrored = example(source, replace(plan, flips=(0, 1, 2)), np.random.default_rng(seed))
    size = torch.tensor(source.shape)
    for made in (plain, mirrored):
        assert made["places"].shape == (300, 3)
        assert made["shape"].tolist() == list(source.shape)
        image, places = made["image"], made["locations"]
        inner = ((places > 0) & (places < torch.tensor(plan.crop) - 1)).all(dim=1)
        index = places[inner].round().long()
        shown = image[:, index[:, 0], index[:, 1], index[:, 2]].T - (size - 1) / 2
        scan = made["places"][inner] - (size - 1) / 2
        # Coordinates rise through a crop as they do in its image, or both are mirrored.
        direction = torch.sign(image[:, -1, -1, -1] - image[:, 0, 0, 0])
        close = (scan - direction * shown).abs() <= 0.51 / torch.tensor(zoom) + 1e-3
        assert bool(close.all())
    assert "places" not in example(source, replace(plan, position=False), np.random.default_rng(seed))


def test_a_single_slice_in_a_thick_crop_is_asked_about() -> None:
    labels = np.zeros((50, 1, 40), np.uint8)
    labels[10:30, :, 10:30] = 1
    source = CropSource(labels[None].astype(np.float32), labels, 1, surface_voxels(labels, 1), as_is)
    for seed in range(20):
        made = example(source, replace(ISO, crop=(32, 64, 32), spatial=1.0), np.random.default_rng(seed))
        assert made["locations"].shape == (300, 3)
        assert 0 < float(made["targets"].mean()) < 1


def test_little_of_a_structure_keeps_a_part_of_the_weight() -> None:
    """Otherwise answering background everywhere would be no mistake to speak of."""
    labels = np.zeros((96, 96, 96), np.uint8)
    labels[46:49, 46:49, 46:49] = 1
    source = CropSource(labels[None].astype(np.float32), labels, 1, surface_voxels(labels, 1), as_is)
    plan = replace(ISO, crop=(96, 96, 96), locations=2000, spatial=0.0, centred=1.0)

    def near(settings: CropSettings) -> float:
        made = example(source, settings, np.random.default_rng(0))
        assert float(made["importance"].mean()) == pytest.approx(1, abs=1e-4)
        return float(made["importance"][:1000].sum() / made["importance"].sum())

    assert near(replace(plan, least_near=0.0)) < 0.05
    assert near(plan) == pytest.approx(plan.least_near, abs=0.03)
    assert near(replace(plan, importance=0.0)) == pytest.approx(0.5)


def test_a_small_structure_in_a_large_one_keeps_a_part_of_the_weight() -> None:
    """A tumour in a liver: the liver's surface does not stand for it."""
    grid = np.stack(np.meshgrid(*[np.arange(96) - 47.5] * 3, indexing="ij"))
    labels = (np.sqrt((grid**2).sum(axis=0)) < 36).astype(np.uint8)
    labels[46:49, 46:49, 46:49] = 2
    source = CropSource(labels[None].astype(np.float32), labels, 3, surface_voxels(labels, 3), as_is)
    plan = replace(ISO, crop=(96, 96, 96), locations=4000, spatial=0.0)

    def shares(settings: CropSettings) -> tuple[float, float]:
        made = example(source, settings, np.random.default_rng(0))
        distance = (made["locations"] - 47).norm(dim=1)
        weights = made["importance"] / made["importance"].sum()
        return float(weights[distance < 10].sum()), float(weights[(distance - 36).abs() < 6].sum())

    plain, kept = shares(replace(plan, least_near=0.0)), shares(plan)
    assert plain[0] < 0.03
    assert kept[0] == pytest.approx(plan.least_near / 2, abs=0.03)
    # The large one has what is left, in proportion.
    assert kept[1] == pytest.approx(plain[1] * (1 - plan.least_near / 2), abs=0.03)

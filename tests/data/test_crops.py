from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float, Num
from torch import Tensor

from ossnet.data.crops import (
    CropSettings,
    CropSource,
    blur,
    change_intensities,
    cut,
    draw_map,
    example,
    gamma,
    low_resolution,
    surface_voxels,
    targets_at,
    to_grid,
    to_scan,
    without_augmentation,
)

ISO = CropSettings((16, 24, 16), (1.0, 1.0, 1.0), locations=300, strides=(4, 4, 4), elastic=2.0)


def as_is(part: Num[np.ndarray, "C X Y Z"]) -> Float[Tensor, "C X Y Z"]:
    return torch.from_numpy(part.astype(np.float32))


def ball(
    shape: tuple[int, int, int] = (30, 34, 26),
    classes: int = 1,
    zoom: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> CropSource:
    """A ball; the image holds the coordinates of its voxels, so that it says where it was read."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(np.float32)
    centre = (np.array(shape) - 1) / 2
    distance = np.linalg.norm(grid - centre[:, None, None, None], axis=0)
    labels = (distance < 8).astype(np.uint8)
    if classes > 1:
        labels += (distance < 5).astype(np.uint8)
    return CropSource(grid, labels, classes, surface_voxels(labels, classes), as_is, zoom)


SEEDS = st.integers(0, 10_000)
ZOOMS = st.sampled_from([(1.0, 1.0, 1.0), (0.5, 0.5, 1.0), (1.3, 1.0, 0.8)])


@settings(deadline=None, max_examples=25)
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


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS)
def test_the_map_is_inverted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mapping = draw_map(ball(), replace(ISO, crop=(64, 64, 64), spacing=(1.0, 1.0, 1.5)), rng)
    points = (rng.random((50, 3)) * 60).astype(np.float32)
    np.testing.assert_allclose(mapping.inverse(mapping(points), steps=12), points, atol=0.05)


def test_rotations_keep_distances_in_mm() -> None:
    plan = replace(ISO, spacing=(1.0, 1.5, 1.0), scaling=0.0, scaling_across=0.0, elastic=0.0, spatial=1.0)
    mm = np.array(plan.spacing)
    for seed in range(10):
        mapping = draw_map(ball(), plan, np.random.default_rng(seed))
        points = np.random.default_rng(0).random((2, 3)).astype(np.float32) * 10
        before = np.linalg.norm((points[1] - points[0]) * mm)
        after = np.linalg.norm(np.subtract(*mapping(points)) * mm)
        assert after == pytest.approx(before, rel=1e-3)


def test_distant_slices_are_not_rotated_into_each_other() -> None:
    plan = replace(ISO, spacing=(1.5, 10.0, 1.5), spatial=1.0)
    for seed in range(10):
        assert draw_map(ball(), plan, np.random.default_rng(seed)).axes == (0, 2)


@settings(deadline=None, max_examples=25)
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
    plan = replace(without_augmentation(ISO), crop=(32, 32, 24), jitter=(1.0,))
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
    plan = replace(
        without_augmentation(ISO), crop=(32, 32, 32), locations=4000, near_surface=1.0, jitter=(1.0,)
    )
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


def test_a_scan_without_the_structure_and_one_of_a_single_slice() -> None:
    empty = np.zeros((20, 5, 1), np.int16)
    source = CropSource(empty[None], empty.astype(np.uint8), 1, surface_voxels(empty, 1), as_is)
    made = example(source, ISO, np.random.default_rng(3))
    assert float(made["targets"].sum()) == 0
    assert made["locations"].shape == (300, 3)
    assert bool(torch.isfinite(made["image"]).all())


def test_intensity_changes() -> None:
    image = torch.randn(2, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        change_intensities(image, replace(ISO, intensity=0.0), np.random.default_rng(0)), image
    )
    always = replace(ISO, intensity=10.0)
    changed = change_intensities(image, always, np.random.default_rng(0))
    assert changed.shape == image.shape
    assert bool(torch.isfinite(changed).all())
    assert not torch.equal(changed, image)
    # Slices far apart stay as they are under blur and low resolution.
    flat = torch.arange(12.0).expand(1, 12, 12, 12)
    sigma = (0.8, 0.8, 0.0)
    assert torch.allclose(blur(flat, sigma), flat, atol=1e-5)
    assert torch.allclose(low_resolution(flat, (0.5, 0.5, 1.0)), flat)


def test_blur_keeps_the_mean_and_lowers_the_variance() -> None:
    image = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    out = blur(image, (1.0, 1.0, 1.0))
    assert float(out.mean()) == pytest.approx(float(image.mean()), abs=0.02)
    assert float(out.std()) < 0.5 * float(image.std())


def test_gamma_keeps_mean_and_deviation() -> None:
    image = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 2
    for invert in (False, True):
        out = gamma(image, 1.6, invert)
        assert float(out.mean()) == pytest.approx(float(image.mean()), abs=1e-3)
        assert float(out.std()) == pytest.approx(float(image.std()), abs=1e-3)
    constant = torch.ones(2, 2, 2)
    assert torch.equal(gamma(constant, 2.0, False), constant)


def test_grid_and_scan_coordinates_invert_each_other() -> None:
    points = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    np.testing.assert_allclose(to_grid(to_scan(points, (2.0, 0.5, 1.1)), (2.0, 0.5, 1.1)), points, atol=1e-5)

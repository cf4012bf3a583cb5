"""Locations, bands and labels (SPEC §3)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ossnet.data.augment import apply_intensity, draw
from ossnet.data.preparation import Fit
from ossnet.data.sampling import (
    border_locations,
    border_voxels,
    euclidean_border,
    labels_at,
    low_res_labels,
    released_border,
    sample_locations,
    uniform_locations,
)
from ossnet.volume import Shape, flipped

FIXTURES = Path(__file__).parents[1] / "fixtures" / "released_weights"
CASES = {"brats": (48, 32, 32), "lits": (64, 64, 32)}


def reference(name: str) -> tuple[dict[str, np.ndarray], Fit]:
    case = dict(np.load(FIXTURES / f"data_{name}.npz"))
    shape = case["raw_label"].shape
    return case, Fit.pad(shape, CASES[name]) if name == "brats" else Fit.resize(shape, CASES[name])


@pytest.mark.parametrize("name", list(CASES))
def test_reference_cases(name: str) -> None:
    case, fit = reference(name)
    assert (released_border(case["raw_label"] > 0) == case["raw_border"]).all()
    found = labels_at((case["raw_label"] > 0).astype(np.uint8), fit, case["sampled_locations"])
    assert (found == case["sampled_labels"][:, 0]).all()
    grid = case["low_res_label"].shape[1:]
    assert (low_res_labels(case["raw_label"], fit, grid, 1) == case["low_res_label"]).all()


@pytest.mark.parametrize("grid", [(4, 2, 3), (3, 5, 2)])
@pytest.mark.parametrize(
    ("way", "source"), [(Fit.pad, (7, 4, 6)), (Fit.resize, (7, 4, 6)), (Fit.resize, (20, 11, 13))]
)
def test_cells_hold_what_an_adaptive_max_pool_finds(
    way: Callable[[Shape, Shape], Fit], source: Shape, grid: Shape
) -> None:
    rng = np.random.default_rng(0)
    labels = ((rng.random(source) < 0.05) * rng.integers(1, 4, source)).astype(np.uint8)
    fit = way(source, (8, 6, 12))
    fitted = fit.labels(torch.from_numpy(labels))
    for classes, kinds in ((1, [fitted > 0]), (4, [fitted == k for k in (1, 2, 3)])):
        expected = torch.stack(
            [torch.nn.functional.adaptive_max_pool3d(k[None].float(), grid)[0] for k in kinds]
        )
        assert np.array_equal(low_res_labels(labels, fit, grid, classes), expected.numpy())


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("flips", [(False, False, False), (True, False, False), (True, True, False)])
def test_band_locations_lie_in_the_band(name: str, flips: tuple[bool, bool, bool]) -> None:
    case, fit = reference(name)
    border = border_voxels(case["raw_label"], (1.0, 1.0, 1.0), 1)
    fitted = fit.labels(torch.from_numpy(flipped(case["raw_border"], flips).astype(np.uint8))).numpy()
    found = border_locations(np.random.default_rng(0), border[0], fit, 400, flips)
    assert fitted[tuple(found.T)].all()
    assert len(np.unique(found, axis=0)) == 400


@pytest.mark.parametrize("resize", [False, True])
def test_a_small_band_is_taken_whole(resize: bool) -> None:
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[4, 4, 4] = 1
    fit = Fit.resize((8, 8, 8), (16, 16, 16)) if resize else Fit.pad((8, 8, 8), (10, 8, 8))
    voxels = np.flatnonzero(mask).astype(np.int32)
    found = border_locations(np.random.default_rng(0), voxels, fit, 100)
    assert len(found) == (8 if resize else 1)
    everything = sample_locations(np.random.default_rng(0), fit, 100, [voxels])
    assert everything.shape == (100, 3)


@settings(max_examples=40)
@given(
    target=st.tuples(*[st.integers(2, 20)] * 3),
    wanted=st.integers(1, 400),
    flips=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 2**31),
    centred=st.booleans(),
)
def test_a_resized_band_is_drawn_from_without_repeats(
    target: tuple[int, int, int], wanted: int, flips: tuple[bool, bool, bool], seed: int, centred: bool
) -> None:
    """All that was wanted, or all there is: shrunken grids have less of a band than the scan has."""
    mask = np.zeros((10, 9, 8), np.uint8)
    mask[3:7, 2:8, 1:5] = 1
    fit = Fit.resize(mask.shape, target, centred=centred)
    fitted = fit.labels(torch.from_numpy(flipped(mask, flips).copy())).numpy()
    found = border_locations(np.random.default_rng(seed), np.flatnonzero(mask), fit, wanted, flips)
    assert len(np.unique(found, axis=0)) == len(found) == min(wanted, int(fitted.sum()))
    assert fitted[tuple(found.T)].all()


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), include=st.booleans())
def test_uniform_locations_stay_inside(seed: int, include: bool) -> None:
    found = uniform_locations(np.random.default_rng(seed), (5, 7, 9), 2000, include)
    assert (found >= 0).all()
    assert found.max(axis=0).tolist() == ([4, 6, 8] if include else [3, 5, 7])


def test_released_band_is_14_voxels_wide_at_a_flat_face() -> None:
    mask = np.zeros((60, 40, 40), bool)
    mask[30:] = True
    assert released_border(mask)[:, 20, 20].sum() == 14
    assert released_border(mask, 25)[:, 20, 20].sum() == 26


def test_euclidean_band_knows_the_spacing() -> None:
    mask = np.zeros((60, 20, 20), bool)
    mask[30:] = True
    band = euclidean_border(mask, (2.0, 1.0, 1.0), 12.0)
    assert abs(int(band[:, 10, 10].sum()) * 2.0 - 12.0) <= 4.0


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    spacing=st.sampled_from([(1.0, 1.0, 1.0), (1.0, 1.0, 5.0), (0.7, 3.0, 1.4)]),
    width=st.sampled_from([0.5, 1.0, 3.0, 8.0, 40.0]),
)
def test_euclidean_band_is_exact(seed: int, spacing: tuple[float, float, float], width: float) -> None:
    """Against distances to every voxel's box; thick slices count from their faces."""
    mask = np.random.default_rng(seed).random((6, 7, 5)) < 0.3
    places = np.argwhere(np.ones_like(mask))
    steps = np.abs(places[:, None] - places[None])
    gaps = np.linalg.norm(np.maximum(steps - 0.5, 0) * spacing, axis=-1)
    inside = mask[tuple(places.T)]
    gaps[inside[:, None] == inside[None]] = np.inf
    expected = gaps.min(axis=1) <= width / 2 + 1e-9
    assert (euclidean_border(mask, spacing, width)[tuple(places.T)] == expected).all()


def test_bands_of_several_structures_share_the_locations() -> None:
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[5:10, 5:10, 5:10], labels[28:35, 28:35, 28:35] = 1, 2
    border = border_voxels(labels, (1.0, 1.0, 1.0), 3, kernel=3)
    assert len(border) == 2
    found = sample_locations(np.random.default_rng(0), Fit.none((40, 40, 40)), 400, border, 1.0)
    near = (found < 20).all(axis=1).sum()
    assert near == 200


def test_a_plan_moves_volume_labels_and_locations_together() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, (7, 6, 5)).astype(np.uint8)
    flips = (True, False, True)
    fit = Fit.pad((7, 6, 5), (8, 8, 8))
    locations = np.argwhere(np.ones((8, 8, 8)))
    fitted = fit.labels(torch.from_numpy(flipped(labels, flips).copy())).numpy()
    assert (labels_at(flipped(labels, flips), fit, locations) == fitted[tuple(locations.T)]).all()


def test_augmentation_kinds_come_half_of_the_time() -> None:
    plans = [draw(np.random.default_rng([1, i]), 2) for i in range(600)]
    for share in (
        np.mean([any(p.flips) for p in plans]),
        np.mean([p.brightness is not None for p in plans]),
        np.mean([p.noise_std > 0 for p in plans]),
    ):
        assert 0.4 < share < 0.6
    assert not any(p.flips[2] for p in plans)
    assert all(abs(f) <= 0.15 for p in plans for f in p.brightness or ())


def test_intensity_changes_are_a_function_of_the_plan() -> None:
    plan = next(p for i in range(50) if (p := draw(np.random.default_rng(i), 1)).noise_std and p.brightness)
    image = torch.rand(1, 12, 12, 12)
    one = apply_intensity(image, plan, np.array([1.0]))
    assert torch.equal(one, apply_intensity(image, plan, np.array([1.0])))
    assert (one - image).mean().item() == pytest.approx(plan.brightness[0], abs=0.02)  # type: ignore[index]
    assert (one - image).std().item() == pytest.approx(0.15, abs=0.02)

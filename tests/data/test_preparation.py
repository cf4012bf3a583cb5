"""The released data path against the reference cases, and locations against voxels (SPEC §1, §2)."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ossnet.data import preparation
from ossnet.data.patches import PatchSource
from ossnet.data.preparation import Fit, FitWarning, Preparation, as_float, prepare_scan, reduce_by_two
from ossnet.training.settings import make_settings
from ossnet.volume import Volume

FIXTURES = Path(__file__).parents[1] / "fixtures" / "released_weights"
SHAPES = st.tuples(*[st.integers(3, 20)] * 3)


@pytest.fixture(scope="module")
def brats() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "data_brats.npz"))


@pytest.fixture(scope="module")
def lits() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "data_lits.npz"))


def test_brats_is_normalised_then_padded(brats: dict[str, np.ndarray]) -> None:
    raw = np.stack([brats[f"raw_{name}"] for name in ("flair", "t1", "t1ce", "t2")])
    preparation = Preparation(orientation="file", fit="pad", shape=(48, 32, 32))
    scan = prepare_scan(Volume(raw, np.eye(4)), preparation)
    assert scan.fit.offset == (2, 1, 3)
    np.testing.assert_allclose(scan.image.numpy(), brats["padded_volume"], atol=1e-5)
    np.testing.assert_allclose(reduce_by_two(scan.image).numpy(), brats["encoder_volume"], atol=1e-5)
    label = scan.fit.labels(torch.from_numpy((brats["raw_label"] > 0).astype(np.uint8)))
    assert (label.numpy() == brats["padded_label"]).all()


def test_lits_is_normalised_then_resized(lits: dict[str, np.ndarray]) -> None:
    preparation = Preparation(orientation="file", fit="resize", shape=(64, 64, 32))
    scan = prepare_scan(Volume(lits["raw_ct"][None], np.eye(4)), preparation)
    np.testing.assert_allclose(scan.image[0, 20].numpy(), lits["resized_slice_axis0_20"], atol=1e-5)
    np.testing.assert_allclose(scan.image[0, :, :, 16].numpy(), lits["resized_slice_axis2_16"], atol=1e-5)
    np.testing.assert_allclose(reduce_by_two(scan.image).numpy(), lits["encoder_volume"], atol=1e-5)
    label = scan.fit.labels(torch.from_numpy((lits["raw_label"] > 0).astype(np.uint8)))
    assert (label.numpy() == lits["resized_label"]).all()


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_patches(brats: dict[str, np.ndarray], pool: str) -> None:
    source = PatchSource(torch.from_numpy(brats["padded_volume"]), "small+large", pool)  # type: ignore[arg-type]
    patches = source(torch.from_numpy(brats["locations"][:16]))
    assert patches is not None
    np.testing.assert_allclose(patches[:, :4].numpy(), brats["patches_small"], atol=1e-6)
    np.testing.assert_allclose(patches[:, 4:].numpy(), brats[f"patches_large_{pool}"], atol=1e-6)


def test_patches_between_voxels_interpolate() -> None:
    # A linear volume is reproduced exactly by trilinear interpolation, away from the zero padding.
    axes = torch.meshgrid(*[torch.arange(24.0)] * 3, indexing="ij")
    volume = (2 * axes[0] - axes[1] + 0.5 * axes[2])[None]
    place = torch.tensor([[11.25, 10.5, 12.75]])
    patches = PatchSource(volume, "small+large")(place)
    assert patches is not None
    base = 2 * 11.25 - 10.5 + 0.5 * 12.75
    assert patches[0, 0, 3, 3, 3].item() == pytest.approx(base, abs=1e-4)
    assert patches[0, 0, 4, 3, 3].item() == pytest.approx(base + 2, abs=1e-4)
    # The centre cell of the large patch covers p-1 and p: half a voxel before p on each axis (SPEC §2).
    assert patches[0, 1, 3, 3, 3].item() == pytest.approx(base - 0.5 * (2 - 1 + 0.5), abs=1e-4)


@settings(max_examples=30)
@given(source=SHAPES, extra=st.tuples(*[st.integers(0, 5)] * 3), resize=st.booleans())
def test_locations_map_there_and_back(
    source: tuple[int, int, int], extra: tuple[int, int, int], resize: bool
) -> None:
    x, y, z = (n + e for n, e in zip(source, extra, strict=True))
    fit = Fit.resize(source, (x, y, z)) if resize else Fit.pad(source, (x, y, z))
    points = torch.rand(20, 3) * 10
    torch.testing.assert_close(fit.to_scan(fit.to_fitted(points)), points, atol=1e-4, rtol=1e-4)
    homogeneous = np.concatenate([points.numpy(), np.ones((20, 1))], axis=1)
    mapped = (homogeneous @ fit.matrix().T)[:, :3]
    np.testing.assert_allclose(mapped, fit.to_fitted(points).numpy(), atol=1e-4)


def test_a_voxel_and_its_location_move_together() -> None:
    volume = torch.zeros(1, 9, 8, 7)
    volume[0, 4, 3, 2] = 1
    fit = Fit.pad((9, 8, 7), (16, 16, 8))
    x, y, z = fit.to_fitted(torch.tensor([[4.0, 3.0, 2.0]]))[0].long().tolist()
    assert fit.volume(volume)[0, x, y, z] == 1


def test_a_channel_in_small_units_is_no_constant_one() -> None:
    """Diffusion in m²/s, for example."""
    data = np.random.default_rng(0).uniform(0, 1e-9, (1, 8, 8, 8)).astype(np.float32)
    scan = prepare_scan(Volume(data, np.eye(4)), Preparation())
    assert float(scan.image.std()) == pytest.approx(1, abs=0.05)


def test_a_constant_channel_becomes_zero() -> None:
    data = np.stack([np.full((5, 5, 5), 7, np.int16), np.arange(125, dtype=np.int16).reshape(5, 5, 5)])
    scan = prepare_scan(Volume(data, np.eye(4)), Preparation())
    assert (scan.image[0] == 0).all()
    assert scan.image[1].std().item() == pytest.approx(1, abs=1e-5)


def test_a_scan_larger_than_the_network_is_resized_with_a_warning() -> None:
    preparation = Preparation(fit="pad", shape=(16, 16, 16))
    with pytest.warns(FitWarning, match="do not fit"):
        fit = preparation.fit_for((20, 16, 16), (1.0, 1.0, 1.0))
    assert fit.resizes
    assert fit.target == (16, 16, 16)


def test_resampling_to_a_spacing_leaves_matching_axes_alone() -> None:
    preparation = Preparation(fit="spacing", spacing=(1.0, 1.0, 5.0))
    fit = preparation.fit_for((30, 40, 10), (2.0, 1.02, 5.0))
    assert fit.target == (60, 40, 10)
    assert fit.scale[1:] == (1.0, 1.0)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_mirrored_axes_of_one_voxel_are_no_matter(dtype: type) -> None:
    """NumPy counts them as contiguous whatever their stride; torch takes no negative one."""
    image = np.arange(8, dtype=dtype).reshape(1, 8, 1, 1)[:, :, ::-1]
    assert image.strides[2] < 0
    assert torch.equal(as_float(image)[0, :, 0, 0], torch.arange(8.0))


@pytest.mark.parametrize("kind", ["i8", "u8", "f8", ">f8", ">i8"])
def test_wide_types_become_float32_at_once(kind: str) -> None:
    values = (np.random.default_rng(0).random((1, 40, 50, 60)) * 2**53).astype(kind)
    image = np.asfortranarray(values)
    tracemalloc.start()
    found = as_float(image)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 5 * image.size
    np.testing.assert_array_equal(found.numpy(), values.astype(kind.strip(">")).astype(np.float32))


def test_statistics_of_a_crop_take_no_copy_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_PART", 1 << 10)
    whole = np.random.default_rng(0).integers(-500, 3000, (2, 70, 80, 90), np.int16)
    crop = whole[:, 3:67, 5:70, 7:80]
    copied = Preparation().statistics(crop.copy())
    tracemalloc.start()
    found = Preparation().statistics(crop)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < crop.nbytes / 4
    for one, other in zip(vars(found).values(), vars(copied).values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    np.testing.assert_allclose(found.scale, crop.reshape(2, -1).std(1, ddof=1), rtol=1e-12)


@settings(max_examples=60)
@given(source=SHAPES, target=SHAPES)
def test_labels_of_a_resized_grid_lie_where_the_image_does(
    source: tuple[int, int, int], target: tuple[int, int, int]
) -> None:
    fit = Fit.resize(source, target, centred=True)
    for axis, table in enumerate(fit.nearest()):
        seen = torch.zeros(target[axis], 3)
        seen[:, axis] = torch.arange(target[axis])
        place = fit.to_scan(seen)[:, axis].numpy()
        assert np.abs(table - place).max() <= 0.5 + 1e-4
    released = Fit.resize(source, target)
    assert all((r <= c).all() for r, c in zip(released.nearest(), fit.nearest(), strict=True))


def test_the_papers_presets_take_labels_as_released() -> None:
    assert make_settings("C").data.resized_labels == "centred"
    assert make_settings("C", "lits").data.resized_labels == "released"
    resized = Preparation(fit="resize", shape=(4, 4, 4), resized_labels="centred")
    assert resized.fit_for((9, 8, 8), (1.0, 1.0, 1.0)).nearest()[0].tolist() == [1, 3, 5, 7]
    released = Preparation(fit="resize", shape=(4, 4, 4)).fit_for((9, 8, 8), (1.0, 1.0, 1.0))
    assert released.nearest()[0].tolist() == [0, 2, 4, 6]

"""What is written is read back; what others write is read as they meant it."""

import gzip
import os
import tracemalloc
import warnings
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ossnet.errors import ResourceError, VolumeError
from ossnet.files import memory, voxels
from ossnet.files.header import VolumeWarning
from ossnet.files.nifti import write_labels, write_volume
from ossnet.files.reading import read_header, read_labels, read_volume
from ossnet.volume import FileHeader, LabelMap, Orientation, Volume, largest_corner_gap, same_place

SHAPE = (5, 6, 7)
TYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32]
ORIENTATIONS = [Orientation(a, f) for a in permutations(range(3)) for f in product([False, True], repeat=3)]
once = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def values(dtype: type = np.int16, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 100, size=shape).astype(dtype)


def oblique() -> np.ndarray:
    affine = np.eye(4)
    turn = nib.eulerangles.euler2mat(0.3, -0.2, 0.9)
    affine[:3, :3] = turn * np.array([0.7, 1.2, 3.0])
    affine[:3, 3] = [-12.5, 80, 33]
    return affine


def sheared() -> np.ndarray:
    affine = oblique()
    affine[0, 1] += 0.4
    return affine


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_files_of_nibabel(tmp_path: Path, dtype: type, order: str, kind: type) -> None:
    data = values(dtype)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(dtype))
    image = kind(data, oblique(), header)
    image.to_filename(tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.data.dtype == dtype
    assert volume.data.dtype.isnative
    assert volume.data.flags.writeable
    assert np.array_equal(volume.data[0], data)
    np.testing.assert_allclose(volume.affine, oblique(), atol=1e-5)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_volume_round_trip(tmp_path: Path, ending: str, version: int, dtype: type, channels: int) -> None:
    before = Volume(values(dtype, (channels, *SHAPE)), oblique(), header=FileHeader(version=version))
    before.save(tmp_path / f"a{ending}")
    after = read_volume(tmp_path / f"a{ending}")
    assert np.array_equal(after.data, before.data)
    assert after.data.dtype == dtype
    assert after.header == before.header
    assert same_place(before, after, 1e-4) is None
    # and others read the same
    image = nib.load(tmp_path / f"a{ending}")
    assert np.array_equal(np.moveaxis(image.get_fdata().reshape(*SHAPE, channels), -1, 0), before.data)


@once
@given(seed=st.integers(0, 2**32 - 1), q=st.sampled_from([0, 1, 2, 4]), s=st.sampled_from([0, 1, 2, 4]))
def test_any_affine_under_any_codes_keeps_its_place(tmp_path: Path, seed: int, q: int, s: int) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = rng.normal(size=(3, 3)) * rng.uniform(0.3, 5, size=3)
    affine[:3, 3] = rng.uniform(-200, 200, size=3)
    if np.linalg.cond(affine[:3, :3]) > 50:
        return
    before = LabelMap(values(np.uint8), affine, header=FileHeader(q, s))
    before.save(tmp_path / "a.nii")
    after = read_labels(tmp_path / "a.nii")
    assert largest_corner_gap(before.affine, after.affine, SHAPE) < 5e-3
    np.testing.assert_allclose(nib.load(tmp_path / "a.nii").affine, after.affine, atol=1e-9)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_48_orientations_lie_in_one_place(tmp_path: Path, orientation: Orientation) -> None:
    labels = LabelMap(values(np.uint8), oblique())
    labels.reoriented(orientation).save(tmp_path / "a.nii")
    after = read_labels(tmp_path / "a.nii")
    assert np.array_equal(orientation.undo(after.data), labels.data)
    points = np.argwhere(after.data == after.data.max()).astype(float)
    before = np.argwhere(labels.data == labels.data.max()).astype(float)
    found = sorted(map(tuple, np.round(after.to_world(points), 3)))
    np.testing.assert_allclose(found, sorted(map(tuple, np.round(labels.to_world(before), 3))), atol=2e-3)


def test_codes_and_units_of_the_scan_are_kept(tmp_path: Path) -> None:
    for header in (FileHeader(0, 2, 10, 2), FileHeader(1, 0, 2, 1), FileHeader(2, 4, 0, 1)):
        LabelMap(values(np.uint8), oblique(), header=header).save(tmp_path / "a.nii.gz")
        assert read_labels(tmp_path / "a.nii.gz").header == header


@pytest.mark.filterwarnings("ignore::ossnet.files.header.VolumeWarning")
@pytest.mark.parametrize("unit", [2, 3])
def test_a_qform_elsewhere_is_kept_beside_the_sform(tmp_path: Path, unit: int) -> None:
    """As registration leaves it: labels lie on the scan for programs that go by either."""
    image = nib.Nifti1Image(values(), oblique())
    image.header["xyzt_units"] = unit
    image.set_qform(np.diag([1.0, 1.5, 2.0, 1.0]), 1)
    image.set_sform(oblique(), 2)
    image.to_filename(tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    part = np.eye(4)
    part[:3, 3] = 1, 2, 0
    for shift in (np.eye(4), part):
        LabelMap(values(np.uint8), volume.affine @ shift, header=volume.header).save(tmp_path / "b.nii")
        made = nib.load(tmp_path / "b.nii")
        assert (made.header["qform_code"], made.header["sform_code"]) == (1, 2)
        np.testing.assert_allclose(made.get_qform(), image.get_qform() @ shift, atol=1e-4)
        np.testing.assert_allclose(made.get_sform(), image.get_sform() @ shift, atol=1e-4)


def test_shear_is_never_squeezed_into_a_qform(tmp_path: Path) -> None:
    LabelMap(values(np.uint8), sheared(), header=FileHeader(1, 1)).save(tmp_path / "a.nii")
    image = nib.load(tmp_path / "a.nii")
    assert (image.header["qform_code"], image.header["sform_code"]) == (0, 1)
    np.testing.assert_allclose(image.affine, sheared(), atol=1e-5)


@pytest.mark.parametrize(("unit", "factor"), [(1, 1000.0), (3, 1e-3)])
def test_other_units_become_mm_and_are_written_back(tmp_path: Path, unit: int, factor: float) -> None:
    image = nib.Nifti1Image(values(), oblique())
    image.header["xyzt_units"] = unit
    image.to_filename(tmp_path / "a.nii")
    with pytest.warns(VolumeWarning, match="converted to mm"):
        volume = read_volume(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.affine[:3], oblique()[:3] * factor, rtol=1e-5)
    labels = LabelMap(values(np.uint8), volume.affine, header=volume.header)
    labels.save(tmp_path / "b.nii")
    np.testing.assert_allclose(nib.load(tmp_path / "b.nii").affine, oblique(), rtol=1e-5)
    with pytest.warns(VolumeWarning):
        assert same_place(read_labels(tmp_path / "b.nii"), volume) is None


def test_no_codes_means_voxel_sizes_with_a_warning(tmp_path: Path) -> None:
    image = nib.Nifti1Image(values(), np.diag([2.0, 1.0, 3.0, 1.0]))
    image.header["qform_code"] = image.header["sform_code"] = 0
    raw = bytearray(image.to_bytes())
    raw[252:256] = bytes(4)  # both codes
    (tmp_path / "a.nii").write_bytes(raw)
    with pytest.warns(VolumeWarning, match="no affine"):
        volume = read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(volume.affine, np.diag([2.0, 1.0, 3.0, 1.0]))
    LabelMap(values(np.uint8), volume.affine, header=volume.header).save(tmp_path / "b.nii")
    written = nib.load(tmp_path / "b.nii").header
    assert (written["qform_code"], written["sform_code"]) == (0, 0)
    np.testing.assert_allclose(nib.load(tmp_path / "a.nii").affine, nib.load(tmp_path / "b.nii").affine)


def test_qform_and_sform_that_disagree_are_told(tmp_path: Path) -> None:
    image = nib.Nifti1Image(values(), oblique())
    image.set_sform(np.diag([1.0, 1, 1, 1]), 1)
    image.set_qform(oblique(), 1)
    image.to_filename(tmp_path / "a.nii")
    with pytest.warns(VolumeWarning, match="the sform is used"):
        np.testing.assert_array_equal(read_header(tmp_path / "a.nii").affine, np.eye(4))


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("given_name", ["hdr", "img"])
def test_pairs(tmp_path: Path, gz: str, given_name: str) -> None:
    nib.Nifti1Pair(values(), oblique()).to_filename(tmp_path / f"a.img{gz}")
    volume = read_volume(tmp_path / f"a.{given_name}{gz}")
    assert np.array_equal(volume.data[0], values())
    (tmp_path / f"a.img{gz}").unlink()
    with pytest.raises(VolumeError, match="no such file"):
        read_volume(tmp_path / f"a.hdr{gz}")


def test_scaling_is_applied_in_full_precision(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.full(SHAPE, 2**30 + 1, np.int32), np.eye(4))
    image.header.set_slope_inter(1e-3, -(2.0**20))
    image.to_filename(tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = np.array([1e-3, -(2.0**20)], "<f4").tobytes()
    raw[352:] = np.full(SHAPE, 2**30 + 1, "<i4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    data = read_volume(tmp_path / "a.nii").data
    assert data.dtype == np.float32
    # An int32 of this size times a float32 would be wrong in the third digit.
    np.testing.assert_allclose(data, float(np.float32(1e-3)) * (2**30 + 1) - 2.0**20, rtol=1e-7)


@pytest.mark.parametrize("slope", [0.0, float("nan"), 1.0])
def test_zero_slope_means_unscaled(tmp_path: Path, slope: float) -> None:
    raw = bytearray(nib.Nifti1Image(values(), np.eye(4)).to_bytes())
    raw[112:120] = np.array([slope, 0], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    volume = read_volume(tmp_path / "a.nii")
    assert volume.data.dtype == np.int16
    assert np.array_equal(volume.data[0], values())


def test_float64_becomes_float32(tmp_path: Path) -> None:
    nib.Nifti1Image(values(np.float64), np.eye(4)).to_filename(tmp_path / "a.nii")
    assert read_volume(tmp_path / "a.nii").data.dtype == np.float32


def test_fill_values_of_doubles_count_as_infinite(tmp_path: Path) -> None:
    filled = values(np.float64)
    filled[0, 0, :2] = np.finfo(np.float64).min
    nib.Nifti1Image(filled, np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(VolumeError, match="2 of 210 voxels are NaN or infinite, or too large for float32"):
        read_volume(tmp_path / "a.nii")
    with pytest.warns(VolumeWarning, match="replaced"):
        volume = read_volume(tmp_path / "a.nii", nonfinite="replace")
    assert (volume.data[0, 0, 0, :2] == values().min()).all()


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7, 1), (5, 6, 7, 4), (5, 6, 7, 1, 3), (5, 6, 1)])
def test_axes_beside_space_become_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = values(np.int16, shape)
    nib.Nifti1Image(data, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    full = data.reshape(*shape[:2], shape[2] if len(shape) > 2 else 1, -1)
    assert np.array_equal(volume.data, np.moveaxis(full, -1, 0))


def test_several_files_become_channels(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.nii.gz" for i in range(3)]
    for number, file in enumerate(files):
        write_volume(Volume(values()[None] + number, oblique()), file)
    volume = read_volume(files)
    assert volume.data.shape == (3, *SHAPE)
    assert np.array_equal(volume.data[2], values() + 2)
    assert volume.source == files[0]

    write_volume(Volume(values()[None], sheared()), files[1])
    with pytest.raises(VolumeError, match=r"1\.nii\.gz: does not lie on 0\.nii\.gz"):
        read_volume(files)
    write_volume(Volume(values(shape=(5, 6, 8))[None], oblique()), files[1])
    with pytest.raises(VolumeError, match="shapes differ"):
        read_volume(files)
    write_volume(Volume(values(shape=(2, *SHAPE)), oblique()), files[1])
    with pytest.raises(VolumeError, match="2 channels"):
        read_volume(files)
    with pytest.raises(VolumeError, match="no files"):
        read_volume([])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(tmp_path: Path, bad: float) -> None:
    data = np.stack([values(np.float32) - 50, values(np.float32) + 900], axis=-1)
    data[1, 2, 3, 1] = bad
    nib.Nifti1Image(data, np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(VolumeError, match="1 of 420 voxels are NaN or infinite"):
        read_volume(tmp_path / "a.nii")
    with pytest.warns(VolumeWarning, match="replaced"):
        replaced = read_volume(tmp_path / "a.nii", nonfinite="replace").data
    good = np.delete(data[..., 1].ravel(), np.ravel_multi_index((1, 2, 3), SHAPE))
    assert replaced[1, 1, 2, 3] == (good.max() if bad == np.inf else good.min())
    np.testing.assert_array_equal(replaced[0], data[..., 0])


def test_labels_stored_as_floats(tmp_path: Path) -> None:
    labels = (values() % 4).astype(np.float32)
    nib.Nifti1Image(labels + 9e-4, np.eye(4)).to_filename(tmp_path / "a.nii")
    read = read_labels(tmp_path / "a.nii")
    assert read.data.dtype == np.uint8
    assert np.array_equal(read.data, labels)
    for wrong, reason in (
        (labels + 2e-3, "not a whole number"),
        (-labels, "negative"),
        (labels * np.nan, "NaN"),
    ):
        nib.Nifti1Image(wrong.astype(np.float32), np.eye(4)).to_filename(tmp_path / "a.nii")
        with pytest.raises(VolumeError, match=reason):
            read_labels(tmp_path / "a.nii")


@pytest.mark.parametrize("scaled", [False, True])
def test_labels_stored_otherwise_take_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    monkeypatch.setattr(voxels, "_BLOCK", 1 << 12)
    labels = np.arange(60 * 50 * 40).reshape(60, 50, 40) % 7
    image = nib.Nifti1Image(labels.astype(np.int16 if scaled else np.float32), np.eye(4))
    if scaled:
        image.header.set_slope_inter(2, 3)
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    tracemalloc.start()
    found = read_labels(tmp_path / "a.nii").data
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(found, 2 * labels + 3 if scaled else labels)
    assert most < (image.get_data_dtype().itemsize + 3) * labels.size
    free = iter([1 << 30, labels.size - 1])  # once they are read
    monkeypatch.setattr(memory, "available_memory", lambda: next(free))
    with pytest.raises(ResourceError, match="GiB of memory"):
        read_labels(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("most", "dtype"),
    [(1, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.uint32)],
)
def test_labels_take_the_smallest_type(tmp_path: Path, most: int, dtype: type) -> None:
    data = np.zeros(SHAPE, np.int64)
    data[1, 2, 3] = most
    LabelMap(data, np.eye(4)).save(tmp_path / "a.nii.gz")
    assert nib.load(tmp_path / "a.nii.gz").get_data_dtype() == dtype
    nib.Nifti1Image(data, np.eye(4), dtype=np.int64).to_filename(tmp_path / "b.nii.gz")
    for file in ("a.nii.gz", "b.nii.gz"):
        read = read_labels(tmp_path / file)
        assert read.data.dtype == dtype
        assert np.array_equal(read.data, data)


@pytest.mark.parametrize("version", [1, 2])
def test_label_names_travel_in_the_file(tmp_path: Path, version: int) -> None:
    names = {0: "background", 1: "left atrium", 2: 'Lésion "b"'}
    LabelMap(values(np.uint8) % 3, oblique(), header=FileHeader(version=version), names=names).save(
        tmp_path / "a.nii.gz"
    )
    assert read_labels(tmp_path / "a.nii.gz").names == names
    image = nib.load(tmp_path / "a.nii.gz")  # others see a comment, and the same voxels
    assert [e.get_code() for e in image.header.extensions] == [6]
    assert np.array_equal(np.asarray(image.dataobj), values(np.uint8) % 3)


def test_files_say_whether_they_hold_labels(tmp_path: Path) -> None:
    for version in (1, 2):
        LabelMap(values(np.uint8), np.eye(4), header=FileHeader(version=version)).save(tmp_path / "a.nii")
        assert nib.load(tmp_path / "a.nii").header.get_intent() == ("label", (), "")
    Volume(values()[None], np.eye(4)).save(tmp_path / "b.nii")
    assert nib.load(tmp_path / "b.nii").header.get_intent() == ("none", (), "")


def test_same_labels_same_bytes(tmp_path: Path) -> None:
    labels = LabelMap(values(np.uint8), oblique())
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(labels, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_views_and_memory_orders_are_written_alike(tmp_path: Path) -> None:
    data = values(np.uint8)
    for view in (data, np.asfortranarray(data), data[::-1][::-1], np.repeat(data, 2, axis=1)[:, ::2]):
        write_labels(LabelMap(view, np.eye(4)), tmp_path / "a.nii")
        assert np.array_equal(read_labels(tmp_path / "a.nii").data, data)


def test_large_volumes_go_through_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voxels, "_BLOCK", 64)
    write_volume(Volume(values(np.float32, (2, *SHAPE)), np.eye(4)), tmp_path / "a.nii.gz")
    assert np.array_equal(read_volume(tmp_path / "a.nii.gz").data, values(np.float32, (2, *SHAPE)))


def test_an_axis_beyond_16_bits_is_written_as_nifti2(tmp_path: Path) -> None:
    LabelMap(np.ones((40000, 1, 1), np.uint8), np.eye(4)).save(tmp_path / "a.nii.gz")
    assert read_header(tmp_path / "a.nii.gz").shape == (40000, 1, 1)


@pytest.mark.parametrize("name", ["a.mha", "a", "a.img", "a.nii.bz2"])
def test_only_nifti_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(VolumeError, match="written as NIfTI"):
        LabelMap(values(np.uint8), np.eye(4)).save(tmp_path / name)


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="complex64"):
        write_volume(Volume(values(np.float32)[None] * 1j, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(VolumeError, match="negative"):
        write_labels(LabelMap(-values(), np.eye(4)), tmp_path / "a.nii")
    assert os.listdir(tmp_path) == []


def test_a_scan_that_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_volume(Volume(values()[None], np.eye(4)), tmp_path / "a.nii.gz")
    monkeypatch.setattr(memory, "available_memory", lambda: 100)
    with pytest.raises(ResourceError, match="GiB of memory"):
        read_volume(tmp_path / "a.nii.gz")
    read_header(tmp_path / "a.nii.gz")


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    raw = nib.Nifti1Image(values(), np.eye(4)).to_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(raw[:100]) + gzip.compress(raw[100:]))
    assert np.array_equal(read_volume(tmp_path / "a.nii.gz").data[0], values())


def test_reading_sound_files_warns_of_nothing(tmp_path: Path) -> None:
    write_volume(Volume(values()[None], oblique()), tmp_path / "a.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_volume(tmp_path / "a.nii.gz")

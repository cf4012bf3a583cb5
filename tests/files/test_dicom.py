"""DICOM series as scans."""

import builtins
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ossnet.errors import InputError, OssnetError, VolumeError
from ossnet.files.dicom import dicom_folders, holds_scan, is_dicom
from ossnet.files.reading import look_at, read_volume

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence as Items  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage, RLELossless  # noqa: E402
from tests.files.dicom_writer import multi_frame, slice_of, write  # noqa: E402

VOXELS = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.int16)
"""(Z, Y, X)."""


def series(count: int = 6, step: float = 2.0, **changes: Any) -> list[Dataset]:
    return [slice_of(VOXELS[k], (10, 20, 30 + k * step), **changes) for k in range(count)]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.permutations(range(6)), st.booleans())
def test_slices_lie_where_they_say(tmp_path: Path, seed: int, order: list[int], tilted: bool) -> None:
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    spacing, start = rng.uniform(0.3, 5, 3), rng.uniform(-100, 100, 3)
    step = turn[:, 2] * spacing[2] + (0.3 * turn[:, 1] if tilted else 0)
    slices = [
        slice_of(
            VOXELS[k],
            [float(f"{v:.9g}") for v in start + k * step],
            ImageOrientationPatient=[float(f"{v:.9f}") for v in (*turn[:, 0], *turn[:, 1])],
            PixelSpacing=[float(f"{spacing[1]:.9g}"), float(f"{spacing[0]:.9g}")],
        )
        for k in order
    ]
    folder = write(tmp_path / f"{seed}{order}{tilted}", slices)
    found = read_volume(folder)
    np.testing.assert_array_equal(found.data[0], VOXELS.transpose(2, 1, 0))
    lps = np.eye(4)
    lps[:3] = np.column_stack([turn[:, 0] * spacing[0], turn[:, 1] * spacing[1], step, start])
    np.testing.assert_allclose(found.affine, np.diag([-1, -1, 1, 1]) @ lps, atol=1e-4)
    header = look_at(folder)
    assert (header.shape, header.channels) == (found.shape, 1)
    np.testing.assert_array_equal(header.affine, found.affine)


def test_values_are_rescaled(tmp_path: Path) -> None:
    stored = (VOXELS + 1000).astype(np.uint16)
    ct = [
        slice_of(stored[k], (0, 0, k), RescaleSlope=1, RescaleIntercept=-1000, BitsStored=12, HighBit=11)
        for k in range(6)
    ]
    found = read_volume(write(tmp_path / "ct", ct))
    assert found.data.dtype == np.int16
    np.testing.assert_array_equal(found.data[0], VOXELS.transpose(2, 1, 0))
    # Of a PET every slice has a slope of its own.
    pet = [slice_of(stored[k], (0, 0, k), RescaleSlope=0.5 + k, RescaleIntercept=0) for k in range(6)]
    found = read_volume(write(tmp_path / "pet", pet))
    assert found.data.dtype == np.float32
    np.testing.assert_allclose(found.data[0, :, :, 2], stored[2].T * 2.5)
    wide = [slice_of(stored[k], (0, 0, k), RescaleSlope=1, RescaleIntercept=-70_000) for k in range(6)]
    found = read_volume(write(tmp_path / "wide", wide))
    assert found.data.dtype == np.int32
    np.testing.assert_array_equal(found.data[0], VOXELS.transpose(2, 1, 0).astype(int) - 69_000)
    mask = [slice_of((stored[k] > 900).astype(np.uint16), (0, 0, k)) for k in range(6)]
    assert read_volume(write(tmp_path / "mask", mask)).data.dtype == np.uint8


def test_many_slices_in_one_file(tmp_path: Path) -> None:
    order = [3, 0, 5, 1, 4, 2]
    positions = np.array([[1.0, 2.0, 4.0 * k] for k in order])
    write(tmp_path, [multi_frame(VOXELS[order], positions)], names=["all.dcm"])
    for path in (tmp_path, tmp_path / "all.dcm"):
        found = read_volume(path)
        np.testing.assert_array_equal(found.data[0], VOXELS.transpose(2, 1, 0))
        np.testing.assert_allclose(
            found.affine, [[-2, 0, 0, -1], [0, -0.5, 0, -2], [0, 0, 4, 0], [0, 0, 0, 1]]
        )


def test_a_single_slice_is_as_thick_as_it_says(tmp_path: Path) -> None:
    write(tmp_path, [slice_of(VOXELS[0], (0, 0, 0), SliceThickness=7.0)], names=["one.dcm"])
    assert read_volume(tmp_path / "one.dcm").spacing == (1.0, 1.0, 7.0)


def test_compressed_slices(tmp_path: Path) -> None:
    slices = series()
    for one in slices:
        one.compress(RLELossless)
    np.testing.assert_array_equal(read_volume(write(tmp_path, slices)).data[0], VOXELS.transpose(2, 1, 0))


def test_what_is_no_image_may_lie_beside(tmp_path: Path) -> None:
    write(tmp_path, series())
    (tmp_path / "README.txt").write_text("no DICOM")
    (tmp_path / ".hidden").write_text("neither")
    (tmp_path / "_SUCCESS").touch()
    report = slice_of(VOXELS[0], (0, 0, 0), Modality="SEG")
    write(tmp_path, [report], names=["seg.dcm"])
    assert read_volume(tmp_path).shape == (4, 5, 6)


def test_several_become_channels(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", series()), write(tmp_path / "two", series())
    assert read_volume([one, two]).data.shape == (2, 4, 5, 6)
    moved = write(tmp_path / "moved", series(step=2.5))
    with pytest.raises(VolumeError, match=r"moved: does not lie on one: corner voxels lie up to 2\.5 mm"):
        read_volume([one, moved])


def bad(case: str) -> list[Dataset]:
    slices = series()
    match case:
        case "missing":
            del slices[3]
        case "twice":
            slices.append(slice_of(VOXELS[0], (10, 20, 34)))
        case "uneven":
            slices[2].ImagePositionPatient = [10, 20, 34.6]
        case "beside":
            slices[2].ImagePositionPatient = [11, 20, 34]
        case "other size":
            slices[2] = slice_of(VOXELS[2][:, :3].copy(), (10, 20, 34))
        case "other spacing":
            slices[2].PixelSpacing = [1.0, 1.1]
        case "turned":
            slices[2].ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
        case "nowhere":
            del slices[5].ImagePositionPatient
        case "colours":
            slices[5].SamplesPerPixel = 3
        case "palette":
            slices[5].PhotometricInterpretation = "PALETTE COLOR"
        case "mosaic":
            slices[2].ImageType = ["ORIGINAL", "PRIMARY", "MOSAIC"]
        case "frames":
            slices[2].NumberOfFrames = 6
        case "not finite":
            slices[2].RescaleIntercept = float("nan")
        case "flat":
            slices[2].PixelSpacing = [0.0, 1.0]
        case "no columns":
            del slices[2].Columns
        case "no pixels":
            del slices[2].PixelData
        case "short":
            slices[2].PixelData = slices[2].PixelData[:-6]
    return slices


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("missing", "a slice is missing between IM0838 and IM0757: they lie 4 mm apart, others 2 mm"),
        ("twice", "lie at the same place"),
        ("uneven", "its slices do not lie at equal distances: IM0838 is 0.6 mm beside"),
        ("beside", "its slices do not lie at equal distances: IM0838 is 1 mm beside"),
        ("other size", "IM0838 has 3 × 5 voxels, unlike IM0000"),
        ("other spacing", "IM0838 has voxels of 1.1 × 1 mm"),
        ("turned", "IM0838 has another orientation"),
        ("nowhere", "IM0595: it does not say where it lies in the patient (ImagePositionPatient)"),
        ("colours", "IM0595: it holds colours"),
        ("palette", "IM0595: it holds colours"),
        ("mosaic", "IM0838: its slices are tiles of one picture (mosaic)"),
        ("frames", "IM0838: it holds 6 pictures and says of 0 where they lie"),
        ("not finite", "IM0838: its RescaleIntercept is nan"),
        ("flat", "IM0838: its voxel sizes or directions have no meaning"),
        ("no columns", "IM0838: its header cannot be read"),
        ("no pixels", "IM0838: its pixels cannot be read"),
        ("short", "IM0838: its pixels cannot be read"),
    ],
)
def test_what_is_no_stack_is_refused(tmp_path: Path, case: str, reason: str) -> None:
    with pytest.raises(VolumeError) as caught:
        read_volume(write(tmp_path, bad(case)))
    assert reason in str(caught.value)


def test_several_series_are_named(tmp_path: Path) -> None:
    write(tmp_path, series())
    write(tmp_path, series(2, SeriesNumber=1, SeriesDescription="scout"), names=["a", "b"])
    with pytest.raises(VolumeError) as caught:
        read_volume(tmp_path)
    assert "it holds 2 series: '3 thin' (6 files), '1 scout' (2 files). Move the one" in str(caught.value)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="this is a folder, not an image"):
        read_volume(tmp_path)
    write(tmp_path, [slice_of(VOXELS[0], (0, 0, 0), Modality="RTSTRUCT")])
    with pytest.raises(VolumeError, match="there are no DICOM images in it"):
        read_volume(tmp_path)


@pytest.mark.parametrize("damage", ["emptied", "without mark"])
def test_slices_that_were_cut_off_are_noticed_at_the_ends(tmp_path: Path, damage: str) -> None:
    write(tmp_path, series(), names=[f"{k}.dcm" for k in range(6)])
    last = tmp_path / "5.dcm"
    last.write_bytes(b"" if damage == "emptied" else last.read_bytes()[132:])
    with pytest.raises(VolumeError, match=r"5\.dcm: it is damaged: DICOM's mark is not in it"):
        read_volume(tmp_path)


@pytest.mark.parametrize("damage", ["zeros", "unreadable"])
def test_slices_without_an_ending_are_missed_too(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, series(), names=[f"IM{k:04d}" for k in range(6)])
    (tmp_path / "README").write_text("of the CD")
    assert read_volume(tmp_path).shape[2] == 6
    last = tmp_path / "IM0005"
    if damage == "zeros":
        last.write_bytes(bytes(last.stat().st_size))
    else:
        opened = Path.open

        def broken(path: Path, *args: Any, **options: Any) -> Any:
            if path == last:
                raise PermissionError(13, "Permission denied")
            return opened(path, *args, **options)

        monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(VolumeError, match=r"IM0005: (it is damaged|cannot be read)"):
        read_volume(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_values_that_cannot_be_told_are_damage(tmp_path: Path) -> None:
    write(tmp_path, series(2), names=["0.dcm", "1.dcm"])
    whole = (tmp_path / "1.dcm").read_bytes()
    at = whole.index(b"\x28\x00\x02\x00US\x02\x00")  # samples a voxel
    (tmp_path / "1.dcm").write_bytes(whole[: at + 6] + b"\x01\x00\x01" + whole[at + 10 :])
    with pytest.raises(VolumeError, match="its header cannot be read"):
        read_volume(tmp_path)
    assert holds_scan(tmp_path)


def test_links_and_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "study" / "t1", series(2))
    (tmp_path / "study" / "lost+found").mkdir()
    try:
        (tmp_path / "study" / "again").symlink_to(tmp_path / "study", target_is_directory=True)
    except OSError:
        pytest.skip("links are not allowed")
    listed = Path.iterdir

    def closed(path: Path) -> Any:
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", closed)
    assert dicom_folders(tmp_path) == [tmp_path / "study" / "t1"]


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_last_slice_that_ends_anywhere_is_named(tmp_path: Path) -> None:
    write(tmp_path, series(3), names=["0.dcm", "1.dcm", "2.dcm"])
    last = tmp_path / "2.dcm"
    whole = last.read_bytes()
    for length in range(0, len(whole), 5):
        last.write_bytes(whole[:length])
        with pytest.raises(VolumeError) as caught:
            read_volume(tmp_path)
        assert caught.value.where == str(last), (length, caught.value)
        assert length < 132 or holds_scan(tmp_path)


def test_what_is_not_of_a_series_may_lie_beside_it(tmp_path: Path) -> None:
    write(tmp_path, series())
    write(tmp_path, [slice_of(VOXELS[0], (0, 0, 0), Modality="RTSTRUCT")], names=["contours"])
    listing = Dataset()
    listing.file_meta = FileMetaDataset()
    listing.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    listing.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    listing.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    listing.FileSetID, listing.DirectoryRecordSequence = "CD", []
    pydicom.dcmwrite(tmp_path / "DICOMDIR", listing, enforce_file_format=True)
    assert is_dicom(tmp_path / "DICOMDIR")
    assert read_volume(tmp_path).shape == (4, 5, 6)


def test_a_slice_is_not_taken_for_its_series(tmp_path: Path) -> None:
    write(tmp_path, series())
    with pytest.raises(
        VolumeError, match=f"IM0000: it is one slice of a series. Name its folder: {tmp_path}"
    ):
        read_volume(tmp_path / "IM0000")


def test_positions_that_were_rounded(tmp_path: Path) -> None:
    rounded = [slice_of(VOXELS[k], (0, 0, round(0.75 * k, 1))) for k in range(6)]
    assert read_volume(write(tmp_path, rounded)).spacing[2] == pytest.approx(0.76)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_of_any_kind_is_told(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes that changed, and files that end early: a message, or a scan."""
    folder = write(tmp_path / "whole", series(3), uid="1.2.3")
    name = data.draw(st.sampled_from(sorted(f.name for f in folder.iterdir())))
    content = bytearray((folder / name).read_bytes())
    # The last 40 bytes are voxels.
    places = data.draw(st.lists(st.integers(128, len(content) - 41), max_size=3))
    for place in places:
        content[place] = data.draw(st.integers(0, 255))
    kept = data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))
    broken = write(tmp_path / "broken", series(3), uid="1.2.3")
    (broken / name).write_bytes(content[:kept])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(OssnetError):
            assert np.isfinite(read_volume(broken).data).all()


def test_without_pydicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, series())
    whole = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "pydicom":
            raise ImportError(name)
        return whole(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r'not installed\. Run pip install "ossnet\[dicom\]"'):
        read_volume(tmp_path)


def test_spacing_that_every_slice_tells_anew(tmp_path: Path) -> None:
    """Functional groups of a single slice may tell its pixel measures."""
    volume = multi_frame(VOXELS, np.array([[0.0, 0.0, float(k)] for k in range(6)]))
    for group in volume.PerFrameFunctionalGroupsSequence:
        measures = Dataset()
        measures.PixelSpacing = [1.5, 1.5]
        group.PixelMeasuresSequence = Items([measures])
    write(tmp_path, [volume])
    assert read_volume(tmp_path).spacing == (1.5, 1.5, 1.0)

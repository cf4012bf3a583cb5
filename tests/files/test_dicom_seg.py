"""DICOM segmentations: every voxel of a label map, where it belongs, under its name."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ossnet.colours import colour, rgb
from ossnet.errors import VolumeError
from ossnet.files.dicom import holds_scan
from ossnet.files.reading import origin_of, read_volume
from ossnet.volume import LabelMap, Orientation

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

from pydicom.uid import generate_uid  # noqa: E402
from tests.files.dicom_writer import multi_frame, slice_of, write  # noqa: E402

from ossnet.files.dicom_seg import require_source, write_dicom_seg  # noqa: E402

VOXELS = np.random.default_rng(0).integers(0, 900, (6, 5, 4)).astype(np.int16)
"""(Z, Y, X)."""
NAMES = {1: "liver", 4: "spleen", 7: "nowhere"}
STUDY = {
    "StudyInstanceUID": generate_uid(),
    "FrameOfReferenceUID": generate_uid(),
    "PatientID": "1",
    "StudyDate": "20200101",
}
"""Of a series whose names were removed."""


@pytest.fixture(params=["slices", "frames"])
def series(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "slices":
        slices = [
            slice_of(VOXELS[k], (0, 0, 2.0 * k), InstanceNumber=6 - k, **STUDY) for k in (3, 0, 5, 1, 4, 2)
        ]
        return write(tmp_path / "series", slices)
    places = np.array([(0, 0, 2.0 * k) for k in range(6)])[::-1]
    return write(tmp_path / "series", [multi_frame(VOXELS, places, InstanceNumber=1, **STUDY)])


def labels_of(series: Path) -> LabelMap:
    scan = read_volume(series)
    data = np.zeros(scan.shape, np.uint8)
    data[1:3, 2:4, 1:4] = 1
    data[0, :, 5] = 4
    return LabelMap(data, scan.affine, names=NAMES, origin="ossnet 0123")


def placed(file: Path) -> dict[str, set[tuple[float, ...]]]:
    """Name → mm (LPS) of each of its voxels, by what the file itself says."""
    made = pydicom.dcmread(file)
    pixels = made.pixel_array if made.pixel_array.ndim == 3 else made.pixel_array[None]
    names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in made.SegmentSequence}
    shared = made.SharedFunctionalGroupsSequence[0]
    along = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
    rows_mm, columns_mm = (float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing)
    found: dict[str, set[tuple[float, ...]]] = {}
    for frame, plane in zip(made.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        # What all frames share is said once.
        segment = (
            frame if "SegmentIdentificationSequence" in frame else shared
        ).SegmentIdentificationSequence
        name = names[int(segment[0].ReferencedSegmentNumber)]
        start = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        for y, x in np.argwhere(plane):
            place = start + x * columns_mm * along[0] + y * rows_mm * along[1]
            found.setdefault(name, set()).add(tuple(np.round(place, 3).tolist()))
    return found


def test_every_voxel_is_where_it_belongs(series: Path, tmp_path: Path) -> None:
    labels = labels_of(series)
    turned = labels.reoriented(Orientation((2, 0, 1), (True, False, True)))
    for given, name in ((labels, "a.dcm"), (turned, "b.dcm")):
        write_dicom_seg(given, series, tmp_path / name, version="1.2")
        expected = {
            NAMES[value]: {
                tuple(np.round(p * (-1, -1, 1), 3).tolist())
                for p in labels.to_world(np.argwhere(labels.data == value).astype(float))
            }
            for value in (1, 4)
        }
        assert placed(tmp_path / name) == expected
    made = pydicom.dcmread(tmp_path / "a.dcm")
    assert [str(s.SegmentLabel) for s in made.SegmentSequence] == ["liver", "spleen", "nowhere"]
    shades = [
        highdicom.color.CIELabColor.from_dicom_value(s.RecommendedDisplayCIELabValue).to_rgb()
        for s in made.SegmentSequence
    ]
    np.testing.assert_allclose(shades[:2], [rgb(colour(1)), rgb(colour(4))], atol=2)
    assert (made.Modality, made.StudyInstanceUID) == ("SEG", STUDY["StudyInstanceUID"])
    assert origin_of(tmp_path / "a.dcm") == "ossnet 0123"
    (tmp_path / "out").mkdir()
    (tmp_path / "a.dcm").rename(tmp_path / "out" / "a.dcm")
    assert not holds_scan(tmp_path / "out")


def test_an_empty_label_map_has_its_segments(series: Path, tmp_path: Path) -> None:
    labels = labels_of(series)
    empty = replace(labels, data=np.zeros_like(labels.data))
    write_dicom_seg(empty, series, tmp_path / "a.dcm")
    assert placed(tmp_path / "a.dcm") == {}
    with pytest.raises(VolumeError, match="there is no structure"):
        write_dicom_seg(replace(empty, names={}), series, tmp_path / "b.dcm")


def test_truth_values_are_one_structure_and_negative_labels_refused(series: Path, tmp_path: Path) -> None:
    labels = labels_of(series)
    mask = replace(labels, data=labels.data == 4, names={1: "spleen"})
    write_dicom_seg(mask, series, tmp_path / "a.dcm")
    write_dicom_seg(labels, series, tmp_path / "b.dcm")
    assert placed(tmp_path / "a.dcm") == {"spleen": placed(tmp_path / "b.dcm")["spleen"]}
    far = replace(labels, data=labels.data.astype(np.int64) * 2**29, names={})
    write_dicom_seg(far, series, tmp_path / "c.dcm")
    assert len(placed(tmp_path / "c.dcm")) == 2
    with pytest.raises(VolumeError, match="a label is negative"):
        write_dicom_seg(replace(labels, data=-labels.data.astype(int)), series, tmp_path / "d.dcm")


def test_labels_elsewhere_are_refused(series: Path, tmp_path: Path) -> None:
    labels = labels_of(series)
    with pytest.raises(VolumeError, match="do not lie on series"):
        write_dicom_seg(replace(labels, data=labels.data[:-1]), series, tmp_path / "a.dcm")
    assert not (tmp_path / "a.dcm").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom, of what it is given to write
def test_what_a_series_says_wrongly_is_left_out(tmp_path: Path) -> None:
    said = {
        "SpacingBetweenSlices": 5.0,
        "PatientSex": "male",
        "StudyDate": "2020-01-01",
        "SpecificCharacterSet": ["", "ISO 2022 IR 87"],
        "PatientName": "Yamada^Tarou=山田^太郎",
    }
    slices = [slice_of(VOXELS[k], (0, 0, 2.0 * k), **{**STUDY, **said}) for k in range(6)]
    for one in slices:
        del one.SliceThickness
    with pydicom.config.disable_value_validation():
        series = write(tmp_path / "series", slices)
    require_source(series)
    labels = replace(labels_of(series), names={1: "左", 4: "Leber\\Milz"})
    write_dicom_seg(labels, series, tmp_path / "a.dcm")
    made = pydicom.dcmread(tmp_path / "a.dcm")
    assert [str(s.SegmentLabel) for s in made.SegmentSequence] == ["左", "Leber/Milz"]
    assert str(made.PatientName) == said["PatientName"]
    assert (made.PatientSex, made.StudyDate) == ("", "")
    assert set(placed(tmp_path / "a.dcm")) == {"左", "Leber/Milz"}
    volume = highdicom.seg.segread(tmp_path / "a.dcm").get_volume(combine_segments=True)
    assert volume.spacing[0] == pytest.approx(2)


def test_a_series_without_identity_is_refused(tmp_path: Path) -> None:
    series = write(tmp_path / "series", [slice_of(VOXELS[k], (0, 0, 2.0 * k)) for k in range(6)])
    with pytest.raises(VolumeError, match="no segmentation can be made for it"):
        write_dicom_seg(labels_of(series), series, tmp_path / "a.dcm")

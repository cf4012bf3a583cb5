"""Segmentations for 3D Slicer come back as they were, and ITK sees them where they are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossnet.errors import VolumeError
from ossnet.files.nrrd import read_nrrd_header
from ossnet.files.reading import origin_of, read_labels
from ossnet.files.slicer import write_slicer
from ossnet.volume import MARK, LabelMap

OBLIQUE = np.array([[0.3, -0.9, 0.1, 12], [0.9, 0.3, 0, -40.5], [0.1, 0, 2.5, 7], [0, 0, 0, 1.0]])
LABELS = LabelMap(
    np.random.default_rng(0).choice([0, 1, 4], (7, 6, 5)).astype(np.int64),
    OBLIQUE,
    names={1: "left atrium", 3: "nothing here", 4: "Herz\\Kammer:=größer\n2"},
    origin=f"{MARK} 0123456789abcdef fedcba9876543210",
)


def lines_of(file: Path) -> list[str]:
    return file.read_bytes().split(b"\n\n")[0].decode().splitlines()


@pytest.mark.parametrize("largest", [1, 255, 256, 70_000])
def test_what_was_written_comes_back(tmp_path: Path, largest: int) -> None:
    data = np.where(LABELS.data == 4, largest, LABELS.data)
    file = tmp_path / "a.seg.nrrd"
    replace(LABELS, data=data, names={1: "left atrium"}).save(file)
    found = read_labels(file)
    np.testing.assert_array_equal(found.data, data)
    np.testing.assert_allclose(found.affine, OBLIQUE, atol=1e-12)
    assert found.names[1] == "left atrium"
    assert found.holds_classes
    assert origin_of(file) == LABELS.origin
    assert list(tmp_path.iterdir()) == [file]


def test_names_colours_and_segments_that_are_empty(tmp_path: Path) -> None:
    write_slicer(LABELS, tmp_path / "a.seg.nrrd")
    names = read_labels(tmp_path / "a.seg.nrrd").names
    assert names == {1: "left atrium", 3: "nothing here", 4: "Herz/Kammer:=größer 2"}
    lines = lines_of(tmp_path / "a.seg.nrrd")
    assert "Segment2_LabelValue:=4" in lines
    assert "Segment2_Extent:=0 6 0 5 0 4" in lines
    shades = {line.partition("Color:=")[2] for line in lines if "_Color:=" in line}
    assert len(shades) == 3
    assert all(0 <= float(part) <= 1 for shade in shades for part in shade.split())


def test_itk_sees_it_where_it_is(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    write_slicer(LABELS, tmp_path / "a.seg.nrrd")
    image = sitk.ReadImage(str(tmp_path / "a.seg.nrrd"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).transpose(2, 1, 0), LABELS.data)
    assert image.GetMetaData("Segment0_Name") == "left atrium"
    place = image.TransformIndexToPhysicalPoint((6, 5, 4))
    np.testing.assert_allclose(
        np.array(place) * [-1, -1, 1], LABELS.to_world(np.array([[6.0, 5, 4]]))[0], atol=1e-9
    )


@settings(max_examples=40)
@given(st.text(max_size=30))
def test_any_name_leaves_the_header_whole(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    file = tmp_path_factory.mktemp("names") / "a.seg.nrrd"
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    replace(LABELS, names={1: name}).save(file)
    found = read_labels(file)
    np.testing.assert_array_equal(found.data, LABELS.data)
    assert set(found.names) <= {1, 4}


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"ends in \.seg\.nrrd"):
        write_slicer(LABELS, tmp_path / "a.nrrd")
    with pytest.raises(VolumeError, match="negative"):
        replace(LABELS, data=LABELS.data - 1).save(tmp_path / "a.seg.nrrd")
    with pytest.raises(VolumeError, match="beyond 32 bits"):
        replace(LABELS, data=LABELS.data << 40).save(tmp_path / "a.seg.nrrd")
    assert not list(tmp_path.iterdir())


def test_labels_of_one_bit(tmp_path: Path) -> None:
    LabelMap((LABELS.data > 0).astype(np.int8), np.eye(4)).save(tmp_path / "a.seg.nrrd")
    assert read_nrrd_header(tmp_path / "a.seg.nrrd").dtype == np.uint8
    assert read_labels(tmp_path / "a.seg.nrrd").names == {1: "label 1"}

"""DICOM segmentations out: the label map of a series as an object beside it, for archives and their viewers.

What such an object holds: DICOM PS3.3, A.51. Each structure is a binary segment; frames without voxels are left out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt, UInt16

from ossnet.colours import colour, rgb
from ossnet.errors import InputError, VolumeError
from ossnet.files.atomic import atomic_write
from ossnet.files.dicom import Stack, damage_told, header_of, read_stack
from ossnet.files.nifti import unsigned
from ossnet.volume import LabelMap, same_place

_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "SliceThickness",
)
"""Of the patient, the study and the slices (type 2 in PS3.3, C.7)."""


def write_dicom_seg(labels: LabelMap, series: Path | str, path: Path | str, *, version: str = "") -> None:
    """Write a label map as the DICOM segmentation of a series.

    Args:
        labels: On the grid of the series, in any voxel order. `labels.origin` goes into the device's serial number.
        series: A folder with the files of one series, or a file with all of its slices.
        path: The file to be written.
        version: Of what drew them.

    Raises:
        InputError: highdicom is not installed.
        VolumeError: The labels do not lie on the series, hold nothing, or the series lacks what a segmentation must
            name.
        ResourceError: The disk is full.
    """
    series, path = Path(series), Path(path)
    stack = read_stack(series)
    turned = labels.in_order_of(stack)
    if reason := same_place(stack, turned):
        raise VolumeError(
            path, f"labels do not lie on {series.name}: {reason}", "Segment the series on its own grid"
        )
    names = turned.structures()
    if not names:
        raise VolumeError(path, "there is no structure, and a DICOM segmentation needs one", "Use NIfTI")
    files = list(dict.fromkeys(frame.file for frame in stack.frames))
    frames = _frames(unsigned(turned, path), stack, list(names))
    # Colours as in other files of the same label map.
    shown = {labels.values.get(label, label): name for label, name in names.items()}
    made = _segmentation(series, files, frames, shown, version, labels.origin)
    with atomic_write(path) as temporary:
        made.save_as(temporary)


def require_source(series: Path | str) -> None:
    """Refuse a series that no DICOM segmentation can be made for, before there is something to be written.

    Raises:
        InputError: highdicom is not installed.
        VolumeError: The series cannot be read, or lacks what a segmentation must name.
    """
    stack = read_stack(Path(series))
    # Two tell as much as all of them: what they lack, and whether there may be several.
    files = list(dict.fromkeys(frame.file for frame in stack.frames))[:2]
    x, y, _ = stack.shape
    voxel = np.zeros((sum(frame.file in files for frame in stack.frames), y, x), np.uint16)
    voxel[0, 0, 0] = 1
    _segmentation(Path(series), files, voxel, {1: "any"}, "", "")


def _segmentation(
    series: Path,
    files: Sequence[Path],
    frames: UInt16[np.ndarray, "Z Y X"],
    names: Mapping[int, str],
    version: str,
    origin: str,
) -> Any:
    """The object.

    Args:
        files: Of the slices, in order.
        frames: Numbers of segments (0: none), in the order of the files and of the pictures in them.
        names: Label → name of the segments 1, 2, …
    """
    highdicom = require_highdicom()
    try:
        return highdicom.seg.Segmentation(
            source_images=[_source(file) for file in files],
            pixel_array=frames,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[
                _segment(highdicom, n, *named, version) for n, named in enumerate(names.items(), 1)
            ],
            series_instance_uid=highdicom.UID(),
            series_number=1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="ossnet",
            manufacturer_model_name="ossnet",
            software_versions=version or "unknown",
            device_serial_number=origin[:64] or "unknown",
            content_label="SEGMENTATION",
            series_description="Segmentation",
        )
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VolumeError(series, f"no segmentation can be made for it ({reason})", "Use NIfTI") from error


def _source(file: Path) -> Any:
    """What a slice says of patient and study, as highdicom takes it.

    What may be empty is so where it is missing (names were removed) or means nothing. Names of structures are in any
    alphabet, so all texts are. Distances between slices are those of their positions: scanners tell wrong ones.
    """
    header = header_of(file)
    with damage_told(file, "its header"):
        header.decode()
    header.SpecificCharacterSet = "ISO_IR 192"
    if "SpacingBetweenSlices" in header:
        del header.SpacingBetweenSlices
    for name in _MAY_BE_EMPTY:
        if not _has_meaning(name, header.get(name)):
            setattr(header, name, "")
    return header


def _has_meaning(name: str, value: Any) -> bool:
    if value in (None, ""):
        return False
    if name == "PatientSex":
        return value in ("F", "M", "O")
    if not name.endswith(("Date", "Time")):
        return True
    from pydicom.valuerep import DA, TM

    try:
        return bool((DA if name.endswith("Date") else TM)(str(value)))
    except ValueError:
        return False


def require_highdicom() -> Any:
    """The library that writes DICOM segmentations, imported here because it is optional.

    Raises:
        InputError: It is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise InputError(
            "DICOM segmentations",
            "they need highdicom, which is not installed",
            'Run pip install "ossnet[dicom]"',
        ) from error
    return highdicom


def _frames(
    labels: UInt[np.ndarray, "X Y Z"], stack: Stack, values: list[int]
) -> UInt16[np.ndarray, "Z Y X"]:
    """Numbers of segments (0: none), in the order of the series' files and of the pictures in them."""
    slices = np.empty(labels.T.shape, np.uint16)
    for numbers, plane in zip(slices, labels.T, strict=True):
        numbers[...] = np.searchsorted([0, *values], plane)
    if len({frame.file for frame in stack.frames}) > 1:
        return slices
    out = np.empty_like(slices)
    for place, frame in enumerate(stack.frames):
        out[frame.index] = slices[place]
    return out


def _segment(highdicom: Any, number: int, label: int, name: str, version: str) -> Any:
    """A segment in the colour of its label; what kind of tissue a name means is left open, as 3D Slicer does."""
    tissue = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
    family = highdicom.sr.CodedConcept("123110", "DCM", "Artificial Intelligence")
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name.replace("\\", "/")[:64],  # a backslash parts values
        segmented_property_category=tissue,
        segmented_property_type=tissue,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            "ossnet", family, version or "unknown"
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*rgb(colour(label))),
    )

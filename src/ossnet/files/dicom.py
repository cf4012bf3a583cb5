"""DICOM series in: a folder with the slices of one scan, or a file with all of them.

Where a slice lies is taken from its own position and orientation, never from its number or name. A series whose
slices are no stack with equal distances is refused: nothing is filled in. Attributes and their meaning: DICOM
PS3.3, C.7.6.2 (image plane), C.11.1 (rescale) and C.7.6.16 (multi-frame).

Letters: X columns, Y rows, Z slices.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from ossnet.errors import InputError, OssnetError, VolumeError
from ossnet.files.containers import DICOM
from ossnet.files.memory import check_memory
from ossnet.volume import Affine, Shape, Volume

_NO_SCANS = {"SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "FID"}
"""Modalities of what lies beside scans."""

_DIRECTORY = "1.2.840.10008.1.3.10"
"""What a DICOMDIR is, which lists the files of a medium."""

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_APART, _APART_MM, _TURNED = 0.02, 0.1, 1e-3
"""How far slices may lie from an even stack, in distances between them and in mm; and how far directions may differ."""


@dataclass(frozen=True)
class Frame:
    """One slice: where it lies (LPS mm) and what its stored values mean.

    Attributes:
        index: Its place in a file of several.
        position: Centre of the first voxel.
        along: Unit vectors along a row (X) and along a column (Y), as rows.
        spacing: mm between voxels along X and Y.
        thickness: mm, where it is told.
        slope, intercept: Stored value · slope + intercept = value.
    """

    file: Path
    index: int
    shape: tuple[int, int]
    position: Float[np.ndarray, " 3"]
    along: Float[np.ndarray, "2 3"]
    spacing: tuple[float, float]
    thickness: float | None
    slope: float
    intercept: float

    @property
    def normal(self) -> Float[np.ndarray, " 3"]:
        """Across the slice."""
        return np.cross(self.along[0], self.along[1])

    @property
    def whole(self) -> bool:
        """Values are whole numbers."""
        return self.slope == 1 and self.intercept == int(self.intercept)


@dataclass(frozen=True)
class Stack:
    """Slices of one scan in order, and where they lie."""

    path: Path
    frames: tuple[Frame, ...]
    affine: Affine
    channels = 1

    @property
    def shape(self) -> Shape:
        """Voxels along X, Y, Z."""
        return (*self.frames[0].shape, len(self.frames))


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, or a folder holds such files."""
    return bool(marked_in(path, 1)) if path.is_dir() else path.is_file() and _has_mark(path)


def marked_in(folder: Path, most: int | None = None) -> list[Path]:
    """DICOM files of a folder, sorted; at most so many."""
    return list(islice((file for file in _files_in(folder) if _has_mark(file)), most))


def maker_of(file: Path) -> str:
    """What a DICOM segmentation of ours says of its making."""
    return str(header_of(file).get("DeviceSerialNumber", ""))


def holds_scan(folder: Path) -> bool:
    """Whether some DICOM file in a folder is a slice, or may be one."""
    return any(_may_be_scan(file) for file in marked_in(folder))


def dicom_folders(root: Path, depth: int = 6) -> list[Path]:
    """Folders that hold scans as DICOM files: the given one, and those some folders below it."""
    real = root.resolve()
    try:
        # Unlike `Path.is_dir` it does not fail where a link leads into a folder that is closed.
        folders = sorted(p for p in root.iterdir() if os.path.isdir(p) and not p.name.startswith("."))
        here = [root] if holds_scan(root) else []
    except PermissionError:  # such as lost+found
        return []
    # A link to a folder above would lead around for ever.
    below = [p for p in folders if not real.is_relative_to(p.resolve())] if depth else []
    return [*here, *(found for p in below for found in dicom_folders(p, depth - 1))]


def read_stack(path: Path) -> Stack:
    """Look at the headers of a series.

    Args:
        path: A folder with the files of one series, or a file with all of its slices. What is no scan (reports,
            segmentations, screenshots) may lie beside it.

    Raises:
        VolumeError: Several series, slices that are no even stack, attributes that are missing or damaged.
    """
    series: dict[str, list[tuple[Path, Any]]] = {}
    beside: list[tuple[Path, Any]] = []
    for file in _whole_files(path) if path.is_dir() else [path]:
        header = header_of(file)
        with damage_told(file, "its header"):
            scan, cut = _is_scan(header), _is_cut(header)
        if scan:
            series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((file, header))
        elif cut:
            raise VolumeError(
                file,
                "it ends within its header",
                "Copy or export it again, or take it away if it is not a slice",
            )
        else:
            beside.append((file, header))
    # A slice that lacks something is no other picture.
    strange = [
        (file, header) for file, header in beside if str(header.get("SeriesInstanceUID", "")) in series
    ]
    if strange or not series:
        raise _no_scan(path, *(strange or beside)[0])
    if len(series) > 1:
        listed = ", ".join(f"{_name(found[0][1])!r} ({len(found)} files)" for found in series.values())
        raise VolumeError(
            path,
            f"it holds {len(series)} series: {listed}",
            "Move the one that is meant into a folder of its own, or convert it with dcm2niix",
        )
    ((uid, found),) = series.items()
    frames = [frame for file, header in found for frame in _frames(file, header)]
    if path.is_file() and len(frames) == 1:
        for other in marked_in(path.parent):
            if not other.samefile(path) and str(header_of(other).get("SeriesInstanceUID", "")) == uid:
                raise VolumeError(path, "it is one slice of a series", f"Name its folder: {path.parent}")
    return _stacked(path, frames)


def read_series(path: Path) -> Volume:
    """Read a series.

    Args:
        path: As for `read_stack`.

    Returns:
        Voxels (1, X, Y, Z): rows run along X, columns along Y, slices in the order of the normal. In the smallest
        integer type that holds them where values are whole numbers, otherwise float32.

    Raises:
        VolumeError: As `read_stack`; or pixels that are damaged, or compressed in a way that cannot be read.
        ResourceError: The scan does not fit into memory.
    """
    stack = read_stack(path)
    x, y, z = stack.shape
    whole = all(frame.whole for frame in stack.frames)
    check_memory(path, x * y * z * (2 if whole else 4))
    data = np.empty((1, z, y, x), np.uint8 if whole else np.float32)
    low = high = 0
    places: dict[Path, list[int]] = {}
    for place, frame in enumerate(stack.frames):
        places.setdefault(frame.file, []).append(place)
    for file, inside in places.items():
        stored = _decoded(file)
        for place in inside:
            frame = stack.frames[place]
            values = _valued(stored if stored.ndim == 2 else stored[frame.index], frame)
            if whole:
                low, high = min(low, int(values.min())), max(high, int(values.max()))
                data = data.astype(_holding(low, high), copy=False)
            data[0, place] = values
    return Volume(data=data.transpose(0, 3, 2, 1), affine=stack.affine, source=path)


def _holding(low: int, high: int) -> np.dtype[Any]:
    """The smallest integer type for values in this range."""
    kinds = (np.uint8, np.int16, np.uint16, np.int32, np.int64)
    return np.dtype(next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max))


def _files_in(folder: Path) -> Iterator[Path]:
    return (f for f in sorted(folder.iterdir()) if os.path.isfile(f) and not f.name.startswith("."))


def _has_mark(file: Path) -> bool:
    with suppress(OSError), file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"
    return False


def _whole_files(folder: Path) -> list[Path]:
    """DICOM files of a folder.

    Raises:
        VolumeError: Some cannot be read, or are cut off before DICOM's mark: at an end of the stack nothing else would
            tell that a slice is missing. Those that are cut off later are found by what they say (`_is_cut`).
    """
    marked = marked_in(folder)
    known = set(marked)
    # Slices on a CD have no ending: IM0001, IM0002, …
    alike = {_without_digits(file) for file in marked}
    for file in _files_in(folder):
        if file in known:
            continue
        named = file.suffix.lower() in DICOM or _without_digits(file) in alike
        try:
            with file.open("rb") as stream:
                empty = not stream.read(1)
        except OSError as error:
            if not named:
                continue
            raise VolumeError(file, f"cannot be read ({error.strerror})", "Check its permissions") from error
        # Marks of a finished export (_SUCCESS, DONE) are empty, and have no numbers.
        if named or (empty and re.search(r"\d", file.name)):
            raise VolumeError(file, "it is damaged: DICOM's mark is not in it", "Copy or export it again")
    return marked


def _without_digits(file: Path) -> str:
    return re.sub(r"\d+", "0", file.name)


def _pydicom() -> Any:
    """Imported here because it is optional."""
    try:
        import pydicom
    except ImportError as error:
        raise InputError(
            "DICOM", "it is read with pydicom, which is not installed", 'Run pip install "ossnet[dicom]"'
        ) from error
    return pydicom


@contextmanager
def damage_told(file: Path, what: str) -> Iterator[None]:
    """What a damaged file makes of itself in pydicom, whose errors have no common base: one message."""
    try:
        yield
    except (OssnetError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise VolumeError(file, f"{what} cannot be read ({reason[:200]})", "Export it again") from error


def header_of(file: Path) -> Any:
    """All but the pixels.

    Raises:
        VolumeError: The file is damaged.
    """
    pydicom = _pydicom()
    with damage_told(file, "its header"):
        return pydicom.dcmread(file, stop_before_pixels=True)


def _name(header: Any) -> str:
    """Of a series, for people."""
    told = [header.get(key) for key in ("SeriesNumber", "SeriesDescription")]
    return " ".join(str(part) for part in told if part not in (None, "")) or str(header.get("Modality", ""))


def _is_scan(header: Any) -> bool:
    """Grey values with a place, not a report, a picture or a contour."""
    placed = "ImagePositionPatient" in header or "PerFrameFunctionalGroupsSequence" in header
    return (
        placed and "Rows" in header and not _is_coloured(header) and header.get("Modality") not in _NO_SCANS
    )


def _is_cut(header: Any) -> bool:
    """Whether a file that is no scan would be one, or might, if it did not end within its header."""
    if getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID") == _DIRECTORY:
        return False
    if "SOPClassUID" not in header or "SeriesInstanceUID" not in header:
        return True
    # The name of what it is, as the standard has it: "CT Image Storage".
    return "Image" in getattr(header.SOPClassUID, "name", "") and "Rows" not in header


def _may_be_scan(file: Path) -> bool:
    """As `_is_scan`; where a file is damaged, or pydicom is not installed, more is said when it is read."""
    try:
        header = header_of(file)
        with damage_told(file, "its header"):
            return _is_scan(header) or _is_cut(header)
    except InputError:
        return True


def _is_coloured(header: Any) -> bool:
    return (
        header.get("SamplesPerPixel") not in (None, 1)
        or header.get("PhotometricInterpretation") == "PALETTE COLOR"
    )


def _no_scan(path: Path, file: Path, header: Any) -> VolumeError:
    """Why there is none, from one of the files that are there instead."""
    if "Rows" not in header or header.get("Modality") in _NO_SCANS:
        return VolumeError(path, "there are no DICOM images in it", "Name a folder with the slices of a scan")
    if _is_coloured(header):
        return VolumeError(file, "it holds colours", "Use the scan itself, not a picture of it")
    return VolumeError(
        file,
        "it does not say where it lies in the patient (ImagePositionPatient)",
        "Export the original series: pictures and projections have no place",
    )


def _frames(file: Path, header: Any) -> list[Frame]:
    """The slices of a file: one, or as many as a multi-frame file has."""
    with damage_told(file, "its header"):
        if "MOSAIC" in (header.get("ImageType") or ()):
            raise VolumeError(
                file, "its slices are tiles of one picture (mosaic)", "Convert it with dcm2niix"
            )
        several = list(header.get("PerFrameFunctionalGroupsSequence") or ())
        count = int(header.get("NumberOfFrames") or 1)
        if count != max(len(several), 1):
            raise VolumeError(
                file,
                f"it holds {count} pictures and says of {len(several)} where they lie",
                "Convert it with dcm2niix",
            )
        shared = list(header.get("SharedFunctionalGroupsSequence") or ())
        return [
            _frame(file, n, header, [group, *shared, header]) for n, group in enumerate(several or [header])
        ]


def _frame(file: Path, index: int, header: Any, places: Sequence[Any]) -> Frame:
    position = _numbers(file, places, "PlanePositionSequence", "ImagePositionPatient", 3)
    along = _numbers(file, places, "PlaneOrientationSequence", "ImageOrientationPatient", 6).reshape(2, 3)
    rows_mm, columns_mm = _numbers(file, places, "PixelMeasuresSequence", "PixelSpacing", 2)
    lengths = np.linalg.norm(along, axis=1, keepdims=True)
    if min(rows_mm, columns_mm) <= 0 or np.abs(lengths - 1).max() > 0.1 or abs(along[0] @ along[1]) > 0.01:
        raise VolumeError(file, "its voxel sizes or directions have no meaning", "Export it again")
    thickness = 0.0
    with suppress(VolumeError, ValueError):  # only a single slice needs it
        thickness = float(_numbers(file, places, "PixelMeasuresSequence", "SliceThickness", 1)[0])
    transformation = "PixelValueTransformationSequence"
    return Frame(
        file,
        index,
        (int(header.Columns), int(header.Rows)),
        position,
        along / lengths,
        (float(columns_mm), float(rows_mm)),
        thickness if thickness > 0 else None,
        float(_numbers(file, places, transformation, "RescaleSlope", 1, "1")[0]),
        float(_numbers(file, places, transformation, "RescaleIntercept", 1, "0")[0]),
    )


def _numbers(
    file: Path, places: Sequence[Any], group: str, name: str, count: int, default: str | None = None
) -> Float[np.ndarray, " N"]:
    """An attribute of a slice, wherever it stands: in its own functional group, a shared one, or the header.

    Raises:
        VolumeError: It is missing and has no default, or is not so many finite numbers.
    """
    holders = [holder for place in places for holder in (*(place.get(group) or ()), place)]
    found = next((v for h in holders if (v := h.get(name)) not in (None, "")), default)
    values = np.array([] if found is None else found, np.float64).reshape(-1)
    if values.shape != (count,) or not np.isfinite(values).all():
        told = "missing" if found is None else f"{found!s:.60}"
        raise VolumeError(file, f"its {name} is {told}", "Export the original series")
    return values


def _stacked(path: Path, frames: Sequence[Frame]) -> Stack:
    """Slices in order, and their affine.

    Raises:
        VolumeError: They differ in more than their place, or do not lie at equal distances.
    """
    first = frames[0]
    for frame in frames[1:]:
        if frame.shape != first.shape:
            raise _odd(path, first, frame, f"{frame.shape[0]} × {frame.shape[1]} voxels")
        if not np.allclose(frame.spacing, first.spacing, rtol=_TURNED):
            raise _odd(path, first, frame, f"voxels of {frame.spacing[0]:g} × {frame.spacing[1]:g} mm")
        if np.abs(frame.along - first.along).max() > _TURNED:
            raise _odd(path, first, frame, "another orientation")
    ordered = sorted(frames, key=lambda frame: float(frame.position @ first.normal))
    positions = np.array([frame.position for frame in ordered])
    step = first.normal * (first.thickness or 1.0)
    if len(ordered) > 1:
        depths = positions @ first.normal
        gaps = np.diff(depths)
        usual = float(np.median(gaps))
        if gaps.min() <= 1e-3:
            at = int(gaps.argmin())
            raise VolumeError(
                path,
                f"{ordered[at].file.name} and {ordered[at + 1].file.name} lie at the same place",
                "Keep one time, echo or copy of each slice",
            )
        if gaps.max() > 1.5 * usual:
            at = int(gaps.argmax())
            raise VolumeError(
                path,
                f"a slice is missing between {ordered[at].file.name} and {ordered[at + 1].file.name}: they lie "
                f"{gaps[at]:.3g} mm apart, others {usual:.3g} mm",
                "Export the whole series",
            )
        step = (positions[-1] - positions[0]) / (len(ordered) - 1)
        even = positions[0] + np.arange(len(ordered))[:, None] * step
        off = np.linalg.norm(positions - even, axis=1)
        if off.max() > max(_APART * np.linalg.norm(step), _APART_MM):
            raise VolumeError(
                path,
                f"its slices do not lie at equal distances: {ordered[int(off.argmax())].file.name} is "
                f"{off.max():.2g} mm beside an even stack",
                "Resample it to even slices",
            )
    affine = np.eye(4)
    affine[:3, 0] = first.along[0] * first.spacing[0]
    affine[:3, 1] = first.along[1] * first.spacing[1]
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    return Stack(path, tuple(ordered), _LPS_TO_RAS @ affine)


def _odd(path: Path, first: Frame, other: Frame, what: str) -> VolumeError:
    return VolumeError(
        path,
        f"its slices are of several kinds: {other.file.name} has {what}, unlike {first.file.name}",
        "Move the slices of one scan into a folder of their own",
    )


def _decoded(file: Path) -> Num[np.ndarray, "*frames Y X"]:
    """Stored values of all slices of a file."""
    pydicom = _pydicom()
    with damage_told(file, "its pixels"):
        stored = np.asarray(pydicom.dcmread(file).pixel_array)
    if stored.dtype.kind not in "iu":
        raise VolumeError(file, f"its voxels are stored as {stored.dtype}", "Convert it with dcm2niix")
    return stored


def _valued(stored: Num[np.ndarray, "Y X"], frame: Frame) -> Num[np.ndarray, "Y X"]:
    """What stored values mean."""
    if frame.slope == 1 and frame.intercept == 0:
        return stored
    kind = np.int64 if frame.whole else np.float64
    return np.asarray(stored.astype(kind) * kind(frame.slope) + kind(frame.intercept))

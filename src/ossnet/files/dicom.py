"""DICOM series in: a folder with the slices of one scan, or a file with all of them.

Where a slice lies is taken from its own position and orientation, never from its number or name. A series whose
slices are no stack with equal distances is refused: nothing is filled in. Attributes and their meaning: DICOM
PS3.3, C.7.6.2 (image plane), C.11.1 (rescale) and C.7.6.16 (multi-frame).

Letters: X columns, Y rows, Z slices.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from ossnet.errors import InputError, VolumeError
from ossnet.files.memory import check_memory
from ossnet.volume import Affine, Shape, Volume

_NO_IMAGES = {"SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "FID"}
"""Modalities of what lies beside scans."""

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_APART, _TURNED = 0.02, 1e-3
"""How far slices may lie from an even stack, in distances between slices; and how far directions may differ."""


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
        least, most: Stored values that the type allows.
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
    least: int
    most: int

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

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest integer type that holds all values, or float32."""
        if not all(frame.whole for frame in self.frames):
            return np.dtype(np.float32)
        low = min(int(f.least + f.intercept) for f in self.frames)
        high = max(int(f.most + f.intercept) for f in self.frames)
        for kind in (np.uint8, np.int16, np.uint16):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return np.dtype(kind)
        return np.dtype(np.int32)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, or a folder holds such files."""
    if path.is_dir():
        return any(_has_mark(file) for file in files_in(path))
    return path.is_file() and _has_mark(path)


def dicom_folders(root: Path, depth: int = 4) -> list[Path]:
    """Folders that hold DICOM files: the given one, and those some folders below it."""
    below = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if depth else []
    return [
        *([root] if is_dicom(root) else []),
        *(found for p in below for found in dicom_folders(p, depth - 1)),
    ]


def read_stack(path: Path) -> Stack:
    """Look at the headers of a series.

    Args:
        path: A folder with the files of one series (others that hold no images may lie beside them), or one file.

    Raises:
        VolumeError: Several series, colours, slices that are no even stack, or attributes that are missing.
    """
    frames: dict[str, list[Frame]] = {}
    names: dict[str, str] = {}
    for file in files_in(path) if path.is_dir() else [path]:
        if path.is_dir() and not _has_mark(file):
            continue
        header = _header(file)
        if "Rows" not in header or str(header.get("Modality", "")) in _NO_IMAGES:
            continue
        uid = str(header.get("SeriesInstanceUID", ""))
        number = header.get("SeriesNumber")
        told = [str(part) for part in (number, header.get("SeriesDescription")) if part not in (None, "")]
        names.setdefault(uid, " ".join(told) or uid)
        frames.setdefault(uid, []).extend(_frames(file, header))
    if not frames:
        raise VolumeError(path, "there are no DICOM images in it", "Name a folder with the slices of a scan")
    if len(frames) > 1:
        listed = ", ".join(f"{names[uid]!r} ({len(found)} slices)" for uid, found in frames.items())
        raise VolumeError(
            path,
            f"it holds {len(frames)} series: {listed}",
            "Move the one that is meant into a folder of its own",
        )
    return _stacked(path, next(iter(frames.values())))


def read_series(path: Path) -> Volume:
    """Read a series.

    Args:
        path: As for `read_stack`.

    Returns:
        Voxels (1, X, Y, Z): rows run along X, columns along Y, slices in the order of the normal. In the smallest
        integer type where values are whole numbers, otherwise float32.

    Raises:
        VolumeError: As `read_stack`; or pixels that are damaged, or compressed in a way that cannot be read.
        ResourceError: The scan does not fit into memory.
    """
    stack = read_stack(path)
    x, y, z = stack.shape
    check_memory(path, x * y * z * stack.dtype.itemsize)
    data = np.empty((1, z, y, x), stack.dtype)
    places: dict[Path, list[int]] = {}
    for place, frame in enumerate(stack.frames):
        places.setdefault(frame.file, []).append(place)
    for file, inside in places.items():
        stored = _decoded(file)
        for place in inside:
            frame = stack.frames[place]
            data[0, place] = _valued(stored if stored.ndim == 2 else stored[frame.index], frame)
    return Volume(data=data.transpose(0, 3, 2, 1), affine=stack.affine, source=path)


def files_in(folder: Path) -> list[Path]:
    """Files that are not hidden, sorted."""
    return sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))


def _has_mark(file: Path) -> bool:
    with suppress(OSError), file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"
    return False


def _pydicom() -> Any:
    """Imported here because it is optional."""
    try:
        import pydicom
    except ImportError as error:
        raise InputError(
            "DICOM", "it is read with pydicom, which is not installed", 'Run pip install "ossnet[dicom]"'
        ) from error
    return pydicom


def _header(file: Path) -> Any:
    pydicom = _pydicom()
    try:
        return pydicom.dcmread(file, stop_before_pixels=True)
    except (pydicom.errors.InvalidDicomError, OSError, ValueError, KeyError, EOFError) as error:
        raise VolumeError(file, f"it cannot be read as DICOM ({error})", "Export it again") from error


def _frames(file: Path, header: Any) -> Iterator[Frame]:
    """The slices of a file: one, or as many as a multi-frame file has."""
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise VolumeError(file, "it holds colours", "Use the scan itself, not a picture of it")
    bits, signed = int(header.get("BitsStored", 16)), bool(int(header.get("PixelRepresentation", 0)))
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    several = list(header.get("PerFrameFunctionalGroupsSequence", []))
    shared = list(header.get("SharedFunctionalGroupsSequence", []))
    for index, group in enumerate(several or [header]):
        places = [group, *shared, header]
        try:
            position = _find(places, "PlanePositionSequence", "ImagePositionPatient")
            orientation = _find(places, "PlaneOrientationSequence", "ImageOrientationPatient")
            rows_mm, columns_mm = (float(v) for v in _find(places, "PixelMeasuresSequence", "PixelSpacing"))
        except (KeyError, TypeError, ValueError) as error:
            raise VolumeError(
                file,
                f"it does not say where it lies in the patient ({error.args[0]})",
                "Export the original series: pictures and projections have no place",
            ) from error
        thickness = _find(places, "PixelMeasuresSequence", "SliceThickness", None)
        slope = _find(places, "PixelValueTransformationSequence", "RescaleSlope", 1)
        intercept = _find(places, "PixelValueTransformationSequence", "RescaleIntercept", 0)
        along = np.array([float(v) for v in orientation]).reshape(2, 3)
        yield Frame(
            file,
            index,
            (int(header.Columns), int(header.Rows)),
            np.array([float(v) for v in position]),
            along / np.linalg.norm(along, axis=1, keepdims=True),
            (columns_mm, rows_mm),
            float(thickness) if thickness else None,
            float(slope if slope is not None else 1),
            float(intercept if intercept is not None else 0),
            least,
            most,
        )


_REQUIRED = object()


def _find(places: Sequence[Any], group: str, name: str, default: Any = _REQUIRED) -> Any:
    """An attribute of a slice, wherever it stands: in its own functional group, a shared one, or the header."""
    for place in places:
        inner = place.get(group)
        for holder in (*(inner or ()), place):
            if (value := holder.get(name)) not in (None, ""):
                return value
    if default is _REQUIRED:
        raise KeyError(name)
    return default


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
        if off.max() > max(_APART * np.linalg.norm(step), 0.01):
            raise VolumeError(
                path,
                f"its slices do not lie at equal distances: {ordered[int(off.argmax())].file.name} is "
                f"{off.max():.2g} mm beside an even stack",
                "Resample it to even slices, for example with dcm2niix",
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
    try:
        return np.asarray(pydicom.dcmread(file).pixel_array)
    except (
        RuntimeError,
        NotImplementedError,
        ValueError,
        AttributeError,
        KeyError,
        OSError,
        EOFError,
    ) as error:
        reason = " ".join(str(error).split())
        raise VolumeError(
            file, f"its pixels cannot be read ({reason[:200]})", "Export it again, uncompressed if need be"
        ) from error


def _valued(stored: Num[np.ndarray, "Y X"], frame: Frame) -> Num[np.ndarray, "Y X"]:
    """What stored values mean."""
    if frame.slope == 1 and frame.intercept == 0:
        return stored
    kind = np.int64 if frame.whole else np.float64
    return np.asarray(stored.astype(kind) * kind(frame.slope) + kind(frame.intercept))

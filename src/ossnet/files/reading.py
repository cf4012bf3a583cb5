"""Scans and label maps in, whatever holds them: NIfTI, NRRD and MetaImage files or DICOM series.

Headers are checked before anything is allocated, then exactly the voxels that they promise are read. Voxels keep the
type of the file where they are not scaled.
"""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from ossnet.errors import VolumeError
from ossnet.files.containers import METAIMAGE, NRRD, is_slicer_segmentation, locate
from ossnet.files.dicom import Stack, is_dicom, maker_of, marked_in, read_series, read_stack
from ossnet.files.header import Header, VolumeWarning
from ossnet.files.memory import check_memory
from ossnet.files.metaimage import read_metaimage_header
from ossnet.files.nifti import names_in
from ossnet.files.nifti_header import read_nifti_header
from ossnet.files.nrrd import read_nrrd_header
from ossnet.files.voxels import Nonfinite, finite, integral, read_voxels, scaled
from ossnet.volume import LabelMap, Volume, same_place

__all__ = [
    "Nonfinite",
    "files_of",
    "look_at",
    "look_at_channels",
    "origin_of",
    "read_header",
    "read_image",
    "read_labels",
    "read_volume",
]


def read_header(path: Path | str) -> Header:
    """Read and check the header of an image file, as its name says of which format, without touching its voxels.

    Customary readings of unclear headers are warned of (`VolumeWarning`).

    Raises:
        VolumeError: The file is missing, is not an image, or its header cannot be trusted.
    """
    header = _header(Path(path))
    for note in header.warnings:
        warnings.warn(f"{header.path}: {note}.", VolumeWarning, stacklevel=2)
    return header


def _header(path: Path) -> Header:
    """As `read_header`, without a word."""
    name = path.name.lower()
    if name.endswith(NRRD):
        return read_nrrd_header(path)
    return read_metaimage_header(path) if name.endswith(METAIMAGE) else read_nifti_header(path)


def look_at(path: Path | str) -> Header | Stack:
    """What an image file or a DICOM series says of its voxels: shape, affine, channels.

    Raises:
        VolumeError: It cannot be trusted.
    """
    path = Path(path)
    return read_stack(path) if is_dicom(path) else read_header(path)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that a scan is made of, as far as they say: one, a header and its voxels, or slices.

    Raises:
        VolumeError: It is none that can be read, or its voxels are missing.
    """
    if path.is_dir():
        return tuple(marked_in(path))
    if is_dicom(path):
        return (path,)
    if not path.name.lower().endswith((*NRRD, *METAIMAGE)):
        return tuple(dict.fromkeys(locate(path)))
    with suppress(VolumeError):
        return tuple(dict.fromkeys((path, _header(path).data_path)))
    return (path,)


def read_volume(paths: Path | str | Sequence[Path | str], *, nonfinite: Nonfinite = "refuse") -> Volume:
    """Read a scan.

    Args:
        paths: An image file with any number of channels, a folder with the DICOM files of one series, or
            several of these with one channel each that lie on each other and become the channels in the order given.
        nonfinite: NaN, infinite voxels and those that float32 does not hold (fill values of doubles) are refused, or
            replaced by the nearest finite value of their channel (NaN, which most programs write outside of the scan,
            by the smallest) with a warning.

    Returns:
        Voxels (C, X, Y, Z) in the type of the file where they are neither scaled nor doubles, otherwise float32. Axes
        in the order of the file.

    Raises:
        VolumeError: A file cannot be trusted, or files do not lie on each other.
        ResourceError: The scan does not fit into memory.
    """
    if isinstance(paths, (str, Path)):
        return _read_one(Path(paths), nonfinite)
    files = [Path(p) for p in paths]
    if len(files) == 1:
        return _read_one(files[0], nonfinite)
    first = look_at_channels(files)[0]
    volumes = [_read_one(f, nonfinite) for f in files]
    kind = np.result_type(*(v.data for v in volumes))
    if kind == np.float64:  # as of int32 beside float32
        kind = np.dtype(np.float32)
    check_memory(first.path, sum(v.data.size for v in volumes) * kind.itemsize)
    return replace(
        volumes[0], data=np.concatenate([v.data for v in volumes], dtype=kind, casting="same_kind")
    )


def look_at_channels(files: Sequence[Path]) -> list[Header | Stack]:
    """What the files of one scan say of their voxels.

    Raises:
        VolumeError: One cannot be trusted, or several do not hold one channel each on one grid.
    """
    if not files:
        raise VolumeError("scan", "no files were given", "Name at least one image")
    first, *others = headers = [look_at(f) for f in files]
    for header in headers if others else ():
        if header.channels != 1:
            raise VolumeError(
                header.path,
                f"has {header.channels} channels, but each of several files must hold one",
                "Give this file alone, or split it",
            )
    for header in others:
        if reason := same_place(first, header):
            raise VolumeError(
                header.path,
                f"does not lie on {first.path.name}: {reason}",
                "Resample all channels onto one grid",
            )
    return headers


def read_image(path: Path | str, *, nonfinite: Nonfinite = "refuse") -> Volume:
    """Read the scan in one file (see `read_volume`)."""
    header = read_header(path)
    raw, _ = read_voxels(header)
    data = finite(scaled(raw, header), header, nonfinite)
    return Volume(data=data, affine=header.affine, source=header.path, header=header.file_header)


def read_labels(path: Path | str) -> LabelMap:
    """Read a label map (X, Y, Z), in the smallest unsigned type that holds its labels.

    Labels stored as floating point numbers are accepted where all are within 1e-3 of whole numbers.
    Label names are those that `write_labels` or 3D Slicer (`.seg.nrrd`) wrote.

    Raises:
        VolumeError: The file cannot be trusted, has several channels, or does not hold labels.
        ResourceError: The labels do not fit into memory.
    """
    header = read_header(path)
    if header.channels != 1:
        fix = "Split the file"
        if is_slicer_segmentation(header.path):
            fix = "Its segments overlap: export them to a label map in 3D Slicer"
        raise VolumeError(header.path, f"holds {header.channels} volumes, one is needed", fix)
    raw, before = read_voxels(header)
    return LabelMap(
        data=integral(raw[0], header),
        affine=header.affine,
        source=header.path,
        header=header.file_header,
        names=header.names or names_in(before),
        origin=header.origin,
        cropped=is_slicer_segmentation(header.path),
    )


def origin_of(path: Path | str) -> str:
    """What a file says of its making (`LabelMap.origin`); empty where it says nothing, or is no image."""
    path = Path(path)
    try:
        return maker_of(path) if is_dicom(path) else read_header(path).origin
    except VolumeError:
        return ""


def _read_one(path: Path, nonfinite: Nonfinite) -> Volume:
    return read_series(path) if is_dicom(path) else read_image(path, nonfinite=nonfinite)

"""Scans in, whatever holds them: NIfTI files or DICOM series."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ossnet.errors import VolumeError
from ossnet.files.dicom import Stack, is_dicom, read_series, read_stack
from ossnet.files.memory import check_memory
from ossnet.files.nifti import Nonfinite, read_image
from ossnet.files.validate import Header, read_header
from ossnet.volume import Volume, same_place


def look_at(path: Path | str) -> Header | Stack:
    """What a NIfTI file or a DICOM series says of its voxels: shape, affine, channels.

    Raises:
        VolumeError: It cannot be trusted.
    """
    path = Path(path)
    return read_stack(path) if is_dicom(path) else read_header(path)


def read_volume(paths: Path | str | Sequence[Path | str], *, nonfinite: Nonfinite = "refuse") -> Volume:
    """Read a scan.

    Args:
        paths: A NIfTI file with any number of channels (fourth axis), a folder with the DICOM files of one series, or
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
    if not files:
        raise VolumeError("scan", "no files were given", "Name at least one image")
    if len(files) == 1:
        return _read_one(files[0], nonfinite)
    first, *others = headers = [look_at(f) for f in files]
    for header in headers:
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
    volumes = [_read_one(f, nonfinite) for f in files]
    check_memory(first.path, sum(v.data.nbytes for v in volumes))
    return replace(volumes[0], data=np.concatenate([v.data for v in volumes]))


def _read_one(path: Path, nonfinite: Nonfinite) -> Volume:
    return read_series(path) if is_dicom(path) else read_image(path, nonfinite=nonfinite)

"""What NRRD and MetaImage have in common: a header of text, then the voxels, in the same file or beside it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from ossnet.errors import VolumeError
from ossnet.files.containers import opened, read_up_to, truncated
from ossnet.files.header import REWRITE, Header, check_size, sound, times
from ossnet.volume import FileHeader

_T = TypeVar("_T", int, float)
_MOST = 1 << 20
"""Bytes of a header: those of 3D Slicer, with hundreds of segments, have some ten thousand."""


def start_of(path: Path) -> bytes:
    """The beginning of a file, in which its header must end."""
    with opened(path, gz=False) as stream:
        return read_up_to(stream, _MOST)


def unfinished(path: Path, block: bytes) -> VolumeError:
    """The error for a header that does not end in what `start_of` read."""
    if len(block) < _MOST:
        return truncated(path)
    return VolumeError(path, f"its header does not end within {_MOST:,} bytes", REWRITE)


def needed(fields: Mapping[str, str], name: str, path: Path) -> str:
    """A field that must be there."""
    if name not in fields:
        raise VolumeError(path, f"its header lacks the field {name!r}", REWRITE)
    return fields[name]


def numbers(text: str, kind: Callable[[str], _T], count: int | None, what: str, path: Path) -> list[_T]:
    """The numbers in a line, as many as there must be."""
    try:
        found = [kind(word) for word in text.split()]
    except ValueError:
        raise VolumeError(path, f"{what} are no numbers: {text[:80]!r}", REWRITE) from None
    if count is not None and len(found) != count:
        raise VolumeError(path, f"{count} numbers are needed as {what}, not {text[:80]!r}", REWRITE)
    return found


def whole(text: str, what: str, path: Path) -> int:
    """The one whole number in a line."""
    return numbers(text, int, 1, what, path)[0]


def axes(text: str, path: Path) -> int:
    """How many axes are stored."""
    count = whole(text, "dimensions", path)
    if count not in (3, 4):
        raise VolumeError(path, f"it has {count} axes, a scan has 3, or 4 with channels", "Use another file")
    return count


def voxel_type(
    named: str, types: Mapping[str, str], big: bool, path: Path
) -> tuple[np.dtype[np.generic], bool]:
    """Voxel type in native byte order, and whether the file has the other one.

    Args:
        types: Name → numpy's.
        big: The first byte of a value is its most significant.
    """
    if named not in types:
        raise VolumeError(
            path, f"its voxels are of the type {named[:40]!r}", "Save it with integer or float voxels"
        )
    stored: np.dtype[np.generic] = np.dtype((">" if big else "<") + types[named])
    return np.dtype(types[named]), not stored.isnative


def voxel_file(path: Path, named: str) -> Path:
    """The file beside a header that holds the voxels."""
    data_path = path.parent / named
    try:
        if data_path.is_file():
            return data_path
    except OSError:
        pass  # a name that is too long, or may not be looked for
    if named.split()[:1] in ([], ["LIST"]) or re.search(r"%\d*d", named):
        raise VolumeError(
            path, "its voxels lie in several files", "Save it as one file with the program that wrote it"
        )
    raise VolumeError(path, f"its voxels are in {named[:80]!r}, and there is no such file", "Copy it as well")


def checked(
    path: Path,
    sizes: Sequence[int],
    channel_axis: int | None,
    affine: np.ndarray,
    dtype: np.dtype[np.generic],
    *,
    data_path: Path,
    offset: int,
    swapped: bool,
    packed: Literal["gzip", "zlib"] | None,
    notes: Sequence[str],
    names: dict[int, str] | None = None,
    origin: str = "",
) -> Header:
    """The header of an image whose place and size can be trusted.

    Args:
        sizes: Of the stored axes, fastest first.
        channel_axis: Which of them is none in space.
        affine: Voxel index → mm, RAS+.
        offset: Bytes before the voxels; -1: they are the last bytes of the file.
        notes: Readings that were chosen.
        names: Label value → name, where the file says them.
        origin: What it says of its making.

    Raises:
        VolumeError: It cannot be trusted.
    """
    if min(sizes) < 1:
        raise VolumeError(path, f"an axis has no voxels: the header claims {times(list(sizes))}", REWRITE)
    if max(sizes) > 1 << 40:
        raise VolumeError(path, f"an axis has {max(sizes):.3g} voxels", REWRITE)
    x, y, z = (n for axis, n in enumerate(sizes) if axis != channel_axis)
    header = Header(
        path=path,
        shape=(x, y, z),
        channels=1 if channel_axis is None else sizes[channel_axis],
        affine=sound(affine, "place of its voxels", path, "Set valid voxel sizes and directions"),
        dtype=dtype,
        file_header=FileHeader(),
        scale=None,
        data_path=data_path,
        offset=max(offset, 0),
        swapped=swapped,
        channel_axis=3 if channel_axis is None else channel_axis,
        packed=packed,
        named=False,
        names=names or {},
        origin=origin,
        warnings=tuple(notes),
    )
    check_size(path, data_path, header.offset + header.nbytes, packed is not None)
    if offset >= 0:
        return header
    return replace(header, offset=data_path.stat().st_size - header.nbytes)

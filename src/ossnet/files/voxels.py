"""Voxels of a file: exactly those that its header promises, and what they stand for."""

import warnings
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Literal, get_args

import numpy as np
from jaxtyping import Integer, Num

from ossnet.errors import SettingsError, VolumeError
from ossnet.files.containers import opened, truncated, unpacked
from ossnet.files.header import Header, VolumeWarning
from ossnet.files.memory import check_memory

_BLOCK = 1 << 22  # values or bytes handled at a time: large enough to be fast, small beside any volume
_MOST_EXTENSION = 1 << 20  # bytes before the voxels that are looked at for label names

Nonfinite = Literal["refuse", "replace"]


def read_voxels(header: Header) -> tuple[Num[np.ndarray, "C X Y Z"], bytes]:
    """The stored values in native byte order and the file's memory order, and the bytes right before them.

    The file is read to its end, so that a checksum is always compared.

    Raises:
        VolumeError: It is damaged, ends too early, or goes on after the voxels.
        ResourceError: The voxels do not fit into memory.
    """
    check_memory(header.path, header.nbytes)
    # From numpy, so that the array may be written to, as torch wants it.
    flat = np.empty(header.voxels, dtype=header.dtype)
    view = flat.data.cast("B")
    with opened(header.data_path, gz=None if header.named else False) as stream:
        before = _skip(stream, header)
        values = unpacked(stream, header.packed)
        done = 0
        while done < len(view):
            part = values.read(min(_BLOCK, len(view) - done))
            if not part:
                raise truncated(header.data_path)
            view[done : done + len(part)] = part
            done += len(part)
        # Going on to the end makes gzip compare its checksum. More bytes mean that the shape is not the one
        # that was written.
        if values.read(1):
            raise VolumeError(
                header.data_path,
                f"the file goes on after the {header.nbytes:,} bytes of voxels that its header describes",
                "Its shape or type in the header is wrong: write it again from its source",
            )
    if header.swapped:
        flat.byteswap(inplace=True)
    stored = flat.reshape(header.stored_shape[::-1]).transpose()
    return np.moveaxis(stored, header.channel_axis, 0), before


def _skip(stream: BufferedIOBase, header: Header) -> bytes:
    """Go to the first voxel; the last bytes before it, where extensions are."""
    kept = b""
    left = header.offset
    while left > 0:
        part = stream.read(min(_MOST_EXTENSION, left))
        if not part:
            raise truncated(header.data_path)
        if len(kept) < _MOST_EXTENSION:
            kept += part
        left -= len(part)
    return kept


def slabs(array: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Index pieces (…, z range) so that temporary arrays stay small beside the volume."""
    depth = array.shape[-1]
    step = max(1, _BLOCK * depth // max(array.size, 1))
    for start in range(0, depth, step):
        yield (..., slice(start, start + step))  # type: ignore[misc]  # an Ellipsis is an index too


def scaled(raw: Num[np.ndarray, "C X Y Z"], header: Header) -> Num[np.ndarray, "C X Y Z"]:
    """Values from stored values: slope · stored + intercept, in float32; what it does not hold becomes infinite."""
    slope, intercept = header.scale or (1.0, 0.0)
    if header.scale is None and raw.dtype != np.float64:
        return raw
    check_memory(header.path, raw.size * np.dtype(np.float32).itemsize)
    out = np.empty_like(raw, dtype=np.float32)  # same memory order
    for piece in slabs(raw):
        with np.errstate(all="ignore"):
            # Products in float64: int32 times a slope loses digits in float32.
            out[piece] = raw[piece].astype(np.float64) * slope + intercept
    return out


def finite(
    data: Num[np.ndarray, "C X Y Z"], header: Header, nonfinite: Nonfinite
) -> Num[np.ndarray, "C X Y Z"]:
    """The same values where all are finite; otherwise a refusal, or others in their place, in place."""
    if nonfinite not in get_args(Nonfinite):
        raise SettingsError("nonfinite", f"it is {nonfinite!r}", "Give 'refuse' or 'replace'")
    if data.dtype.kind != "f":
        return data
    bad = sum(int((~np.isfinite(data[piece])).sum()) for piece in slabs(data))
    if not bad:
        return data
    share = f"{bad:,} of {data.size:,} voxels are NaN or infinite"
    if header.dtype == np.float64 or header.scale is not None:
        share += ", or too large for float32"
    if nonfinite == "refuse" or bad == data.size:
        raise VolumeError(
            header.path,
            share,
            "There is nothing to see in it"
            if bad == data.size
            else "Write finite values there, or let them be replaced: --replace-nan, nonfinite='replace'",
        )
    warnings.warn(f"{header.path}: {share}; they are replaced.", VolumeWarning, stacklevel=4)
    for channel in data:
        good = channel[np.isfinite(channel)]
        low, high = (good.min(), good.max()) if good.size else (0.0, 0.0)
        np.nan_to_num(channel, copy=False, nan=low, posinf=high, neginf=low)
    return data


def integral(raw: Num[np.ndarray, "X Y Z"], header: Header) -> Integer[np.ndarray, "X Y Z"]:
    """Labels as the smallest unsigned integers, or a refusal.

    Raises:
        VolumeError: They are not whole numbers from 0 upwards.
        ResourceError: They do not fit into memory.
    """
    # Looked at twice, so that nothing larger than the labels themselves is made of all of them.
    ends = [(whole.min(), whole.max()) for whole in (_whole(raw[piece], header) for piece in slabs(raw))]
    low, high = int(min(low for low, _ in ends)), int(max(high for _, high in ends))
    if low < 0:
        raise VolumeError(
            header.path,
            f"a label is negative ({low})",
            "Is it an image? Otherwise give labels from 0 upwards",
        )
    # By its name: numpy may answer "ulonglong", which is uint64 under a name that few know.
    dtype = np.dtype(np.min_scalar_type(high).str)
    if raw.dtype == dtype and header.scale is None:
        return raw
    check_memory(header.path, raw.size * dtype.itemsize)
    out = np.empty_like(raw, dtype=dtype)
    for piece in slabs(raw):
        out[piece] = _whole(raw[piece], header)
    return out


def _whole(raw: Num[np.ndarray, "*N"], header: Header) -> Num[np.ndarray, "*N"]:
    """Stored values as whole numbers, where they are (nearly) some."""
    if raw.dtype.kind != "f" and header.scale is None:
        return raw
    slope, intercept = header.scale or (1.0, 0.0)
    with np.errstate(all="ignore"):
        values = raw.astype(np.float64) * slope + intercept
    if not np.isfinite(values).all():
        raise VolumeError(header.path, "labels are NaN or infinite", "Save the labels as integers")
    whole = np.rint(values)
    worst = np.abs(values - whole)
    if worst.max() > 1e-3:
        value = values.flat[int(worst.argmax())]
        raise VolumeError(
            header.path,
            f"not a label map: it holds {value:.6g}, which is not a whole number",
            "Is it an image, probabilities, or smoothly resampled? Use the label file",
        )
    if np.abs(whole).max() > 2**53:
        raise VolumeError(header.path, "not a label map: its numbers are too large", "Use the label file")
    return whole

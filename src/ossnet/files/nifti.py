"""NIfTI in and out.

Reading: header checks first (`ossnet.files.validate`), then exactly the voxels that the header promises, to
the end of the file, so that a checksum is always compared. Voxels keep the type of the file where they are
not scaled. Writing: the scan's own codes, units and version, in one atomic step.
"""

import gzip
import json
import warnings
from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer, Num

from ossnet.errors import VolumeError
from ossnet.files.atomic import atomic_write
from ossnet.files.containers import opened, truncated
from ossnet.files.memory import check_memory
from ossnet.files.placement import write_place
from ossnet.files.validate import DTYPES, HEADERS, Header, VolumeWarning, read_header
from ossnet.volume import Affine, FileHeader, LabelMap, Volume

__all__ = ["Header", "origin_of", "read_header", "read_image", "read_labels", "write_labels", "write_volume"]

_BLOCK = 1 << 22  # values or bytes handled at a time: large enough to be fast, small beside any volume
_MOST_EXTENSION = 1 << 20  # bytes of header extension that are looked at for label names
_COMMENT = 6  # NIfTI extension code for plain text
# zlib's default is 6; 4 is twice as fast on scans and 3 % larger.
_LEVEL = 4

Nonfinite = Literal["refuse", "replace"]


def read_image(path: Path | str, *, nonfinite: Nonfinite = "refuse") -> Volume:
    """Read the scan in one file (see `files.reading.read_volume`)."""
    header = read_header(path)
    raw, _ = _voxels(header)
    data = _finite(_scaled(raw, header), header, nonfinite)
    return Volume(data=data, affine=header.affine, source=header.path, header=header.file_header)


def read_labels(path: Path | str) -> LabelMap:
    """Read a label map (X, Y, Z), in the smallest unsigned type that holds its labels.

    Labels stored as floating point numbers are accepted where all are within 1e-3 of whole numbers.
    Label names are read back from files that `write_labels` wrote.

    Raises:
        VolumeError: The file cannot be trusted, has several channels, or does not hold labels.
        ResourceError: The labels do not fit into memory.
    """
    header = read_header(path)
    if header.channels != 1:
        raise VolumeError(header.path, f"holds {header.channels} volumes, one is needed", "Split the file")
    raw, names = _voxels(header)
    return LabelMap(
        data=_integral(raw[0], header),
        affine=header.affine,
        source=header.path,
        header=header.file_header,
        names=names,
        origin=header.origin,
    )


def write_volume(volume: Volume, path: Path | str) -> None:
    """Write a scan as `.nii` or `.nii.gz`; several channels become the fourth axis.

    The voxel type is kept (booleans become uint8, float16 becomes float32).

    Raises:
        VolumeError: The file name has another ending, or the type cannot be stored.
        ResourceError: The disk is full.
    """
    data = volume.data
    shape = data.shape[1:] if len(data) == 1 else (*data.shape[1:], len(data))
    _write(Path(path), shape, data, volume.affine, volume.header, {}, volume.origin)


def write_labels(labels: LabelMap, path: Path | str) -> None:
    """Write a label map as `.nii` or `.nii.gz`, in the smallest unsigned type that holds its labels.

    Transform codes, units and NIfTI version are those of `labels.header`; label names, where given, go into a
    comment in the file, which other programs skip. Its intent code says that it holds labels.

    Raises:
        VolumeError: The file name has another ending, or a label is negative.
        ResourceError: The disk is full.
    """
    data = labels.data
    if data.size and int(data.min()) < 0:
        raise VolumeError(path, f"a label is negative ({int(data.min())})", "Labels must be 0 or more")
    dtype = np.min_scalar_type(int(data.max()) if data.size else 0)
    _write(
        Path(path),
        data.shape,
        data.astype(dtype, copy=False)[None],
        labels.affine,
        labels.header,
        labels.names,
        labels.origin,
        "label",
    )


def origin_of(path: Path | str) -> str:
    """What a file says of its making (`LabelMap.origin`); empty where it says nothing, or is no image."""
    try:
        return read_header(path).origin
    except VolumeError:
        return ""


def _voxels(header: Header) -> tuple[Num[np.ndarray, "C X Y Z"], dict[int, str]]:
    """The stored values in native byte order and the file's memory order (X fastest), and label names."""
    check_memory(header.path, header.nbytes)
    # From numpy, so that the array may be written to, as torch wants it.
    flat = np.empty(header.voxels, dtype=header.dtype)
    view = flat.data.cast("B")
    with opened(header.data_path) as stream:
        names = _names(_skip(stream, header))
        done = 0
        while done < len(view):
            part = stream.read(min(_BLOCK, len(view) - done))
            if not part:
                raise truncated(header.data_path)
            view[done : done + len(part)] = part
            done += len(part)
        # Going on to the end makes gzip compare its checksum. More bytes mean that the shape is not the one
        # that was written.
        if stream.read(1):
            raise VolumeError(
                header.data_path,
                f"the file goes on after the {header.nbytes:,} bytes of voxels that its header describes",
                "Its shape or type in the header is wrong: write it again from its source",
            )
    if header.swapped:
        flat.byteswap(inplace=True)
    x, y, z = header.shape
    return flat.reshape(header.channels, z, y, x).transpose(0, 3, 2, 1), names


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


def _names(start: bytes) -> dict[int, str]:
    """Label names from the comment that `write_labels` leaves; nothing where there is none of ours."""
    at = start.find(b'{"ossnet_labels":')
    if at < 0:
        return {}
    try:
        text = start[at:].split(b"\0", 1)[0].decode("utf-8")
        return {int(k): str(v) for k, v in json.loads(text)["ossnet_labels"].items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return {}  # a damaged comment does not make the voxels worse


def _slabs(array: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Index pieces (…, z range) so that temporary arrays stay small beside the volume."""
    depth = array.shape[-1]
    step = max(1, _BLOCK * depth // max(array.size, 1))
    for start in range(0, depth, step):
        yield (..., slice(start, start + step))  # type: ignore[misc]  # an Ellipsis is an index too


def _scaled(raw: Num[np.ndarray, "C X Y Z"], header: Header) -> Num[np.ndarray, "C X Y Z"]:
    """Values from stored values: slope · stored + intercept, in float32; what it does not hold becomes infinite."""
    slope, intercept = header.scale or (1.0, 0.0)
    if header.scale is None and raw.dtype != np.float64:
        return raw
    check_memory(header.path, raw.size * np.dtype(np.float32).itemsize)
    out = np.empty_like(raw, dtype=np.float32)  # same memory order
    for piece in _slabs(raw):
        with np.errstate(all="ignore"):
            # Products in float64: int32 times a slope loses digits in float32.
            out[piece] = raw[piece].astype(np.float64) * slope + intercept
    return out


def _finite(
    data: Num[np.ndarray, "C X Y Z"], header: Header, nonfinite: Nonfinite
) -> Num[np.ndarray, "C X Y Z"]:
    if data.dtype.kind != "f":
        return data
    bad = sum(int((~np.isfinite(data[piece])).sum()) for piece in _slabs(data))
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


def _integral(raw: Num[np.ndarray, "X Y Z"], header: Header) -> Integer[np.ndarray, "X Y Z"]:
    """Labels as the smallest unsigned integers, or a refusal."""
    if raw.dtype.kind == "f" or header.scale is not None:
        out = np.empty_like(raw, dtype=np.int64)
        slope, intercept = header.scale or (1.0, 0.0)
        for piece in _slabs(raw):
            with np.errstate(all="ignore"):
                values = raw[piece].astype(np.float64) * slope + intercept
            if not np.isfinite(values).all():
                raise VolumeError(header.path, "labels are NaN or infinite", "Save the labels as integers")
            whole = np.rint(values)
            worst = np.abs(values - whole)
            if worst.max() > 1e-3:
                value = values.flat[int(worst.argmax())]
                raise VolumeError(
                    header.path,
                    f"not a label map: it holds {value:.6g}, which is no whole number",
                    "Is it an image, probabilities, or smoothly resampled? Use the label file",
                )
            if np.abs(whole).max() > 2**53:
                raise VolumeError(
                    header.path, "not a label map: its numbers are too large", "Use the label file"
                )
            out[piece] = whole.astype(np.int64)
        raw = out
    low, high = int(raw.min()), int(raw.max())
    if low < 0:
        raise VolumeError(
            header.path,
            f"a label is negative ({low})",
            "Is it an image? Otherwise give labels from 0 upwards",
        )
    # By its name: numpy may answer "ulonglong", which is uint64 under a name that few know.
    return raw.astype(np.min_scalar_type(high).str, copy=False)


def _write(
    path: Path,
    shape: tuple[int, ...],
    data: Num[np.ndarray, "C X Y Z"],
    affine: Affine,
    kept: FileHeader,
    names: Mapping[int, str],
    origin: str = "",
    intent: Literal["none", "label"] = "none",
) -> None:
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise VolumeError(path, "results are written as NIfTI", "Choose a name that ends in .nii.gz or .nii")
    stored = {"b": np.uint8, "f2": np.float32}.get(
        data.dtype.kind if data.dtype.kind == "b" else data.dtype.str[1:]
    )
    dtype = np.dtype(stored) if stored else data.dtype.newbyteorder("=")
    if dtype not in [np.dtype(d) for d in DTYPES.values()]:
        raise VolumeError(
            path, f"NIfTI cannot hold {data.dtype} voxels", "Convert them to float32 or an integer type"
        )
    head = _header_bytes(shape, dtype, affine, kept, names, origin, intent)
    with atomic_write(path) as temporary, temporary.open("wb") as raw:
        if path.name.lower().endswith(".gz"):
            # No name and no time inside: the same volume gives the same bytes.
            with gzip.GzipFile("", "wb", _LEVEL, raw, mtime=0) as packed:
                _stream(packed, head, data, dtype)
        else:
            _stream(raw, head, data, dtype)


def _stream(out: Any, head: bytes, data: Num[np.ndarray, "C X Y Z"], dtype: np.dtype[Any]) -> None:
    out.write(head)
    for channel in data:
        for piece in _slabs(channel):
            out.write(np.asarray(channel[piece], dtype=dtype).tobytes(order="F"))


def _header_bytes(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    affine: Affine,
    kept: FileHeader,
    names: Mapping[int, str],
    origin: str,
    intent: str,
) -> bytes:
    """Everything before the first voxel."""
    # NIfTI-1 counts voxels in 16 bits.
    version = 2 if kept.version == 2 or max(shape) > 32767 else 1
    header = HEADERS[version]()
    header.set_data_shape(shape)
    header["datatype"] = next(code for code, d in DTYPES.items() if np.dtype(d) == dtype)
    header["bitpix"] = 8 * dtype.itemsize
    header["xyzt_units"] = kept.units
    header.set_intent(intent)
    header["descrip"] = origin.encode("ascii", "replace")[:79]
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    write_place(header, affine, kept, (shape[0], shape[1], shape[2]))
    extension = b"\0\0\0\0"
    if names:
        text = json.dumps(
            {"ossnet_labels": {str(k): v for k, v in sorted(names.items())}}, ensure_ascii=False
        )
        body = text.encode("utf-8")
        size = -(-(len(body) + 8 + 1) // 16) * 16  # a multiple of 16, as nifti1.h asks, and ended by a zero
        order = header.endianness
        code = np.array([size, _COMMENT], dtype=f"{order}i4").tobytes()
        extension = b"\1\0\0\0" + code + body.ljust(size - 8, b"\0")
    header["vox_offset"] = (540 if version == 2 else 348) + len(extension)
    header["magic"] = b"n+2" if version == 2 else b"n+1"
    return bytes(header.binaryblock) + extension

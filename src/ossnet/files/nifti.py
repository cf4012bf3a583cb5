"""NIfTI out: the scan's own codes, units and version, in one atomic step."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Num, UInt

from ossnet.errors import VolumeError
from ossnet.files.atomic import atomic_write
from ossnet.files.nifti_header import DTYPES, HEADERS
from ossnet.files.placement import write_place
from ossnet.files.voxels import slabs
from ossnet.volume import Affine, FileHeader, LabelMap, Volume

_COMMENT = 6  # NIfTI extension code for plain text
PACKING = 4
"""Of zlib, whose default is 6; 4 is twice as fast on scans and 3 % larger."""


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
    _write(
        Path(path),
        labels.shape,
        unsigned(labels, path)[None],
        labels.affine,
        labels.header,
        labels.names,
        labels.origin,
        "label",
    )


def unsigned(labels: LabelMap, path: Path | str) -> UInt[np.ndarray, "X Y Z"]:
    """The voxels of a label map in the smallest unsigned type that holds them.

    Args:
        path: The file that they are meant for.

    Raises:
        VolumeError: A label is negative.
    """
    data = labels.data
    if data.size and int(data.min()) < 0:
        raise VolumeError(path, f"a label is negative ({int(data.min())})", "Labels must be 0 or more")
    smallest = np.min_scalar_type(int(data.max()) if data.size else 0)
    # By its size: NumPy has two types of 64 bits.
    return data.astype(np.dtype(f"u{smallest.itemsize}"), copy=False)


def names_in(start: bytes) -> dict[int, str]:
    """Label names from the comment that `write_labels` leaves before voxels; nothing where there is none."""
    at = start.find(b'{"ossnet_labels":')
    if at < 0:
        return {}
    try:
        text = start[at:].split(b"\0", 1)[0].decode("utf-8")
        return {int(k): str(v) for k, v in json.loads(text)["ossnet_labels"].items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return {}  # a damaged comment does not make the voxels worse


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
            with gzip.GzipFile("", "wb", PACKING, raw, mtime=0) as packed:
                _stream(packed, head, data, dtype)
        else:
            _stream(raw, head, data, dtype)


def _stream(out: Any, head: bytes, data: Num[np.ndarray, "C X Y Z"], dtype: np.dtype[Any]) -> None:
    out.write(head)
    for channel in data:
        for piece in slabs(channel):
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

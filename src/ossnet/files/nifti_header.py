"""What a NIfTI file claims, checked before anything is allocated.

`read_nifti_header` looks at the first few hundred bytes and at the size of the file, and refuses what cannot be
trusted: the rest of the program never meets an image whose place, size or type is in doubt. Field names and
their meaning: NIfTI-1.1 (`nifti1.h`) and NIfTI-2 (`nifti2.h`).
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ossnet.errors import VolumeError
from ossnet.files.containers import locate, opened, read_up_to, truncated
from ossnet.files.header import REWRITE, Header, check_size, times
from ossnet.files.placement import read_place
from ossnet.volume import Shape

DTYPES = {
    2: np.uint8,
    4: np.int16,
    8: np.int32,
    16: np.float32,
    64: np.float64,
    256: np.int8,
    512: np.uint16,
    768: np.uint32,
    1024: np.int64,
    1280: np.uint64,
}
"""NIfTI data type code → voxel type, for the types that can hold a scan or labels."""

_REFUSED_DTYPES = {
    0: "of unknown type",
    1: "single bits",
    32: "complex numbers",
    128: "colours",
    1536: "128-bit floating point numbers",
    1792: "complex numbers",
    2048: "complex numbers",
    2304: "colours",
}

# nibabel knows the fields; what they may hold is checked here. (It has no types for mypy.)
HEADERS: dict[int, Any] = {1: nib.Nifti1Header, 2: nib.Nifti2Header}
"""NIfTI version → header structure."""


def read_nifti_header(path: Path) -> Header:
    """Read and check the header of a NIfTI file without touching its voxels.

    Accepts `.nii`, `.nii.gz` and pairs (`.hdr` + `.img`, each also `.gz`), NIfTI-1 and NIfTI-2 in either byte
    order. Customary readings of unclear headers are noted (`Header.warnings`).

    Raises:
        VolumeError: The file is missing, is not a NIfTI image, or its header cannot be trusted.
    """
    header_path, data_path = locate(path)
    raw = _parse(header_path)
    return _Check(header_path, data_path, raw).header()


def _parse(path: Path) -> Any:
    """The raw header structure, of either version and byte order."""
    with opened(path) as stream:
        block = read_up_to(stream, 540)
    if len(block) < 348:
        raise truncated(path) if block[:4] in _SIZES else _not_nifti(path)
    size = _SIZES.get(block[:4])
    if size is None:
        raise _not_nifti(path)
    version, order = size
    if version == 1:
        if block[344:348] not in (b"n+1\0", b"ni1\0"):
            analyze = not block[344:348].strip(b"\0")
            raise VolumeError(
                path,
                "an ANALYZE 7.5 header, which does not say left from right"
                if analyze
                else f"the magic string is {block[344:348]!r} instead of b'n+1\\x00'",
                "Convert it to NIfTI with a tool that knows its orientation" if analyze else REWRITE,
            )
        return HEADERS[1](block[:348], endianness=order, check=False)
    if len(block) < 540:
        raise truncated(path)
    if block[4:12] not in (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"):
        raise VolumeError(path, f"the magic string is {block[4:12]!r}, which is not NIfTI-2's", REWRITE)
    return HEADERS[2](block, endianness=order, check=False)


_SIZES = {
    (348).to_bytes(4, "little"): (1, "<"),
    (348).to_bytes(4, "big"): (1, ">"),
    (540).to_bytes(4, "little"): (2, "<"),
    (540).to_bytes(4, "big"): (2, ">"),
}


def _not_nifti(path: Path) -> VolumeError:
    return VolumeError(
        path, "not a NIfTI file (its first bytes are not a NIfTI header)", "Check what the file is"
    )


class _Check:
    """One header on its way from claims to facts."""

    def __init__(self, path: Path, data_path: Path, raw: Any) -> None:
        self.path, self.data_path, self.raw = path, data_path, raw

    def header(self) -> Header:
        if 3000 <= (intent := int(self.raw["intent_code"])) < 3100:
            raise VolumeError(
                self.path,
                f"a CIFTI file (intent {intent}): values on the cortex, not an image with voxels in space",
                "Use the volume that it was made from",
            )
        dtype = self.dtype()
        shape, channels = self.dimensions()
        offset = self.offset()
        claimed = math.prod(shape) * channels * dtype.itemsize + offset
        check_size(self.path, self.data_path, claimed, self.data_path.name.lower().endswith(".gz"))
        affine, kept, notes = read_place(self.raw, shape, self.path)
        return Header(
            path=self.path,
            shape=shape,
            channels=channels,
            affine=affine,
            dtype=dtype,
            file_header=replace(kept, version=2 if self.raw["sizeof_hdr"] == 540 else 1),
            scale=self.scale(),
            data_path=self.data_path,
            offset=offset,
            swapped=not self.raw["sizeof_hdr"].dtype.isnative,
            origin=bytes(self.raw["descrip"].item()).rstrip(b"\0").decode("ascii", "replace"),
            warnings=notes,
        )

    def dtype(self) -> np.dtype[Any]:
        code = int(self.raw["datatype"])
        if code not in DTYPES:
            what = _REFUSED_DTYPES.get(code, "of a type that NIfTI does not know")
            raise VolumeError(
                self.path, f"the voxels are {what} (datatype {code})", "Save it with integer or float voxels"
            )
        dtype = np.dtype(DTYPES[code])
        if int(self.raw["bitpix"]) != 8 * dtype.itemsize:
            raise VolumeError(
                self.path,
                f"the header contradicts itself: {dtype} voxels of {int(self.raw['bitpix'])} bits",
                REWRITE,
            )
        return dtype

    def dimensions(self) -> tuple[Shape, int]:
        dim = [int(n) for n in self.raw["dim"]]
        count = dim[0]
        if not 1 <= count <= 7:
            raise VolumeError(self.path, f"the header claims {count} dimensions", REWRITE)
        sizes = dim[1 : 1 + count]
        if min(sizes) < 1:
            raise VolumeError(self.path, f"an axis has no voxels: the header claims {times(sizes)}", REWRITE)
        sizes += [1] * (7 - count)
        if count == 1 and sizes[0] > 1:
            raise VolumeError(
                self.path, "one-dimensional, not an image", "Use a file with 2 or 3 axes in space"
            )
        more = [n for n in sizes[3:] if n > 1]
        if len(more) > 1:
            raise VolumeError(
                self.path,
                f"more than one axis beside space: {times(sizes[:count])}",
                "Split it into files with at most four dimensions",
            )
        return (sizes[0], sizes[1], sizes[2]), (more[0] if more else 1)

    def offset(self) -> int:
        value = float(self.raw["vox_offset"])
        single = self.data_path == self.path
        least = (352 if int(self.raw["sizeof_hdr"]) == 348 else 544) if single else 0
        magic = bytes(self.raw["magic"])
        if single != magic.startswith(b"n+"):
            raise VolumeError(
                self.path,
                "its magic string says that voxels are in another file"
                if single
                else "its magic string says that voxels are in the same file",
                "Rename it to .hdr beside its .img" if single else "Rename it to .nii",
            )
        if not math.isfinite(value) or value != int(value) or value < least:
            raise VolumeError(
                self.path,
                f"voxels cannot start at byte {value:g} (vox_offset must be {least} or more)",
                REWRITE,
            )
        return int(value)

    def scale(self) -> tuple[float, float] | None:
        slope, intercept = float(self.raw["scl_slope"]), float(self.raw["scl_inter"])
        # nifti1.h: a slope of zero means unscaled. NaN is what nibabel writes for the same.
        if slope == 0 or math.isnan(slope):
            return None
        if not math.isfinite(slope) or not math.isfinite(intercept):
            raise VolumeError(
                self.path, f"values are scaled by {slope:g} and shifted by {intercept:g}", REWRITE
            )
        return None if (slope, intercept) == (1.0, 0.0) else (slope, intercept)

"""What a NIfTI file claims, checked before anything is allocated.

`read_header` looks at the first few hundred bytes and at the size of the file, and refuses what cannot be
trusted: the rest of the program never meets an image whose place, size or type is in doubt. Field names and
their meaning: NIfTI-1.1 (`nifti1.h`) and NIfTI-2 (`nifti2.h`).
"""

import gzip
import math
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ossnet.errors import ResourceError, VolumeError
from ossnet.volume import Affine, FileHeader, Shape, largest_corner_gap, spacing_of

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

# Deflate cannot shrink anything further than this (1032:1), so a larger claim is a lie.
_MOST_COMPRESSION = 1032

# nibabel knows the fields; what they may hold is checked here. (It has no types for mypy.)
HEADERS: dict[int, Any] = {1: nib.Nifti1Header, 2: nib.Nifti2Header}
"""NIfTI version → header structure."""
_rotation: Any = nib.quaternions.quat2mat

_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}

_REWRITE = "Write the file again from its source"


class VolumeWarning(UserWarning):
    """A file is readable by a customary reading that may not be what its author meant."""


@dataclass(frozen=True)
class Header:
    """What a NIfTI file says about its voxels, checked.

    Attributes:
        path: The file given (for a pair: the `.hdr`).
        shape: Voxels along X, Y, Z.
        channels: Volumes along the fourth (or, for vectors, fifth) axis; 1 for a plain 3D file.
        affine: (4, 4) float64, voxel index → world mm, RAS+.
        dtype: Voxel type as stored, native byte order.
        file_header: What a result written for this scan takes over.
        scale: (slope, intercept), or None where the stored values are the values.
        data_path: The file that holds the voxels.
        offset: Bytes before the first voxel in `data_path`.
        swapped: True when the voxels are in the other byte order.
    """

    path: Path
    shape: Shape
    channels: int
    affine: Affine
    dtype: np.dtype[Any]
    file_header: FileHeader
    scale: tuple[float, float] | None
    data_path: Path
    offset: int
    swapped: bool
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along X, Y, Z in mm."""
        return spacing_of(self.affine)

    @property
    def voxels(self) -> int:
        """Values stored: channels × X × Y × Z."""
        return self.channels * math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the voxels as stored."""
        return self.voxels * self.dtype.itemsize


def read_header(path: Path | str) -> Header:
    """Read and check the header of a NIfTI file without touching its voxels.

    Accepts `.nii`, `.nii.gz` and pairs (`.hdr` + `.img`, each also `.gz`), NIfTI-1 and NIfTI-2 in either byte
    order. Customary readings of unclear headers are warned of (`VolumeWarning`).

    Raises:
        VolumeError: The file is missing, is no NIfTI image, or its header cannot be trusted.
    """
    path = Path(path)
    header_path, data_path = _files(path)
    raw = _parse(header_path)
    return _Check(header_path, data_path, raw).header()


def is_image(path: Path) -> bool:
    """True for file names that `read_header` takes (the `.img` of a pair is not counted)."""
    name = path.name.lower()
    return name.endswith((".nii", ".nii.gz", ".hdr", ".hdr.gz")) and not name.startswith(".")


def stem(path: Path | str) -> str:
    """File name without its image ending: `a/b.nii.gz` → `b`."""
    name = Path(path).name
    for ending in (".nii.gz", ".hdr.gz", ".img.gz", ".nii", ".hdr", ".img"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


@contextmanager
def opened(path: Path) -> Iterator[BufferedIOBase]:
    """Open a plain or gzipped file for reading; damage becomes a `VolumeError` that says which."""
    compressed = path.name.lower().endswith(".gz")
    try:
        with path.open("rb") as raw:
            magic = raw.read(2)
            raw.seek(0)
            if not magic:
                raise VolumeError(path, "the file is empty", "Copy or download it again")
            if compressed and magic != b"\x1f\x8b":
                raise VolumeError(
                    path,
                    "named .gz but not compressed with gzip",
                    "Rename it to end in .nii, or download it again",
                )
            if not compressed and magic == b"\x1f\x8b":
                raise VolumeError(
                    path, "compressed with gzip but not named .gz", "Rename it to end in .nii.gz"
                )
            if compressed:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield stream
            else:
                yield raw
    except FileNotFoundError:
        raise VolumeError(path, "there is no such file", "Check the path") from None
    except IsADirectoryError:
        raise VolumeError(path, "this is a folder, not an image", "Name a file in it") from None
    except PermissionError:
        raise VolumeError(path, "may not be read", "Change its permissions") from None
    except EOFError:
        raise truncated(path) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        reason = (
            "its checksum is wrong (CRC)"
            if "CRC" in str(error)
            else f"the compressed data are damaged ({error})"
        )
        raise VolumeError(path, reason, "Copy or download it again") from None
    except OSError as error:
        raise VolumeError(
            path, f"cannot be read ({error.strerror or error})", "Check the disk and the path"
        ) from error


def truncated(path: Path) -> VolumeError:
    """The error for a file that ends too early."""
    return VolumeError(
        path, "the file ends before all voxels are there (truncated)", "Copy or download it again"
    )


def available_memory() -> int:
    """Bytes this process may still take: the smaller of the machine's and the container's free memory."""
    free = [2**63]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    except OSError:
        with suppress(AttributeError, ValueError, OSError):
            # No /proc, as on macOS: all there is, since what is free is not told.
            free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError, IndexError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            stat = Path("/sys/fs/cgroup/memory.stat").read_text().split()
            # Cached files count as used there but are given up when memory is asked for.
            cached = int(stat[stat.index("inactive_file") + 1])
            free.append(int(limit) - used + cached)
    return max(0, min(free))


def check_memory(path: Path, nbytes: int) -> None:
    """Refuse what cannot fit.

    Raises:
        ResourceError: `nbytes` are more than is free.
    """
    free = available_memory()
    if nbytes > free:
        raise ResourceError(
            f"{path}: needs {nbytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free. "
            "Close other programs, use a larger machine, or crop the scan."
        )


def _files(path: Path) -> tuple[Path, Path]:
    """The header file and the voxel file (the same for `.nii`)."""
    name = path.name
    lower = name.lower()
    if lower.endswith((".nii", ".nii.gz")):
        return path, path
    for ending in (".hdr", ".img"):
        for gz in ("", ".gz"):
            if lower.endswith(ending + gz):
                base = name[: len(name) - len(ending + gz)]
                return _sibling(path, base, ".hdr", gz), _sibling(path, base, ".img", gz)
    convert = "Convert it, for example: nib-convert {0} {1}.nii.gz"
    other = {
        (".mgz", ".mgh"): (
            "a FreeSurfer image, and only NIfTI is read",
            convert.format(name, name.rsplit(".", 1)[0]),
        ),
        (".mnc",): (
            "a MINC image, and only NIfTI is read",
            f"Convert it: mnc2nii {name} {name.rsplit('.', 1)[0]}.nii",
        ),
        (".dcm", ".dicom", ".ima"): (
            "a DICOM file, and only NIfTI is read",
            "Convert the series, for example: dcm2niix",
        ),
        (".nrrd", ".nhdr", ".mha", ".mhd", ".gipl"): (
            "not a NIfTI file",
            "Convert it to .nii.gz with the program that wrote it",
        ),
    }
    for endings, (reason, fix) in other.items():
        if lower.endswith(endings):
            raise VolumeError(path, reason, fix)
    if path.is_dir():
        raise VolumeError(path, "this is a folder, not an image", "Name a file in it")
    raise VolumeError(path, "not a NIfTI file name", "Files must end in .nii, .nii.gz, or .hdr with .img")


def _sibling(path: Path, base: str, ending: str, gz: str) -> Path:
    """The other half of a pair, whatever the case of its ending and whether it is compressed."""
    options = [ending + gz, ending, ending + ".gz", ending.upper()]
    for option in options:
        if (candidate := path.with_name(base + option)).exists():
            return candidate
    missing = path.with_name(base + ending + gz)
    raise VolumeError(missing, "there is no such file", "A .hdr and its .img belong together in one folder")


def _parse(path: Path) -> Any:
    """The raw header structure, of either version and byte order."""
    with opened(path) as stream:
        block = _read_up_to(stream, 540)
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
                "Convert it to NIfTI with a tool that knows its orientation" if analyze else _REWRITE,
            )
        return HEADERS[1](block[:348], endianness=order, check=False)
    if len(block) < 540:
        raise truncated(path)
    if block[4:12] not in (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"):
        raise VolumeError(path, f"the magic string is {block[4:12]!r}, which is not NIfTI-2's", _REWRITE)
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


def _read_up_to(stream: BufferedIOBase, count: int) -> bytes:
    """`count` bytes, fewer only at the end of the file."""
    parts = []
    while count > 0 and (part := stream.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class _Check:
    """One header on its way from claims to facts."""

    def __init__(self, path: Path, data_path: Path, raw: Any) -> None:
        self.path, self.data_path, self.raw = path, data_path, raw
        self.notes: list[str] = []

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
        self.size(math.prod(shape) * channels * dtype.itemsize + offset)
        affine, codes = self.affine(shape)
        for note in self.notes:
            warnings.warn(f"{self.path}: {note}.", VolumeWarning, stacklevel=4)
        return Header(
            path=self.path,
            shape=shape,
            channels=channels,
            affine=affine,
            dtype=dtype,
            file_header=FileHeader(
                qform_code=codes[0],
                sform_code=codes[1],
                units=int(self.raw["xyzt_units"]),
                version=2 if self.raw["sizeof_hdr"] == 540 else 1,
            ),
            scale=self.scale(),
            data_path=self.data_path,
            offset=offset,
            swapped=not self.raw["sizeof_hdr"].dtype.isnative,
            warnings=tuple(self.notes),
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
                _REWRITE,
            )
        return dtype

    def dimensions(self) -> tuple[Shape, int]:
        dim = [int(n) for n in self.raw["dim"]]
        count = dim[0]
        if not 1 <= count <= 7:
            raise VolumeError(self.path, f"the header claims {count} dimensions", _REWRITE)
        sizes = dim[1 : 1 + count]
        if min(sizes) < 1:
            raise VolumeError(
                self.path, f"an axis has no voxels: the header claims {_times(sizes)}", _REWRITE
            )
        sizes += [1] * (7 - count)
        if count == 1 and sizes[0] > 1:
            raise VolumeError(
                self.path, "one-dimensional, not an image", "Use a file with 2 or 3 axes in space"
            )
        more = [n for n in sizes[3:] if n > 1]
        if len(more) > 1:
            raise VolumeError(
                self.path,
                f"more than one axis beside space: {_times(sizes[:count])}",
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
                _REWRITE,
            )
        return int(value)

    def size(self, claimed: int) -> None:
        try:
            stored = self.data_path.stat().st_size
        except OSError:
            stored = 0
        most = stored * _MOST_COMPRESSION if self.data_path.name.lower().endswith(".gz") else stored
        if claimed > most:
            if most > stored:
                raise VolumeError(
                    self.path,
                    f"the header claims {claimed / 2**30:.3g} GiB, more than {stored:,} bytes can hold",
                    "Copy or download it again; do not trust its header",
                )
            raise truncated(self.data_path)

    def scale(self) -> tuple[float, float] | None:
        slope, intercept = float(self.raw["scl_slope"]), float(self.raw["scl_inter"])
        # nifti1.h: a slope of zero means unscaled. NaN is what nibabel writes for the same.
        if slope == 0 or math.isnan(slope):
            return None
        if not math.isfinite(slope) or not math.isfinite(intercept):
            raise VolumeError(
                self.path, f"values are scaled by {slope:g} and shifted by {intercept:g}", _REWRITE
            )
        return None if (slope, intercept) == (1.0, 0.0) else (slope, intercept)

    def affine(self, shape: Shape) -> tuple[Affine, tuple[int, int]]:
        """Voxel → mm, and the (qform, sform) codes. The sform goes first, as everywhere."""
        qcode, scode = int(self.raw["qform_code"]), int(self.raw["sform_code"])
        codes = (qcode if 0 < qcode < 6 else 0, scode if 0 < scode < 6 else 0)
        if codes != (qcode, scode):
            self.notes.append(f"unknown affine codes (qform {qcode}, sform {scode}) are ignored")
        if codes[1]:
            affine = self._sound(np.asarray(self.raw.get_sform(), dtype=np.float64), "sform")
            if codes[0]:
                try:
                    gap = largest_corner_gap(affine, self._qform(), shape)
                except (VolumeError, FloatingPointError):
                    self.notes.append("the qform has no meaning; the sform is used")
                else:
                    if not gap <= 0.5 * min(spacing_of(affine)):
                        self.notes.append(
                            f"qform and sform place voxels up to {gap:.3g} apart; the sform is used, "
                            "other programs may use the qform"
                        )
        elif codes[0]:
            affine = self._qform()
        else:
            affine = self._sound(
                np.diag([*(float(p) for p in self.raw["pixdim"][1:4]), 1.0]),
                "pixdim, used because no affine is given,",
            )
            if (np.diag(affine) < 0).any():
                raise VolumeError(self.path, "voxel sizes are negative and no affine is given", _REWRITE)
            self.notes.append(
                "no affine is given (qform_code = sform_code = 0); voxel sizes are used, "
                "and left and right, front and back are not known"
            )
        unit = int(self.raw["xyzt_units"]) & 7
        if unit not in _MM_PER_UNIT:
            self.notes.append(f"unknown unit of length ({unit}); millimetres are assumed")
        elif (factor := _MM_PER_UNIT[unit]) != 1.0:
            self.notes.append(
                f"lengths are in {'metres' if unit == 1 else 'micrometres'} and are converted to mm"
            )
            affine = np.diag([factor, factor, factor, 1.0]) @ affine
        return affine, codes

    def _qform(self) -> Affine:
        """nifti1.h, method 2: a rotation by a quaternion, then voxel sizes, then an offset."""
        b, c, d = (float(self.raw[f"quatern_{letter}"]) for letter in "bcd")
        square = 1.0 - (b * b + c * c + d * d)
        if not square > -1e-4:  # rounding of a half turn reaches -1e-7
            raise VolumeError(self.path, "the qform is no rotation", "Set a valid qform or sform")
        quaternion = np.array([math.sqrt(max(square, 0.0)), b, c, d])
        quaternion /= np.linalg.norm(quaternion)
        pixdim = np.array([float(p) for p in self.raw["pixdim"][:4]])
        if (pixdim[1:] < 0).any():
            raise VolumeError(self.path, "voxel sizes are negative", "Set positive voxel sizes in pixdim")
        if pixdim[0] < 0:  # qfac: a mirrored third axis
            pixdim[3] = -pixdim[3]
        affine = np.eye(4)
        affine[:3, :3] = _rotation(quaternion) * pixdim[1:]
        affine[:3, 3] = [float(self.raw[f"qoffset_{letter}"]) for letter in "xyz"]
        return self._sound(affine, "qform")

    def _sound(self, affine: np.ndarray, name: str) -> Affine:
        if not np.isfinite(affine).all():
            raise VolumeError(self.path, f"the {name} holds NaN or infinity", "Set a valid qform or sform")
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        with np.errstate(all="ignore"):
            # Relative to the voxel sizes, so that micrometre voxels are not taken for flat ones.
            volume = abs(np.linalg.det(affine[:3, :3] / sizes)) if (sizes > 0).all() else 0.0
        if not volume > 1e-6:
            raise VolumeError(
                self.path,
                f"the {name} is not invertible: voxels would be flat",
                "Set a valid qform or sform",
            )
        if not (sizes.min() > 1e-6 and sizes.max() < 1e6):
            raise VolumeError(
                self.path,
                f"voxels measure {sizes[0]:.3g} × {sizes[1]:.3g} × {sizes[2]:.3g}",
                "Set valid voxel sizes",
            )
        return affine


def _times(sizes: list[int]) -> str:
    return " × ".join(str(n) for n in sizes)

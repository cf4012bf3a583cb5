"""Image files as files: their names, their halves, opening them plain or packed."""

import gzip
import os
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, Literal

from ossnet.errors import VolumeError

DICOM = (".dcm", ".dicom", ".ima")
"""What files of a series may end in; many have no ending."""

FILE_ENDINGS = (
    {".gz", ".nii", ".img", ".hdr", ".mha", ".mhd", ".nrrd", ".nhdr", ".mgz", ".npy", ".npz", ".png", *DICOM}
    | {".txt", ".tsv", ".csv", ".xlsx", ".md", ".html", ".json"}
    | {".stl", ".ply", ".obj", ".glb", ".gltf", ".vtk", ".vtp", ".off", ".3mf"}
)
"""Of files that people may hope for: a folder to be made with such a name is a mistake."""


NIFTI = (".nii.gz", ".nii", ".hdr.gz", ".hdr")
NRRD = (".nrrd", ".nhdr")
METAIMAGE = (".mha", ".mhd")
SLICER = ".seg.nrrd"
_SEGMENTATIONS = (SLICER, ".seg.nhdr")


def is_image(path: Path) -> bool:
    """True for file names that `read_header` takes (the `.img` of a pair is not counted)."""
    name = path.name.lower()
    return name.endswith((*NIFTI, *NRRD, *METAIMAGE)) and not name.startswith(".")


def is_slicer_segmentation(path: Path) -> bool:
    """True for the names that 3D Slicer gives to segmentations."""
    return path.name.lower().endswith(_SEGMENTATIONS)


def nifti_first(paths: list[Path]) -> list[Path]:
    """Of files for one thing those that are NIfTI, if some are: people keep what they converted."""
    return [path for path in paths if path.name.lower().endswith(NIFTI)] or paths


def without_copies(files: Iterable[Path]) -> list[Path]:
    """Files, without those that lie beside a NIfTI file of the same name."""
    named: dict[Path, list[Path]] = {}
    for file in files:
        named.setdefault(file.with_name(stem(file)), []).append(file)
    return [file for paths in named.values() for file in nifti_first(paths)]


def stem(path: Path | str) -> str:
    """File name without its image ending: `a/b.nii.gz` → `b`, `a/b.seg.nrrd` → `b`; letters as `composed`."""
    name = composed(Path(path).name)
    for ending in (*_SEGMENTATIONS, *NIFTI, ".img.gz", ".img", *NRRD, *METAIMAGE, ".dcm"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def composed(name: str) -> str:
    """A name with one code a letter: ü may be u with two dots, as macOS writes it, and looks the same."""
    return unicodedata.normalize("NFC", name)


def scan_name(path: Path | str) -> str:
    """Name of a scan after its first file or folder: `a/b_0000.nii.gz` → `b`."""
    return stem(os.path.abspath(path)).removesuffix("_0000")  # "." has no name of its own


def locate(path: Path) -> tuple[Path, Path]:
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
            "a FreeSurfer image, which is not read",
            convert.format(name, name.rsplit(".", 1)[0]),
        ),
        (".mnc",): (
            "a MINC image, which is not read",
            f"Convert it: mnc2nii {name} {name.rsplit('.', 1)[0]}.nii",
        ),
        DICOM: (
            "named as DICOM, and no scan that can be read",
            "Convert it with dcm2niix",
        ),
        (".gipl",): ("a GIPL image, which is not read", "Convert it to .nii.gz with ITK-SNAP"),
    }
    for endings, (reason, fix) in other.items():
        if lower.endswith(endings):
            raise VolumeError(path, reason, fix)
    if path.is_dir():
        raise VolumeError(
            path,
            "this is a folder, not an image, and holds no DICOM slices",
            "Name an image in it, or the folder of one series",
        )
    if not (path.suffix or path.exists()):
        raise VolumeError(path, "there is no such file or folder", "Check the path")
    raise VolumeError(
        path,
        "not the name of an image",
        "Files must end in .nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd, or .hdr with .img",
    )


def _sibling(path: Path, base: str, ending: str, gz: str) -> Path:
    """The other half of a pair, whatever the case of its ending and whether it is compressed."""
    options = [ending + gz, ending, ending + ".gz", ending.upper()]
    for option in options:
        if (candidate := path.with_name(base + option)).exists():
            return candidate
    missing = path.with_name(base + ending + gz)
    raise VolumeError(missing, "there is no such file", "A .hdr and its .img belong together in one folder")


@contextmanager
def opened(path: Path, gz: bool | None = None) -> Iterator[BufferedIOBase]:
    """Open a plain or gzipped file for reading; damage becomes a `VolumeError` that says which.

    Args:
        gz: Whether all of it is packed. None: its name says so.
    """
    compressed = path.name.lower().endswith(".gz") if gz is None else gz
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
            if gz is None and not compressed and magic == b"\x1f\x8b":
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


class _Inflated(RawIOBase):
    """What was packed by zlib, or gzip, from where a stream stands to its end."""

    def __init__(self, source: BufferedIOBase) -> None:
        self._source, self._packer = source, zlib.decompressobj(zlib.MAX_WBITS | 32)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._packer.eof:
            packed = self._packer.unconsumed_tail or self._source.read(1 << 20)
            if not packed:
                raise EOFError
            if part := self._packer.decompress(packed, len(buffer)):
                buffer[: len(part)] = part
                return len(part)
        if self._packer.unused_data or self._source.read(1):
            raise zlib.error("more bytes follow")
        return 0


def unpacked(stream: BufferedIOBase, packed: Literal["gzip", "zlib"] | None) -> BufferedIOBase:
    """The rest of a stream that `opened` gave, without its compression; checksums are compared at its end."""
    if packed == "gzip":
        return gzip.GzipFile(fileobj=stream)
    return BufferedReader(_Inflated(stream)) if packed == "zlib" else stream


def truncated(path: Path) -> VolumeError:
    """The error for a file that ends too early."""
    return VolumeError(
        path, "the file ends before all voxels are there (truncated)", "Copy or download it again"
    )


def read_up_to(stream: BufferedIOBase, count: int) -> bytes:
    """`count` bytes, fewer only at the end of the file."""
    parts = []
    while count > 0 and (part := stream.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)

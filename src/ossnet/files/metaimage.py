"""Headers of MetaImage files (`.mha`, `.mhd`), which ITK and its programs write.

Keys and their meaning: MetaIO's documentation, itk.org/Wiki/MetaIO/Documentation; of two keys for one thing, the one
that ITK takes. Positions are LPS. Voxels as text and voxels in many files are refused, and so are packed ones that are
damaged, which ITK takes for an image.
"""

import re
from pathlib import Path

import numpy as np

from ossnet.errors import VolumeError
from ossnet.files.header import REWRITE, Header
from ossnet.files.text_header import (
    axes,
    checked,
    needed,
    numbers,
    start_of,
    unfinished,
    voxel_file,
    voxel_type,
    whole,
)

_DTYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def read_metaimage_header(path: Path) -> Header:
    """Read and check the header of a MetaImage without touching its voxels.

    Raises:
        VolumeError: The file is missing or damaged, is not a scan, or uses what is not supported.
    """
    keys, end = _parse(path)
    count = axes(needed(keys, "NDims", path), path)
    sizes = numbers(needed(keys, "DimSize", path), int, count, "sizes", path)
    channel_axis = 3 if count == 4 else None
    components = whole(keys.get("ElementNumberOfChannels", "1"), "channels", path)
    if components != 1:
        if channel_axis is not None and sizes[3] != 1:
            raise VolumeError(path, "its voxels have channels and times", "Split the file")
        sizes, channel_axis = [components, *sizes[:3]], 0
    notes: list[str] = []
    affine = _place(keys, count, path, notes)
    big = _true(keys, "BinaryDataByteOrderMSB", "ElementByteOrderMSB")
    dtype, swapped = voxel_type(needed(keys, "ElementType", path), _DTYPES, big, path)
    if not _true(keys, "BinaryData", default=True):
        raise VolumeError(path, "its voxels are text", "Save it with binary voxels")
    for name, usual in (("Slope", 1.0), ("Offset", 0.0)):
        key = f"ElementToIntensityFunction{name}"
        if numbers(keys.get(key, str(usual)), float, 1, key, path) != [usual]:
            notes.append(f"{key} is ignored, as ITK does")
    named = keys["ElementDataFile"]
    local = named.upper() == "LOCAL"
    packed = _true(keys, "CompressedData")
    skip = 0 if local else whole(keys.get("HeaderSize", "0"), "bytes to skip", path)
    if skip < -1 or (packed and skip):
        raise VolumeError(path, "bytes before its voxels are to be skipped", REWRITE)
    return checked(
        path,
        sizes,
        channel_axis,
        affine,
        dtype,
        data_path=path if local else voxel_file(path, named),
        offset=end if local else skip,
        swapped=swapped,
        packed="zlib" if packed else None,
        notes=notes,
    )


def _parse(path: Path) -> tuple[dict[str, str], int]:
    """Keys and values, and where they end."""
    block = start_of(path)
    keys: dict[str, str] = {}
    at = 0
    while at < len(block):
        end = block.find(b"\n", at)
        line = block[at : end if end >= 0 else len(block)].rstrip(b"\r").decode("utf-8", "replace")
        at = end + 1 if end >= 0 else len(block)
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([^=:]*)[=:](.*)", line)
        if not match:
            # The magic of this format is its first key.
            reason = f"its header holds {line[:60]!r}, which is not a key" if keys else "not a MetaImage file"
            raise VolumeError(path, reason, REWRITE if keys else "Check what the file is")
        keys[match[1].strip()] = match[2].strip()
        if match[1].strip() == "ElementDataFile":
            return keys, at
    if not keys:
        raise VolumeError(path, "not a MetaImage file", "Check what the file is")
    raise unfinished(path, block)


def _true(keys: dict[str, str], *names: str, default: bool = False) -> bool:
    values = [keys[name] for name in names if name in keys]
    return values[0][:1].lower() in ("t", "1", "y") if values else default


def _place(keys: dict[str, str], count: int, path: Path, notes: list[str]) -> np.ndarray:
    """Voxel → mm, RAS+."""

    def three(names: tuple[str, ...], otherwise: str) -> np.ndarray:
        given = [keys[name] for name in names if name in keys] or [otherwise]
        return np.array(numbers(given[0], float, count, names[0], path))[:3]

    spacing = three(("ElementSpacing", "ElementSize"), " ".join("1" * count))
    origin = three(("Origin", "Offset", "Position"), " ".join("0" * count))
    given = [keys[name] for name in ("TransformMatrix", "Rotation", "Orientation") if name in keys]
    directions = np.eye(count)
    if given:
        # One axis after the other: each row is where an axis of the voxels points.
        directions = np.reshape(
            numbers(given[0], float, count * count, "TransformMatrix", path), (count, count)
        ).T
    else:
        notes.append("no directions are given; left and right, front and back are not known")
    if not {"ElementSpacing", "ElementSize"} & set(keys):
        notes.append("no voxel sizes are given; 1 mm is assumed")
    if count == 4 and (directions[3, :3].any() or directions[:3, 3].any()):
        raise VolumeError(path, "its fourth axis lies in space", "Use a file with a 3D scan")
    affine = np.eye(4)
    affine[:3, :3] = directions[:3, :3] * spacing
    affine[:3, 3] = origin
    turned: np.ndarray = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return turned

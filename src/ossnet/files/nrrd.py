"""Headers of NRRD files (`.nrrd`, `.nhdr`), which 3D Slicer writes, its segmentations (`.seg.nrrd`) included.

Fields and their meaning: the format's definition, teem.sourceforge.net/nrrd/format.html. Of what it allows, voxels
as text or packed by bzip2 and voxels in many files are refused. What it leaves open is read as ITK does.
"""

import re
from pathlib import Path
from typing import Literal

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
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long"), "i8"),
    **dict.fromkeys(("signed long long int", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int"), "u8"),
    **dict.fromkeys(("uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}

_SPACES = {
    **dict.fromkeys(("rightanteriorsuperior", "ras"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("leftanteriorsuperior", "las"), (-1.0, 1.0, 1.0)),
    **dict.fromkeys(("leftposteriorsuperior", "lps"), (-1.0, -1.0, 1.0)),
}
"""Space, its words together → signs that bring it to RAS. (With time, the fourth axis is none in space.)"""

MAKER = "ossnet"
"""The key of what made a label map of ours (`LabelMap.origin`)."""

_UNITS = {"": 1.0, "mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 1e-3, "µm": 1e-3, "μm": 1e-3}


def read_nrrd_header(path: Path) -> Header:
    """Read and check the header of an NRRD file without touching its voxels.

    Raises:
        VolumeError: The file is missing or damaged, is not a scan, or uses what is not supported.
    """
    fields, pairs, end = _parse(path)
    count = axes(needed(fields, "dimension", path), path)
    sizes = numbers(needed(fields, "sizes", path), int, count, "sizes", path)
    kinds = fields.get("kinds", "").lower().split()
    kinds += ["domain"] * (count - len(kinds))
    notes: list[str] = []
    affine, channel_axis = _place(fields, kinds, count, path, notes)
    if channel_axis is not None and (
        kinds[channel_axis].endswith("color") or kinds[channel_axis] == "complex"
    ):
        what = "complex numbers" if kinds[channel_axis] == "complex" else "colours"
        raise VolumeError(path, f"the voxels are {what}", "Save it with integer or float voxels")
    dtype, swapped = _type(fields, path)
    data_path, offset, packed = _voxels(fields, end, path)
    return checked(
        path,
        sizes,
        channel_axis,
        affine,
        dtype,
        data_path=data_path,
        offset=offset,
        swapped=swapped,
        packed=packed,
        notes=notes,
        names=_segments(pairs),
        origin=pairs.get(MAKER, ""),
    )


def _parse(path: Path) -> tuple[dict[str, str], dict[str, str], int | None]:
    """Fields by their names without spaces, pairs of key and value, and where voxels begin (None: in another file)."""
    block = start_of(path)
    if not block.startswith(b"NRRD000"):
        raise VolumeError(path, "not an NRRD file (it does not begin with NRRD)", "Check what the file is")
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    at = block.find(b"\n") + 1
    while at:
        end = block.find(b"\n", at)
        line = block[at : end if end >= 0 else len(block)].rstrip(b"\r").decode("utf-8", "replace")
        at = end + 1
        if not line:
            return fields, pairs, None if "datafile" in fields else at or len(block)
        if line.startswith("#"):
            continue
        if match := re.fullmatch(r"([^:]*):=(.*)", line):
            pairs[match[1]] = match[2]
        elif match := re.fullmatch(r"([^:]+): *(.*)", line):
            fields[match[1].strip().lower().replace(" ", "")] = match[2].strip()
            if fields.get("datafile", "").startswith("LIST"):
                break  # names of files follow
        else:
            raise VolumeError(path, f"its header holds {line[:60]!r}, which is not a field", REWRITE)
    if "datafile" not in fields:
        raise unfinished(path, block)
    return fields, pairs, None


def _place(
    fields: dict[str, str], kinds: list[str], count: int, path: Path, notes: list[str]
) -> tuple[np.ndarray, int | None]:
    """Affine (voxel → mm, RAS+), and which axis holds channels."""
    affine = np.eye(4)
    space = re.sub(r"[-_ ]", "", fields.get("space", "").lower())
    dimensions = 4 if fields.get("spacedimension") == "4" or space.endswith("time") else 3
    if "spacedirections" in fields:
        vectors = _vectors(fields["spacedirections"], count, dimensions, path)
        inside = [axis for axis, vector in enumerate(vectors) if vector is not None]
        columns = [vector for vector in vectors if vector is not None]
    else:
        inside = [axis for axis, kind in enumerate(kinds) if kind in ("domain", "space", "???", "none")]
        inside = inside[:3]  # four alike: the last is none in space
        spacings = _each(fields, "spacings", 1.0, count, path)
        columns = [spacings[axis] * np.eye(3)[i] for i, axis in enumerate(inside)]
        notes.append(
            "no directions are given; voxel sizes are used, and left and right, front and back are not known"
        )
    if len(inside) != 3:
        raise VolumeError(path, f"{len(inside)} of its axes lie in space, not 3", "Use a file with a 3D scan")
    affine[:3, :3] = np.stack(columns, axis=1)
    if "spaceorigin" in fields:
        (origin,) = _vectors(fields["spaceorigin"], 1, dimensions, path)
        if origin is not None:
            affine[:3, 3] = origin
    elif "axismins" in fields and "spacedirections" not in fields:
        # Where voxels begin: at their borders, or at their centres.
        centred = "node" in fields.get("centerings", fields.get("centers", "")).lower()
        mins = _each(fields, "axismins", 0.0, count, path)
        affine[:3, 3] = [mins[axis] + (0 if centred else spacings[axis] / 2) for axis in inside]
    if "spacedirections" in fields and space.removesuffix("time") not in _SPACES:
        notes.append(
            f"the space {fields.get('space', '')!r} does not say left from right; left-posterior-superior is "
            "assumed, as ITK does"
        )
    signs = _SPACES.get(space.removesuffix("time"), _SPACES["lps"])
    affine = np.diag([*signs, 1.0]) @ affine * _unit(fields, notes)
    affine[3] = (0, 0, 0, 1)
    others = [axis for axis in range(count) if axis not in inside]
    return affine, others[0] if others else None


def _each(fields: dict[str, str], name: str, otherwise: float, count: int, path: Path) -> list[float]:
    """A number an axis; `otherwise` where it is not known."""
    given = fields.get(name, " ".join(["nan"] * count))
    return [otherwise if n != n else n for n in numbers(given, float, count, name, path)]


def _vectors(text: str, count: int, dimensions: int, path: Path) -> list[np.ndarray | None]:
    """Vectors in brackets, one an axis; None for axes that are none in space, as the last of four dimensions."""
    found: list[np.ndarray | None] = []
    for match in re.finditer(r"none|\(([^()]*)\)", text):
        if match[1] is None:
            found.append(None)
            continue
        what = "coordinates of a vector"
        vector = np.array(numbers(match[1].replace(",", " "), float, dimensions, what, path))
        if count > 1 and dimensions == 4 and vector[3] and vector[:3].any():
            raise VolumeError(path, "its fourth axis lies in space", "Use a file with a 3D scan")
        outside = count > 1 and dimensions == 4 and not vector[:3].any()
        found.append(None if outside or np.isnan(vector).all() else vector[:3])
    if len(found) != count:
        raise VolumeError(path, f"{count} vectors are needed, not {text[:80]!r}", REWRITE)
    return found


def _unit(fields: dict[str, str], notes: list[str]) -> float:
    """Unit of length → mm."""
    given = fields.get("spaceunits", "" if "spacedirections" in fields else fields.get("units", ""))
    named = {unit.strip().lower() for unit in re.findall(r'"([^"]*)"', given)[:3]}
    named = {"um" if "micro" in unit else unit for unit in named} or {""}
    if len(named) > 1 or not named <= set(_UNITS):
        notes.append(f"unknown units of length ({given}); millimetres are assumed")
        return 1.0
    factor = _UNITS[named.pop()]
    if factor != 1:
        notes.append(f"lengths are in {given.split()[0]} and are converted to mm")
    return factor


def _type(fields: dict[str, str], path: Path) -> tuple[np.dtype[np.generic], bool]:
    """Voxel type in native byte order, and whether the file has the other one."""
    named = needed(fields, "type", path).lower()
    order = "little" if _DTYPES.get(named, "")[1:] == "1" else needed(fields, "endian", path).lower()
    if order not in ("little", "big"):
        raise VolumeError(path, f"the order of its bytes is {order[:40]!r}", REWRITE)
    return voxel_type(named, _DTYPES, order == "big", path)


def _voxels(
    fields: dict[str, str], end: int | None, path: Path
) -> tuple[Path, int, Literal["gzip", "zlib"] | None]:
    """The file with the voxels, where they begin in it, and how they are packed."""
    encoding = needed(fields, "encoding", path).lower()
    if encoding not in ("raw", "gz", "gzip"):
        raise VolumeError(
            path, f"its voxels are encoded as {encoding[:40]!r}", "Save it with the encoding raw or gzip"
        )
    packed: Literal["gzip"] | None = None if encoding == "raw" else "gzip"
    data_path = path if end is not None else voxel_file(path, fields["datafile"])
    offset = end or 0
    skip = whole(fields.get("byteskip", "0"), "bytes to skip", path)
    lines = whole(fields.get("lineskip", "0"), "lines to skip", path)
    if lines or (packed and skip) or skip < -1:
        raise VolumeError(
            path, "bytes before its voxels are to be skipped", "Save it as one file with 3D Slicer"
        )
    return data_path, -1 if skip == -1 else offset + skip, packed


def _segments(pairs: dict[str, str]) -> dict[int, str]:
    """Names of 3D Slicer's segments, by the values of their voxels."""
    names: dict[int, str] = {}
    for key, name in pairs.items():
        match = re.fullmatch(r"(Segment\d+)_Name", key)
        value = pairs.get(f"{match[1]}_LabelValue", "") if match else ""
        # What Slicer calls a segment that nobody named says nothing.
        if value.strip().isdecimal() and not re.fullmatch(r"Segment_\d+", name.strip()):
            names[int(value)] = name.strip()
    return names

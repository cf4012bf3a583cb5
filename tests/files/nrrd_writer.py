"""NRRD files as 3D Slicer writes them."""

import gzip
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_TYPES = {"uint8": "unsigned char", "int16": "short", "float32": "float"}


def write_nrrd(
    path: Path, data: np.ndarray, affine: np.ndarray, names: Mapping[int, str] | None = None
) -> None:
    """A scan or label map (X, Y, Z) at an affine (RAS+), with the names of its segments."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine

    def vector(values: np.ndarray) -> str:
        return "(" + ",".join(repr(float(v)) for v in values) + ")"

    fields = {
        "type": _TYPES[data.dtype.name],
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": " ".join(str(n) for n in data.shape),
        "space directions": " ".join(vector(lps[:3, axis]) for axis in range(3)),
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "gzip",
        "space origin": vector(lps[:3, 3]),
    }
    pairs = [
        f"Segment{i}_LabelValue:={value}\nSegment{i}_Name:={name}\n"
        for i, (value, name) in enumerate((names or {}).items())
    ]
    head = "".join(["NRRD0004\n", *(f"{k}: {v}\n" for k, v in fields.items()), *pairs, "\n"])
    voxels = data.astype(data.dtype.newbyteorder("<")).tobytes(order="F")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.encode() + gzip.compress(voxels))

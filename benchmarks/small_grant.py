"""What a small grant costs where a scan is full of structures: blocks that are not kept are computed again.

    python benchmarks/small_grant.py Dataset004_Hippocampus [--memory 300MB] [--output FILE]

Sixty hippocampi side by side make a scan of 192 × 192 × 160 voxels; the shipped model segments it, once as it is and
once within the grant.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine, write

import ossnet
from ossnet.data.scans import images_in
from ossnet.field.model import versions

CELL, TIMES = (38, 60, 40), (5, 3, 4)


def tiled(data: Path) -> ossnet.Volume:
    """The first scans of a data set in the cells of a grid, each brought to mean 0 and deviation 1."""
    out = np.zeros((192, 192, 160), np.float32)
    cases = images_in(data / "imagesTr")
    for index, place in enumerate(np.ndindex(*TIMES)):
        scan = ossnet.read(cases[index].images[0]).data[0].astype(np.float32)
        part = ((scan - scan.mean()) / scan.std())[tuple(slice(n) for n in CELL)]
        out[tuple(slice(p * c, p * c + n) for p, c, n in zip(place, CELL, part.shape, strict=True))] = part
    return ossnet.Volume(out[None], np.eye(4))


def segmented(
    model: ossnet.Model, scan: ossnet.Volume, memory: str | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Labels, and what they took."""
    started = time.perf_counter()
    found = model.field(scan, device="cpu", memory=memory).segment()
    return found.data, {
        "memory": memory,
        "seconds": round(time.perf_counter() - started, 1),
        "locations": found.evaluated,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--memory", default="300MB")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model, scan = ossnet.load("hippocampus", mirror=False), tiled(given.data)
    whole, free = segmented(model, scan, None)
    labels, tight = segmented(model, scan, given.memory)
    results = {"rows": [free, tight], "voxels_that_differ": int((labels != whole).sum())}
    write(given.output, {"machine": machine(), "versions": versions(), **results})


if __name__ == "__main__":
    main()

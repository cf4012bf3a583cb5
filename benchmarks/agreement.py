"""The octree against asking everywhere, with a trained network on real scans: how many voxels differ, and why.

    python benchmarks/agreement.py --model runs/atrium --data Dataset101_LeftAtrium --cases 10 --output FILE.json

A voxel that differs lies in a component that no location hit (the only thing the octree can miss), or its two
answers are a close call that rounding decided (half precision, or another order of additions).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine, write
from scipy import ndimage

from ossnet.data.layouts import open_dataset
from ossnet.field.model import Model, versions


def causes(found: np.ndarray, dense: np.ndarray) -> dict[str, int]:
    """Voxels that differ, by cause."""
    differing = found != dense
    missed = 0
    for label in np.unique(dense[differing]):
        parts, count = ndimage.label(dense == label)
        for part in range(1, count + 1):
            inside = parts == part
            if not (found[inside] == label).any():
                missed += int(inside.sum())
    return {"differing": int(differing.sum()), "in components that no location hit": missed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model = Model.load(given.model)
    dataset = open_dataset(given.data)
    names = json.loads((Path(given.model) / "splits.json").read_text())["val"][: given.cases]
    rows: list[dict[str, Any]] = []
    for name in names:
        volume, _ = dataset.read(dataset[name])
        field = model.field(volume, device="cpu", precision=given.precision)
        found = field.segment()
        started = time.perf_counter()
        dense = field.segment(strategy="dense")
        rows.append(
            {
                "case": name,
                "voxels": found.data.size,
                "surface_voxels": found.surface_voxels(),
                "locations": found.evaluated,
                "seconds": round(found.seconds, 3),
                "dense_seconds": round(time.perf_counter() - started, 3),
                **causes(found.data, dense.data),
            }
        )
        print(rows[-1], flush=True)
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "case"}
    results = {
        "what": "Octree against dense evaluation with a trained network",
        "variant": model.variant,
        "precision": given.precision,
        "share_differing": total["differing"] / total["voxels"],
        "locations_per_surface_voxel": total["locations"] / max(total["surface_voxels"], 1),
        "dense_over_octree_seconds": total["dense_seconds"] / total["seconds"],
        "total": total,
        "cases": rows,
        "machine": machine(),
        "versions": versions(),
    }
    write(given.output, results)


if __name__ == "__main__":
    main()

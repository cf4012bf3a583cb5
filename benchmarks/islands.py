"""Islands far from the structure: how many a trained network draws, and what they cost.

    python benchmarks/islands.py --model runs/atrium --data Dataset101_LeftAtrium --output FILE.json

Scores of the validation cases as they are and with the largest component of each structure alone
(`ossnet segment --largest`, off by default): what that would gain.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine, write
from scipy import ndimage

from ossnet.data.layouts import open_dataset
from ossnet.evaluation.metrics import compare
from ossnet.evaluation.tables import Row, summarise
from ossnet.field.model import Model, versions


def largest_only(labels: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The largest component of each structure, the number of others, and their voxels."""
    out, others, voxels = np.zeros_like(labels), 0, 0
    for label in np.unique(labels[labels > 0]):
        parts, count = ndimage.label(labels == label)
        sizes = np.bincount(parts.ravel())[1:]
        out[parts == sizes.argmax() + 1] = label
        others += count - 1
        voxels += int(sizes.sum() - sizes.max())
    return out, others, voxels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model = Model.load(given.model)
    dataset = open_dataset(given.data)
    rows: dict[str, list[Row]] = {"as it is": [], "largest components": []}
    cases: list[dict[str, Any]] = []
    for name in json.loads((Path(given.model) / "splits.json").read_text())["val"]:
        volume, labels = dataset.read(dataset[name])
        found = model.field(volume, device="cpu").segment().data
        filtered, others, voxels = largest_only(found)
        entry: dict[str, Any] = {"case": name, "other components": others, "their voxels": voxels}
        for way, answer in zip(rows, (found, filtered), strict=True):
            scores = compare(answer, labels.data, labels.affine, model.label_names, 1.0)
            rows[way] += [Row(name, k, model.label_names[k], v) for k, v in scores.items()]
            entry[way] = {k: [round(v.dice or 0, 4), round(v.hd95_mm or 0, 3)] for k, v in scores.items()}
        cases.append(entry)
        print(entry, flush=True)
    means: dict[str, Any] = {}
    voxel_mm = float(np.abs(np.linalg.det(labels.affine[:3, :3])) ** (1 / 3))
    for way, entries in rows.items():
        estimates = summarise(entries).classes[-1].estimates
        means[way] = {key: estimates[key].mean for key in ("dice", "hd95_mm", "assd_mm")}
        means[way]["hd95_voxels"] = (estimates["hd95_mm"].mean or 0) / voxel_mm
    results = {
        "what": "Islands in dense segmentations of validation cases",
        "variant": model.variant,
        "means": means,
        "cases": cases,
        "machine": machine(),
        "versions": versions(),
    }
    write(given.output, results)


if __name__ == "__main__":
    main()

"""Whether a network's probabilities are those of the voxels, and what another threshold than 0.5 would gain.

    python benchmarks/calibration.py --model runs/atrium --data Dataset101_LeftAtrium --output FILE.json

Each structure against the rest, in the validation cases, asked everywhere. A network that is certain of what its
draw of locations favoured, and not of what the voxels hold, shows here: what it calls 0.5 is labelled less often, and
a higher threshold scores better.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine, write

from ossnet.data.layouts import open_dataset
from ossnet.evaluation.metrics import compare
from ossnet.evaluation.tables import Row, summarise
from ossnet.field.model import Model, versions

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
TENTHS = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model = Model.load(given.model)
    dataset = open_dataset(given.data)
    rows: dict[float, list[Row]] = {t: [] for t in THRESHOLDS}
    sums = {k: np.zeros((3, TENTHS)) for k in model.label_names}
    names = json.loads((Path(given.model) / "splits.json").read_text())["val"]
    for name in names[: given.cases]:
        volume, labels = dataset.read(dataset[name])
        found = model.field(volume, device="cpu").probability_map().data
        for place, (k, title) in enumerate(model.label_names.items()):
            p = found[place + 1 if len(found) > 1 else 0]
            truth = labels.data == k if len(found) > 1 else labels.data > 0
            tenth = np.minimum((p * TENTHS).astype(np.int64), TENTHS - 1).ravel()
            for row, weights in zip(sums[k], (None, truth.ravel(), p.ravel()), strict=True):
                row += np.bincount(tenth, weights, TENTHS)
            for t in THRESHOLDS:
                masks = [m.astype(np.uint8) for m in (p > t, truth)]
                scores = compare(*masks, labels.affine, {1: title}, 1.0)
                rows[t].append(Row(name, k, title, scores[1]))
        print(name, flush=True)
    voxel_mm = float(np.abs(np.linalg.det(labels.affine[:3, :3])) ** (1 / 3))
    by_threshold: dict[str, Any] = {}
    for t, entries in rows.items():
        estimates = summarise(entries).classes[-1].estimates
        keys = ("dice", "hd95_mm", "assd_mm", "volume_difference_percent")
        by_threshold[str(t)] = {key: estimates[key].mean for key in keys}
        by_threshold[str(t)]["hd95_voxels"] = (estimates["hd95_mm"].mean or 0) / voxel_mm
    results = {
        "what": "Predicted and observed share of the structure, by tenths of the probability; scores by threshold",
        "variant": model.variant,
        "cases": len(names[: given.cases]),
        "thresholds": by_threshold,
        "tenths": {
            title: [
                {"voxels": int(n), "predicted": round(p / max(n, 1), 4), "observed": round(o / max(n, 1), 4)}
                for n, o, p in sums[k].T
            ]
            for k, title in model.label_names.items()
        },
        "machine": machine(),
        "versions": versions(),
    }
    write(given.output, results)


if __name__ == "__main__":
    main()

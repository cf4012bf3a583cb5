"""Whether a network's probabilities are those of the voxels, and what another threshold than 0.5 would gain.

    python benchmarks/calibration.py --model runs/atrium --data Dataset101_LeftAtrium --output FILE.json

Each structure against the rest, in the validation cases (of the run, or of fold 0), asked everywhere. A network that is
certain of what its draw of locations favoured, and not of what the voxels hold, shows here: what it calls 0.5 is
labelled less often, and a higher threshold scores better. What a temperature cures is fitted on every second case and
measured on the others, at the places that a training asks.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, write

from ossnet.data.cache import load_case
from ossnet.data.cases import Dataset
from ossnet.data.layouts import open_dataset
from ossnet.data.splits import split
from ossnet.evaluation.metrics import compare
from ossnet.evaluation.tables import Row, summarise
from ossnet.field.asking import probabilities
from ossnet.field.model import Model, versions
from ossnet.training.calibration import asked, temperature

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
TENTHS = 10


def cured(model: Model, dataset: Dataset, names: Sequence[str]) -> dict[str, Any]:
    """Likelihood and error of the confidence, as the network answers and with a temperature fitted on other cases."""
    cases = [load_case(dataset, dataset[name], model.preparation, model.classes) for name in names]
    found = [asked(model.field(case.volume(), device="cpu"), case, len(cases)) for case in cases]
    fitted, judged = ([torch.cat(parts) for parts in zip(*found[i::2], strict=True)] for i in range(2))
    out: dict[str, Any] = {}
    for told, divisor in (("as answered", 1.0), ("calibrated", temperature(*fitted))):
        p = torch.from_numpy(probabilities(judged[0].numpy(), divisor)).double()
        p = torch.stack([1 - p, p], dim=1) if p.ndim == 1 else p
        right = p.gather(1, judged[1][:, None])[:, 0]
        confidence, chosen = p.max(dim=1)
        hit = (chosen == judged[1]).double()
        tenth = (confidence * TENTHS).long().clamp(max=TENTHS - 1)
        gaps = [float((hit - confidence)[tenth == t].sum()) for t in range(TENTHS)]
        doubt = confidence < 0.99
        out[told] = {
            "temperature": divisor,
            "negative log likelihood": round(float(-right.clamp(min=1e-12).log().mean()), 5),
            "expected calibration error": round(sum(map(abs, gaps)) / len(p), 5),
            "below 0.99": {
                "share": round(float(doubt.double().mean()), 4),
                "confidence": round(float(confidence[doubt].mean()), 4),
                "right": round(float(hit[doubt].mean()), 4),
            },
        }
    return out


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
    model.metadata.pop("temperature", None)
    dataset = open_dataset(given.data)
    rows: dict[float, list[Row]] = {t: [] for t in THRESHOLDS}
    sums = {k: np.zeros((3, TENTHS)) for k in model.label_names}
    file = Path(given.model) / "splits.json"
    names = json.loads(file.read_text())["val"] if file.is_file() else split(dataset, 0).validation
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
        "temperature": cured(model, dataset, names[: given.cases]),
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

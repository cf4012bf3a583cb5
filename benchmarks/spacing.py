"""The same scan at other spacings: does a trained network draw the same structure in millimetres?

    python benchmarks/spacing.py --model runs/atrium --data Dataset101_LeftAtrium --cases 4 --output FILE.json

A scan is resampled to a multiple of its spacing (cubic; blurred first where voxels grow), segmented, and answered on
the grid of the original scan. Dice is that against the segmentation of the original, and against the reference.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine, write
from scipy import ndimage

from ossnet.data.layouts import open_dataset
from ossnet.field.grid import Grid
from ossnet.field.model import Model, versions
from ossnet.volume import Volume

FACTORS = (0.75, 0.85, 1.0, 1.25, 1.5)


def resampled(volume: Volume, factor: float) -> Volume:
    """The scan with voxels `factor` times as large, over the same extent."""
    base = Grid(volume.shape, volume.affine)
    grid = Grid.with_spacing(base, tuple(s * factor for s in volume.spacing))  # type: ignore[arg-type]
    to_source = grid.to(base)
    channels = []
    for channel in volume.data.astype(np.float32):
        source = ndimage.gaussian_filter(channel, 0.5 * np.sqrt(max(factor**2 - 1, 0)))
        channels.append(
            ndimage.affine_transform(
                source, to_source[:3, :3], to_source[:3, 3], grid.shape, order=3, mode="nearest"
            )
        )
    return Volume(np.stack(channels), grid.affine)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over the structures that either holds."""
    labels = sorted((set(np.unique(one)) | set(np.unique(other))) - {0})
    scores = [2 * ((one == k) & (other == k)).sum() / ((one == k).sum() + (other == k).sum()) for k in labels]
    return float(np.mean(scores)) if scores else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model = Model.load(given.model)
    dataset = open_dataset(given.data)
    names = json.loads((Path(given.model) / "splits.json").read_text())["val"][: given.cases]
    rows: list[dict[str, Any]] = []
    for name in names:
        volume, reference = dataset.read(dataset[name])
        original = model.field(volume, device="cpu").segment()
        for factor in FACTORS:
            changed = resampled(volume, factor)
            found = model.field(changed, device="cpu").segment(like=volume)
            rows.append(
                {
                    "case": name,
                    "factor": factor,
                    "shape": list(changed.shape),
                    "dice_with_itself": round(dice(found.data, original.data), 4),
                    "dice_with_reference": round(dice(found.data, reference.data), 4),
                }
            )
            print(rows[-1], flush=True)
    mean = {
        str(f): float(np.mean([r["dice_with_itself"] for r in rows if r["factor"] == f])) for f in FACTORS
    }
    results = {
        "what": "Segmentations of resampled scans against those of the original scans",
        "mean_dice_with_itself": mean,
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
    }
    write(given.output, results)


if __name__ == "__main__":
    main()

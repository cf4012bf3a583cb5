"""Finer than the data: a network trained on half-resolution scans, asked at full resolution.

    python benchmarks/finer.py make  Dataset101_LeftAtrium half/Dataset101_LeftAtrium
    ossnet train --data half/Dataset101_LeftAtrium --out runs/half --minutes 20
    python benchmarks/finer.py judge runs/half half/Dataset101_LeftAtrium Dataset101_LeftAtrium --output FILE.json

`make` averages 2×2×2 voxels of image and label (label: at least half of them). `judge` compares, against the labels at
full resolution, the field asked there with what users do otherwise: its mask at half resolution upsampled to the
nearest voxel, or trilinearly and cut at one half; and its probabilities at half resolution upsampled trilinearly.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine, write
from scipy import ndimage

from ossnet.data.layouts import open_dataset
from ossnet.evaluation.metrics import compare
from ossnet.evaluation.tables import Row, summarise
from ossnet.field.grid import Grid
from ossnet.field.model import Model, versions
from ossnet.volume import LabelMap, Volume


def halved(array: np.ndarray) -> np.ndarray:
    """Means of 2×2×2 voxels; an odd last slice is dropped."""
    x, y, z = (n // 2 for n in array.shape)
    blocks = array[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2)
    out: np.ndarray = blocks.mean(axis=(1, 3, 5), dtype=np.float32)
    return out


def make(source: Path, target: Path) -> None:
    """Write the data set at half resolution."""
    dataset = open_dataset(source)
    for name in ("dataset.json", "splits_final.json"):
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)
    step = np.diag([2.0, 2.0, 2.0, 1.0])
    step[:3, 3] = 0.5
    for case in dataset.cases:
        volume, labels = dataset.read(case)
        affine = volume.affine @ step
        image = np.stack([np.rint(halved(c)) for c in volume.data]).astype(volume.data.dtype)
        Volume(image, affine).save(target / "imagesTr" / f"{case.name}_0000.nii.gz")
        mask = (halved(labels.data > 0) >= 0.5).astype(np.uint8)
        LabelMap(mask, affine).save(target / "labelsTr" / f"{case.name}.nii.gz")


def upsampled(values: np.ndarray, source: Grid, target: Grid, order: int) -> np.ndarray:
    """Values on another grid; beyond the border the border's."""
    matrix = target.to(source)
    out: np.ndarray = ndimage.affine_transform(
        values, matrix[:3, :3], matrix[:3, 3], target.shape, order=order, mode="nearest"
    )
    return out


def judge(run: Path, half: Path, full: Path) -> dict[str, Any]:
    """Dice, HD95 and ASSD of each way."""
    model = Model.load(run)
    coarse_set, fine_set = open_dataset(half), open_dataset(full)
    rows: dict[str, list[Row]] = {}
    for name in json.loads((run / "splits.json").read_text())["val"]:
        scan, _ = coarse_set.read(coarse_set[name])
        original, labels = fine_set.read(fine_set[name])
        field = model.field(scan, device="cpu")
        coarse = field.segment()
        grids = Grid(scan.shape, scan.affine), Grid(original.shape, original.affine)
        ways = {
            "field at full resolution": field.segment(like=original).data,
            "mask, nearest": upsampled(coarse.data, *grids, 0),
            "mask, trilinear": (upsampled(coarse.data.astype(np.float32), *grids, 1) > 0.5).astype(np.uint8),
            "probabilities, trilinear": (upsampled(field.probability_map().data[0], *grids, 1) > 0.5).astype(
                np.uint8
            ),
        }
        for way, found in ways.items():
            scores = compare(found, labels.data, labels.affine, model.label_names, 1.0)
            rows.setdefault(way, []).extend(Row(name, k, model.label_names[k], v) for k, v in scores.items())
        print(name, {way: round(r[-1].scores.dice or 0, 4) for way, r in rows.items()}, flush=True)
    out: dict[str, Any] = {}
    for way, entries in rows.items():
        estimates = summarise(entries).classes[-1].estimates
        out[way] = {
            key: {"mean": estimates[key].mean, "low": estimates[key].low, "high": estimates[key].high}
            for key in ("dice", "hd95_mm", "assd_mm")
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(dest="way", required=True)
    first = ways.add_parser("make")
    first.add_argument("source", type=Path)
    first.add_argument("target", type=Path)
    second = ways.add_parser("judge")
    for name in ("run", "half", "full"):
        second.add_argument(name, type=Path)
    second.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.way == "make":
        make(given.source, given.target)
        return
    results = {
        "what": "Trained at half resolution, judged at full resolution",
        "ways": judge(given.run, given.half, given.full),
        "machine": machine(),
        "versions": versions(),
    }
    write(given.output, results)


if __name__ == "__main__":
    main()

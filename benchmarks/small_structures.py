"""What the default network learns of structures of few voxels: spots alone, and tumours in an organ.

    python benchmarks/small_structures.py work --output FILE.json

40 synthetic scans of 96³ voxels each (32 for training, 8 for validation), one core, one seed. Every kind is trained
with the weight that little structures keep (`CropSettings.least_near`) and without.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from measuring import machine, write
from scipy.ndimage import gaussian_filter

from ossnet.data.crops import CropSettings
from ossnet.training.recipes.multiscale import crop_settings as full_crops
from ossnet.training.settings import make_settings
from ossnet.training.train import train
from ossnet.volume import LabelMap, Volume

SIZE, CASES = 96, 40
GRID = np.stack(np.meshgrid(*[np.arange(float(SIZE))] * 3, indexing="ij"))


def distance(point: np.ndarray) -> np.ndarray:
    """Voxels from a point."""
    return np.asarray(np.sqrt(((GRID - point[:, None, None, None]) ** 2).sum(axis=0)))


def texture(rng: np.random.Generator, sigma: float, std: float) -> np.ndarray:
    """Smooth noise."""
    found = gaussian_filter(rng.standard_normal((SIZE,) * 3), sigma)
    return np.asarray(found * std / found.std())


def spots(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """1 to 5 bright spots of 4 to 9 voxels across, anywhere in noisy tissue."""
    image, labels = texture(rng, 6, 0.4), np.zeros((SIZE,) * 3, np.uint8)
    for _ in range(rng.integers(1, 6)):
        inside = distance(rng.uniform(8, SIZE - 9, 3)) < rng.uniform(2.0, 4.5)
        labels[inside] = 1
        image[inside] += 1.0
    return image, labels


def tumours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """1 to 4 dark tumours of 4 to 9 voxels across in a bright organ of 48 to 64."""
    middle, radius = (SIZE - 1) / 2 + rng.uniform(-6, 6, 3), rng.uniform(24, 32)
    labels = (distance(middle) + texture(rng, 10, 3.0) < radius).astype(np.uint8)
    image = texture(rng, 6, 0.4) + labels
    for _ in range(rng.integers(1, 5)):
        direction = rng.standard_normal(3)
        place = middle + direction / np.linalg.norm(direction) * rng.uniform(0, radius - 8)
        inside = (distance(place) < rng.uniform(2.0, 4.5)) & (labels > 0)
        labels[inside] = 2
        image[inside] -= 1.0
    return image, labels


KINDS: dict[str, tuple[Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]], tuple[str, ...]]] = {
    "spots": (spots, ("spot",)),
    "tumours in an organ": (tumours, ("organ", "tumour")),
}


def make(kind: str, out: Path) -> Path:
    """The data set, made once."""
    draw, names = KINDS[kind]
    root = out / f"Dataset{900 + list(KINDS).index(kind)}_{kind.split()[0].title()}"
    if (root / "dataset.json").is_file():
        return root
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(CASES):
        image, labels = draw(rng)
        image = gaussian_filter(image, 0.7) + rng.standard_normal(image.shape) * 0.25
        name = f"{names[-1]}_{i:03d}"
        scan = Volume((image * 100).astype(np.int16)[None], np.eye(4))
        scan.save(root / "imagesTr" / f"{name}_0000.nii.gz")
        LabelMap(labels, np.eye(4)).save(root / "labelsTr" / f"{name}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0} | {name: i for i, name in enumerate(names, 1)},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def run(data: Path, out: Path, steps: int, least_near: float) -> None:
    """One training; `out` is left alone when it is finished."""
    if (out / "validation.json").is_file():
        return

    def crops(*args: object) -> CropSettings:
        return replace(full_crops(*args), least_near=least_near)  # type: ignore[arg-type]

    settings = make_settings(
        changes=[
            "schedule.minutes=none",
            "schedule.epochs=1",
            f"schedule.steps_per_epoch={steps}",
            "runtime.threads=1",
            "runtime.tensorboard=false",
            "validation.picture=false",
        ]
    )
    with mock.patch("ossnet.training.recipes.multiscale.crop_settings", crops):
        train(data, out, settings, resume=(out / "settings.json").is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="data sets and runs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=list(KINDS))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for kind in given.only or KINDS:
        data = make(kind, given.work)
        for least_near in (0.0, CropSettings((1, 1, 1), (1, 1, 1)).least_near):
            out = given.work / f"{data.name}_{least_near}_{given.steps}"
            run(data, out, given.steps, least_near)
            found = json.loads((out / "validation.json").read_text())["summary"]
            dice = {entry["name"]: entry["estimates"]["dice"] for entry in found}
            runs.append({"kind": kind, "least_near": least_near, "steps": given.steps, "dice": dice})
            print(json.dumps(runs[-1]), flush=True)
    write(given.output, {"what": (__doc__ or "").splitlines()[0], "runs": runs, "machine": machine()})


if __name__ == "__main__":
    main()

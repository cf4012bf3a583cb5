"""How many locations the octree asks, on real label maps.

    python benchmarks/octree_counts.py DATA [--output FILE]

DATA is the folder with the reference data (`Dataset101_LeftAtrium/labelsTr`, `brats`, `lits`). Two kinds of
functions answer: *bare labels* (the label map) and *synthetic logits*: the signed distance to the label map,
smoothed with a Gaussian of one voxel and clipped to ±4. The synthetic logits stand in for a trained network;
the surface that counts is the one of the smoothed field. The coarse prediction of the start array is their
mean over blocks of 8³ voxels.

B1: foreground voxels with a 6-neighbour of another label. B2: all voxels with one.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage
from surfaces import surface_voxels

from ossnet.field.octree.refinement import ask
from ossnet.field.octree.released_stages import ReleasedStages
from ossnet.field.octree.tree import Octree
from ossnet.files.atomic import write_text

SIX = ndimage.generate_binary_structure(3, 1)


def synthetic_logits(labels: np.ndarray, clip: float = 4.0) -> np.ndarray:
    """Smoothed, clipped signed distance to a mask, in voxels; computed in the box around it only."""
    out = np.full(labels.shape, -clip, dtype=np.float32)
    margin = int(2 * clip) + 4
    box = tuple(
        slice(max(0, s.start - margin), s.stop + margin)
        for s in ndimage.find_objects((labels > 0).astype(int))[0]
    )
    inside = labels[box] > 0
    far = 2 * clip
    distance = np.where(
        inside,
        np.minimum(ndimage.distance_transform_edt(inside) - 0.5, far),
        -np.minimum(ndimage.distance_transform_edt(~inside) - 0.5, far),
    )
    out[box] = np.clip(ndimage.gaussian_filter(distance.astype(np.float32), 1.0), -clip, clip)
    return out


def blocks(values: np.ndarray, size: int = 8) -> np.ndarray:
    """Mean over blocks; the last block of an axis may reach past the end, padded with the edge."""
    padded = np.pad(values, [(0, -n % size) for n in values.shape], mode="edge")
    x, y, z = (n // size for n in padded.shape)
    return padded.reshape(x, size, y, size, z, size).mean(axis=(1, 3, 5))


def run(octree: Octree | ReleasedStages, values: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Answer an octree from a dense array: counts, its own CPU time, and what is wrong."""
    own, hit = 0.0, np.zeros(truth.shape, dtype=bool)
    while True:
        begin = time.process_time()
        voxels = octree.query()
        own += time.process_time() - begin
        if voxels is None:
            break
        labels, margins = ask(lambda v: values[tuple(v.T)], voxels, 2**16)
        hit[tuple(voxels.T)] = True
        begin = time.process_time()
        octree.update(labels, margins)
        own += time.process_time() - begin
    begin = time.process_time()
    found = octree.labels()
    own += time.process_time() - begin
    b1, b2 = surface_voxels(truth)
    wrong = found != truth
    return {
        "evaluated": octree.evaluated,
        "per_b1": round(octree.evaluated / b1, 3),
        "per_b2": round(octree.evaluated / b2, 3),
        "rounds": octree.rounds,
        "own_cpu_seconds": round(own, 3),
        "wrong_voxels": int(wrong.sum()),
        **({} if isinstance(octree, ReleasedStages) else explain(wrong, truth, hit)),
    }


def explain(wrong: np.ndarray, truth: np.ndarray, hit: np.ndarray) -> dict[str, Any]:
    """The components that no location hit; nothing else may be wrong."""
    if not wrong.any():
        return {}
    missed, other = [], 0
    for label in (0, 1):
        components, count = ndimage.label(truth == label, SIX)
        for component in np.unique(components[wrong & (truth == label)]):
            inside = components == component
            if hit[inside].any() or not wrong[inside].all():
                other += int(wrong[inside].sum())
            else:
                missed.append({"label": label, "voxels": int(inside.sum())})
        assert count
    return {"missed_components": missed, "wrong_in_components_hit": other}


def cases(data: Path) -> dict[str, np.ndarray]:
    """Masks: ten left atria, two whole tumours padded to 256×256×160, a liver at 512×512×256 (nearest)."""

    def read(path: Path) -> np.ndarray:
        return (np.asarray(nib.load(path).dataobj) > 0).astype(np.uint8)  # type: ignore[attr-defined]

    out = {
        path.name.split(".")[0]: read(path)
        for path in sorted((data / "Dataset101_LeftAtrium" / "labelsTr").glob("*.nii.gz"))[:10]
    }
    for path in sorted((data / "brats").rglob("*seg.nii.gz")):
        mask = read(path)
        gaps = [n - s for n, s in zip((256, 256, 160), mask.shape, strict=True)]
        out[path.name.split(".")[0]] = np.pad(mask, [(-(-g // 2), g // 2) for g in gaps])
    liver = read(data / "lits" / "segmentation-0.nii.gz")
    index = [np.arange(n) * s // n for n, s in zip((512, 512, 256), liver.shape, strict=True)]
    out["lits_segmentation-0"] = liver[np.ix_(*index)]
    return out


def region_rows(truth: np.ndarray, values: np.ndarray, seed: int = 0) -> list[dict[str, Any]]:
    """Ten random boxes about the surface: equality with the whole answer, cost against their size."""
    rng = np.random.default_rng(seed)
    whole = Octree(truth.shape)
    run(whole, values, truth)
    labels, inside = whole.labels(), np.argwhere(truth)
    rows = []
    for size in (8, 16, 16, 24, 32, 32, 48, 48, 64, 80):
        middle = inside[rng.integers(len(inside))] + rng.integers(-size // 2, size // 2, 3)
        low = np.clip(middle - size // 2, 0, np.array(truth.shape) - 1)
        high = np.minimum(low + size, truth.shape)
        box = (tuple(map(int, low)), tuple(map(int, high)))
        part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        row: dict[str, Any] = {"box": [list(b) for b in box]}
        for certain in (True, False):
            octree = Octree(truth.shape, region=box, certain=certain)
            begin = time.process_time()
            while (voxels := octree.query()) is not None:
                octree.update(values[tuple(voxels.T)])
            key = "certain" if certain else "unproven"
            row[key] = {
                "equal": bool((octree.labels() == labels[part]).all()),
                "evaluated": octree.evaluated,
                "of_whole": round(octree.evaluated / whole.evaluated, 3),
                "cpu_seconds": round(time.process_time() - begin, 4),
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "octree_counts.json"
    )
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "what": "locations asked per surface voxel (B1); synthetic logits: see the script",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cases": {},
    }
    for name, mask in cases(arguments.data).items():
        logits = synthetic_logits(mask)
        smooth = (logits > 0).astype(np.uint8)
        shape: Any = mask.shape
        coarse_labels = (blocks(mask.astype(np.float32)) > 0.5).astype(np.uint8)
        rows = {
            "bare, auto": run(Octree(shape), mask, mask),
            "bare, 8-4-1": run(Octree(shape, path=(8, 4, 1)), mask, mask),
            "bare, 16-8-4-1": run(Octree(shape, path=(16, 8, 4, 1)), mask, mask),
            "bare, start array": run(Octree(shape, start=coarse_labels), mask, mask),
            "logits, auto": run(Octree(shape), logits, smooth),
            "logits, 8-4-1": run(Octree(shape, path=(8, 4, 1)), logits, smooth),
            "logits, 16-8-4-1": run(Octree(shape, path=(16, 8, 4, 1)), logits, smooth),
            "logits, start array": run(Octree(shape, start=blocks(logits)), logits, smooth),
            "logits, seeds": run(Octree(shape, seeds=True), logits, smooth),
            "logits, both hints": run(Octree(shape, margin=4.0, seeds=True), logits, smooth),
            "logits, trust 0.3, 8-4-2-1": run(Octree(shape, path=(8, 4, 2, 1), trust=0.3), logits, smooth),
            "released": run(ReleasedStages(shape, "original", reevaluate=True), mask, mask),
            "released, no repetition": run(ReleasedStages(shape, "original"), mask, mask),
        }
        b1, b2 = surface_voxels(mask)
        report["cases"][name] = {
            "shape": list(shape),
            "b1": b1,
            "b2_per_b1": round(b2 / b1, 3),
            "wrong_voxels": {k: v["wrong_voxels"] for k, v in rows.items()},
            "rows": rows,
            "regions": region_rows(smooth, logits),
        }
        print(name, shape, b1, {k: v["per_b1"] for k, v in rows.items()}, flush=True)
    groups = {"left atria": "LA_", "brain tumours": "BraTS", "liver": "lits"}
    report["mean_per_b1"] = {}
    for group, key in groups.items():
        members = [case["rows"] for name, case in report["cases"].items() if name.startswith(key)]
        report["mean_per_b1"][group] = {
            row: round(float(np.mean([rows[row]["per_b1"] for rows in members])), 3) for row in members[0]
        }
    write_text(arguments.output, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["mean_per_b1"], indent=1))


if __name__ == "__main__":
    main()

"""What a region costs, and that it is the whole answer in its box.

    python benchmarks/region.py [--shape 1024,192,192] [--sizes 16,32,64,128] [--boxes 10] [--output FILE]
    python benchmarks/region.py --model runs/atrium --data Dataset101_LeftAtrium --cases 2 --boxes 5

Untrained networks of both families do all their work, a known object answers in their place (`oracle`). The
receptive field of the default network is 145 voxels to each side, and the octree looks up to 170 voxels around a
box, coarsely: only scans longer than that can be encoded in part. The paper's encoder needs the whole scan; there
only locations are saved. A second check asks the networks themselves in random boxes, without the object.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine, write
from oracle import Sectors, installed, model_for

from ossnet.data.layouts import open_dataset
from ossnet.field.grid import Box
from ossnet.field.model import Model, versions
from ossnet.volume import Volume


def random_box(shape: tuple[int, int, int], size: int, rng: np.random.Generator, around: np.ndarray) -> Box:
    """A cube (cut off at the border) around one of these voxels."""
    middle = around[rng.integers(len(around))] + rng.integers(-size // 4, size // 4 + 1, 3)
    x0, y0, z0 = (int(v) for v in np.clip(middle - size // 2, 0, np.array(shape) - 1))
    x1, y1, z1 = (int(min(v + size, n)) for v, n in zip((x0, y0, z0), shape, strict=True))
    return (x0, y0, z0), (x1, y1, z1)


def compared(model: Model, scan: Volume, boxes: list[Box]) -> dict[str, Any]:
    """The whole answer once, then every box by itself."""
    started = time.perf_counter()
    whole = model.field(scan, device="cpu").segment()
    seconds, rows = time.perf_counter() - started, []
    for low, high in boxes:
        started = time.perf_counter()
        field = model.field(scan, device="cpu")
        found = field.segment(region=(low, high))
        expected = whole.data[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        rows.append(
            {
                "box": [low, high],
                "seconds": round(time.perf_counter() - started, 3),
                "encoder_seconds": round(field.encoder_seconds, 3),
                "locations": found.evaluated,
                "voxels_differing": int((found.data != expected).sum()),
                "labels": len(np.unique(expected)),
            }
        )
    return {"whole_seconds": round(seconds, 3), "whole_locations": whole.evaluated, "boxes": rows}


def trained(model: str, data: Path, cases: int, boxes: int) -> dict[str, Any]:
    """Cubes of several sizes around voxels of the structure, of scans that the model was validated on."""
    dataset, rng = open_dataset(data), np.random.default_rng(0)
    names = json.loads((Path(model) / "splits.json").read_text())["val"][:cases]
    results: dict[str, Any] = {"machine": machine(), "versions": versions()}
    for name in names:
        scan, labels = dataset.read(dataset[name])
        inside = np.argwhere(labels.data > 0)
        sizes = [int(size) for size in np.resize([16, 24, 32, 48, 64], boxes)]
        some = [random_box(scan.shape, size, rng, inside) for size in sizes]
        results[name] = {"shape": list(scan.shape), **compared(Model.load(model), scan, some)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="1024,192,192")
    parser.add_argument("--sizes", default="16,32,64,128")
    parser.add_argument("--boxes", type=int, default=10, help="random boxes in which the networks answer")
    parser.add_argument("--surface", type=int, default=20_000, help="voxels at surfaces")
    parser.add_argument("--families", default="multiscale,C")
    parser.add_argument("--model", help="a trained model instead, on the first validation cases of --data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cases", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.model:
        write(given.output, trained(given.model, given.data, given.cases, given.boxes))
        return
    x, y, z = (int(n) for n in given.shape.split(","))
    shape, rng = (x, y, z), np.random.default_rng(0)
    truth = Sectors(shape, 1, given.surface)
    scan = truth.scan()
    low, high = truth.box
    labels = truth.labels(low, high)
    border = np.argwhere(labels[1:] != labels[:-1]) + low
    results: dict[str, Any] = {
        "shape": list(shape),
        "surface_voxels": truth.surface(),
        "machine": machine(),
        "versions": versions(),
    }
    for family in given.families.split(","):
        model = model_for(family, shape, 2, truth.surface())
        sized = [random_box(shape, int(size), rng, border) for size in given.sizes.split(",")]
        with installed(truth):
            results[f"{family}, by size"] = compared(model, scan, sized)
        # Everywhere, and of any size: what untrained networks answer has surfaces all over the scan.
        everywhere = np.argwhere(np.ones([max(n // 16, 1) for n in shape])) * 16
        some = [random_box(shape, int(rng.integers(8, 48)), rng, everywhere) for _ in range(given.boxes)]
        results[f"{family}, random boxes"] = compared(model, scan, some) if family != "C" else None
    write(given.output, results)


if __name__ == "__main__":
    main()

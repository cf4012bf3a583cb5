"""What the default network costs on scans of any size: seconds and memory within a grant.

    python benchmarks/default_costs.py --memory 2GB --ct FOLDER --output FILE.json
    python benchmarks/default_costs.py --only 1024,1024,1024 --also C --also unet

Untrained networks do all their work, a known object with about so many surface voxels answers in their place
(`oracle`). Every row is a process of its own; memory is the peak above what was resident with scan and network
loaded. `--ct` adds a real CT with its real liver (`volume-0.nii.gz` and `segmentation-0.nii.gz` in a folder). `--also`
measures variant C within the same grant, or MONAI's U-Net with a sliding window in bf16, which knows no grant, as well.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from isolated import measured, run, start_counting, status

ROWS = (
    ("256,256,160", 30_000),
    ("512,512,256", 60_000),
    ("1024,1024,1024", 60_000),
)
"""Voxels and surface voxels."""


def here(job: dict[str, Any]) -> dict[str, Any]:
    """One scan, in this process."""
    import torch
    from oracle import installed, model_for, truth_of

    torch.set_num_threads(job["threads"])
    if job["variant"] == "unet":
        from whole_volume import unet

        return unet(job | {"channels": 1, "how": "sliding", "precision": "bf16", "rounds": 1})
    truth = truth_of(job)
    scan = truth.scan()
    model = model_for(job["variant"], truth.shape, 2, truth.surface(), scan.spacing)
    before, started = start_counting(), time.perf_counter()
    with installed(truth):
        field = model.field(scan, device="cpu", memory=job["memory"])
        bound = time.perf_counter() - started
        found = field.segment()
    seconds = time.perf_counter() - started
    low, high = truth.box
    part = found.data[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return {
        "surface_voxels": truth.surface(),
        "seconds": round(seconds, 2),
        "binding_seconds": round(bound, 2),
        "encoder_seconds": round(field.encoder_seconds, 2),
        "locations": found.evaluated,
        "peak_bytes": status("VmHWM") - before,
        "wrong_voxels": int((part != truth.labels(low, high)).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="this shape alone")
    parser.add_argument("--ct", type=Path)
    parser.add_argument("--also", action="append", choices=("C", "unet"), default=[])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    from measuring import machine, write

    from ossnet.field.model import versions

    rows = []
    jobs: dict[str, dict[str, Any]] = {
        shape: {"shape": [int(n) for n in shape.split(",")], "surface": surface} for shape, surface in ROWS
    }
    if given.ct:
        jobs["CT"] = {"ct": str(given.ct.resolve())}
    for name, job in jobs.items():
        for variant in ("multiscale", *given.also) if given.only in (None, name) else ():
            job |= {"memory": given.memory, "threads": given.threads, "variant": variant}
            rows.append({"scan": name, "variant": variant} | measured(job, __file__))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    results = {"memory": given.memory, "rows": rows, "machine": machine() | {"threads": given.threads}}
    write(given.output, results | {"versions": versions()})


if __name__ == "__main__":
    run(here, main)

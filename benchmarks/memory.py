"""Whether a grant of memory is kept, and how well it was forecast: 512³ voxels, 2 and 100 classes.

    python benchmarks/memory.py [--shape 512,512,512] [--grants 0.5,1,2,4] [--output FILE]

Every row is measured in processes of their own: one asks for the forecast, another segments. What counts is the
highest resident memory while segmenting less what was resident before, with the scan and the model loaded. The
networks are untrained and do all their work; a known object answers in their place (`oracle`).
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isolated import measured, run, start_counting, status


def here(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    from oracle import Sectors, installed, model_for

    from ossnet.errors import ResourceError
    from ossnet.field.forecast import forecast

    shape, classes = tuple(job["shape"]), job["classes"]
    truth = Sectors(shape, 1 if classes == 2 else classes, job["surface"])
    model = model_for(job["family"], shape, classes, truth.surface())
    if job["what"] == "forecast":
        try:
            import numpy as np

            return asdict(forecast(model, shape, np.eye(4), memory=job["grant"], device="cpu"))
        except ResourceError as error:
            return {"refused": str(error)}
    scan = truth.scan()
    out: dict[str, Any] = {"surface_voxels": truth.surface()}
    before, started = start_counting(), time.perf_counter()
    try:
        with installed(truth):
            field = model.field(scan, device="cpu", memory=job["grant"])
        bound = status("VmHWM") - before
        found = field.segment()
    except ResourceError as error:
        return out | {"refused": str(error), "seconds": time.perf_counter() - started}
    out |= {
        "seconds": time.perf_counter() - started,
        "peak_bytes": status("VmHWM") - before,
        "peak_bytes_once_bound": bound,
        "held_bytes_at_the_end": status("VmRSS") - before,
        "encoder_seconds": field.encoder_seconds,
        "locations": found.evaluated,
        "chunk": field._bound.answer.chunk,
    }
    low, high = truth.box
    part = found.data[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    out["wrong_voxels"] = int((part != truth.labels(low, high)).sum())
    return out


def row(job: dict[str, Any]) -> dict[str, Any]:
    """Forecast and measurement beside each other."""
    expected, found = (measured(job | {"what": what}, __file__) for what in ("forecast", "segment"))
    out = {k: job[k] for k in ("family", "classes", "grant")} | {"measured": found, "forecast": expected}
    if "peak_bytes" in found and "memory_bytes" in expected:
        out["within_grant"] = found["peak_bytes"] <= job["grant"]
        pairs = {"locations": "locations", "memory_bytes": "peak_bytes", "seconds": "seconds"}
        out["forecast_to_measured"] = {k: round(expected[k] / found[v], 2) for k, v in pairs.items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="512,512,512")
    parser.add_argument("--grants", default="0.5,1,2,4", help="in GB")
    parser.add_argument("--families", default="C,multiscale")
    parser.add_argument("--classes", default="2,100")
    parser.add_argument("--surface", type=int, default=40_000, help="voxels at surfaces")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    from measuring import machine, write

    from ossnet.field.model import versions

    results: dict[str, Any] = {"shape": given.shape, "machine": machine(), "versions": versions(), "rows": []}
    for family in given.families.split(","):
        for classes in map(int, given.classes.split(",")):
            for grant in map(float, given.grants.split(",")):
                job = {
                    "family": family,
                    "classes": classes,
                    "grant": int(grant * 1e9),
                    "shape": [int(n) for n in given.shape.split(",")],
                    "surface": given.surface,
                }
                results["rows"].append(row(job))
                print(json.dumps(results["rows"][-1]), file=sys.stderr, flush=True)
    write(given.output, results)


if __name__ == "__main__":
    run(here, main)

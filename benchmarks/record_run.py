"""Write what a training run reached into `benchmarks/results/`.

python benchmarks/record_run.py runs/hippocampus --name hippocampus_default --command "ossnet train …"
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from measuring import machine, write

from ossnet.field.model import versions

RESULTS = Path(__file__).parent / "results"


def read(run: Path) -> dict[str, Any]:
    """Settings, the curve and the dense scores of a run."""
    with (run / "log.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    model = json.loads((run / "model" / "model.json").read_text())
    splits = json.loads((run / "splits.json").read_text())
    out: dict[str, Any] = {
        "variant": model["variant"],
        "settings": json.loads((run / "settings.json").read_text()),
        "splits": {k: len(splits[k]) for k in ("train", "val")},
        "curve": [
            {
                k: round(row[k], 5)
                for k in row
                if k in ("seconds", "step", "loss", "iou") or k.startswith("dice")
            }
            for row in rows
        ],
    }
    dense = run / "validation.json"
    if dense.is_file():
        out["dense"] = json.loads(dense.read_text())["summary"]
        done = json.loads((run / "validation_rows.json").read_text())["cases"].values()
        out["evaluated_mean"] = sum(c["evaluated"] for c in done) / len(done)
        out["segment_seconds_median"] = sorted(c["seconds"] for c in done)[len(done) // 2]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    result = {
        "command": given.command,
        "note": given.note,
        "machine": machine(),
        "versions": versions(),
        **read(given.run),
    }
    write(RESULTS / f"{given.name}.json", result)


if __name__ == "__main__":
    main()

"""Seconds a step of `ossnet train` takes, in this and another checkout, in turns.

    python benchmarks/step_rate.py Dataset004_Hippocampus OTHER_CHECKOUT --pairs 3 --output FILE.json

Whole trainings with everything that runs beside the steps, stopped after so many; the first ones are not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS, FIRST = 60, 15

RUN = f"""
import os, statistics, sys, time
from ossnet.training import loop
taken, ended = [], []
plain = loop.Trainer._step
def step(self, examples, fraction):
    plain(self, examples, fraction)
    ended.append(time.perf_counter())
    if len(ended) == {STEPS}:
        taken = [b - a for a, b in zip(ended, ended[1:])][{FIRST}:]
        print("MEDIAN", statistics.median(taken), flush=True)
        os._exit(0)
loop.Trainer._step = step
from ossnet.cli.main import run
run()
"""


def measured(checkout: Path, data: Path, changes: list[str]) -> float:
    """Median of a training's steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = subprocess.run(
            [sys.executable, "-c", RUN, "train", "--data", data, "--out", f"{folder}/run"]
            + [part for change in changes for part in ("--set", change)],
            env=os.environ | {"PYTHONPATH": str(checkout.resolve() / "src")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return float(out.split("MEDIAN")[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    from measuring import machine, write

    here = Path(__file__).parents[1]
    rows = []
    for _ in range(given.pairs):
        ours, other = (measured(c, given.data, given.set) for c in (here, given.other))
        rows.append({"here": round(ours, 4), "other": round(other, 4), "ratio": round(other / ours, 3)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    log = ["git", "-C", str(given.other), "log", "-1", "--format=%h %s"]
    against = subprocess.run(log, capture_output=True, text=True, check=True).stdout.strip()
    write(
        given.output,
        {
            "what": "seconds a step of `ossnet train`, medians; in turns",
            "data": given.data.name,
            "settings": given.set,
            "other": against,
            "median_ratio": statistics.median(row["ratio"] for row in rows),
            "pairs": rows,
            "machine": machine(),
        },
    )


if __name__ == "__main__":
    main()

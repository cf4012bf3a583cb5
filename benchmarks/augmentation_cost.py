"""What augmentation costs a training: seconds a step of `ossnet train` with it and without, in turns.

    python benchmarks/augmentation_cost.py Dataset004_Hippocampus Dataset027_ACDC --pairs 2 --output FILE.json

Whole trainings with everything that runs beside the steps: examples are prepared on the same cores.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from measuring import machine, write
from step_rate import measured

OFF = ["augmentation.spatial=false", "augmentation.intensity=0"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    here, found = Path(__file__).parents[1], {}
    for data in given.data:
        rows = []
        for _ in range(given.pairs):
            whole, without = (measured(here, data, [*given.set, *off]) for off in ([], OFF))
            rows.append(
                {"with": round(whole, 4), "without": round(without, 4), "ratio": round(whole / without, 3)}
            )
            print(data.name, json.dumps(rows[-1]), file=sys.stderr, flush=True)
        found[data.name] = {"median_ratio": statistics.median(row["ratio"] for row in rows), "pairs": rows}
    write(
        given.output,
        {
            "what": "seconds a step of `ossnet train` with and without augmentation, medians of 45 steps; in turns",
            "settings": given.set,
            "data": found,
            "machine": machine(),
        },
    )


if __name__ == "__main__":
    main()

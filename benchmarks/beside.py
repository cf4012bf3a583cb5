"""Seconds a step of two trainings at once, and of one alone, by how long OpenMP's threads wait awake.

    python benchmarks/beside.py Dataset004_Hippocampus --output FILE.json

Two trainings with all threads each: what a user does who starts a second one. `GOMP_SPINCOUNT` and `OMP_WAIT_POLICY`
are those of GNU's OpenMP; "as it is" is what it does where both are left alone, as in programs that import the package.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import machine, write
from step_rate import measured

from ossnet.field.model import versions

WAYS: dict[str, dict[str, str]] = {
    "as it is": {"GOMP_SPINCOUNT": "300000"},
    "1000 turns": {"GOMP_SPINCOUNT": "1000"},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}
"""300,000 is what GNU's OpenMP takes by itself where there are no more threads than processors; two at once then take
minutes for these steps."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    here, data = Path(__file__).parents[1], given.data.resolve()
    rows: list[dict[str, Any]] = []
    for number in range(given.rounds):
        for name, environment in WAYS.items():
            os.environ.pop("OMP_WAIT_POLICY", None)
            os.environ.pop("GOMP_SPINCOUNT", None)
            os.environ.update(environment)
            alone = measured(here, data, [])
            with ThreadPoolExecutor(2) as pool:
                both = list(pool.map(lambda _: measured(here, data, []), range(2)))
            rows.append({"round": number, "waiting": name, "alone": alone, "two at once": both})
            print(rows[-1], flush=True)
            write(given.output, {"rows": rows, "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()

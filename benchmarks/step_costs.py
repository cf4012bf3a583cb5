"""What a training step of the default network takes beside those of variant C and MONAI's `UNet`, at equal batch.

    python benchmarks/step_costs.py Dataset101_LeftAtrium --output FILE.json

All in float32, and all in bfloat16 where the machine computes in it. The default and variant C are asked at as many
locations of each scan, the U-Net everywhere in crops as large as the default's; variant C with the fast step of this
package. One process each, one thread; CPU seconds, and the peak above what was resident with data and network.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from isolated import measured, run, start_counting, status

STEPS = 5
VARIANTS = ("multiscale", "C", "monai-unet")


def here(job: dict[str, Any]) -> dict[str, Any]:
    """A few steps, in this process."""
    import numpy as np
    import torch

    from ossnet.data.cache import load_case
    from ossnet.data.layouts import open_dataset
    from ossnet.data.splits import split
    from ossnet.training.planning import make_plan
    from ossnet.training.settings import make_settings

    torch.set_num_threads(1)
    device = torch.device("cpu")
    dataset = open_dataset(job["data"])
    train = [dataset[name] for name in split(dataset, 0).train]
    changes = [f"schedule.batch_size={job['batch']}"]
    if job["variant"] != "monai-unet":
        changes.append(f"sampling.locations={job['locations']}")
    settings = make_settings(job["variant"], changes=changes)
    plan = make_plan(dataset, train, settings)
    recipe, network = plan.recipe, plan.model.network.requires_grad_(True).train()
    cases = [load_case(dataset, case, plan.model.preparation, plan.classes, 13, None) for case in train[:4]]
    before, seconds = start_counting(), []
    optimisers = recipe.optimisers()
    for step in range(STEPS):
        started = time.thread_time()
        drawn = [
            recipe.example(cases[(step + i) % len(cases)], np.random.default_rng([step, i]))
            for i in range(job["batch"])
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=job["half"]):
            loss = recipe.loss(network, recipe.batch(drawn, device))
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seconds.append(time.thread_time() - started)
    return {
        "cpu_seconds_a_step": round(statistics.median(seconds[1:]), 3),
        "peak_bytes": status("VmHWM") - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--locations", type=int, default=4096)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    import torch
    from measuring import machine, write

    from ossnet.networks.machine import fast_bf16

    rows = []
    for half in (False, True) if fast_bf16(torch.device("cpu")) else (False,):
        for batch in (1, 2):
            job = {"data": str(given.data), "batch": batch, "locations": given.locations, "half": half}
            found = {v: measured(job | {"variant": v}, __file__) for v in VARIANTS}
            ratios = {
                f"multiscale_to_{v}": {k: round(found["multiscale"][k] / found[v][k], 3) for k in found[v]}
                for v in VARIANTS[1:]
            }
            rows.append({"precision": "bf16" if half else "fp32", "batch": batch, **found, **ratios})
            print(rows[-1], file=sys.stderr, flush=True)
    about = {"data": given.data.name, "locations": given.locations}
    write(given.output, {**about, "rows": rows, "machine": machine()})


if __name__ == "__main__":
    run(here, main)

"""What a GPU makes of it: training steps, and scans of any size, beside variant C and U-Nets.

    python benchmarks/gpu.py Dataset101_LeftAtrium --output FILE.json

Steps: of `ossnet train`'s recipes at their defaults, with examples that were prepared before; beside them the time one
core takes to prepare an example. Scans: an untrained network of full size does all its work, a known object answers in
its place (`oracle`); what the object takes is measured too and taken off. The U-Net is MONAI's residual one with a
window of 96³ and half overlap, in bfloat16. Memory is the peak of what torch allocated on the GPU.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from isolated import measured, run

SIZES = (((256, 256, 160), 30_000), ((512, 512, 256), 60_000), ((1024, 1024, 1024), 60_000))
"""Voxels and surface voxels."""

LARGEST_OF_C = 512 * 512 * 256
"""Voxels of the full-resolution shape of a variant C that is measured."""

WARM, STEPS = 10, 40


def step(job: dict[str, Any]) -> dict[str, Any]:
    """Training steps of one variant, with what Fabric and the recipe do in each."""
    import numpy as np
    import torch
    from torch import nn

    from ossnet.data.cache import load_case
    from ossnet.data.layouts import open_dataset
    from ossnet.data.splits import split
    from ossnet.training.gradients import Gradients
    from ossnet.training.planning import make_plan
    from ossnet.training.processes import make_fabric
    from ossnet.training.settings import make_settings

    dataset = open_dataset(job["data"])
    train = [dataset[name] for name in split(dataset, 0).train]
    settings = make_settings(job["variant"], changes=job["changes"])
    plan = make_plan(dataset, train, settings)
    fabric = make_fabric(settings)
    fabric.launch()
    recipe, network = plan.recipe, plan.model.network.requires_grad_(True).train().to(fabric.device)
    optimisers, gradients = recipe.optimisers(), Gradients(recipe, fabric.setup_module(network), fabric)
    gradients.captures &= job["captured"]
    cases = [load_case(dataset, case, plan.model.preparation, plan.classes, 13, None) for case in train[:4]]
    batch = settings.schedule.batch_size
    torch.set_num_threads(1)
    examples, drawing = [], []
    for i in range(max(4, batch)):
        started = time.perf_counter()
        examples.append(recipe.example(cases[i % len(cases)], np.random.default_rng(i)))
        drawing.append(time.perf_counter() - started)

    def once(i: int) -> None:
        drawn = [examples[(i + j) % len(examples)] for j in range(batch)]
        gradients(drawn)
        nn.utils.clip_grad_norm_(network.parameters(), settings.optimiser.clip_norm or 1e9)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    seconds = []
    for i in range(WARM + STEPS):
        if i == WARM:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        once(i)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "batch": batch,
        "first_step_seconds": round(seconds[0], 2),
        "seconds_a_step": round(statistics.median(seconds[WARM:]), 5),
        "seconds_an_example_on_a_core": round(statistics.median(drawing[1:]), 4),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
    }


def scan(job: dict[str, Any]) -> dict[str, Any]:
    """One scan by ours: the first time, the faster of two later ones, and what the object takes of it."""
    import torch
    from oracle import installed, model_for, truth_of

    truth = truth_of(job)
    image = truth.scan()
    model = model_for(job["family"], truth.shape, 2, truth.surface(), image.spacing)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    wrong = None
    for work in (True, True, True, False):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with installed(truth, work):
            field = model.field(image, device="cuda", memory=job["memory"])
            found = field.segment()
        torch.cuda.synchronize()
        seconds[work].append(time.perf_counter() - started)
        low, high = truth.box
        part = found.data[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        wrong = int((part != truth.labels(low, high)).sum())
        if work:
            peak, asked = torch.cuda.max_memory_allocated(), found.evaluated
    return {
        "first_seconds": round(seconds[True][0], 3),
        "seconds": round(min(seconds[True][1:]), 3),
        "seconds_without_the_network": round(seconds[False][0], 3),
        "locations": asked,
        "peak_gpu_bytes": peak,
        "wrong_voxels": wrong,
    }


def unet(job: dict[str, Any]) -> dict[str, Any]:
    """A U-Net on the same size, the image on the GPU."""
    import torch
    from monai.inferers.utils import sliding_window_inference
    from monai.networks.nets.unet import UNet

    network = UNet(3, 1, 1, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="INSTANCE")
    network.eval().cuda()
    image = torch.randn(1, 1, *job["shape"], device="cuda")
    seconds = []
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            sliding_window_inference(image, (96, 96, 96), 4, network, overlap=0.5, mode="gaussian")
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return {
        "first_seconds": round(seconds[0], 3),
        "seconds": round(min(seconds[1:]), 3),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
    }


def here(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    return dict({"step": step, "scan": scan, "unet": unet}[job["what"]](job))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--ct", type=Path, help="a folder with volume-0.nii.gz and segmentation-0.nii.gz")
    parser.add_argument("--memory", help="grant for the default network")
    parser.add_argument("--only", choices=("steps", "scans"))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    from measuring import machine, write

    from ossnet.field.model import versions

    jobs: list[dict[str, Any]] = []
    if given.only != "scans":
        data = {"what": "step", "data": str(given.data.resolve()), "captured": True}
        jobs += [
            data | {"variant": "multiscale", "changes": []},
            data | {"variant": "multiscale", "changes": [], "captured": False},
            data | {"variant": "monai-unet", "changes": []},
            data | {"variant": "C", "changes": []},
            data | {"variant": "unet3d", "changes": []},
            data | {"variant": "multiscale", "changes": ["schedule.batch_size=4"]},
        ]
    if given.only != "steps":
        for shape, surface in SIZES:
            job = {"what": "scan", "shape": shape, "surface": surface, "memory": given.memory}
            jobs.append(job | {"family": "multiscale"})
            if shape[0] * shape[1] * shape[2] <= LARGEST_OF_C:
                jobs.append(job | {"family": "C", "memory": None})
            jobs.append({"what": "unet", "shape": shape})
        if given.ct:
            ct = {"what": "scan", "ct": str(given.ct.resolve()), "memory": given.memory}
            jobs.append(ct | {"family": "multiscale"})
    rows = []
    for job in jobs:
        kept = {k: v for k, v in job.items() if k != "data" and v is not None}
        if given.ct and "ct" in kept:
            kept["ct"] = given.ct.name
        rows.append(kept | measured(job, __file__))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        results = {"rows": rows, "machine": machine(), "versions": versions()}
        write(given.output, results)


if __name__ == "__main__":
    run(here, main)

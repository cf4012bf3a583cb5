"""What numbers below 1e-38 in the averages of gradients cost a training step, late in a training.

    python benchmarks/faint.py RUN DATA --output FILE.json

The weights and optimisers of a run that was stopped or has ended make a few steps as they are, and again after
`forget_faint`; CPU seconds of one thread, medians. A run of this version has none to forget.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, write

from ossnet.data.cache import load_case
from ossnet.field.model import versions
from ossnet.training.checkpoint import load_state
from ossnet.training.optimiser import forget_faint
from ossnet.training.planning import make_plan
from ossnet.training.run_folder import STATE, settings_of
from ossnet.training.train import opened

STEPS = 10


def steps(state: dict[str, Any] | None, data: Path, run: Path, forget: bool) -> dict[str, float]:
    """CPU seconds of a step and of its optimisers, and the share of faint numbers among the averages."""
    dataset, parts = opened(data, settings_of(run))
    cases = [dataset[name] for name in parts.train]
    plan = make_plan(dataset, cases, settings_of(run))
    recipe, network = plan.recipe, plan.model.network.requires_grad_(True).train()
    optimisers = recipe.optimisers()
    if state is not None:
        network.load_state_dict(state["network"])
        for optimiser, known in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(known)
    if forget:
        forget_faint(optimisers)
    averages = [v for o in optimisers for s in o.state.values() for v in s.values() if v.ndim]
    tiny = torch.finfo(torch.float32).tiny
    faint = sum(int(((v != 0) & (v.abs() < tiny)).sum()) for v in averages)
    held = [
        load_case(dataset, case, plan.model.preparation, plan.classes, 13, None) for case in cases[:STEPS]
    ]
    taken: list[tuple[float, float]] = []
    for step, case in enumerate(held):
        started = time.thread_time()
        drawn = recipe.example(case, np.random.default_rng(step))
        with torch.autocast("cpu", torch.bfloat16):
            loss = recipe.loss(network, recipe.batch([drawn], torch.device("cpu")))
        loss.backward()
        learnt = time.thread_time()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        taken.append((time.thread_time() - started, time.thread_time() - learnt))
    whole, optimising = (statistics.median(each) for each in zip(*taken, strict=True))
    total = sum(v.numel() for v in averages)
    return {"step": whole, "optimisers": optimising, "share faint": faint / max(total, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    late = load_state(given.run / STATE)
    out = {
        "at the beginning": steps(None, given.data, given.run, False),
        "late": steps(late, given.data, given.run, False),
        "late, faint numbers forgotten": steps(late, given.data, given.run, True),
    }
    about = {"steps done": int(late["state"]["step"]), "machine": machine(), "versions": versions()}
    write(given.output, {"seconds": out, **about})


if __name__ == "__main__":
    main()

"""What convolutions in the right layout save of a training step, on CPUs that compute in float32.

    python benchmarks/convolutions.py Dataset101_LeftAtrium Dataset004_Hippocampus --output FILE.json

The default network as `ossnet train` plans it for the data, one step forwards and backwards: with
`networks.convolution.convolve`, and with `F.conv3d` in its place. One thread, the two taking turns in one process.
"""

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from measuring import interleaved, machine, write

from ossnet.data.cache import load_case
from ossnet.data.layouts import open_dataset
from ossnet.data.splits import split
from ossnet.networks.machine import fast_bf16
from ossnet.training.planning import make_plan
from ossnet.training.settings import make_settings


def measured(data: Path, rounds: int) -> dict[str, Any]:
    """CPU seconds of both, for one data set."""
    dataset = open_dataset(data)
    train = [dataset[name] for name in split(dataset, 0).train]
    plan = make_plan(dataset, train, make_settings())
    network = plan.model.network.requires_grad_(True).train()
    case = load_case(dataset, train[0], plan.model.preparation, plan.classes, 13, None)
    examples = [plan.recipe.example(case, np.random.default_rng(0))]

    def step() -> None:
        plan.recipe.loss(network, plan.recipe.batch(examples, torch.device("cpu"))).backward()
        network.zero_grad(set_to_none=True)

    def with_torch_alone() -> None:
        with mock.patch("ossnet.networks.multiscale.convolve", F.conv3d):
            step()

    seconds = interleaved({"conv3d": with_torch_alone, "convolve": step}, rounds)
    return {
        "data": data.name,
        "crop": list(examples[0]["image"].shape[1:]),
        **{name: round(value, 3) for name, value in seconds.items()},
        "faster": round(seconds["conv3d"] / seconds["convolve"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(data, given.rounds) for data in given.data]
    half = fast_bf16(torch.device("cpu"))
    write(given.output, {"unit": "CPU seconds a step", "rows": rows, "bf16": half, "machine": machine()})


if __name__ == "__main__":
    main()

"""Shared by the benchmarks: fair timing on a machine that others use too."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from provenance import command, commit, processor

from ossnet.files.atomic import write_text


def interleaved(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each piece of work, taking turns; the first turn of each does not count.

    CPU time of this thread: with one thread it is what the work takes, without the time that others had the
    core. Their use of memory and caches still shows; taking turns gives each candidate its share of it.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, do in work.items():
            started = time.thread_time()
            do()
            if turn:
                taken[name].append(time.thread_time() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def product(dtype: torch.dtype, size: int = 2048) -> Callable[[], object]:
    """A square matrix product, the machine's peak: 2 · size³ operations."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    known = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        known |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return known


def write(file: Path | None, results: Mapping[str, Any]) -> None:
    """To the terminal, and into a file if one is named; with the command and the state of the project."""
    text = json.dumps({"command": command(), "commit": commit(), **results}, indent=1)
    print(text)
    if file is not None:
        write_text(file, text + "\n")

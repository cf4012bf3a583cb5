"""How often convolutions in half precision are wrong on this processor: torch's as they are, and those of the networks.

    python benchmarks/small_maps.py --output FILE.json
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python benchmarks/small_maps.py

Drawn shapes as networks have them (kernels of 2 to 5 voxels, strides of 1 and 2, maps from one voxel on), forwards and
backwards, against float32; freed memory holds NaN before. "Small" maps are those that `networks.convolution` computes
in float32. Each way is a process of its own: torch's may end it.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KERNELS = {1: [(3, 3, 3), (1, 3, 3), (3, 3, 1), (5, 5, 5)], 2: [(2, 2, 2), (4, 4, 4), (3, 3, 3)]}
"""By stride."""


def here(ours: bool, seconds: float, seed: int) -> dict[str, Any]:
    """One way, in this process."""
    import torch
    import torch.nn.functional as F

    from ossnet.networks.convolution import convolve, outgrown

    random.seed(seed)
    torch.manual_seed(seed)
    counts = {"small": 0, "small_wrong": 0, "others": 0, "others_wrong": 0}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        stride = random.choice((1, 2))
        kernel = random.choice(KERNELS[stride])
        padding = tuple((k - 1) // 2 for k in kernel)
        steps = tuple(stride if k > 1 else 1 for k in kernel)
        shape = tuple(random.choice((1, 2, 3, 4, 5, 6, 8, 12, 16)) for _ in range(3))
        if any(n + 2 * p < k for n, p, k in zip(shape, padding, kernel, strict=True)):
            continue
        inputs, outputs = random.choice((1, 8, 16, 32, 64)), random.choice((8, 16, 32, 64))
        x = torch.randn(1, inputs, *shape).bfloat16().float().requires_grad_()
        weight = torch.randn(outputs, inputs, *kernel) / (inputs * kernel[0] * kernel[1] * kernel[2]) ** 0.5
        weight = weight.bfloat16().float().requires_grad_()
        exact = F.conv3d(x, weight, None, steps, padding)
        slope = torch.randn_like(exact).bfloat16().float()
        wanted = (exact, *torch.autograd.grad(exact, (x, weight), slope))
        junk = [torch.full((1 << n,), float("nan")) for n in range(8, 21, 2) for _ in range(2)]
        del junk
        with torch.autocast("cpu", torch.bfloat16):
            small = outgrown(x, kernel, steps, padding)
            found = (convolve if ours else F.conv3d)(x, weight, None, steps, padding)
        got = (found, *torch.autograd.grad(found, (x, weight), slope.to(found.dtype)))
        off = [
            float((a.float() - b).abs().max() / b.abs().max().clamp(min=1e-3))
            for a, b in zip(got, wanted, strict=True)
        ]
        kind = "small" if small else "others"
        counts[kind] += 1
        counts[f"{kind}_wrong"] += not all(o < 0.05 for o in off)
        print(json.dumps(counts), flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--way", choices=("torch", "ours"))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.way:
        here(given.way == "ours", given.seconds, 0)
        return
    import os

    from measuring import machine, write

    from ossnet.field.model import versions

    rows = []
    for way in ("torch", "ours"):
        own = [sys.executable, __file__, "--way", way, "--seconds", str(given.seconds)]
        done = subprocess.run(own, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1:]
        rows.append({"way": way, **(json.loads(last[0]) if last else {}), "exit_code": done.returncode})
        print(json.dumps(rows[-1]), file=sys.stderr)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "none")
    write(
        given.output,
        {"instructions_limited_to": limit, "rows": rows, "machine": machine(), "versions": versions()},
    )


if __name__ == "__main__":
    main()

"""Cost of a training step of the decoder, forward and backward, on one thread.

    python benchmarks/training_step.py [--locations 4096] [--volumes 2] [--output FILE]
    python benchmarks/training_step.py --paper [--output FILE]

Full-size variant C (256×256×160 voxels, four channels). The released formulation (`released_reference`), the plain
module and the lean formulation take turns on the same batch: CPU time a location, and bytes that autograd keeps
for the backward pass a location (distinct tensors, without parameters and without the encoder).

--paper runs one whole step at the paper's settings (8 volumes with 2^14 locations, encoder included) with blocks
computed again, in a fresh process, and reports its peak memory.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import interleaved, machine, write
from released_reference import released_decode
from torch import Tensor

from ossnet.data.patches import PatchSource
from ossnet.data.preparation import reduce_by_two
from ossnet.networks.lean import lean
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.variants import spec_for

SHAPE = (256, 256, 160)


def batch(network: OSSNet, volumes: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latent, locations, patches as they are gathered, and labels."""
    spec = network.spec
    torch.manual_seed(0)
    locations = torch.stack([torch.randint(0, n, (volumes, count)) for n in SHAPE], -1).float()
    patches = torch.randn(volumes, count, 7, 7, 7, spec.patch_channels).permute(0, 1, 5, 2, 3, 4)
    latent = torch.randn(volumes, spec.latent_rows, spec.latent_length, requires_grad=True)
    return latent, locations, patches, (torch.rand(volumes, count) > 0.5).float()


def kept(network: OSSNet, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that a forward pass keeps."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    held: dict[int, int] = {}
    alive = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(held.values())


def compare(count: int, volumes: int, rounds: int) -> dict[str, Any]:
    """The table."""
    torch.manual_seed(0)
    network = OSSNet(spec_for("C", 4, 1, SHAPE)).train()
    decoder = network.decoder
    latent, locations, patches, labels = batch(network, volumes, count)

    def released() -> Tensor:
        lean(network, enabled=False)
        return released_decode(decoder, locations, patches, latent)[..., 0]

    def ours(enabled: bool, recompute: bool = False, half: bool = False) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            lean(network, enabled, recompute)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return network.decode(locations, patches, latent)

        return forward

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def work() -> list[Tensor]:
            network.zero_grad()
            latent.grad = None
            logits = forward().float()
            torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
            return [p.grad for p in decoder.parameters()]

        return work

    forwards = {
        "released formulation": released,
        "plain module": ours(False),
        "lean": ours(True),
        "lean, blocks again": ours(True, recompute=True),
        "lean, bf16 autocast": ours(True, half=True),
        "lean, bf16 autocast, blocks again": ours(True, recompute=True, half=True),
    }
    total = volumes * count
    bytes_kept = {name: kept(network, forward) / total for name, forward in forwards.items()}
    seconds = interleaved({name: step(forward) for name, forward in forwards.items()}, rounds)
    base_time, base_bytes = seconds["released formulation"], bytes_kept["released formulation"]
    truth = [g.clone() for g in step(released)()]  # type: ignore[attr-defined]
    largest = max(float(g.abs().max()) for g in truth)
    rows = []
    for name in forwards:
        gradients = step(forwards[name])()
        difference = max(float((g - t).abs().max()) for g, t in zip(gradients, truth, strict=True))  # type: ignore[call-overload]
        rows.append(
            {
                "method": name,
                "microseconds_per_location": round(seconds[name] / total * 1e6, 1),
                "times_faster": round(base_time / seconds[name], 2),
                "kilobytes_kept_per_location": round(bytes_kept[name] / 1e3, 1),
                "share_of_bytes": round(bytes_kept[name] / base_bytes, 3),
                "gradient_difference": difference / largest,
            }
        )
    return {"volumes": volumes, "locations": count, "rows": rows, **machine()}


def paper_step(results: Any, volumes: int = 8, count: int = 2**14) -> None:
    """One whole step; peak memory of this process."""
    torch.set_num_threads(1)
    network = OSSNet(spec_for("C", 4, 1, SHAPE)).train()
    lean(network, recompute=True)
    bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started, cpu = time.perf_counter(), time.process_time()
    reduced, gathered, places = [], [], []
    for _ in range(volumes):  # one full-resolution volume at a time, as training does it
        image = torch.randn(4, *SHAPE)
        locations = torch.stack([torch.randint(0, n, (count,)) for n in SHAPE], 1)
        reduced.append(reduce_by_two(image))
        gathered.append(PatchSource(image, "small")(locations))
        places.append(locations.float())
    patches = torch.stack([p for p in gathered if p is not None])
    del gathered, image
    prepared = time.process_time() - cpu
    logits, segmentation = network(torch.stack(reduced), torch.stack(places), patches)
    forward = time.process_time() - cpu - prepared
    (logits.square().mean() + segmentation.square().mean()).backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put(
        {
            "volumes": volumes,
            "locations": count,
            "peak_gigabytes": round(peak / 1e9, 2),
            "peak_gigabytes_above_start": round((peak - bare) / 1e9, 2),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "cpu_seconds_preparing": round(prepared, 1),
            "cpu_seconds_forward": round(forward, 1),
            "seconds": round(time.perf_counter() - started, 1),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--locations", type=int, default=4096)
    parser.add_argument("--volumes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.paper:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=paper_step, args=(queue,))
        process.start()
        process.join()
        write(options.output, queue.get(timeout=10) | machine())
        return
    write(options.output, compare(options.locations, options.volumes, options.rounds))


if __name__ == "__main__":
    main()

"""One scan, whole: ours against the released algorithm and against MONAI's residual U-Net, on this machine, in one run.

    python benchmarks/whole_volume.py --model runs/atrium_c --image LA_001_0000.nii.gz
    python benchmarks/whole_volume.py --shape 256,256,160 --surface 10000,30000,60000

With a shape: an untrained variant C of full size does all its work on a synthetic scan, and an object with about so
many surface voxels answers in its place (`oracle`). Without arguments a small one, so that the command always runs.
The released algorithm asks its own locations, counted exactly; its time is that count times the measured time of
its unfused decoder at 2^14 locations a pass, patches included, and our encoder's pass.

Everything is measured in a process of its own: seconds are medians, memory is the peak above what was resident with
scan and network loaded. A process that would need more than `--limit` is stopped and says so.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isolated import measured, run, start_counting, status

UNET = ("whole", "sliding")
PRECISIONS = ("fp32", "bf16")
WINDOW, OVERLAP = 128, 0.5
PASS = 2**14
"""Locations a pass of the released code."""


def timed(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Median wall-clock seconds, and the last result."""
    seconds, result = [], None
    for _ in range(rounds):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


# In processes of their own ------------------------------------------------------------------------------------------


def loaded(job: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Model, scan, and the object that answers in the network's place (None: the network does)."""
    from oracle import Sectors, model_for

    from ossnet.field.model import Model
    from ossnet.files.reading import read_volume

    if job["model"]:
        return Model.load(job["model"]), read_volume(Path(job["image"])), None
    x, y, z = job["shape"]
    truth = Sectors((x, y, z), 1, job["surface"])
    return model_for("C", (x, y, z), 2, job["surface"]), truth.scan(), truth


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Encoder, octree and decoder; `dense`: all voxels one by one, too."""
    from contextlib import nullcontext

    from oracle import installed
    from surfaces import surface_voxels

    model, scan, truth = loaded(job)
    before = start_counting()
    with installed(truth) if truth is not None else nullcontext():
        # Median of the whole way, each time with a field of its own.
        runs = []
        for _ in range(job["rounds"]):
            field = model.field(scan, device="cpu", memory=job["memory"])
            found = field.segment()
            runs.append((field.encoder_seconds, found.seconds))
    encoder, octree = (statistics.median(column) for column in zip(*runs, strict=True))
    out = {
        "shape": list(scan.shape),
        "network_grid": list(model.preparation.shape or ()),
        "surface_voxels": surface_voxels(found.data)[0],
        "locations": found.evaluated,
        "encoder_seconds": encoder,
        "octree_and_decoder_seconds": octree,
        "total_seconds": encoder + octree,
        "peak_bytes": status("VmHWM") - before,
    }
    if job["dense"]:
        everywhere = field.segment(strategy="dense")
        differ = everywhere.data != found.data
        out["dense"] = {
            "seconds": everywhere.seconds,
            "voxels_differing": int(differ.sum()),
            "share_differing": float(differ.mean()),
        }
    return out


def released_count(job: dict[str, Any]) -> dict[str, Any]:
    """Locations of the released algorithm, its re-evaluation included."""
    from contextlib import nullcontext

    from oracle import installed

    model, scan, truth = loaded(job)
    with installed(truth, work=False) if truth is not None else nullcontext():
        field = model.field(scan, device="cpu")
        found = field.segment(strategy="original", reevaluate=True)
    own = field.segment()
    return {"locations": found.evaluated, "voxels_differing_from_ours": int((found.data != own.data).sum())}


def released_pass(job: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of the released formulation at the released number of locations a pass."""
    import numpy as np
    import torch
    from released_reference import released_decode

    from ossnet.data.patches import PatchSource
    from ossnet.data.preparation import prepare_scan, reduce_by_two

    model, scan, _ = loaded(job)
    network = model.network
    before = start_counting()
    with torch.inference_mode():
        image = prepare_scan(scan, model.preparation).image
        latent = network.encode(reduce_by_two(image)[None]).latent
        source = PatchSource(image, network.spec.patches)
        asked = torch.from_numpy(np.random.default_rng(0).integers(0, image.shape[1:], (job["pass"], 3)))

        def once() -> None:
            patches = source(asked)
            batch = None if patches is None else patches[None]
            released_decode(network.decoder, asked[None].float(), batch, latent)

        seconds, _ = timed(once, job["rounds"])
    return {
        "microseconds_per_location": seconds / job["pass"] * 1e6,
        "peak_bytes": status("VmHWM") - before,
    }


def unet(job: dict[str, Any]) -> dict[str, Any]:
    """MONAI's residual UNet (8, 32, 128, 384), whole or by sliding window, in one precision."""
    import torch
    from monai.inferers import sliding_window_inference
    from monai.networks.nets import UNet

    network = UNet(
        3, job["channels"], 1, (8, 32, 128, 384), (2, 2, 2), num_res_units=2, norm="INSTANCE"
    ).eval()
    image = torch.randn(1, job["channels"], *(-(-n // 8) * 8 for n in job["shape"]))
    size = tuple(min(WINDOW, n) for n in image.shape[2:])
    before = start_counting()

    def once() -> None:
        if job["how"] == "whole":
            network(image)
        else:
            sliding_window_inference(image, size, 1, network, overlap=OVERLAP)

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=job["precision"] == "bf16"):
        seconds, _ = timed(once, job["rounds"])
    return {"seconds": seconds, "peak_bytes": status("VmHWM") - before}


def here(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    resource.setrlimit(resource.RLIMIT_AS, (job["limit"], job["limit"]))
    try:
        return globals()[job["what"]](job)  # type: ignore[no-any-return]
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return {"failed": f"needs more than {job['limit'] / 1e9:.0f} GB"}


# The parent, which stays small --------------------------------------------------------------------------------------


def compared(job: dict[str, Any], decoder: dict[str, Any] | None) -> dict[str, Any]:
    """Ours and, for the paper's variants, the released algorithm on one scan."""
    fast = measure(job | {"what": "ours"})
    if decoder is None:
        return {"ours": fast}
    count = measure(job | {"what": "released_count"})
    if "total_seconds" not in fast or "locations" not in count or "peak_bytes" not in decoder:
        return {"ours": fast, "released": count | decoder}
    border = max(fast["surface_voxels"], 1)
    seconds = count["locations"] * decoder["microseconds_per_location"] / 1e6
    slow = (
        count
        | decoder
        | {
            "per_surface_voxel": count["locations"] / border,
            "octree_and_decoder_seconds": seconds,
            "total_seconds": seconds + fast["encoder_seconds"],
        }
    )
    return {
        "ours": fast | {"per_surface_voxel": fast["locations"] / border},
        "released": slow,
        "times_faster_than_released": seconds / fast["octree_and_decoder_seconds"],
        "times_faster_than_released_with_encoder": slow["total_seconds"] / fast["total_seconds"],
    }


def better(rows: dict[str, dict[str, Any]], how: str) -> dict[str, Any]:
    """The faster precision of one way to use the U-Net."""
    done = {p: rows[f"{how}_{p}"] for p in PRECISIONS if "seconds" in rows[f"{how}_{p}"]}
    if not done:
        return rows[f"{how}_{PRECISIONS[0]}"]
    best = min(done, key=lambda p: done[p]["seconds"])
    return done[best] | {"precision": best}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a process of its own."""
    found = measured(job, __file__)
    print(
        job["what"],
        job.get("how", ""),
        job.get("precision", ""),
        json.dumps(found),
        file=sys.stderr,
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="a trained model, with --image; the released algorithm is for the paper's variants"
    )
    parser.add_argument("--image", type=Path)
    parser.add_argument("--shape", default="64,64,64")
    parser.add_argument("--surface", default="3000", help="surface voxels of the object, several with commas")
    parser.add_argument("--memory", help="grant for ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--released-pass", type=int, default=PASS, help="locations a pass of the released code"
    )
    parser.add_argument("--dense", action="store_true", help="also ask everywhere, and compare")
    parser.add_argument("--limit", type=float, default=16, help="GB of address space for each process")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if (given.model is None) != (given.image is None):
        parser.error("--model and --image belong together")
    from measuring import machine, write

    from ossnet.field.model import Model, versions
    from ossnet.files.reading import read_header
    from ossnet.networks.variants import PAPER_VARIANTS

    real = given.model is not None
    model = Model.load(given.model) if real else None
    header = read_header(given.image) if real else None
    shape = list(header.shape) if header else [int(n) for n in given.shape.split(",")]
    surfaces = [0] if real else [int(n) for n in given.surface.split(",")]
    job = {
        "model": given.model,
        "image": str(given.image) if real else None,
        "shape": shape,
        "surface": surfaces[0],
        "channels": model.channels if model else 1,
        "memory": given.memory,
        "rounds": given.rounds,
        "pass": given.released_pass,
        "dense": given.dense,
        "limit": int(given.limit * 1e9),
    }
    released = model is None or model.variant in PAPER_VARIANTS
    decoder = measure(job | {"what": "released_pass"}) if released else None
    rows = [compared(job | {"surface": n}, decoder) for n in surfaces]
    unets = {
        f"{how}_{precision}": measure(job | {"what": "unet", "how": how, "precision": precision})
        for how in UNET
        for precision in PRECISIONS
    }
    results = {
        "image": given.image.name if real else "synthetic",
        "shape": shape,
        "rounds": given.rounds,
        "rows": rows,
        "monai_unet": {how: better(unets, how) for how in UNET} | {"all": unets},
        "machine": machine(),
        "versions": versions(),
    }
    write(given.output, results)


if __name__ == "__main__":
    run(here, main)

"""One scan, whole: ours against the released algorithm and against MONAI's residual U-Net, on this machine, in one run.

    python benchmarks/whole_volume.py --model runs/atrium_c --image LA_001_0000.nii.gz

Without arguments: a synthetic ellipsoid and an untrained network of variant C, so that the command always runs.
The released algorithm asks its own locations (counted exactly, with our engine answering); its time is that count
times the measured time of its unfused decoder at 2^14 locations a pass, patches included, and the same encoder pass.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, write
from released_reference import released_decode

from ossnet.data.patches import PatchSource
from ossnet.data.preparation import Preparation, prepare_scan, reduce_by_two
from ossnet.field.model import Model, versions
from ossnet.files.nifti import read_volume
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.variants import spec_for
from ossnet.volume import Volume


def synthetic() -> tuple[Model, Volume]:
    """A bright ellipsoid, and a network whose patch path was set by hand to follow brightness."""
    torch.manual_seed(0)
    shape = (64, 64, 64)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = sum((a / r) ** 2 for a, r in zip(axes, (0.6, 0.5, 0.4), strict=True)) < 1
    network = OSSNet(spec_for("C", 1, 1, shape))
    preparation = Preparation(fit="pad", shape=shape)
    scan = Volume((1000 * inside).astype(np.int16)[None], np.eye(4))
    return Model(network, preparation, {1: "ellipsoid"}), scan


def timed(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Median wall-clock seconds, and the last result."""
    seconds, result = [], None
    for _ in range(rounds):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def surface(labels: np.ndarray) -> int:
    """Foreground voxels with a 6-neighbour of another label."""
    inside = np.pad(labels > 0, 1)
    core = inside.copy()
    for axis in range(3):
        core &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
    return int((inside & ~core).sum())


@torch.inference_mode()
def released_microseconds(model: Model, scan: Volume, locations: int = 2**14) -> float:
    """Time of the released formulation for a location, at the released chunk."""
    network = model.network
    image = prepare_scan(scan, model.preparation).image
    latent = network.encode(reduce_by_two(image)[None]).latent  # type: ignore[operator, union-attr]
    source = PatchSource(image, network.spec.patches)  # type: ignore[union-attr, arg-type]
    rng = np.random.default_rng(0)
    asked = torch.from_numpy(rng.integers(0, image.shape[1:], (locations, 3)))
    started = time.perf_counter()
    patches = source(asked)
    batch = None if patches is None else patches[None]
    released_decode(network.decoder, asked[None].float(), batch, latent)  # type: ignore[arg-type]
    return (time.perf_counter() - started) / locations * 1e6


def unet_seconds(channels: int, shape: tuple[int, ...], window: int, rounds: int) -> dict[str, Any]:
    """MONAI's residual UNet (8, 32, 128, 384), whole volume and sliding window, in its better precision."""
    from monai.inferers import sliding_window_inference
    from monai.networks.nets import UNet

    network = UNet(3, channels, 1, (8, 32, 128, 384), (2, 2, 2), num_res_units=2, norm="INSTANCE").eval()
    image = torch.randn(1, channels, *(-(-n // 8) * 8 for n in shape))
    out: dict[str, Any] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out[f"whole_{name}"], _ = timed(lambda: network(image), rounds)
            size = tuple(min(window, n) for n in image.shape[2:])
            out[f"sliding_{name}"], _ = timed(
                lambda size=size: sliding_window_inference(image, size, 1, network, overlap=0.5), 1
            )
    return {
        "whole_seconds": min(out["whole_fp32"], out["whole_bf16"]),
        "sliding_seconds": min(out["sliding_fp32"], out["sliding_bf16"]),
        "all": out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dense", action="store_true", help="also ask everywhere, and compare")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.model and given.image:
        model, scan = Model.load(given.model), read_volume(given.image)
    else:
        model, scan = synthetic()

    field = model.field(scan, device="cpu")
    encoder, _ = timed(lambda: model.field(scan, device="cpu"), given.rounds)
    ours, labels = timed(field.segment, given.rounds)
    border = surface(labels.data)
    released = field.segment(strategy="original", reevaluate=True)
    microseconds = released_microseconds(model, scan)
    released_seconds = released.evaluated * microseconds / 1e6
    unet = unet_seconds(model.channels, field.grid.shape, 128, given.rounds)
    results: dict[str, Any] = {
        "image": given.image.name if given.image else "synthetic",
        "shape": list(scan.shape),
        "network_grid": list(model.preparation.shape or ()),
        "surface_voxels": border,
        "encoder_seconds": encoder,
        "ours": {
            "locations": labels.evaluated,
            "per_surface_voxel": labels.evaluated / max(border, 1),
            "octree_and_decoder_seconds": ours,
            "total_seconds": ours + encoder,
        },
        "released": {
            "locations": released.evaluated,
            "per_surface_voxel": released.evaluated / max(border, 1),
            "microseconds_per_location": microseconds,
            "octree_and_decoder_seconds": released_seconds,
            "total_seconds": released_seconds + encoder,
            "voxels_differing_from_ours": int((released.data != labels.data).sum()),
        },
        "times_faster_than_released": released_seconds / ours,
        "times_faster_than_released_with_encoder": (released_seconds + encoder) / (ours + encoder),
        "monai_unet": unet,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "machine": machine(),
        "versions": versions(),
    }
    if given.dense:
        everywhere = field.segment(strategy="dense")
        results["dense"] = {
            "seconds": everywhere.seconds,
            "voxels_differing": int((everywhere.data != labels.data).sum()),
            "share_differing": float((everywhere.data != labels.data).mean()),
        }
    write(given.output, results)


if __name__ == "__main__":
    main()

"""Throughput of the decoder, bound to one volume, on one thread.

    python benchmarks/decoder_throughput.py [--variant C] [--output FILE]

The full-size network for scans of 256×256×160 voxels with four channels answers locations of a shell, as the
octree asks them. Compared are the released formulation (`released_reference`), the training-time module, and
the engine: float32 and bfloat16, with the compiled loops and without a compiler. All take turns in one process;
times are medians of CPU time. Shares are of the rate of a 2048³ matrix product in the same turns, counting 7.78
million operations a location for variant C whatever the method saves.
"""

import argparse
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from measuring import interleaved, machine, product, write
from released_reference import released_decode

from ossnet.data.patches import PatchSource
from ossnet.field.engine import gather, products
from ossnet.field.engine.fused import FusedAnswer
from ossnet.field.engine.plain import PlainAnswer
from ossnet.networks import kernels, native
from ossnet.networks.encoder import Encoding
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.variants import spec_for

SHAPE = (256, 256, 160)


def operations(network: OSSNet) -> float:
    """Of the products a location needs: dense patch matrices, the latent's part of the input done once."""
    spec = network.spec
    inputs = 3 + (343 if spec.patch_channels else 0)
    c, h = spec.patch_channels, max(spec.patch_channels // 2, 1) if spec.patch_channels else 0
    patch = 343 * c * 343 * h + 343 * h * 343
    linear = (
        2 * inputs * spec.width + (2 * spec.decoder_blocks - 1) * spec.width**2 + spec.width * spec.classes
    )
    return 2.0 * (patch + linear)


def shell(count: int) -> torch.Tensor:
    """Locations between two spheres, in C order."""
    axes = [torch.arange(-60, 61)] * 3
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    radius = grid.float().norm(dim=1)
    near = grid[(radius > 48) & (radius < 50)]
    return (near + torch.tensor([n // 2 for n in SHAPE]))[:count]


@contextmanager
def without_compiler():
    """As on a machine that has none."""
    with (
        mock.patch.object(kernels, "library", return_value=None),
        mock.patch.object(gather, "library", return_value=None),
        mock.patch.object(products, "library", return_value=None),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--variant", default="C")
    parser.add_argument("--locations", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    network = OSSNet(spec_for(options.variant, 4, 1, SHAPE)).eval()
    for name, value in network.state_dict().items():
        if value.is_floating_point() and ".weight_" not in name and not name.endswith("running_var"):
            value.add_(0.02 * torch.randn_like(value))
    image = torch.randn(4, *SHAPE)
    encoding = Encoding(torch.randn(1, network.spec.latent_rows, network.spec.latent_length), None)
    locations = shell(options.locations)
    count = len(locations)
    source = PatchSource(image, network.spec.patches)

    def released(chunk: int):
        def work() -> torch.Tensor:
            out = []
            for part in locations.split(chunk):
                patches = source(part)
                patches = None if patches is None else patches[None]
                out.append(released_decode(network.decoder, part[None].float(), patches, encoding.latent)[0])
            return torch.cat(out)[:, 0]

        return work

    def plain(chunk: int):
        answer = PlainAnswer(network, image, encoding, chunk)
        return lambda: answer(locations)

    exact, half = (FusedAnswer(network, image, encoding, half=h) for h in (False, True))
    with without_compiler():
        eager_exact, eager_half = (FusedAnswer(network, image, encoding, half=h) for h in (False, True))

    def alone(answer: FusedAnswer) -> torch.Tensor:
        """Without asking again what is close: a random network is close to its decision everywhere."""
        assert answer._fast is not None
        assert answer._run_fast is not None
        return answer._ask(answer._run_fast, answer._fast.rows, locations.float())

    def eager(work):
        def run() -> object:
            with without_compiler():
                return work()

        return run

    work = {
        "product fp32": product(torch.float32),
        "product bf16": product(torch.bfloat16),
        **{f"released {chunk}": released(chunk) for chunk in (1024, 4096, 16384)},
        **{f"plain module {chunk}": plain(chunk) for chunk in (1024, 4096)},
        "engine fp32": lambda: exact(locations),
        "engine bf16": lambda: alone(half),
        "engine fp32, no compiler": eager(lambda: eager_exact(locations)),
        "engine bf16, no compiler": eager(lambda: alone(eager_half)),
    }
    seconds = interleaved(work, options.rounds)
    rate = {kind: 2 * 2048**3 / seconds[f"product {kind}"] / 1e9 for kind in ("fp32", "bf16")}
    each = {name: s / count * 1e6 for name, s in seconds.items() if not name.startswith("product")}
    best = min(each[f"released {chunk}"] for chunk in (1024, 4096, 16384))
    best_plain = min(each[f"plain module {chunk}"] for chunk in (1024, 4096))
    truth = released(1024)()
    rows = []
    for name, micro in each.items():
        row = {"method": name, "microseconds_per_location": round(micro, 1)}
        if name.startswith("engine"):
            row |= {
                "times_faster_than_released_best": round(best / micro, 2),
                "times_faster_than_released_16384": round(each["released 16384"] / micro, 2),
                "times_faster_than_plain_module": round(best_plain / micro, 2),
                "share_of_product_rate": round(operations(network) / micro / 1e3 / rate[name[7:11]], 3),
                "largest_logit_difference": float((work[name]() - truth).abs().max()),  # type: ignore[operator]
            }
        rows.append(row)
    write(
        options.output,
        {
            "variant": options.variant,
            "locations": count,
            "operations_per_location": operations(network),
            "product_gflops": {k: round(v, 1) for k, v in rate.items()},
            "native": native.library() is not None,
            "rows": rows,
            **machine(),
        },
    )


if __name__ == "__main__":
    main()

"""One network and one scan become an `Answer`: the engine that fits the network's family.

Letters: C channels, S shape of the network's grid.
"""

import copy
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ossnet.data.patches import Pool
from ossnet.data.preparation import reduce_by_two
from ossnet.errors import SettingsError
from ossnet.field.engine.answer import Answer
from ossnet.field.engine.blockwise.answer import BlockwiseAnswer
from ossnet.field.engine.dense import prepare_unet
from ossnet.field.engine.encoding import SLAB_BYTES, encode, encode_halved, encoding_bytes, plane_bytes
from ossnet.field.engine.fused import FusedAnswer
from ossnet.field.engine.plain import PlainAnswer, padded_voxels, plain_bytes_per_location
from ossnet.field.engine.scan import Scan
from ossnet.field.memory import chunk_for, free_bytes, parse_size, require
from ossnet.networks.machine import computes_in_bf16, exact_float32
from ossnet.networks.multiscale import MultiscaleNetwork
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.unet import UNet
from ossnet.volume import Shape

Precision = Literal["fp32", "bf16", "auto"]
Engine = Literal["fused", "plain"]


_CPU = torch.device("cpu")


class Preparer(Protocol):
    """Builds the answer of one family of networks; gets all options of `prepare` as keywords."""

    def __call__(self, network: Any, scan: Scan, **options: Any) -> Answer: ...


PREPARERS: dict[type[nn.Module], Preparer] = {}
"""Network class → how its answers are prepared."""


def prepare(
    network: nn.Module,
    image: Float[Tensor, "C X Y Z"] | Scan,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    chunk: int | None = None,
    memory: str | int | None = None,
    reserve: int = 0,
    libraries: int = 0,
    large_pool: Pool = "avg",
    engine: Engine = "fused",
    window: Shape | None = None,
    once: bool = False,
    among: int = 1,
) -> Answer:
    """Bind a trained network to one scan: encode it once, and make asking cheap.

    Args:
        network: Of a known family. Put into evaluation mode; copied if it is on another device.
        image: (C, *S) float32, normalised and fitted onto the network's grid, or a scan that is read in boxes.
        device: Where the work is done. The default network reads a scan in boxes unless it is held; others hold it
            where it is a GPU.
        precision: "bf16" computes in bfloat16, "auto" takes it where the machine computes it fast. The paper's
            variants are asked again in float32 where an answer is close to a decision.
        chunk: Locations at once, at most; None chooses by measurement and `memory`.
        memory: Grant for everything above the image: bytes, or "2GB"; None for no limit.
        reserve: Bytes of the grant that others need once locations are asked; the default network is told by
            `Coverable.set_aside`.
        libraries: Bytes of the grant that the libraries below take for themselves (`field.memory.LIBRARIES`).
        large_pool: How 14³ patches are pooled: "avg" (paper) or "max" (released inference, SPEC §7.3).
        engine: "plain" runs the training-time module, for comparison.
        window: Dense networks that were trained on patches: the patch size to slide with.
        once: No place is asked a second time: the default network keeps no fine maps for that.
        among: Answers that share what the machine has free; a grant is divided by who gives it.

    Raises:
        SettingsError: If the network's family is unknown here or the image does not fit the network.
        ResourceError: If the grant is too small for this scan.
    """
    preparer = next((p for kind, p in PREPARERS.items() if isinstance(network, kind)), None)
    if preparer is None:
        raise SettingsError("network", f"{type(network).__name__} has no engine", "Register one in PREPARERS")
    device = torch.device(device)
    network = _on(network.eval(), device)
    scan = image if isinstance(image, Scan) else Scan.of(image)
    if scan.held is not None or engine == "plain":
        scan.hold(device)
    return preparer(
        network,
        scan,
        device=device,
        reserve=reserve,
        libraries=libraries,
        precision=precision,
        chunk=chunk,
        memory=None if memory is None else parse_size(memory),
        large_pool=large_pool,
        engine=engine,
        window=window,
        once=once,
        among=among,
    )


def hold_where_it_pays(
    network: nn.Module, scan: Scan, device: torch.device, grant: int | None, beside: int
) -> int:
    """Have the whole image in memory where a network works better with it; bytes that it takes from now on.

    U-Nets need it while they are prepared only, and count it themselves.

    Args:
        grant: Bytes for everything; None for no limit.
        beside: Of these, what others need at the same time.

    Raises:
        ResourceError: The grant does not hold what one of the paper's variants needs on a GPU.
    """
    if scan.held is not None or isinstance(network, UNet):
        return 0
    if isinstance(network, OSSNet) and device.type != "cpu":
        require(grant, scan.hold_bytes + beside, "this scan on a GPU")
    elif not scan.pays_to_hold(device, grant, beside):
        return 0
    scan.hold(device)
    return scan.image_bytes


def precision_among(network: nn.Module, precision: Precision, models: int) -> Precision:
    """The precision of one of several models that answer together.

    In bf16 the paper's variants ask again in fp32 what is close to their own decision, and not what is close to that of
    all: among others "auto" is fp32 for them.
    """
    return "fp32" if models > 1 and precision == "auto" and isinstance(network, OSSNet) else precision


def _on(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on a device; a copy if it is elsewhere, where others may be asking it."""
    if all(
        p.device.type == device.type and device.index in (None, p.device.index) for p in network.parameters()
    ):
        return network
    return copy.deepcopy(network).to(device)


def prepare_ossnet(
    network: OSSNet,
    scan: Scan,
    *,
    device: torch.device = _CPU,
    precision: Precision = "fp32",
    chunk: int | None = None,
    memory: int | None = None,
    reserve: int = 0,
    libraries: int = 0,
    large_pool: Pool = "avg",
    engine: Engine = "fused",
    **_: Any,
) -> Answer:
    """The paper's variants: the encoder runs once, the decoder answers."""
    expected = (network.spec.channels, *network.spec.shape)
    if scan.shape != expected:
        raise SettingsError(
            "image", f"is {scan.shape}, the network works on {expected}", "Fit it with `Preparation`"
        )
    reserve += libraries
    if device.type != "cpu":
        scan.hold(device)
    if engine == "plain":
        image = scan.hold(device)
        with torch.no_grad(), exact_float32(device):
            encoding = network.encode(reduce_by_two(image)[None])
        fixed = 4 * padded_voxels(network, image)
        size = chunk_for(memory, fixed + reserve, plain_bytes_per_location(network), chunk or 4096)
        return PlainAnswer(network, image, encoding, size, large_pool)
    # A slab works on two planes more than it answers.
    y, z = network.spec.encoder_shape[1:]
    plane = plane_bytes(network.spec.channels, network.spec.blocks[0], y * z)
    held = encoding_bytes(network.encoder, network.spec.shape) + 2 * plane
    slab = None
    if memory is not None:
        require(memory, held + plane + libraries, "encoding this scan")
        slab = min(memory - libraries - held, SLAB_BYTES)
    with exact_float32(device):
        if scan.held is not None:
            encoding = encode(network.encoder, scan.held, slab)
        else:
            encoding = encode_halved(network.encoder, scan.halved(), slab)
    half = computes_in_bf16(precision, device)
    return FusedAnswer(
        network,
        scan,
        encoding,
        chunk,
        memory,
        large_pool,
        half,
        device=device,
        reserve=reserve,
        encoding_bytes=held + max(slab or SLAB_BYTES, plane),
    )


def prepare_multiscale(
    network: MultiscaleNetwork,
    scan: Scan,
    *,
    device: torch.device = _CPU,
    precision: Precision = "auto",
    chunk: int | None = None,
    memory: int | None = None,
    libraries: int = 0,
    once: bool = False,
    among: int = 1,
    **_: Any,
) -> Answer:
    """The default network: maps are made where locations are asked."""
    half = computes_in_bf16(precision, device)
    return BlockwiseAnswer(
        network,
        scan,
        device=device,
        budget=memory,
        libraries=libraries,
        precision="bf16" if half else "fp32",
        chunk=chunk or 8192,
        keep=not once,
        most_kept=free_bytes(device) // 2 // among,
    )


PREPARERS[MultiscaleNetwork] = prepare_multiscale
PREPARERS[OSSNet] = prepare_ossnet
PREPARERS[UNet] = prepare_unet

"""One network and one scan become an `Answer`: the engine that fits the network's family.

Letters: C channels, S shape of the network's grid.
"""

from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ossnet.data.patches import Pool
from ossnet.data.preparation import reduce_by_two
from ossnet.errors import SettingsError
from ossnet.field.answer import Answer
from ossnet.field.dense import prepare_unet
from ossnet.field.encoding import SLAB_BYTES, encode, encoding_bytes
from ossnet.field.fused import FusedAnswer
from ossnet.field.memory import chunk_for, parse_size
from ossnet.field.plain import PlainAnswer, padded_voxels, plain_bytes_per_location
from ossnet.networks.blockwise import BlockwiseEncoder
from ossnet.networks.machine import fast_bf16
from ossnet.networks.multiscale import MultiscaleNetwork
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.unet import UNet
from ossnet.volume import Shape

Precision = Literal["fp32", "bf16", "auto"]
Engine = Literal["fused", "plain"]


class Preparer(Protocol):
    """Builds the answer of one family of networks; gets all options of `prepare` as keywords."""

    def __call__(self, network: Any, image: Tensor, **options: Any) -> Answer: ...


PREPARERS: dict[type[nn.Module], Preparer] = {}
"""Network class → how its answers are prepared. A family adds itself."""


def prepare(
    network: nn.Module,
    image: Float[Tensor, "C *S"],
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    chunk: int | None = None,
    memory: str | int | None = None,
    large_pool: Pool = "avg",
    engine: Engine = "fused",
    window: Shape | None = None,
) -> Answer:
    """Bind a trained network to one scan: encode it once, and make asking cheap.

    Args:
        network: Of a known family. Put into evaluation mode and onto the device.
        image: (C, *S) float32, normalised and fitted onto the network's grid.
        device: Where the work is done; the image is moved there.
        precision: "bf16" computes in bfloat16 and asks again in float32 what is close to a decision; "auto"
            takes it where the machine computes it fast.
        chunk: Locations at once; None chooses by measurement and `memory`.
        memory: Grant for everything above the image: bytes, or "2GB"; None for no limit.
        large_pool: How 14³ patches are pooled: "avg" (paper) or "max" (released inference, SPEC §7.3).
        engine: "plain" runs the training-time module, for comparison.
        window: Dense networks that were trained on patches: the patch size to slide with.

    Raises:
        SettingsError: If the network's family is unknown here or the image does not fit the network.
        ResourceError: If the grant is too small for this scan.
    """
    preparer = next((p for kind, p in PREPARERS.items() if isinstance(network, kind)), None)
    if preparer is None:
        raise SettingsError("network", f"{type(network).__name__} has no engine", "Register one in PREPARERS")
    device = torch.device(device)
    network.eval().to(device)
    return preparer(
        network,
        image.to(device),
        precision=precision,
        chunk=chunk,
        memory=None if memory is None else parse_size(memory),
        large_pool=large_pool,
        engine=engine,
        window=window,
    )


def prepare_ossnet(
    network: OSSNet,
    image: Float[Tensor, "C X Y Z"],
    *,
    precision: Precision = "fp32",
    chunk: int | None = None,
    memory: int | None = None,
    large_pool: Pool = "avg",
    engine: Engine = "fused",
    **_: Any,
) -> Answer:
    """The paper's variants: the encoder runs once, the decoder answers."""
    expected = (network.spec.channels, *network.spec.shape)
    if tuple(image.shape) != expected:
        raise SettingsError(
            "image", f"is {tuple(image.shape)}, the network works on {expected}", "Fit it with `Preparation`"
        )
    if engine == "plain":
        with torch.no_grad():
            encoding = network.encode(reduce_by_two(image)[None])
        fixed = 4 * padded_voxels(network, image)
        size = chunk or chunk_for(memory, fixed, plain_bytes_per_location(network), 4096)
        return PlainAnswer(network, image, encoding, size, large_pool)
    slab = None
    if memory is not None:
        slab = max(min(memory - encoding_bytes(network.encoder, network.spec.shape), SLAB_BYTES), 0)
    encoding = encode(network.encoder, image, slab)
    half = precision == "bf16" or (precision == "auto" and fast_bf16(image.device))
    return FusedAnswer(network, image, encoding, chunk, memory, large_pool, half)


def prepare_multiscale(
    network: MultiscaleNetwork,
    image: Float[Tensor, "C X Y Z"],
    *,
    precision: Precision = "auto",
    chunk: int | None = None,
    memory: int | None = None,
    **_: Any,
) -> Answer:
    """The default network: coarse maps of the whole scan now, fine maps where locations are asked."""
    half = precision == "bf16" or (precision == "auto" and fast_bf16(image.device))
    return BlockwiseEncoder(
        network, image, budget=memory, precision="bf16" if half else "fp32", chunk=chunk or 8192
    )


PREPARERS[MultiscaleNetwork] = prepare_multiscale
PREPARERS[OSSNet] = prepare_ossnet
PREPARERS[UNet] = prepare_unet

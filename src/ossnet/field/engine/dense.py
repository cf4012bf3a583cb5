"""Networks that answer for all voxels at once: run once, then looked up.

Letters: C channels, X Y Z voxels, N locations, K logits.
"""

from copy import copy
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from ossnet.errors import SettingsError
from ossnet.field.engine.answer import clamped
from ossnet.field.engine.scan import Scan
from ossnet.field.memory import require
from ossnet.networks.machine import computes_in_bf16, exact_float32
from ossnet.networks.unet import UNet, segment_slices
from ossnet.volume import Shape

_SLICES, _COPIES = 16, 6
"""Slices in a pass of a 2D network, and tensors of the first stage's width that are alive at once."""


class DenseAnswer:
    """A map of logits as an `Answer` (see there): exact at voxels, trilinear between them.

    Args:
        logits: (K, X, Y, Z) float, K = 1 for binary.
        encoding_bytes: What making them took while it lasted.
    """

    chunk = 1 << 17
    coarse = None
    dense = True

    def __init__(self, logits: Float[Tensor, "K X Y Z"], encoding_bytes: int = 0) -> None:
        self.classes = logits.shape[0]
        x, y, z = logits.shape[1:]
        self.shape: Shape = (x, y, z)
        self.logits = logits.reshape(self.classes, -1)
        self.bytes_per_location = 8 * (3 + 3 + 1) + 4 * self.classes * 2
        self.fixed_bytes = logits.numel() * logits.element_size()
        self.encoding_bytes = encoding_bytes

    @torch.no_grad()
    def __call__(self, locations: Num[Tensor, "N 3"]) -> Float[Tensor, "N *K"]:
        """Logits at locations; see `Answer`."""
        locations = clamped(locations.to(self.logits.device), self.shape)
        out = torch.empty(len(locations), self.classes, device=self.logits.device)
        for start in range(0, len(locations), self.chunk):
            part = slice(start, start + self.chunk)
            out[part] = self._some(locations[part])
        return out[:, 0] if self.classes == 1 else out

    def _some(self, locations: Tensor) -> Tensor:
        low = locations.long() if not locations.is_floating_point() else locations.floor().long()
        fraction = locations - low if locations.is_floating_point() else None
        if fraction is None or not bool(fraction.any()):
            return self._at(low)
        out = torch.zeros(len(low), self.classes, device=low.device)
        last = torch.tensor(self.shape, device=low.device) - 1
        for corner in range(8):
            up = torch.tensor([(corner >> axis) & 1 for axis in range(3)], device=low.device)
            weight = torch.where(up.bool(), fraction, 1 - fraction).prod(1)
            out.addcmul_(self._at(torch.minimum(low + up, last)), weight[:, None])
        return out

    def _at(self, voxels: Tensor) -> Tensor:
        _, y, z = self.shape
        flat = (voxels[:, 0] * y + voxels[:, 1]) * z + voxels[:, 2]
        return self.logits[:, flat].T.float()


def prepare_unet(
    network: UNet,
    scan: Scan,
    *,
    device: torch.device | None = None,
    precision: str = "fp32",
    memory: int | None = None,
    reserve: int = 0,
    libraries: int = 0,
    window: Shape | None = None,
    **_: Any,
) -> DenseAnswer:
    """A U-Net's logits for a whole image, held for look-up.

    Args:
        window: Patch size the network was trained on: a window slides over the image with half overlap and
            Gaussian weights. None: the image in one pass (a 2D network: slice by slice).
        memory: Bytes granted. The image, the map of logits and one pass must fit; there is nothing to divide
            them by.
        reserve: Bytes of the grant that others need.
        libraries: Bytes of the grant that the libraries take for themselves.

    Raises:
        SettingsError: If the image has other channels than the network was made for.
        ResourceError: If the grant is too small.
    """
    if scan.shape[0] != network.spec.channels:
        raise SettingsError(
            "image", f"has {scan.shape[0]} channels, the network takes {network.spec.channels}", "Give those"
        )
    needed = _pass_bytes(network, scan.shape[1:], window)
    if scan.held is None:
        needed = max(needed + scan.image_bytes, scan.hold_bytes)
    # Image and pass are over before anything is asked of the map.
    asked = 4 * network.spec.classes * prod(scan.shape[1:]) + reserve
    require(memory, max(needed, asked) + libraries, "a U-Net: it answers all voxels at once")
    # A scan that other models read as well does not keep the image.
    image = (scan if scan.held is not None else copy(scan)).hold(device or "cpu")
    lower = computes_in_bf16(precision, image.device)
    half = torch.autocast(image.device.type, torch.bfloat16, enabled=lower)
    with torch.no_grad(), exact_float32(image.device), half:
        return DenseAnswer(_logits(network, image[None], window)[0], needed)


def _pass_bytes(network: UNet, shape: Shape, window: Shape | None) -> int:
    """The map of logits, what a sliding window adds up in, and a pass with a few copies of its finest stage.

    With all padding: scans are padded to the window, and what goes through the network to sizes that it can halve.
    """
    spec, flat = network.spec, network.spec.dimensions == 2
    sizes = [n for axis, n in enumerate(shape) if axis != spec.slice_axis] if flat else window or shape
    once = prod(-(-n // m) * m for n, m in zip(sizes, spec.multiple, strict=True))
    if flat:
        # Slices one by one, and put together.
        values, once = 2 * spec.classes * once * shape[spec.slice_axis], _SLICES * once
    elif window:
        padded = prod(map(max, shape, window))
        values = (2 * spec.classes + 1) * padded + (spec.channels * padded if padded > prod(shape) else 0)
    else:
        values = spec.classes * prod(shape)
    return 4 * (values + once * (_COPIES * spec.filters[0] + spec.classes))


def _logits(network: UNet, image: Tensor, window: Shape | None) -> Tensor:
    if network.spec.dimensions == 2:
        return segment_slices(network, image)
    if window is None:
        whole: Tensor = network(image)
        return whole
    from monai.inferers.utils import sliding_window_inference

    answer = sliding_window_inference(image, window, 1, network, overlap=0.5, mode="gaussian")
    if not isinstance(answer, Tensor):
        raise TypeError("the network must answer one map")
    return answer

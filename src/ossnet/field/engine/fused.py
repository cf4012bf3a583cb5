"""The trained decoder specialised for one volume: the answers of `OSSNet.decode`, times faster.

Letters: C channels, N locations, K classes.
"""

import threading
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from ossnet.data.patches import Pool
from ossnet.field.engine.answer import clamped, coarse_logits
from ossnet.field.engine.folding import fold
from ossnet.field.engine.gather import PatchRows
from ossnet.field.engine.products import ROWS, Products
from ossnet.field.engine.replay import Replay
from ossnet.field.engine.scan import Scan, WindowRows
from ossnet.field.memory import chunk_for, halving
from ossnet.networks.encoder import Encoding
from ossnet.networks.ossnet import OSSNet
from ossnet.volume import Shape

MARGIN = 0.05
"""The smallest margin: logits this close to a decision are always asked again in float32."""
_SAMPLE, _CLOSE = 1024, 256
"""Locations asked to measure the error of bfloat16, and how many of them, the closest to a decision, count."""

_CPU_EXACT, _CPU_FAST, _GPU = 1024, 4096, 16384
"""Rows at once: float32 stays in the cache with few, bfloat16 repacks the weights each time."""


class FusedAnswer:
    """An `OSSNet` bound to one scan, as an `Answer` (see there). Several threads may ask; they take turns.

    An answer does not depend on what else is asked, or on the chunk: rows are worked on alike.

    Args:
        network: In evaluation mode, on the device of the image.
        image: (C, *S) float32, normalised and fitted, kept; or a scan that is read in boxes (on a CPU).
        encoding: What the encoder says about it, batch of one.
        chunk: Locations at once, at most; None chooses.
        memory: Bytes granted for weights and buffers; None for no limit.
        large_pool: See `PatchSource`.
        half: Compute in bfloat16 and ask again in float32 what is close to a decision.
        reserve: Bytes of the grant that others need.
        encoding_bytes: What the encoder took while it ran, for forecasts.
        device: Where it runs; None: where the image is.
        spectral: Take the first patch convolution apart in float32 (`networks.toeplitz`); None where faster.

    Raises:
        ResourceError: If the grant is too small.
    """

    dense = False

    def __init__(
        self,
        network: OSSNet,
        image: Float[Tensor, "C X Y Z"] | Scan,
        encoding: Encoding,
        chunk: int | None = None,
        memory: int | None = None,
        large_pool: Pool = "avg",
        half: bool = False,
        spectral: bool | None = None,
        device: torch.device | None = None,
        reserve: int = 0,
        encoding_bytes: int = 0,
    ) -> None:
        self.encoding_bytes = encoding_bytes
        self.shape: Shape = network.spec.shape
        self.classes = network.spec.classes
        self.coarse = coarse_logits(encoding.segmentation, self.classes)
        scan = image if isinstance(image, Scan) else Scan.of(image)
        self._device = scan.held.device if scan.held is not None else device or torch.device("cpu")
        self._coordinates = network.decoder.coordinates
        self._turn = threading.Lock()
        cpu = self._device.type == "cpu"
        kind = network.spec.patches
        patches: PatchRows | None = None
        if kind != "none":
            held = scan.held
            patches = (
                PatchRows(held, kind, large_pool) if held is not None else WindowRows(scan, kind, large_pool)
            )
        with torch.no_grad():
            folded = fold(network.decoder, encoding.latent[0])
            # One dense product keeps a GPU busier than fourteen small ones.
            apart = cpu if spectral is None else spectral
            self._exact = Products(folded, patches, torch.float32, apart, self._device)
            self._fast = Products(folded, patches, torch.bfloat16, False, self._device) if half else None
            self._allocate(chunk, memory, reserve, (_CPU_EXACT, _CPU_FAST) if cpu else (_GPU, _GPU))
            self._run_exact = _captured(self._exact)
            self._run_fast = None if self._fast is None else _captured(self._fast)
            self.margin = self._measured_margin()

    def _allocate(self, chunk: int | None, memory: int | None, reserve: int, best: tuple[int, int]) -> None:
        """Rows of both precisions, within the grant; halved when the machine has less."""
        main = self._exact if self._fast is None else self._fast
        weights = sum(p.weight_bytes for p in (self._exact, self._fast) if p is not None)
        each = sum(p.bytes_per_row for p in {self._exact, main})
        most = best[0 if self._fast is None else 1]
        wanted = chunk_for(memory, weights + reserve, each, min(chunk or most, most))
        wanted = max(wanted // ROWS * ROWS, ROWS)

        def take(rows: int) -> None:
            rows = max(rows // ROWS * ROWS, ROWS)
            self._exact.allocate(min(rows, best[0]))
            if self._fast is not None:
                self._fast.allocate(min(rows, best[1]))

        halving(take, wanted, ROWS)
        self.chunk = main.rows
        self.bytes_per_location = main.bytes_per_row
        self.fixed_bytes = weights
        if main is not self._exact:
            self.fixed_bytes += self._exact.rows * self._exact.bytes_per_row

    def _measured_margin(self) -> float:
        """Three times the largest error of bfloat16 close to a decision, in a fixed sample of the volume.

        On trained networks the largest error at ten thousand near-surface locations was that of the sample.
        """
        if self._fast is None or self._run_fast is None:
            return 0.0
        generator = torch.Generator().manual_seed(0)
        last = torch.tensor(self.shape) - 1
        places = (torch.rand(_SAMPLE, 3, generator=generator) * last).round().to(self._device)
        fast = self._ask(self._run_fast, self._fast.rows, places)
        nearest = _distance(fast).argsort()[:_CLOSE]
        exact = self._ask(self._run_exact, self._exact.rows, places[nearest])
        error = float((fast[nearest] - exact).abs().max())
        # Two logits decide between classes.
        return max(MARGIN, 3 * error * min(self.classes, 2))

    @torch.no_grad()
    def __call__(self, locations: Num[Tensor, "N 3"]) -> Float[Tensor, "N *K"]:
        """Logits at locations; see `Answer`."""
        places = clamped(locations.to(self._device), self.shape).float()
        with self._turn:
            if self._fast is None or self._run_fast is None:
                logits = self._ask(self._run_exact, self._exact.rows, places)
            else:
                logits = self._ask(self._run_fast, self._fast.rows, places)
                again = close_calls(logits, self.margin).nonzero()[:, 0]
                if len(again):
                    logits[again] = self._ask(self._run_exact, self._exact.rows, places[again])
        return logits[:, 0] if self.classes == 1 else logits

    def _ask(self, run: Callable[[Tensor, Tensor], Tensor], rows: int, places: Tensor) -> Tensor:
        out = torch.empty(len(places), self.classes, device=self._device)
        for start in range(0, len(places), rows):
            part = places[start : start + rows]
            count = len(part)
            missing = -count % ROWS
            if missing:
                part = torch.cat([part, part[-1:].expand(missing, 3)])
            part = part.contiguous()
            out[start : start + count] = run(part, self._coordinates(part))[:count]
        return out


def close_calls(logits: Float[Tensor, "N K"], margin: float) -> Bool[Tensor, " N"]:
    """Where another label is less than `margin` away."""
    return _distance(logits) < margin


def _distance(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return logits[:, 0].abs()
    best = logits.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def _captured(products: Products) -> Callable[[Tensor, Tensor], Tensor]:
    """The products as a CUDA graph where that works."""
    if products.device.type != "cuda":
        return products
    try:
        return Replay(products)
    except RuntimeError as error:  # capturing is a matter of speed only
        warnings.warn(f"no CUDA graph, launching one by one: {error}", stacklevel=2)
        return products

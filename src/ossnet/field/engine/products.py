"""The folded decoder as a list of products over reused memory, in one precision.

Widths are padded with zeros to multiples of 32: products of odd widths run at half the speed. Rows come in
multiples of 16: products over fewer rows add up in another order, and an answer must not depend on what else
is asked. (In bfloat16 on processors with AMX it does, by a rounding, whatever the multiple; what is close to a decision
is asked in float32.)

Letters: N rows (locations), I inputs, F features, K classes, P patch channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ossnet.field.engine.folding import FoldedDecoder
from ossnet.field.engine.gather import PatchRows
from ossnet.networks.kernels import affine_pade
from ossnet.networks.native import library
from ossnet.networks.toeplitz import spectral_toeplitz, spectrum, toeplitz
from ossnet.networks.variants import PATCH_SIZE

ROWS = 16
"""Rows come in multiples of this."""
WIDTH = 32
"""Widths come in multiples of this."""
_PLANE = PATCH_SIZE**2
_CUBE = PATCH_SIZE**3


class Layer(NamedTuple):
    """A product, its bias (1, F) float32, and the Padé unit behind both."""

    weight: Tensor
    bias: Tensor
    pade: Tensor


class Spectral(NamedTuple):
    """A convolution through 14 products along its first axis."""

    into: Tensor
    weights: Tensor
    """(14, P · 49, padded O · 49): the widths of the fastest of several measured."""
    back: Tensor
    bias: Tensor
    """(O,) float32."""
    pade: Tensor
    outputs: int


class Products:
    """Evaluates the decoder for prepared coordinates and gathered patches.

    Args:
        folded: The decoder for one volume.
        patches: Source of patches; None for a decoder without.
        dtype: float32, or bfloat16 with float32 sums and Padé units.
        spectral: Take the first convolution apart; float32 only.
        device: Where it runs.
    """

    def __init__(
        self,
        folded: FoldedDecoder,
        patches: PatchRows | None,
        dtype: torch.dtype,
        spectral: bool,
        device: torch.device,
    ) -> None:
        self.dtype, self.device, self.patches, self.rows = dtype, device, patches, 0
        self.coordinates = folded.coordinates
        self.local = 0 if folded.convolutions is None else _CUBE
        self.classes = folded.last.shape[1]
        self._spectral: Spectral | None = None
        self._convolutions: list[Layer] = []
        if folded.convolutions is not None and folded.units is not None:
            first, second = folded.convolutions
            hidden = first.out_channels * _CUBE
            if spectral:
                self._spectral = self._take_apart(first.weight, first.bias, folded.units[0])
            else:
                bias = _bias_of(first.bias).repeat_interleave(_CUBE)
                self._convolutions.append(self._layer(toeplitz(first.weight.double()), bias, folded.units[0]))
            bias = _bias_of(second.bias).repeat_interleave(_CUBE)
            weight = F.pad(toeplitz(second.weight.double()), (0, 0, 0, _padded(hidden) - hidden))
            self._convolutions.append(self._layer(weight, bias, folded.units[1]))
        self._blocks: list[tuple[Layer, Layer, Tensor | None]] = []
        for i, block in enumerate(folded.blocks):
            rearrange = self._first_rows if i == 0 else _pad_rows
            one, two, shortcut = block
            if one.pade is None or two.pade is None:
                raise ValueError("each map of a block is followed by a Padé unit")
            self._blocks.append(
                (
                    self._layer(rearrange(one.weight), one.bias, one.pade),
                    self._layer(_pad_rows(two.weight), two.bias, two.pade),
                    None if shortcut is None else self._weight(rearrange(shortcut)),
                )
            )
        self._last = self._weight(_pad_rows(folded.last))
        self._columns = self._widths()
        self._buffers: dict[str, Tensor] = {}

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        tensors = [self._last]
        for one, two, shortcut in self._blocks:
            tensors += [one.weight, two.weight, *([] if shortcut is None else [shortcut])]
        tensors += [layer.weight for layer in self._convolutions]
        tensors += [] if self._spectral is None else [self._spectral.weights]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def bytes_per_row(self) -> int:
        """Memory of the buffers for each row, scratch memory included."""
        own = sum(columns * dtype.itemsize for columns, dtype in self._columns.values())
        return own + (0 if self.patches is None else self.patches.bytes_per_location) + 4 * self.classes + 64

    def allocate(self, rows: int) -> None:
        """Take memory for so many rows at once, a multiple of `ROWS`; needed before the first question."""
        self._buffers = {}  # given back before more is taken
        self._buffers = {
            name: torch.zeros(rows, columns, dtype=dtype, device=self.device)
            for name, (columns, dtype) in self._columns.items()
        }
        self.rows = rows

    def __call__(
        self, locations: Float[Tensor, "N 3"], coordinates: Float[Tensor, "N W"]
    ) -> Float[Tensor, "N K"]:
        """Logits of at most as many rows as there is memory for.

        Args:
            locations: float32 voxel indices inside the volume, contiguous; N a multiple of `ROWS`.
            coordinates: float32, as the decoder wants them.
        """
        n = len(locations)
        x = self._use("input", n)
        if self.patches is not None:
            hidden = self._hidden(locations, n)
            local = self._use("local", n)
            self._product(hidden, self._convolutions[-1], local)
            x[:, : self.local] = local[:, : self.local]
        self._describe(coordinates, x)
        names = ("a", "b")
        for i, (one, two, shortcut) in enumerate(self._blocks):
            h = self._use("h", n)
            self._product(x, one, h)
            if shortcut is None:
                y = x
            else:
                y = self._use(names[i % 2], n)
                torch.mm(x, shortcut, out=y)
            y.addmm_(h, two.weight)
            x = self._pade(y, two)
        return torch.mm(x, self._last, out=self._use("logits", n))[:, : self.classes].float()

    def _hidden(self, locations: Tensor, n: int) -> Tensor:
        """After the first convolution."""
        assert self.patches is not None
        hidden = self._use("hidden", n)
        if self._spectral is None:
            patches = self._use("patches", n)
            self.patches.rows(locations, patches)
            self._product(patches, self._convolutions[0], hidden)
            return hidden
        into, weights, back, bias, pade, outputs = self._spectral
        # Laid out by frequency, so that a short round is as contiguous as a full one.
        planes, products = (self._buffers[b].view(-1) for b in ("planes", "products"))
        planes = planes[: 14 * n * weights.shape[1]].view(14, n, -1)
        products = products[: 14 * n * weights.shape[2]].view(14, n, -1)
        self.patches.spectra(locations, into, planes)
        torch.bmm(planes, weights, out=products)
        loaded = library() if hidden.device.type == "cpu" else None
        if loaded is not None:
            loaded.ossnet_spectra_pade(
                products.data_ptr(), products.stride(0), products.stride(1), n, outputs,
                back.data_ptr(), bias.data_ptr(), pade.data_ptr(),
                hidden.data_ptr(), hidden.stride(0), torch.get_num_threads(),
            )  # fmt: skip
            return hidden
        columns = outputs * _CUBE
        planes = torch.mm(back, products.view(14, -1)).view(PATCH_SIZE, n, -1)[:, :, : outputs * _PLANE]
        hidden[:, :columns].view(n, outputs, PATCH_SIZE, _PLANE).copy_(
            planes.view(PATCH_SIZE, n, outputs, _PLANE).permute(1, 2, 0, 3)
        )
        # The unit runs over the padding too: what it left there last time must not pile up.
        hidden[:, columns:] = 0
        wide = F.pad(bias.repeat_interleave(_CUBE), (0, hidden.shape[1] - columns))
        affine_pade(hidden[None], None, wide[None], None, pade, out=hidden[None])
        return hidden

    def _product(self, x: Tensor, layer: Layer, out: Tensor) -> None:
        torch.mm(x, layer.weight, out=out)
        self._pade(out, layer)

    def _pade(self, x: Tensor, layer: Layer) -> Tensor:
        affine_pade(x[None], None, layer.bias, None, layer.pade, out=x[None])
        return x

    def _describe(self, coordinates: Tensor, x: Tensor) -> None:
        """Coordinates into their columns. bfloat16 has 8 bits: they are split into parts that add up."""
        at, w = self.local, self.coordinates
        if self.dtype == torch.float32:
            x[:, at : at + w] = coordinates
            return
        high = coordinates.to(self.dtype)
        low = (coordinates - high).to(self.dtype)
        for part in (high, high, low):
            x[:, at : at + w] = part
            at += w

    def _first_rows(self, weight: Tensor) -> Tensor:
        """Rows of a first map, [coordinates | local] → [local | coordinates | 0]."""
        own, local = weight[: self.coordinates], weight[self.coordinates :]
        if self.dtype == torch.float32:
            return _pad_rows(torch.cat([local, own]))
        high = own.to(self.dtype).double()
        return _pad_rows(torch.cat([local, high, own - high, high]))

    def _layer(self, weight: Tensor, bias: Tensor, pade: Tensor) -> Layer:
        wide = F.pad(bias, (0, _padded(len(bias)) - len(bias)))
        return Layer(self._weight(weight), wide.float()[None].contiguous(), pade.to(self.device))

    def _weight(self, weight: Tensor) -> Tensor:
        columns = weight.shape[1]
        return F.pad(weight, (0, _padded(columns) - columns)).to(self.dtype).contiguous()

    def _take_apart(self, weight: Tensor, bias: Tensor | None, pade: Tensor) -> Spectral:
        into, _, back = (part.to(self.device, torch.float32).contiguous() for part in spectrum())
        weights = spectral_toeplitz(weight)
        weights = F.pad(weights, (0, _padded(weights.shape[2], 16) - weights.shape[2]))
        return Spectral(
            into,
            weights.float().contiguous(),
            back,
            _bias_of(bias).float(),
            pade.to(self.device),
            len(weight),
        )

    def _widths(self) -> dict[str, tuple[int, torch.dtype]]:
        """Columns and type of each buffer."""
        f = self._blocks[0][0].weight.shape[1]
        width = {"input": self._blocks[0][0].weight.shape[0], "h": f, "a": f, "logits": self._last.shape[1]}
        if any(shortcut is not None for _, _, shortcut in self._blocks[1:]):
            width["b"] = f
        if self.patches is not None:
            width["local"] = self._convolutions[-1].weight.shape[1]
            width["hidden"] = self._convolutions[-1].weight.shape[0]
        out = {name: (columns, self.dtype) for name, columns in width.items()}
        if self._spectral is not None:
            _, inputs, outputs = self._spectral.weights.shape
            out |= {"planes": (14 * inputs, torch.float32), "products": (14 * outputs, torch.float32)}
        elif self.patches is not None:
            out["patches"] = (self._convolutions[0].weight.shape[0], self.dtype)
        return out

    def _use(self, name: str, rows: int) -> Tensor:
        return self._buffers[name][:rows]


def _bias_of(bias: Tensor | None) -> Tensor:
    if bias is None:
        raise ValueError("the patch encoder's convolutions have biases")
    return bias.detach().double()


def _padded(width: int, multiple: int = WIDTH) -> int:
    return -(-width // multiple) * multiple


def _pad_rows(weight: Tensor) -> Tensor:
    return F.pad(weight, (0, 0, 0, _padded(len(weight)) - len(weight)))

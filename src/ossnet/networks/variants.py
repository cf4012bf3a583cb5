"""Declarations of the paper's networks: their parts, and how sizes follow from the scan (SPEC §2).

Letters: C channels, S full-resolution shape, L cells of the low-resolution grid, R latent rows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from types import MappingProxyType
from typing import Any, Literal

from ossnet.errors import SettingsError
from ossnet.networks.normalisation import Statistics

Shape = tuple[int, int, int]
Patches = Literal["none", "small", "small+large"]

PATCH_SIZE = 7
"""Edge of a small patch, and of a large one after pooling, in voxels."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of the table of SPEC §2: the parts, without sizes."""

    patches: Patches = "none"
    """Full-resolution voxels seen around each location: 7³, or also 14³ pooled to 7³."""
    skip: bool = False
    """Encoder with output skip-connections: one latent row a decoder block besides the first."""
    head: bool = False
    """Auxiliary segmentation on the low-resolution grid."""
    width: int = 512
    """Features in each decoder block."""
    fourier: int = 0
    """Random frequencies an axis-triple of coordinates is mapped to; 0 leaves coordinates as they are."""
    offered: bool = True
    """Offered for training. The others are in the released code only and can be loaded (SPEC §7.17)."""


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "O-Net": Variant(),
        "A": Variant(patches="small"),
        "B": Variant(patches="small+large"),
        "C": Variant(patches="small", skip=True, head=True),
        "D": Variant(patches="small+large", skip=True, head=True),
        "vanilla_o_net": Variant(width=256, offered=False),
        "C1": Variant(patches="small", skip=True, offered=False),
        "C2": Variant(patches="small+large", skip=True, offered=False),
        "D1": Variant(patches="small", fourier=16, offered=False),
        "D2": Variant(patches="small+large", fourier=16, offered=False),
    }
)
"""The paper's variants by name, then those of the released code that the paper does not mention."""

PAPER_VARIANTS = tuple(name for name, variant in VARIANTS.items() if variant.offered)
"""Names of the paper's variants; of `VARIANTS` these can be trained."""


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Everything that decides the modules and sizes of an `OSSNet`; plain values, so that it can be JSON."""

    variant: str
    """Name in `VARIANTS`, for people; the fields below decide."""
    channels: int
    """C, input channels of the scan."""
    classes: int = 1
    """1: binary, one logit, sigmoid. K ≥ 2: K logits including background, softmax (SPEC §7.2)."""
    blocks: tuple[int, ...] = (16, 32, 64, 128)
    """Output channels of the encoder blocks; each halves the resolution."""
    grid: Shape = (8, 8, 5)
    """Low-resolution grid: cells along each axis after the last block."""
    patches: Patches = "none"
    """See `Variant.patches`."""
    skip: bool = False
    """See `Variant.skip`."""
    head: bool = False
    """See `Variant.head`."""
    width: int = 512
    """Features in each decoder block."""
    decoder_blocks: int = 5
    """Number of decoder blocks."""
    fourier: int = 0
    """See `Variant.fourier`."""
    cbn_statistics: Statistics = "scalar"
    """Statistics of conditional batch normalisation (SPEC §7.7)."""
    normalise_coordinates: bool = False
    """Map voxel indices 0 … S-1 to -1 … 1 before the decoder (SPEC §7.4)."""

    def __post_init__(self) -> None:
        for name in ("channels", "classes", "width", "decoder_blocks"):
            _require(getattr(self, name) >= 1, name, f"is {getattr(self, name)}", "Give 1 or more")
        _require(self.fourier >= 0, "fourier", f"is {self.fourier}", "Give 0 or more")
        _require(
            len(self.blocks) >= 1 and all(c >= 1 for c in self.blocks),
            "blocks",
            f"is {self.blocks}",
            "Give the output channels of at least one encoder block, all above 0",
        )
        _require(
            len(self.grid) == 3 and all(n >= 1 for n in self.grid),
            "grid",
            f"is {self.grid}",
            "Give three cell counts above 0",
        )
        _require(
            self.patches in ("none", "small", "small+large"),
            "patches",
            f"is {self.patches!r}",
            'Choose "none", "small" or "small+large"',
        )
        _require(
            self.cbn_statistics in ("scalar", "feature"),
            "cbn_statistics",
            f"is {self.cbn_statistics!r}",
            'Choose "scalar" or "feature"',
        )
        # The released code ignores the wish silently (SPEC §7.17).
        _require(
            self.skip or not self.head,
            "head",
            "the plain encoder has no segmentation head",
            "Set skip to true or head to false",
        )
        _require(
            not self.skip or min(self.blocks) >= 2,
            "blocks",
            f"is {self.blocks}, but a skip-connection halves the channels of its block",
            "Give at least 2 channels to each block",
        )

    @property
    def encoder_shape(self) -> Shape:
        """Voxels of the encoder input along each axis: grid · 2^blocks."""
        x, y, z = (n * 2 ** len(self.blocks) for n in self.grid)
        return x, y, z

    @property
    def shape(self) -> Shape:
        """S, the full-resolution shape: twice the encoder input."""
        x, y, z = (2 * n for n in self.encoder_shape)
        return x, y, z

    @property
    def latent_length(self) -> int:
        """L, cells of the low-resolution grid."""
        return prod(self.grid)

    @property
    def latent_rows(self) -> int:
        """R: one row, or one for the decoder's input and one for each of its blocks."""
        return self.decoder_blocks + 1 if self.skip else 1

    @property
    def patch_channels(self) -> int:
        """Channels of the patches as fed: none, C, or 2C (all small ones, then all large ones)."""
        return {"none": 0, "small": 1, "small+large": 2}[self.patches] * self.channels

    @property
    def head_channels(self) -> int:
        """Channels of the segmentation head: one a foreground class (see `OSSNet`), 0 without a head."""
        return max(self.classes - 1, 1) if self.head else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"blocks": list(self.blocks), "grid": list(self.grid)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NetworkSpec":
        """The inverse of `to_dict`.

        Raises:
            SettingsError: If a key is unknown or missing, or a value has no meaning.
        """
        known = {f.name for f in fields(cls)}
        for key in values:
            _require(key in known, f"network.{key}", "unknown key", f"Known keys: {', '.join(sorted(known))}")
        for key in ("variant", "channels"):
            _require(key in values, f"network.{key}", "missing", "Give it")
        try:
            sizes = {
                name: tuple(int(n) for n in values[name]) for name in ("blocks", "grid") if name in values
            }
            return cls(**{**values, **sizes})
        except TypeError as error:
            raise SettingsError(
                "network", f"a value has the wrong type ({error})", "Mend the value"
            ) from error


def variant_named(name: str) -> tuple[str, Variant]:
    """A variant and its canonical name, whatever the case of `name` ("onet" and "o_net" too).

    Raises:
        SettingsError: If there is none of that name.
    """
    wanted = name.lower().replace("_", "").replace("-", "")
    for known, variant in VARIANTS.items():
        if known.lower().replace("_", "").replace("-", "") == wanted:
            return known, variant
    raise SettingsError("variant", f"{name!r} is unknown", f"Choose one of {', '.join(PAPER_VARIANTS)}")


def block_count(shape: Shape) -> int:
    """Encoder blocks for scans of that many voxels: as many as leave at most 8 cells along the longest axis.

    The longest axis then has 5 to 8 cells (fewer only below 17 voxels): 4 blocks for BraTS, 5 for LiTS, as in
    the paper. Scans with few slices have fewer cells along that axis.
    """
    blocks = 1
    while max(shape) > 8 * 2 ** (blocks + 1):
        blocks += 1
    return blocks


def block_channels(blocks: int) -> tuple[int, ...]:
    """Output channels of so many blocks: doubling up to 128 as in SPEC §2, never below 4."""
    return tuple(max(128 >> (blocks - 1 - i), 4) for i in range(blocks))


def admissible_shape(shape: Shape, blocks: int | None = None) -> Shape:
    """The smallest full-resolution shape that holds `shape` and that the encoder halves without remainder."""
    step = 2 ** ((block_count(shape) if blocks is None else blocks) + 1)
    x, y, z = (-(-max(n, 1) // step) * step for n in shape)
    return x, y, z


def spec_for(
    variant: str, channels: int, classes: int, shape: Shape, blocks: tuple[int, ...] | None = None
) -> NetworkSpec:
    """The configuration of a variant for scans of a given full-resolution shape.

    (256, 256, 160) gives the paper's BraTS network, (512, 512, 512) its LiTS network (SPEC §2).

    Args:
        variant: Name in `VARIANTS`, any case.
        channels: C, input channels.
        classes: 1 for binary, K ≥ 2 for K classes including background.
        shape: S, full-resolution shape in voxels; each axis a multiple of 2^(blocks+1).
        blocks: Output channels of the encoder blocks; None chooses them by `block_count`, `block_channels`.

    Raises:
        SettingsError: If the variant is unknown or the shape does not divide.
    """
    name, parts = variant_named(variant)
    chosen = block_channels(block_count(shape)) if blocks is None else tuple(blocks)
    step = 2 ** (len(chosen) + 1)
    _require(
        all(n >= 1 and n % step == 0 for n in shape),
        "shape",
        f"{shape} is not a multiple of {step} (two to the power of encoder blocks + 1)",
        f"Use {admissible_shape(shape, len(chosen))}",
    )
    x, y, z = (n // step for n in shape)
    return NetworkSpec(
        variant=name,
        channels=channels,
        classes=classes,
        blocks=chosen,
        grid=(x, y, z),
        patches=parts.patches,
        skip=parts.skip,
        head=parts.head,
        width=parts.width,
        fourier=parts.fourier,
    )


def _require(condition: bool, where: str, reason: str, fix: str) -> None:
    if not condition:
        raise SettingsError(where, reason, fix)

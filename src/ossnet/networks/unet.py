"""Voxel baselines: the paper's 3D and 2D residual U-Nets (paper section 4.1, SPEC §3 "Baselines"), and MONAI's.

The authors' code is not released. The paper states filters and group normalisation; what it leaves open is
chosen here: MONAI's residual unit (two 3×3(×3) convolutions, group normalisation in groups of up to 8
channels, PReLU, and a shortcut), the first unit at the input's resolution, each later one halving it by its
stride, transposed convolutions upwards, concatenated skip-connections, a 1×1(×1) convolution to the logits.
MONAI's own `UNet` does not match: its first unit already halves the resolution, and its decoder has one
unit's filters less at each level. It is the variant `monai-unet`, as MONAI builds it with two residual units a
level and its default normalisation, for what people use today at a fraction of the time.

Letters: B volumes or slices, C channels, K logits (1 for binary), X Y Z voxels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import gcd, prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ossnet.errors import SettingsError
from ossnet.networks.convolution import sure

Kind = Literal["unet3d", "unet2d", "monai-unet"]

FILTERS: Mapping[Kind, tuple[int, ...]] = {
    "unet3d": (8, 32, 128, 384),
    "unet2d": (128, 256, 384, 512, 640),
    "monai-unet": (16, 32, 64, 128, 256),
}
"""The paper's encoder filters (the decoder has the same without the last, from below upwards), and those of MONAI's
tutorials."""


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    """Everything that decides the modules of a `UNet`; plain values, so that it can be JSON."""

    variant: Kind
    """Three spatial axes or two."""
    channels: int
    """C, input channels."""
    classes: int = 1
    """1: binary, one logit, sigmoid. K ≥ 2: K logits including background, softmax."""
    filters: tuple[int, ...] = ()
    """Filters of the encoder's units; () = `FILTERS`. The decoder mirrors all but the last."""
    strides: tuple[tuple[int, ...], ...] = ()
    """Reduction along each axis between the units (`monai-unet`: at the entry of all but the last), one entry fewer
    than filters; () = 2 everywhere."""
    slice_axis: int = 2
    """`unet2d` only: the axis (0, 1, 2) that slices are stacked along; best in the paper: BraTS 2, LiTS 1."""

    def __post_init__(self) -> None:
        if self.variant not in FILTERS:
            raise SettingsError(
                "variant", f"{self.variant!r} is not a U-Net", f"Choose one of {', '.join(FILTERS)}"
            )
        if not self.filters:
            object.__setattr__(self, "filters", FILTERS[self.variant])
        if not self.strides:
            object.__setattr__(self, "strides", ((2,) * self.dimensions,) * (len(self.filters) - 1))
        for name in ("channels", "classes"):
            if getattr(self, name) < 1:
                raise SettingsError(name, f"is {getattr(self, name)}", "Give 1 or more")
        if len(self.filters) < 2 or min(self.filters) < 1:
            raise SettingsError("filters", f"is {self.filters}", "Give at least two numbers above 0")
        if len(self.strides) != len(self.filters) - 1 or any(
            len(s) != self.dimensions or min(s) < 1 for s in self.strides
        ):
            raise SettingsError(
                "strides",
                f"is {self.strides}",
                f"Give {len(self.filters) - 1} entries of {self.dimensions} numbers above 0",
            )
        if self.slice_axis not in (0, 1, 2):
            raise SettingsError("slice_axis", f"is {self.slice_axis}", "Choose 0, 1 or 2")

    @property
    def dimensions(self) -> int:
        """Spatial axes of the network's input."""
        return 2 if self.variant == "unet2d" else 3

    @property
    def multiple(self) -> tuple[int, ...]:
        """Sizes that the network halves without remainder are multiples of this, one number an axis."""
        return tuple(prod(stride[axis] for stride in self.strides) for axis in range(self.dimensions))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"filters": list(self.filters), "strides": [list(s) for s in self.strides]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "UNetSpec":
        """The inverse of `to_dict`.

        Raises:
            SettingsError: If a key is unknown or missing, or a value has no meaning.
        """
        known = sorted(f.name for f in fields(cls))
        for key in values:
            if key not in known:
                raise SettingsError(f"network.{key}", "unknown key", f"Known keys: {', '.join(known)}")
        try:
            sizes = {
                "filters": tuple(int(n) for n in values.get("filters", ())),
                "strides": tuple(tuple(int(n) for n in s) for s in values.get("strides", ())),
            }
            return cls(**{**values, **sizes})
        except TypeError as error:
            raise SettingsError(
                "network", f"a value is missing or of the wrong type ({error})", "Mend it"
            ) from error


class UNet(nn.Module):
    """A residual U-Net after the paper's baselines, or MONAI's; how they differ: see the module.

    Raises:
        SettingsError: If MONAI is not installed.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        unit, up, whole = _monai()
        self.spec = spec
        self.mirror: tuple[int, ...] = ()
        """Axes of the scan along which it is mirrored, and the answer back (`networks.mirrored`)."""
        f, d = spec.filters, spec.dimensions
        if spec.variant == "monai-unet":
            self.whole = sure(whole(d, spec.channels, spec.classes, f, spec.strides, num_res_units=2))
            return
        self.encoder = nn.ModuleList(
            unit(d, i, o, strides=stride, norm=_groups(o))
            for i, o, stride in zip((spec.channels, *f), f, ((1,) * d, *spec.strides), strict=False)
        )
        downwards = list(zip(f[1:], f[:-1], spec.strides, strict=True))[::-1]
        self.ups = nn.ModuleList(
            # MONAI passes the factor on as kernel and stride of the transposed convolution.
            up(d, low, high, scale_factor=stride, mode="deconv")
            for low, high, stride in downwards
        )
        self.decoder = nn.ModuleList(unit(d, 2 * high, high, norm=_groups(high)) for _, high, _ in downwards)
        self.head = (nn.Conv2d if d == 2 else nn.Conv3d)(f[0], spec.classes, 1)
        sure(self)

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B K *space"]:
        """Logits of every pixel or voxel.

        Args:
            x: Any size: continued at its border to the next multiple of the strides, and cut back.
        """
        if flips := self._mirrored_dims():
            return self._answer(x.flip(flips)).flip(flips)
        return self._answer(x)

    def _answer(self, x: Tensor) -> Tensor:
        padded, crop = _pad(x, self.spec.multiple)
        run = self.whole if self.spec.variant == "monai-unet" else self._units
        return _cut(run(padded), crop)

    def _mirrored_dims(self) -> list[int]:
        """Dimensions of the input that `mirror` means; the order of slices does not matter."""
        axes = [a for a in range(3) if self.spec.dimensions == 3 or a != self.spec.slice_axis]
        return [dim for dim, axis in enumerate(axes, 2) if axis in self.mirror]

    def _units(self, x: Tensor) -> Tensor:
        skips = []
        for unit in self.encoder:
            x = unit(x)
            skips.append(x)
        low = skips.pop()
        for up, unit in zip(self.ups, self.decoder, strict=True):
            low = unit(torch.cat([up(low), skips.pop()], dim=1))
        logits: Tensor = self.head(low)
        return logits

    def directions(self) -> list[Tensor]:
        """Weights whose size does not matter, because a normalisation follows; Muon may turn these.

        Not the shortcuts nor the last convolution, whose size is what they learn, and not transposed convolutions,
        whose rows are inputs.
        """
        blocks = [m for m in self.modules() if hasattr(m, "adn") and hasattr(m.adn, "N")]
        return [m.conv.weight for m in blocks if isinstance(m.conv, nn.Conv2d | nn.Conv3d)]


def segment_slices(
    network: UNet, volume: Float[Tensor, "B C X Y Z"], slices_per_pass: int = 16
) -> Float[Tensor, "B K X Y Z"]:
    """Logits of a `unet2d` for whole volumes, slice by slice along the axis of its declaration.

    Args:
        network: A network of two dimensions.
        volume: Any size; as many slices as *this axis* has voxels (SPEC §7.35).
        slices_per_pass: Slices in one forward pass: memory grows with it, the answer does not depend on it.
    """
    axis = network.spec.slice_axis + 2
    stack = to_slices(volume, network.spec.slice_axis)
    answers = torch.cat([network(part) for part in torch.split(stack, slices_per_pass)])
    volumes = answers.reshape(volume.shape[0], volume.shape[axis], *answers.shape[1:])
    return volumes.movedim(1, axis)


def to_slices(volume: Float[Tensor, "B C X Y Z"], axis: int) -> Float[Tensor, "M C H W"]:
    """The slices of volumes along spatial axis 0, 1 or 2: M = B times its voxels; H, W are the other two."""
    return volume.movedim(axis + 2, 1).flatten(0, 1)


def _pad(x: Tensor, multiple: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Continue the border values to the next multiple; also the slices that undo it."""
    gaps = [-n % m for n, m in zip(x.shape[2:], multiple, strict=True)]
    crop = tuple(slice(g // 2, g // 2 + n) for g, n in zip(gaps, x.shape[2:], strict=True))
    if not any(gaps):
        return x, crop
    # F.pad counts axes from the last. Replicated because zeros would be an edge that the scan does not have.
    return F.pad(x, [side for g in gaps[::-1] for side in (g // 2, g - g // 2)], mode="replicate"), crop


def _cut(x: Tensor, crop: tuple[slice, ...]) -> Tensor:
    for axis, part in enumerate(crop):
        x = x.narrow(axis + 2, part.start, part.stop - part.start)
    return x


def _groups(channels: int) -> tuple[str, dict[str, int]]:
    return "GROUP", {"num_groups": gcd(8, channels)}


def _monai() -> tuple[Any, Any, Any]:
    """MONAI's residual unit, upsampling and U-Net; imported here because it is optional and takes seconds."""
    try:
        from monai.networks.blocks.convolutions import ResidualUnit
        from monai.networks.blocks.upsample import UpSample
        from monai.networks.nets.unet import UNet as Whole
    except ImportError as error:
        raise SettingsError(
            "variant",
            "the U-Nets are built from MONAI, which is not installed",
            'Run pip install "ossnet[baselines]"',
        ) from error
    return ResidualUnit, UpSample, Whole

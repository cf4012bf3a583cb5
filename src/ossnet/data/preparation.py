"""From a scan to the grid that a network works on, and back, for voxels and for locations.

Letters: C channels, X Y Z voxels of the scan, N locations. S is the shape of the network's grid.
A location is mapped exactly; only voxels are interpolated.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, Num
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ossnet.errors import VolumeError
from ossnet.volume import LabelMap, Orientation, Shape, Volume, closest_canonical

Spacing = tuple[float, float, float]


_PART = 1 << 18
"""Values that are summed up at once: they stay in a core's cache (2.5 times as fast as 16 times as many)."""


class FitWarning(UserWarning):
    """A scan does not fit the grid of the network as it is."""


@dataclass(frozen=True)
class Fit:
    """How one scan lies on the network's grid: per axis, fitted = (index + 1/2) * scale - 1/2 + offset.

    Padding has scale 1 and `offset` voxels of zeros before the scan (SPEC §1: ceil(gap/2)); resizing has
    scale S/n and offset 0, which is trilinear interpolation without aligned corners.

    Attributes:
        centred: A resized grid takes labels from the voxels nearest to its own. Otherwise as released, from voxel
            floor(i * n / S) (SPEC §1), which is up to half a voxel of the coarser grid beside what the image shows.
    """

    source: Shape
    target: Shape
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[int, int, int] = (0, 0, 0)
    centred: bool = False

    @classmethod
    def none(cls, shape: Shape) -> "Fit":
        """The scan's own grid."""
        return cls(shape, shape)

    @classmethod
    def pad(cls, shape: Shape, target: Shape) -> "Fit":
        """Zeros around the scan. Every axis of `target` must hold the scan."""
        offset = tuple(math.ceil((t - s) / 2) for s, t in zip(shape, target, strict=True))
        if min(offset) < 0:
            raise ValueError(f"{shape} does not fit into {target}")
        return cls(shape, target, offset=(offset[0], offset[1], offset[2]))

    @classmethod
    def resize(cls, shape: Shape, target: Shape, *, centred: bool = False) -> "Fit":
        """The whole scan stretched onto `target`."""
        sx, sy, sz = (t / s for s, t in zip(shape, target, strict=True))
        return cls(shape, target, scale=(sx, sy, sz), centred=centred)

    @property
    def resizes(self) -> bool:
        """True when voxels are interpolated."""
        return self.scale != (1.0, 1.0, 1.0)

    def volume(self, image: Float[Tensor, "C X Y Z"]) -> Float[Tensor, "C SX SY SZ"]:
        """The scan on the network's grid: zero padded, or resized by trilinear interpolation."""
        if self.resizes:
            return F.interpolate(image[None], self.target, mode="trilinear", align_corners=False)[0]
        if self.source == self.target:
            return image
        return F.pad(image, self._padding())

    def labels(self, labels: Num[Tensor, "X Y Z"]) -> Num[Tensor, "SX SY SZ"]:
        """Labels on the network's grid: zero padded, or of the voxels that `nearest` tells."""
        if self.resizes:
            for axis, index in enumerate(self.nearest()):
                labels = labels.index_select(axis, torch.from_numpy(index).to(labels.device))
            return labels
        return F.pad(labels, self._padding())

    def nearest(self) -> list[Integer[np.ndarray, " S"]]:
        """Per axis, the scan voxel that each voxel of a resized grid takes its label from."""
        half = 1 if self.centred else 0
        return [
            (2 * np.arange(s) + half) * n // (2 * s) for n, s in zip(self.source, self.target, strict=True)
        ]

    def to_fitted(self, locations: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """Voxel indices of the (oriented) scan to indices on the network's grid."""
        scale, offset = locations.new_tensor(self.scale), locations.new_tensor(self.offset)
        return (locations + 0.5) * scale - 0.5 + offset

    def to_scan(self, locations: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """The inverse of `to_fitted`."""
        scale, offset = locations.new_tensor(self.scale), locations.new_tensor(self.offset)
        return (locations - offset + 0.5) / scale - 0.5

    def matrix(self) -> Float[np.ndarray, "4 4"]:
        """`to_fitted` as a 4×4 affine map."""
        out = np.eye(4)
        scale = np.array(self.scale)
        out[:3, :3] = np.diag(scale)
        out[:3, 3] = 0.5 * scale - 0.5 + np.array(self.offset)
        return out

    def _padding(self) -> list[int]:
        pairs = [(o, t - s - o) for s, t, o in zip(self.source, self.target, self.offset, strict=True)]
        return [n for pair in reversed(pairs) for n in pair]


class ChannelWindow(BaseModel):
    """Intensities of one channel over the foreground of the training set, for CT."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    low: float = Field(description="values below are set to this (percentile 0.5)")
    high: float = Field(description="values above are set to this (percentile 99.5)")
    mean: float
    std: float


class Preparation(BaseModel):
    """What happens to a scan before a network sees it. Part of the model: the same in training and use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    orientation: Literal["canonical", "file"] = Field(
        "canonical",
        description="axis order inside: nearest to RAS+, or as stored (needed for the released weights, SPEC §1)",
    )
    normalise: Literal["zscore", "window", "none"] = Field(
        "zscore",
        description="zscore: per scan and channel over all voxels, unbiased std; window: fixed for CT",
    )
    windows: tuple[ChannelWindow | None, ...] = Field(
        (), description="one a channel, for normalise=window; none: this channel per scan, as for zscore"
    )
    fit: Literal["none", "pad", "resize", "spacing"] = Field(
        "none",
        description="onto `shape` by zero padding or resizing, onto `spacing` by resampling, or as it is",
    )
    shape: Annotated[Shape | None, Field(description="network grid in voxels, for pad and resize")] = None
    spacing: Annotated[Spacing | None, Field(description="network grid in mm, for fit=spacing")] = None
    resized_labels: Literal["released", "centred"] = Field(
        "released", description="which voxels labels are taken from where scans are resized (`Fit.centred`)"
    )
    spacing_tolerance: float = Field(
        0.05, ge=0, description="relative difference of spacings up to which nothing is resampled"
    )

    @model_validator(mode="after")
    def _complete(self) -> "Preparation":
        if self.fit in ("pad", "resize") and self.shape is None:
            raise ValueError(f"fit={self.fit} needs a shape")
        if self.fit == "spacing" and self.spacing is None:
            raise ValueError("fit=spacing needs a spacing")
        if self.normalise == "window" and not self.windows:
            raise ValueError("normalise=window needs the windows of the training set")
        return self

    def orient(self, affine: Float[np.ndarray, "4 4"]) -> Orientation:
        """The flips and swaps that this model wants for a scan with this affine."""
        return closest_canonical(affine) if self.orientation == "canonical" else Orientation()

    def fit_for(self, shape: Shape, spacing: Spacing, name: str = "scan") -> Fit:
        """How an (oriented) scan of this shape and spacing (mm) lies on the network's grid."""
        centred = self.resized_labels == "centred"
        match self.fit:
            case "pad" if self.shape is not None:
                if all(n <= s for n, s in zip(shape, self.shape, strict=True)):
                    return Fit.pad(shape, self.shape)
                warnings.warn(
                    f"{name}: {shape} voxels do not fit into the {self.shape} this model works on; "
                    "the scan is resized, expect lower accuracy",
                    FitWarning,
                    stacklevel=2,
                )
                return Fit.resize(shape, self.shape, centred=centred)
            case "resize" if self.shape is not None:
                return Fit.resize(shape, self.shape, centred=centred)
            case "spacing" if self.spacing is not None:
                x, y, z = (
                    n if abs(mm / want - 1) <= self.spacing_tolerance else max(1, round(n * mm / want))
                    for n, mm, want in zip(shape, spacing, self.spacing, strict=True)
                )
                return Fit.resize(shape, (x, y, z), centred=True)
            case _:
                return Fit.none(shape)

    def statistics(self, image: Num[np.ndarray, "C X Y Z"]) -> "Statistics":
        """What normalising this scan takes."""
        if self.normalise == "window" and len(self.windows) != len(image):
            raise VolumeError(
                "scan",
                f"it has {len(image)} channels, the model was trained with {len(self.windows)}",
                "Give the channels the model was trained with",
            )
        rows = [
            self._channel(values, window)
            for values, window in zip(image, self._windows(len(image)), strict=True)
        ]
        shift, scale, top = np.array(rows).reshape(-1, 3).T
        return Statistics(shift, scale, (top - shift) / scale)

    def _windows(self, channels: int) -> tuple[ChannelWindow | None, ...]:
        return self.windows if self.normalise == "window" else (None,) * channels

    def _channel(
        self, values: Num[np.ndarray, "X Y Z"], window: ChannelWindow | None
    ) -> tuple[float, float, float]:
        """Shift, scale and largest value of a channel."""
        top = float(values.max())
        if window is not None:
            return window.mean, _scale(window.std, window.mean), min(top, window.high)
        if self.normalise == "none":
            return 0.0, 1.0, top
        mean = float(values.mean(dtype=np.float64))
        return mean, _unbiased_std(values, mean), top

    def normalise_(self, image: Float[Tensor, "C *S"], statistics: "Statistics") -> Float[Tensor, "C *S"]:
        """(x - mean) / std per channel, after clipping for CT; in place, as torch's underscore says."""
        column = (-1,) + (1,) * (image.ndim - 1)
        if self.normalise == "window":
            low = image.new_tensor([-math.inf if w is None else w.low for w in self.windows]).view(column)
            high = image.new_tensor([math.inf if w is None else w.high for w in self.windows]).view(column)
            image.clamp_(low, high)
        shift = image.new_tensor(statistics.shift).view(column)
        scale = image.new_tensor(statistics.scale).view(column)
        return image.sub_(shift).div_(scale)


@dataclass(frozen=True)
class Statistics:
    """Per channel (C,) float64: normalised = (x - shift) / scale, and the largest normalised value."""

    shift: Float[np.ndarray, " C"]
    scale: Float[np.ndarray, " C"]
    top: Float[np.ndarray, " C"]


def _unbiased_std(values: Num[np.ndarray, "X Y Z"], mean: float) -> float:
    """Standard deviation with n - 1, as a scale.

    Nothing is copied as a whole: neither as float64, nor flattened where it is cut out of something larger.
    """
    total = 0.0
    parts = np.nditer(
        values,
        ["buffered", "external_loop"],
        op_dtypes=[np.float64],
        order="C",
        casting="same_kind",
        buffersize=_PART,
    )
    for part in parts:
        rest = np.subtract(part, mean)
        total += float(rest @ rest)
    return _scale(math.sqrt(total / max(values.size - 1, 1)), mean)


def _scale(std: float, mean: float) -> float:
    """The standard deviation; 1 for a constant channel, which then becomes all zero (SPEC §7.15)."""
    return std if std > max(1e-8 * abs(mean), 1e-30) else 1.0


def as_float(
    image: Num[np.ndarray, "C X Y Z"], device: torch.device | str = "cpu"
) -> Float[Tensor, "C X Y Z"]:
    """Voxels of any real type as a float32 tensor of their own; moved in their own type where torch has it.

    What is wider than float32 is not: a copy of it in its own type would take more than `Scan.hold_bytes`.
    """
    native = image.dtype.newbyteorder("=")
    # Torch has not all unsigned types, and warns of arrays that are mapped read-only.
    if native.itemsize > 4 or native in (np.uint16, np.uint32) or not image.flags.writeable:
        native = np.dtype(np.float32)
    whole = np.ascontiguousarray(image, dtype=native)
    if not whole.flags.writeable or any(stride < 0 for stride in whole.strides):
        whole = whole.copy()  # a mirrored axis of one voxel counts as contiguous, but not for torch
    tensor = torch.from_numpy(whole).to(device)
    return tensor.to(torch.float32, copy=tensor.device.type == "cpu" and np.may_share_memory(whole, image))


@dataclass(frozen=True)
class PreparedScan:
    """A scan on the network's grid.

    Attributes:
        image: (C, *S) float32, normalised and fitted.
        orientation: What was done to the stored axes.
        fit: How the oriented scan lies on the grid.
    """

    image: Float[Tensor, "C SX SY SZ"]
    orientation: Orientation
    fit: Fit

    def matrix(self, stored_shape: Shape) -> Float[np.ndarray, "4 4"]:
        """The 4×4 map from stored voxel indices to indices on the network's grid."""
        return self.fit.matrix() @ np.linalg.inv(self.orientation.matrix(stored_shape))


def prepare_scan(
    volume: Volume, preparation: Preparation, device: torch.device | str = "cpu", preprocessed: bool = False
) -> PreparedScan:
    """Orient, normalise and fit one scan.

    Args:
        preprocessed: Take the values as they are: no normalisation (the reference cases).
    """
    orientation = preparation.orient(volume.affine)
    oriented = volume.reoriented(orientation)
    name = str(volume.source or "scan")
    fit = preparation.fit_for(oriented.shape, oriented.spacing, name)
    image = as_float(oriented.data, device)
    if not preprocessed:
        image = preparation.normalise_(image, preparation.statistics(oriented.data))
    return PreparedScan(fit.volume(image), orientation, fit)


def oriented_labels(labels: LabelMap, orientation: Orientation) -> Integer[np.ndarray, "X Y Z"]:
    """The labels in the axis order of an oriented scan, contiguous."""
    return np.ascontiguousarray(orientation.apply(labels.data))


def reduce_by_two(image: Float[Tensor, "C SX SY SZ"]) -> Float[Tensor, "C HX HY HZ"]:
    """Half the resolution by trilinear interpolation, align_corners=False (SPEC §1): the mean of 2×2×2 voxels."""
    shape = [max(n // 2, 1) for n in image.shape[1:]]
    if all(n % 2 == 0 for n in image.shape[1:]):
        return F.avg_pool3d(image[None], 2)[0]
    return F.interpolate(image[None], shape, mode="trilinear", align_corners=False)[0]

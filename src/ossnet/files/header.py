"""What an image file says about its voxels, whatever the format."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ossnet.errors import VolumeError
from ossnet.files.containers import truncated
from ossnet.volume import Affine, FileHeader, Shape, spacing_of

# Deflate cannot shrink anything further than this (1032:1), so a larger claim is a lie.
_MOST_COMPRESSION = 1032

REWRITE = "Write the file again from its source"
"""What helps where a header is wrong."""


class VolumeWarning(UserWarning):
    """A file is readable by a customary reading that may not be what its author meant."""


@dataclass(frozen=True)
class Header:
    """What a file says about its voxels, checked.

    Attributes:
        path: The file given (for a pair: the one with the header).
        shape: Voxels along X, Y, Z.
        channels: Values a voxel: volumes along a fourth axis, or components; 1 for a plain 3D file.
        affine: (4, 4) float64, voxel index → world mm, RAS+.
        dtype: Voxel type as stored, native byte order.
        file_header: What a result written for this scan takes over.
        scale: (slope, intercept), or None where the stored values are the values.
        data_path: The file that holds the voxels.
        offset: Bytes before the first voxel in `data_path`, or before the packed voxels.
        swapped: True when the voxels are in the other byte order.
        channel_axis: Which stored axis the channels are, fastest first: 0 where a voxel's values lie together, 3 where
            each channel is a volume.
        packed: How the voxels alone are compressed.
        named: Whether the name of the voxel file says that all of it is compressed, as `.nii.gz`.
        names: Label value → name, where the header tells.
        origin: What the file says of its making (`descrip` of NIfTI).
        warnings: Customary readings that were chosen.
    """

    path: Path
    shape: Shape
    channels: int
    affine: Affine
    dtype: np.dtype[Any]
    file_header: FileHeader
    scale: tuple[float, float] | None
    data_path: Path
    offset: int
    swapped: bool
    channel_axis: int = 3
    packed: Literal["gzip", "zlib"] | None = None
    named: bool = True
    names: Mapping[int, str] = field(default_factory=dict)
    origin: str = ""
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along X, Y, Z in mm."""
        return spacing_of(self.affine)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Sizes of the stored axes, fastest first."""
        at = self.channel_axis
        return (*self.shape[:at], self.channels, *self.shape[at:])

    @property
    def voxels(self) -> int:
        """Values stored: channels × X × Y × Z."""
        return self.channels * math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the voxels as stored."""
        return self.voxels * self.dtype.itemsize


def check_size(path: Path, data_path: Path, claimed: int, packed: bool) -> None:
    """Refuse a header that claims more bytes than its file can hold."""
    try:
        stored = data_path.stat().st_size
    except OSError:
        stored = 0
    most = stored * _MOST_COMPRESSION if packed else stored
    if claimed > most:
        if most > stored:
            raise VolumeError(
                path,
                f"the header claims {claimed / 2**30:.3g} GiB, more than {stored:,} bytes can hold",
                "Copy or download it again; do not trust its header",
            )
        raise truncated(data_path)


def sound(affine: np.ndarray, name: str, path: Path | str, fix: str) -> Affine:
    """An affine that can be trusted.

    Raises:
        VolumeError: It holds NaN or infinity, is not invertible, or makes voxels of absurd sizes.
    """
    if not np.isfinite(affine).all():
        raise VolumeError(path, f"the {name} holds NaN or infinity", fix)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    with np.errstate(all="ignore"):
        # Relative to the voxel sizes, so that micrometre voxels are not taken for flat ones.
        volume = abs(np.linalg.det(affine[:3, :3] / sizes)) if (sizes > 0).all() else 0.0
    if not volume > 1e-6:
        raise VolumeError(path, f"the {name} is not invertible: voxels would be flat", fix)
    if not (sizes.min() > 1e-6 and sizes.max() < 1e6):
        raise VolumeError(
            path,
            f"voxels measure {sizes[0]:.3g} × {sizes[1]:.3g} × {sizes[2]:.3g}",
            "Set valid voxel sizes",
        )
    return affine


def times(sizes: tuple[int, ...] | list[int]) -> str:
    """2 × 3 × 4."""
    return " × ".join(str(n) for n in sizes)

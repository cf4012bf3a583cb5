"""Where NIfTI headers say that voxels are, and writing it.

Three methods (`nifti1.h`): voxel sizes alone, a quaternion (qform), a matrix (sform). The sform goes first
as in most programs; what is customary but unclear is noted.
"""

import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ossnet.errors import VolumeError
from ossnet.files.header import sound
from ossnet.volume import Affine, FileHeader, Shape, largest_corner_gap, spacing_of

MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}
"""Unit of length (the low three bits of `xyzt_units`) → mm."""

_rotation: Any = nib.quaternions.quat2mat
_SET = "Set a valid qform or sform"


def read_place(raw: Any, shape: Shape, path: Path) -> tuple[Affine, FileHeader, tuple[str, ...]]:
    """Affine (voxel → mm), what a file written for this one takes over, and what is unclear about them.

    Raises:
        VolumeError: The place cannot be trusted: NaN, not invertible, no rotation, absurd voxel sizes.
    """
    notes: list[str] = []
    qcode, scode = int(raw["qform_code"]), int(raw["sform_code"])
    codes = (qcode if 0 < qcode < 6 else 0, scode if 0 < scode < 6 else 0)
    qform: Affine | None = None
    if codes != (qcode, scode):
        notes.append(f"unknown affine codes (qform {qcode}, sform {scode}) are ignored")
    if codes[1]:
        affine = sound(np.asarray(raw.get_sform(), dtype=np.float64), "sform", path, _SET)
        if codes[0]:
            try:
                qform = _qform(raw, path)
                gap = largest_corner_gap(affine, qform, shape)
            except (VolumeError, FloatingPointError):
                notes.append("the qform has no meaning; the sform is used")
            else:
                if gap <= 0.5 * min(spacing_of(affine)):
                    qform = None
                else:
                    notes.append(
                        f"qform and sform place voxels up to {gap:.3g} apart; the sform is used, "
                        "other programs may use the qform"
                    )
    elif codes[0]:
        affine = _qform(raw, path)
    else:
        affine = sound(
            np.diag([*(float(p) for p in raw["pixdim"][1:4]), 1.0]),
            "pixdim, used because no affine is given,",
            path,
            _SET,
        )
        if (np.diag(affine) < 0).any():
            raise VolumeError(path, "voxel sizes are negative and no affine is given", _SET)
        notes.append(
            "no affine is given (qform_code = sform_code = 0); voxel sizes are used, "
            "and left and right, front and back are not known"
        )
    unit = int(raw["xyzt_units"]) & 7
    if unit not in MM_PER_UNIT:
        notes.append(f"unknown unit of length ({unit}); millimetres are assumed")
    elif (factor := MM_PER_UNIT[unit]) != 1.0:
        notes.append(f"lengths are in {'metres' if unit == 1 else 'micrometres'} and are converted to mm")
        affine = _scaled(factor, affine)
        qform = None if qform is None else _scaled(factor, qform)
    moved = None if qform is None else (qform @ np.linalg.inv(affine)).tolist()
    header = FileHeader(
        *codes, units=int(raw["xyzt_units"]), to_qform=moved and tuple(tuple(row) for row in moved)
    )
    return affine, header, tuple(notes)


def _scaled(factor: float, affine: Affine) -> Affine:
    scaled: np.ndarray = np.diag([factor, factor, factor, 1.0]) @ affine
    return scaled


def write_place(header: Any, affine: Affine, kept: FileHeader, shape: tuple[int, int, int]) -> None:
    """Put an affine (in mm) into a header under the scan's codes where they can hold it, else as an sform."""
    # Lengths go back into the unit of the scan's file, so that programs that ignore units agree as well.
    factor = 1 / MM_PER_UNIT.get(kept.units & 7, 1.0)
    # A program that shows the scan at its qform shows what belongs to it at a qform of its own.
    qform = affine if kept.to_qform is None else np.array(kept.to_qform) @ affine
    affine, qform = _scaled(factor, affine), _scaled(factor, qform)
    qcode, scode = kept.qform_code, kept.sform_code
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    tolerance = 1e-3 * float(sizes.min())
    header["pixdim"][1:4] = sizes
    if not qcode and not scode:
        # The scan gave voxel sizes only. Its labels do the same, and lie on it in every program.
        if largest_corner_gap(affine, np.diag([*sizes, 1.0]), shape) <= tolerance:
            header["pixdim"][0] = 1.0
            return
        scode = 1
    header.set_qform(qform, qcode or 1, strip_shears=True)
    if largest_corner_gap(qform, _qform(header, "header"), shape) > tolerance:
        # A rotation and voxel sizes cannot say this (shear): only the sform can.
        qcode, scode = 0, scode or 1
    header["qform_code"] = qcode
    if scode:
        header.set_sform(affine, scode)
    header["sform_code"] = scode


def _qform(raw: Any, path: Path | str) -> Affine:
    """nifti1.h, method 2: a rotation by a quaternion, then voxel sizes, then an offset."""
    b, c, d = (float(raw[f"quatern_{letter}"]) for letter in "bcd")
    square = 1.0 - (b * b + c * c + d * d)
    if not square > -1e-4:  # rounding of a half turn reaches -1e-7
        raise VolumeError(path, "the qform is not a rotation", _SET)
    quaternion = np.array([math.sqrt(max(square, 0.0)), b, c, d])
    quaternion /= np.linalg.norm(quaternion)
    pixdim = np.array([float(p) for p in raw["pixdim"][:4]])
    if (pixdim[1:] < 0).any():
        raise VolumeError(path, "voxel sizes are negative", "Set positive voxel sizes in pixdim")
    if pixdim[0] < 0:  # qfac: a mirrored third axis
        pixdim[3] = -pixdim[3]
    affine = np.eye(4)
    affine[:3, :3] = _rotation(quaternion) * pixdim[1:]
    affine[:3, 3] = [float(raw[f"qoffset_{letter}"]) for letter in "xyz"]
    return sound(affine, "qform", path, _SET)

"""DICOM series for tests, written slice by slice or as one multi-frame file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

AXES = np.eye(3)


def slice_of(stored: np.ndarray, position: Sequence[float], **changes: Any) -> Dataset:
    """One slice (Y, X) of int16 or uint16 values."""
    out = _image(stored, CTImageStorage)
    out.ImagePositionPatient = [float(v) for v in position]
    out.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    out.PixelSpacing = [1.0, 1.0]
    out.SliceThickness = 1.0
    for name, value in changes.items():
        setattr(out, name, value)
    return out


def multi_frame(stored: np.ndarray, positions: np.ndarray, **changes: Any) -> Dataset:
    """Slices (Z, Y, X) in one file; orientation and spacing are shared."""
    out = _image(stored, EnhancedMRImageStorage)
    out.NumberOfFrames = len(stored)
    orientation, measures = Dataset(), Dataset()
    orientation.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    measures.PixelSpacing, measures.SliceThickness = [0.5, 2.0], 3.0
    shared = Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Items([orientation]), Items([measures])
    out.SharedFunctionalGroupsSequence = Items([shared])
    groups = []
    for position in positions:
        place, group = Dataset(), Dataset()
        place.ImagePositionPatient = [float(v) for v in position]
        group.PlanePositionSequence = Items([place])
        groups.append(group)
    out.PerFrameFunctionalGroupsSequence = Items(groups)
    for name, value in changes.items():
        setattr(out, name, value)
    return out


def write(folder: Path, slices: Sequence[Dataset], uid: str | None = None, names: Sequence[str] = ()) -> Path:
    """A series as files; names say nothing about the order."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid()
    for number, one in enumerate(slices):
        one.SeriesInstanceUID = uid
        name = names[number] if names else f"IM{(number * 7919) % 1000:04d}"
        pydicom.dcmwrite(folder / name, one, enforce_file_format=True)
    return folder


def _image(stored: np.ndarray, kind: str) -> Dataset:
    out = Dataset()
    out.file_meta = FileMetaDataset()
    out.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    # Alike for alike voxels: hypothesis wants the same files again.
    out.SOPClassUID, out.SOPInstanceUID = kind, generate_uid(entropy_srcs=[stored.tobytes().hex()])
    out.Modality, out.SeriesNumber, out.SeriesDescription = "CT", 3, "thin"
    out.Rows, out.Columns = stored.shape[-2:]
    out.SamplesPerPixel, out.PhotometricInterpretation = 1, "MONOCHROME2"
    out.BitsAllocated = out.BitsStored = 16
    out.HighBit, out.PixelRepresentation = 15, int(stored.dtype == np.int16)
    out.PixelData = stored.tobytes()
    return out

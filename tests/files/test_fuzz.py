"""Damage of any kind is either refused with a VolumeError or leaves shape and type as they were."""

import gzip
import warnings
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ossnet.errors import ResourceError, VolumeError
from ossnet.files.reading import read_labels, read_volume

DATA = np.random.default_rng(0).integers(0, 200, size=(5, 6, 7)).astype(np.int16)
DATA[:, :, 5:] = 0  # a background, in which a wrong shape could hide
PLAIN = nib.Nifti1Image(DATA, np.diag([1.0, 2.0, 3.0, 1.0])).to_bytes()
PLAIN2 = nib.Nifti2Image(DATA, np.diag([1.0, 2.0, 3.0, 1.0])).to_bytes()
PACKED = gzip.compress(PLAIN, mtime=0)

fuzz = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


def try_reading(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            volume = read_volume(file)
        except (VolumeError, ResourceError):
            pass
        else:
            # The same voxels; the third axis may now be declared as channels.
            assert volume.shape[2] * volume.channels == DATA.shape[2]
            assert np.isfinite(volume.affine).all()
            assert volume.shape[:2] == DATA.shape[:2]
        try:
            labels = read_labels(file)
        except (VolumeError, ResourceError):
            pass
        else:
            assert labels.data.shape == DATA.shape


@pytest.mark.parametrize(("name", "whole"), [("a.nii", PLAIN), ("b.nii", PLAIN2), ("a.nii.gz", PACKED)])
def test_every_truncation_is_refused(tmp_path: Path, name: str, whole: bytes) -> None:
    file = tmp_path / name
    for length in range(0, len(whole), 7 if len(whole) > 600 else 1):
        file.write_bytes(whole[:length])
        with pytest.raises(VolumeError):
            read_volume(file)


@fuzz
@given(at=st.integers(0, len(PLAIN) - 1), bit=st.integers(0, 7), second=st.booleans())
def test_one_bit_of_a_plain_file(tmp_path: Path, at: int, bit: int, second: bool) -> None:
    whole = bytearray(PLAIN2 if second else PLAIN)
    whole[at] ^= 1 << bit
    (tmp_path / "a.nii").write_bytes(whole)
    try_reading(tmp_path / "a.nii")


def test_every_bit_of_what_says_the_shape(tmp_path: Path) -> None:
    for at in (*range(4), *range(40, 56), *range(68, 74), *range(108, 120), *range(344, 352)):
        for bit in range(8):
            whole = bytearray(PLAIN)
            whole[at] ^= 1 << bit
            (tmp_path / "a.nii").write_bytes(whole)
            try_reading(tmp_path / "a.nii")


@fuzz
@given(at=st.integers(0, len(PACKED) - 1), bit=st.integers(0, 7))
def test_one_bit_of_a_packed_file(tmp_path: Path, at: int, bit: int) -> None:
    whole = bytearray(PACKED)
    whole[at] ^= 1 << bit
    (tmp_path / "a.nii.gz").write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            volume = read_volume(tmp_path / "a.nii.gz")
        except VolumeError:
            return
    assert np.array_equal(volume.data[0], DATA)  # a flag or the time in gzip's own header


@fuzz
@given(start=st.integers(0, 400), junk=st.binary(min_size=1, max_size=200))
def test_junk_written_over_a_file(tmp_path: Path, start: int, junk: bytes) -> None:
    whole = PLAIN[:start] + junk + PLAIN[start + len(junk) :]
    (tmp_path / "a.nii").write_bytes(whole[: len(PLAIN)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (read_volume, read_labels):
            with suppress(VolumeError, ResourceError):
                read(tmp_path / "a.nii")


@fuzz
@given(junk=st.binary(max_size=700))
def test_junk_alone(tmp_path: Path, junk: bytes) -> None:
    for name in ("a.nii", "a.nii.gz", "a.hdr"):
        (tmp_path / name).write_bytes(junk)
        with pytest.raises(VolumeError):
            read_volume(tmp_path / name)

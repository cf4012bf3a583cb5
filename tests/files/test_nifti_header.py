"""Each way in which a file cannot be trusted is refused, with file, reason and fix."""

import gzip
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ossnet.errors import VolumeError
from ossnet.files import memory
from ossnet.files.containers import stem
from ossnet.files.header import VolumeWarning
from ossnet.files.reading import read_header, read_labels, read_volume

DATA = np.random.default_rng(0).integers(0, 200, size=(5, 6, 7)).astype(np.int16)

# Where NIfTI-1 keeps things (nifti1.h).
DIM, INTENT, DATATYPE, BITPIX, PIXDIM, OFFSET, SLOPE = 40, 68, 70, 72, 76, 108, 112
UNITS, QFORM, SFORM, QUATERN, SROW, MAGIC = 123, 252, 254, 256, 280, 344


def raw(affine: np.ndarray | None = None) -> bytearray:
    image = nib.Nifti1Image(DATA, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine)
    image.set_qform(image.affine, 1)
    return bytearray(image.to_bytes())


def put(at: int, form: str, *values: float) -> bytearray:
    """A valid file with one field changed."""
    out = raw()
    struct.pack_into("<" + form, out, at, *values)
    return out


def refused(path: Path, reason: str) -> None:
    for read in (read_volume, read_labels):
        with pytest.raises(VolumeError) as caught:
            read(path)
        assert caught.value.where.startswith(str(path.parent))
        assert reason in caught.value.reason
        assert caught.value.fix


CHANGED = {
    "no dimensions": (put(DIM, "h", 0), "0 dimensions"),
    "too many dimensions": (put(DIM, "h", 9), "9 dimensions"),
    "negative dimension": (put(DIM + 2, "h", -5), "no voxels"),
    "zero dimension": (put(DIM + 6, "h", 0), "no voxels"),
    "absurd dimension": (put(DIM + 2, "3h", 32767, 32767, 32767), "truncated"),
    "one dimension": (put(DIM, "h", 1), "one-dimensional"),
    "two axes beside space": (put(DIM, "8h", 6, 5, 6, 1, 7, 1, 3, 1), "more than one axis beside space"),
    "smaller than written": (put(DIM + 2, "h", 4), "goes on after"),
    "unknown type": (put(DATATYPE, "h", 77), "a type that NIfTI does not know"),
    "no type": (put(DATATYPE, "h", 0), "unknown type"),
    "bits": (put(DATATYPE, "2h", 1, 1), "single bits"),
    "complex": (put(DATATYPE, "2h", 32, 64), "complex"),
    "colours": (put(DATATYPE, "2h", 128, 24), "colours"),
    "long double": (put(DATATYPE, "2h", 1536, 128), "128-bit"),
    "bits contradict type": (put(BITPIX, "h", 32), "contradicts itself"),
    "size of header": (put(0, "i", 349), "not a NIfTI"),
    "magic": (put(MAGIC, "4s", b"n-1\0"), "magic string"),
    "analyze": (put(MAGIC, "4s", b""), "ANALYZE"),
    "magic of a pair": (put(MAGIC, "4s", b"ni1\0"), "voxels are in another file"),
    "offset in the header": (put(OFFSET, "f", 100.0), "vox_offset"),
    "offset zero": (put(OFFSET, "f", 0.0), "vox_offset"),
    "offset negative": (put(OFFSET, "f", -352.0), "vox_offset"),
    "offset fractional": (put(OFFSET, "f", 352.5), "vox_offset"),
    "offset nan": (put(OFFSET, "f", float("nan")), "vox_offset"),
    "offset beyond": (put(OFFSET, "f", 1e9), "truncated"),
    "slope infinite": (put(SLOPE, "f", float("inf")), "scaled by inf"),
    "intercept nan": (put(SLOPE, "2f", 2.0, float("nan")), "shifted by nan"),
    "sform nan": (put(SROW, "f", float("nan")), "NaN or infinity"),
    "sform zero": (put(SROW, "12f", *[0.0] * 12), "not invertible"),
    "sform flat": (put(SROW, "12f", 1, 1, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0), "not invertible"),
    "voxels of a kilometre": (put(SROW, "12f", 1e9, 0, 0, 0, 0, 1e9, 0, 0, 0, 0, 1e9, 0), "voxels measure"),
    "qform no rotation": (put(QFORM, "2h3f", 1, 0, 2.0, 0, 0), "not a rotation"),
    "qform nan": (put(QFORM, "2h3f", 1, 0, float("nan"), 0, 0), "not a rotation"),
    "cifti": (put(INTENT, "h", 3001), "CIFTI"),
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_headers_that_cannot_be_trusted(tmp_path: Path, name: str, ending: str) -> None:
    content, reason = CHANGED[name]
    file = tmp_path / f"a{ending}"
    file.write_bytes(content if ending == ".nii" else gzip.compress(content))
    if ending == ".nii.gz" and name in ("absurd dimension", "offset beyond"):
        reason = "more than"  # 64 TiB in a few hundred bytes: known before anything is unpacked
    refused(file, reason)


def test_voxel_sizes_without_affine(tmp_path: Path) -> None:
    for pixdim, reason in (
        ((0, 1, 1), "not invertible"),
        ((-1, 1, 1), "negative"),
        ((float("nan"), 1, 1), "NaN"),
    ):
        content = put(QFORM, "2h", 0, 0)
        struct.pack_into("<3f", content, PIXDIM + 4, *pixdim)
        (tmp_path / "a.nii").write_bytes(content)
        refused(tmp_path / "a.nii", reason)


def test_negative_voxel_sizes_in_a_qform(tmp_path: Path) -> None:
    content = put(QFORM, "2h", 1, 0)
    struct.pack_into("<f", content, PIXDIM + 8, -2.0)
    (tmp_path / "a.nii").write_bytes(content)
    refused(tmp_path / "a.nii", "negative")


@pytest.mark.parametrize(
    ("at", "form", "values", "note"),
    [
        (QFORM, "2h", (99, 1), "unknown affine codes"),
        (UNITS, "B", (7,), "unknown unit"),
        (QUATERN, "3f", (2.0, 0.0, 0.0), "the qform has no meaning"),
    ],
)
def test_unclear_headers_are_read_with_a_warning(
    tmp_path: Path, at: int, form: str, values: tuple[float, ...], note: str
) -> None:
    (tmp_path / "a.nii").write_bytes(put(at, form, *values))
    with pytest.warns(VolumeWarning, match=f"a.nii.*{note}"):
        header = read_header(tmp_path / "a.nii")
    np.testing.assert_array_equal(header.affine, np.diag([1.0, 2.0, 3.0, 1.0]))


@pytest.mark.parametrize("qfac", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (0.4, -1.1, 2.9), (0.0, 0.0, np.pi)])
def test_qform_as_nibabel_reads_it(tmp_path: Path, qfac: float, angles: tuple[float, float, float]) -> None:
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(*angles) * np.array([0.5, 1.5, 2.5])
    affine[:3, 3] = [3, 4, -5]
    content = raw(affine)
    struct.pack_into("<h", content, SFORM, 0)
    struct.pack_into("<f", content, PIXDIM, qfac)
    (tmp_path / "a.nii").write_bytes(content)
    expected = nib.load(tmp_path / "a.nii").header
    if qfac == 0:  # nifti1.h: anything but -1 is 1
        struct.pack_into("<f", content, PIXDIM, 1.0)
        (tmp_path / "b.nii").write_bytes(content)
        expected = nib.load(tmp_path / "b.nii").header
    np.testing.assert_allclose(read_header(tmp_path / "a.nii").affine, expected.get_qform(), atol=1e-5)


def test_damaged_containers(tmp_path: Path) -> None:
    good = gzip.compress(bytes(raw()), mtime=0)
    file = tmp_path / "a.nii.gz"

    def check(content: bytes, reason: str) -> None:
        file.write_bytes(content)
        refused(file, reason)

    check(b"", "empty")
    check(bytes(raw()), "not compressed")
    check(good[:-9], "truncated")  # the last voxels are there, the checksum is not
    check(good[: len(good) // 2], "truncated")
    check(good[:30], "truncated")
    check(good[:-8] + bytes(4) + good[-4:], "checksum")
    check(good[:-4] + bytes(4), "damaged")
    check(good[:60] + b"\xff\xff\xff\xff" + good[64:], "")
    check(gzip.compress(bytes(raw())[:300]), "truncated")
    check(gzip.compress(b"hello" * 200), "not a NIfTI")
    check(gzip.compress(bytes(raw()) + b"\0"), "goes on after")
    plain = tmp_path / "a.nii"
    plain.write_bytes(good)
    refused(plain, "not named .gz")
    plain.write_bytes(raw()[:-1])
    refused(plain, "truncated")
    plain.write_bytes(raw()[:100])
    refused(plain, "truncated")


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    # 64 MiB of zeros in 64 KiB behind a header that asks for 420 bytes: refused at the first byte too many.
    file = tmp_path / "a.nii.gz"
    file.write_bytes(gzip.compress(bytes(raw()) + bytes(1 << 26)))
    refused(file, "goes on after")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.nii.gz", "no such file"),
        ("a.hdr", "no such file"),
        ("a.mgz", "FreeSurfer"),
        ("a.mnc", "MINC"),
        ("a.dcm", "DICOM"),
        ("a.mha", "no such file"),
        ("a.nrrd", "no such file"),
        ("a.gipl", "GIPL"),
        ("a.txt", "not the name of an image"),
        (".", "a folder"),
    ],
)
def test_names(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(VolumeError, match=reason):
        read_volume(tmp_path / name)


def test_a_folder_named_like_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.nii").mkdir()
    refused(tmp_path / "a.nii", "a folder")


def test_several_volumes_are_no_label_map(tmp_path: Path) -> None:
    nib.Nifti1Image(np.stack([DATA, DATA], -1), np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(VolumeError, match="2 volumes"):
        read_labels(tmp_path / "a.nii")


def test_a_header_costs_no_voxels(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(put(SLOPE, "2f", 2.0, -1.0))
    header = read_header(tmp_path / "a.nii")
    assert (header.shape, header.channels, header.dtype, header.scale) == (
        (5, 6, 7),
        1,
        np.int16,
        (2.0, -1.0),
    )
    assert (header.nbytes, header.offset, header.spacing) == (420, 352, (1.0, 2.0, 3.0))


@pytest.mark.parametrize("name", ["x/b.nii.gz", "b.nii", "b.NII.GZ", "b.hdr", "b.img.gz", "b"])
def test_stem(name: str) -> None:
    assert stem(name) == "b"


def test_free_memory_is_known() -> None:
    assert 1 << 20 < memory.available_memory() < 1 << 50


def test_free_memory_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(reference: Any) -> int:
        reference._obj.free = 123_456_789
        return int(reference._obj.length == 64)

    api = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=told))
    monkeypatch.setattr(memory.ctypes, "windll", api, raising=False)
    assert memory._left_by_windows() == 123_456_789


_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("member", "folder", "names"),
    [
        ("0::/job_7/step_0", "job_7/step_0", _SECOND),
        ("0::/job_7/step_0", "job_7", _SECOND),  # a limit on all steps together
        ("0::/", "", _SECOND),  # in a container
        (None, "", _SECOND),
        ("3:cpu:/\n4:rdma,memory:/job_7", "memory/job_7", _FIRST),
        ("4:memory:/docker/a1", "memory", _FIRST),  # whose own group is at the top there
        ("4:memory:/docker/a1\n0::/", "memory", _FIRST),
    ],
)
def test_limits_of_containers_and_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str | None, folder: str, names: tuple[str, ...]
) -> None:
    if member is not None:
        (tmp_path / "member").write_text(member + "\n")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_MEMBER", tmp_path / "member")
    group = tmp_path / "groups" / folder
    group.mkdir(parents=True)
    limit, used, cached = names
    (group / used).write_text("3000000\n")
    (group / "memory.stat").write_text(f"anon 5\n{cached} 1000000\n")
    for text, left in (("5000000", 3_000_000), ("1000000", 0)):
        (group / limit).write_text(text + "\n")
        assert memory.available_memory() == left
    (group / limit).write_text("max\n" if names is _SECOND else f"{2**63 - 4096}\n")
    assert memory.available_memory() > 1 << 20

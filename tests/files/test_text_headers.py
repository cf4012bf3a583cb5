"""NRRD and MetaImage: read as ITK reads them, and refused where they are damaged or unclear."""

import gzip
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ossnet.errors import ResourceError, VolumeError
from ossnet.files import reading
from ossnet.files.header import Header, VolumeWarning
from ossnet.files.reading import files_of, read_header, read_labels, read_volume

DATA = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype("<i2")
BYTES = DATA.tobytes(order="F")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "5 6 7",
    "space directions": "(0,-0.5,0) (1,0,0) (0,0,2)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(10,20,30)",
}
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "0 -1 0 1 0 0 0 0 1",
    "Offset": "10 20 30",
    "ElementSpacing": "0.5 1 2",
    "DimSize": "5 6 7",
    "ElementType": "MET_SHORT",
}
PLACE = LPS @ np.array([[0, 1, 0, 10], [-0.5, 0, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1.0]])


def nrrd(voxels: bytes = BYTES, pairs: str = "", **changes: str | None) -> bytes:
    fields = NRRD | {key.replace("_", " "): value for key, value in changes.items()}
    lines = [f"{key}: {value}\n" for key, value in fields.items() if value is not None]
    return "".join(["NRRD0005\n# a comment\n", *lines, pairs, "\n"]).encode() + voxels


def meta(voxels: bytes = BYTES, file: str = "LOCAL", **changes: str | None) -> bytes:
    keys = META | changes | {"ElementDataFile": file}
    return "".join(f"{k} = {v}\n" for k, v in keys.items() if v is not None).encode() + voxels


def written(file: Path, whole: bytes) -> Path:
    file.write_bytes(whole)
    return file


fuzz = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(
    ending=st.sampled_from([".nrrd", ".nhdr", ".mha", ".mhd"]),
    dtype=st.sampled_from(["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]),
    channels=st.sampled_from([1, 1, 2, 3]),
    packed=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_what_itk_writes(
    tmp_path: Path, ending: str, dtype: str, channels: int, packed: bool, seed: int
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 8, 3)
    stored = rng.integers(0, 100, (*shape[::-1], channels)).astype(dtype)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    spacing, origin = rng.uniform(0.3, 5, 3), rng.uniform(-100, 100, 3)
    image = sitk.GetImageFromArray(stored if channels > 1 else stored[..., 0], isVector=channels > 1)
    image.SetDirection(turn.ravel().tolist())
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(origin.tolist())
    file = tmp_path / f"scan{ending}"
    sitk.WriteImage(image, str(file), useCompression=packed)
    expected = np.eye(4)
    expected[:3] = np.column_stack([turn * spacing, origin])
    found = read_volume(file)
    np.testing.assert_array_equal(found.data, stored.transpose(3, 2, 1, 0))
    np.testing.assert_allclose(found.affine, LPS @ expected, atol=1e-5)
    assert found.data.dtype == (np.float32 if dtype == "f8" else dtype)
    header = read_header(file)
    assert (header.shape, header.channels) == (found.shape, channels)
    assert len(files_of(file)) == (2 if ending in (".nhdr", ".mhd") else 1)
    if channels == 1:
        np.testing.assert_array_equal(read_labels(file).data, found.data[0])


def test_naming_the_files_neither_warns_nor_keeps_others_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is warned of is for all threads: another one may read a scan meanwhile."""
    usual = reading.read_nrrd_header

    def meanwhile(path: Path) -> Header:
        warnings.warn("of another thread", VolumeWarning, stacklevel=1)
        return replace(usual(path), warnings=("it is unclear",))

    monkeypatch.setattr(reading, "read_nrrd_header", meanwhile)
    with pytest.warns(VolumeWarning) as told:
        files_of(written(tmp_path / "a.nrrd", nrrd()))
    assert [str(w.message) for w in told] == ["of another thread"]


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("a.nrrd", nrrd()),
        ("a.nrrd", nrrd(gzip.compress(BYTES), encoding="gzip")),
        ("a.nrrd", nrrd(DATA.astype(">i2").tobytes(order="F"), endian="big")),
        ("a.nrrd", nrrd().replace(b"\n", b"\r\n", 12)),
        ("a.nrrd", nrrd(b"junk" + BYTES, byte_skip="-1")),
        ("a.nrrd", nrrd(b"junk" + BYTES, byte_skip="4")),
        ("a.nrrd", nrrd(space_directions="(0, -0.5, 0) (1, 0, 0)  (0, 0, 2)")),
        ("a.nrrd", nrrd(space="RAS", space_directions="(0,.5,0) (-1,0,0) (0,0,2)", space_origin="(-10,-20,30)")),
        ("a.nrrd", nrrd(space="LAS", space_directions="(0,.5,0) (1,0,0) (0,0,2)", space_origin="(10,-20,30)")),
        ("a.nrrd", nrrd(space="right anterior superior", space_directions="(0,.5,0) (-1,0,0) (0,0,2)",
                        space_origin="(-10,-20,30)")),
        ("a.nrrd", nrrd(space="left-posterior-superior-time", dimension="4", sizes="5 6 7 1", kinds=None,
                        space_directions="(0,-0.5,0,0) (1,0,0,0) (0,0,2,0) (0,0,0,30)", space_origin="(10,20,30,0)")),
        ("a.mha", meta()),
        ("a.mha", meta(BinaryData=None, ObjectType=None, BinaryDataByteOrderMSB=None, CompressedData=None)),
        ("a.mha", b"# a comment\n" + meta().replace(b"NDims = 3", b"NDims : 3")),
        ("a.mha", meta(Position="1 2 3")),
        ("a.mha", meta(Offset="1 2 3", Origin="10 20 30")),
        ("a.mha", meta(gzip.compress(BYTES), CompressedData="True")),
        ("a.mha", meta(zlib.compress(BYTES), CompressedData="True")),
        ("a.mha", meta(DATA.astype(">i2").tobytes(order="F"), BinaryDataByteOrderMSB="True")),
        ("a.mha", meta(NDims="4", DimSize="5 6 7 1", ElementSpacing="0.5 1 2 1", Offset="10 20 30 0",
                       TransformMatrix="0 -1 0 0 1 0 0 0 0 0 1 0 0 0 0 1")),
    ],
)  # fmt: skip
def test_the_same_scan_in_many_ways(tmp_path: Path, name: str, whole: bytes) -> None:
    found = read_volume(written(tmp_path / name, whole))
    np.testing.assert_array_equal(found.data[0], DATA)
    np.testing.assert_allclose(found.affine, PLACE)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_channels_lie_along_any_axis(tmp_path: Path, axis: int) -> None:
    several = np.stack([DATA, DATA + 1], axis)
    vectors = NRRD["space directions"].split()
    vectors.insert(axis, "none")
    whole = nrrd(
        several.tobytes(order="F"),
        dimension="4",
        sizes=" ".join(map(str, several.shape)),
        space_directions=" ".join(vectors),
        kinds=None,
    )
    found = read_volume(written(tmp_path / "a.nrrd", whole))
    np.testing.assert_array_equal(found.data, np.stack([DATA, DATA + 1]))
    np.testing.assert_allclose(found.affine, PLACE)
    with pytest.raises(VolumeError, match="holds 2 volumes"):
        read_labels(tmp_path / "a.nrrd")


def test_times_of_a_metaimage_are_channels(tmp_path: Path) -> None:
    several = np.stack([DATA, DATA + 1], 3)
    four = {"NDims": "4", "DimSize": "5 6 7 2", "ElementSpacing": "0.5 1 2 30", "Offset": "10 20 30 0"}
    turned = "0 -1 0 0 1 0 0 0 0 0 1 0 0 0 0 1"
    found = read_volume(
        written(tmp_path / "a.mha", meta(several.tobytes(order="F"), TransformMatrix=turned, **four))
    )
    np.testing.assert_array_equal(found.data, np.stack([DATA, DATA + 1]))
    np.testing.assert_allclose(found.affine, PLACE)


@pytest.mark.parametrize(
    ("name", "whole", "note", "place"),
    [
        ("a.nrrd", nrrd(space="scanner-xyz"), "does not say left from right", PLACE),
        (
            "a.nrrd",
            nrrd(space=None, space_directions=None, space_origin=None, spacings="0.5 1 2"),
            "no directions",
            LPS @ np.diag([0.5, 1, 2, 1]),
        ),
        (
            "a.nrrd",
            nrrd(
                space=None, space_directions=None, space_origin=None, spacings=".5 1 2", axis_mins="10 20 30"
            ),
            "no directions",
            LPS @ np.array([[0.5, 0, 0, 10.25], [0, 1, 0, 20.5], [0, 0, 2, 31], [0, 0, 0, 1]]),
        ),
        (
            "a.nrrd",
            nrrd(
                space=None,
                space_directions=None,
                space_origin=None,
                spacings="500 1000 2000",
                units='"um" "um" "um"',
            ),
            "converted to mm",
            LPS @ np.diag([0.5, 1, 2, 1]),
        ),
        ("a.mha", meta(ElementToIntensityFunctionSlope="2"), "ElementToIntensityFunctionSlope is", PLACE),
        (
            "a.mha",
            meta(ElementToIntensityFunctionOffset="-1024"),
            "ElementToIntensityFunctionOffset is",
            PLACE,
        ),
        (
            "a.nrrd",
            nrrd(space_units='"cm" "cm" "cm"'),
            "converted to mm",
            np.diag([10.0, 10, 10, 1]) @ PLACE,
        ),
        ("a.nrrd", nrrd(space_units='"ells" "ells" "ells"'), "unknown units", PLACE),
        (
            "a.mha",
            meta(TransformMatrix=None),
            "no directions",
            LPS @ np.array([[0.5, 0, 0, 10], [0, 1, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1]]),
        ),
        (
            "a.mha",
            meta(ElementSpacing=None),
            "no voxel sizes",
            LPS @ np.array([[0, 1, 0, 10], [-1, 0, 0, 20], [0, 0, 1, 30], [0, 0, 0, 1]]),
        ),
    ],
)
def test_what_is_unclear_is_told(
    tmp_path: Path, name: str, whole: bytes, note: str, place: np.ndarray
) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = read_volume(written(tmp_path / name, whole))
    assert any(w.category is VolumeWarning and note in str(w.message) for w in told)
    np.testing.assert_allclose(found.affine, place)
    np.testing.assert_array_equal(found.data[0], DATA)


@pytest.mark.parametrize(
    ("name", "whole", "reason"),
    [
        ("a.nrrd", b"hello", "not an NRRD file"),
        ("a.nrrd", b"", "empty"),
        ("a.nrrd", nrrd(dimension="2", sizes="5 42"), "has 2 axes"),
        ("a.nrrd", nrrd(sizes="5 6"), "3 numbers are needed as sizes"),
        ("a.nrrd", nrrd(sizes="5 six 7"), "sizes are no numbers"),
        ("a.nrrd", nrrd(sizes="5 0 7"), "an axis has no voxels"),
        ("a.nrrd", nrrd(sizes="5 6 70000000"), "truncated"),
        ("a.nrrd", nrrd(gzip.compress(BYTES), sizes="5 6 70000000", encoding="gzip"), "can hold"),
        ("a.nrrd", nrrd(space_directions="(0,-0.5,0) (1,0,0) (nan,0,2)"), "NaN"),
        ("a.nrrd", nrrd(space_directions="(0,-0.5,0) (1,0,0) (1,0,0)"), "not invertible"),
        ("a.nrrd", nrrd(space_directions="(0,-0.5,0) (1,0,0)"), "3 vectors are needed"),
        ("a.nrrd", nrrd(space_directions="(0,-0.5) (1,0) (0,0)"), "3 numbers are needed"),
        ("a.nrrd", nrrd(space_directions="(0,-0.5,0) (1,0,0) none"), "2 of its axes lie in space"),
        ("a.nrrd", nrrd(encoding="ascii"), "encoded as 'ascii'"),
        ("a.nrrd", nrrd(encoding="bz2"), "encoded as 'bz2'"),
        ("a.nrrd", nrrd(type="block"), "of the type 'block'"),
        ("a.nrrd", nrrd(type=None), "lacks the field 'type'"),
        ("a.nrrd", nrrd(endian=None), "lacks the field 'endian'"),
        ("a.nrrd", nrrd(endian="middle"), "order of its bytes"),
        ("a.nrrd", nrrd(line_skip="2"), "to be skipped"),
        ("a.nrrd", nrrd(BYTES + b"more"), "goes on after"),
        ("a.nrrd", nrrd(pairs="nonsense\n"), "'nonsense', which is not a field"),
        ("a.nrrd", nrrd(data_file="none.raw"), "no such file"),
        ("a.nrrd", nrrd(data_file="slice%03d.raw 1 7 1"), "in several files"),
        ("a.nrrd", nrrd(data_file="LIST\na.raw\nb.raw"), "in several files"),
        ("a.nrrd", nrrd(data_file="n" * 300), "no such file"),
        ("a.nrrd", nrrd(gzip.compress(BYTES), sizes=" ".join(["9" * 200] * 3), encoding="gzip"), "voxels"),
        ("a.nrrd", nrrd(pairs="key:=" + "x" * (1 << 20) + "\n"), "does not end within"),
        ("a.nrrd", nrrd(space="lps-time", dimension="4", sizes="5 6 7 1", kinds=None,
                        space_directions="(0,-0.5,0,1) (1,0,0,0) (0,0,2,0) (0,0,0,30)"), "fourth axis"),
        (
            "a.nrrd",
            nrrd(dimension="4", sizes="3 5 6 7", kinds="RGB-color domain domain domain",
                 space_directions="none (1,0,0) (0,1,0) (0,0,1)"),
            "colours",
        ),
        ("a.mha", b"hello", "not a MetaImage"),
        ("a.mha", b"\n\n", "not a MetaImage"),
        ("a.mha", meta(NDims="2", DimSize="5 42"), "has 2 axes"),
        ("a.mha", meta(NDims=None), "lacks the field 'NDims'"),
        ("a.mha", meta(DimSize="5 6 7000000"), "truncated"),
        ("a.mha", meta(ElementSpacing="0.5 1 nan"), "NaN"),
        ("a.mha", meta(ElementSpacing="0.5 1 0"), "not invertible"),
        ("a.mha", meta(TransformMatrix="1 0 0"), "9 numbers are needed"),
        ("a.mha", meta(ElementType="MET_STRING"), "of the type 'MET_STRING'"),
        ("a.mha", meta(BinaryData="False"), "text"),
        ("a.mha", meta(file="LIST"), "in several files"),
        ("a.mha", meta(file="slice%03d.raw 1 7 1"), "in several files"),
        ("a.mha", meta(file="none.raw"), "no such file"),
        ("a.mha", meta(file="list of.raw"), "no such file"),
        ("a.mha", meta(zlib.compress(BYTES) + b"more", CompressedData="True"), "more bytes follow"),
        ("a.mha", meta(BYTES, CompressedData="True"), "damaged"),
    ],
)  # fmt: skip
def test_what_cannot_be_trusted_is_refused(tmp_path: Path, name: str, whole: bytes, reason: str) -> None:
    with pytest.raises(VolumeError, match=reason):
        read_volume(written(tmp_path / name, whole))


def test_voxels_beside_the_header(tmp_path: Path) -> None:
    written(tmp_path / "v.raw", b"head" + BYTES)
    written(tmp_path / "v.raw.gz", gzip.compress(BYTES))
    written(tmp_path / "v%03d.raw", BYTES)
    for name, whole in (
        ("c.mhd", meta(b"", file="v%03d.raw")),
        ("a.nhdr", nrrd(b"", data_file="v.raw", byte_skip="4")),
        ("b.nhdr", nrrd(b"", data_file="v.raw.gz", encoding="gz")[:-1]),  # not even an empty line at its end
        ("a.mhd", meta(b"", file="v.raw", HeaderSize="4")),
        ("b.mhd", meta(b"", file="v.raw", HeaderSize="-1")),
    ):
        np.testing.assert_array_equal(read_volume(written(tmp_path / name, whole)).data[0], DATA)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("a.nrrd", nrrd()),
        ("a.nrrd", nrrd(gzip.compress(BYTES, mtime=0), encoding="gzip")),
        ("a.mha", meta()),
        ("a.mha", meta(zlib.compress(BYTES), CompressedData="True")),
    ],
)
def test_damage(tmp_path: Path, name: str, whole: bytes) -> None:
    for length in range(0, len(whole), 7):
        with pytest.raises(VolumeError):
            read_volume(written(tmp_path / name, whole[:length]))
    voxels = whole.rindex(b"\n\n") + 2 if name.endswith("nrrd") else whole.index(b"LOCAL\n") + 6
    packed = len(whole) - voxels != len(BYTES)
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        with warnings.catch_warnings(), suppress(VolumeError, ResourceError):
            warnings.simplefilter("ignore")
            found = read_volume(written(tmp_path / name, bytes(damaged)))
            assert np.isfinite(found.affine).all()
            assert (
                not packed or at < voxels + 10 or np.array_equal(found.data[0], DATA)
            )  # 10: gzip's own header


@fuzz
@given(
    form=st.sampled_from([nrrd, meta]),
    start=st.integers(0, 400),
    junk=st.one_of(st.binary(min_size=1, max_size=60), st.text("0123456789 .-,()\n:=nae", min_size=1).map(str.encode)),
)  # fmt: skip
def test_junk_written_over_a_header(
    tmp_path: Path, form: Callable[[], bytes], start: int, junk: bytes
) -> None:
    whole = form()
    file = tmp_path / ("a.nrrd" if form is nrrd else "a.mha")
    file.write_bytes(whole[:start] + junk + whole[start + len(junk) :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (read_volume, read_labels):
            with suppress(VolumeError, ResourceError):
                read(file)


def test_segments_of_slicer_have_names(tmp_path: Path) -> None:
    labels = (DATA % 3).astype("u1")
    pairs = (
        "Segment0_LabelValue:=1\nSegment0_Name:=left atrium\nSegment0_Layer:=0\n"
        "Segment1_LabelValue:=2\nSegment1_Name:=Segment_2\nSegment1_Layer:=0\n"
        "Segmentation_MasterRepresentation:=Binary labelmap\n"
    )
    whole = nrrd(labels.tobytes(order="F"), pairs, type="unsigned char", endian=None)
    found = read_labels(written(tmp_path / "case.seg.nrrd", whole))
    np.testing.assert_array_equal(found.data, labels)
    assert dict(found.names) == {1: "left atrium"}
    layers = nrrd(
        bytes(2 * labels.size),
        type="uint8",
        endian=None,
        dimension="4",
        sizes="2 5 6 7",
        kinds="list domain domain domain",
        space_directions="none (1,0,0) (0,1,0) (0,0,1)",
    )
    with pytest.raises(VolumeError, match="segments overlap"):
        read_labels(written(tmp_path / "layers.seg.nrrd", layers))


def test_voxels_may_look_packed(tmp_path: Path) -> None:
    voxels = b"\x1f\x8b" + BYTES[2:]
    for name in ("v.raw", "v.gz"):
        written(tmp_path / name, voxels)
        found = read_volume(written(tmp_path / "a.nhdr", nrrd(b"", data_file=name)))
        np.testing.assert_array_equal(found.data[0].ravel(order="F"), np.frombuffer(voxels, "<i2"))

"""Odd headers and formats from practice: each is read rightly or refused with a reason."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ossnet.errors import VolumeError
from ossnet.files.header import VolumeWarning
from ossnet.files.reading import read_labels, read_volume
from ossnet.volume import LabelMap, Volume, closest_canonical, same_place

SHARED = Path(__file__).parents[3] / "shared" / "data"
ODD = SHARED / "odd"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not ODD.exists(), reason="needs the reference data beside the checkout"),
    pytest.mark.filterwarnings("ignore::ossnet.files.header.VolumeWarning"),
]

REFUSED = {
    "derived_nan_inf.nii.gz": "2 of 21,216 voxels are NaN or infinite",
    "resampled_anat_moved.nii": "153 of 1,071 voxels are NaN or infinite",
    "row_major.dconn.nii": "CIFTI",
    "test.mgz": "FreeSurfer",
    "tiny.mnc": "MINC",
    "small.mnc": "MINC",
    "minc2_4d.mnc": "MINC",
}
IMAGES = sorted(p.name for p in ODD.glob("*") if p.suffix not in (".json", ".img"))


def reference() -> tuple[Volume, LabelMap]:
    """The hippocampus that the derived files were made from, cropped as they were."""
    folder = SHARED / "Dataset004_Hippocampus"
    volume = read_volume(folder / "imagesTr" / "hippocampus_001_0000.nii.gz")
    labels = read_labels(folder / "labelsTr" / "hippocampus_001.nii.gz")
    place = np.eye(4)
    place[:3, 3] = [4, 8, 6]
    box = (..., slice(4, 30), slice(8, 42), slice(6, 30))
    return (
        Volume(volume.data[box], volume.affine @ place),
        LabelMap(labels.data[box], labels.affine @ place),
    )


@pytest.mark.parametrize("name", IMAGES)
def test_read_as_nibabel_reads_it_or_refused(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(VolumeError, match=REFUSED[name]):
            read_volume(ODD / name)
        return
    volume = read_volume(ODD / name)
    image = nib.load(ODD / name)
    expected = image.get_fdata().reshape(*volume.shape, -1)
    np.testing.assert_allclose(np.moveaxis(volume.data, 0, -1), expected, rtol=1e-6)
    if name != "derived_no_affine_codes.nii.gz":
        np.testing.assert_allclose(volume.affine, image.affine, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["bigendian", "nifti2", "pair.hdr", "qform_only", "sform_only", "4d_singleton", "PSL_axes"],
)
def test_the_same_scan_in_other_clothes(name: str) -> None:
    file = name if "." in name else f"{name}.nii.gz"
    volume = read_volume(ODD / f"derived_{file}")
    expected, _ = reference()
    turned, wanted = (v.reoriented(closest_canonical(v.affine)) for v in (volume, expected))
    np.testing.assert_allclose(turned.data, wanted.data, atol=1e-4)
    assert same_place(turned, wanted) is None


def test_labels_in_other_types() -> None:
    _, expected = reference()
    for name in ("label_float", "label_int64"):
        labels = read_labels(ODD / f"derived_{name}.nii.gz")
        assert labels.data.dtype == np.uint8
        assert np.array_equal(labels.data, expected.data)
        assert same_place(labels, expected) is None


def test_no_codes_is_warned_of() -> None:
    with pytest.warns(VolumeWarning, match="no affine is given"):
        volume = read_volume(ODD / "derived_no_affine_codes.nii.gz")
    assert volume.spacing == (1.0, 1.0, 1.0)


def test_geometry_as_declared() -> None:
    np.testing.assert_allclose(
        read_volume(ODD / "derived_anisotropic.nii.gz").spacing, (0.7, 1.3, 6.0), rtol=1e-6
    )
    assert read_volume(ODD / "derived_one_slice.nii.gz").shape == (26, 34, 1)
    tilted = read_volume(ODD / "derived_oblique20.nii.gz").affine[:3, :3]
    assert np.degrees(np.arccos(tilted[1, 1])) == pytest.approx(20, abs=1e-3)
    shear = read_volume(ODD / "derived_sheared_sform.nii.gz").affine[:3, :3]
    assert abs(shear.T @ shear - np.diag(np.diag(shear.T @ shear))).max() > 0.05


@pytest.mark.parametrize("name", [n for n in IMAGES if n not in REFUSED])
def test_a_label_map_written_for_it_lies_on_it_for_every_reader(name: str, tmp_path: Path) -> None:
    volume = read_volume(ODD / name)
    labels = LabelMap(np.ones(volume.shape, np.uint8), volume.affine, header=volume.header)
    labels.save(tmp_path / "a.nii.gz")
    assert same_place(read_labels(tmp_path / "a.nii.gz"), volume) is None
    np.testing.assert_allclose(nib.load(tmp_path / "a.nii.gz").affine, nib.load(ODD / name).affine, atol=1e-3)


def test_nan_is_replaced_on_request() -> None:
    with pytest.warns(VolumeWarning, match="replaced"):
        volume = read_volume(ODD / "resampled_anat_moved.nii", nonfinite="replace")
    assert np.isfinite(volume.data).all()

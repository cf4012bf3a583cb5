"""Models that are asked mirrored as well, as they were trained."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests import tiny
from tests.cli.refusals import succeeded

from ossnet.errors import ModelError, ResourceError
from ossnet.field.model import Model
from ossnet.files.reading import read_labels
from ossnet.volume import Volume

SCAN = tiny.scan((16, 12, 10))


def flipped(volume: Volume, axes: tuple[int, ...]) -> Volume:
    return replace(volume, data=np.flip(volume.data, [axis + 1 for axis in axes]).copy())


@pytest.mark.parametrize("family", ["multiscale", "unet3d"])
@pytest.mark.parametrize("classes", [1, 3])
def test_probabilities_are_the_mean_over_mirror_images(family: str, classes: int) -> None:
    if family == "unet3d":
        pytest.importorskip("monai")
    one = tiny.model(family, classes)
    both = replace(one, mirror=(0, 2))

    def maps(model: Model, volume: Volume) -> np.ndarray:
        return model.field(volume, device="cpu", precision="fp32").probability_map().data

    images = [(), (0,), (2,), (0, 2)]
    each = [np.flip(maps(one, flipped(SCAN, axes)), [axis + 1 for axis in axes]) for axes in images]
    assert np.abs(each[0] - each[1]).max() > 0.01
    np.testing.assert_allclose(maps(both, SCAN), np.mean(each, axis=0), atol=2e-5)


def test_a_mirrored_scan_gets_the_mirrored_answer() -> None:
    model = replace(tiny.model("multiscale", 3), mirror=(1,))
    found = model.field(SCAN, device="cpu").segment(strategy="dense").data
    other = model.field(flipped(SCAN, (1,)), device="cpu").segment(strategy="dense").data
    assert (np.flip(other, 1) == found).mean() > 0.999


def test_others_are_mirrored_as_they_were_trained() -> None:
    one = replace(tiny.model("multiscale"), mirror=(0,))
    two = replace(tiny.model("multiscale"), mirror=())
    assert len(one.answering) == 2
    assert len(replace(one, others=(two,)).answering) == 3
    assert len(replace(two, others=(one, two)).answering) == 4
    assert all(not m.mirror and not m.others for m in replace(one, others=(one,)).answering)


def test_it_is_kept_with_the_model_and_can_be_left(tmp_path: Path) -> None:
    model = replace(tiny.model("multiscale"), mirror=(0,))
    model.save(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "model.json").read_text())["mirror"] == [0]
    assert "mean of 2 answers, also mirrored along axis 0" in (tmp_path / "m" / "MODEL_CARD.md").read_text()
    found, plain = Model.load(tmp_path / "m"), Model.load(tmp_path / "m", mirror=False)
    assert (found.mirror, plain.mirror) == ((0,), ())
    assert "mirror" not in found.metadata
    assert found.fingerprint() == model.fingerprint() != plain.fingerprint()
    several = Model.load(tmp_path / "m", tmp_path / "m", mirror=False)
    assert len(several.answering) == 2


def test_a_grant_is_shared() -> None:
    model = replace(tiny.model("multiscale"), mirror=(0,))
    with pytest.raises(ResourceError, match=r"2 answers, mirrored and not, share the memory that is granted"):
        model.field(SCAN, device="cpu", memory="80MB").segment()
    expected = model.forecast(SCAN).memory_bytes
    model.field(SCAN, device="cpu", memory=int(1.15 * expected)).segment()


def test_the_papers_variants_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot be asked mirrored"):
        replace(tiny.model("C"), mirror=(0,))


def test_from_the_command_line(tmp_path: Path) -> None:
    replace(tiny.model("multiscale"), mirror=(0,)).save(tmp_path / "m")
    SCAN.save(tmp_path / "scan.nii.gz")
    asked = ["segment", str(tmp_path / "scan.nii.gz"), "--model", str(tmp_path / "m")]
    succeeded(*asked, "--out", str(tmp_path / "both.nii.gz"))
    succeeded(*asked, "--no-mirror", "--out", str(tmp_path / "one.nii.gz"))
    both, one = (read_labels(tmp_path / f"{name}.nii.gz").data for name in ("both", "one"))
    assert 0 < (both != one).mean() < 0.5
    mesh = ["mesh", *asked[1:], "--no-mirror", "--out", str(tmp_path / "part.stl")]
    assert "triangles" in succeeded(*mesh)

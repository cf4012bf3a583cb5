"""Several models that answer as one, such as the folds of a cross-validation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.cli.refusals import refused, succeeded

import ossnet
from ossnet.data.preparation import Preparation
from ossnet.errors import ModelError, ResourceError
from ossnet.field.engine.blockwise.answer import BlockwiseAnswer
from ossnet.field.model import Model

SCAN = tiny.scan((30, 22, 14), affine=np.diag([0.8, 1.0, 1.5, 1.0]))


def others(classes: int, *preparations: dict[str, Any]) -> list[Model]:
    """Networks with weights of their own, on grids of their own."""
    made = []
    for number, preparation in enumerate(preparations):
        model = tiny.model("multiscale", classes, **preparation)
        for parameter in model.network.parameters():
            parameter.data.mul_(1 + 0.1 * number)
        made.append(model)
    return made


SPACED = [
    {"fit": "spacing", "spacing": (0.8, 1.0, 1.5)},
    {"fit": "spacing", "spacing": (1.0, 1.0, 1.0)},
    {"normalise": "none"},
]


@pytest.mark.parametrize("classes", [1, 3])
def test_probabilities_are_the_mean(classes: int) -> None:
    models = others(classes, *SPACED)
    together = replace(models[0], others=tuple(models[1:]))
    field = together.field(SCAN, device="cpu", precision="fp32")
    points = np.random.default_rng(0).uniform(0, 1, (200, 3)) * (np.array(SCAN.shape) - 1)
    alone = [m.field(SCAN, device="cpu", precision="fp32").probability(points) for m in models]
    assert not np.allclose(alone[0], alone[1], atol=0.01)
    np.testing.assert_allclose(field.probability(points), np.mean(alone, axis=0), atol=1e-5)
    maps = field.probability_map(region=((3, 4, 5), (9, 9, 9)))
    assert maps.data.shape == (classes, 6, 5, 4)


@pytest.mark.parametrize("classes", [1, 3])
def test_models_count_alike_however_often_each_is_asked(classes: int) -> None:
    one, two, three = others(classes, *SPACED)
    mirrored = replace(one, mirror=(0, 2))
    points = np.random.default_rng(0).uniform(0, 1, (200, 3)) * (np.array(SCAN.shape) - 1)

    def asked(model: Model) -> np.ndarray:
        return model.field(SCAN, device="cpu", precision="fp32").probability(points)

    alone = [asked(model) for model in (mirrored, two, three)]
    for several in (replace(mirrored, others=(two, three)), replace(two, others=(three, mirrored))):
        np.testing.assert_allclose(asked(several), np.mean(alone, axis=0), atol=1e-5)


@pytest.mark.parametrize("classes", [1, 3])
def test_label_maps_follow_and_regions_are_the_whole(classes: int) -> None:
    models = others(classes, *SPACED)
    together = replace(models[0], others=tuple(models[1:]))

    def field() -> ossnet.Field:
        return together.field(SCAN, device="cpu", precision="fp32")

    maps = field().probability_map().data
    expected = maps[0] > 0.5 if classes == 1 else maps.argmax(axis=0)
    np.testing.assert_array_equal(field().segment(strategy="dense").data, expected)
    # From a lattice of every second voxel on few of the islands of this noise are overlooked.
    whole = field().segment(stride=2, start="lattice")
    assert (whole.data != expected).mean() < 0.05
    part = field().segment(region=((4, 2, 1), (20, 18, 12)), stride=2, start="lattice")
    np.testing.assert_array_equal(part.data, whole.data[4:20, 2:18, 1:12])
    assert field().mesh(labels=whole).is_watertight


def test_families_may_differ() -> None:
    pytest.importorskip("monai")
    models = [tiny.model(family) for family in tiny.FAMILIES]
    together = replace(models[0], others=tuple(models[1:]))
    scan = tiny.scan()
    found = together.field(scan, device="cpu", precision="fp32").probability_map()
    alone = [m.field(scan, device="cpu", precision="fp32").probability_map().data for m in models]
    np.testing.assert_allclose(found.data, np.mean(alone, axis=0), atol=1e-4)
    expected = together.forecast(scan).memory_bytes
    together.field(scan, device="cpu", memory=int(1.15 * expected)).segment()


def test_a_grant_is_shared() -> None:
    models = others(1, *SPACED)
    together = replace(models[0], others=tuple(models[1:]))
    free = together.field(SCAN, device="cpu", precision="fp32").segment()
    bound = together.field(SCAN, device="cpu", precision="fp32", memory="400MB").segment()
    np.testing.assert_array_equal(bound.data, free.data)
    alone, expected = models[0].forecast(SCAN).memory_bytes, together.forecast(SCAN).memory_bytes
    assert alone < expected < 2 * alone  # libraries and label map count once
    tight = int(1.15 * expected)
    assert together.forecast(SCAN, memory=tight).memory_bytes <= tight
    np.testing.assert_array_equal(
        together.field(SCAN, device="cpu", precision="fp32", memory=tight).segment().data, free.data
    )
    with pytest.raises(ResourceError, match=r"3 models share the memory that is granted\. Of each share: "):
        together.field(SCAN, device="cpu", memory="100MB").segment()


def test_maps_are_kept_in_what_the_machine_has_free_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    made = BlockwiseAnswer.__init__

    def noted(self: BlockwiseAnswer, *args: Any, most_kept: int, **options: Any) -> None:
        kept.append(most_kept)
        made(self, *args, most_kept=most_kept, **options)

    monkeypatch.setattr(BlockwiseAnswer, "__init__", noted)
    monkeypatch.setattr("ossnet.field.engine.prepare.free_bytes", lambda _: 6_000_000_000)
    models = others(1, *SPACED)
    kept.clear()
    replace(models[0], others=tuple(models[1:])).field(SCAN, device="cpu")
    assert kept == [1_000_000_000] * 3


def test_an_image_that_is_shared_is_counted_once() -> None:
    models = others(1, *[SPACED[1]] * 3)
    together = replace(models[0], others=tuple(models[1:]))
    bound = together.field(SCAN, device="cpu", memory="600MB")._bound
    budgets = {answer.budget for answer in bound.answers if isinstance(answer, BlockwiseAnswer)}
    image = 4 * 24 * 22 * 21
    assert (bound.held, budgets) == (image, {(600_000_000 - image) // 3})
    # U-Nets need it only until their map is made.
    assert tiny.model("unet3d", 1, **SPACED[1]).field(SCAN, device="cpu", memory="1GB")._bound.held == 0


def test_models_of_other_structures_are_refused(tmp_path: Path) -> None:
    one = tiny.model("multiscale")
    with pytest.raises(ModelError, match="label names"):
        replace(one, others=(replace(one, label_names={1: "else"}),))
    with pytest.raises(ModelError, match="channels are 2"):
        replace(one, others=(tiny.model("multiscale", channels=2),))
    with pytest.raises(ModelError, match="one model reorients scans and the other does not"):
        replace(one, others=(replace(one, preparation=Preparation(orientation="file")),))
    with pytest.raises(ModelError, match="Save each"):
        replace(one, others=(one,)).save(tmp_path / "both")


def test_from_the_command_line(tmp_path: Path) -> None:
    for number, model in enumerate(others(1, *SPACED[:2])):
        model.save(tmp_path / f"f{number}")
    SCAN.save(tmp_path / "scan.nii.gz")
    both = ossnet.load(tmp_path / "f0", tmp_path / "f1")
    assert both.fingerprint() != ossnet.load(tmp_path / "f1", tmp_path / "f0").fingerprint()
    given = [part for n in (0, 1) for part in ("--model", tmp_path / f"f{n}")]
    out = tmp_path / "out.nii.gz"
    succeeded("segment", tmp_path / "scan.nii.gz", *given, "--out", out, "--precision", "fp32")
    expected = both.field(ossnet.read(tmp_path / "scan.nii.gz"), precision="fp32").segment()
    np.testing.assert_array_equal(ossnet.read_labels(out).data, expected.data)
    again = ["segment", tmp_path / "scan.nii.gz", "--model", tmp_path / "f0", "--out", out]
    assert "made by another model" in refused(tmp_path, *again)

"""The demo: what is held out, the data set, the baseline, the page, and (slow) the whole of it."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ossnet.data.layouts import open_dataset
from ossnet.data.splits import split
from ossnet.errors import SettingsError
from ossnet.evaluation.metrics import compare
from ossnet.experiments.demo import (
    NAMES,
    PARTS,
    DemoResult,
    Part,
    Template,
    _clear,
    cut_parts,
    fit_thresholds,
    load_template,
    run_demo,
    write_dataset,
)
from ossnet.experiments.demo_page import demo_page
from ossnet.experiments.hippocampi import Hippocampi, segment_hippocampi
from ossnet.reports.page import page_html
from ossnet.reports.render import surface_of
from ossnet.volume import LabelMap, Volume, spacing_of


@pytest.fixture(scope="module")
def template() -> Template:
    pytest.importorskip("nilearn")
    return load_template()


@pytest.fixture(scope="module")
def parts(template: Template) -> dict[str, Part]:
    return cut_parts(template)


def test_parts_do_not_overlap_and_lie_where_the_template_does(parts: dict[str, Part]) -> None:
    intervals = sorted(PARTS.values())
    assert all(end < start for (_, end), (start, _) in pairwise(intervals))
    ends = [parts[n].affine[1, 3] + parts[n].image.shape[1] for n in ("back", "middle")]
    assert ends[0] < parts["middle"].affine[1, 3]
    assert ends[1] < parts["front"].affine[1, 3]
    for part in parts.values():
        assert spacing_of(part.affine) == (1, 1, 1)
        assert set(np.unique(part.labels)) == {0, 1, 2}
        # White matter is brighter than grey matter in a T1-weighted scan.
        assert part.image[part.labels == 2].mean() > part.image[part.labels == 1].mean() + 30


def test_the_template_is_symmetric_so_halves_left_and_right_would_be_no_test(parts: dict[str, Part]) -> None:
    front = parts["front"]
    centre = round(-front.affine[0, 3])  # voxel of x = 0
    reach = min(centre, front.image.shape[0] - 1 - centre)
    left, right = front.image[centre - reach : centre + 1][::-1], front.image[centre : centre + reach + 1]
    assert (left == right).all()


def test_the_data_set_is_complete_and_splits_as_the_page_says(parts: dict[str, Part], tmp_path: Path) -> None:
    write_dataset(parts, tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    dataset.require_complete()
    assert dataset.label_names == {0: "background", **NAMES}
    fold = split(dataset, 0)
    assert (tuple(fold.train), tuple(fold.validation)) == (("back",), ("middle",))
    volume, labels = dataset.read(dataset["back"])
    assert (volume.data[0] == parts["back"].image).all()
    assert (labels.data == parts["back"].labels).all()


def test_thresholds_are_the_best_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (12, 12, 12)).astype(np.uint8)
    image = (labels * 6 + rng.integers(0, 12, labels.shape)).astype(np.uint8)

    def mean_dice(low: int, high: int) -> float:
        found = np.digitize(image, [low, high])
        return sum(
            2 * ((found == k) & (labels == k)).sum() / ((found == k).sum() + (labels == k).sum())
            for k in (1, 2)
        )

    best = max(mean_dice(a, b) for a in range(26) for b in range(a, 26))
    assert mean_dice(*fit_thresholds(image, labels)) == pytest.approx(best)


@pytest.fixture(scope="module")
def hippocampi(template: Template) -> Hippocampi:
    return segment_hippocampi(template.brain)


def test_both_hippocampi_of_the_template_are_found_where_they_are(hippocampi: Hippocampi) -> None:
    for volumes in hippocampi.volumes_ml.values():
        # Whole hippocampi of adults have 2.5 to 5 ml; the template's are large, as its head is.
        assert 2.5 < sum(volumes.values()) < 6
        assert min(volumes.values()) > 1
    # The template is its own mirror image; the network is not, but nearly.
    left, right = (sum(hippocampi.volumes_ml[side].values()) for side in ("left", "right"))
    assert abs(left - right) < 0.15 * left
    labels = hippocampi.labels
    centres = {k: labels.to_world(np.argwhere(labels.data == k).astype(float)).mean(axis=0) for k in (1, 2)}
    assert centres[1][1] > centres[2][1] + 5  # anterior lies in front of posterior
    assert abs(centres[1][0]) < 5  # left and right balance
    assert hippocampi.evaluated < 0.25 * hippocampi.asked


def stand_in(hippocampi: Hippocampi) -> DemoResult:
    """A result without a training."""
    reference = np.zeros((20, 12, 16), np.uint8)
    reference[3:17, 2:10, 3:13] = 1
    reference[6:14, 4:8, 5:11] = 2
    prediction = np.roll(reference, 1, axis=0)
    affine = np.eye(4)
    scores = compare(prediction, reference, affine, NAMES)
    return DemoResult(
        volume=Volume((reference * 90)[None], affine),
        prediction=LabelMap(prediction, affine, names=NAMES),
        reference=LabelMap(reference, affine, names=NAMES),
        scores=scores,
        thresholds=(80, 160),
        threshold_scores=scores,
        losses=[(float(i), 1 / (1 + i)) for i in range(40)],
        validations=[
            {"step": i, "seconds": float(i), "dice grey matter": i / 50, "dice white matter": i / 60}
            for i in range(0, 40, 10)
        ],
        surfaces=tuple(
            s for k in NAMES if (s := surface_of(LabelMap(prediction, affine), k, NAMES[k], "#ff0000"))
        ),
        hippocampi=hippocampi,
        evaluated=1234,
        checked=500,
        differing=3,
        seconds={"training": 61.0, "segmenting": 2.5, "dense": 4.0, "whole": 90.0},
        parameters=1_000_000,
        model_bytes=4_000_000,
        metadata={"variant": "multiscale", "versions": {"torch": "2.13"}},
    )


def test_the_page_says_what_was_found_and_what_it_does_not_show(hippocampi: Hippocampi) -> None:
    result = stand_in(hippocampi)
    text = page_html(demo_page(result))
    dice = result.scores[1].dice
    assert dice is not None
    voxels = result.prediction.data.size
    for expected in (
        f"{dice:.3f}",
        "Held out",
        "does not show",
        "1,234",
        f"{100 * 1234 / voxels:.1f} %",
        f"about {4.0 * voxels / 500:.0f} s",
        "two thresholds",
        "40 steps",
        "torch 2.13",
        "Fonov",
        "there is no score here",
    ):
        assert expected in text, expected


def test_an_earlier_demo_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    _clear(tmp_path / "demo")
    (tmp_path / "demo" / "run").mkdir()
    (tmp_path / "demo" / "run" / "state").write_text("old")
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    _clear(tmp_path / "demo")
    assert not (tmp_path / "demo" / "run").exists()
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(SettingsError, match="holds other files"):
        _clear(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").exists()


@pytest.mark.slow
def test_the_whole_demo_learns_the_tissue_of_the_part_it_has_not_seen(tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    result = run_demo(tmp_path / "demo", minutes=1.0)
    assert all((scores.dice or 0) > 0.85 for scores in result.scores.values())
    assert result.differing <= 1e-4 * result.checked
    assert result.evaluated < 0.2 * result.prediction.data.size
    assert "Held out" in page_html(demo_page(result))

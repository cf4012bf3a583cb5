"""The released dense inference: sets of sites, both readings of the start state, the recorded counts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from ossnet.errors import SettingsError
from ossnet.field.octree.refinement import refine
from ossnet.field.octree.released_stages import ReleasedStages, initial_mask

FIXTURES = Path(__file__).parents[1] / "fixtures" / "released_weights"


def run(stages: ReleasedStages, truth: np.ndarray) -> list[np.ndarray]:
    """Questions of every stage, answered from a label map."""
    questions = []
    while (voxels := stages.query()) is not None:
        questions.append(voxels)
        stages.update(truth[tuple(voxels.T)].astype(np.int64))
    return questions


def blobs(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return (noise > noise.std()).astype(np.uint8)


def by_definition(truth: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """SPEC §5 written out: max pooling of the whole grid, every unmarked site in reach asked again."""
    grid = np.zeros(truth.shape, dtype=np.uint8)
    counts = []
    for stride in (4, 2, 1):
        lattice = np.zeros(truth.shape, dtype=bool)
        lattice[::stride, ::stride, ::stride] = True
        if stride == 4:
            wanted = first
        else:
            pooled = ndimage.maximum_filter(grid, size=3**stride, mode="constant")
            wanted = (pooled != grid) & lattice
        counts.append(int(wanted.sum()))
        grid[wanted & (truth > 0)] = 1
    return grid, counts


@pytest.mark.parametrize("shape", [(40, 32, 24), (33, 30, 21), (5, 4, 3)])
def test_original_follows_the_definition(shape: tuple[int, int, int]) -> None:
    truth = blobs(shape)
    first = np.zeros(shape, dtype=bool)
    first[::4, ::4, ::4] = True
    grid, counts = by_definition(truth, first)
    released = ReleasedStages(shape, "original", reevaluate=True)
    run(released, truth)
    assert (released.labels() == grid).all()
    assert released.evaluated_per_stage == counts
    frugal = ReleasedStages(shape, "original")
    asked = np.concatenate(run(frugal, truth))
    assert (frugal.labels() == grid).all()
    assert frugal.evaluated <= released.evaluated
    assert len(np.unique(asked, axis=0)) == len(asked) == frugal.evaluated


def test_both_readings_of_the_start_state() -> None:
    shape = (48, 40, 32)
    truth = blobs(shape, 3)
    logits = np.random.default_rng(2).normal(size=(3, 5, 2)).astype(np.float32)
    mask = initial_mask(logits, shape)
    assert mask.shape == (12, 10, 8)
    released, paper = ReleasedStages(shape, "released", logits), ReleasedStages(shape, "paper", logits)
    asked_released, asked_paper = run(released, truth)[0] // 4, run(paper, truth)[0] // 4
    assert (mask[tuple(asked_released.T)] == 1).all()
    assert (mask[tuple(asked_paper.T)] == 0).all()
    assert len(asked_released) + len(asked_paper) == mask.size
    # The paper's reading accepts the marked sites, right or wrong.
    assert (paper.labels()[::4, ::4, ::4] >= mask).all()
    assert ((truth[::4, ::4, ::4] == 0) & (mask == 1)).any()


def test_mask_is_made_for_sizes_that_four_does_not_divide() -> None:
    assert initial_mask(np.zeros((2, 2, 2), dtype=np.float32), (9, 10, 11)).shape == (3, 3, 3)


def test_without_a_segmentation_the_original_is_run_and_empty_stages_are_skipped() -> None:
    nothing = np.zeros((16, 16, 16), dtype=np.uint8)
    stages = ReleasedStages((16, 16, 16), "released")
    assert stages.start_state == "original"
    assert len(run(stages, nothing)) == 1
    assert stages.evaluated_per_stage == [64, 0, 0]
    empty = ReleasedStages((16, 16, 16), "released", np.full((2, 2, 2), -3, dtype=np.float32))
    assert empty.query() is None
    assert empty.evaluated == 0


def test_refine_offers_the_start_states() -> None:
    shape = (32, 32, 32)
    truth = blobs(shape)

    def answer(voxels: np.ndarray) -> np.ndarray:
        return truth[tuple(voxels.T)].astype(np.float32) - 0.5

    logits = np.ones((2, 2, 2), dtype=np.float32)
    original = refine(answer, shape, start="original")
    assert refine(answer, shape, start="released", segmentation=logits).evaluated == original.evaluated
    assert original.rounds == 3


@pytest.mark.parametrize("bad", [np.zeros(3), np.full(64, 2)])
def test_answers_that_do_not_fit_are_refused(bad: np.ndarray) -> None:
    stages = ReleasedStages((16, 16, 16))
    with pytest.raises(SettingsError):
        stages.update(np.zeros(64))
    stages.query()
    with pytest.raises(SettingsError):
        stages.update(bad)


@pytest.mark.parametrize("name", ["oss_net_c", "oss_net_d"])
@pytest.mark.parametrize(
    ("method", "start"), [("inference", "original"), ("inference_optimized", "released")]
)
def test_recorded_stages_of_the_released_code(name: str, method: str, start: Any) -> None:
    recorded = np.load(FIXTURES / f"{name}_dense.npz")
    probability = np.load(FIXTURES / f"{name}.npz")["low_res_segmentation"][0, 0].astype(np.float64)
    logits = np.log(probability / (1 - probability)).astype(np.float32)
    final = recorded[f"{method}_grid_final"]
    assert (initial_mask(logits, final.shape) == recorded["initial_mask"]).all()
    # Every occupied voxel was evaluated and none was reset: the final grid answers as the network did.
    stages = ReleasedStages(final.shape, start, logits, reevaluate=True)
    for stage in ("stage4", "stage2", "final"):
        voxels = stages.query()
        assert voxels is not None
        stages.update(final[tuple(voxels.T)].astype(np.int64))
        assert (stages.labels() == recorded[f"{method}_grid_{stage}"]).all()
    assert stages.query() is None
    assert stages.evaluated_per_stage == recorded[f"{method}_evaluated"].tolist()

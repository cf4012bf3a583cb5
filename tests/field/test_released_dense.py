"""The released dense inference, network and all, against the reference grids (SPEC §5)."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from scipy.ndimage import label

import ossnet
from ossnet.field.field import Field
from ossnet.field.model import Model
from ossnet.files.reading import read_labels
from ossnet.volume import Volume

FIXTURES = Path(__file__).parents[1] / "fixtures" / "released_weights"

COUNTS = {
    ("oss_net_c", "original"): (768, 584, 1386),
    ("oss_net_c", "released"): (576, 584, 1386),
    ("oss_net_d", "original"): (2048, 1926, 7081),
    ("oss_net_d", "released"): (328, 1016, 4580),
}


def reference(
    name: str, large_pool: Literal["avg", "released"] = "avg"
) -> tuple[Model, Volume, dict[str, np.ndarray]]:
    case = dict(np.load(FIXTURES / f"{name}_dense.npz"))
    grid = tuple(int(n) for n in np.load(FIXTURES / f"{name}.npz")["output_shape"])
    model = ossnet.import_released(FIXTURES / f"{name}.pt", grid, large_pool)
    data = (
        case["padded_volume"]
        if "padded_volume" in case
        else np.load(FIXTURES / "data_brats.npz")["padded_volume"]
    )
    return model, Volume(data.reshape(-1, *case["label"].shape), np.eye(4)), case


@pytest.mark.parametrize(("name", "strategy"), list(COUNTS))
@pytest.mark.parametrize("reevaluate", [True, False])
def test_grids_and_counts_match_exactly(name: str, strategy: str, reevaluate: bool) -> None:
    model, volume, case = reference(name, "released")
    field = Field(model, volume, preprocessed=True, precision="fp32", device="cpu")
    found = field.segment(strategy=strategy, reevaluate=reevaluate)
    key = f"{'inference' if strategy == 'original' else 'inference_optimized'}_grid_final"
    assert (found.data == case[key]).all()
    if reevaluate:
        assert found.stages == COUNTS[name, strategy]
        assert found.stages == tuple(case[key.replace("grid_final", "evaluated")].tolist())
    else:
        assert sum(found.stages) <= sum(COUNTS[name, strategy])


def test_average_pooling_gives_the_other_counts() -> None:
    model, volume, _ = reference("oss_net_d")
    found = Field(model, volume, preprocessed=True, precision="fp32", device="cpu").segment(
        strategy="released", reevaluate=True
    )
    assert found.stages == (328, 970, 4185)


@pytest.mark.parametrize("name", ["oss_net_c", "oss_net_d"])
def test_octree_equals_asking_everywhere(name: str) -> None:
    model, volume, _ = reference(name)
    field = Field(model, volume, preprocessed=True, precision="fp32", device="cpu")
    everywhere, near = field.segment(strategy="dense"), field.segment(strategy="octree")
    assert near.evaluated < everywhere.evaluated
    wrong = near.data != everywhere.data
    # The synthetic networks draw specks between the lattice's sites: what differs is missing whole.
    for value in (0, 1):
        components, count = label(everywhere.data == value)
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        differ = np.bincount(components.ravel(), weights=wrong.ravel(), minlength=count + 1)
        assert ((differ == 0) | (differ == sizes))[1:].all()


def test_a_model_folder_gives_the_same_answer(tmp_path: Path) -> None:
    model, volume, _ = reference("oss_net_c")
    before = model.field(volume, preprocessed=True, device="cpu").segment()
    model.save(tmp_path / "m")
    after = ossnet.load(tmp_path / "m").field(volume, preprocessed=True, device="cpu").segment()
    assert (before.data == after.data).all()
    after.save(tmp_path / "s.nii.gz")
    assert (read_labels(tmp_path / "s.nii.gz").data == before.data).all()


def test_the_answer_does_not_depend_on_the_chunk() -> None:
    model, volume, _ = reference("oss_net_c")
    points = torch.randint(0, 32, (500, 3), generator=torch.Generator().manual_seed(0)).numpy()
    one = model.field(volume, preprocessed=True, precision="fp32", device="cpu", chunk=64).logits(points)
    other = model.field(volume, preprocessed=True, precision="fp32", device="cpu", chunk=4096).logits(points)
    assert np.abs(one - other).max() < 1e-4
    assert ((one > 0) == (other > 0)).all()

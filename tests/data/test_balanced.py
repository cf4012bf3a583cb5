import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossnet.data.balanced import balanced_voxels


def scan(
    *boxes: tuple[tuple[int, int, int], int, int], shape: tuple[int, int, int] = (60, 50, 41)
) -> np.ndarray:
    """Cubes: corner, edge, label."""
    out = np.zeros(shape, np.uint8)
    for corner, edge, label in boxes:
        out[tuple(slice(c, c + edge) for c in corner)] = label
    return out


@pytest.mark.parametrize("classes", [1, 3])
def test_weights_count_as_the_voxels_do(classes: int) -> None:
    labels = scan(((5, 6, 7), 20, 1), ((50, 44, 33), 3, 2))
    voxels, weights = balanced_voxels(np.random.default_rng(0), labels, classes, 200_000)
    assert voxels.shape == (200_000, 3)
    found = labels[tuple(voxels.T)]
    for label in range(3):
        # Of the small one some 200 are hit.
        close = 0.25 if label == 2 else 0.03
        assert weights[found == label].sum() == pytest.approx((labels == label).sum(), rel=close)


def test_every_structure_is_met_however_small() -> None:
    labels = scan(((0, 0, 0), 40, 1), ((50, 44, 38), 3, 2), shape=(160, 160, 100))
    voxels, _ = balanced_voxels(np.random.default_rng(0), labels, 3, 2**15)
    assert (labels[tuple(voxels.T)] == 2).sum() > 5  # of 27 voxels among 2.5 million
    uniform = np.random.default_rng(0).integers(labels.size, size=2**15)
    assert (labels.ravel()[uniform] == 2).sum() <= 2


@settings(max_examples=30)
@given(
    shape=st.tuples(*[st.integers(1, 30)] * 3),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_any_scan(shape: tuple[int, int, int], seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    labels = ((rng.random(shape) < share) * rng.integers(1, 4, shape)).astype(np.uint8)
    voxels, weights = balanced_voxels(rng, labels, 4, 100)
    assert ((voxels >= 0) & (voxels < np.array(shape))).all()
    assert len(voxels) == len(weights) == 100
    assert (weights > 0).all()
    if not labels.any():
        np.testing.assert_allclose(weights, labels.size / 100)

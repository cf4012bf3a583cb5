"""Temperatures: found where they are known, and used where probabilities are told."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny

from ossnet.field.asking import probabilities
from ossnet.training.calibration import temperature


@settings(max_examples=30)
@given(st.floats(0.4, 2.7), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_a_temperature_that_is_known_is_found(known: float, classes: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    if classes == 1:
        honest = 2 * torch.randn(20_000, generator=draw)
        right = (torch.rand(20_000, generator=draw) < honest.sigmoid()).long()
    else:
        honest = 2 * torch.randn(20_000, classes, generator=draw)
        right = torch.multinomial(honest.softmax(dim=1), 1, generator=draw)[:, 0]
    found = temperature(known * honest, right)
    assert found == pytest.approx(known, rel=0.1)
    before, after = (probabilities((known * honest).numpy(), t) for t in (1.0, found))
    if classes > 1:
        assert np.array_equal(before.argmax(axis=1), after.argmax(axis=1))
    else:
        assert np.array_equal(before > 0.5, after > 0.5)


def test_temperatures_have_bounds() -> None:
    sure = torch.tensor([30.0, -30.0])
    assert temperature(sure, torch.tensor([1, 0])) == pytest.approx(1 / 3, abs=1e-3)
    assert temperature(sure, torch.tensor([0, 1])) == pytest.approx(3)


def test_probabilities_are_of_divided_logits() -> None:
    scan, model = tiny.scan(), tiny.model("multiscale", 3)
    model.metadata["temperature"] = 2.0
    field = model.field(scan, device="cpu")
    points = np.array([[3.0, 4.0, 5.0], [7.2, 6.1, 5.5]])
    expected = (torch.from_numpy(field.logits(points)) / 2).softmax(dim=1).numpy()
    np.testing.assert_allclose(field.probability(points), expected, atol=1e-6)
    grid = field.probability_map().data
    np.testing.assert_allclose(grid[:, 3, 4, 5], expected[0], atol=1e-4)
    plain = tiny.model("multiscale", 3).field(scan, device="cpu")
    np.testing.assert_array_equal(field.segment().data, plain.segment().data)
    other = replace(model, metadata={"temperature": 8.0})
    assert replace(model, others=(other,)).temperature == pytest.approx(4)

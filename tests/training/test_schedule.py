"""How learning rates move: one factor for all of them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ossnet.training.schedule import ENOUGH_STEPS, enough_steps, rate_factor
from ossnet.training.settings import ScheduleSettings

FRACTIONS = st.floats(0, 1)


def test_steps_are_the_papers() -> None:
    paper = ScheduleSettings(kind="steps", epochs=50, milestones=(20, 30))
    found = [rate_factor(paper, epoch / 50, 0, epoch) for epoch in (0, 19, 20, 29, 30, 49)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_with_a_time_limit_milestones_keep_their_place() -> None:
    timed = ScheduleSettings(kind="steps", epochs=50, milestones=(20, 30), minutes=10)
    found = [rate_factor(timed, fraction, 7, 3) for fraction in (0.0, 0.39, 0.41, 0.59, 0.61, 1.0)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@given(one=FRACTIONS, other=FRACTIONS)
def test_cosine_warms_up_and_falls_to_nothing(one: float, other: float) -> None:
    cosine = ScheduleSettings(kind="cosine", warmup=0.03)
    low, high = sorted((one, other))
    assert 0 <= rate_factor(cosine, one, 0, 0) <= 1
    if low >= 0.03:
        assert rate_factor(cosine, high, 0, 0) <= rate_factor(cosine, low, 0, 0) + 1e-12
    assert 0 < rate_factor(cosine, 0.0, 0, 0) < 0.02
    assert rate_factor(cosine, 1.0, 0, 0) == pytest.approx(0)


def test_root_holds_falls_with_the_root_and_ends_at_nothing() -> None:
    root = ScheduleSettings(kind="root", hold=300)
    assert rate_factor(root, 0.0, 0, 0) == pytest.approx(10 / 300)
    assert rate_factor(root, 0.0, 29, 0) == pytest.approx(1)
    assert rate_factor(root, 0.0, 299, 0) == pytest.approx(1)
    assert rate_factor(root, 0.0, 1199, 0) == pytest.approx(0.5)
    assert rate_factor(root, 0.5, 1199, 0) == pytest.approx(0.25)
    assert rate_factor(root, 1.2, 1199, 0) == 0


def test_enough_is_a_number_of_passes_or_of_steps() -> None:
    timed = ScheduleSettings(minutes=60, passes=50, batch_size=2)
    assert enough_steps(timed, 1000) == 25_000
    assert enough_steps(timed, 20) == ENOUGH_STEPS
    assert enough_steps(timed.model_copy(update={"passes": 0}), 20) == math.inf
    assert enough_steps(ScheduleSettings(epochs=3), 20) == math.inf

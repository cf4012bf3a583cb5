"""Means, intervals, and the three ways to show them."""

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ossnet.evaluation.metrics import Scores
from ossnet.evaluation.tables import Row, estimate, from_csv, summarise, to_csv, to_json, to_screen

ABSENT = Scores(None, None, None, None, None, 0.0, None, 0.0, 0.0, "absent")
MISSED = Scores(0.0, 0.0, 99.0, 99.0, 0.0, -5.0, -100.0, 0.0, 5.0, "missed")


def scores(dice: float) -> Scores:
    return Scores(dice, dice / (2 - dice), 3.0, 1.0, 0.9, 0.5, 10.0, 5.5, 5.0, "scored")


def rows() -> list[Row]:
    values = {"a": (0.8, 0.6), "b": (0.9, 0.7), "c": (1.0, None)}
    return [
        Row(case, label, name, ABSENT if dice is None else scores(dice))
        for case, pair in values.items()
        for label, name, dice in zip((1, 2), ("front", "back"), pair, strict=True)
    ]


def test_means_leave_absent_structures_out_and_count_them() -> None:
    summary = summarise(rows())
    assert summary.of(1).estimates["dice"].mean == pytest.approx(0.9)
    back = summary.of(2)
    assert back.estimates["dice"].mean == pytest.approx(0.65)
    assert (back.cases, back.absent, back.estimates["dice"].n) == (3, 1, 2)
    # That there is no volume where there is none says nothing about volumes.
    volume = back.estimates["volume_difference_ml"]
    assert (volume.mean, volume.n) == (pytest.approx(0.5), 2)
    assert summary.of(None).estimates["volume_difference_ml"].mean == pytest.approx(0.5)
    # Case c counts with the class that it has.
    assert summary.of(None).estimates["dice"].mean == pytest.approx((0.7 + 0.8 + 1.0) / 3)


def test_missed_structures_count_with_their_penalty() -> None:
    summary = summarise([Row("a", 1, "", scores(0.8)), Row("b", 1, "", MISSED)])
    assert summary.of(1).missed == 1
    assert summary.of(1).estimates["dice"].mean == pytest.approx(0.4)
    assert summary.of(1).estimates["hd95_mm"].mean == pytest.approx(51)
    assert len(summary.classes) == 1  # one class needs no mean over classes
    with pytest.raises(KeyError):
        summary.of(None)


def test_cases_of_one_patient_are_drawn_together() -> None:
    """Two scans of one heart say hardly more than one."""
    rng = np.random.default_rng(0)
    hearts = rng.random(20)
    apart = estimate([float(v) for v in hearts])
    twice = estimate([float(v) for v in hearts.repeat(2)], [f"p{i}" for i in np.arange(20).repeat(2)])
    assert (twice.mean, twice.n) == (pytest.approx(apart.mean), 40)
    assert (twice.low, twice.high) == (pytest.approx(apart.low), pytest.approx(apart.high))
    unaware = estimate([float(v) for v in hearts.repeat(2)])
    assert unaware.high - unaware.low < 0.8 * (twice.high - twice.low)
    assert estimate([0.5, 0.7], ["one", "one"]).low is None
    rows = [
        Row(f"p{i}_{phase}", 1, "", scores(0.5 + i / 100), f"p{i}")
        for i in range(9)
        for phase in ("ED", "ES")
    ]
    again = from_csv(to_csv(rows))
    assert [(row.case, row.patient) for row in again] == [(row.case, row.patient) for row in rows]
    dice = summarise(rows).of(1).estimates["dice"]
    assert (dice.n, summarise(again).of(1).estimates["dice"]) == (18, dice)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_intervals_hold_the_mean_and_stay_within_the_values(values: list[float]) -> None:
    found = estimate(values)
    assert found.low is not None
    assert found.high is not None
    assert found.mean is not None
    assert min(values) - 1e-9 <= found.low <= found.mean + 1e-9
    assert found.mean - 1e-9 <= found.high <= max(values) + 1e-9
    assert found == estimate(values)


def test_intervals_are_near_the_normal_ones_for_many_cases() -> None:
    values = np.random.default_rng(1).normal(0.8, 0.1, 200).tolist()
    found = estimate(values)
    half = 1.96 * np.std(values) / np.sqrt(200)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)  # type: ignore[operator]


def test_too_few_cases_have_no_interval() -> None:
    assert estimate([None, None]).mean is None
    assert estimate([0.5, None]) == estimate([0.5])
    assert estimate([0.5]).low is None
    assert summarise([]).classes == ()


def test_the_table_on_screen_shows_every_class_and_the_rules() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(to_screen(summarise([*rows(), Row("d", 1, "front", MISSED)]), 1.5))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in ("1 front", "2 back", "mean", "1.5 mm", "1 absent", "1 missed", "bootstrap", "0.675"):
        assert expected in text, expected


def test_names_with_brackets_are_shown() -> None:
    shown = Console(file=io.StringIO(), width=200)
    shown.print(to_screen(summarise([Row("a", 1, "lesion [enhancing]", scores(0.5))]), 1.0))
    assert "1 lesion [enhancing]" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_csv_and_json_carry_every_case() -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(rows()))))
    assert len(lines) == 6
    assert lines[0]["case"] == "a"
    assert float(lines[0]["dice"]) == pytest.approx(0.8)
    assert lines[-1]["dice"] == ""
    assert lines[-1]["outcome"] == "absent"
    told = json.loads(json.dumps(to_json(rows(), summarise(rows()), 1.0), allow_nan=False))
    assert told["cases"][-1]["dice"] is None
    assert told["summary"][0]["estimates"]["dice"]["n"] == 3
    assert told["summary"][-1]["label"] is None
    assert any("bootstrap" in rule for rule in told["rules"])

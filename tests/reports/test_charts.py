"""Line charts: well-formed, complete, with round axes."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ossnet.reports.charts import Line, line_chart, smoothed, ticks

finite = st.floats(-1e6, 1e6)


@given(low=finite, size=st.floats(1e-6, 1e6))
def test_ticks_are_round_ascending_and_cover_the_range(low: float, size: float) -> None:
    found = ticks(low, low + size)
    assert 2 <= len(found) <= 8
    assert found == sorted(found)
    slack = size * 1e-3 + abs(low) * 1e-9
    assert found[0] <= low + slack
    assert found[-1] >= low + size - slack


def test_a_range_of_nothing_still_has_ticks() -> None:
    assert len(ticks(0.0, 0.0)) >= 2
    assert len(ticks(3.0, 3.0)) >= 2


def test_every_point_is_inside_the_picture_and_names_are_escaped() -> None:
    svg = line_chart(
        [Line("a < b", [(0.0, 1.0), (5.0, 3.0), (float("nan"), 1.0)], dots=True)], "x & y", "loss"
    )
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox") == "0 0 640 300"
    line = next(e for e in root if e.tag.endswith("polyline"))
    points = [tuple(map(float, p.split(","))) for p in (line.get("points") or "").split()]
    assert len(points) == 2
    assert all(0 <= x <= 640 and 0 <= y <= 300 for x, y in points)
    assert points[0][1] > points[1][1]  # larger values are higher up
    assert sum(e.tag.endswith("circle") for e in root) == 2
    assert "a < b" in "".join(e.text or "" for e in root)


def test_without_points_there_is_no_chart() -> None:
    assert line_chart([Line("a", [])], "x", "y") == ""


def test_smoothing_keeps_the_mean_and_limits_the_points() -> None:
    values = [float(i % 7) for i in range(1000)]
    found = smoothed(values, [float(i) for i in range(1000)], most=100)
    assert len(found) == 100
    assert sum(y for _, y in found) / 100 == pytest.approx(sum(values) / 1000)

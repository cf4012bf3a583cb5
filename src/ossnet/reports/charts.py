"""Line charts as SVG that follows the page's colours (light and dark) and stays sharp."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Line:
    """One curve: points (x, y) in order, drawn as one of the page's series colours 1 … 4."""

    name: str
    points: Sequence[tuple[float, float]]
    series: int = 1
    dots: bool = False


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    y_range: tuple[float, float] | None = None,
    width: int = 640,
    height: int = 300,
) -> str:
    """An SVG element; its classes are styled by the page.

    Args:
        lines: Curves; points that are not finite are left out.
        x_label: Below the axis.
        y_label: Above the axis.
        y_range: Fixed ends of the y axis; otherwise from the data.
        width: In user units; the picture scales with the page.
        height: In user units.

    Returns:
        `<svg …>…</svg>`, or an empty string when there is nothing to draw.
    """
    kept = [
        (line, [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]) for line in lines
    ]
    kept = [(line, points) for line, points in kept if points]
    if not kept:
        return ""
    xs = [x for _, points in kept for x, _ in points]
    ys = [y for _, points in kept for _, y in points]
    x_ticks = ticks(min(0.0, min(xs)), max(xs))
    y_ticks = ticks(*(y_range or (min(ys), max(ys))))
    x0, x1 = min(x_ticks[0], min(xs)), max(xs)
    y0, y1 = y_range or (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)
    left, right, top, bottom = 52, 14, 30, 40

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        return across, height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}">'
    ]
    for tick in y_ticks:
        if y0 <= tick <= y1:
            _, y = place(x0, tick)
            parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        if x0 <= tick <= x1:
            x, _ = place(tick, y0)
            parts.append(
                f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{_number(tick)}</text>'
            )
    parts.append(
        f'<text class="name" x="{(left + width - right) / 2:.0f}" y="{height - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    parts.append(f'<text class="name" x="{left - 44}" y="14">{escape(y_label)}</text>')
    for line, points in kept:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in points))
        parts.append(f'<polyline class="series-{line.series}" points="{path}"/>')
        if line.dots:
            parts += [
                f'<circle class="series-{line.series}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
                for x, y in (place(*p) for p in points)
            ]
    x = width - right
    for line, _ in reversed(kept):
        parts.append(
            f'<text class="legend series-{line.series}" x="{x:.0f}" y="14" text-anchor="end">'
            f"{escape(line.name)}</text>"
        )
        x -= 14 + 7.2 * len(line.name)
    parts.append("</svg>")
    return "".join(parts)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `wanted` of them."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / wanted
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(f * scale for f in (1, 2, 2.5, 5, 10) if f * scale >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def smoothed(values: Sequence[float], times: Sequence[float], most: int = 150) -> list[tuple[float, float]]:
    """A long curve as at most `most` points, each the mean of its stretch."""
    size = max(1, math.ceil(len(values) / most))
    out = []
    for start in range(0, len(values), size):
        part, when = values[start : start + size], times[start : start + size]
        out.append((sum(when) / len(when), sum(part) / len(part)))
    return out


def _number(value: float) -> str:
    return f"{value:.10g}"

"""Pictures of scans with outlines, as PNG bytes. Letters: X Y Z voxels, W H pixels."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, Num
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ossnet.colours import REFERENCE, colour
from ossnet.errors import VolumeError
from ossnet.volume import LabelMap, Volume, closest_canonical, same_place

PLANES = ("sagittal", "coronal", "axial")
"""Name of the plane across each canonical axis (right, anterior, superior)."""
_SIDES = (("P", "A", "I", "S"), ("L", "R", "I", "S"), ("L", "R", "P", "A"))  # left, right, bottom, top
_LEGEND = 0.6
"""Share of the width in which names of structures begin; the title is beside them."""

_DARK = "#0b0d10"


@dataclass(frozen=True)
class _Slice:
    """One slice, ready to draw: first axis to the right, second axis up."""

    plane: int
    index: int
    image: Num[np.ndarray, "W H"]
    prediction: Integer[np.ndarray, "W H"] | None
    reference: Integer[np.ndarray, "W H"] | None
    spacing: tuple[float, float]


def overlay(
    volume: Volume,
    prediction: LabelMap | None,
    reference: LabelMap | None = None,
    *,
    planes: Sequence[int] = (0, 1, 2),
    slices: int = 2,
    channel: int = 0,
    title: str = "",
    width_px: int = 1500,
) -> bytes:
    """Slices of a scan with the outlines of a prediction (coloured) and of its reference (white).

    Pixels have the proportions of the voxels in mm. Seen with the patient's right on the right side.

    Args:
        volume: The scan.
        prediction: Labels on the scan's grid, in any voxel order, or None.
        reference: Likewise.
        planes: One column each: 0 sagittal, 1 coronal, 2 axial.
        slices: Slices a column, spread over what is labelled (over the scan where nothing is).
        channel: Which channel is shown.
        title: Written above.
        width_px: Width of the picture.

    Returns:
        A PNG file.

    Raises:
        VolumeError: A label map does not lie on the scan.
    """
    prediction, reference = (labels and on_scan(labels, volume) for labels in (prediction, reference))
    columns = [_slices(volume, prediction, reference, plane, slices, channel) for plane in planes]
    low, high = window(volume.data[channel])
    names = {**(reference.names if reference else {}), **(prediction.names if prediction else {})}

    # Columns as wide as their pictures are when all are of one height.
    widths = [
        c[0].image.shape[0] * c[0].spacing[0] / (c[0].image.shape[1] * c[0].spacing[1]) for c in columns
    ]
    width, foot = 10.0, 0.4
    height = width / sum(widths) * slices + foot
    figure = Figure(figsize=(width, height), dpi=width_px / width, facecolor=_DARK)
    grid = figure.subplots(slices, len(planes), squeeze=False, width_ratios=widths)
    shown: set[int] = set()
    for column, axes in zip(columns, grid.T, strict=True):
        for found, place in zip(column, axes, strict=True):
            shown |= _draw(place, found, low, high)
    figure.subplots_adjust(0.004, foot / height, 0.996, 1 - 0.004, wspace=0.01, hspace=0.01)
    _legend(figure, sorted(shown), names, prediction is not None, reference is not None, title)
    return to_png(figure)


def on_scan(labels: LabelMap, volume: Volume) -> LabelMap:
    """A label map that lies on a scan, in the voxel order of the scan.

    Raises:
        VolumeError: It does not lie there.
    """
    turned = labels.in_order_of(volume)
    if reason := same_place(volume, turned):
        raise VolumeError(
            labels.source or "labels", f"does not lie on the scan: {reason}", "Use its own grid"
        )
    return turned


def to_png(figure: Figure) -> bytes:
    """A matplotlib figure as a PNG file."""
    out = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(out, format="png", facecolor=figure.get_facecolor())
    return out.getvalue()


def window(values: Num[np.ndarray, "X Y Z"]) -> tuple[float, float]:
    """Grey values shown as black and as white: percentiles 1 and 99.9 of what is not the darkest value."""
    # A sample: percentiles of a whole CT take longer than the picture.
    step = max(1, round((values.size / 500_000) ** (1 / 3)))
    sample = values[::step, ::step, ::step].astype(np.float64)
    tissue = sample[sample > sample.min()]
    if tissue.size == 0:
        return float(sample.min()), float(sample.min()) + 1.0
    low, high = np.percentile(tissue, (1, 99.9))
    return float(low), float(high if high > low else low + 1.0)


def _slices(
    volume: Volume,
    prediction: LabelMap | None,
    reference: LabelMap | None,
    plane: int,
    count: int,
    channel: int,
) -> list[_Slice]:
    turn = closest_canonical(volume.affine)
    image = turn.apply(volume.data[channel])
    maps = [None if m is None else turn.apply(m.data) for m in (prediction, reference)]
    spacing = volume.reoriented(turn).spacing
    first, second = (axis for axis in range(3) if axis != plane)
    found = []
    for index in spread([m for m in maps if m is not None], plane, count, image.shape):
        cut = [None if m is None else m.take(index, plane) for m in maps]
        found.append(
            _Slice(plane, index, image.take(index, plane), cut[0], cut[1], (spacing[first], spacing[second]))
        )
    return found


def spread(
    maps: Sequence[Integer[np.ndarray, "X Y Z"]], axis: int, count: int, shape: Sequence[int]
) -> list[int]:
    """Slices across an axis that part the labelled voxels evenly, or the scan where there are none."""
    other = tuple(a for a in range(3) if a != axis)
    filled = np.zeros(shape[axis])
    for labels in maps:
        filled += np.count_nonzero(labels, axis=other)
    if not filled.any():
        filled += 1
    share = np.cumsum(filled) / filled.sum()
    wanted = (np.arange(count) + 0.5) / count
    return [int(i) for i in np.searchsorted(share, wanted)]


def _draw(axes: Axes, found: _Slice, low: float, high: float) -> set[int]:
    """Draw one slice; returns the labels on it."""
    width, height = found.image.shape
    dx, dy = found.spacing
    extent = (0.0, width * dx, 0.0, height * dy)
    axes.imshow(found.image.T, cmap="gray", vmin=low, vmax=high, origin="lower", extent=extent)
    labels: set[int] = set()
    for array, line, solid in ((found.reference, 0.9, False), (found.prediction, 1.2, True)):
        if array is None:
            continue
        present = [int(v) for v in np.unique(array) if v > 0]
        labels |= set(present)
        for label in present:
            ink = colour(label) if solid or found.prediction is None else REFERENCE
            _outline(axes, (array == label).astype(np.float32), found.spacing, ink, line)
    left, right, bottom, top = _SIDES[found.plane]
    style: dict[str, Any] = {"color": "#9aa4b0", "fontsize": 8, "transform": axes.transAxes}
    axes.text(0.01, 0.5, left, va="center", ha="left", **style)
    axes.text(0.99, 0.5, right, va="center", ha="right", **style)
    axes.text(0.5, 0.01, bottom, va="bottom", ha="center", **style)
    axes.text(0.5, 0.99, top, va="top", ha="center", **style)
    axes.text(0.01, 0.99, f"{PLANES[found.plane]} {found.index}", va="top", ha="left", **style)
    axes.set_axis_off()
    return labels


def _outline(
    axes: Axes, mask: Float[np.ndarray, "W H"], spacing: tuple[float, float], ink: str, line: float
) -> None:
    # A margin of background closes outlines at the edge of the scan.
    padded = np.pad(mask, 1)
    x = (np.arange(padded.shape[0]) - 0.5) * spacing[0]
    y = (np.arange(padded.shape[1]) - 0.5) * spacing[1]
    axes.contour(x, y, padded.T, levels=[0.5], colors=[ink], linewidths=line)


def _legend(
    figure: Figure,
    labels: Sequence[int],
    names: dict[int, str],
    predicted: bool,
    referenced: bool,
    title: str,
) -> None:
    x = 0.012
    height = 0.2 / figure.get_figheight()
    entries = [(names.get(label) or f"label {label}", colour(label)) for label in labels]
    if predicted and referenced:
        entries.insert(0, ("reference", REFERENCE))
    for shown, (text, ink) in enumerate(entries):
        if x > _LEGEND:
            more = f"and {len(entries) - shown} more"
            figure.text(x, height, more, color="#d5dbe3", fontsize=10, va="center")
            break
        figure.text(x, height, "━", color=ink, fontsize=13, va="center")
        # Names may hold $.
        written = figure.text(
            x + 0.022, height, text, color="#d5dbe3", fontsize=10, va="center", parse_math=False
        )
        FigureCanvasAgg(figure)
        x = written.get_window_extent().x1 / figure.bbox.width + 0.025
    figure.text(0.988, height, title, color="#9aa4b0", fontsize=10, va="center", ha="right", parse_math=False)

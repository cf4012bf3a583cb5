"""One self-contained HTML page from plain values: no network, light and dark, large and small screens."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Integer, Num, UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ossnet.colours import colour
from ossnet.files.atomic import write_text
from ossnet.reports.figures import on_scan, window
from ossnet.reports.render import Surface, render, signed_volume
from ossnet.volume import LabelMap, Volume, closest_canonical

_MOST_VOXELS = 8_000_000
"""Above this the slice viewer leaves voxels out: browsers limit the size of pictures."""


@dataclass(frozen=True)
class Headline:
    """A figure that is seen first."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    kind: ClassVar[str] = "text"
    paragraphs: tuple[str, ...]
    emphasis: bool = False
    """Set apart: what a reader must not miss."""


@dataclass(frozen=True)
class Table:
    """Cells are text; all columns but the first are numbers."""

    kind: ClassVar[str] = "table"
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    strong: tuple[int, ...] = ()
    """Rows that stand out."""


@dataclass(frozen=True)
class Chart:
    """An SVG element made by `ossnet.reports.charts`."""

    kind: ClassVar[str] = "chart"
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class SurfaceView:
    """Surfaces that can be turned; a picture of them where scripts or WebGL are missing."""

    kind: ClassVar[str] = "surfaces"
    surfaces: tuple[Surface, ...]
    caption: str = ""
    view: tuple[float, float] = (35.0, 20.0)


@dataclass(frozen=True)
class SliceView:
    """A scan to scroll through with prediction, reference and their differences on it.

    Attributes:
        volume: The scan; its first channel is shown.
        prediction: On the scan's grid.
        reference: On the scan's grid, or None.
        fallback: A PNG of slices for where scripts do not run.
    """

    kind: ClassVar[str] = "slices"
    volume: Volume
    prediction: LabelMap
    reference: LabelMap | None
    fallback: bytes
    alt: str
    caption: str = ""


Block = Text | Table | Chart | SurfaceView | SliceView


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """Everything on a page, in reading order."""

    title: str
    summary: str
    headlines: tuple[Headline, ...]
    sections: tuple[Section, ...]
    footer: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    """Versions, settings, times: listed at the end."""


def write_page(path: Path | str, page: Page) -> None:
    """Write the page as one HTML file, atomically.

    Raises:
        VolumeError: A label map of a `SliceView` does not lie on its scan.
        ResourceError: The disk is full.
    """
    write_text(path, page_html(page))


def page_html(page: Page) -> str:
    """The page as HTML; everything it shows is inside."""
    return _environment().get_template("page.html").render(page=page)


@cache
def _environment() -> Environment:
    loader = PackageLoader("ossnet.reports", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"png": png_uri, "surface_data": surface_data, "slice_data": slice_data}
    environment.filters["surface_png"] = _surface_png
    environment.filters["svg"] = Markup  # made by charts.py, which escapes
    environment.globals["raw"] = lambda name: Markup(loader.get_source(environment, name)[0])
    return environment


def png_uri(data: bytes) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def grey_png(image: UInt8[np.ndarray, "*HWC"]) -> bytes:
    """An (H, W) grey or (H, W, 4) RGBA picture as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG", optimize=image.ndim == 3)
    return out.getvalue()


def surface_data(view: SurfaceView) -> Markup:
    """Meshes for the viewer: 16-bit positions in their common box, indices, colours."""
    everything = np.concatenate([s.vertices for s in view.surfaces])
    low = everything.min(axis=0)
    size = float(np.ptp(everything, axis=0).max()) or 1.0
    meshes = []
    for surface in view.surfaces:
        positions = np.round((surface.vertices - low) / size * 65535).astype("<u2")
        indices = _wound(surface).astype("<u4")
        meshes.append(
            {
                "name": surface.name,
                "colour": surface.colour,
                "positions": base64.b64encode(positions.tobytes()).decode(),
                "indices": base64.b64encode(indices.tobytes()).decode(),
            }
        )
    extent = (np.ptp(everything, axis=0) / size).tolist()
    return _json({"meshes": meshes, "extent": extent, "view": view.view})


def _wound(surface: Surface) -> Integer[np.ndarray, "F 3"]:
    """Faces turned so that normals point out: the viewer draws one side only."""
    centred = surface.vertices - surface.vertices.mean(axis=0)
    return surface.faces[:, ::-1] if signed_volume(centred, surface.faces) < 0 else surface.faces


def _surface_png(view: SurfaceView) -> str:
    return png_uri(grey_png(render(view.surfaces, view=view.view)))


def slice_data(view: SliceView) -> Markup:
    """The scan and its labels as two tiled grey pictures, in canonical axes."""
    given = [view.prediction] if view.reference is None else [view.prediction, view.reference]
    maps = [on_scan(labels, view.volume) for labels in given]
    turn = closest_canonical(view.volume.affine)
    grey = turn.apply(view.volume.data[0])
    step = 1 if grey.size <= _MOST_VOXELS else math.ceil((grey.size / _MOST_VOXELS) ** (1 / 3))
    thin = (slice(None, None, step),) * 3
    low, high = window(grey)
    shades = ((grey[thin].astype(np.float32) - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)
    classes = sorted({int(v) for m in maps for v in np.unique(m.data)} - {0})[:15]
    prediction, reference = (_places(turn.apply(m.data)[thin], classes) for m in (maps[0], maps[-1]))
    x, y, z = shades.shape
    across = max(1, round(math.sqrt(z * y / x)))
    names = {**(view.reference.names if view.reference else {}), **view.prediction.names}
    return _json(
        {
            "shape": [x, y, z],
            "spacing": [s * step for s in view.volume.reoriented(turn).spacing],
            "across": across,
            "grey": png_uri(grey_png(_tiled(shades, across))),
            "labels": png_uri(grey_png(_tiled((prediction + 16 * reference).astype(np.uint8), across))),
            "reference": view.reference is not None,
            "classes": [{"name": names.get(c) or f"label {c}", "colour": colour(c)} for c in classes],
        }
    )


def _places(labels: Integer[np.ndarray, "X Y Z"], classes: Sequence[int]) -> UInt8[np.ndarray, "X Y Z"]:
    """Each label as its place among the classes, from 1; 0 elsewhere."""
    out = np.zeros(labels.shape, np.uint8)
    for place, label in enumerate(classes, 1):
        out[labels == label] = place
    return out


def _tiled(volume: Num[np.ndarray, "X Y Z"], across: int) -> Num[np.ndarray, "H W"]:
    """Slices along z side by side, `across` in a row; each with x to the right and y down."""
    x, y, z = volume.shape
    down = -(-z // across)
    tiles = np.zeros((down * across, y, x), volume.dtype)
    tiles[:z] = volume.transpose(2, 1, 0)
    return tiles.reshape(down, across, y, x).transpose(0, 2, 1, 3).reshape(down * y, across * x)


def _json(value: Any) -> Markup:
    # Inside a script element only "</" could end it.
    return Markup(json.dumps(value, allow_nan=False).replace("</", "<\\/"))

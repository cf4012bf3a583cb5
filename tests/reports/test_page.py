"""The page: complete, self-contained, safe, and readable by its own scripts."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ossnet.errors import VolumeError
from ossnet.reports.charts import Line, line_chart
from ossnet.reports.figures import overlay
from ossnet.reports.page import (
    Chart,
    Headline,
    Page,
    Section,
    SliceView,
    SurfaceView,
    Table,
    Text,
    page_html,
    slice_data,
    write_page,
)
from ossnet.reports.render import surface_of
from ossnet.volume import LabelMap, Orientation, Volume

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def scan() -> tuple[Volume, LabelMap, LabelMap]:
    values = np.arange(10 * 8 * 7, dtype=np.int16).reshape(1, 10, 8, 7)
    prediction, reference = np.zeros((2, 10, 8, 7), np.uint8)
    prediction[2:6, 2:6, 2:6] = 5
    reference[2:6, 2:6, 2:5] = 5
    reference[7, 7, 6] = 9
    return (
        Volume(values, AFFINE),
        LabelMap(prediction, AFFINE, names={5: "five"}),
        LabelMap(reference, AFFINE),
    )


def page(volume: Volume, prediction: LabelMap, reference: LabelMap | None) -> Page:
    surface = surface_of(prediction, 5, "</script><b>", "#ff0000")
    assert surface is not None
    picture = overlay(volume, prediction, reference, width_px=300)
    return Page(
        "Title & <more>",
        "Summary",
        (Headline("0.9", "Dice", "note"),),
        (
            Section(
                "Everything",
                (
                    Text(("One.", "Two <i>.")),
                    Text(("Mind this.",), emphasis=True),
                    Table(("", "Dice"), (("a", "0.9"), ("b", "0.8")), "Caption", strong=(1,)),
                    Chart(line_chart([Line("l", [(0.0, 1.0), (1.0, 2.0)])], "x", "y"), "Curve"),
                    SurfaceView((surface,), "Surface"),
                    SliceView(volume, prediction, reference, picture, "slices"),
                ),
            ),
        ),
        "Footer",
        {"Versions": "1.0"},
    )


class Elements(HTMLParser):
    """Tags and attributes, and whether open and close match."""

    VOID = ("meta", "img", "link", "br", "input", "line", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_nothing_is_loaded_from_elsewhere_and_all_tags_close() -> None:
    text = page_html(page(*scan()))
    elements = Elements(text)
    assert elements.open == []
    for _, attributes in elements.found:
        for name in ("src", "href", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/png;base64,"), value
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "http" not in outside.replace("http-equiv", "")
    assert "url(" not in text
    assert any(t == "meta" and "default-src 'none'" in (a.get("content") or "") for t, a in elements.found)


def test_text_is_escaped_and_every_block_is_there() -> None:
    text = page_html(page(*scan()))
    assert "Title &amp; &lt;more&gt;" in text
    assert "Two &lt;i&gt;." in text
    assert "</script><b>" not in text
    for part in ("Mind this.", "Caption", "Curve", "Footer", "Versions", "<svg", 'figure class="surfaces"'):
        assert part in text, part
    assert all(a.get("alt") for t, a in Elements(text).found if t == "img")


def embedded(text: str, kind: str) -> dict:
    figure = re.search(rf'<figure class="{kind}">.*?<script[^>]*>(.*?)</script>', text, re.S)
    assert figure is not None
    value: dict = json.loads(figure[1])
    return value


def untiled(uri: str, shape: list[int], across: int) -> np.ndarray:
    """What slices.js does with the pictures."""
    image = np.round(imread(io.BytesIO(base64.b64decode(uri.split(",")[1]))) * 255).astype(int)
    x, y, z = shape
    out = np.zeros(shape, int)
    for k in range(z):
        left, top = (k % across) * x, (k // across) * y
        out[:, :, k] = image[top : top + y, left : left + x].T
    return out


def test_the_slice_viewer_gets_scan_and_labels_in_canonical_axes() -> None:
    plain = scan()
    turn = Orientation((1, 2, 0), (False, True, True))
    for parts in (plain, tuple(p.reoriented(turn) for p in plain)):
        data = embedded(page_html(page(*parts)), "slices")  # type: ignore[arg-type]
        assert data["shape"] == [10, 8, 7]
        assert data["spacing"] == [1, 2, 3]
        assert [c["name"] for c in data["classes"]] == ["five", "label 9"]
        labels = untiled(data["labels"], data["shape"], data["across"])
        assert ((labels & 15 > 0) == (plain[1].data > 0)).all()
        assert ((labels >> 4) == np.searchsorted([0, 5, 9], plain[2].data)).all()
        grey = untiled(data["grey"], data["shape"], data["across"])
        assert (np.diff(grey[:, 3, 3]) >= 0).all()
        assert grey.max() == 255


def test_without_a_reference_nothing_is_compared() -> None:
    volume, prediction, _ = scan()
    assert embedded(page_html(page(volume, prediction, None)), "slices")["reference"] is False


def test_the_surface_viewer_gets_the_mesh_with_normals_outward() -> None:
    data = embedded(page_html(page(*scan())), "surfaces")
    mesh = data["meshes"][0]
    positions = np.frombuffer(base64.b64decode(mesh["positions"]), "<u2").reshape(-1, 3) / 65535
    faces = np.frombuffer(base64.b64decode(mesh["indices"]), "<u4").reshape(-1, 3)
    assert faces.max() < len(positions)
    a, b, c = (positions[faces[:, i]] for i in range(3))
    assert np.einsum("fd,fd->", a, np.cross(b, c)) > 0
    assert np.allclose(np.ptp(positions, axis=0), data["extent"], atol=1e-4)
    assert max(data["extent"]) == pytest.approx(1)


def test_slices_show_labels_in_any_voxel_order() -> None:
    volume, prediction, reference = scan()
    turned = [m.reoriented(Orientation((2, 0, 1), (True, False, True))) for m in (prediction, reference)]
    shown = [slice_data(SliceView(volume, *maps, b"", "")) for maps in ((prediction, reference), turned)]
    assert shown[0] == shown[1]


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    volume, prediction, reference = scan()
    write_page(tmp_path / "new" / "index.html", page(volume, prediction, reference))
    assert (tmp_path / "new" / "index.html").read_text().startswith("<!doctype html>")
    good = page(volume, prediction, reference)
    moved = LabelMap(prediction.data, np.diag([1.0, 2.0, 4.0, 1.0]))
    bad = SliceView(volume, moved, None, b"", "")
    with pytest.raises(VolumeError, match="does not lie on the scan"):
        write_page(tmp_path / "bad.html", Page("t", "s", (), (Section("x", (bad,)),)))
    assert [f.name for f in tmp_path.iterdir()] == ["new"]
    assert good.sections

"""The picture of the README: a segmentation, the locations that were asked for it, and its surface.

ossnet demo --out demo && python benchmarks/picture.py demo docs/picture.png
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ossnet.colours import colour, rgb
from ossnet.field.grid import Grid
from ossnet.field.model import Model
from ossnet.files.atomic import write_bytes
from ossnet.files.reading import read_volume
from ossnet.reports.figures import to_png, window
from ossnet.reports.render import render, surface_of

DARK, LIGHT = "#0b0d10", "#e8e6e3"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    volume = read_volume(given.demo / "data" / "imagesTs" / "front_0000.nii.gz")
    model = Model.load(given.demo / "run")
    field = model.field(volume)
    asked = np.zeros(field.grid.shape, bool)
    usual = field.asker

    def recording(grid: Grid) -> Any:
        ask = usual(grid)

        def answer(voxels: Any) -> Any:
            asked[tuple(np.asarray(voxels).T)] = True
            return ask(voxels)

        return answer

    field.asker = recording  # type: ignore[method-assign, assignment]
    found = field.segment()
    orientation = model.preparation.orient(volume.affine)
    labels = orientation.apply(found.data)
    grey = orientation.apply(volume.data)[0]
    plane = int(np.argmax((labels == 2).sum(axis=(0, 2))))
    low, high = window(grey)
    base = np.repeat(np.clip((grey[:, plane] - low) / (high - low), 0, 1)[..., None], 3, axis=-1)
    tint = {label: np.array(rgb(colour(label))) / 255 for label in (1, 2)}
    drawn, dots = base.copy(), 0.35 * base
    for label, ink in tint.items():
        inside = labels[:, plane] == label
        drawn[inside] = 0.45 * base[inside] + 0.55 * ink
    for label, ink in {0: np.array([1.0, 1.0, 1.0]), **tint}.items():
        dots[asked[:, plane] & (labels[:, plane] == label)] = ink
    surfaces = [s for k in (1, 2) if (s := surface_of(found, k, model.label_names[k], colour(k), 120_000))]
    share = asked.mean()
    panels = [
        (drawn.transpose(1, 0, 2), "a slice of the answer: grey and white matter"),
        (dots.transpose(1, 0, 2), f"the locations that were asked: {share:.0%} of the voxels"),
        (render(surfaces[:1], 900, 900, (35.0, 25.0))[::-1], "its surface"),
    ]
    figure = Figure(figsize=(13.5, 4.6), facecolor=DARK, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (picture, title) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.imshow(picture, origin="lower", interpolation="nearest")
        axes.set_title(title, color=LIGHT, fontsize=12)
        axes.set_axis_off()
    write_bytes(given.out, to_png(figure))
    print(f"{found.evaluated:,} locations, {share:.1%} of the voxels → {given.out}")


if __name__ == "__main__":
    main()

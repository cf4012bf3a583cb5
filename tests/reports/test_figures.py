"""Slices with outlines: what is on them, where, and in which proportions."""

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from ossnet.colours import colour, rgb
from ossnet.errors import VolumeError
from ossnet.reports.figures import overlay, spread, window
from ossnet.volume import LabelMap, Orientation, Volume

AFFINE = np.diag([1.0, 1.0, 3.0, 1.0])


def scan(affine: np.ndarray = AFFINE) -> tuple[Volume, LabelMap, LabelMap]:
    """Dark noise with a box at one end, and a reference that is one voxel larger."""
    values = np.random.default_rng(0).integers(0, 30, (1, 24, 20, 8)).astype(np.int16)
    values[0, :, 0, 0] = 100
    prediction, reference = np.zeros((2, 24, 20, 8), np.uint8)
    prediction[2:8, 3:9, 2:5] = 1
    reference[1:9, 2:10, 2:6] = 1
    return Volume(values, affine), LabelMap(prediction, affine, names={1: "box"}), LabelMap(reference, affine)


def pixels(png: bytes) -> np.ndarray:
    return np.round(imread(io.BytesIO(png))[..., :3] * 255).astype(int)


def count(png: bytes, ink: str) -> int:
    return int((np.abs(pixels(png) - rgb(ink)).max(axis=-1) < 100).sum())


def test_many_structures_have_colours_of_their_own() -> None:
    assert len({colour(label) for label in range(1, 25)}) == 24
    assert colour(1) == colour(25)


def test_prediction_and_reference_are_drawn_in_their_colours() -> None:
    volume, prediction, reference = scan()
    both = overlay(volume, prediction, reference, width_px=600)
    neither = overlay(volume, None, None, width_px=600)
    assert count(both, colour(1)) > count(neither, colour(1)) + 100
    assert count(both, "#ffffff") > count(overlay(volume, prediction, width_px=600), "#ffffff") + 100
    alone = overlay(volume, None, reference, width_px=600)
    assert count(alone, colour(1)) > 100


def test_pixels_have_the_proportions_of_voxels_in_mm() -> None:
    volume, prediction, _ = scan()
    # One axial slice: 24 × 20 mm; one coronal: 24 × 24 mm.
    axial = pixels(overlay(volume, prediction, planes=(2,), slices=1, width_px=600)).shape
    coronal = pixels(overlay(volume, prediction, planes=(1,), slices=1, width_px=600)).shape
    assert axial[1] == coronal[1] == 600
    foot = 24  # 0.4 of the 10 inches that 600 pixels are
    assert (coronal[0] - foot) / 600 == pytest.approx(24 / 24, abs=0.02)
    assert (axial[0] - foot) / 600 == pytest.approx(20 / 24, abs=0.02)


def test_the_picture_does_not_depend_on_the_stored_orientation() -> None:
    volume, prediction, reference = scan()
    turn = Orientation((2, 0, 1), (True, False, True))
    turned = [v.reoriented(turn) for v in (volume, prediction, reference)]
    assert overlay(*turned, width_px=400) == overlay(volume, prediction, reference, width_px=400)  # type: ignore[arg-type]


def test_slices_are_taken_where_something_is() -> None:
    _, prediction, _ = scan()
    assert spread([prediction.data], 2, 3, (24, 20, 8)) == [2, 3, 4]
    assert spread([], 0, 2, (24, 20, 8)) == [5, 17]
    assert spread([np.zeros((24, 20, 8), np.uint8)], 0, 2, (24, 20, 8)) == [5, 17]


def test_the_window_leaves_out_air_and_single_bright_voxels() -> None:
    values = np.zeros((40, 40, 40), np.float32)
    values[10:30, 10:30, 10:30] = np.linspace(100, 200, 8000).reshape(20, 20, 20)
    values[15, 15, 15] = 1e6
    low, high = window(values)
    assert 100 <= low < 105
    assert 195 < high <= 210
    assert window(np.full((3, 3, 3), 7.0)) == (7.0, 8.0)


def test_the_window_fits_any_scale_and_is_of_all_slices() -> None:
    small = np.random.default_rng(0).uniform(1e-9, 3e-9, (20, 20, 20))
    low, high = window(small)
    assert 1e-9 <= low < high <= 3e-9
    # Every so many voxels would all lie in the first slice, which is air.
    layered = np.zeros((200, 100, 100), np.float32)
    layered[:, :, 1:] = np.linspace(10, 20, 99)
    low, high = window(layered)
    assert low == pytest.approx(10, abs=1)
    assert high == pytest.approx(20, abs=1)


def test_names_are_no_formulas() -> None:
    """An even number of $ would be one, and most are wrong."""
    volume, prediction, _ = scan()
    named = replace(prediction, names={1: "a$_$"})
    assert count(overlay(volume, named, title="case$_1$^"), colour(1)) > 100


def test_labels_of_another_grid_are_refused() -> None:
    volume, prediction, _ = scan()
    with pytest.raises(VolumeError, match="does not lie on the scan"):
        overlay(volume, LabelMap(prediction.data[:-1], prediction.affine))


def test_labels_in_another_voxel_order_are_turned() -> None:
    volume, prediction, reference = scan()
    turned = [m.reoriented(Orientation((2, 0, 1), (True, False, True))) for m in (prediction, reference)]
    assert overlay(volume, *turned, width_px=400) == overlay(volume, prediction, reference, width_px=400)

"""What is said before a segmentation, against what happens."""

from inspect import signature

import numpy as np
import pytest
from tests import tiny

from ossnet.errors import ResourceError
from ossnet.field.binding import surface_voxels
from ossnet.field.field import Field
from ossnet.field.forecast import forecast, locations_for
from ossnet.field.memory import LIBRARIES
from ossnet.field.octree.tree import Octree
from ossnet.volume import LabelMap


@pytest.mark.parametrize(("edge", "radius"), [(64, 22.0), (170, 40.0)])
def test_locations_of_a_ball(edge: int, radius: float) -> None:
    def ball(voxels: np.ndarray) -> np.ndarray:
        return radius - np.linalg.norm(voxels - edge / 2 - 0.3, axis=1)

    shape = (edge, edge, edge)
    octree = Octree(shape, margin=2.0, seeds=True)
    while (voxels := octree.query()) is not None:
        octree.update(ball(voxels))
    surface = LabelMap(octree.labels(), np.eye(4)).surface_voxels()
    assert locations_for(shape, surface, 2) == pytest.approx(octree.evaluated, rel=0.1)


def test_the_surface_of_the_training_is_that_of_the_scan() -> None:
    model = tiny.model("multiscale")
    model.metadata["surface_mm2"] = 800.0
    # Voxels of 8 mm³ have faces of 4 mm².
    assert surface_voxels(model, (20, 20, 20), np.diag([1.0, 2.0, 4.0, 1.0])) == pytest.approx(200)
    del model.metadata["surface_mm2"]
    assert surface_voxels(model, (20, 20, 20), np.eye(4)) > 100


@pytest.mark.parametrize("family", ["multiscale", "C"])
def test_a_grant_is_forecast(family: str) -> None:
    model = tiny.model(family)
    expected = forecast(model, (24, 20, 18), np.eye(4), memory="200MB")
    assert 0 < expected.memory_bytes <= 200e6
    assert model.forecast(tiny.scan((24, 20, 18)), memory="200MB").locations == expected.locations
    finer = forecast(model, (24, 20, 18), np.eye(4), spacing=0.5)
    assert finer.locations > 3 * expected.locations
    assert forecast(model, (24, 20, 18), np.eye(4), spacing=2.0, dense=True).locations == 12 * 10 * 9
    with pytest.raises(ResourceError, match="at least"):
        forecast(model, (24, 20, 18), np.eye(4), memory="50MB")


def test_a_device_is_that_of_a_field() -> None:
    """Also where none is named."""
    for function in (forecast, Field):
        assert signature(function).parameters["device"].default == "auto"


def test_voxel_sizes_are_those_of_the_axes_in_the_file() -> None:
    """Stored superior, anterior, right."""
    affine = np.array(
        [[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    )
    model, scan = tiny.model("multiscale"), tiny.scan((5, 20, 7), affine=affine)
    found = model.field(scan).segment(spacing=(8.0, 1.0, 1.0), strategy="dense")
    asked = forecast(model, scan.shape, affine, spacing=(8.0, 1.0, 1.0), dense=True)
    assert asked.locations == found.evaluated == found.data.size


def test_an_image_that_is_held_is_forecast() -> None:
    model, shape = tiny.model("multiscale", fit="spacing", spacing=(1.0, 1.0, 1.0)), (150, 160, 170)
    affine = np.diag([1.0, 1.0, 0.9, 1.0])
    image, scan = 4 * 150 * 160 * 153, 4 * 150 * 160 * 170
    tight, free = (forecast(model, shape, affine, memory=m).memory_bytes for m in ("220MB", None))
    # Read in boxes, or resized at once.
    assert tight <= 220e6
    assert free >= scan + image
    plain = forecast(tiny.model("multiscale"), shape, affine).memory_bytes
    assert abs(free - max(plain + image, scan + image + LIBRARIES)) < 0.3 * image


def test_a_map_of_probabilities_is_forecast() -> None:
    # On a finer grid than the network's: there the maps outweigh what the encoder takes for a moment.
    model, shape = tiny.model("multiscale"), (80, 80, 80)
    without = forecast(model, shape, np.eye(4), spacing=0.2, dense=True)
    beside = forecast(model, shape, np.eye(4), spacing=0.2, dense=True, probabilities=True)
    assert beside.memory_bytes > without.memory_bytes
    with pytest.raises(ResourceError, match="at least"):
        forecast(model, (2000, 2000, 500), np.eye(4), dense=True, probabilities=True, memory="4GB")

"""Shaded pictures of surfaces."""

import numpy as np
import pytest

from ossnet.reports.render import Surface, render, rotation, simplified, surface_of, vertex_normals
from ossnet.volume import LabelMap

AFFINE = np.array([[-1.0, 0, 0, 10], [0, 0.8, 0, -5], [0, 0, 2.0, 3], [0, 0, 0, 1]])


def ball(radius: float = 12.0) -> LabelMap:
    """Label 3: a ball of `radius` mm on a grid with unequal steps, one axis reversed."""
    index = np.stack(np.meshgrid(np.arange(40), np.arange(50), np.arange(20), indexing="ij"), -1)
    places = index @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    inside = np.linalg.norm(places - (AFFINE @ [20, 25, 10, 1])[:3], axis=-1) < radius
    return LabelMap((inside * 3).astype(np.uint8), AFFINE)


def test_a_surface_lies_in_world_mm_where_the_label_is() -> None:
    surface = surface_of(ball(), 3, "ball", "#ff0000")
    assert surface is not None
    radii = np.linalg.norm(surface.vertices - (AFFINE @ [20, 25, 10, 1])[:3], axis=1)
    assert abs(radii.mean() - 12) < 0.5
    assert radii.max() < 14
    assert surface_of(ball(), 1, "nothing", "#ff0000") is None


@pytest.mark.parametrize("size", [(1, 1, 1), (9, 1, 1), (1, 9, 9)])
def test_what_is_a_voxel_thin_has_a_surface(size: tuple[int, int, int]) -> None:
    data = np.zeros((12, 12, 12), np.uint8)
    data[tuple(slice(1, 1 + n) for n in size)] = 1
    surface = surface_of(LabelMap(data, np.eye(4)), 1, "thin", "#ff0000")
    assert surface is not None
    extent = np.ptp(surface.vertices, axis=0)
    assert np.abs(extent - size).max() < 1
    assert surface.vertices.mean(axis=0) == pytest.approx([(n + 1) / 2 for n in size], abs=0.1)


def test_large_meshes_are_simplified() -> None:
    pytest.importorskip("fast_simplification")
    surface = surface_of(ball(), 3, "ball", "#ff0000", faces=500)
    assert surface is not None
    assert len(surface.faces) <= 600
    vertices, faces = simplified(surface.vertices, surface.faces, 10_000)
    assert vertices is surface.vertices
    assert (faces == surface.faces).all()


def test_normals_of_a_ball_are_radial() -> None:
    surface = surface_of(ball(), 3, "ball", "#ff0000")
    assert surface is not None
    centred = surface.vertices - (AFFINE @ [20, 25, 10, 1])[:3]
    radial = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = np.abs((vertex_normals(surface.vertices, surface.faces) * radial).sum(axis=1))
    assert np.quantile(cosines, 0.05) > 0.85


def test_views_are_rotations_and_the_front_shows_the_patients_left_on_the_right() -> None:
    for view in ((0.0, 0.0), (35.0, 20.0), (-140.0, -60.0)):
        turn = rotation(*view)
        assert np.allclose(turn @ turn.T, np.eye(3))
        assert np.linalg.det(turn) == pytest.approx(1)
    front = rotation(0.0, 0.0)
    assert np.allclose(front @ [-1, 0, 0], [1, 0, 0])  # left → right of the picture
    assert np.allclose(front @ [0, 0, 1], [0, 1, 0])  # superior → up
    assert np.allclose(front @ [0, 1, 0], [0, 0, 1])  # anterior → towards the viewer


@pytest.mark.parametrize("reverse", [False, True])
def test_a_ball_is_a_disc_lit_from_the_upper_left_whatever_its_winding(reverse: bool) -> None:
    surface = surface_of(ball(), 3, "ball", "#808080")
    assert surface is not None
    faces = surface.faces[:, ::-1] if reverse else surface.faces
    image = render([Surface("ball", surface.vertices, faces, "#808080")], 120, 90)
    assert image.shape == (90, 120, 4)
    solid = image[..., 3] == 255
    # A disc that fills the height.
    assert solid.sum() == pytest.approx(np.pi * (0.94 * 45) ** 2, rel=0.08)
    assert not solid[0, 0]
    light = image[..., :3].mean(axis=-1)
    assert light[25, 45] > light[65, 75] + 20


def test_the_nearer_surface_hides_the_other() -> None:
    surface = surface_of(ball(), 3, "ball", "#ff0000")
    assert surface is not None
    nearer = Surface("near", surface.vertices + np.array([0.0, 30.0, 0.0]), surface.faces, "#0000ff")
    image = render([nearer, surface], 80, 80, view=(0.0, 0.0))
    red, _, blue, _ = image[40, 40].astype(int)
    assert blue > red + 50

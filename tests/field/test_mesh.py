"""Meshes of analytic fields: area, volume, distance of every vertex, closedness, orientation, files."""

import doctest
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, special
from tests import tiny

import ossnet.field.mesh.extract
import ossnet.field.mesh.isosurface
from ossnet.errors import InputError, SettingsError
from ossnet.field.field import Field
from ossnet.field.mesh.extract import drop_small_parts, extract_mesh, save_mesh, split_pinched_edges

SHAPE = (56, 48, 44)
CENTRE = np.array([27.3, 23.6, 21.8])
AXES = np.array([22.0, 17.0, 14.0])
OBLIQUE = np.array([[0.7, 0.1, 0.0, -20.0], [-0.1, 0.7, 0.0, 5.0], [0.0, 0.0, -0.9, 40.0], [0, 0, 0, 1.0]])


def ellipsoid(points: np.ndarray) -> np.ndarray:
    """Logits that are no distance: steep, and bent along their gradient."""
    return 12 * (1 - (((points - CENTRE) / AXES) ** 2).sum(axis=1))


def ellipsoid_gradient(points: np.ndarray) -> np.ndarray:
    return -24 * (points - CENTRE) / AXES**2


def torus(points: np.ndarray) -> np.ndarray:
    x, y, z = (points - np.array([28, 24, 21.5])).T
    return 7.0 - np.hypot(np.hypot(x, y) - 14.0, z)


def gradient_of(field: Callable[[Any], Any], points: np.ndarray) -> np.ndarray:
    steps = 1e-4 * np.eye(3)
    return np.stack([(field(points + s) - field(points - s)) / 2e-4 for s in steps], axis=1)


def distance(field: Callable[[Any], Any], mesh: trimesh.Trimesh, affine: np.ndarray) -> np.ndarray:
    """Distance of the vertices from the surface in voxels, to first order."""
    voxels = (np.asarray(mesh.vertices) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    return np.abs(field(voxels)) / np.linalg.norm(gradient_of(field, voxels), axis=1)


def ellipsoid_area(a: float, b: float, c: float) -> float:
    """Surface area of an ellipsoid (Legendre)."""
    a, b, c = sorted((a, b, c), reverse=True)
    phi = np.arccos(c / a)
    m = a**2 * (b**2 - c**2) / (b**2 * (a**2 - c**2))
    inner = special.ellipeinc(phi, m) * np.sin(phi) ** 2 + special.ellipkinc(phi, m) * np.cos(phi) ** 2
    return float(2 * np.pi * c**2 + 2 * np.pi * a * b / np.sin(phi) * inner)


@pytest.mark.parametrize("gradient", [None, ellipsoid_gradient])
@pytest.mark.parametrize("options", [{}, {"smooth": 5}, {"faces": 4000}, {"smooth": 3, "faces": 3000}])
def test_ellipsoid(gradient: Any, options: dict[str, Any]) -> None:
    affine = np.diag([-0.8, 0.8, 0.8, 1.0])
    affine[:3, 3] = [30, -10, 4]
    mesh = extract_mesh(ellipsoid, SHAPE, affine, gradient=gradient, **options)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.euler_number == 2
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * AXES.prod() * 0.8**3, rel=5e-3)
    assert mesh.area == pytest.approx(ellipsoid_area(*(0.8 * AXES)), rel=5e-3)
    assert distance(ellipsoid, mesh, affine).max() < 0.02
    if "faces" in options:
        assert len(mesh.faces) == pytest.approx(options["faces"], rel=0.02)
    middle = CENTRE * np.diag(affine)[:3] + affine[:3, 3]
    assert (np.einsum("ij,ij->i", mesh.face_normals, mesh.triangles_center - middle) > 0).mean() > 0.999


@pytest.mark.parametrize("options", [{}, {"faces": 7000}])
def test_torus(options: dict[str, Any]) -> None:
    mesh = extract_mesh(torus, SHAPE, np.eye(4), **options)
    assert mesh.is_watertight
    assert mesh.euler_number == 0
    assert mesh.volume == pytest.approx(2 * np.pi**2 * 14 * 7**2, rel=5e-3)
    assert mesh.area == pytest.approx(4 * np.pi**2 * 14 * 7, rel=5e-3)
    assert distance(torus, mesh, np.eye(4)).max() < 0.02


def test_moving_the_vertices_is_what_makes_them_exact() -> None:
    plain = extract_mesh(ellipsoid, SHAPE, np.eye(4), refine_steps=0)
    assert plain.is_watertight
    assert distance(ellipsoid, plain, np.eye(4)).max() > 0.005
    steep = extract_mesh(lambda p: 1e3 * np.sinh(ellipsoid(p)), SHAPE, np.eye(4))
    assert distance(ellipsoid, steep, np.eye(4)).max() < 0.02


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), label=st.integers(1, 2))
def test_noise_in_any_orientation_is_closed_and_encloses_the_mask(seed: int, label: int) -> None:
    """Structures of all topologies, many of them leaving the volume."""
    shape = (22, 20, 24)
    rng = np.random.default_rng(seed)
    logits = 5 * ndimage.gaussian_filter(rng.normal(size=(3, *shape)), (0, 2, 2, 2))

    def field(points: np.ndarray) -> np.ndarray:
        return np.stack([ndimage.map_coordinates(v, points.T, order=1) for v in logits], axis=1)

    affine = np.eye(4)
    affine[:3, :3] = rng.normal(size=(3, 3)) + np.diag([2, 2, -2])
    labels = logits.argmax(axis=0)
    mesh = extract_mesh(field, shape, affine, labels=labels, label=label)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    ml = abs(np.linalg.det(affine[:3, :3]))
    assert mesh.volume == pytest.approx((labels == label).sum() * ml, rel=0.15)


@pytest.mark.parametrize("kind", ["all alike", "few sizes", "wild"])
def test_surfaces_are_closed_whatever_the_values(kind: str) -> None:
    """Also where those on both sides are equally far from the decision, or differ by orders of magnitude."""
    rng = np.random.default_rng(0)
    for seed in range(20):
        shape = (9, 9, 9) if kind != "wild" else (6, 40, 6)
        labels = (rng.random(shape) < 0.1 + 0.02 * seed).astype(np.uint8)
        size = {
            "all alike": np.ones(shape),
            "few sizes": rng.choice([0.25, 0.5, 1.0], shape),
            "wild": 10 ** rng.uniform(-4, 4, shape),
        }[kind]
        values = np.where(labels, size, -size)

        def field(points: np.ndarray, values: np.ndarray = values) -> np.ndarray:
            found: np.ndarray = values[tuple(np.rint(points).astype(int).T)]
            return found

        mesh = extract_mesh(field, shape, np.eye(4), labels=labels, refine_steps=0)
        assert mesh.is_watertight


@pytest.mark.parametrize("slab", [2**22, 3000])
def test_slabs_join_without_a_seam(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = extract_mesh(torus, SHAPE, np.eye(4))
    monkeypatch.setattr(ossnet.field.mesh.isosurface, "_SLAB", slab)
    mesh = extract_mesh(torus, SHAPE, np.eye(4))
    assert mesh.is_watertight
    assert len(mesh.vertices) == len(whole.vertices)
    assert mesh.volume == pytest.approx(whole.volume)


def test_only_the_neighbourhood_of_the_surface_is_asked() -> None:
    asked = 0

    def counting(points: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += len(points)
        assert (points >= 0).all()
        assert (points <= np.array(SHAPE) - 1).all()
        return ellipsoid(points)

    labels = (ellipsoid(np.argwhere(np.ones(SHAPE))) > 0).reshape(SHAPE).astype(np.uint8)
    mesh = extract_mesh(counting, SHAPE, np.eye(4), labels=labels)
    assert asked < 8 * len(mesh.vertices)
    assert asked < 0.5 * labels.size


def test_torch_functions_and_neighbouring_structures() -> None:
    """Two halves of an ellipsoid share the plane between them."""

    def halves(points: Any) -> torch.Tensor:
        body = torch.from_numpy(ellipsoid(points))
        side = torch.from_numpy(points[:, 0]) - 27.5
        return torch.stack((-body, torch.minimum(body, side), torch.minimum(body, -side)), dim=1)

    meshes = [extract_mesh(halves, SHAPE, OBLIQUE, label=label, classes=3) for label in (1, 2)]
    whole = extract_mesh(ellipsoid, SHAPE, OBLIQUE)
    assert all(m.is_watertight and m.volume > 0 for m in meshes)
    assert sum(m.volume for m in meshes) == pytest.approx(whole.volume, rel=0.02)


def test_the_papers_refinement_moves_vertices_towards_the_surface() -> None:
    def shifted(points: np.ndarray) -> np.ndarray:
        return ellipsoid(points) - 0.3

    labels = (ellipsoid(np.argwhere(np.ones(SHAPE))) > 0).reshape(SHAPE).astype(np.uint8)
    options = {"labels": labels, "faces": 1500}
    before = extract_mesh(shifted, SHAPE, np.eye(4), refine_steps=0, **options)
    after = extract_mesh(
        shifted, SHAPE, np.eye(4), gradient=ellipsoid_gradient, refinement="paper", refine_steps=60, **options
    )
    assert after.is_watertight
    assert distance(shifted, after, np.eye(4)).mean() < 0.9 * distance(shifted, before, np.eye(4)).mean()
    assert np.linalg.norm(after.vertices - before.vertices, axis=1).max() < 0.6


def test_small_parts_are_dropped_on_request() -> None:
    mask = np.zeros((20, 20, 20), dtype=bool)
    mask[2:8, 2:8, 2:8] = True
    mask[12:14, 12:14, 12:14] = True
    assert drop_small_parts(mask, 9).sum() == 216
    assert drop_small_parts(mask, 8).sum() == 224

    def field(points: np.ndarray) -> np.ndarray:
        return 2.0 * mask[tuple(np.rint(points).astype(int).T)] - 1

    assert extract_mesh(field, mask.shape, np.eye(4), min_voxels=10, labels=mask.astype(int)).body_count == 1
    assert extract_mesh(field, mask.shape, np.eye(4), labels=mask.astype(int)).body_count == 2


def test_an_absent_structure_gives_an_empty_mesh() -> None:
    mesh = extract_mesh(lambda p: -np.ones(len(p)), (9, 9, 9), np.eye(4), smooth=2, faces=10)
    assert mesh.is_empty


def test_two_sheets_joined_along_an_edge_are_parted() -> None:
    one = trimesh.creation.box()
    other = trimesh.creation.box()
    other.apply_translation([1, 1, 0])
    both = trimesh.util.concatenate([one, other])
    both.merge_vertices()
    assert not both.is_watertight
    points, triangles = split_pinched_edges(both.vertices, both.faces)
    parted = trimesh.Trimesh(points, triangles, process=False)
    assert parted.is_watertight
    assert parted.volume == pytest.approx(2)
    again = split_pinched_edges(one.vertices, one.faces)
    assert (again[1] == one.faces).all()


@pytest.mark.parametrize("ending", ["stl", "ply", "obj", "glb"])
def test_files_hold_the_same_surface(ending: str, tmp_path: Path) -> None:
    mesh = extract_mesh(torus, SHAPE, OBLIQUE)
    path = tmp_path / f"torus.{ending}"
    save_mesh(mesh, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    back = trimesh.load(path, force="mesh")
    assert back.volume == pytest.approx(mesh.volume, rel=1e-4)
    np.testing.assert_allclose(back.bounds, mesh.bounds, rtol=1e-4)
    assert back.is_watertight
    # 3D Slicer takes meshes that do not say so for LPS.
    assert ending == "glb" or b"SPACE=RAS" in path.read_bytes()[:200]


def test_settings_without_meaning_are_refused(tmp_path: Path) -> None:
    for options in (
        {"batch": 0},
        {"labels": np.zeros((3, 3, 3), dtype=int)},
        {"label": 0},
        {"faces": 2},
        {"smooth": -1},
        {"refine_steps": -1},
        {"label": 2},
    ):
        with pytest.raises(SettingsError):
            extract_mesh(ellipsoid, SHAPE, np.eye(4), **options)
    with pytest.raises(SettingsError, match="labels"):
        extract_mesh(lambda p: (ellipsoid(p) > 0).astype(int), SHAPE, np.eye(4))
    with pytest.raises(InputError, match=r"\.glb"):
        save_mesh(trimesh.creation.box(), tmp_path / "box.vtk")


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(SettingsError, match=r"ossnet\[mesh\]"):
        extract_mesh(torus, SHAPE, np.eye(4))


def test_the_example_runs() -> None:
    failed, tried = doctest.testmod(ossnet.field.mesh.extract)
    assert tried > 0
    assert failed == 0


def test_a_structure_is_given_by_its_label_or_its_name() -> None:
    # Teeth have numbers for names.
    model = replace(tiny.model("multiscale", 3), label_names={1: "11", 2: "1"})
    assert [model.label_of(given) for given in (1, 2, "11", "1", "2")] == [1, 2, 1, 2, 2]
    for unknown in (11, 0, "0", "molar"):
        with pytest.raises(SettingsError, match="none of this model's"):
            model.label_of(unknown)


def test_options_are_checked_before_the_scan_is_segmented(monkeypatch: pytest.MonkeyPatch) -> None:
    field = tiny.model("multiscale").field(tiny.scan())
    monkeypatch.setattr(Field, "segment", lambda *_: pytest.fail("it was segmented"))
    with pytest.raises(SettingsError, match="there is no option foo"):
        field.mesh(1, foo=1)
    with pytest.raises(SettingsError, match="min_voxels: is -1"):
        field.mesh(1, min_voxels=-1)

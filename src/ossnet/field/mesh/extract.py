"""Surfaces of a field as triangle meshes in world millimetres.

Marching cubes on the label map's narrow band (`field.mesh.isosurface`), vertices moved onto the level set where
the structure is as probable as not (`field.mesh.projection`), optional smoothing and simplification.
"""

from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Integer

from ossnet.errors import InputError, SettingsError
from ossnet.field.components import connected_parts
from ossnet.field.mesh.isosurface import Surface, bounding_box, marching_cubes, narrow_band, outward
from ossnet.field.mesh.projection import along_edges, along_gradient, central_differences, paper_refinement
from ossnet.field.octree.refinement import refine
from ossnet.files.atomic import write_bytes

if TYPE_CHECKING:
    import trimesh

Triple = tuple[int, int, int]
MeshRefinement = Literal["projection", "paper"]
_BAND_BYTES = 1000
"""Measured, for each voxel on either side of a surface: vertices, triangles, and places on the way to the surface."""
_SLABS_BYTES = 16_000_000
MESH_FORMATS = ("stl", "ply", "obj", "glb")


def extract_mesh(
    function: Callable[[Any], Any],
    shape: Triple,
    affine: Float[np.ndarray, "4 4"],
    *,
    labels: Integer[np.ndarray, "X Y Z"] | None = None,
    label: int = 1,
    classes: int = 2,
    gradient: Callable[[Any], Any] | None = None,
    faces: int | None = None,
    smooth: int = 0,
    refinement: MeshRefinement = "projection",
    refine_steps: int | None = None,
    min_voxels: int = 0,
    batch: int = 2**16,
) -> "trimesh.Trimesh":
    """The closed surface of one structure, in world mm, oriented outward.

    >>> import numpy as np
    >>> def ball(points):
    ...     return 10.2 - np.linalg.norm(points - 16.0, axis=1)
    >>> mesh = extract_mesh(ball, (32, 32, 32), np.diag([0.5, 0.5, 0.5, 1.0]))
    >>> mesh.is_watertight, round(mesh.volume), round(4 / 3 * np.pi * 5.1**3)
    (True, 553, 556)

    Args:
        function: Takes (N, 3) voxel indices, float64 and off the grid too, and returns (N,) logits or (N, K)
            logits of K classes, background first, as numpy or torch. Locations stay within the volume.
        shape: Voxels along X, Y, Z.
        affine: Voxel index → world mm.
        labels: The label map if it is known already; otherwise the octree finds it.
        label: Which structure.
        classes: Number of classes, background included; used when there are no labels.
        gradient: Gradient (N, 3) with respect to the voxel index of what `function` returns for the structure
            (with K classes: of its logit minus the largest other one); None: central differences.
        faces: Simplify to about this many triangles (quadric error, fast-simplification).
        smooth: Rounds of Taubin smoothing. It evens out the triangles; the projection after it brings the
            vertices back onto the surface, without projection (`refine_steps=0`) the surface itself gets
            smoother.
        refinement: "projection": vertices are moved onto the level set, first along the voxel edges that they
            lie on and, after smoothing or simplification, along the gradient. "paper": the paper's RMSprop
            steps.
        refine_steps: Field values asked for each vertex at most (projection, default 8) or steps (paper,
            default 200); 0 leaves the vertices of marching cubes where linear interpolation puts them.
        min_voxels: Drop 6-connected parts of fewer voxels (the released code: 1728).
        batch: Locations for one call of the function.

    Returns:
        The mesh; empty when the structure is. Where the structure leaves the volume, the mesh is closed half
        a voxel beyond the outermost voxel centres.

    Raises:
        SettingsError: For settings that have no meaning, or when the extra `mesh` is not installed.
    """
    check_mesh_options(
        faces,
        smooth,
        refinement=refinement,
        refine_steps=refine_steps,
        min_voxels=min_voxels,
        batch=batch,
        gradient=gradient,
    )
    _check_labels(shape, labels, label, classes)
    steps = refine_steps if refine_steps is not None else (200 if refinement == "paper" else 8)
    values = _structure_values(function, label, np.array(shape), batch)
    slope = (
        _gradient_of(gradient, np.array(shape), batch)
        if gradient is not None
        else central_differences(values)
    )
    if labels is None:
        labels = refine(function, shape, classes=classes, batch=batch).labels
    x, y, z = bounding_box(labels, label) or (slice(0, 1),) * 3
    mask = labels[x, y, z] == label
    if min_voxels:
        mask = drop_small_parts(mask, min_voxels)

    surface = marching_cubes(mask, values, (x.start, y.start, z.start), shape)
    points, triangles, fixed = surface.vertices, surface.faces, surface.fixed
    project = refinement == "projection" and steps > 0
    if project and len(points):
        points[~fixed] = along_edges(values, points[~fixed], steps)
    changed = False
    if smooth and len(points):
        points, changed = _taubin(surface, points, smooth), True
    if faces is not None and faces < len(triangles):
        points, triangles = _simplified(points, triangles, faces)
        changed = True
        fixed = ((points < -1e-3) | (points > np.array(shape) - 1 + 1e-3)).any(axis=1)
    if project and changed:
        points[~fixed] = along_gradient(values, slope, points[~fixed], steps)
    elif refinement == "paper" and steps and len(points):
        points = paper_refinement(values, slope, points, triangles, fixed, steps)

    world = points @ affine[:3, :3].T.astype(np.float64) + affine[:3, 3]
    mesh = _trimesh().Trimesh(vertices=world, faces=outward(world, triangles), process=False)
    mesh.units = "mm"
    return cast("trimesh.Trimesh", mesh)


def mesh_bytes(labels: Integer[np.ndarray, "X Y Z"], label: int, min_voxels: int = 0) -> int:
    """What `extract_mesh` takes beside the labels: the structure's box, slabs of it, vertices and triangles.

    Args:
        min_voxels: As for `extract_mesh`: small parts are looked for.
    """
    box = bounding_box(labels, label)
    if box is None:
        return 0
    mask = np.asarray(labels[box] == label)
    each = 2 if not min_voxels else 8
    return int(each * mask.size + _BAND_BYTES * len(narrow_band(mask)) + _SLABS_BYTES)


_SPACE, _STL_HEADER = b"ossnet SPACE=RAS", 80


def save_mesh(mesh: "trimesh.Trimesh", path: Path | str) -> None:
    """Write a mesh as STL, PLY, OBJ or GLB, by the ending of the path, atomically.

    STL, PLY and OBJ say in a comment that their axes point right, anterior, superior (`SPACE=RAS`), as 3D Slicer writes
    and reads it: without, it takes meshes for left, posterior, superior, and shows them turned.

    Raises:
        InputError: If the ending is another.
        ResourceError: If the disk is full or cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in MESH_FORMATS:
        endings = ", ".join(f".{f}" for f in MESH_FORMATS)
        raise InputError(path, "is not a mesh file that can be written", f"Choose one of {endings}")
    data: Any = mesh.export(file_type=kind)
    content = data.encode("utf-8") if isinstance(data, str) else bytes(data)
    if kind == "stl":
        content = _SPACE.ljust(_STL_HEADER, b"\0") + content[_STL_HEADER:]
    elif kind == "ply":
        first, rest = content.split(b"\n", 1)
        form, rest = rest.split(b"\n", 1)
        content = b"\n".join([first, form, b"comment " + _SPACE, rest])
    elif kind == "obj":
        content = b"# " + _SPACE + b"\n" + content
    write_bytes(path, content)


def drop_small_parts(mask: Any, voxels: int) -> Any:
    """The mask (X, Y, Z) without its 6-connected parts of fewer voxels."""
    parts, sizes = connected_parts(mask)
    return (sizes >= voxels)[parts] & mask


def check_mesh_options(
    faces: int | None = None,
    smooth: int = 0,
    *,
    refinement: str = "projection",
    refine_steps: int | None = None,
    min_voxels: int = 0,
    batch: int = 1,
    gradient: Callable[[Any], Any] | None = None,
) -> None:
    """Refuse options of `extract_mesh` that have no meaning, and all of them without the extra `mesh`.

    Raises:
        SettingsError: So.
    """
    _trimesh()
    for name, count, least in (
        ("faces", 4 if faces is None else faces, 4),
        ("smooth", smooth, 0),
        ("refine_steps", 0 if refine_steps is None else refine_steps, 0),
        ("min_voxels", min_voxels, 0),
        ("batch", batch, 1),
    ):
        if not isinstance(count, Integral) or count < least:
            raise SettingsError(name, f"is {count!r}", f"Give a whole number, at least {least}")
    if gradient is not None and not callable(gradient):
        raise SettingsError("gradient", f"is a {type(gradient).__name__}", "Give a function")
    if refinement not in get_args(MeshRefinement):
        names = ", ".join(get_args(MeshRefinement))
        raise SettingsError("refinement", f"{refinement!r} is not known", f"Choose one of {names}")


def _check_labels(
    shape: Triple, labels: Integer[np.ndarray, "X Y Z"] | None, label: int, classes: int
) -> None:
    if labels is not None and labels.shape != shape:
        raise SettingsError(
            "labels", f"have shape {labels.shape}, the volume {shape}", "Pass those of this volume"
        )
    if label < 1 or (labels is None and label >= classes):
        raise SettingsError("label", f"is {label} of {classes} classes", "Give a structure; 0 is background")


def _structure_values(
    function: Callable[[Any], Any], label: int, shape: Any, batch: int
) -> Callable[[Any], Any]:
    """The logit of one structure against everything else, at (N, 3) points: above 0 inside."""

    def values(points: Any) -> Any:
        points = np.clip(points, 0, shape - 1)
        out = np.empty(len(points))
        for i in range(0, len(points), batch):
            answers = _as_numpy(function(points[i : i + batch]))
            if answers.ndim == 2 and label < answers.shape[1]:
                others = np.delete(answers, label, axis=1)
                answers = answers[:, label] - others.max(axis=1)
            elif answers.ndim != 1 or label != 1:
                raise SettingsError(
                    "function",
                    f"answered shape {answers.shape} for structure {label}",
                    "Return (N,) or (N, K) logits",
                )
            if answers.dtype.kind != "f":
                raise SettingsError("function", "answered labels, a surface needs values", "Return logits")
            out[i : i + batch] = answers
        return out

    return values


def _gradient_of(gradient: Callable[[Any], Any], shape: Any, batch: int) -> Callable[[Any], Any]:
    def slope(points: Any) -> Any:
        points = np.clip(points, 0, shape - 1)
        parts = [_as_numpy(gradient(points[i : i + batch])) for i in range(0, len(points), batch)]
        return np.concatenate(parts).astype(np.float64) if parts else np.empty((0, 3))

    return slope


def _as_numpy(answers: Any) -> Any:
    if isinstance(answers, torch.Tensor):
        answers = answers.detach().cpu()
        return (answers.float() if answers.is_floating_point() else answers).numpy()
    return np.asarray(answers)


def _trimesh() -> Any:
    try:
        import fast_simplification  # noqa: F401
        import trimesh
    except ImportError as error:
        raise SettingsError("mesh", f"needs {error.name}", "pip install 'ossnet[mesh]'") from error
    return trimesh


def _taubin(surface: Surface, points: Any, rounds: int) -> Any:
    """Taubin smoothing; the caps at the end of the volume stay flat."""
    trimesh = _trimesh()
    mesh = trimesh.Trimesh(vertices=points, faces=surface.faces, process=False)
    trimesh.smoothing.filter_taubin(mesh, lamb=0.5, nu=0.53, iterations=2 * rounds)
    return np.where(surface.fixed[:, None], points, np.asarray(mesh.vertices))


def _simplified(points: Any, triangles: Any, faces: int) -> tuple[Any, Any]:
    """Fewer triangles by quadric error: as near to the wish as the surface stays closed."""
    import fast_simplification

    trimesh = _trimesh()
    # Gentle first: the more aggressive, the fewer triangles can be reached and the coarser the choice of
    # edges.
    for aggression in (5, 7, 9):
        fewer, kept = fast_simplification.simplify(
            points.astype(np.float32), triangles.astype(np.int32), target_count=faces, agg=aggression
        )
        mesh = trimesh.Trimesh(*split_pinched_edges(fewer, kept), process=False)
        mesh.remove_unreferenced_vertices()
        if mesh.is_watertight and len(mesh.faces) < len(triangles):
            points = np.asarray(mesh.vertices, dtype=np.float64)
            triangles = np.asarray(mesh.faces, dtype=np.int64)
        if len(triangles) <= 1.02 * faces:
            break
    return points, triangles


def split_pinched_edges(points: Any, triangles: Any) -> tuple[Any, Any]:
    """Part two sheets of a closed surface that were joined along an edge, where four triangles now meet.

    One end of the edge is doubled: the triangles around it form two closed fans that share the edge, and one
    fan gets the double.

    Args:
        points: (V, 3) vertices.
        triangles: (F, 3) consistently oriented.

    Returns:
        Vertices, with doubles at the end, and triangles.
    """
    points, triangles = np.asarray(points), np.array(triangles)
    edges = np.sort(triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    unique, counts = np.unique(edges, axis=0, return_counts=True)
    doubles: list[int] = []
    for end, other in unique[counts == 4]:
        around = np.flatnonzero((triangles == end).any(axis=1))
        # Each triangle of the fan leads from one neighbour of `end` to the next.
        column = (triangles[around] == end).argmax(axis=1)
        start = triangles[around, (column + 1) % 3]
        stop = triangles[around, (column + 2) % 3]
        fan: list[int] = []
        at = other
        while len(fan) < len(around):
            onward = [i for i in np.flatnonzero(start == at) if i not in fan]
            if not onward:
                break
            fan.append(int(onward[0]))
            at = stop[onward[0]]
            if at == other:
                break
        if at == other and 0 < len(fan) < len(around):
            triangles[around[fan], column[fan]] = len(points) + len(doubles)
            doubles.append(int(end))
    return np.concatenate((points, points[doubles])), triangles

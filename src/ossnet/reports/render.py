"""A surface as a shaded picture, without a graphics card. Letters: V vertices, F faces, H W pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer, UInt8
from skimage.measure import marching_cubes

from ossnet.colours import rgb
from ossnet.volume import LabelMap, transform


@dataclass(frozen=True)
class Surface:
    """A triangle mesh to show.

    Attributes:
        name: What it is called on the page.
        vertices: (V, 3) float, world mm (RAS+).
        faces: (F, 3) vertex indices.
        colour: `#rrggbb`.
    """

    name: str
    vertices: Float[np.ndarray, "V 3"]
    faces: Integer[np.ndarray, "F 3"]
    colour: str


def surface_of(labels: LabelMap, label: int, name: str, colour: str, faces: int = 40_000) -> Surface | None:
    """Marching cubes on a label map, rounded off below the voxel, in world mm; None without the label.

    Args:
        faces: Roughly the most faces; more are merged where `fast-simplification` is installed.
    """
    mask = np.pad(labels.data == label, 2).astype(np.float32)
    if not mask.any():
        return None
    from scipy.ndimage import gaussian_filter

    # A binary mask has steps; a blur of under a voxel rounds them and keeps the surface in place. Of what is a voxel
    # thin it leaves less than a half.
    blurred = gaussian_filter(mask, 0.7)
    vertices, triangles, _, _ = marching_cubes(blurred, blurred.max() / 2)  # type: ignore[no-untyped-call]
    vertices, triangles = simplified(vertices, triangles, faces)
    return Surface(name, transform(vertices.astype(np.float64) - 2, labels.affine), triangles, colour)


def simplified(
    vertices: Float[np.ndarray, "V 3"], faces: Integer[np.ndarray, "F 3"], most: int
) -> tuple[Float[np.ndarray, "V2 3"], Integer[np.ndarray, "F2 3"]]:
    """At most about `most` faces, where the package for it is installed."""
    if len(faces) <= most:
        return vertices, faces.astype(np.int64)
    try:
        import fast_simplification
    except ImportError:  # extra "mesh"
        return vertices, faces.astype(np.int64)
    fewer = fast_simplification.simplify(
        vertices.astype(np.float32), faces.astype(np.int32), target_count=most
    )
    return fewer[0].astype(np.float64), fewer[1].astype(np.int64)


def render(
    surfaces: Sequence[Surface],
    width: int = 800,
    height: int = 600,
    view: tuple[float, float] = (35.0, 20.0),
) -> UInt8[np.ndarray, "H W 4"]:
    """Shaded picture with a transparent background, seen without perspective.

    Args:
        surfaces: What is shown, all in the same world.
        width: Pixels.
        height: Pixels.
        view: Degrees from which the viewer looks: to the patient's right of the front, and above.

    Returns:
        (H, W, 4) RGBA.
    """
    scale = 2  # drawn larger, then averaged: smooth edges
    w, h = width * scale, height * scale
    turn = rotation(*view)
    places = [s.vertices @ turn.T for s in surfaces]  # right, up, towards the viewer
    everything = np.concatenate(places)
    low, high = everything.min(axis=0), everything.max(axis=0)
    zoom = 0.94 * min(w / (high[0] - low[0]), h / (high[1] - low[1]))
    depth = np.full(h * w, -np.inf, np.float32)
    colour = np.zeros((h * w, 3), np.float32)
    for surface, place in zip(surfaces, places, strict=True):
        normals = vertex_normals(place, surface.faces)
        x = (place[:, 0] - (low[0] + high[0]) / 2) * zoom + w / 2
        y = h / 2 - (place[:, 1] - (low[1] + high[1]) / 2) * zoom
        points = np.stack([x, y, place[:, 2]], axis=1)
        for pixel, z, normal in _samples(points, normals, surface.faces, w, h):
            _put(depth, colour, pixel, z, _shade(normal, surface.colour))
    image = np.concatenate([colour, np.isfinite(depth)[:, None] * 255.0], axis=1).reshape(h, w, 4)
    image = image.reshape(height, scale, width, scale, 4)
    alpha = image[..., 3:].mean(axis=(1, 3))
    # Colours of covered pixels only, or edges would darken towards the background.
    rgba = np.concatenate([image[..., :3].sum(axis=(1, 3)) * 255 / np.maximum(alpha * 4, 1), alpha], axis=-1)
    return rgba.clip(0, 255).astype(np.uint8)


def rotation(azimuth: float, elevation: float) -> Float[np.ndarray, "3 3"]:
    """World mm (RAS+) to (right, up, towards the viewer), in degrees; (0, 0) looks at the face."""
    a, e = np.deg2rad([azimuth, elevation])
    towards = np.array([np.cos(e) * np.sin(a), np.cos(e) * np.cos(a), np.sin(e)])
    right = np.cross([0.0, 0.0, 1.0], towards)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(towards, right), towards])


def vertex_normals(
    vertices: Float[np.ndarray, "V 3"], faces: Integer[np.ndarray, "F 3"]
) -> Float[np.ndarray, "V 3"]:
    """Unit normals, mean of the faces around each vertex weighted by area."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    cross = np.cross(b - a, c - a)
    count = len(vertices)
    normals = np.stack(
        [sum(np.bincount(faces[:, i], cross[:, axis], count) for i in range(3)) for axis in range(3)], axis=1
    )
    unit: np.ndarray = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return unit


def _samples(
    points: Float[np.ndarray, "V 3"],
    normals: Float[np.ndarray, "V 3"],
    faces: Integer[np.ndarray, "F 3"],
    width: int,
    height: int,
) -> list[tuple[Integer[np.ndarray, " N"], Float[np.ndarray, " N"], Float[np.ndarray, "N 3"]]]:
    """Pixels of all triangles: triangles of similar size are filled together on one barycentric grid."""
    corners = points[faces]  # (F, 3, 3)
    edges = corners[:, 1:, :2] - corners[:, :1, :2]
    # Of closed surfaces only what faces the viewer is seen, whichever way round the mesh is.
    turned = np.sign(edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0])
    facing = turned * np.sign(signed_volume(points, faces)) > 0
    faces, corners = faces[facing], corners[facing]
    longest = np.linalg.norm(corners[:, :, :2] - np.roll(corners[:, :, :2], 1, axis=1), axis=2).max(axis=1)
    steps = np.maximum(np.ceil(longest * 1.1), 1).astype(int)
    out = []
    for n in np.unique(steps):
        i, j = np.mgrid[: n + 1, : n + 1]
        inside = i + j <= n
        weights = np.stack([i[inside], j[inside], n - i[inside] - j[inside]], axis=1) / n  # (S, 3)
        group = np.flatnonzero(steps == n)
        for part in np.array_split(group, max(1, len(group) * len(weights) // 4_000_000)):
            place = (weights @ corners[part]).reshape(-1, 3)
            normal = (weights @ normals[faces[part]]).reshape(-1, 3)
            x = place[:, 0].astype(int).clip(0, width - 1)
            y = place[:, 1].astype(int).clip(0, height - 1)
            out.append((y * width + x, place[:, 2], normal))
    return out


def signed_volume(points: Float[np.ndarray, "V 3"], faces: Integer[np.ndarray, "F 3"]) -> float:
    """Six times the enclosed volume; its sign is the mesh's winding."""
    a, b, c = (points[faces[:, i]] for i in range(3))
    return float(np.einsum("fd,fd->", a, np.cross(b, c)))


def _put(
    depth: Float[np.ndarray, " P"],
    colour: Float[np.ndarray, "P 3"],
    pixel: Integer[np.ndarray, " N"],
    z: Float[np.ndarray, " N"],
    shade: Float[np.ndarray, "N 3"],
) -> None:
    """The nearest sample of each pixel wins."""
    order = np.argsort(z, kind="stable")  # the last write to a pixel stays
    pixel, z, shade = pixel[order], z[order], shade[order]
    near = z > depth[pixel]
    depth[pixel[near]] = z[near]
    colour[pixel[near]] = shade[near]


def _shade(normal: Float[np.ndarray, "N 3"], ink: str) -> Float[np.ndarray, "N 3"]:
    """Diffuse light from the upper left, a weak one from the right, a highlight, darker edges."""
    normal = normal * np.sign(normal[:, 2:])  # what is seen faces the viewer
    lights = ((np.array([-0.5, 0.65, 0.6]), 0.75), (np.array([0.8, 0.1, 0.5]), 0.22))
    light = np.full(len(normal), 0.2)
    for direction, strength in lights:
        light += strength * (normal @ (direction / np.linalg.norm(direction))).clip(0)
    half = np.array([-0.5, 0.65, 1.6])
    shine = 0.25 * (normal @ (half / np.linalg.norm(half))).clip(0) ** 24
    light *= 0.55 + 0.45 * normal[:, 2].clip(0, 1) ** 0.5
    shaded: np.ndarray = np.array(rgb(ink)) * light[:, None] + 255 * shine[:, None]
    return shaded.clip(0, 255)

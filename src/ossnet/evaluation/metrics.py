"""Scores of one label map against another, per class. Letters: X Y Z voxels, S surface elements, T triangles.

Definitions (public tools disagree on surface distances, so ours are spelled out):

- *Surface*: marching-cubes triangles (level 0.5) of the mask, brought to world mm by the affine, sheared ones
  included. Outside of the image is background, so a structure cut by the image's edge has a surface there.
  Ambiguous cubes take the smaller surface, and cubes that can be cut in several ways the mean over all
  orientations, so that no score depends on the order in which voxels are stored.
- *Surface element*: what lies of it inside one cube of 2×2×2 neighbouring voxel centres; its place is the
  centroid of its triangles in mm, its weight their area in mm².
- *Distance* of an element: to the nearest element of the other surface, in mm.
- *HD95*: for each direction the smallest distance that at least 95 % of the area does not exceed; the larger
  of the two directions.
- *ASSD*: the distances of both surfaces averaged over the area of both together.
- *Surface Dice*: the part of the area of both surfaces that lies within the tolerance of the other one.

Elements are those of Nikolov et al. 2018 (arXiv:1809.04430), whose tool measures from the centres of the
cubes instead. Centres lie up to 0.87 voxels off the surface, on either side of it: between balls of radius 29
and 30 voxels they give an ASSD of 0.75 voxels, centroids 0.99.

When a structure is empty (the rule is also `EMPTY_RULE`, printed with every table):

- in both maps: no score is defined, and means leave the case out ("absent");
- in one map only ("missed" or "invented"): Dice, IoU and surface Dice are 0, both distances are the
  diagonal of the scan, the largest distance that could occur. Leaving the case out would reward the miss.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from scipy.ndimage import find_objects
from scipy.spatial import KDTree
from skimage.measure import marching_cubes

from ossnet.errors import SettingsError, VolumeError
from ossnet.volume import Affine, Orientation

EMPTY_RULE = (
    "A structure empty in both maps has no score and is left out of the means (absent). Empty in one map "
    "only (missed, invented): overlaps are 0 and distances are the diagonal of the scan."
)
DISTANCE_RULE = (
    "Distances in mm between marching-cubes surfaces, weighted by area; HD95 is the larger of the two "
    "directed 95th percentiles."
)

Outcome = Literal["scored", "absent", "missed", "invented"]
Box = tuple[slice, slice, slice]
Label = int | tuple[int, ...]
"""A class, or the classes of a region that is judged as one."""

_HIGHEST = 2**16
"""Labels above are numbered before their boxes are sought: memory grows with the numbers, and atlases go far up."""


@dataclass(frozen=True)
class Scores:
    """One class of one case. None where a score is not defined.

    Attributes:
        dice: 2|P∩R| / (|P| + |R|) over voxels.
        iou: |P∩R| / |P∪R| over voxels.
        hd95_mm: 95th percentile of the surface distances, mm.
        assd_mm: Average symmetric surface distance, mm.
        surface_dice: Surface Dice at the tolerance asked for.
        volume_difference_ml: Prediction minus reference, ml.
        volume_difference_percent: The same in % of the reference; None where that is empty.
        prediction_ml: Volume of the prediction, ml.
        reference_ml: Volume of the reference, ml.
        outcome: "scored", or which map is empty: "absent" (both), "missed" (prediction), "invented"
            (reference).
    """

    dice: float | None
    iou: float | None
    hd95_mm: float | None
    assd_mm: float | None
    surface_dice: float | None
    volume_difference_ml: float
    volume_difference_percent: float | int | None
    prediction_ml: float
    reference_ml: float
    outcome: Outcome


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances between two surfaces, both directions.

    Attributes:
        distances: (S,) mm from each element of the prediction (then of the reference) to the other surface.
        areas: (S,) mm², the weight of each element.
    """

    distances: tuple[Float[np.ndarray, " S1"], Float[np.ndarray, " S2"]]
    areas: tuple[Float[np.ndarray, " S1"], Float[np.ndarray, " S2"]]

    def percentile(self, percent: float | int) -> float:
        """The larger of the two directed percentiles, by area, in mm (100: the Hausdorff distance)."""
        pairs = zip(self.distances, self.areas, strict=True)
        return max(_weighted_percentile(distances, areas, percent) for distances, areas in pairs)

    def mean(self) -> float:
        """Average symmetric surface distance in mm."""
        weighted = sum(float(d @ a) for d, a in zip(self.distances, self.areas, strict=True))
        return weighted / sum(float(a.sum()) for a in self.areas)

    def overlap(self, tolerance_mm: float | int) -> float:
        """Surface Dice: share of the area within `tolerance_mm` of the other surface."""
        pairs = zip(self.distances, self.areas, strict=True)
        # Distances are sums of rounded products: a site exactly at the tolerance counts as within.
        within = sum(float(a[d <= tolerance_mm * (1 + 1e-9)].sum()) for d, a in pairs)
        return within / sum(float(a.sum()) for a in self.areas)


def compare(
    prediction: Integer[np.ndarray, "X Y Z"] | Bool[np.ndarray, "X Y Z"],
    reference: Integer[np.ndarray, "X Y Z"] | Bool[np.ndarray, "X Y Z"],
    affine: Affine,
    classes: Iterable[Label],
    tolerance_mm: float | int = 1.0,
) -> dict[Label, Scores]:
    """Score one label map against another on the same grid.

    Args:
        prediction: (X, Y, Z) labels to judge.
        reference: (X, Y, Z) labels taken as true.
        affine: 4×4, voxel index → world mm, of both; any invertible one. With `numpy.eye(4)` distances are
            in voxels.
        classes: Label values to score, all above 0; several of them together for a region.
        tolerance_mm: Of the surface Dice.

    Returns:
        Label value → scores, in the order of `classes`.

    Raises:
        VolumeError: The grids differ, or the affine is singular.
        SettingsError: A class is not above 0, or the tolerance is negative or not finite.
    """
    prediction, reference = (m.view(np.uint8) if m.dtype == bool else m for m in (prediction, reference))
    if prediction.shape != reference.shape:
        raise VolumeError(
            "prediction",
            f"its shape {prediction.shape} is not the reference's {reference.shape}",
            "Compare label maps of the same scan on the same grid",
        )
    if not (np.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise SettingsError("tolerance", f"it is {tolerance_mm} mm", "Give 0 or more millimetres")
    wanted: list[Label] = list(dict.fromkeys(c if isinstance(c, tuple) else int(c) for c in classes))
    values = sorted({value for label in wanted for value in _values(label)})
    if any(value <= 0 for value in values):
        raise SettingsError(
            "classes", f"{values[0]} is not a structure", "Give label values above 0; 0 is background"
        )
    linear = np.asarray(affine, dtype=np.float64)[:3, :3]
    if not np.isfinite(linear).all() or np.linalg.det(linear) == 0:
        raise VolumeError("affine", "it is not invertible", "Rewrite the header with a valid sform or qform")

    boxes = _boxes(prediction, values), _boxes(reference, values)
    worst = diagonal_mm(prediction.shape, linear)
    scores: dict[Label, Scores] = {}
    for label in wanted:
        box: Box | None = None
        for found, value in product(boxes, _values(label)):
            box = _union(box, found.get(value))
        if box is None:
            scores[label] = Scores(None, None, None, None, None, 0.0, None, 0.0, 0.0, "absent")
        else:
            one, other = _mask(prediction[box], label), _mask(reference[box], label)
            scores[label] = _compare_masks(one, other, linear, tolerance_mm, worst)
    return scores


def _compare_masks(
    prediction: Bool[np.ndarray, "X Y Z"],
    reference: Bool[np.ndarray, "X Y Z"],
    linear: Float[np.ndarray, "3 3"],
    tolerance_mm: float | int,
    worst_mm: float,
) -> Scores:
    """Scores of two masks of which at least one is not empty."""
    voxel_ml = abs(float(np.linalg.det(linear))) / 1000
    p, r = int(prediction.sum()), int(reference.sum())
    volumes = {
        "volume_difference_ml": (p - r) * voxel_ml,
        "volume_difference_percent": 100 * (p - r) / r if r else None,
        "prediction_ml": p * voxel_ml,
        "reference_ml": r * voxel_ml,
    }
    if p == 0 or r == 0:
        outcome: Outcome = "missed" if p == 0 else "invented"
        return Scores(0.0, 0.0, worst_mm, worst_mm, 0.0, **volumes, outcome=outcome)  # type: ignore[arg-type]
    both = int((prediction & reference).sum())
    surface = surface_distances(prediction, reference, linear)
    return Scores(
        dice=2 * both / (p + r),
        iou=both / (p + r - both),
        hd95_mm=surface.percentile(95),
        assd_mm=surface.mean(),
        surface_dice=surface.overlap(tolerance_mm),
        **volumes,  # type: ignore[arg-type]
        outcome="scored",
    )


def surface_distances(
    prediction: Bool[np.ndarray, "X Y Z"],
    reference: Bool[np.ndarray, "X Y Z"],
    linear: Float[np.ndarray, "3 3"],
) -> SurfaceDistances:
    """Distances between the surfaces of two masks, neither empty.

    Args:
        prediction: (X, Y, Z).
        reference: (X, Y, Z).
        linear: 3×3 part of the affine, voxel steps in mm as columns.
    """
    areas_of, centroids_of = _elements(linear)
    codes = [_codes(mask) for mask in (prediction, reference)]
    sites = [np.flatnonzero((c != 0) & (c != 255)) for c in codes]
    kinds = [c.ravel()[s] for c, s in zip(codes, sites, strict=True)]
    # (S, 3) mm, both from the same corner
    points = [
        np.stack(np.unravel_index(s, codes[0].shape), axis=1) @ linear.T + centroids_of[k]
        for s, k in zip(sites, kinds, strict=True)
    ]
    distances = []
    for own, other in ((0, 1), (1, 0)):
        # In a good prediction most elements lie on both surfaces, and need no search.
        apart = codes[other].ravel()[sites[own]] != kinds[own]
        distance = np.zeros(len(sites[own]))
        if apart.any():
            # A tree in mm is exact for every affine; a distance transform would need orthogonal axes.
            # Sliding-midpoint splits build far faster on lattice points than medians, and search as well.
            tree = KDTree(points[other], balanced_tree=False, compact_nodes=False)
            distance[apart] = tree.query(points[own][apart], workers=-1)[0]
        distances.append(distance)
    return SurfaceDistances((distances[0], distances[1]), (areas_of[kinds[0]], areas_of[kinds[1]]))


def diagonal_mm(shape: tuple[int, ...], linear: Float[np.ndarray, "3 3"]) -> float:
    """The largest distance in mm between two corners of the outermost voxels of a grid."""
    steps = np.array(list(product((-1, 1), repeat=3))) * np.array(shape)
    return float(np.linalg.norm(steps @ linear.T, axis=1).max())


def _codes(mask: Bool[np.ndarray, "X Y Z"]) -> UInt8[np.ndarray, "X+1 Y+1 Z+1"]:
    """For each 2×2×2 cube the corners inside the mask, one bit each (bit 4i + 2j + k is corner (i, j, k))."""
    padded = np.pad(mask, 1).view(np.uint8)
    x, y, z = (n + 1 for n in mask.shape)
    codes = np.zeros((x, y, z), np.uint8)
    for bit, (i, j, k) in enumerate(product((0, 1), repeat=3)):
        codes |= padded[i : i + x, j : j + y, k : k + z] << np.uint8(bit)
    return codes


@cache
def _triangles() -> tuple[Float[np.ndarray, "256 T 3"], Float[np.ndarray, "256 T 3"]]:
    """Area vectors and centroids, in voxels from corner (0, 0, 0), of each code's triangles, zero-padded.

    An area vector is half the cross product of two edges, here over 48: each code holds the triangles that
    marching cubes finds for it in the 48 orientations of the cube.
    """
    plain = [_triangles_of(code) for code in range(256)]
    unit = [float(np.linalg.norm(vectors, axis=1).sum()) for vectors, _ in plain]
    # Ambiguous cubes (corners that touch along a diagonal) can be read as joined or as apart. Of the two the
    # smaller surface is taken, which makes a mask and its complement have the same surface.
    plain = [plain[code if unit[code] <= unit[255 - code] else 255 - code] for code in range(256)]

    bits = 1 << np.arange(8).reshape(2, 2, 2)
    turned: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(256)]
    for axes, flips in product(permutations(range(3)), product((False, True), repeat=3)):
        turn = Orientation((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))
        back = turn.matrix((2, 2, 2))
        for code in range(256):
            vectors, centroids = plain[int(((turn.apply(bits) & code) > 0).ravel() @ bits.ravel())]
            turned[code].append((vectors @ back[:3, :3].T / 48, centroids @ back[:3, :3].T + back[:3, 3]))
    merged = [[np.concatenate([pair[i] for pair in pairs]) for i in (0, 1)] for pairs in turned]
    most = max(len(vectors) for vectors, _ in merged)
    vectors, centroids = (
        np.stack([np.pad(pair[i], ((0, most - len(pair[i])), (0, 0))) for pair in merged]) for i in (0, 1)
    )
    return vectors, centroids


def _triangles_of(code: int) -> tuple[Float[np.ndarray, "T 3"], Float[np.ndarray, "T 3"]]:
    """Area vectors and centroids of the marching-cubes triangles inside one cube."""
    if code in (0, 255):
        return np.zeros((0, 3)), np.zeros((0, 3))
    cube = np.array([code >> bit & 1 for bit in range(8)], np.float32).reshape(2, 2, 2)
    corners, faces, _, _ = marching_cubes(cube, 0.5, method="lorensen")  # type: ignore[no-untyped-call]
    a, b, c = corners[faces].astype(np.float64).transpose(1, 0, 2)
    return np.cross(b - a, c - a) / 2, (a + b + c) / 3


def _elements(
    linear: Float[np.ndarray, "3 3"],
) -> tuple[Float[np.ndarray, "256"], Float[np.ndarray, "256 3"]]:
    """For each code the area in mm² of the surface inside the cube, and its centroid in mm from corner 0."""
    vectors, centroids = _triangles()
    # Area vectors follow the cofactor matrix: (A a) × (A b) = det(A) A⁻ᵀ (a × b).
    cofactor = np.linalg.det(linear) * np.linalg.inv(linear).T
    areas = np.linalg.norm(vectors @ cofactor.T, axis=2)  # (256, T)
    total = areas.sum(axis=1)
    weights = areas / np.where(total > 0, total, 1)[:, None]
    return total, np.einsum("nt,ntd->nd", weights, centroids) @ linear.T


def _weighted_percentile(
    distances: Float[np.ndarray, " S"], areas: Float[np.ndarray, " S"], percent: float | int
) -> float:
    """The smallest distance that at least `percent` % of the area does not exceed."""
    order = np.argsort(distances)
    reached = np.cumsum(areas[order])
    # The last sum is the whole by construction, whatever was lost in rounding.
    position = np.searchsorted(reached, percent / 100 * reached[-1])
    return float(distances[order[position]])


def _values(label: Label) -> tuple[int, ...]:
    return label if isinstance(label, tuple) else (label,)


def _mask(labels: Integer[np.ndarray, "X Y Z"], label: Label) -> Bool[np.ndarray, "X Y Z"]:
    return np.isin(labels, label) if isinstance(label, tuple) else np.asarray(labels == label)


def _boxes(labels: Integer[np.ndarray, "X Y Z"], wanted: list[int]) -> dict[int, Box]:
    """Bounding box of each wanted label (ascending) that is present."""
    held = [label for label in wanted if label <= np.iinfo(labels.dtype).max]
    if not labels.size or not held:
        return {}
    numbers = held
    if held[-1] > _HIGHEST:
        labels, numbers = _numbered(labels, held), [*range(1, len(held) + 1)]
    # One pass for all classes. find_objects wants non-negative values it can index by.
    found = find_objects(np.where(labels > numbers[-1], 0, labels), max_label=numbers[-1])
    boxes = zip(held, (found[number - 1] for number in numbers), strict=True)
    return {label: box for label, box in boxes if box is not None}


def _numbered(labels: Integer[np.ndarray, "X Y Z"], wanted: list[int]) -> Integer[np.ndarray, "X Y Z"]:
    """1 … N for the wanted labels (ascending), 0 for others."""
    values = np.array(wanted, labels.dtype)
    out = np.zeros_like(labels, np.uint32)
    for plane, held in zip(out, labels, strict=True):  # places are of 64 bits
        place = np.searchsorted(values, held).clip(max=len(values) - 1)
        plane[...] = np.where(values[place] == held, place + 1, 0)
    return out


def _union(one: Box | None, other: Box | None) -> Box | None:
    """The smallest box around both."""
    if one is None or other is None:
        return one or other
    x, y, z = (slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return x, y, z

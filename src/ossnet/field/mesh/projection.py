"""Moving the vertices of a surface onto the level set of the field."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

Values = Callable[[Float[np.ndarray, "N 3"]], Float[np.ndarray, " N"]]
Gradient = Callable[[Float[np.ndarray, "N 3"]], Float[np.ndarray, "N 3"]]

# Half the distance of a central difference, in voxels.
_DIFFERENCE = 0.25
# A vertex is left alone once its next step would be shorter than this, in voxels.
_TOLERANCE = 1e-3


def central_differences(values: Values) -> Gradient:
    """The gradient of a field by central differences over half a voxel."""

    def gradient(points: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
        out = np.empty(points.shape)
        for axis in range(3):
            step = np.zeros(3)
            step[axis] = _DIFFERENCE
            out[:, axis] = (values(points + step) - values(points - step)) / (2 * _DIFFERENCE)
        return out

    return gradient


def find_roots(
    values: Values,
    low: Float[np.ndarray, "N 3"],
    high: Float[np.ndarray, "N 3"],
    at_low: Float[np.ndarray, " N"],
    at_high: Float[np.ndarray, " N"],
    steps: int,
) -> Float[np.ndarray, "N 3"]:
    """Zeros of a field on line segments, by false position in the Illinois form: every step keeps a bracket.

    Source: M. Dowell, P. Jarratt, A modified regula falsi method for computing the root of an equation, 1971.

    Args:
        values: The field.
        low: One end of each segment.
        high: The other.
        at_low: Values at one end; of another sign than at the other end.
        at_high: Values at the other end.
        steps: Values to ask for each segment at most.

    Returns:
        The best point of each segment.
    """
    length = np.linalg.norm(high - low, axis=1)
    a, b = np.zeros(len(low)), np.ones(len(low))
    fa, fb = at_low.astype(np.float64), at_high.astype(np.float64)
    last_side = np.zeros(len(low), dtype=np.int8)
    best = _crossing(a, b, fa, fb)
    active = np.arange(len(low))
    for _ in range(steps):
        if not len(active):
            break
        t = best[active]
        f = values(low[active] + t[:, None] * (high - low)[active]).astype(np.float64)
        same_as_low = np.signbit(f) == np.signbit(fa[active])
        left, right = active[same_as_low], active[~same_as_low]
        a[left], fa[left] = t[same_as_low], f[same_as_low]
        b[right], fb[right] = t[~same_as_low], f[~same_as_low]
        # An end that stays twice is given half its value, so that the other side moves too.
        fb[left[last_side[left] == 1]] /= 2
        fa[right[last_side[right] == -1]] /= 2
        last_side[left], last_side[right] = 1, -1
        after = _crossing(a[active], b[active], fa[active], fb[active])
        exact = f == 0
        after[exact] = t[exact]
        best[active] = after
        active = active[(np.abs(after - t) * length[active] > _TOLERANCE) & ~exact]
    roots: Float[np.ndarray, "N 3"] = low + best[:, None] * (high - low)
    return roots


def _crossing(
    a: Float[np.ndarray, " N"],
    b: Float[np.ndarray, " N"],
    fa: Float[np.ndarray, " N"],
    fb: Float[np.ndarray, " N"],
) -> Float[np.ndarray, " N"]:
    """Where the line through two values is zero; the middle where both are."""
    total = np.abs(fa) + np.abs(fb)
    share = np.divide(np.abs(fa), total, out=np.full(len(a), 0.5), where=total > 0)
    place: Float[np.ndarray, " N"] = a + share * (b - a)
    return place


def along_edges(values: Values, points: Float[np.ndarray, "N 3"], steps: int) -> Float[np.ndarray, "N 3"]:
    """Move vertices of marching cubes along the voxel edges that they lie on: the topology cannot change.

    Vertices that do not lie on an edge (in the middle of an ambiguous cell) are left where they are.
    """
    whole = np.rint(points)
    off = np.abs(points - whole) > 1e-4
    on_edge = np.flatnonzero(off.sum(axis=1) == 1)
    axis = off[on_edge].argmax(axis=1)
    rows = np.arange(len(on_edge))
    low = whole[on_edge]
    low[rows, axis] = np.floor(points[on_edge, axis])
    high = low.copy()
    high[rows, axis] += 1
    ends = np.concatenate((low, high))
    # Each voxel of the band ends several edges.
    unique, inverse = np.unique(ends.astype(np.int64), axis=0, return_inverse=True)
    at = values(unique.astype(np.float64))[inverse.reshape(-1)]
    at_low, at_high = at[: len(low)], at[len(low) :]
    bracketed = np.flatnonzero(np.signbit(-at_low) != np.signbit(-at_high))  # 0 is outside
    out = points.copy()
    out[on_edge[bracketed]] = find_roots(
        values, low[bracketed], high[bracketed], at_low[bracketed], at_high[bracketed], steps
    )
    return out


def along_gradient(
    values: Values, gradient: Gradient, points: Float[np.ndarray, "N 3"], steps: int, reach: float = 1.0
) -> Float[np.ndarray, "N 3"]:
    """Move points along the gradient at their place onto the zero of the field.

    The Newton step gives the direction and a first guess; the zero is then bracketed between the point and up
    to `reach` voxels from it. A point without one there stays.

    Args:
        values: The field.
        gradient: Its gradient in voxel units.
        points: Points near the level set.
        steps: Values to ask for each point at most, after the bracket.
        reach: Largest move in voxels.
    """
    at = values(points).astype(np.float64)
    slope = gradient(points)
    steepness = np.linalg.norm(slope, axis=1)
    usable = (steepness > 0) & np.isfinite(steepness) & (at != 0)
    downhill = np.where(at > 0, -1.0, 1.0)[:, None] * slope
    direction = np.divide(downhill, steepness[:, None], out=np.zeros_like(slope), where=usable[:, None])
    guess = np.divide(np.abs(at), steepness, out=np.full(len(at), np.inf), where=usable)

    out = points.copy()
    waiting = np.flatnonzero(usable)
    far_point, far_value = points.copy(), at.copy()
    found = np.zeros(len(points), dtype=bool)
    for share in (1.5, 4.0, np.inf):
        if not len(waiting):
            break
        distance = np.minimum(share * guess[waiting] + 1e-6, reach)
        trial = points[waiting] + distance[:, None] * direction[waiting]
        value = values(trial).astype(np.float64)
        crossed = (value > 0) != (at[waiting] > 0)
        far_point[waiting[crossed]], far_value[waiting[crossed]] = trial[crossed], value[crossed]
        found[waiting[crossed]] = True
        waiting = waiting[~crossed]
    rows = np.flatnonzero(found)
    out[rows] = find_roots(values, points[rows], far_point[rows], at[rows], far_value[rows], steps)
    return out


def paper_refinement(
    values: Values,
    gradient: Gradient,
    points: Float[np.ndarray, "V 3"],
    faces: Int[np.ndarray, "F 3"],
    fixed: Bool[np.ndarray, " V"],
    steps: int = 200,
    rate: float = 1e-3,
    normal_weight: float = 0.01,
    seed: int = 0,
) -> Float[np.ndarray, "V 3"]:
    """The paper's mesh refinement (SPEC §5 'Mesh'): RMSprop on the vertices.

    Each step draws one point a triangle with Dirichlet(1/2, 1/2, 1/2) weights and lowers
    mean((o - 1/2)²) + 0.01 · mean(|n - t|²), with o the occupancy probability, n the triangle's normal and t
    the direction in which o falls fastest, which is held constant within a step.

    Args:
        values: Logits.
        gradient: Gradient of the logits in voxel units.
        points: Vertices in voxel indices.
        faces: Triangles, oriented outward.
        fixed: Vertices that stay.
        steps: Steps; the paper takes 200.
        rate: Learning rate in voxels.
        normal_weight: Weight of the normals.
        seed: Seed of the drawn points.
    """
    generator = np.random.default_rng(seed)
    vertices = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    triangles = torch.from_numpy(np.ascontiguousarray(faces))
    free = torch.from_numpy(~fixed)[:, None]
    optimiser = torch.optim.RMSprop([vertices], lr=rate)
    for _ in range(steps):
        corners = vertices[triangles]  # (F, 3, 3)
        weights = torch.from_numpy(generator.dirichlet((0.5, 0.5, 0.5), size=len(faces)))
        drawn = (weights[:, :, None] * corners).sum(dim=1)
        place = drawn.detach().numpy()
        occupancy = torch.sigmoid(torch.from_numpy(np.asarray(values(place), dtype=np.float64)))
        slope = torch.from_numpy(np.asarray(gradient(place), dtype=np.float64))
        # d o / d p = o (1 - o) d logit / d p; the linear stand-in has the value o and this derivative.
        slope = (occupancy * (1 - occupancy))[:, None] * slope
        local = occupancy + (slope * (drawn - drawn.detach())).sum(dim=1)
        normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 1])
        normal = normal / (normal.norm(dim=1, keepdim=True) + 1e-10)
        target = -slope / (slope.norm(dim=1, keepdim=True) + 1e-10)
        loss = ((local - 0.5) ** 2).mean() + normal_weight * ((normal - target) ** 2).sum(dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        if vertices.grad is not None:
            vertices.grad *= free
        optimiser.step()
    return np.asarray(vertices.detach().numpy())

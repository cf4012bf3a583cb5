"""One level of the octree: the labels on a lattice, which of them were evaluated, and how the next level
begins.

Terms: a *lattice* holds the voxels whose indices are multiples of a stride. A *cell* lies between
eight lattice sites; a cell is *mixed* when their labels differ. A *window* is the box of lattice sites that
is kept, in lattice indices; it is the whole lattice unless only a region is wanted.

Sites are stored in one flat array, padded by one site that belongs to nothing. The last two axes are padded
to an odd length, so that the parity of a flat index is the parity of i + j + k.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Shaped

from ossnet.field.octree.prediction import child_labels, mixed_cells, smooth_axis

Triple = tuple[int, int, int]
Indices = Int[np.ndarray, " _"]

# Mixed cells refined at once: bounds the working memory of `child_labels` to some ten MiB.
_CELLS_AT_ONCE = 4096


@dataclass(frozen=True)
class Window:
    """A box of lattice sites: first site and end (exclusive) along each axis, in lattice indices."""

    low: Triple
    high: Triple

    @property
    def size(self) -> Triple:
        """Sites along each axis."""
        a, b, c = (h - lo for lo, h in zip(self.low, self.high, strict=True))
        return a, b, c

    def grown(self, before: int, after: int, lattice: Triple) -> "Window":
        """The box with more sites before and after along each axis, within a lattice of that size."""
        low = [max(0, lo - before) for lo in self.low]
        high = [min(n, h + after) for h, n in zip(self.high, lattice, strict=True)]
        return Window((low[0], low[1], low[2]), (high[0], high[1], high[2]))

    def cells(self, ratio: Triple) -> "Window":
        """The cells of the next coarser lattice that hold these sites, named by their low corners."""
        low = [lo // r for lo, r in zip(self.low, ratio, strict=True)]
        high = [-(-h // r) for h, r in zip(self.high, ratio, strict=True)]
        return Window((low[0], low[1], low[2]), (high[0], high[1], high[2]))

    def sites(self, ratio: Triple, lattice: Triple) -> "Window":
        """The inverse of `cells`: all sites of the finer lattice within these cells."""
        low = [lo * r for lo, r in zip(self.low, ratio, strict=True)]
        high = [min(h * r, n) for h, r, n in zip(self.high, ratio, lattice, strict=True)]
        return Window((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def lattice_size(shape: Triple, stride: Triple) -> Triple:
    """Sites of the lattice along each axis: indices 0, stride, 2·stride, … below the shape."""
    a, b, c = (-(-n // s) for n, s in zip(shape, stride, strict=True))
    return a, b, c


class Lattice:
    """The sites of one lattice within a window.

    Attributes:
        stride: Voxels between neighbouring sites, along each axis.
        full: Sites of the whole lattice along each axis.
        window: The sites kept here.
        cells: Flat, padded. Low bits the current label, top bit set where it was evaluated, all bits set
            outside.
        margins: Flat, padded: |logit|, or the distance of the best class's logit to the second best. None
            where no values are kept.
    """

    def __init__(self, stride: Triple, shape: Triple, window: Window, classes: int) -> None:
        self.stride, self.window = stride, window
        self.full = lattice_size(shape, stride)
        self.dtype: type[np.unsignedinteger] = np.uint8 if classes <= 127 else np.uint16
        bits = np.dtype(self.dtype).itemsize * 8
        self.known, self.outside = self.dtype(1 << (bits - 1)), self.dtype((1 << bits) - 1)
        self.label_bits = self.dtype(self.known - 1)
        n0, n1, n2 = window.size
        self.padded: Triple = (n0 + 2, (n1 + 2) | 1, (n2 + 2) | 1)
        self.steps = (self.padded[1] * self.padded[2], self.padded[2], 1)
        self.cells = np.full(self.padded, self.outside).reshape(-1)
        self.margins: Float[np.ndarray, " M"] | None = None

    @property
    def interior(self) -> tuple[slice, slice, slice]:
        """Where the sites lie within the padded box."""
        a, b, c = (slice(1, 1 + n) for n in self.window.size)
        return a, b, c

    def box(self, flat: Shaped[np.ndarray, " M"]) -> Shaped[np.ndarray, "X Y Z"]:
        """The sites of a flat array as a box (a view)."""
        return flat.reshape(self.padded)[self.interior]

    def labels(self) -> Shaped[np.ndarray, "X Y Z"]:
        """Current labels of the window (a copy)."""
        return np.asarray(self.box(self.cells) & self.label_bits)

    def hand_over(self, part: tuple[slice, ...]) -> Integer[np.ndarray, "X Y Z"]:
        """Labels of a part of the window, in the memory of `cells`, which are given up for it."""
        chosen = self.box(self.cells)[part]
        out = self.cells[: chosen.size].reshape(chosen.shape)
        # Every plane moves towards the front: none is overwritten before it was read.
        for plane, found in zip(out, chosen, strict=True):
            np.bitwise_and(found, self.label_bits, out=plane)
        return out

    def keep_margins(
        self, values: Float[np.ndarray, "X Y Z"] | float, dtype: type[np.floating] = np.float32
    ) -> None:
        """Begin to store margins, from these values on."""
        self.margins = np.zeros(self.cells.size, dtype=dtype)
        self.box(self.margins)[...] = values

    def unknown(self, voxels: Int[np.ndarray, "N 3"]) -> Indices:
        """Flat indices, sorted, of those voxels that are sites of the window and not evaluated."""
        flat = np.full(len(voxels), sum(self.steps), dtype=np.int64)
        inside = np.ones(len(voxels), dtype=bool)
        for axis in range(3):
            site = voxels[:, axis] // self.stride[axis] - self.window.low[axis]
            inside &= (site >= 0) & (site < self.window.size[axis])
            flat += site * self.steps[axis]
        flat = flat[inside]
        return sorted_unique(flat[self.cells[flat] < self.known])

    def voxels(self, flat: Indices) -> Int[np.ndarray, "_ 3"]:
        """Voxel indices of flat indices, int32."""
        rows, k = np.divmod(flat, self.padded[2])
        i, j = np.divmod(rows, self.padded[1])
        out = np.empty((len(flat), 3), dtype=np.int32)
        for axis, index in enumerate((i, j, k)):
            out[:, axis] = (index + (self.window.low[axis] - 1)) * self.stride[axis]
        return out

    def even(self, flat: Indices) -> Bool[np.ndarray, " _"]:
        """True where i + j + k, counted on the whole lattice, is even."""
        return np.asarray((flat + sum(self.window.low) + 3) % 2 == 0)

    def all_sites(self, every: int = 1) -> Indices:
        """Flat indices of all sites whose lattice indices are multiples of `every`."""
        low, high = self.window.low, self.window.high
        return self._product(
            [range(-(-a // every) * every, b, every) for a, b in zip(low, high, strict=True)]
        )

    def rim(self, box: Window) -> Indices:
        """Sites of a box, sorted, not evaluated, that have a 6-neighbour on the lattice outside of it."""
        sides = [range(a, b) for a, b in zip(box.low, box.high, strict=True)]
        faces = [np.empty(0, dtype=np.int64)]
        for axis, (side, sites) in enumerate(zip(sides, self.full, strict=True)):
            ends = [side[0]] * (side[0] > 0) + [side[-1]] * (side[-1] + 1 < sites)
            faces += [self._product([*sides[:axis], range(e, e + 1), *sides[axis + 1 :]]) for e in ends]
        flat = np.concatenate(faces)
        return sorted_unique(flat[self.cells[flat] < self.known])

    def _product(self, sides: list[range]) -> Indices:
        """Flat indices, in C order, of the sites with lattice indices from these ranges."""
        i, j, k = (
            (np.arange(side.start, side.stop, side.step, dtype=np.int64) - low + 1) * step
            for side, low, step in zip(sides, self.window.low, self.steps, strict=True)
        )
        return (i[:, None, None] + j[:, None] + k).reshape(-1)

    def neighbours(self, flat: Indices) -> Indices:
        """The 6-neighbours of sites, sorted, each once; the padding included."""
        steps = np.array([d * s for s in self.steps for d in (-1, 1)], dtype=np.int64)
        return sorted_unique((flat + steps[:, None]).reshape(-1))

    def unsettled(self, flat: Indices, trust: float | None = None) -> Indices:
        """Those of the sites that the rule lists: B2(C) \\ E, not evaluated and with a 6-neighbour of another
        label.

        Args:
            flat: Sites; sites of the padding count as evaluated.
            trust: List a site only if the linear root between it and the neighbour lies within this many
                sites.
        """
        flat = flat[self.cells[flat] < self.known]
        own = self.cells[flat]
        listed = np.zeros(len(flat), dtype=bool)
        for step in self.steps:
            for signed in (-step, step):
                other = self.cells[flat + signed]
                differ = ((other & self.label_bits) != own) & (other != self.outside)
                if trust is not None and self.margins is not None:
                    near, far = self.margins[flat].astype(np.float32), self.margins[flat + signed]
                    differ &= near <= trust * (near + far)
                listed |= differ
        return flat[listed]

    def write(self, flat: Indices, labels: Integer[np.ndarray, " _"]) -> Indices:
        """Store evaluated labels; the sites whose label changed."""
        labels = labels.astype(self.dtype)
        changed: Indices = flat[(self.cells[flat] & self.label_bits) != labels]
        self.cells[flat] = labels | self.known
        return changed


def sorted_unique(values: Indices) -> Indices:
    """Sorted values without repeats (in place, and a sort is faster here than the hashing of `np.unique`)."""
    values.sort()
    keep = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=keep[1:])
    unique: Indices = values[keep]
    return unique


def refine_lattice(
    coarse: Lattice,
    stride: Triple,
    shape: Triple,
    window: Window,
    classes: int,
    keep: type[np.floating] | None,
) -> tuple[Lattice, Indices]:
    """Begin the next finer level: predict its labels from the coarser one and list what the rule wants asked.

    Args:
        coarse: The finished coarser level.
        stride: Stride of the finer lattice; divides that of the coarser one.
        shape: Voxels of the volume.
        window: Sites of the finer lattice, whole cells of the coarser one.
        classes: Number of classes.
        keep: dtype of the margins to store on the finer level, None to store none.

    Returns:
        The finer level and the sites of B2(C) \\ E on it, sorted.
    """
    ratio: Triple = tuple(c // f for c, f in zip(coarse.stride, stride, strict=True))  # type: ignore[assignment]
    fine = Lattice(stride, shape, window, classes)
    cells = window.cells(ratio)
    labels = coarse.labels()
    # Where the first cell lies within the coarser window.
    begin: Triple = tuple(c - o for c, o in zip(cells.low, coarse.window.low, strict=True))  # type: ignore[assignment]
    n0, n1, n2 = window.size

    inside = tuple(slice(b, b + n) for b, n in zip(begin, cells.size, strict=True))
    corner = labels[inside]
    target = fine.box(fine.cells)
    for i in range(corner.shape[0]):
        plane = corner[i].repeat(ratio[1], axis=0)[:n1].repeat(ratio[2], axis=1)[:, :n2]
        target[i * ratio[0] : (i + 1) * ratio[0]] = plane

    mixed = np.argwhere(mixed_cells(labels, begin, cells.size))
    values = coarse.margins
    if values is not None and keep is not None:
        dense = coarse.box(values)
        for axis in range(3):
            dense = smooth_axis(dense, axis, ratio[axis])
        first = [b * r for b, r in zip(begin, ratio, strict=True)]
        part = dense[first[0] : first[0] + n0, first[1] : first[1] + n1, first[2] : first[2] + n2]
        fine.keep_margins(np.maximum(part, 0), keep)

    around = np.pad(labels, ((1, 2),) * 3, mode="edge")
    shape64 = np.array(around.shape, dtype=np.int64)
    steps64 = np.array([shape64[1] * shape64[2], shape64[2], 1])
    offsets = (np.indices((4, 4, 4)).reshape(3, -1).T @ steps64)[None]
    around_values = (
        None if values is None else np.pad(coarse.box(values), ((1, 2),) * 3, mode="edge").reshape(-1)
    )
    around = around.reshape(-1)
    children = np.indices(ratio).reshape(3, -1).T
    child_steps = children @ np.array(fine.steps)

    def places(chunk: Int[np.ndarray, "n 3"]) -> tuple[Indices, Bool[np.ndarray, "n children"] | None]:
        """Flat indices of the children of cells, and which of them lie within the lattice (None: all)."""
        first = chunk * np.array(ratio)
        place = (first @ np.array(fine.steps) + sum(fine.steps))[:, None] + child_steps
        # The last cell along an axis may hold fewer children than the others.
        if not (first + ratio > window.size).any():
            return place.reshape(-1), None
        within = (first[:, None] + children < np.array(window.size)).all(axis=2)
        return place[within], within

    chunks = [mixed[i : i + _CELLS_AT_ONCE] for i in range(0, len(mixed), _CELLS_AT_ONCE)]
    for chunk in chunks:
        where = ((chunk + begin) @ steps64)[:, None] + offsets
        predicted, margin = child_labels(
            around[where], None if around_values is None else around_values[where], ratio
        )
        flat, within = places(chunk)
        fine.cells[flat] = predicted.reshape(-1) if within is None else predicted[within]
        if margin is not None and fine.margins is not None:
            fine.margins[flat] = margin.reshape(-1) if within is None else margin[within]

    # Sites of the coarser lattice keep their answers, or what the coarser level made of them.
    on_coarse = tuple(slice(None, None, r) for r in ratio)
    target[on_coarse] = coarse.box(coarse.cells)[inside]
    if values is not None and fine.margins is not None:
        fine.box(fine.margins)[on_coarse] = coarse.box(values)[inside]

    found: list[Indices] = []
    for chunk in chunks:
        # A pair of different labels always has one end in a mixed cell: unmixed neighbours share corners.
        flat, within = places(chunk)
        own = fine.cells[flat]
        touched = np.zeros(len(flat), dtype=bool)
        ends = []
        for axis, step in enumerate(fine.steps):
            for signed, face in ((-step, 0), (step, ratio[axis] - 1)):
                other = fine.cells[flat + signed]
                differ = ((other ^ own) & fine.label_bits != 0) & (other != fine.outside)
                touched |= differ
                # Within the cell the other end is touched itself; beyond its faces it may lie in an unmixed
                # one.
                on_face = np.broadcast_to(children[:, axis] == face, (len(chunk), len(children)))
                differ &= on_face.reshape(-1) if within is None else on_face[within]
                ends.append(flat[differ & (other < fine.known)] + signed)
        ends.append(flat[touched & (own < fine.known)])
        found.append(np.concatenate(ends))
    return fine, sorted_unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)

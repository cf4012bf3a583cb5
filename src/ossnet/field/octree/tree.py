"""The octree: the dense label map of a function of position, asking it only near the surfaces.

*C* is the current label of every voxel, evaluated or predicted; *E* the voxels evaluated; *B2(C)* the voxels
with a 6-neighbour of another label. One rule on every lattice, coarse to fine: evaluate B2(C) \\ E, write the
answers, repeat until nothing is left.

**What is certain.** When it ends, every 6-connected component of the true label map of which at least one
voxel was evaluated is exactly right, for any number of classes: along a path inside such a component the
label could change only between two evaluated voxels, and both are right.
**What can be missed.** Components of which no voxel was evaluated are missing, whole: objects that slip
between the sites of the coarsest lattice and lie away from every surface found. Parts that touch only along
an edge or a corner are components of their own.

A prediction (a coarse start array, the interpolation between lattices) costs evaluations when it is bad,
never truth.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, Num, Shaped

from ossnet.errors import SettingsError
from ossnet.field.octree.hints import island_seeds, unsaturated_children
from ossnet.field.octree.lattice import Indices, Lattice, Triple, Window, refine_lattice, sorted_unique
from ossnet.field.octree.prediction import resample_prediction
from ossnet.field.octree.strides import Box, Part, Path, check_path, check_region, parts

Array = Shaped[np.ndarray, "..."] | Shaped[torch.Tensor, "..."]

# Margin of a predicted site that came without a value; sites next to a surface are evaluated and get their
# own.
_PRIOR_MARGIN = 4.0

_NONE: Indices = np.empty(0, dtype=np.int64)


NOT_A_NUMBER = "function", "answered not-a-number", "Check the network's weights and its input"
"""What, reason and fix of a `SettingsError`."""


def decide(answers: Array) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"] | None]:
    """Labels and margins of the answers of a function.

    Args:
        answers: (N,) integers or booleans: labels. (N,) floats: logits of class 1 against background, inside
            strictly above 0 (as in the paper, a probability of exactly 0.5 is outside). (N, K) floats: logits
            or log-probabilities of K classes, background first; the largest wins, the first among equals.

    Returns:
        The labels, and the distance to the nearest decision in logits (None for labels).

    Raises:
        SettingsError: If the answers have another shape, or are not finite.
    """
    if isinstance(answers, torch.Tensor):
        answers = answers.detach().cpu()
        values = (answers.float() if answers.is_floating_point() else answers).numpy()
    else:
        values = np.asarray(answers)
    if values.dtype.kind in "iub" and values.ndim == 1:
        return values.astype(np.int64), None
    if values.dtype.kind != "f" or values.ndim not in (1, 2) or (values.ndim == 2 and values.shape[1] < 2):
        raise SettingsError(
            "function",
            f"answered an array of shape {values.shape} and type {values.dtype}",
            "Return (N,) integer labels, (N,) float logits, or (N, K) float logits or log-probabilities",
        )
    values = values.astype(np.float32, copy=False)
    if np.isnan(values).any():
        raise SettingsError(*NOT_A_NUMBER)
    if values.ndim == 1:
        return (values > 0).astype(np.int64), np.abs(values)
    labels = values.argmax(axis=1)
    top = np.partition(values, -2, axis=1)[:, -2:]
    # Log-probabilities may be -inf: clipped, so that the distance of two of them is none.
    lowest = np.float32(-1e30)
    return labels, np.maximum(top[:, 1], lowest) - np.maximum(top[:, 0], lowest)


class Octree:
    """An iterator of questions whose answers become a dense label map.

    >>> import numpy as np
    >>> octree = Octree((40, 40, 40))
    >>> while (locations := octree.query()) is not None:
    ...     octree.update(12.0 - np.linalg.norm(locations - 20.0, axis=1))  # logits of a ball
    >>> int(octree.labels().sum()), octree.evaluated
    (7123, 3199)

    Args:
        shape: Voxels along X, Y, Z.
        classes: Number of classes, background included.
        path: Strides from coarse to fine, each a multiple of the next, the last 1; an entry may be a triple
            with one stride an axis. "auto": see `choose_path`.
        start: None: the coarsest lattice is evaluated whole. An array of any size over the same space
            (integers (a, b, c): labels; floats (a, b, c) or (K, a, b, c): logits): taken as prediction on the
            coarsest lattice. Array cell i covers the voxels from i·X/a to (i+1)·X/a.
        safety: With a start array: every how many sites of the coarsest lattice one is evaluated whatever the
            array says, so that what it overlooks can be hit; 0 for none.
        doubt: With a start array of logits: also evaluate the sites of the coarsest lattice where it comes
            closer to the decision than this. An array of labels leaves all of them in doubt.
        region: ((x0, y0, z0), (x1, y1, z1)), ends exclusive: only this box is wanted. The lattices stay those
            of the whole volume, and the box comes out as it would there, at the cost of the box.
        certain: With a region: prove that. What is evaluated in the box depends on what lies around it only
            where a structure enters it without being hit in it, and then the function and the labels found
            differ on a face of the box. So the faces are asked too, at most one voxel deep; where they
            differ, a larger box is taken. Without, a piece of a structure that enters the box can be missing
            where the whole volume has it: a cap or a strand thinner than the last stride but one.
        margin: With logits: also evaluate the children, of stride 4, of cells that have a corner with
            a logit closer to the decision than this. Finds small islands nearly as a lattice of stride 4
            would.
        seeds: With logits: also evaluate the one voxel where a quadratic fit puts the minimum of |logit|
            around local minima at strides of 4 and more (below `margin`, if given).
        trust: With logits: on the last lattice, evaluate a voxel of a crossing pair only if the linear root
            lies within this many voxels of it. Below 1, the result is no longer certain.

    Raises:
        SettingsError: For settings that contradict each other.
    """

    def __init__(
        self,
        shape: Triple,
        classes: int = 2,
        path: Path = "auto",
        start: Num[np.ndarray, "..."] | None = None,
        *,
        safety: int = 2,
        doubt: float | None = None,
        region: Box | None = None,
        certain: bool = True,
        margin: float | None = None,
        seeds: bool = False,
        trust: float | None = None,
    ) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise SettingsError("shape", f"{shape} is not a volume", "Give three sizes of at least 1")
        if not 2 <= classes <= 32767:
            raise SettingsError("classes", f"is {classes}", "Give 2 to 32767, background included")
        self.shape, self.classes = shape, classes
        self.path = check_path(path, shape)
        self.margin, self.seeds, self.trust = margin, seeds, trust
        self.evaluated = 0
        """Locations asked so far."""
        self.rounds = 0
        """Questions answered so far."""
        self._start, self._safety, self._doubt = start, safety, doubt
        self._region = check_region(region, shape)
        self._certain = certain and region is not None and trust is None
        self._growth = [0] * len(self.path)
        self._values: bool | None = None  # whether answers carry margins; None until the first
        self._done = False
        self._labels: Integer[np.ndarray, "X Y Z"] | None = None
        self._parts: tuple[Part, ...]
        self._lattice: Lattice
        self._level: int
        self._round: int  # of this level
        self._checking: bool  # whether the faces of the region are being asked
        self._asked: Indices | None
        self._next: Indices
        self._rest: Indices  # listed by the rule, not yet asked
        self._begin_coarsest()

    @property
    def stride(self) -> Triple:
        """Stride of the lattice in work along each axis."""
        return self._lattice.stride

    @property
    def pending(self) -> int:
        """Locations known to be still asked on this lattice; more may follow from their answers."""
        return 0 if self._done else len(self._next) + len(self._rest)

    @property
    def reach(self) -> Window:
        """The sites of the coarsest lattice that are looked at: more, where something entered the region unseen."""
        return self._parts[0].kept

    def restart(self, start: Num[np.ndarray, "..."] | None) -> None:
        """Begin again from another array (`start`): one that holds for all of `reach`."""
        self._start = start
        self._begin_coarsest()

    def query(self) -> Int[np.ndarray, "N 3"] | None:
        """The next voxel indices to ask, int32, or None when the label map is complete.

        The same question is returned until it is answered.
        """
        while self._asked is None and not self._done:
            if len(self._next):
                self._asked = self._next
            elif self._certain and not self._checking:
                self._checking = True
                self._next = self._lattice.rim(self._parts[self._level].wanted)
            elif self._level + 1 == len(self.path):
                self._done = True
            else:
                self._refine()
        return None if self._done or self._asked is None else self._lattice.voxels(self._asked)

    def update(self, answers: Array, margins: Float[np.ndarray, " N"] | None = None) -> None:
        """Answer the last question.

        Args:
            answers: Labels, logits or log-probabilities in the order of the question, see `decide`.
            margins: With labels from `decide`: their margins.

        Raises:
            SettingsError: If there is no open question, or the answers do not fit it.
        """
        asked = self._asked
        if asked is None:
            raise SettingsError("update", "no question is open", "Call query() first")
        labels, own = decide(answers)
        margins = own if own is not None else margins
        if len(labels) != len(asked):
            raise SettingsError(
                "function",
                f"gave {len(labels)} answers to {len(asked)} locations",
                "Answer each once, in order",
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.classes:
            raise SettingsError(
                "function",
                f"answered labels from {labels.min()} to {labels.max()} for {self.classes} announced classes",
                "Set classes to the number of classes, background included",
            )
        self._note_values(margins is not None)
        self.evaluated += len(asked)
        self.rounds += 1
        self._asked = None
        lattice = self._lattice
        if self._checking:
            self._next = asked[:0]
            if (lattice.cells[asked] != labels).any():
                self._growth[self._level] = 2 * self._growth[self._level] + 8
                self._begin_coarsest()
            return
        changed = lattice.write(asked, labels)
        if margins is not None and lattice.margins is not None:
            highest = np.finfo(lattice.margins.dtype).max
            lattice.margins[asked] = np.minimum(margins, highest)
        if self._level == 0 and self._round == 0:
            # After a whole lattice nothing is unknown; after a safety lattice all of it is looked through
            # once.
            self._close()
            return
        self._continue(changed)

    def labels(self) -> Integer[np.ndarray, "X Y Z"]:
        """The label map of the volume, or of the region; uint8, uint16 for more than 127 classes.

        It takes over the octree's own memory: the state of every voxel is as large.

        Raises:
            SettingsError: If questions are still open.
        """
        if self._labels is not None:
            return self._labels
        if self.query() is not None:
            raise SettingsError(
                "labels", "the octree still has questions", "Answer until query() returns None"
            )
        low = [r - w for r, w in zip(self._region.low, self._lattice.window.low, strict=True)]
        part = tuple(slice(o, o + n) for o, n in zip(low, self._region.size, strict=True))
        self._labels = self._lattice.hand_over(part)
        return self._labels

    @property
    def _trust(self) -> float | None:
        """The margin of trust on the lattice in work."""
        return self.trust if self._values and self._level + 1 == len(self.path) else None

    def _begin_coarsest(self) -> None:
        """Set up the coarsest lattice: all of it asked, or predicted with a safety lattice asked."""
        predicted = self._start is not None
        self._parts = parts(self.path, self.shape, self._region, self._growth, predicted=predicted)
        self._level, self._round, self._checking = 0, 0, False
        self._lattice = Lattice(self.path[0], self.shape, self._parts[0].kept, self.classes)
        self._asked, self._rest = None, _NONE
        self._lattice.box(self._lattice.cells)[...] = 0
        if self._start is None:
            self._next = self._lattice.all_sites()
        else:
            self._predict(self._start)
            self._next = sorted_unique(np.concatenate((self._doubted(), self._safety_lattice())))
        self._keep_values()
        if not len(self._next):
            self._close()

    def _note_values(self, values: bool) -> None:
        """Remember whether the function answers with values: all answers must be of one kind."""
        if self._values is None:
            self._values = values
            hints = [name for name in ("margin", "seeds", "trust") if getattr(self, name)]
            if hints and not values:
                raise SettingsError(hints[0], "needs logits, the function answers labels", "Leave it out")
            self._keep_values()
        if self._values != values:
            raise SettingsError("function", "answers labels and logits in turn", "Return one kind")

    def _keep_values(self) -> None:
        """Store margins if answers bring them and something is made of them: on all lattices but the last."""
        useful = self._level + 1 < len(self.path) or self.trust is not None
        if not self._values:
            self._lattice.margins = self._lattice.margins if self._values is None else None
        elif self._lattice.margins is None and useful:
            self._lattice.keep_margins(_PRIOR_MARGIN)

    def _predict(self, start: Num[np.ndarray, "..."]) -> None:
        """Take a coarse array as the labels of the coarsest lattice."""
        window, stride = self._lattice.window, self._lattice.stride
        x, y, z = (
            np.arange(a, b) * float(s) for a, b, s in zip(window.low, window.high, stride, strict=True)
        )
        labels, margins = resample_prediction(start, self.shape, (x, y, z), self.classes)
        self._lattice.box(self._lattice.cells)[...] = labels
        if margins is not None:
            self._lattice.keep_margins(margins)

    def _safety_lattice(self) -> Indices:
        """Sites of the coarsest lattice that are evaluated whatever was predicted."""
        return self._lattice.all_sites(self._safety) if self._safety else _NONE

    def _doubted(self) -> Indices:
        """Sites of the coarsest lattice whose prediction is close to the decision."""
        if self._doubt is None:
            return _NONE
        every, margins = self._lattice.all_sites(), self._lattice.margins
        return every if margins is None else every[margins[every] < self._doubt]

    def _close(self) -> None:
        """Begin the closure of the coarsest level by looking through all of it."""
        every = self._lattice.all_sites()
        self._begin(self._lattice.unsettled(every), every[:0])

    def _begin(self, listed: Indices, hinted: Indices) -> None:
        """Begin the closure of a level: of what the rule lists, the even sites first, with the hints.

        Their answers settle many of the odd ones, which are then looked at again. Both steps, and the rounds
        after them, depend on the neighbourhood of a site only, never on how long a list is: so what is
        evaluated inside a region does not depend on what lies far from it.
        """
        self._round = 1
        even = self._lattice.even(listed)
        self._next, self._rest = listed[even], listed[~even]
        if len(hinted):
            self._next = sorted_unique(np.concatenate((self._next, hinted)))
        if not len(self._next):
            self._next, self._rest = self._rest, self._next

    def _continue(self, changed: Indices) -> None:
        """Continue the closure with what was put off and the neighbours of sites that changed."""
        # A changed label refutes the prediction around it: there nothing is taken on trust.
        around = self._lattice.unsettled(self._lattice.neighbours(changed))
        put_off = self._lattice.unsettled(self._rest, self._trust)
        self._round += 1
        self._next = sorted_unique(np.concatenate((put_off, around)))
        self._rest = put_off[:0]

    def _refine(self) -> None:
        """Go on to the next finer lattice."""
        coarse = self._lattice
        self._level += 1
        self._checking = False
        stride, last = self.path[self._level], self._level + 1 == len(self.path)
        keep: Any = None
        if self._values and not last:
            keep = np.float32
        elif self._values and self.trust is not None:
            keep = np.float16
        hinted = self._hints(coarse, stride)
        self._lattice, listed = refine_lattice(
            coarse, stride, self.shape, self._parts[self._level].kept, self.classes, keep
        )
        if self._trust is not None:
            listed = self._lattice.unsettled(listed, self._trust)
        self._begin(listed, self._lattice.unknown(hinted))

    def _hints(self, coarse: Lattice, stride: Triple) -> Int[np.ndarray, "N 3"]:
        """Voxels of the next lattice to evaluate whatever the rule says."""
        voxels = np.empty((0, 3), dtype=np.int64)
        if not self._values:
            return voxels
        if self.margin is not None and 4 <= max(stride) < 8:
            voxels = np.concatenate((voxels, unsaturated_children(coarse, stride, self.margin)))
        if self.seeds and max(coarse.stride) >= 4:
            voxels = np.concatenate((voxels, island_seeds(coarse, stride, self.margin)))
        return voxels

"""The released dense inference, for comparison: fixed stages 4, 2, 1 (SPEC §5 'Dense inference', §7.1,
§7.20-7.22).

Stage s asks lattice sites (indices that are multiples of s) and marks the occupied ones in a grid; nothing is
ever reset. Stage 4 asks according to the start state. Stages 2 and 1 ask the unmarked sites that have a
marked one within a Chebyshev distance of 4 and 1 voxels: whole interiors are visited at every stage, and an
object that misses the first lattice is lost.

Unlike the octree this is no certain answer: its refinement grows the marked set one step a stage.
"""

from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, Shaped
from scipy import ndimage

from ossnet.errors import SettingsError
from ossnet.field.octree.tree import Array, decide

Triple = tuple[int, int, int]
StartState = Literal["original", "released", "paper"]
START_STATES: tuple[StartState, ...] = get_args(StartState)
STAGES = (4, 2, 1)


def initial_mask(segmentation: Float[np.ndarray, "a b c"], shape: Triple) -> Integer[np.ndarray, "x y z"]:
    """Where the encoder's segmentation holds the sites of the first lattice to be occupied.

    Args:
        segmentation: *Logits* of the encoder's head on its low-resolution grid.
        shape: Voxels of the volume.

    Returns:
        0 or 1 for each site of the stride-4 lattice: the head's probability, upsampled trilinearly with
        align_corners=True, above 0.5. The lattice has ceil(S / 4) sites (SPEC §7.22).
    """
    x, y, z = (-(-n // STAGES[0]) for n in shape)
    logits = torch.from_numpy(np.ascontiguousarray(segmentation, dtype=np.float32))
    upsampled = torch.nn.functional.interpolate(
        torch.sigmoid(logits)[None, None], size=(x, y, z), mode="trilinear", align_corners=True
    )
    return np.asarray((upsampled[0, 0] > 0.5).to(torch.uint8))


class ReleasedStages:
    """The released algorithm behind the octree's interface: `query`, `update`, `labels`.

    Args:
        shape: Voxels along X, Y, Z.
        start_state: "original": the whole first lattice is asked (`inference` of the released code).
            "released": only sites that the encoder's segmentation marks are asked (`inference_optimized`).
            "paper": those are accepted unasked and the others are asked (section 3.3 and figure 4 of the
            paper; SPEC §7.1).
        segmentation: Logits of the encoder's head on its low-resolution grid. Without one, as in variants
            that have no head, every start state falls back to "original" (SPEC §7.19).
        reevaluate: Ask sites found unoccupied again at later stages, as the released code does: the same
            labels, the released counts (SPEC §7.21).
    """

    def __init__(
        self,
        shape: Triple,
        start_state: StartState = "released",
        segmentation: Float[np.ndarray, "a b c"] | None = None,
        *,
        reevaluate: bool = False,
    ) -> None:
        if start_state not in START_STATES:
            raise SettingsError(
                "start", f"{start_state!r} is not a start state", f"Choose one of {', '.join(START_STATES)}"
            )
        self.shape: Triple = shape
        self.start_state: StartState = "original" if segmentation is None else start_state
        self.reevaluate = reevaluate
        self.evaluated_per_stage: list[int] = []
        """Locations asked at stages 4, 2, 1, as far as these were reached."""
        self.rounds = 0
        """Questions answered so far."""
        self._grid = np.zeros(shape, dtype=np.uint8)
        self._seen: Integer[np.ndarray, "X Y Z"] | None = (
            None if reevaluate else np.zeros(shape, dtype=np.uint8)
        )
        self._question: Int[np.ndarray, "N 3"] | None = None
        self._stage = 0
        self._first = None if segmentation is None else initial_mask(segmentation, shape)

    @property
    def evaluated(self) -> int:
        """Locations asked so far, repetitions included."""
        return sum(self.evaluated_per_stage)

    @property
    def pending(self) -> int:
        """Locations of the open question."""
        return 0 if self._question is None else len(self._question)

    def query(self) -> Int[np.ndarray, "N 3"] | None:
        """The voxel indices (int32, C order) of the next stage that has any, or None after the last."""
        while self._question is None and self._stage < len(STAGES):
            stride = STAGES[self._stage]
            sites = np.argwhere(self._candidates(stride)).astype(np.int32) * np.int32(stride)
            if len(sites):
                self._question = sites
            else:
                # An empty batch must never reach a network (SPEC §7.20).
                self.evaluated_per_stage.append(0)
                self._stage += 1
        return self._question

    def update(self, answers: Array, margins: Float[np.ndarray, " N"] | None = None) -> None:
        """Answer the last question: labels, or logits (occupied strictly above 0); margins are not used."""
        question = self._question
        if question is None:
            raise SettingsError("update", "no question is open", "Call query() first")
        labels, _ = decide(answers)
        if len(labels) != len(question):
            raise SettingsError(
                "function",
                f"gave {len(labels)} answers to {len(question)} locations",
                "Answer each once, in order",
            )
        if len(labels) and labels.max() > 1:
            raise SettingsError(
                "classes", "the released stages know one structure", "Use another start state"
            )
        occupied = question[labels > 0]
        self._grid[tuple(occupied.T)] = 1
        if self._seen is not None:
            self._seen[tuple(question.T)] = 1
        self.evaluated_per_stage.append(len(question))
        self.rounds += 1
        self._stage += 1
        self._question = None

    def labels(self) -> Integer[np.ndarray, "X Y Z"]:
        """The grid: 1 where occupied. Before the end: what the stages so far have marked."""
        return self._grid.copy()

    def _candidates(self, stride: int) -> Shaped[np.ndarray, "x y z"]:
        """Which sites of a stage's lattice are to be asked."""
        on_lattice = (slice(None, None, stride),) * 3
        marked = self._grid[on_lattice]
        if stride == STAGES[0]:
            if self.start_state == "original" or self._first is None:
                return np.ones(marked.shape, dtype=bool)
            if self.start_state == "released":
                return np.asarray(self._first == 1)
            marked[...] = self._first
            return np.asarray(self._first == 0)
        # Max pooling with a kernel of 3^s voxels reaches 3^s // 2 voxels; marks lie on this lattice only.
        reach = (3**stride // 2) // stride
        near = ndimage.maximum_filter(marked, size=2 * reach + 1, mode="constant")
        wanted = (near != marked).astype(bool)
        if self._seen is not None:
            wanted &= self._seen[on_lattice] == 0
        return np.asarray(wanted)

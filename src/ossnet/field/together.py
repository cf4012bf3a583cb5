"""Several models' answers for one scan as one: a mean of their probabilities.

Letters: N locations, K classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from ossnet.field.asking import ask_at
from ossnet.field.engine.answer import Answer, Coverable
from ossnet.volume import Affine, Shape

_SURE = 1e-7
"""Probabilities are kept this far from 0 and 1, as far as float32 tells them from these."""


class MeanAnswer:
    """An `Answer` on the grid of the first of several: of the folds of a cross-validation, for example.

    The octree is exact for it as for any function. What predicts its first lattice is the first answer's prediction.

    Args:
        answers: Of networks with the same classes.
        to_grids: Voxel indices on the first one's grid → those on the grid of each.
        counts: What each counts beside the others (`Model.counts`).
        reserve: Bytes that each answer which is no `Coverable` left when it was made.
    """

    def __init__(
        self, answers: Sequence[Answer], to_grids: Sequence[Affine], counts: Sequence[float], reserve: int = 0
    ) -> None:
        self._answers, self._to_grids = tuple(answers), tuple(to_grids)
        self._shares = [count / sum(counts) for count in counts]
        self._able = [answer for answer in answers if isinstance(answer, Coverable)]
        self._left = reserve * (len(self._answers) - len(self._able))
        self.shape: Shape = answers[0].shape
        self.classes = answers[0].classes
        self.dense = all(answer.dense for answer in answers)

    @property
    def coarse(self) -> Tensor | None:
        """The first answer's prediction."""
        return self._answers[0].coarse

    @property
    def chunk(self) -> int:
        """Of the answer that works on most locations at once."""
        return max(answer.chunk for answer in self._answers)

    @property
    def bytes_per_location(self) -> int:
        """Of all together: working memory is kept from question to question, each for a chunk of its own."""
        return -(-sum(answer.chunk * answer.bytes_per_location for answer in self._answers) // self.chunk)

    @property
    def fixed_bytes(self) -> int:
        """Of all."""
        return sum(answer.fixed_bytes for answer in self._answers)

    @property
    def encoding_bytes(self) -> int:
        """Of all, as if at once."""
        return sum(answer.encoding_bytes for answer in self._answers)

    def cover(self, box: tuple[Shape, Shape] | None = None) -> None:
        """See `Coverable`."""
        for answer, matrix in zip(self._answers, self._to_grids, strict=True):
            if isinstance(answer, Coverable):
                answer.cover(None if box is None else _moved(box, matrix))

    def prediction(self, box: tuple[Shape, Shape] | None = None) -> Tensor | None:
        """See `Coverable`: the first answer's, on whose grid boxes are."""
        first = self._answers[0]
        return first.prediction(box) if isinstance(first, Coverable) else first.coarse

    def set_aside(self, size: int) -> None:
        """See `Coverable`; those that can leave what the others have not left, together."""
        for answer in self._able:
            answer.set_aside(-(-max(size - self._left, 0) // len(self._able)))

    @torch.inference_mode()
    def __call__(self, locations: Num[Tensor, "N 3"]) -> Float[Tensor, "N *K"]:
        """Logits of the mean probabilities; see `Answer`."""
        places = locations.cpu().numpy()
        total: Tensor | None = None
        for answer, matrix, share in zip(self._answers, self._to_grids, self._shares, strict=True):
            logits = ask_at(answer, places, matrix)
            found = logits.sigmoid() if logits.ndim == 1 else logits.softmax(dim=1)
            total = found.mul_(share) if total is None else total.add_(found, alpha=share)
        assert total is not None
        mean = total.clamp_(_SURE, 1 - _SURE)
        return mean.log() - (-mean).log1p() if mean.ndim == 1 else mean.log()


def _moved(box: tuple[Shape, Shape], matrix: Affine) -> tuple[Shape, Shape]:
    """The voxels of another grid that a box touches; both grids have the same axes."""
    low, high = np.array(box[0]), np.array(box[1]) - 1
    scale, shift = np.diag(matrix)[:3], matrix[:3, 3]
    x0, y0, z0 = (int(v) for v in np.floor(low * scale + shift))
    x1, y1, z1 = (int(v) + 1 for v in np.ceil(high * scale + shift))
    return (x0, y0, z0), (x1, y1, z1)

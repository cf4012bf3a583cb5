"""What is asked: a network bound to one scan, as a function of position.

Letters: N locations, K classes.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Num
from torch import Tensor

from ossnet.volume import Shape


@runtime_checkable
class Answer(Protocol):
    """Logits at locations of one scan, the same whatever was asked before. Threads that ask at once take turns."""

    @property
    def shape(self) -> Shape:
        """S, voxels of the network's grid."""

    @property
    def classes(self) -> int:
        """1 for binary, otherwise K including background."""

    @property
    def coarse(self) -> Tensor | None:
        """A cheap first guess for the octree on a coarse grid over the same space.

        float32 logits, (x, y, z) for binary, (K, x, y, z) for K classes, or integer labels (x, y, z); None where
        the network has none.
        """

    @property
    def chunk(self) -> int:
        """Locations worked on at once."""

    @property
    def bytes_per_location(self) -> int:
        """Working memory that grows with the chunk."""

    @property
    def fixed_bytes(self) -> int:
        """Memory held for as long as the answer lives, without the scan that was handed over."""

    @property
    def encoding_bytes(self) -> int:
        """Memory that encoding the scan takes while it lasts, for forecasts."""

    @property
    def dense(self) -> bool:
        """Everything is answered already: asking everywhere costs nothing more."""

    def __call__(self, locations: Num[Tensor, "N 3"]) -> Float[Tensor, "N *K"]:
        """Logits, (N,) for binary, (N, K) for K classes, float32 on the device of the answer.

        Args:
            locations: Voxel indices on the network's grid, integers or floats, on any device. Outside
                the grid they count as the nearest point of its border.
        """


@runtime_checkable
class Coverable(Protocol):
    """An answer that is prepared for a part of its scan at a time."""

    def cover(self, box: tuple[Shape, Shape] | None = None) -> None:
        """Prepare all that answers in a box (low, high excluded) depend on, on the network's grid; None: all."""

    def prediction(self, box: tuple[Shape, Shape] | None = None) -> Tensor | None:
        """`Answer.coarse` with a box covered; others that ask at the same time may cover another one."""

    def set_aside(self, size: int) -> None:
        """Leave so many bytes of the grant to those that ask, from now on.

        Raises:
            ResourceError: The grant does not hold both.
        """


def coarse_logits(segmentation: Float[Tensor, "1 C X Y Z"] | None, classes: int) -> Tensor | None:
    """The segmentation head's logits in the form of `Answer.coarse`.

    The head asks of each structure whether a cell holds any of it (`OSSNet`); with background at 0 the
    largest logit is background exactly where no structure is likelier than not.
    """
    if segmentation is None:
        return None
    logits = segmentation[0].float()
    if classes == 1:
        return logits[0]
    return torch.cat([torch.zeros_like(logits[:1]), logits])


def clamped(locations: Num[Tensor, "N 3"], shape: Shape) -> Num[Tensor, "N 3"]:
    """Locations moved onto the nearest point of the grid; int64 stays int64, floats become float32."""
    locations = locations.float() if locations.is_floating_point() else locations.long()
    last = torch.tensor([n - 1 for n in shape], dtype=locations.dtype, device=locations.device)
    return locations.clamp(torch.zeros_like(last), last)

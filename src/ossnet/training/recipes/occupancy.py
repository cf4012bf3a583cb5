"""O-Net and OSS-Net A to D as the paper trains them (SPEC §3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ossnet.data.augment import Augmentation
from ossnet.data.cache import CachedCase
from ossnet.data.patches import PatchSource
from ossnet.data.preparation import Preparation, reduce_by_two
from ossnet.data.sampling import labels_at, low_res_labels, sample_locations
from ossnet.networks.lean import lean
from ossnet.networks.ossnet import OSSNet
from ossnet.training.losses import oss_net_loss
from ossnet.training.recipes.base import Recipe, augmented
from ossnet.training.settings import Settings
from ossnet.volume import flipped

LEAN_BYTES = 80_000
"""Kept for the backward pass for each location of a full-width decoder (`benchmarks/training_step.py`)."""
KEPT_BYTES = 4_000_000_000
"""Beyond this blocks are computed again: a fifth slower, a fifth of the memory."""


@dataclass(frozen=True)
class OccupancyExample:
    """One volume and its locations.

    Attributes:
        locations: (N, 3) int64 on the network's grid.
        labels: (N,) int64.
        presence: (G, *grid) float32 for the encoder's segmentation; None without a head.
    """

    case: CachedCase
    plan: Augmentation
    locations: Tensor
    labels: Tensor
    presence: Tensor | None


class OccupancyRecipe(Recipe):
    """Equation 2 over sampled locations of whole volumes."""

    network: OSSNet

    def __init__(self, network: OSSNet, preparation: Preparation, settings: Settings) -> None:
        super().__init__(network, preparation, settings)
        lean(network, recompute=self._recomputes())

    def _recomputes(self) -> bool:
        """Whether decoder blocks are computed again in the backward pass instead of being kept."""
        chosen, runtime = self.settings, self.settings.runtime
        if runtime.checkpoint_blocks != "auto":
            return runtime.checkpoint_blocks
        share = chosen.schedule.batch_size // (runtime.devices * runtime.nodes)
        return chosen.sampling.locations * max(share, 1) * LEAN_BYTES > KEPT_BYTES

    def example(self, case: CachedCase, rng: np.random.Generator, passes: float = 0.0) -> OccupancyExample:
        """Draw the augmentation and the locations; voxels are touched only where labels are looked up."""
        spec, sampling = self.network.spec, self.settings.sampling
        plan = self.drawn(case, rng)
        labels = flipped(case.labels, plan.flips)
        locations = sample_locations(
            rng,
            case.fit,
            sampling.locations,
            case.border if sampling.strategy == "border" else (),
            sampling.border_share,
            sampling.include_last_voxel,
            plan.flips,
        )
        presence = None
        if spec.head:
            presence = torch.from_numpy(low_res_labels(labels, case.fit, spec.grid, spec.classes))
        found = labels_at(labels, case.fit, locations).astype(np.int64)
        return OccupancyExample(case, plan, torch.from_numpy(locations), torch.from_numpy(found), presence)

    def batch(self, examples: Sequence[OccupancyExample], device: torch.device) -> dict[str, Tensor]:
        """Reduced volumes, locations with their patches and labels; patches and presence for networks with them."""
        volumes, patches = self._inputs(examples, device)
        made = {
            "volumes": volumes,
            "locations": torch.stack([e.locations for e in examples]).to(device, torch.float32),
            "labels": torch.stack([e.labels for e in examples]).to(device),
        }
        if patches is not None:
            made["patches"] = patches
        presence = [e.presence for e in examples if e.presence is not None]
        if presence:
            made["presence"] = torch.stack(presence).to(device)
        return made

    def loss(self, forward: Callable[..., Any], batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """One forward pass over all volumes."""
        logits, segmentation = forward(batch["volumes"], batch["locations"], batch.get("patches"))
        loss = oss_net_loss(
            logits, batch["labels"], segmentation, batch.get("presence"), self.settings.loss.aux
        )
        return loss.total

    def _inputs(
        self, examples: Sequence[OccupancyExample], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """The reduced scans of a batch (B, C, X, Y, Z) and the patches (B, N, D, 7, 7, 7), channels last in memory.

        One scan at a time is held at full resolution.
        """
        spec = self.network.spec
        volumes: list[Tensor] = []
        rows: Tensor | None = None
        for place, example in enumerate(examples):
            image = augmented(example.case, example.plan, self.preparation, device)
            volumes.append(reduce_by_two(image))
            patches = PatchSource(image, spec.patches)(example.locations.to(device))
            if patches is not None:
                channels_last = patches.permute(0, 2, 3, 4, 1)
                if rows is None:
                    rows = patches.new_empty(len(examples), *channels_last.shape)
                rows[place] = channels_last
        return torch.stack(volumes), None if rows is None else rows.permute(0, 1, 5, 2, 3, 4)

"""The default network, trained on crops."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer, Num
from torch import Tensor

from ossnet.data.cache import CachedCase
from ossnet.data.crop_locations import surface_voxels
from ossnet.data.crops import CropSettings, CropSource
from ossnet.data.examples import example
from ossnet.data.preparation import Preparation, Statistics, as_float
from ossnet.networks.multiscale import MultiscaleNetwork, positions_in_scan
from ossnet.networks.multiscale_plan import MultiscalePlan
from ossnet.training.losses import as_locations, compound_loss, occupancy_loss
from ossnet.training.recipes.base import Recipe
from ossnet.training.settings import Settings

SURFACE_VOXELS = 100_000
"""Kept of a scan, at most, its structures sharing them; a crop draws from a part of them only."""

_FEW = 2_000
"""Of them for each structure in any case."""


class CropSources:
    """Cases as the crops want them; surfaces are found once."""

    def __init__(self, preparation: Preparation) -> None:
        self.preparation = preparation
        self._known: dict[str, CropSource] = {}

    def __call__(self, case: CachedCase) -> CropSource:
        """The case to cut crops from."""
        if case.name not in self._known:
            self._known[case.name] = CropSource(
                case.image,
                case.labels,
                case.classes,
                [_some(s, case.classes) for s in surface_voxels(case.labels, case.classes)],
                partial(_normalised, self.preparation, case.statistics),
                case.fit.scale,
            )
        return self._known[case.name]


def _some(voxels: Integer[np.ndarray, "M 3"], classes: int) -> Integer[np.ndarray, "_ 3"]:
    """Enough of them to draw from: those of large cohorts are kept all at once."""
    most = max(SURFACE_VOXELS // max(classes - 1, 1), _FEW)
    if len(voxels) <= most:
        return voxels
    return voxels[np.random.default_rng(0).choice(len(voxels), most, replace=False)]


def _normalised(
    preparation: Preparation, statistics: Statistics, part: Num[np.ndarray, "C X Y Z"]
) -> Float[Tensor, "C X Y Z"]:
    return preparation.normalise_(as_float(part), statistics)


def crop_settings(
    settings: Settings,
    crop: tuple[int, int, int],
    spacing: tuple[float, float, float],
    strides: tuple[int, int, int],
) -> CropSettings:
    """Crops with the augmentation that the settings ask for."""
    augmentation, sampling = settings.augmentation, settings.sampling
    chosen = CropSettings(
        crop,
        spacing,
        locations=sampling.locations,
        strides=strides,
        near_surface=sampling.near_borders,
        flips=augmentation.flip_axes,
        intensity=augmentation.intensity,
        grows=augmentation.grows or 0,
        importance=sampling.importance,
        position=settings.network.position,
    )
    return chosen if augmentation.spatial else replace(chosen, spatial=0.0)


class MultiscaleRecipe(Recipe):
    """Cross-entropy and soft Dice at locations in crops, and on the coarse logits (deep supervision)."""

    network: MultiscaleNetwork

    def __init__(
        self, network: MultiscaleNetwork, preparation: Preparation, settings: Settings, plan: MultiscalePlan
    ) -> None:
        super().__init__(network, preparation, settings)
        strides = plan.spec.strides[network.coarse_stage]
        self.crops = crop_settings(settings, plan.crop, plan.spec.spacing, strides)
        self.sources = CropSources(preparation)
        self.voxel = self.crops.locations / prod(self.crops.crop)
        """What a voxel of a crop counts, in weights of its locations."""

    def example(self, case: CachedCase, rng: np.random.Generator, passes: float = 0.0) -> dict[str, Tensor]:
        """A crop with locations and soft targets."""
        return example(self.sources(case), self.crops.after(passes), rng)

    def batch(self, examples: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
        """The crops with all that belongs to them."""
        return {key: torch.stack([e[key] for e in examples]).to(device) for key in examples[0]}

    @property
    def capturable(self) -> bool:
        return True

    def loss(self, forward: Callable[..., Any], batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """One forward pass over the crops."""
        positions = positions_in_scan(batch["places"], batch["shape"]) if self.crops.position else None
        logits, coarse = forward(batch["image"], batch["locations"], positions)
        logits = logits.float()
        if logits.shape[-1] == 1:
            logits = logits[..., 0]
        chosen = self.settings.loss
        dice = chosen.dice if chosen.kind == "dice" else 0.0
        # The sums of soft Dice stand for the voxels of the crop: more than a voxel added to them would leave little
        # to learn from a structure of few voxels.
        main = compound_loss(logits, batch["targets"], dice, weights=batch["importance"], smooth=self.voxel)
        # A scan of a few slices can lie between the centres of the cells: then none of them counts.
        inside = batch["weights"].flatten(1)
        aux = occupancy_loss(
            as_locations(coarse.float()),
            as_locations(batch["coarse"]),
            # Of each crop by itself: the same loss on however many devices.
            weights=inside / inside.mean(dim=1, keepdim=True).clamp(min=1 / inside.shape[1]),
        )
        return main + chosen.aux * aux

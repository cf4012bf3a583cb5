"""The default network, trained on crops."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from ossnet.data.cache import CachedCase
from ossnet.data.crop_locations import surface_voxels
from ossnet.data.crops import CropSettings, CropSource, without_augmentation
from ossnet.data.examples import example
from ossnet.data.preparation import Preparation, Statistics, as_float
from ossnet.networks.multiscale import MultiscaleNetwork, positions_in_scan
from ossnet.networks.multiscale_plan import MultiscalePlan
from ossnet.training.losses import compound_loss, occupancy_loss
from ossnet.training.recipes.base import Recipe, StepLoss
from ossnet.training.settings import Settings


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
                surface_voxels(case.labels, case.classes),
                partial(_normalised, self.preparation, case.statistics),
                case.fit.scale,
            )
        return self._known[case.name]


def _normalised(
    preparation: Preparation, statistics: Statistics, part: Num[np.ndarray, "C X Y Z"]
) -> Float[Tensor, "C X Y Z"]:
    return preparation.normalised(as_float(part), statistics)


def crop_settings(
    settings: Settings,
    crop: tuple[int, int, int],
    spacing: tuple[float, float, float],
    strides: tuple[int, int, int],
) -> CropSettings:
    """Crops with the augmentation that the settings ask for."""
    augmentation = settings.augmentation
    chosen = CropSettings(
        crop,
        spacing,
        locations=settings.sampling.locations,
        strides=strides,
        flips=augmentation.flip_axes,
        importance=settings.sampling.importance,
        position=settings.network.position,
    )
    return chosen if augmentation.spatial else without_augmentation(chosen)


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

    def example(self, case: CachedCase, rng: np.random.Generator) -> dict[str, Tensor]:
        """A crop with locations and soft targets."""
        return example(self.sources(case), self.crops, rng)

    def loss(
        self, forward: Callable[..., Any], examples: Sequence[dict[str, Tensor]], device: torch.device
    ) -> StepLoss:
        """One forward pass over the crops."""
        batch = {key: torch.stack([e[key] for e in examples]).to(device) for key in examples[0]}
        positions = positions_in_scan(batch["places"], batch["shape"]) if self.crops.position else None
        logits, coarse = forward(batch["image"], batch["locations"], positions)
        logits = logits.float()
        if logits.shape[-1] == 1:
            logits = logits[..., 0]
        main = compound_loss(logits, batch["targets"], self.settings.loss.dice, weights=batch["importance"])
        weights = batch["weights"].bool()
        asked = coarse.float().movedim(1, -1)[weights]
        wanted = batch["coarse"].movedim(1, -1)[weights]
        if asked.shape[-1] == 1:
            asked, wanted = asked[..., 0], wanted[..., 0]
        aux = occupancy_loss(asked[None], wanted[None])
        return StepLoss(main + self.settings.loss.aux * aux, {"main": main.detach(), "aux": aux.detach()})

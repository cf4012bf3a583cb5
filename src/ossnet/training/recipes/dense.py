"""The paper's voxel baselines (SPEC §3 "Baselines"): whole volumes, patches, or slices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ossnet.data.augment import Augmentation, apply_intensity
from ossnet.data.cache import CachedCase
from ossnet.data.crops import cut, cut_labels, draw_map
from ossnet.data.intensities import change_intensities
from ossnet.data.preparation import Preparation, as_float
from ossnet.networks.unet import UNet
from ossnet.training.losses import as_locations, compound_loss
from ossnet.training.recipes.base import Recipe, augmented
from ossnet.training.recipes.multiscale import CropSources, crop_settings
from ossnet.training.settings import Settings
from ossnet.volume import Shape, flipped


class _DenseRecipe(Recipe):
    network: UNet

    def loss(self, forward: Callable[..., Any], batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Loss of dense logits (B, K, …) against labels (B, …)."""
        logits = as_locations(forward(batch["images"]).float())
        flat = batch["labels"].flatten(1)
        chosen = self.settings.loss
        weight = chosen.dice if chosen.kind == "dice" else 0.0
        return compound_loss(logits, flat, weight)


class WholeUNetRecipe(_DenseRecipe):
    """A 3D U-Net on whole volumes at the shape that the preparation gives them, as in the paper."""

    def example(
        self, case: CachedCase, rng: np.random.Generator, passes: float = 0.0
    ) -> tuple[CachedCase, Augmentation]:
        """A volume and its augmentation."""
        return case, self.drawn(case, rng)

    def batch(
        self, examples: Sequence[tuple[CachedCase, Augmentation]], device: torch.device
    ) -> dict[str, Tensor]:
        """Whole volumes, augmented where they are used."""
        images = torch.stack([augmented(case, plan, self.preparation, device) for case, plan in examples])
        labels = torch.stack(
            [
                case.fit.labels(torch.from_numpy(flipped(case.labels, plan.flips).astype(np.int64)))
                for case, plan in examples
            ]
        )
        return {"images": images, "labels": labels.to(device)}


class CropUNetRecipe(_DenseRecipe):
    """A 3D U-Net on patches, as practitioners train it; in use a window slides over the scan."""

    def __init__(self, network: UNet, preparation: Preparation, settings: Settings, patch: Shape) -> None:
        super().__init__(network, preparation, settings)
        spacing = preparation.spacing or (1.0, 1.0, 1.0)
        self.crops = crop_settings(settings, patch, spacing, (1, 1, 1))
        self.sources = CropSources(preparation)

    def example(
        self, case: CachedCase, rng: np.random.Generator, passes: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """A patch (C, X, Y, Z) and its labels; augmented as the default variant's crops are."""
        source, crops = self.sources(case), self.crops.after(passes)
        mapping = draw_map(source, crops, rng)
        image = change_intensities(cut(source, mapping), crops, rng)
        labels = cut_labels(source, mapping)
        if source.classes == 1:
            labels = labels > 0
        return image, torch.from_numpy(labels.astype(np.int64))

    def batch(self, examples: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> dict[str, Tensor]:
        """The patches."""
        images, labels = (torch.stack(parts).to(device) for parts in zip(*examples, strict=True))
        return {"images": images, "labels": labels}

    @property
    def capturable(self) -> bool:
        return True


@dataclass(frozen=True)
class Slice:
    """One augmented slice of a fitted scan: (C, H, W) and (H, W)."""

    image: Tensor
    labels: Tensor


class SliceUNetRecipe(_DenseRecipe):
    """A 2D U-Net on slices across one axis; an epoch draws as many slices as the grid has."""

    @property
    def repeats(self) -> int:
        """Slices of the fitted grid."""
        shape = self.preparation.shape
        return 1 if shape is None else shape[self.settings.network.slice_axis]

    def example(self, case: CachedCase, rng: np.random.Generator, passes: float = 0.0) -> Slice:
        """A random slice; only the scan's slices that it is made from are touched."""
        axis = self.settings.network.slice_axis
        plan = self.drawn(case, rng)
        index = int(rng.integers(0, case.fit.target[axis]))
        image, labels = self._source_slice(case, plan, index, axis)
        others = [a for a in range(3) if a != axis]
        size = [case.fit.target[a] for a in others]
        if case.fit.resizes:
            image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
            for dim, a in enumerate(others):
                labels = labels.index_select(dim, torch.from_numpy(case.fit.nearest()[a]))
        else:
            pads = [
                (case.fit.offset[a], case.fit.target[a] - case.fit.source[a] - case.fit.offset[a])
                for a in others
            ]
            padding = [n for pair in reversed(pads) for n in pair]
            image, labels = F.pad(image, padding), F.pad(labels, padding)
        return Slice(image, labels)

    def _source_slice(
        self, case: CachedCase, plan: Augmentation, index: int, axis: int
    ) -> tuple[Tensor, Tensor]:
        """One slice across `axis` before padding or resizing in its plane: (C, H, W), (H, W)."""
        fit, source = case.fit, case.fit.source[axis]
        place = (index + 0.5) * fit.scale[axis] ** -1 - 0.5 if fit.resizes else index - fit.offset[axis]
        nearest = int(fit.nearest()[axis][index]) if fit.resizes else int(place)
        image, labels = flipped(case.image, plan.flips), flipped(case.labels, plan.flips)
        shape = [n for a, n in enumerate(fit.source) if a != axis]
        if not 0 <= nearest < source:
            return torch.zeros(len(image), *shape), torch.zeros(*shape, dtype=torch.int64)
        low = int(np.clip(np.floor(place), 0, source - 1))
        high = min(low + 1, source - 1)
        weight = float(np.clip(place - low, 0, 1))
        both = as_float(np.take(image, [low, high], axis=axis + 1))
        both = self.preparation.normalise_(both, case.statistics)
        both = apply_intensity(both, plan, case.statistics.top)
        first, second = both.unbind(axis + 1)
        picked = np.ascontiguousarray(np.take(labels, nearest, axis=axis)).astype(np.int64)
        return torch.lerp(first, second, weight), torch.from_numpy(picked)

    def batch(self, examples: Sequence[Slice], device: torch.device) -> dict[str, Tensor]:
        """The slices."""
        images = torch.stack([e.image for e in examples]).to(device)
        return {"images": images, "labels": torch.stack([e.labels for e in examples]).to(device)}

"""Judging a network while it trains: IoU and Dice at sampled locations, the same ones each time (SPEC §3, §4)."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from lightning_fabric import Fabric

from ossnet.data.cache import CachedCase
from ossnet.data.preparation import as_float
from ossnet.data.sampling import labels_at, sample_locations
from ossnet.field.engine import prepare
from ossnet.field.model import Model
from ossnet.networks.variants import OFFERED
from ossnet.training.losses import sampled_scores
from ossnet.training.settings import Settings


@dataclass(frozen=True)
class SampledScores:
    """Scores of one case, one value a structure."""

    name: str
    iou: tuple[float, ...]
    dice: tuple[float, ...]

    @property
    def mean_iou(self) -> float:
        """Mean over structures."""
        return sum(self.iou) / len(self.iou)

    @property
    def mean_dice(self) -> float:
        """Mean over structures."""
        return sum(self.dice) / len(self.dice)


def validation_locations(case: CachedCase, settings: Settings) -> np.ndarray:
    """(N, 3) locations of a case: they depend on its name and nothing else (SPEC §7.10)."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    if settings.validation.scheme == "released_lits":
        return sample_locations(rng, case.fit, 2**14, case.border, 0.4)
    return sample_locations(rng, case.fit, settings.validation.locations)


@torch.no_grad()
def validate(
    model: Model, cases: Sequence[CachedCase], settings: Settings, fabric: Fabric
) -> list[SampledScores]:
    """Scores of every case; several processes share the cases and all get all scores."""
    # Judged as it is used; the paper's variants in full precision, so that epochs compare to the last digit.
    precision: Literal["auto", "fp32"] = "fp32" if settings.variant in OFFERED else "auto"
    structures = max(len(model.label_names), 1)
    # Each process fills its rows; the sum over processes is the whole table.
    table = torch.zeros(len(cases), 2, structures, dtype=torch.float64)
    for index in range(fabric.global_rank, len(cases), fabric.world_size):
        case = cases[index]
        image = as_float(case.image, fabric.device)
        image = case.fit.volume(model.preparation.normalised(image, case.statistics))
        answer = prepare(
            model.network, image, device=fabric.device, precision=precision, **model.engine_options()
        )
        locations = validation_locations(case, settings)
        logits = answer(torch.from_numpy(locations).to(fabric.device)).cpu()
        labels = torch.from_numpy(labels_at(case.labels, case.fit, locations).astype(np.int64))
        scores = sampled_scores(logits[None], labels[None], settings.validation.empty_score)
        table[index] = torch.stack([scores.iou[0], scores.dice[0]])
    if fabric.world_size > 1:
        table = fabric.all_reduce(table.to(fabric.device), reduce_op="sum").cpu()  # type: ignore[union-attr]
    return [
        SampledScores(case.name, tuple(row[0].tolist()), tuple(row[1].tolist()))
        for case, row in zip(cases, table, strict=True)
    ]

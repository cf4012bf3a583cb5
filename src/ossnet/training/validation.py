"""Judging a network while it trains: IoU and Dice at sampled locations, the same ones each time (SPEC §3, §4)."""

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from ossnet.data.balanced import balanced_voxels
from ossnet.data.cache import CachedCase
from ossnet.data.preparation import as_float
from ossnet.data.sampling import labels_at, sample_locations
from ossnet.field.engine.prepare import prepare
from ossnet.field.model import Model
from ossnet.field.together import MeanAnswer
from ossnet.networks.variants import PAPER_VARIANTS
from ossnet.training.checkpoint import mean
from ossnet.training.losses import sampled_scores
from ossnet.training.settings import Settings


@dataclass(frozen=True)
class SampledScores:
    """Scores of one case, one value a structure; NaN for one that is neither there nor predicted."""

    name: str
    iou: tuple[float, ...]
    dice: tuple[float, ...]

    @property
    def mean_iou(self) -> float:
        """Mean over structures, NaN for none."""
        return mean_of_known(self.iou)

    @property
    def mean_dice(self) -> float:
        """Mean over structures, NaN for none."""
        return mean_of_known(self.dice)


def mean_of_known(values: Sequence[float]) -> float:
    """Arithmetic mean of those that are finite, NaN for none."""
    return mean([v for v in values if math.isfinite(v)])


@dataclass(frozen=True)
class Questions:
    """Where a case is asked: they depend on its name and nothing else (SPEC §7.10).

    Attributes:
        locations: (N, 3) on the network's grid.
        labels: (N,) what is right there.
        weights: (N,) what each counts; None: all alike.
    """

    locations: Tensor
    labels: Tensor
    weights: Tensor | None


def validation_questions(case: CachedCase, settings: Settings, classes: int) -> Questions:
    """Questions to a case.

    Args:
        classes: Logits a location.
    """
    rng = np.random.default_rng(zlib.crc32(os.fsencode(case.name)))
    count = settings.validation.locations
    if settings.validation.scheme == "balanced":
        voxels, weights = balanced_voxels(rng, case.labels, classes, count)
        labels = case.labels[tuple(voxels.T)]
        locations = case.fit.to_fitted(torch.from_numpy(voxels).float())
        return Questions(locations, torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(weights))
    if settings.validation.scheme == "released_lits":
        places = sample_locations(rng, case.fit, 2**14, case.border, 0.4, include_last=False)
    else:
        places = sample_locations(rng, case.fit, count, include_last=settings.sampling.include_last_voxel)
    labels = labels_at(case.labels, case.fit, places).astype(np.int64)
    return Questions(torch.from_numpy(places), torch.from_numpy(labels), None)


@torch.no_grad()
def validate(
    model: Model, cases: Sequence[CachedCase], settings: Settings, fabric: Fabric
) -> list[SampledScores]:
    """Scores of every case; several processes share the cases and all get all scores."""
    # Judged as it is used; the paper's variants in full precision, so that epochs compare to the last digit.
    precision: Literal["auto", "fp32"] = "fp32" if settings.variant in PAPER_VARIANTS else "auto"
    structures = max(len(model.label_names), 1)
    # Each process fills its rows; the sum over processes is the whole table.
    table = torch.zeros(len(cases), 2, structures, dtype=torch.float64)
    for index in range(fabric.global_rank, len(cases), fabric.world_size):
        case = cases[index]
        image = as_float(case.image, fabric.device)
        image = case.fit.volume(model.preparation.normalise_(image, case.statistics))
        answers = [
            prepare(
                one.network,
                image,
                device=fabric.device,
                precision=precision,
                once=True,
                # Large patches are pooled as in training, also where dense inference has them otherwise (SPEC §7.3).
                **{**model.engine_options(), "large_pool": "avg"},
            )
            for one in model.answering
        ]
        answer = answers[0]
        if len(answers) > 1:
            answer = MeanAnswer(answers, [np.eye(4)] * len(answers), model.counts)
        asked = validation_questions(case, settings, model.classes)
        logits = answer(asked.locations.to(fabric.device)).cpu()
        empty = settings.validation.empty_score
        scores = sampled_scores(
            logits[None],
            asked.labels[None],
            math.nan if empty is None else empty,
            None if asked.weights is None else asked.weights[None],
        )
        table[index] = torch.stack([scores.iou[0], scores.dice[0]])
    if fabric.world_size > 1:
        table = fabric.all_reduce(table.to(fabric.device), reduce_op="sum").cpu()  # type: ignore[union-attr]
    return [
        SampledScores(case.name, tuple(row[0].tolist()), tuple(row[1].tolist()))
        for case, row in zip(cases, table, strict=True)
    ]

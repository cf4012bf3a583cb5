"""Losses and the metrics that are watched while training (paper equation 2; SPEC §3, §4).

Networks answer logits. The paper's loss clamps probabilities, which is done here on the logits: the same
values and gradients without rounding probabilities near 0 and 1.

Letters: B volumes, N locations, K classes including background, G foreground structures (1, or K-1).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

AUXILIARY_WEIGHT = 0.1
"""α of equation 2 (SPEC §7.30)."""

SMALLEST_PROBABILITY = 1e-6
"""Probabilities are clamped to [this, 1 - this] before the logarithm (SPEC §3)."""

_LARGEST_PROBABILITY = 1 - 2.0**-24 * round(SMALLEST_PROBABILITY * 2.0**24)
"""1 - 1e-6 as float32 knows it, in which the released clamp computes: 1 - 1.013e-6."""

_LOGIT_RANGE = (
    math.log(SMALLEST_PROBABILITY) - math.log1p(-SMALLEST_PROBABILITY),
    math.log(_LARGEST_PROBABILITY) - math.log1p(-_LARGEST_PROBABILITY),
)


class Loss(NamedTuple):
    """Equation 2 and its parts, each a scalar."""

    total: Tensor
    main: Tensor
    auxiliary: Tensor
    """0 for networks without a segmentation head."""


def binary_losses(
    logits: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Binary cross-entropy of each element, its probability clamped to [1e-6, 1 - 1e-6], no gradient outside.

    Args:
        logits: Any shape; half precision is computed in float32.
        targets: In [0, 1]; soft ones are allowed.
    """
    clamped = _full(logits).clamp(*_LOGIT_RANGE)
    return F.binary_cross_entropy_with_logits(clamped, targets.to(clamped.dtype), reduction="none")


def categorical_losses(
    logits: Float[Tensor, "*batch K"],
    targets: Integer[Tensor, "*batch"] | Float[Tensor, "*batch K"],
) -> Float[Tensor, "*batch"]:
    """Cross-entropy of each element over the last axis, clamped as in `binary_losses` (SPEC §7.2).

    Args:
        logits: K classes on the last axis.
        targets: Class indices, or a distribution over the classes.
    """
    logs = F.log_softmax(_full(logits), dim=-1)
    logs = logs.clamp(math.log(SMALLEST_PROBABILITY), math.log(_LARGEST_PROBABILITY))
    if targets.is_floating_point():
        return -(logs * targets.to(logs.dtype)).sum(dim=-1)
    return -logs.gather(-1, targets.long()[..., None])[..., 0]


def occupancy_loss(
    logits: Tensor, labels: Tensor, hardest: float = 1.0, weights: Float[Tensor, "B N"] | None = None
) -> Float[Tensor, ""]:
    """Mean cross-entropy over volumes and locations: the first term of equation 2.

    Args:
        logits: (B, N) for one structure, (B, N, K) for K classes.
        labels: For (B, N) logits: (B, N), integers and booleans are occupied where above 0, floats are taken
        as
            occupancies in [0, 1]. For (B, N, K) logits: (B, N) class indices or (B, N, K) distributions.
        hardest: Share of the elements that count, those of the largest loss ("bootstrapping" in the released
            code, which the paper does not use: 1).
        weights: What each location counts, 1 on average; None: all alike.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    losses = _losses(logits, labels)
    if weights is not None:
        losses = losses * weights
    losses = losses.flatten()
    if hardest < 1:
        losses = losses.topk(max(int(hardest * losses.numel()), 1)).values
    return losses.mean()


def auxiliary_loss(
    segmentation: Float[Tensor, "B G x y z"], presence: Float[Tensor, "B G x y z"]
) -> Float[Tensor, ""]:
    """Mean binary cross-entropy of the segmentation head: the second term of equation 2, without its weight.

    Args:
        segmentation: Logits of the head.
        presence: What `ossnet.data.sampling.low_res_labels` gives.
    """
    return binary_losses(segmentation, presence).mean()


def oss_net_loss(
    logits: Tensor,
    labels: Tensor,
    segmentation: Float[Tensor, "B G x y z"] | None = None,
    presence: Float[Tensor, "B G x y z"] | None = None,
    weight: float = AUXILIARY_WEIGHT,
) -> Loss:
    """Equation 2: L = CE(o, label) + α · BCE(s, y).

    Args:
        logits: See `occupancy_loss`.
        labels: See `occupancy_loss`.
        segmentation: Logits of the head, None for networks without.
        presence: Targets of the head (`ossnet.data.sampling.low_res_labels`).
        weight: α.

    Raises:
        ValueError: If there is a head and no target for it, or shapes do not belong together.
    """
    main = occupancy_loss(logits, labels)
    if segmentation is None:
        return Loss(main, main, torch.zeros_like(main))
    if presence is None:
        raise ValueError("a network with a segmentation head needs its low-resolution target")
    auxiliary = auxiliary_loss(segmentation, presence)
    return Loss(main + weight * auxiliary, main, auxiliary)


def soft_dice_loss(
    logits: Tensor,
    labels: Tensor,
    smooth: float = 1.0,
    weights: Float[Tensor, "B N"] | None = None,
) -> Float[Tensor, ""]:
    """1 - soft Dice of sampled locations, mean over foreground structures and volumes.

    Dice = (2 Σ p y + smooth) / (Σ p + Σ y + smooth).

    Args:
        logits: (B, N), or (B, N, K) with background first.
        labels: As for `occupancy_loss`.
        smooth: Keeps the slope bounded where there is little of a structure. Where there is nothing of it 1 takes its
            place: what is drawn nevertheless is pushed back, however much it is.
        weights: What each location counts in the sums; None: all alike.
    """
    probabilities, targets = _foreground(logits, labels)
    overlap, total, present = probabilities * targets, probabilities + targets, targets
    if weights is not None:
        overlap, total = overlap * weights[..., None], total * weights[..., None]
    overlap, total, present = overlap.sum(1), total.sum(1), present.sum(1)
    added = torch.where(present > 0, smooth, 1.0)
    return (1 - (2 * overlap + added) / (total + added)).mean()


def compound_loss(
    logits: Tensor,
    labels: Tensor,
    dice_weight: float = 1.0,
    weights: Float[Tensor, "B N"] | None = None,
    smooth: float = 1.0,
) -> Float[Tensor, ""]:
    """Cross-entropy plus `dice_weight` · soft Dice loss over sampled locations; arguments as above.

    For a dense network pass its answer through `as_locations` first.
    """
    loss = occupancy_loss(logits, labels, weights=weights)
    if dice_weight == 0:
        return loss
    return loss + dice_weight * soft_dice_loss(logits, labels, smooth, weights)


def as_locations(dense: Float[Tensor, "B K *space"]) -> Float[Tensor, "B N *K"]:
    """A dense network's logits in the layout of sampled ones: (B, 1, …) → (B, N), (B, K, …) → (B, N, K)."""
    flat = dense.flatten(2)
    return flat[:, 0] if flat.shape[1] == 1 else flat.movedim(1, -1)


class Scores(NamedTuple):
    """IoU and Dice of each volume and structure, (B, G) each."""

    iou: Float[Tensor, "B G"]
    dice: Float[Tensor, "B G"]


def overlap_scores(
    occupied: Bool[Tensor, "B N G"],
    labels: Bool[Tensor, "B N G"],
    empty_score: float = 0.0,
    weights: Float[Tensor, "B N"] | None = None,
) -> Scores:
    """IoU and Dice of sets of locations (SPEC §4), one value a volume and structure.

    Means over volumes are the caller's: over cases, not over batches (SPEC §7.12).

    Args:
        occupied: Predicted, p > 0.5.
        labels: True ones.
        empty_score: Score where prediction and label are both empty (SPEC §7.26): 0 as in the paper; 1 or NaN
            are common elsewhere.
        weights: What each location counts; None: all alike.
    """
    # Counted in integers or doubles: exact for any number of locations.
    each = torch.ones((), dtype=torch.int64) if weights is None else weights.double()[..., None]
    intersection = ((occupied & labels) * each).sum(1)
    union = ((occupied | labels) * each).sum(1)
    total = (occupied * each).sum(1) + (labels * each).sum(1)
    # The 1e-10 of SPEC §4 only matters where the union is empty, and there it is replaced by `empty_score`.
    iou = intersection.double() / (union.double() + 1e-10)
    dice = 2 * intersection.double() / (total.double() + 1e-10)
    empty = union == 0
    return Scores(iou.masked_fill(empty, empty_score).float(), dice.masked_fill(empty, empty_score).float())


def sampled_scores(
    logits: Tensor,
    labels: Tensor,
    empty_score: float = 0.0,
    weights: Float[Tensor, "B N"] | None = None,
) -> Scores:
    """IoU and Dice at sampled locations from logits, for each volume and foreground structure.

    Args:
        logits: (B, N): occupied where above 0 (p > 0.5, strictly). (B, N, K): the class of the largest logit.
        labels: (B, N) integers or booleans.
        empty_score, weights: See `overlap_scores`.
    """
    _check_shapes(logits, labels)
    if logits.ndim == 2:
        return overlap_scores((logits > 0)[..., None], (labels > 0)[..., None], empty_score, weights)
    kinds = torch.arange(1, logits.shape[-1], device=logits.device)
    answers = logits.argmax(dim=-1)
    return overlap_scores(answers[..., None] == kinds, labels[..., None] == kinds, empty_score, weights)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each location, binary or categorical by the axes of the logits."""
    _check_shapes(logits, labels)
    if logits.ndim == 2:
        return binary_losses(logits, _occupancy(labels))
    return categorical_losses(logits, labels)


def _foreground(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and targets of the foreground structures, (B, N, G) each."""
    _check_shapes(logits, labels)
    logits = _full(logits)
    if logits.ndim == 2:
        return logits.sigmoid()[..., None], _occupancy(labels).to(logits.dtype)[..., None]
    probabilities = logits.softmax(dim=-1)[..., 1:]
    if labels.ndim == 3:
        return probabilities, labels[..., 1:].to(logits.dtype)
    kinds = torch.arange(1, logits.shape[-1], device=logits.device)
    return probabilities, (labels[..., None] == kinds).to(logits.dtype)


def _occupancy(labels: Tensor) -> Tensor:
    return labels if labels.is_floating_point() else (labels > 0).float()


def _check_shapes(logits: Tensor, labels: Tensor) -> None:
    hard = labels.shape == logits.shape[:2] and not (logits.ndim == 3 and labels.is_floating_point())
    soft = labels.shape == logits.shape and labels.is_floating_point()
    if logits.ndim not in (2, 3) or not (hard or soft):
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} ({labels.dtype}) do not belong"
            " together: (B, N) takes (B, N), (B, N, K) takes (B, N) class indices or (B, N, K) distributions"
        )


def _full(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

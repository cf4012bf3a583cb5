"""Losses and sampled metrics: the reference, hand-made values, and gradients."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ossnet.training.losses import (
    as_locations,
    auxiliary_loss,
    binary_losses,
    categorical_losses,
    compound_loss,
    occupancy_loss,
    oss_net_loss,
    overlap_scores,
    sampled_scores,
    soft_dice_loss,
)

CASE = Path(__file__).parents[1] / "fixtures" / "released_weights" / "loss_metrics.npz"


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    with np.load(CASE) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def released_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """SPEC §3 as it stands, in probabilities."""
    p = logits.sigmoid().clamp(1e-6, 1 - 1e-6)
    return -(targets * p.log() + (1 - targets) * (1 - p).log())


def test_reference(case: dict[str, Tensor]) -> None:
    logits, labels = torch.logit(case["prediction"][..., 0]), case["label"][..., 0]
    assert bool(torch.isinf(logits).any())  # probabilities 0 and 1 are in it
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(occupancy_loss(logits, labels), case["bce"], **close)
    torch.testing.assert_close(
        occupancy_loss(logits, labels, hardest=0.8), case["bce_bootstrap_top80"], **close
    )
    scores = sampled_scores(logits, labels.bool())
    torch.testing.assert_close(scores.iou.mean(), case["iou"], **close)
    torch.testing.assert_close(scores.dice.mean(), case["dice"], **close)
    assert scores.iou[2].item() == scores.dice[2].item() == 0  # the empty label


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(-40, 40), st.floats(0, 1)), min_size=1, max_size=20))
def test_clamped_probabilities(pairs: list[tuple[float, float]]) -> None:
    logits, targets = torch.tensor(pairs, dtype=torch.float64).T
    near = binary_losses(logits, targets), released_bce(logits, targets)
    # The clamp is that of float32, where 1 - 1e-6 is not exactly representable.
    torch.testing.assert_close(*near, rtol=1e-2, atol=1e-6)


def test_gradient_is_zero_outside_the_clamp() -> None:
    logits = torch.tensor([[-14.0, -13.7, 0.0, 13.7, 14.0]], requires_grad=True)
    occupancy_loss(logits, torch.tensor([[1, 1, 1, 0, 0]])).backward()
    assert logits.grad is not None
    torch.testing.assert_close(
        logits.grad * 5, torch.tensor([[0.0, -1.0, -0.5, 1.0, 0.0]]), rtol=0, atol=1e-5
    )


def test_gradient_equals_that_of_the_released_form() -> None:
    logits = torch.linspace(-10, 10, 41)[None].requires_grad_()
    labels = (torch.arange(41) % 3 == 0)[None]
    (ours,) = torch.autograd.grad(occupancy_loss(logits, labels), logits)
    (theirs,) = torch.autograd.grad(released_bce(logits.double(), labels.double()).mean(), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_classes_sum_over_the_last_axis() -> None:
    """SPEC §7.2; and a binary softmax is the binary loss of the difference."""
    logits, labels = torch.randn(2, 7, 4), torch.randint(0, 4, (2, 7))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(occupancy_loss(logits, labels), expected)
    one_hot = torch.nn.functional.one_hot(labels, 4).float()
    torch.testing.assert_close(occupancy_loss(logits, one_hot), expected)
    two = torch.randn(2, 9, 2)
    target = torch.randint(0, 2, (2, 9))
    torch.testing.assert_close(
        occupancy_loss(two, target), occupancy_loss(two[..., 1] - two[..., 0], target), rtol=1e-5, atol=1e-6
    )
    # Clamped alike: certain and wrong costs -log 1e-6, certain and right moves nothing.
    sure = torch.tensor([[[30.0, -30.0, 0.0]] * 2], requires_grad=True)
    losses = categorical_losses(sure, torch.tensor([[0, 1]]))
    assert losses[0, 1].item() == pytest.approx(-math.log(1e-6), rel=1e-6)
    losses.sum().backward()
    assert sure.grad is not None
    assert float(sure.grad.abs().max()) == 0


def test_labels_of_any_kind_and_shapes_that_do_not_fit() -> None:
    logits = torch.randn(2, 5)
    labels = torch.tensor([[0, 1, 2, 4, 0], [0, 0, 0, 1, 3]])
    for same in (labels, labels > 0, (labels > 0).float(), labels.to(torch.uint8)):
        assert torch.equal(occupancy_loss(logits, same), occupancy_loss(logits, labels))
    for wrong in (labels[:, :4], labels[..., None], labels[0]):
        with pytest.raises(ValueError, match="do not belong together"):
            occupancy_loss(logits, wrong)
    with pytest.raises(ValueError, match="do not belong together"):
        occupancy_loss(torch.randn(2, 5, 3), labels.float())


def test_equation_two() -> None:
    logits, labels = torch.randn(2, 6), torch.randint(0, 2, (2, 6))
    head, presence = torch.randn(2, 1, 2, 2, 1), torch.randint(0, 2, (2, 1, 2, 2, 1)).float()
    loss = oss_net_loss(logits, labels, head, presence)
    torch.testing.assert_close(loss.total, loss.main + 0.1 * loss.auxiliary)
    torch.testing.assert_close(loss.auxiliary, auxiliary_loss(head, presence))
    plain = oss_net_loss(logits, labels)
    assert torch.equal(plain.total, plain.main)
    assert plain.auxiliary.item() == 0
    with pytest.raises(ValueError, match="target"):
        oss_net_loss(logits, labels, head)


def test_soft_dice_of_certain_answers() -> None:
    labels = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]])
    sure = 60.0 * (2 * labels - 1)
    assert float(soft_dice_loss(sure, labels)) == pytest.approx(0, abs=1e-6)
    # 1 - (2·0 + 1)/(4 + 1) and 1 - 1/(4 + 1)
    assert float(soft_dice_loss(-sure, labels)) == pytest.approx(0.8, abs=1e-6)
    several = torch.nn.functional.one_hot(labels, 3) * 60.0
    # The absent third class is predicted absent.
    assert float(soft_dice_loss(several, labels)) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(
        compound_loss(sure, labels, 0.5), occupancy_loss(sure, labels) + 0.5 * soft_dice_loss(sure, labels)
    )
    torch.testing.assert_close(compound_loss(sure, labels, 0.0), occupancy_loss(sure, labels))


@pytest.mark.parametrize("classes", [1, 3])
def test_a_location_of_weight_two_counts_like_two(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, classes, generator=generator)
    labels = torch.randint(0, 2 if classes == 1 else classes, (2, 5), generator=generator)
    logits = logits[..., 0] if classes == 1 else logits
    weights = torch.tensor([[2.0, 1, 1, 1, 1]] * 2)
    twice = [torch.cat([x, x[:, :1]], dim=1) for x in (logits, labels)]
    # The mean over locations is one over five of them, with weights, and over six without.
    assert float(occupancy_loss(logits, labels, weights=weights)) * 5 == pytest.approx(
        float(occupancy_loss(*twice)) * 6
    )
    assert float(soft_dice_loss(logits, labels, weights=weights)) == pytest.approx(
        float(soft_dice_loss(*twice))
    )


def test_dense_answers_become_locations() -> None:
    dense = torch.randn(2, 3, 4, 5, 6)
    assert torch.equal(as_locations(dense)[1, 7], dense[1, :, 0, 1, 1])
    assert as_locations(dense[:, :1]).shape == (2, 120)
    labels = torch.randint(0, 3, (2, 4, 5, 6))
    torch.testing.assert_close(
        occupancy_loss(as_locations(dense), labels.flatten(1)),
        torch.nn.functional.cross_entropy(dense, labels),
    )


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_scores_are_set_overlaps(pairs: list[tuple[bool, bool]]) -> None:
    a, b = (torch.tensor(x)[None, :, None] for x in zip(*pairs, strict=True))
    scores = overlap_scores(a, b)
    iou, dice = float(scores.iou), float(scores.dice)
    assert dice == pytest.approx(2 * iou / (1 + iou), abs=1e-6)
    assert overlap_scores(b, a).iou.item() == scores.iou.item()
    if bool(b.any()):
        assert overlap_scores(b, b).dice.item() == pytest.approx(1)


def test_weights_of_scores_are_counts() -> None:
    occupied = torch.tensor([[1, 1, 0, 0]], dtype=torch.bool)[..., None]
    labels = torch.tensor([[1, 0, 1, 0]], dtype=torch.bool)[..., None]
    weights = torch.tensor([[3.0, 1.0, 2.0, 9.0]])
    often = [0, 0, 0, 1, 2, 2, *[3] * 9]
    scores = overlap_scores(occupied, labels, weights=weights)
    plain = overlap_scores(occupied[:, often], labels[:, often])
    assert scores.iou.item() == pytest.approx(plain.iou.item())
    assert scores.dice.item() == pytest.approx(plain.dice.item()) == pytest.approx(6 / 9)


def test_empty_score_and_strict_threshold() -> None:
    logits = torch.tensor([[-1.0, 0.0, -2.0]])  # a probability of exactly 0.5 is outside
    empty = torch.zeros(1, 3, dtype=torch.long)
    assert sampled_scores(logits, empty).dice.item() == 0
    assert sampled_scores(logits, empty, empty_score=1.0).dice.item() == 1
    assert sampled_scores(logits + 3, empty, empty_score=1.0).dice.item() == 0
    assert math.isnan(sampled_scores(logits, empty, empty_score=math.nan).iou.item())


def test_scores_of_classes() -> None:
    labels = torch.tensor([[0, 1, 1, 2, 2, 2]])
    answers = torch.tensor([[0, 1, 2, 2, 2, 0]])
    scores = sampled_scores(torch.nn.functional.one_hot(answers, 4).float(), labels)
    torch.testing.assert_close(scores.iou, torch.tensor([[1 / 2, 2 / 4, 0.0]]))
    torch.testing.assert_close(scores.dice, torch.tensor([[2 / 3, 4 / 6, 0.0]]))

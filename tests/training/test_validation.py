"""How a network is judged while it trains."""

from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric

from ossnet.data.cache import load_case
from ossnet.data.layouts import open_dataset
from ossnet.training.planning import make_plan
from ossnet.training.settings import make_settings
from ossnet.training.validation import validate


def test_as_it_is_used_mirrored_or_not(balls: Path) -> None:
    """By the mean over mirror images where the model will be asked so."""
    dataset = open_dataset(balls)
    settings = make_settings(changes=["augmentation.flip_axes=[0]", "validation.locations=2000"])
    torch.manual_seed(0)
    plan = make_plan(dataset, dataset.cases, settings)
    with torch.no_grad():
        for parameter in plan.model.network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    case = load_case(dataset, dataset.cases[0], plan.model.preparation, plan.classes)
    fabric = Fabric(accelerator="cpu", devices=1)

    def score(mirror: tuple[int, ...]) -> tuple[float, ...]:
        return validate(replace(plan.model, mirror=mirror), [case], settings, fabric)[0].dice

    assert plan.model.mirror == (0,)
    assert validate(plan.model, [case], settings, fabric)[0].dice == score((0,)) != score(())
    assert max(score(())) > 0

"""How a network is judged while it trains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from ossnet.data.cache import load_case
from ossnet.data.layouts import open_dataset
from ossnet.training import validation
from ossnet.training.planning import make_plan
from ossnet.training.settings import make_settings
from ossnet.training.validation import validate, validation_questions


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


def test_large_patches_are_pooled_as_in_training(balls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where dense inference pools them otherwise (SPEC §7.3)."""
    dataset = open_dataset(balls)
    small = ["data.shape=32,32,32", "network.blocks=4,8", "network.width=16", "validation.locations=100"]
    settings = make_settings("D", changes=[*small, "network.large_pool=released"])
    plan = make_plan(dataset, dataset.cases, settings)
    case = load_case(dataset, dataset.cases[0], plan.model.preparation, plan.classes)
    assert plan.model.engine_options()["large_pool"] == "max"
    asked: list[str] = []

    def prepare(*arguments: Any, **options: Any) -> Any:
        asked.append(options["large_pool"])
        return usual(*arguments, **options)

    usual = validation.prepare
    monkeypatch.setattr(validation, "prepare", prepare)
    validate(plan.model, [case], settings, Fabric(accelerator="cpu", devices=1))
    assert asked == ["avg"]


def test_the_last_voxel_is_left_out_as_released_where_that_is_wanted(balls: Path) -> None:
    dataset = open_dataset(balls)
    shape = "data.shape=32,32,32"
    found = {}
    for changes in ((), ("sampling.include_last_voxel=false",), ("validation.scheme=released_lits",)):
        settings = make_settings("C", changes=[shape, *changes])
        plan = make_plan(dataset, dataset.cases, settings)
        case = load_case(dataset, dataset.cases[0], plan.model.preparation, plan.classes)
        found[changes] = validation_questions(case, settings, plan.classes).locations.numpy().max(axis=0)
    largest = list(found.values())
    np.testing.assert_array_equal(largest[0], [31, 31, 31])
    for fewer in largest[1:]:
        np.testing.assert_array_equal(fewer, [30, 30, 30])

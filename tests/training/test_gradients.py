"""Gradients captured as a CUDA graph are those of a plain step; on a CPU there is nothing but plain steps."""

import copy

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from tests.data.balls import as_is
from tests.tiny import network

from ossnet.data.crop_locations import surface_voxels
from ossnet.data.crops import CropSource
from ossnet.data.examples import example
from ossnet.data.preparation import Preparation
from ossnet.networks.multiscale import MultiscaleNetwork
from ossnet.networks.multiscale_plan import MultiscalePlan
from ossnet.training.gradients import Gradients
from ossnet.training.recipes.multiscale import MultiscaleRecipe
from ossnet.training.settings import make_settings

STEPS = 8
"""More than are done before a capture."""


def examples(recipe: MultiscaleRecipe) -> list[dict[str, torch.Tensor]]:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:12, 5:12, 5:12] = 1
    image = labels[None] + np.random.default_rng(0).normal(0, 0.3, (1, 20, 20, 20))
    source = CropSource(image.astype(np.float32), labels, 1, surface_voxels(labels, 1), as_is)
    return [example(source, recipe.crops, np.random.default_rng(i)) for i in range(STEPS)]


def test_gradients_are_those_of_the_loss_also_when_they_are_captured() -> None:
    made = network("multiscale")
    assert isinstance(made, MultiscaleNetwork)
    fabric = Fabric(accelerator="auto", devices=1)
    plain = copy.deepcopy(made).to(fabric.device).train()
    settings = make_settings(changes=["sampling.locations=64"])
    plan = MultiscalePlan(made.spec, (16, 16, 16), ())
    recipe = MultiscaleRecipe(made.to(fabric.device).train(), Preparation(), settings, plan)
    gradients = Gradients(recipe, fabric.setup_module(made), fabric)
    for drawn in examples(recipe):
        found = gradients([drawn])
        loss = recipe.loss(plain, recipe.batch([drawn], fabric.device))
        loss.backward()
        assert float(found) == pytest.approx(float(loss.detach()), rel=1e-4)
        for ours, theirs in zip(made.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
            with torch.no_grad():  # a step, so that a graph that reads old weights shows
                ours -= 0.01 * theirs.grad
                theirs -= 0.01 * theirs.grad
        made.zero_grad(set_to_none=True)
        plain.zero_grad(set_to_none=True)
    assert (gradients.captured is not None) == (fabric.device.type == "cuda")

"""The recipe of the default network: what its settings change, and scans of a few slices."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.data.balls import as_is
from tests.tiny import network

from ossnet.data.crop_locations import surface_voxels
from ossnet.data.crops import CropSource
from ossnet.data.examples import example
from ossnet.data.preparation import Preparation
from ossnet.networks.multiscale import MultiscaleNetwork
from ossnet.networks.multiscale_plan import MultiscalePlan
from ossnet.training.losses import compound_loss
from ossnet.training.recipes.multiscale import MultiscaleRecipe, crop_settings
from ossnet.training.settings import Settings, make_settings

CROP = (16, 16, 16)
CPU = torch.device("cpu")


def recipe(*changes: str) -> MultiscaleRecipe:
    made = network("multiscale")
    assert isinstance(made, MultiscaleNetwork)
    settings = make_settings(changes=["sampling.locations=64", *changes])
    return MultiscaleRecipe(made, Preparation(), settings, MultiscalePlan(made.spec, CROP, ()))


def settings_of(*changes: str) -> Settings:
    return make_settings(changes=list(changes))


def test_coarse_cells_that_see_nothing_of_a_thin_scan_do_not_count() -> None:
    trained = recipe()
    labels = np.zeros((20, 20, 1), np.uint8)
    labels[5:12, 5:12] = 1
    source = CropSource(labels[None].astype(np.float32), labels, 1, surface_voxels(labels, 1), as_is)
    made = example(source, trained.crops, np.random.default_rng(0))
    made["weights"] = torch.zeros_like(made["weights"])
    loss = trained.loss(trained.network, trained.batch([made], CPU))
    assert bool(torch.isfinite(loss))
    without = recipe("loss.aux=0")
    assert torch.equal(loss, without.loss(trained.network, trained.batch([made], CPU)))
    loss.backward()
    assert all(p.grad is not None for p in trained.network.parameters())  # several processes need all of them


def test_a_structure_of_few_voxels_counts_in_soft_dice() -> None:
    """Missing it costs nearly as much as missing a large one: sums of soft Dice are not drowned."""
    labels = np.zeros((64, 64, 64), np.uint8)
    labels[30:33, 30:33, 30:33] = 1
    source = CropSource(labels[None].astype(np.float32), labels, 1, surface_voxels(labels, 1), as_is)
    made = network("multiscale")
    assert isinstance(made, MultiscaleNetwork)
    wide = MultiscaleRecipe(
        made,
        Preparation(),
        make_settings(changes=["sampling.locations=4096"]),
        MultiscalePlan(made.spec, (64, 64, 64), ()),
    )
    crops = replace(wide.crops, spatial=0.0, centred=1.0)
    drawn = example(source, crops, np.random.default_rng(0))
    logits = torch.full((1, 4096), -20.0)
    missed = compound_loss(
        logits, drawn["targets"][None], 1.0, weights=drawn["importance"][None], smooth=wide.voxel
    ) - compound_loss(logits, drawn["targets"][None], 0.0, weights=drawn["importance"][None])
    assert wide.voxel == 4096 / 64**3
    assert float(missed) > 0.9


def test_settings_of_crops_do_what_they_say() -> None:
    def crops(*changes: str) -> object:
        return crop_settings(settings_of(*changes), CROP, (1.0, 1.0, 1.0), (2, 2, 2))

    plain = crop_settings(settings_of(), CROP, (1.0, 1.0, 1.0), (2, 2, 2))
    assert (plain.near_surface, plain.intensity, plain.flips) == (0.5, 1.0, ())
    assert plain.spatial > 0
    assert crops("augmentation.spatial=false", "augmentation.flip_axes=[0]") == replace(
        plain, spatial=0.0, flips=(0,)
    )
    assert crops("augmentation.intensity=0") == replace(plain, intensity=0.0)
    assert crops("sampling.strategy=uniform") == replace(plain, near_surface=0.0)
    assert crops("sampling.border_share=0.25") == replace(plain, near_surface=0.25)
    assert crops("network.position=true") == replace(plain, position=True)
    assert crops("augmentation.grows=30") == replace(plain, grows=30)


def test_augmentation_grows_while_the_cases_are_drawn_again_and_again() -> None:
    plain = crop_settings(settings_of("augmentation.grows=20"), CROP, (1.0, 1.0, 1.0), (2, 2, 2))
    assert plain.after(0.0) == plain.after(20.0) == plain
    between, late = plain.after(50.0), plain.after(80.0)
    assert plain.rotation < between.rotation < late.rotation == 2 * plain.rotation
    assert late.intensity > plain.intensity
    assert plain.after(1000.0) == late
    assert replace(plain, grows=0).after(1000.0) == replace(plain, grows=0)
    # Half way from the strength of the beginning to twice that, half way from 30 to 120 passes.
    assert replace(plain, grows=30).after(75.0).rotation == pytest.approx(1.5 * plain.rotation)
    nothing = replace(plain, spatial=0.0, intensity=0.0).after(1000.0)
    assert (nothing.spatial, nothing.intensity) == (0.0, 0.0)


def test_the_kind_of_loss_is_heeded() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:12, 5:12, 5:12] = 1
    source = CropSource(labels[None].astype(np.float32), labels, 1, surface_voxels(labels, 1), as_is)
    losses = {}
    for kind in ("dice", "paper"):
        trained = recipe(f"loss.kind={kind}", "loss.aux=0")
        made = example(source, trained.crops, np.random.default_rng(0))
        losses[kind] = trained.loss(trained.network, trained.batch([made], CPU)).item()
    none = recipe("loss.dice=0", "loss.aux=0")
    made = example(source, none.crops, np.random.default_rng(0))
    assert losses["dice"] > losses["paper"]
    assert losses["paper"] == pytest.approx(none.loss(none.network, none.batch([made], CPU)).item())


def test_the_loss_of_crops_is_the_mean_of_theirs() -> None:
    """So that it does not matter how many devices share them."""
    trained = recipe("loss.dice=0")
    made = []
    for seed, size in enumerate((20, 10)):  # a crop is larger than the second
        labels = np.zeros((size, size, size), np.uint8)
        labels[3:8, 3:8, 3:8] = 1
        source = CropSource(labels[None].astype(np.float32), labels, 1, surface_voxels(labels, 1), as_is)
        made.append(example(source, trained.crops, np.random.default_rng(seed)))
    shares = {float(one["weights"].mean()) for one in made}
    assert len(shares) == 2
    both, one, other = (
        trained.loss(trained.network, trained.batch(part, CPU)).item() for part in (made, made[:1], made[1:])
    )
    assert both == pytest.approx((one + other) / 2, rel=1e-5)

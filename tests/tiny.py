"""Networks of every family that are small enough for tests, with fixed random weights that do not answer all alike."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from ossnet.data.patches import PatchSource
from ossnet.data.preparation import Preparation, reduce_by_two
from ossnet.field.model import Model
from ossnet.networks.multiscale import MultiscaleNetwork, MultiscaleSpec, Stage
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.unet import UNet, UNetSpec
from ossnet.networks.variants import spec_for
from ossnet.volume import Shape, Volume

FAMILIES = ("multiscale", "C", "unet3d")


def network(
    family: str, classes: int = 1, channels: int = 1, shape: Shape = (32, 32, 32), seed: int = 0
) -> nn.Module:
    """A network with random weights."""
    torch.manual_seed(seed)
    if family == "multiscale":
        stages = (
            Stage(stride=(1, 1, 1), kernel=(3, 3, 3), width=4, trunk=0, lateral=1, features=4),
            Stage(stride=(2, 2, 2), kernel=(3, 3, 3), width=8, trunk=1, lateral=0, features=4),
        )
        spec = MultiscaleSpec(
            channels=channels,
            classes=classes,
            spacing=(1.0, 1.0, 1.0),
            stages=stages,
            patch_features=4,
            decoder_width=8,
            decoder_blocks=1,
        )
        made: nn.Module = MultiscaleNetwork(spec)
    elif family == "unet3d":
        made = UNet(UNetSpec(variant="unet3d", channels=channels, classes=classes, filters=(4, 8)))
    else:
        made = OSSNet(replace(spec_for(family, channels, classes, shape, (4, 8)), width=16))
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                module.weight.add_(0.3 * torch.randn_like(module.weight))
    if isinstance(made, OSSNet):
        _measure_statistics(made)
    return made.eval()


def model(family: str, classes: int = 1, channels: int = 1, **preparation: Any) -> Model:
    """A model around the first such network that gives every class a share of a scan."""
    if family == "C" and "fit" not in preparation:
        preparation |= {"fit": "pad", "shape": (32, 32, 32)}
    made = deepcopy(_model(family, classes, channels, tuple(sorted(preparation.items()))))
    torch.manual_seed(0)  # what a test draws does not depend on who asked for models before
    return made


@cache
def _model(family: str, classes: int, channels: int, prepared: tuple[tuple[str, Any], ...]) -> Model:
    preparation = dict(prepared)
    names = {k: f"part {k}" for k in range(1, max(classes, 2))}
    volume = scan(channels=channels)
    voxels = np.stack(np.meshgrid(*(np.arange(0, n, 2) for n in volume.shape), indexing="ij"), -1).reshape(
        -1, 3
    )
    for seed in range(100):
        made = network(family, classes, channels, preparation.get("shape") or (32, 32, 32), seed)
        built = Model(made, Preparation(**preparation), names, metadata={"variant": family})
        logits = built.field(volume, precision="fp32", device="cpu").logits(voxels)
        labels = logits.argmax(axis=1) if classes > 1 else logits > 0
        if np.bincount(labels, minlength=max(classes, 2)).min() > 0.1 * len(labels):
            return built
    raise ValueError(f"no seed gives {family} varied answers")


def scan(shape: Shape = (14, 12, 10), channels: int = 1, affine: np.ndarray | None = None) -> Volume:
    """Smooth noise without any symmetry, int16."""
    rng = np.random.default_rng(5)
    coarse = torch.from_numpy(rng.normal(size=(1, channels, *(max(2, n // 3) for n in shape))))
    smooth = nn.functional.interpolate(coarse, shape, mode="trilinear", align_corners=True)[0].numpy()
    noise = 0.1 * rng.normal(size=smooth.shape)
    return Volume((200 * (smooth + noise)).astype(np.int16), np.eye(4) if affine is None else affine)


@torch.no_grad()
def _measure_statistics(made: OSSNet) -> None:
    """Running averages as after a training; with those of a fresh network activations grow from block to block."""
    for module in made.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 1.0
    image = torch.randn(made.spec.channels, *made.spec.shape)
    locations = torch.rand(200, 3) * torch.tensor(made.spec.shape)
    patches = PatchSource(image, made.spec.patches)(locations.long())
    made.train()(reduce_by_two(image)[None], locations[None], None if patches is None else patches[None])

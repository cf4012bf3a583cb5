"""What a training will do, worked out from the data set and the settings before anything is loaded.

Every choice that the user did not make is named with its reason.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from ossnet.data.cases import Case, Dataset, joined_name
from ossnet.data.fingerprint import propose_fit
from ossnet.data.preparation import Preparation, Spacing
from ossnet.errors import SettingsError
from ossnet.field.model import FILES, Model, versions
from ossnet.files.reading import read_header
from ossnet.networks.mirrored import mirrorable
from ossnet.networks.multiscale import MultiscaleNetwork
from ossnet.networks.multiscale_plan import CROP_VOXELS, plan, plan_crop, plan_stages
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.unet import FILTERS, UNet, UNetSpec
from ossnet.networks.variants import PAPER_VARIANTS, admissible_shape, block_channels, spec_for
from ossnet.training.channels import choose_intensities
from ossnet.training.recipes.base import Recipe
from ossnet.training.recipes.dense import CropUNetRecipe, SliceUNetRecipe, WholeUNetRecipe
from ossnet.training.recipes.multiscale import MultiscaleRecipe
from ossnet.training.recipes.occupancy import OccupancyRecipe
from ossnet.training.schedule import enough_steps
from ossnet.training.settings import Settings
from ossnet.volume import Shape

FEW_CASES = 48
"""So many training cases are soon known by heart."""

GROWS = 20
"""Passes through few cases after which augmentation grows (`CropSettings.after`); through more cases twice as many."""


@dataclass(frozen=True)
class TrainingPlan:
    """A fresh model, how it is trained, and why."""

    model: Model
    recipe: Recipe
    classes: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Grids:
    """Shapes and spacings (mm) of the (oriented) training scans."""

    shapes: tuple[Shape, ...]
    spacings: tuple[Spacing, ...]

    @property
    def median_spacing(self) -> Spacing:
        """Per axis."""
        x, y, z = np.median(np.array(self.spacings), axis=0).tolist()
        return float(f"{x:.6g}"), float(f"{y:.6g}"), float(f"{z:.6g}")

    def extents(self) -> dict[str, list[float]]:
        """Smallest and largest extent in mm, per axis."""
        all_mm = np.array(self.shapes) * np.array(self.spacings)
        return {
            "smallest": [float(f"{v:.4g}") for v in all_mm.min(axis=0)],
            "largest": [float(f"{v:.4g}") for v in all_mm.max(axis=0)],
        }

    def median_shape_at(self, spacing: Spacing) -> Shape:
        """Voxels of the median scan after resampling."""
        extent = np.median(np.array(self.shapes) * np.array(self.spacings), axis=0)
        x, y, z = (max(1, round(float(v))) for v in extent / np.array(spacing))
        return x, y, z


def read_grids(cases: Sequence[Case], preparation: Preparation) -> Grids:
    """Look at the headers only."""
    shapes, spacings = [], []
    for case in cases:
        header = read_header(case.images[0])
        orientation = preparation.orient(header.affine)
        shapes.append(orientation.moved(header.shape))
        spacings.append(orientation.moved(header.spacing))
    return Grids(tuple(shapes), tuple(spacings))


def make_plan(
    dataset: Dataset, train: Sequence[Case], settings: Settings, *, resumed: Path | None = None
) -> TrainingPlan:
    """Decide preparation, network and recipe.

    Args:
        resumed: The run folder of a training that goes on: it has weights of its own.

    Raises:
        SettingsError: Settings that do not fit the data.
        VolumeError: A scan that cannot be read.
    """
    if settings.augmentation.grows is None:
        grows = GROWS if len(train) <= FEW_CASES else 2 * GROWS
        augmentation = settings.augmentation.model_copy(update={"grows": grows})
        settings = settings.model_copy(update={"augmentation": augmentation})
    structures = _structures(dataset, settings)
    names, classes = structures.names, structures.classes
    reasons = list(structures.reasons)
    if settings.data.fold == "paper":
        reasons.append(
            "a split of the paper's sizes, drawn anew: the authors' lists are not at hand (a list of your own: "
            "splits_final.json in the data set, and --fold 0)"
        )

    intensities = choose_intensities(dataset, train, settings)
    reasons.extend(intensities.reasons)
    base = Preparation(
        orientation=settings.data.orientation,
        normalise=intensities.normalise,
        windows=intensities.windows,
    )
    grids = read_grids(train, base)
    reasons.append(_mirroring(settings))
    channels = len(dataset.channel_names)
    more: tuple[str, ...] = ()
    recipe: Recipe
    known = _known_network(settings, resumed)
    if settings.variant == "multiscale":
        recipe, more = _multiscale(base, grids, channels, classes, settings, known)
    elif settings.variant in PAPER_VARIANTS:
        preparation, blocks = _fitted(base, grids, settings, reasons)
        network = _oss_net(preparation, blocks, channels, classes, settings)
        recipe = OccupancyRecipe(network, preparation, settings)
        more = (f"encoder blocks {network.spec.blocks}, low-resolution grid {network.spec.grid}",)
    else:
        recipe = _unet(base, grids, channels, classes, settings, reasons)
        settings = recipe.settings
    reasons.extend(more)
    mirror = _mirrored_in_use(settings, recipe.network)
    if mirror:
        reasons.append(
            f"inference averages {2 ** len(mirror)} predictions, mirrored and not (augmentation.mirror_in_use)"
        )
    if resumed is None and known is not None:
        reasons.append(_start_from(known, recipe.network, str(settings.network.init)))
    reasons.append(f"{sum(p.numel() for p in recipe.network.parameters()):,} parameters")
    if settings.schedule.minutes is not None:
        reasons.append(_duration(settings, len(train) * recipe.repeats))
    model = Model(recipe.network, recipe.preparation, names, mirror=mirror)
    model.channel_names = tuple(dataset.channel_names)
    model.metadata = {
        "variant": settings.variant,
        "data": {"name": dataset.root.name, "layout": dataset.layout, "training cases": len(train)},
        "extent_mm": grids.extents(),
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }
    if structures.values:
        model.metadata["label_values"] = {str(label): value for label, value in structures.values.items()}
    if dataset.regions and classes > 1:
        model.metadata["regions"] = {name: list(parts) for name, parts in dataset.regions.items()}
    return TrainingPlan(model, recipe, classes, tuple(reasons))


@dataclass(frozen=True)
class _Structures:
    """What a network tells apart.

    Attributes:
        names: Label → name, from 1 on.
        classes: Logits a location: 1 for a single structure, otherwise structures and background.
        values: Label → its value in the label files, where these differ.
    """

    names: dict[int, str]
    classes: int
    values: Mapping[int, int]
    reasons: tuple[str, ...]


def _structures(dataset: Dataset, settings: Settings) -> _Structures:
    """All structures of a data set, or all of them as one."""
    every = {k: v for k, v in sorted(dataset.label_names.items()) if k != 0}
    one = settings.data.target == "foreground" or len(every) <= 1
    names = {1: joined_name(every.values())} if one else every
    reasons = [f"structures: {', '.join(names.values())}" + (" (as one)" if len(every) > len(names) else "")]
    told_apart = dataset.label_map if len(every) == len(names) else {}
    values = {label: value for value, label in told_apart.items() if value != label}
    if values:
        listed = ", ".join(f"{value} is {label}" for label, value in values.items())
        reasons.append(
            f"labels are numbered without gaps ({listed}); results have the values of the label files"
        )
    if dataset.regions:
        how = "merged with all other structures" if one else "learnt label by label, and judged as well"
        reasons.append(f"regions of several labels are {how}: {', '.join(dataset.regions)}")
    return _Structures(names, 1 if one else len(names) + 1, values, tuple(reasons))


def _mirrored_in_use(settings: Settings, network: nn.Module) -> tuple[int, ...]:
    """Axes along which a network is asked mirrored as well."""
    if not settings.augmentation.mirror_in_use or not settings.augmentation.flip_axes:
        return ()
    if not mirrorable(network):
        raise SettingsError(
            "augmentation.mirror_in_use",
            f"variant {settings.variant} cannot be asked mirrored",
            "Leave it out",
        )
    return tuple(sorted({*settings.augmentation.flip_axes}))


def _duration(settings: Settings, examples: int) -> str:
    """How long a training with a time limit takes, for the user.

    Args:
        examples: In a pass through all cases.
    """
    steps = enough_steps(settings.schedule, examples)
    told = f"{settings.schedule.minutes:g} minutes: rates and validations are spread over them (--minutes to change)"
    if not math.isinf(steps):
        told += f", or over {steps:,.0f} steps if they take less (schedule.passes)"
    if settings.validation.dense and settings.data.fold != "all":
        told += "; cases left out are segmented after them"
    return told


def _mirroring(settings: Settings) -> str:
    """Which axes are mirrored, for the user."""
    flips = settings.augmentation.flip_axes
    if not flips:
        return "not mirrored, since left and right may differ (augmentation.flip_axes)"
    listed = f"{'axis' if len(flips) == 1 else 'axes'} {', '.join(map(str, flips))}"
    return f"mirrored along {listed} (augmentation.flip_axes=[] where sides differ)"


def _known_network(settings: Settings, resumed: Path | None) -> nn.Module | None:
    """The network whose stages and weights a training starts from, if any.

    A training that goes on has weights of its own; the stages, which only the default network takes over, are read from
    its own model as soon as there is one.
    """
    source = settings.network.init
    if source is None or (resumed is not None and settings.variant != "multiscale"):
        return None
    own = None if resumed is None else resumed / "model"
    # The model of a run that was killed while it wrote the first one is not whole.
    return Model.load(own if own and all((own / name).is_file() for name in FILES) else source).network


def _start_from(known: nn.Module, network: nn.Module, name: str) -> str:
    """Take over all weights but those whose number follows from the channels and structures; returns what was done.

    Raises:
        SettingsError: The networks differ in more than these.
    """
    if type(known) is not type(network):
        raise SettingsError("network.init", f"{name} is of another family", "Give its --variant")
    wanted, found = (n.spec.to_dict() for n in (network, known))  # type: ignore[union-attr, operator]
    free = {"channels", "classes", "spacing"}
    other = [key for key in wanted if key not in free and wanted[key] != found.get(key)]
    if other:
        listed = ", ".join(f"{key} {found.get(key)} instead of {wanted[key]}" for key in other[:2])
        raise SettingsError(
            "network.init",
            f"{name} has another network: {listed}",
            "Set network.* and data.shape as it was trained",
        )
    own = network.state_dict()
    taken = {k: v for k, v in known.state_dict().items() if k in own and v.shape == own[k].shape}
    network.load_state_dict(taken, strict=False)
    anew = sorted({key.rpartition(".")[0] for key in own.keys() - taken.keys()})
    return f"weights start as those of {name}" + (
        f", those of {', '.join(anew)} anew: channels or structures are others" if anew else ""
    )


def _spaced(base: Preparation, grids: Grids, settings: Settings) -> Preparation:
    spacing = settings.data.spacing or grids.median_spacing
    return base.model_copy(update={"fit": "spacing", "spacing": spacing})


def _fitted(
    base: Preparation, grids: Grids, settings: Settings, reasons: list[str]
) -> tuple[Preparation, tuple[int, ...] | None]:
    """The paper's way: one full-resolution shape for all scans, and the encoder blocks that suit it."""
    wanted = settings.data.fit
    if wanted == "none" or wanted == "spacing":
        raise SettingsError(
            "data.fit",
            f"{wanted!r} leaves scans of different shapes",
            f"Variant {settings.variant} needs pad or resize",
        )
    proposal = propose_fit(grids.shapes, wanted)
    kind = proposal.kind
    blocks = settings.network.blocks
    shape = settings.data.shape
    if shape is None:
        blocks = blocks or block_channels(proposal.blocks)
        shape = admissible_shape(proposal.shape, len(blocks))
    largest = np.array(grids.shapes).max(axis=0)
    if kind == "pad" and (largest > np.array(shape)).any():
        raise SettingsError(
            "data.shape",
            f"{shape} does not hold the largest scan {tuple(largest.tolist())}",
            "Enlarge it, or use data.fit=resize",
        )
    reasons.append(f"every scan {'zero padded' if kind == 'pad' else 'resized'} to {shape} voxels")
    labels = settings.data.resized_labels
    return base.model_copy(update={"fit": kind, "shape": shape, "resized_labels": labels}), blocks


def _oss_net(
    preparation: Preparation, blocks: tuple[int, ...] | None, channels: int, classes: int, settings: Settings
) -> OSSNet:
    if preparation.shape is None:
        raise SettingsError("data.shape", "it is missing", "Give the full-resolution shape")
    spec = spec_for(settings.variant, channels, classes, preparation.shape, blocks)
    chosen = settings.network
    return OSSNet(
        replace(
            spec,
            width=chosen.width or spec.width,
            cbn_statistics=chosen.cbn_statistics,
            normalise_coordinates=chosen.normalise_coordinates,
        )
    )


def _multiscale(
    base: Preparation,
    grids: Grids,
    channels: int,
    classes: int,
    settings: Settings,
    known: nn.Module | None,
) -> tuple[Recipe, tuple[str, ...]]:
    """The default network: stages and grid from the scans, or those of a network that the training starts from."""
    like = known.spec if isinstance(known, MultiscaleNetwork) else None
    if like is not None and settings.data.spacing is None:
        preparation = base.model_copy(update={"fit": "spacing", "spacing": like.spacing})
        origin = f"that of {settings.network.init}"
    else:
        preparation = _spaced(base, grids, settings)
        origin = "as set" if settings.data.spacing else "the median spacing of the training scans"
    spacing = preparation.spacing or grids.median_spacing
    chosen = plan(
        spacing,
        grids.median_shape_at(spacing),
        channels,
        classes,
        crop_voxels=settings.sampling.crop_voxels or CROP_VOXELS,
        like=like,
    )
    chosen = replace(chosen, spec=replace(chosen.spec, position=settings.network.position))
    network = MultiscaleNetwork(chosen.spec)
    grid = f"grid: {' × '.join(f'{s:g}' for s in spacing)} mm, {origin}"
    reasons = (grid, *chosen.reasons, *_training_reasons(settings, classes))
    return MultiscaleRecipe(network, preparation, settings, chosen), reasons


def _training_reasons(settings: Settings, classes: int) -> tuple[str, ...]:
    """What the default network is fed and moved by, for the user."""
    sampling = settings.sampling
    near = sampling.near_borders
    balance = ", of every structure as many" if classes > 1 and near else ""
    weights = "; weights make them count as the voxels do" if sampling.importance and near else ""
    share = "half" if near == 0.5 else f"{near:.0%}" if near else "none"
    changed = settings.augmentation.intensity > 0
    deformed = "half of them rotated, scaled and bent" if settings.augmentation.spatial else "not deformed"
    deformed += ", intensities changed" if changed else ", intensities as scanned"
    grows = settings.augmentation.grows
    if grows and (changed or settings.augmentation.spatial):
        deformed += f", more after {grows} passes through the cases and twice as much after {4 * grows}"
    optimiser = settings.optimiser
    position = ("where a location lies in its scan is told to the network, as set",)
    return (
        *(position if settings.network.position else ()),
        f"{settings.schedule.batch_size} crop{'s' * (settings.schedule.batch_size > 1)} a step, "
        f"{sampling.locations} locations a crop, {share} of them near surfaces{balance}{weights}",
        f"crops: {deformed}",
        f"optimiser {optimiser.name}"
        + (": Muon for convolutions, AdamW for the rest" if optimiser.name == "muon" else ""),
    )


def _unet(
    base: Preparation, grids: Grids, channels: int, classes: int, settings: Settings, reasons: list[str]
) -> Recipe:
    """A voxel baseline: slices, patches, or whole volumes."""
    axis, patch = settings.network.slice_axis, settings.network.patch_shape
    filters = settings.network.blocks or ()
    if settings.variant == "unet2d":
        network = UNet(
            UNetSpec(variant="unet2d", channels=channels, classes=classes, filters=filters, slice_axis=axis)
        )
        preparation, _ = _fitted(base, grids, settings, reasons)
        return SliceUNetRecipe(network, preparation, settings)
    if settings.variant == "monai-unet":
        preparation = _spaced(base, grids, settings)
        return _monai_unet(preparation, grids, channels, classes, filters, settings, reasons)
    network = UNet(UNetSpec(variant="unet3d", channels=channels, classes=classes, filters=filters))
    if patch is None:
        preparation, _ = _fitted(base, grids, settings, reasons)
        return WholeUNetRecipe(network, preparation, settings)
    reasons.append(f"patches of {patch} voxels, sliding window in use")
    preparation = _spaced(base, grids, settings)
    return CropUNetRecipe(network, preparation, settings, patch)


def _monai_unet(
    preparation: Preparation,
    grids: Grids,
    channels: int,
    classes: int,
    filters: tuple[int, ...],
    settings: Settings,
    reasons: list[str],
) -> Recipe:
    """MONAI's U-Net on patches; strides and patch follow the spacing as those of the default variant do."""
    spacing = preparation.spacing or grids.median_spacing
    shape = grids.median_shape_at(spacing)
    filters = filters or FILTERS["monai-unet"]
    strides = tuple(stride for stride, _ in plan_stages(spacing, shape, len(filters) - 1, fine=False))
    spec = UNetSpec(
        variant="monai-unet", channels=channels, classes=classes, filters=filters, strides=strides
    )
    x, y, z = spec.multiple
    patch = settings.network.patch_shape or plan_crop(
        shape, (x, y, z), settings.sampling.crop_voxels or CROP_VOXELS
    )
    chosen = settings.network.model_copy(update={"patch_shape": patch})
    reasons.append(f"strides {', '.join('×'.join(map(str, s)) for s in strides)}")
    reasons.append(f"patches of {patch} voxels, sliding window in use")
    return CropUNetRecipe(UNet(spec), preparation, settings.model_copy(update={"network": chosen}), patch)

"""The tree of all settings, with defaults and meanings.

What paper and released code disagree on can be chosen where SPEC §7 names a setting.
"""

from collections.abc import Set
from functools import cache
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Count = Annotated[int, Field(ge=1)]
Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = tuple[Count, Count, Count]


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(_Group):
    """Which cases, and how a scan is brought onto the network's grid."""

    layout: str | None = Field(None, description="name of the data set's layout; found out when not given")
    fold: int | Literal["all", "paper"] = Field(
        0,
        description="number of the fold that is left out (of splits_final.json, or 0 to 4); all: none is; paper: the "
        "paper's split",
    )
    splits: str | None = Field(
        None,
        description="a splits_final.json that lies elsewhere, such as nnU-Net's among its preprocessed files",
    )
    target: Literal["classes", "foreground"] = Field(
        "classes", description="every structure of the data set, or any label above 0 as one structure"
    )
    orientation: Literal["canonical", "file"] = Field("canonical", description="axis order inside")
    normalise: Literal["auto", "zscore", "window", "none"] = Field(
        "auto", description="auto: window for CT in the default variant and the U-Nets, zscore otherwise"
    )
    fit: Literal["auto", "none", "pad", "resize", "spacing"] = Field(
        "auto",
        description="auto: pad where all scans are about one size, otherwise resize (the paper's variants)",
    )
    shape: Size | None = Field(
        None, description="network grid S in voxels; proposed from the data when not given"
    )
    resized_labels: Literal["centred", "released"] = Field(
        "centred",
        description="the voxel that a label is taken from where scans are resized: the nearest one, or as released "
        "(SPEC §1), beside it",
    )
    spacing: tuple[Millimetres, Millimetres, Millimetres] | None = Field(
        None, description="network grid in mm, for fit=spacing"
    )
    replace_nan: bool = Field(False, description="replace NaN and infinite voxels instead of refusing them")
    cache_gb: float = Field(
        8.0, gt=0, description="cases beyond this are mapped from disk, in GB, on each machine"
    )


class NetworkSettings(_Group):
    """Sizes and options of the network."""

    width: int | None = Field(None, ge=1, description="features of a decoder block (paper: 512)")
    blocks: tuple[Count, ...] | None = Field(
        None, description="output channels of the encoder blocks; filters of a U-Net's units"
    )
    position: bool = Field(
        False,
        description="default variant: tell the network where in the scan a location lies; for scans that are all "
        "cut alike",
    )
    init: str | None = Field(None, description="a run or model folder whose weights the training starts from")
    cbn_statistics: Literal["scalar", "feature"] = Field("scalar", description="SPEC §7.7")
    normalise_coordinates: bool = Field(False, description="SPEC §7.4")
    large_pool: Literal["avg", "released"] = Field(
        "avg", description="how 14³ patches are pooled; released: max in dense inference (SPEC §7.3)"
    )
    slice_axis: Literal[0, 1, 2] = Field(2, description="unet2d: the axis that slices are cut across")
    patch_shape: Size | None = Field(
        None,
        description="3D U-Nets: voxels of a training patch; none: unet3d whole volumes, monai-unet chooses",
    )


class SamplingSettings(_Group):
    """Locations that a training step asks."""

    strategy: Literal["uniform", "border"] = Field(
        "uniform",
        description="everywhere alike, or partly near borders (SPEC §3: BraTS uniform, LiTS border)",
    )
    locations: int = Field(2**14, ge=1, description="locations a volume")
    border_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="border: share of them from the border band; default variant: near surfaces",
    )
    border_kernel: int = Field(13, ge=1, description="max pool in voxels that widens the border (SPEC §7.8)")
    border_width_mm: float | None = Field(
        None, gt=0, description="Euclidean band in mm instead of the released one"
    )
    importance: float = Field(
        1.0,
        ge=0,
        le=1,
        description="default variant: how far weights make up for more locations near surfaces; 1 fully, 0 not at all",
    )
    include_last_voxel: bool = Field(True, description="SPEC §7.6; false as released")
    crop_voxels: int | None = Field(
        None,
        ge=4096,
        description="default variant: most voxels of a training crop; fewer make more, cheaper steps",
    )

    @property
    def near_borders(self) -> float:
        """Share of the locations that are drawn near borders; 0 where all are drawn alike."""
        return self.border_share if self.strategy == "border" else 0.0


class AugmentationSettings(_Group):
    """Changes to a training example."""

    probability: float = Field(0.5, ge=0, le=1, description="of each kind (SPEC §3)")
    flip_axes: tuple[Literal[0, 1, 2], ...] = Field(
        (0, 1), description="axes that may be mirrored, such as [0, 1]; [] for none"
    )
    mirror_in_use: bool = Field(
        False,
        description="default variant and U-Nets: the model is asked mirrored along flip_axes as well, and the mean "
        "answers",
    )
    brightness: float = Field(0.15, ge=0, description="largest factor f of x + f * max(x)")
    noise: float = Field(0.15, ge=0, description="standard deviation, in units of the normalised scan")
    spatial: bool = Field(
        True, description="default variant and U-Nets on patches: rotation, scaling, elastic"
    )
    intensity: float = Field(
        1.0,
        ge=0,
        description="default variant and U-Nets on patches: factor on the probabilities of blur, low resolution, "
        "noise, contrast and gamma; 0 for none",
    )
    grows: int | None = Field(
        None,
        ge=0,
        strict=True,
        description="default variant and U-Nets on patches: after so many passes through the cases it begins to grow, "
        "to about twice the strength after four times as many; 0: never; none: 20 where there are 48 cases or fewer, "
        "otherwise 40",
    )


class OptimiserSettings(_Group):
    """Lookahead(RAdam) of the paper, AdamW, or Muon with AdamW for what is no convolution."""

    name: Literal["lookahead_radam", "adamw", "muon"] = "lookahead_radam"
    lr: float = Field(3e-4, gt=0, description="learning rate; with muon that of AdamW")
    muon_lr: float = Field(0.03, gt=0, description="relative step of Muon")
    pade_lr: Annotated[float, Field(gt=0)] | Literal["released"] = Field(
        1e-2,
        description="learning rate of Padé coefficients; released: lr, as the shared buffer made it (SPEC §7.13)",
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled, in units of the learning rate")
    lookahead_k: int = Field(5, ge=1, description="lookahead_radam: steps between those of the slow weights")
    lookahead_alpha: float = Field(
        0.8, gt=0, le=1, description="lookahead_radam: how far slow weights go to the fast ones"
    )
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="largest decay of averaged weights (the model); they look back on a twentieth of the steps",
    )


class ScheduleSettings(_Group):
    """How long, and how the learning rates move."""

    kind: Literal["steps", "cosine", "root"] = Field(
        "steps",
        description="steps: x0.1 at milestones; cosine; root: falls with the root of the steps, and linearly to 0",
    )
    epochs: int = Field(50, ge=1, description="passes through the cases; without minutes")
    minutes: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="train for this wall-clock time; the schedule is stretched",
    )
    passes: int = Field(
        50,
        ge=0,
        strict=True,
        description="with minutes: stop after so many passes through the cases, and 12,000 steps at least, even if "
        "time is left, since longer trainings were no better; 0: use all the time",
    )
    milestones: tuple[int, ...] = Field((20, 30), description="epochs after which rates fall to a tenth")
    warmup: float = Field(
        0.03, ge=0, lt=1, description="share of the training in which rates rise, for cosine"
    )
    hold: int = Field(300, ge=1, description="steps before rates fall, for root; a tenth of them warm up")
    batch_size: int = Field(8, ge=1, description="volumes a step, over all devices")
    steps_per_epoch: int | None = Field(
        None, ge=1, description="none: every case once, incomplete batch dropped"
    )


class LossSettings(_Group):
    """What is minimised."""

    kind: Literal["paper", "dice"] = Field(
        "paper", description="cross-entropy of equation 2, or with soft Dice added"
    )
    dice: float = Field(1.0, ge=0, description="weight of soft Dice, for kind=dice")
    aux: float = Field(0.1, ge=0, description="weight of the encoder's segmentation (equation 2's alpha)")


class ValidationSettings(_Group):
    """How a model is judged while it trains, and at the end."""

    every: int = Field(5, ge=1, description="epochs between validations (with minutes: 10 in all)")
    locations: int = Field(2**17, ge=1, description="locations a volume, the same each time")
    scheme: Literal["uniform", "released_lits", "balanced"] = Field(
        "uniform",
        description="released_lits: 2^14 locations, 40 % from the border (SPEC §7.9); balanced: half of them near "
        "structures, weighted",
    )
    empty_score: float | None = Field(
        0.0, ge=0, le=1, description="score when label and prediction are empty (SPEC §7.26); none: left out"
    )
    dense: bool = Field(True, description="segment the validation cases at the end")
    dense_cases: int | None = Field(None, ge=1, description="at most this many")
    picture: bool = Field(True, description="draw the first case left out at each validation, into pictures/")


class RuntimeSettings(_Group):
    """Machine: nothing here changes what is learnt, but for rounding and `batch_size`: a device takes one example."""

    devices: int = Field(1, ge=1, description="GPUs, or processes of a CPU, on each machine")
    nodes: int = Field(1, ge=1, description="machines")
    accelerator: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one")
    precision: Literal["auto", "32-true", "bf16-mixed"] = Field(
        "auto", description="auto: bf16 where the machine computes in it and the variant was tried with it"
    )
    threads: int | None = Field(
        None, ge=1, description="torch threads; the same number for a bit-exact resume"
    )
    workers: int | None = Field(
        None, ge=0, description="threads that prepare examples ahead; none: 2, for a GPU up to 8"
    )
    checkpoint_blocks: bool | Literal["auto"] = Field(
        "auto", description="recompute decoder blocks in the backward pass: less memory, a fifth more time"
    )
    checkpoint_seconds: float = Field(60.0, gt=0, description="time between states for --resume")
    tensorboard: bool = Field(True, description="write TensorBoard events when tensorboard is installed")


class Settings(_Group):
    """Everything about one training."""

    variant: str = Field("multiscale", description="the network, see `ossnet train --help`")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random")
    data: DataSettings = DataSettings()
    network: NetworkSettings = NetworkSettings()
    sampling: SamplingSettings = SamplingSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    loss: LossSettings = LossSettings()
    validation: ValidationSettings = ValidationSettings()
    runtime: RuntimeSettings = RuntimeSettings()


MACHINE = frozenset({f"runtime.{name}" for name in RuntimeSettings.model_fields} | {"data.cache_gb"})
"""Settings that say where a training runs and not what is learnt: they may change when it is resumed."""


def on_machine(used: Settings, given: Settings, named: Set[str] = MACHINE) -> Settings:
    """The settings of a run, but those of the machine (`MACHINE`) that are named as they are given."""
    for key in MACHINE & named:
        group, name = key.split(".")
        part = getattr(used, group).model_copy(update={name: getattr(getattr(given, group), name)})
        used = used.model_copy(update={group: part})
    return used


@cache
def setting_fields() -> dict[str, FieldInfo]:
    """Every setting by its name: `group.key`, but `variant` and `seed`."""
    out: dict[str, FieldInfo] = {}
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, _Group):
            out |= {f"{name}.{key}": inner for key, inner in type(field.default).model_fields.items()}
        else:
            out[name] = field
    return out


def meaning(field: FieldInfo) -> str:
    """The description, with the words that may be given."""
    text, may_be = field.description or "", words(field)
    listed = "" if all(word in text for word in may_be) else f"one of {', '.join(may_be)}"
    return "; ".join(part for part in (text, listed) if part)


def words(field: FieldInfo) -> list[str]:
    """Those that a setting may have as its value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return [w for kind in kinds if get_origin(kind) is Literal for w in get_args(kind) if isinstance(w, str)]

"""All settings of a training, one tree; presets are named instances, files and `--set` change them.

What paper and released code disagree on can be chosen where SPEC §7 names a setting.
"""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from ossnet.errors import SettingsError

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
        description="default variant: how far weights undo that locations crowd near surfaces; 1 wholly, 0 not at all",
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
        "otherwise never",
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
        description="with minutes: after so many passes through the cases, and 12,000 steps at least, a training ends "
        "though there is time left: more made no model better; 0: never before its time",
    )
    milestones: tuple[int, ...] = Field((20, 30), description="epochs after which rates fall to a tenth")
    warmup: float = Field(0.03, ge=0, lt=1, description="part of the training, for cosine")
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

Changes = Mapping[str, Any]

_ALSO = {"learning_rate": "lr", "batch": "batch_size", "patch_size": "patch_shape", "mirror": "flip_axes"}
"""Names that settings have elsewhere."""

_SET = "--set "
"""How messages name single changes."""

_JUDGED: Changes = {"locations": 2**15, "scheme": "balanced", "empty_score": None}

VARIANT_RECIPES: dict[str, Changes] = {
    "multiscale": {
        "optimiser": {"name": "muon", "lr": 2e-3, "weight_decay": 0.01, "clip_norm": 5.0, "ema": 0.999},
        "schedule": {"kind": "root", "batch_size": 1, "minutes": 60.0, "epochs": 1000},
        "sampling": {"strategy": "border", "locations": 4096},
        "loss": {"kind": "dice", "aux": 0.3},
        "augmentation": {"flip_axes": (), "mirror_in_use": True},
        "validation": _JUDGED,
    },
    # SPEC §3 "Baselines". The paper feeds whole volumes at reduced resolution; patch_shape makes it patches.
    "unet3d": {
        "optimiser": {"lr": 1e-3},
        "schedule": {"epochs": 20, "batch_size": 2},
        "validation": _JUDGED,
    },
    "unet2d": {
        "optimiser": {"lr": 1e-4},
        "schedule": {"epochs": 50, "batch_size": 32},
        "validation": _JUDGED,
    },
    # What a user of MONAI would choose, on the default variant's crops and augmentation.
    "monai-unet": {
        "optimiser": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01, "clip_norm": 5.0, "ema": 0.995},
        "schedule": {"kind": "cosine", "batch_size": 1, "minutes": 60.0, "epochs": 1000},
        "loss": {"kind": "dice"},
        "augmentation": {"flip_axes": (), "mirror_in_use": True},
        "validation": _JUDGED,
    },
}
"""What differs from the defaults, which are the paper's for O-Net and A to D, by variant."""

_PAPER_VALIDATION: Changes = {"locations": 2**17, "scheme": "uniform", "empty_score": 0.0}
"""Of all networks alike (SPEC §3)."""

PRESETS: dict[str, Changes] = {
    "brats2020": {
        "variant": "C",
        "data": {
            "orientation": "file",
            "target": "foreground",
            "fit": "pad",
            "shape": (256, 256, 160),
            "fold": "paper",
            "normalise": "zscore",
            "resized_labels": "released",
        },
        "validation": _PAPER_VALIDATION,
    },
    "lits": {
        "variant": "C",
        "data": {
            "orientation": "file",
            "target": "foreground",
            "fit": "resize",
            "shape": (512, 512, 512),
            "fold": "paper",
            "normalise": "zscore",
            "resized_labels": "released",
        },
        "schedule": {"batch_size": 4},
        "sampling": {"strategy": "border"},
        "validation": _PAPER_VALIDATION,
    },
}
"""The paper's two experiments (SPEC §1, §3)."""


_PAPER_BASELINES: dict[tuple[str, str], Changes] = {
    ("lits", "unet3d"): {"data": {"shape": (224, 224, 224)}, "schedule": {"batch_size": 2}},
    ("lits", "unet2d"): {"schedule": {"batch_size": 12}},
}
"""What differs from a preset for the paper's baselines (SPEC §3)."""


# The border band is also what validation by the released scheme takes locations from.
_LOCATIONS = frozenset(f"sampling.{name}" for name in SamplingSettings.model_fields) - {
    "sampling.border_kernel",
    "sampling.border_width_mm",
}
_PAPER = frozenset(
    {
        "network.width",
        "network.cbn_statistics",
        "network.normalise_coordinates",
        "network.large_pool",
        "optimiser.pade_lr",
        "runtime.checkpoint_blocks",
    }
)
_WHOLE = frozenset({"augmentation.probability", "augmentation.brightness", "augmentation.noise"})
_CROPS = frozenset({"augmentation.spatial", "augmentation.intensity", "augmentation.grows"})
_GRID = frozenset({"data.fit", "data.shape", "data.resized_labels"})

UNUSED: dict[str, frozenset[str]] = {
    "multiscale": frozenset({*_GRID, *_PAPER, *_WHOLE, "sampling.include_last_voxel"})
    | {"network.blocks", "network.slice_axis", "network.patch_shape"},
    "monai-unet": frozenset({*_GRID, *_PAPER, *_WHOLE, *_LOCATIONS, "loss.aux"}) - {"sampling.crop_voxels"}
    | {"network.slice_axis", "network.position"},
    "unet3d": frozenset({*_PAPER, *_LOCATIONS, "loss.aux", "network.slice_axis", "network.position"}),
    "unet2d": frozenset(
        {*_PAPER, *_CROPS, *_LOCATIONS, "loss.aux", "network.patch_shape", "network.position"}
    )
    | {"data.spacing"},
}
"""Settings that change nothing in a training of a variant; the paper's: `unused`."""

_WHOLE_OR_PATCHES = {False: frozenset({*_CROPS, "data.spacing"}), True: frozenset({*_GRID, *_WHOLE})}
"""Such of `unet3d` on whole volumes, and on patches."""

_NOT_PAPER = frozenset(
    {
        *_CROPS,
        "data.spacing",
        "network.position",
        "network.patch_shape",
        "network.slice_axis",
        "sampling.importance",
        "sampling.crop_voxels",
        "loss.kind",
        "loss.dice",
    }
)


def unused(variant: str, patches: bool | None = None) -> frozenset[str]:
    """Settings that change nothing in a training of a variant, by its canonical name.

    Args:
        patches: Whether `unet3d` is trained on patches; None: what neither heeds.
    """
    known = UNUSED.get(variant, _NOT_PAPER)
    return known if variant != "unet3d" or patches is None else known | _WHOLE_OR_PATCHES[patches]


def make_settings(
    variant: str | None = None,
    preset: str | None = None,
    config: Path | None = None,
    changes: Sequence[str] = (),
) -> Settings:
    """Put settings together; later ones win: variant's recipe, preset, file, then single changes.

    Args:
        config: JSON or TOML file with any part of the tree.
        changes: `group.key=value`, values as in JSON; bare words are strings.

    Raises:
        SettingsError: Unknown keys (with the nearest known name), values without meaning, and changes that the
            variant does not heed.
    """
    layers: list[tuple[str, Changes]] = []
    if preset is not None:
        if preset not in PRESETS:
            raise SettingsError("--preset", f"{preset!r} is unknown", f"Choose one of {', '.join(PRESETS)}")
        layers.append((f"preset {preset}", PRESETS[preset]))
    given: list[tuple[str, Changes]] = [(str(config), _read_config(config))] if config is not None else []
    given += [_parse_change(change) for change in changes]
    layers += given
    if variant is not None:
        layers.append(("--variant", {"variant": variant}))
    chosen = next(
        (str(values["variant"]) for _, values in reversed(layers) if "variant" in values), "multiscale"
    )
    chosen = canonical_variant(chosen)
    recipe = VARIANT_RECIPES.get(chosen, {})
    tree: dict[str, Any] = {}
    for where, values in [("recipe", recipe), *layers]:
        _check_keys(where, values, Settings)
        tree = _merged(tree, values)
        if where == f"preset {preset}":
            tree = _merged(tree, _PAPER_BASELINES.get((str(preset), chosen), {}))
    tree["variant"] = chosen
    _require_used(chosen, parse_settings({**recipe, "variant": chosen}), parse_settings(tree), given)
    # Who says for how many epochs does not mean the recipe's minutes.
    schedules = [values.get("schedule", {}) for _, values in layers]
    if any("epochs" in s for s in schedules) and not any("minutes" in s for s in schedules):
        tree["schedule"] = {**tree["schedule"], "minutes": None}
    return parse_settings(tree)


def _require_used(
    variant: str, default: "Settings", made: "Settings", layers: Sequence[tuple[str, Changes]]
) -> None:
    """Refuse what the user gave and the variant does not heed.

    A file may name it with the value that it has anyway: the settings of a run do.
    """
    ignored = unused(variant, made.network.patch_shape is not None)
    for where, values in layers:
        for group, part in values.items():
            for key in part if isinstance(part, Mapping) else ():
                name = f"{group}.{key}"
                same = getattr(getattr(made, group), key) == getattr(getattr(default, group), key)
                if name in ignored and (where == f"{_SET}{name}" or not same):
                    raise SettingsError(
                        where if where.startswith(_SET) else f"{where}: {name}",
                        f"variant {variant} does not use it",
                        "Leave it out; see `ossnet train --help-settings`",
                    )


def given_keys(preset: str | None, config: Path | None, changes: Sequence[str]) -> set[str]:
    """Settings that a user named, `group.key` each (errors as for `make_settings`)."""
    layers: list[Changes] = [PRESETS.get(preset or "", {}), _read_config(config) if config else {}]
    layers += [values for _, values in map(_parse_change, changes)]
    keys = set()
    for values in layers:
        for group, value in values.items():
            keys |= {f"{group}.{key}" for key in value} if isinstance(value, Mapping) else {group}
    return keys


def on_machine(used: Settings, given: Settings, named: Set[str] = MACHINE) -> Settings:
    """The settings of a run, but those of the machine (`MACHINE`) that are named as they are given."""
    for key in MACHINE & named:
        group, name = key.split(".")
        part = getattr(used, group).model_copy(update={name: getattr(getattr(given, group), name)})
        used = used.model_copy(update={group: part})
    return used


def parse_settings(tree: Mapping[str, Any], where: str = "settings") -> Settings:
    """Settings from plain values, with one readable message for whatever is wrong."""
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise _readable(error, tree, where) from None


def _readable(error: ValidationError, tree: Mapping[str, Any], where: str) -> SettingsError:
    """The first wrong setting: its own name and value, without the ways in which pydantic tried to read it."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][:2]]
    name, value = ".".join(path), first["input"]
    field: Any = Settings.model_fields.get(path[0])
    if len(path) == 2 and field is not None and isinstance(tree.get(path[0]), Mapping):
        field, value = field.annotation.model_fields.get(path[1]), tree[path[0]].get(path[1])
    # Beyond the setting's own name: members of a union as words, places in a tuple as numbers.
    union = any(isinstance(part, str) for part in first["loc"][2:])
    reason = f"{value!r} is not an allowed value" if union else f"{value!r}: {first['msg']}"
    meaning = _meaning(field) if field is not None else ""
    return SettingsError(
        f"{where}: {name}",
        reason,
        f"Its meaning: {meaning}" if meaning else "See `ossnet train --help-settings`",
    )


def canonical_variant(name: str) -> str:
    """The known spelling of a variant's name.

    Raises:
        SettingsError: No such variant.
    """
    from ossnet.networks.variants import OFFERED

    known = [*VARIANT_RECIPES, *OFFERED]
    for candidate in known:
        if candidate.lower().replace("-", "") == name.lower().replace("-", "").replace("_", ""):
            return candidate
    raise SettingsError("variant", f"{name!r} is unknown", f"Choose one of {', '.join(known)}")


def describe_settings(variant: str | None = None) -> list[tuple[str, str, str]]:
    """(key, value that a variant has when nothing is set, meaning) of every setting that it heeds."""
    chosen = make_settings(variant)
    rows = []
    for group_name, group in Settings.model_fields.items():
        if isinstance(group.default, _Group):
            values = getattr(chosen, group_name)
            for name, field in type(group.default).model_fields.items():
                if variant and f"{group_name}.{name}" in unused(chosen.variant):
                    continue
                rows.append((f"{group_name}.{name}", _shown(getattr(values, name)), _meaning(field)))
        else:
            rows.append((group_name, _shown(getattr(chosen, group_name)), _meaning(group)))
    return rows


def _shown(value: Any) -> str:
    """As it may be written after `--set`."""
    if isinstance(value, tuple):
        return json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _meaning(field: FieldInfo) -> str:
    """The description, with the words that may be given."""
    words = _words(field)
    text = field.description or ""
    listed = "" if not words or all(word in text for word in words) else f"one of {', '.join(words)}"
    return "; ".join(part for part in (text, listed) if part)


def _words(field: FieldInfo) -> list[str]:
    """Those that a setting may have as its value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return [w for kind in kinds if get_origin(kind) is Literal for w in get_args(kind) if isinstance(w, str)]


def _read_config(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        values = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise SettingsError(file, f"cannot be read ({error.strerror})", "Check the path") from error
    except ValueError as error:
        raise SettingsError(file, f"is no valid JSON or TOML ({error})", "Correct the file") from error
    if not isinstance(values, dict):
        raise SettingsError(file, "holds no settings", "Write an object with groups such as schedule")
    return values


def _parse_change(change: str) -> tuple[str, Changes]:
    key, equals, text = change.partition("=")
    if not equals:
        raise SettingsError("--set", f"{change!r} has no =", "Write --set group.key=value")
    try:
        value = json.loads(text)
    except ValueError:
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
        if value is None and _is_word(key.strip(), text.lower()):
            value = text.lower()
        if isinstance(value, str) and "," in value:
            try:
                value = json.loads(f"[{value}]")
            except ValueError:
                value = value.split(",")
    tree: Any = value
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return f"{_SET}{key.strip()}", tree


def _is_word(key: str, text: str) -> bool:
    """Whether a setting may have this word as its value."""
    group, _, name = key.partition(".")
    inner = Settings.model_fields.get(group)
    field = inner.annotation.model_fields.get(name) if inner and isinstance(inner.default, _Group) else None  # type: ignore[union-attr]
    return field is not None and text in _words(field)


def _check_keys(where: str, values: Changes, group: type[BaseModel], prefix: str = "") -> None:
    for key, value in values.items():
        if key not in group.model_fields:
            every = [name for name, _, _ in describe_settings()]
            near = [name for name in every if name.split(".")[-1] == _ALSO.get(key, key)]
            near = near or difflib.get_close_matches(prefix + key, every, 1, 0.5)
            fix = f"Perhaps {near[0]} is meant" if near else "See `ossnet train --help-settings`"
            raise SettingsError(where, f"the setting {prefix + key} is unknown", fix)
        inner = getattr(Settings(), key) if group is Settings else None
        if isinstance(inner, _Group):
            if not isinstance(value, Mapping):
                raise SettingsError(
                    where, f"{key} is a group of settings", f"Set one of them: {key}.name=value"
                )
            _check_keys(where, value, type(inner), f"{key}.")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = (
            _merged(out[key], value)
            if isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
            else value
        )
    return out

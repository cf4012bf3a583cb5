"""What variants and the paper's experiments set, and what they do not heed."""

from collections.abc import Mapping
from typing import Any

from ossnet.errors import SettingsError
from ossnet.training.settings.tree import SamplingSettings

Changes = Mapping[str, Any]

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


PAPER_BASELINES: dict[tuple[str, str], Changes] = {
    ("lits", "unet3d"): {"data": {"shape": (224, 224, 224)}, "schedule": {"batch_size": 2}},
    # Slices along the depth did not converge in the paper (SPEC §6).
    ("lits", "unet2d"): {"schedule": {"batch_size": 12}, "network": {"slice_axis": 1}},
}
"""What differs from a preset for the paper's baselines (SPEC §3)."""


_BAND = frozenset({"sampling.border_kernel", "sampling.border_width_mm"})
"""The paper's variants are trained on it; all others are only validated there, by the released scheme."""

_LOCATIONS = frozenset(f"sampling.{name}" for name in SamplingSettings.model_fields) - _BAND
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


def unused(variant: str, patches: bool | None = None, scheme: str | None = None) -> frozenset[str]:
    """Settings that change nothing in a training of a variant, by its canonical name.

    Args:
        patches: Whether `unet3d` is trained on patches; None: what neither heeds.
        scheme: How it is validated; None: what no scheme heeds.
    """
    known = UNUSED.get(variant, _NOT_PAPER)
    if variant in UNUSED and scheme not in (None, "released_lits"):
        known |= _BAND
    if scheme == "released_lits":
        known |= {"validation.locations"}
    return known if variant != "unet3d" or patches is None else known | _WHOLE_OR_PATCHES[patches]


def canonical_variant(name: str) -> str:
    """The known spelling of a variant's name.

    Raises:
        SettingsError: No such variant.
    """
    from ossnet.networks.variants import PAPER_VARIANTS

    known = [*VARIANT_RECIPES, *PAPER_VARIANTS]
    for candidate in known:
        if candidate.lower().replace("-", "") == name.lower().replace("-", "").replace("_", ""):
            return candidate
    raise SettingsError("variant", f"{name!r} is unknown", f"Choose one of {', '.join(known)}")

"""A trained model: a folder with `model.json`, `weights.safetensors` and `MODEL_CARD.md`. Nothing in it is code."""

import hashlib
import json
import math
import platform
import warnings
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ossnet.data.cases import relabelled, values_of, values_told
from ossnet.data.preparation import Preparation
from ossnet.errors import ModelError, SettingsError, VolumeError
from ossnet.field.card import card
from ossnet.field.description import Description
from ossnet.files.atomic import atomic_write, write_json, write_text
from ossnet.networks.mirrored import mirrorable, mirrored
from ossnet.networks.multiscale import MultiscaleNetwork
from ossnet.networks.registry import build, family_of
from ossnet.volume import LabelMap, Volume

if TYPE_CHECKING:
    from ossnet.field.field import Field
    from ossnet.field.forecast import Forecast

FORMAT = 1
FILES = ("model.json", "weights.safetensors")
SHIPPED = Path(__file__).parents[1] / "shipped"
"""Folder of models that come with the package."""


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    out = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("ossnet", "numpy", "nibabel", "safetensors"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            out[name] = "unknown"
    return out


@dataclass(repr=False)
class Model:
    """A network with everything that using it takes.

    Attributes:
        network: In evaluation mode, on the CPU until a field needs it elsewhere.
        preparation: What happens to a scan first.
        label_names: Label → structure, 1 to K; without background. In files they may have other numbers
            (`label_values`).
        channel_names: Meaning of the input channels, in order.
        metadata: Variant, training settings, metrics, versions, `about` (further lines of the card) and `use`
            (what it is meant for); for people and reports.
        others: Models of the same structures that answer with this one: the mean of their probabilities.
        mirror: Axes of the network's grid (0, 1, 2) along which it is asked mirrored as well, and the mean answers:
            twice the work for each. Those that it was trained on mirrored scans along.
    """

    network: nn.Module
    preparation: Preparation
    label_names: dict[int, str]
    channel_names: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    others: tuple["Model", ...] = ()
    mirror: tuple[int, ...] = ()

    def __repr__(self) -> str:
        """In a line; the network's modules are in `network`."""
        parts = [", ".join(self.label_names.values()), self.metadata.get("data", {}).get("name")]
        parts += [f"mirrored along {list(self.mirror)}" if self.mirror else None]
        parts += [f"with {len(self.others)} more" if self.others else None]
        return f"<Model {self.variant}: {'; '.join(part for part in parts if part)}>"

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)
        if self.mirror and not mirrorable(self.network):
            raise ModelError(self.variant, "it cannot be asked mirrored", "Leave mirror out")
        for other in self.others:
            if reason := self._unlike(other):
                raise ModelError(
                    other.variant, f"cannot answer with {self.variant}: {reason}", "Leave it out"
                )

    def _unlike(self, other: "Model") -> str | None:
        """Why two models have no common answer; None where they have."""
        for name in ("label_names", "channel_names", "channels"):
            one, two = getattr(self, name), getattr(other, name)
            if one != two:
                return f"its {name.replace('_', ' ')} are {two} instead of {one}"
        if other.preparation.orientation != self.preparation.orientation:
            return "one model reorients scans and the other does not"
        return None

    @property
    def variant(self) -> str:
        """The name a user trained it by."""
        return str(
            self.metadata.get("variant") or getattr(self.network.spec, "variant", family_of(self.network))
        )

    @property
    def answering(self) -> tuple["Model", ...]:
        """All whose mean answers, each with one network: the model, as often as it is asked mirrored, and `others`."""
        one = replace(self, others=(), mirror=())
        mirrors = [axes for n in range(1, len(self.mirror) + 1) for axes in combinations(self.mirror, n)]
        seen = (replace(one, network=mirrored(self.network, axes)) for axes in mirrors)
        return (one, *seen, *(model for other in self.others for model in other.answering))

    @property
    def counts(self) -> tuple[float, ...]:
        """What each of `answering` counts: models count alike, however often each is asked."""
        own = 2 ** len(self.mirror)
        return (*[1 / own] * own, *(count for other in self.others for count in other.counts))

    @property
    def classes(self) -> int:
        """1: one structure (sigmoid). K: K - 1 structures and background (softmax)."""
        return int(self.network.spec.classes)  # type: ignore[union-attr, arg-type]

    @property
    def channels(self) -> int:
        """Channels of a scan."""
        return int(self.network.spec.channels)  # type: ignore[union-attr, arg-type]

    def require_channels(self, count: int, where: Path | str) -> None:
        """Refuse a scan that the model cannot read.

        Raises:
            VolumeError: It has more channels, or fewer.
        """
        if count != self.channels:
            names = f" ({', '.join(self.channel_names)})" if self.channel_names else ""
            raise VolumeError(
                where,
                f"it has {count} channel(s), the model takes {self.channels}{names}",
                "Give one file with all channels, or one file a channel, in the order of the training",
            )

    @property
    def label_values(self) -> dict[int, int]:
        """Label → its value in the label files of the training, and in results that are saved: BraTS' 4 is 3.

        What the training noted (of several models any of them), or else what names tell ("label 4").
        """
        notes = (model.metadata.get("label_values", {}) for model in (self, *self.others))
        noted = {int(label): int(value) for label, value in next((n for n in notes if n), {}).items()}
        told = {label: value for value, label in values_told(self.label_names).items()}
        return {label: (noted or told).get(label, label) for label in self.label_names}

    @property
    def moved_values(self) -> dict[int, int]:
        """Of `label_values` those that differ from their label."""
        return {label: value for label, value in self.label_values.items() if label != value}

    def as_classes(self, labels: LabelMap) -> LabelMap:
        """A label map with the numbers of `label_names`, if it has those of label files (`label_values`).

        Those that fit both are taken for values of label files, with a warning where it matters.

        Raises:
            VolumeError: It has values of label files, and others too.
        """
        classes = {value: label for label, value in self.label_values.items()}
        if labels.values or labels.holds_classes or not self.moved_values:
            return labels
        found = set(values_of(labels.data)) - {0}
        where = labels.source or "labels"
        if not labels.holds_values and found <= set(self.label_names):
            if not found <= set(classes) or all(classes[value] == value for value in found):
                return labels
            listed = ", ".join(f"{value} for {self.label_names[classes[value]]}" for value in sorted(found))
            warnings.warn(f"{where}: numbers are taken as in label files ({listed})", stacklevel=2)
        if unknown := found - set(classes):
            raise VolumeError(
                where,
                f"holds label {min(unknown)}, which the model does not have",
                f"It has {self.structures()}",
            )
        names = {classes.get(value, value): name for value, name in labels.names.items()}
        return replace(labels, data=relabelled(labels.data, classes), names=names, values=self.moved_values)

    def label_of(self, structure: str | int) -> int:
        """The label of a structure that is given by name, by label (a number), or by its value in label files (a text).

        Raises:
            SettingsError: The model has no such structure.
        """
        if isinstance(structure, str):
            known = {str(value): label for label, value in self.label_values.items()}
            # Names first: teeth are named by numbers that are no labels.
            known |= {name.lower(): label for label, name in self.label_names.items()}
            found = known.get(structure.lower())
        else:
            found = structure
        if found in self.label_names:
            return int(found)
        raise SettingsError(
            "structure",
            f"{structure!r} is none of this model's",
            f"Choose one of {self.structures(in_files=isinstance(structure, str))}",
        )

    def structures(self, *, in_files: bool = True) -> str:
        """Numbers and names for people: the values of label files, or labels."""
        values = self.label_values
        return ", ".join(f"{values[k] if in_files else k} ({name})" for k, name in self.label_names.items())

    @property
    def piece_gap_mm(self) -> float | None:
        """For structures in small pieces: how close locations must lie so that hardly a piece slips between them.

        Small are pieces that can hide between coarse cells: the octree would start from a prediction in which they do
        not appear, and never ask where they are. A third of the extent within which pieces hold a quarter of a
        structure, in the training scans: a ball of more than 0.58 of that extent is always hit.
        """
        if self.others:
            gaps = [model.piece_gap_mm for model in (replace(self, others=()), *self.others)]
            return min((gap for gap in gaps if gap is not None), default=None)
        network = self.network
        if not isinstance(network, MultiscaleNetwork) or "piece_mm" not in self.metadata:
            return None
        spec = network.spec
        cells = spec.strides[network.coarse_stage]
        coarse = max(n * mm for n, mm in zip(cells, spec.spacing, strict=True))
        extent = float(self.metadata["piece_mm"])
        return extent / 3 if extent < 2 * coarse else None

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become probabilities; 1 where nothing was fitted.

        Of several models the geometric mean of theirs, so that labels stay those of their mean answer; nothing was
        fitted to that. Nor to single answers (`mirror=False`) of a model that answers mirrored.
        """
        fitted = [float(model.metadata.get("temperature", 1.0)) for model in (self, *self.others)]
        return math.prod(fitted) ** (1 / len(fitted))

    def engine_options(self) -> dict[str, Any]:
        """What the training decided about answering: pooling of large patches, window of patch-trained U-Nets."""
        chosen = self.metadata.get("settings", {}).get("network", {})
        window = chosen.get("patch_shape")
        return {
            "large_pool": "max" if chosen.get("large_pool") == "released" else "avg",
            "window": tuple(window) if window else None,
        }

    def field(self, volume: Volume, **options: Any) -> "Field":
        """Bind the model to one scan: everything that can be asked is asked of the result (see `Field`)."""
        from ossnet.field.field import Field

        return Field(self, volume, **options)

    def forecast(self, volume: Volume, **options: Any) -> "Forecast":
        """Locations, seconds and memory that segmenting a scan will take (see `field.forecast.forecast`).

        >>> import numpy as np, ossnet
        >>> scan = ossnet.Volume(np.zeros((1, 40, 56, 40), np.float32), np.eye(4))
        >>> ossnet.load("hippocampus").forecast(scan, memory="1GB").memory_bytes < 1e9
        True
        """
        from ossnet.field.forecast import forecast

        if not isinstance(volume, Volume):
            raise SettingsError("volume", f"it is a {type(volume).__name__}", "Read it: ossnet.read(path)")
        return forecast(self, volume.shape, volume.affine, **options)

    def description(self) -> dict[str, Any]:
        """What `model.json` holds."""
        return {
            "format": FORMAT,
            "family": family_of(self.network),
            "network": self.network.spec.to_dict(),  # type: ignore[union-attr, operator]
            "preparation": self.preparation.model_dump(mode="json"),
            "labels": {str(k): v for k, v in self.label_names.items()},
            "channels": list(self.channel_names),
            **({"mirror": list(self.mirror)} if self.mirror else {}),
            **self.metadata,
        }

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that differ between models that may answer differently (in logits)."""
        kept = {k: v for k, v in self.description().items() if k not in self.metadata}
        total = hashlib.sha256(json.dumps([kept, self.engine_options()], sort_keys=True).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        for other in self.others:
            total.update(other.fingerprint().encode())
        return total.hexdigest()[:16]

    def save(self, folder: Path | str, *, half: bool = False) -> None:
        """Write the model folder; every file is replaced atomically, the weights first.

        Args:
            half: Weights in float16: half the size, answers the same but for close calls.

        Raises:
            ResourceError: The disk is full; what was there stays.
        """
        folder = Path(folder)
        if self.others:
            raise ModelError(folder, "an ensemble cannot be saved", "Save each of its models")
        # safetensors refuses tensors that share memory; state dicts of ours have none that do.
        weights = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        if half:
            weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
        with atomic_write(folder / "weights.safetensors") as temporary:
            save_file(weights, temporary, {"format": "pt"})
        self.describe(folder)

    def describe(self, folder: Path | str) -> None:
        """Write what is not weights: the description and the card."""
        write_json(Path(folder) / "model.json", self.description())
        write_text(Path(folder) / "MODEL_CARD.md", self.card())

    @classmethod
    def load(cls, folder: Path | str, *more: Path | str, mirror: bool = True) -> "Model":
        """Read a model folder, the best model of a run folder, or a model that is shipped, by name.

        Args:
            folder: One of these.
            more: Further ones, such as the other folds of a cross-validation: the mean of their probabilities answers.
            mirror: Ask models mirrored as well that were trained so; False: once only, in half the time and memory for
                one axis, a quarter for two.

        Raises:
            ModelError: Nothing there, files that do not belong together, or models of other structures.
        """
        if not isinstance(folder, (str, Path)):
            raise ModelError(
                "model", f"it is a {type(folder).__name__}", "Give folders one by one: load(*folders)"
            )
        if more:
            first = cls.load(folder, mirror=mirror)
            others = tuple(cls.load(other, mirror=mirror) for other in more)
            for place, other in zip(more, others, strict=True):
                if reason := first._unlike(other):
                    raise ModelError(place, f"it cannot answer with {folder}: {reason}", "Leave it out")
            return replace(first, others=others)
        folder = model_folder(folder)
        file = folder / "model.json"
        try:
            description = json.loads(file.read_text(encoding="utf-8"))
            if description.get("format", 0) > FORMAT:
                raise ModelError(
                    file, f"it has format {description['format']}", "Update ossnet to use this model"
                )
            described = Description.model_validate(description)
            network = build(described.family, described.network)
            # Weights may be stored in 16 bits; the network computes in 32.
            network.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
            axes = tuple(description.get("mirror", ()))
            if len(set(axes)) < len(axes) or any(
                type(axis) is not int or not 0 <= axis <= 2 for axis in axes
            ):
                raise ModelError(file, f"mirror is {list(axes)}", "Give axes of 0, 1 and 2, each once")
        except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(
                file, f"it cannot be used ({_first_line(error)})", "Train or import it again"
            ) from error
        except (SafetensorError, RuntimeError, OSError) as error:
            weights = folder / "weights.safetensors"
            raise ModelError(weights, f"it cannot be used ({_first_line(error)})", "Copy it again") from error
        known = {"format", "family", "network", "preparation", "labels", "channels", "mirror"}
        metadata = {k: v for k, v in description.items() if k not in known}
        names, channels = described.labels, described.channels
        model = cls(network, described.preparation, names, channels, metadata, mirror=axes if mirror else ())
        structures = max(model.classes, 2) - 1
        if names.keys() != set(range(1, structures + 1)):
            raise ModelError(
                file,
                f"its labels are {', '.join(f'{k} ({v})' for k, v in names.items()) or 'none'}, and its network knows "
                f"{structures} structure(s)",
                f"Name {'1' if structures == 1 else f'1 to {structures}'}, each once",
            )
        if (
            len(set(model.label_values.values())) < structures
            or not described.label_values.keys() <= names.keys()
        ):
            raise ModelError(
                file, f"its label_values are {described.label_values}", "Give each label a value of its own"
            )
        return model

    def card(self) -> str:
        """`MODEL_CARD.md`: what it is, from what, how good, and what it is not for."""
        return card(self)


def shipped_models() -> dict[str, Path]:
    """Models that come with the package: name → folder."""
    return {folder.name: folder for folder in sorted(SHIPPED.iterdir()) if (folder / FILES[0]).is_file()}


def model_folder(path: Path | str) -> Path:
    """The folder that holds the model: the path itself, or `model/` or `last/` of a run, or a shipped one.

    Raises:
        ModelError: There is none.
    """
    path = Path(path)
    for folder in (path, path / "model", path / "last"):
        if all((folder / name).is_file() for name in FILES):
            return folder
    shipped = shipped_models()
    if str(path) in shipped:
        return shipped[str(path)]
    reason = "it holds no model.json with weights.safetensors" if path.is_dir() else "there is no such folder"
    if path.is_file():
        reason = "it is a file, not a folder"
    names = f", or the name of a shipped model ({', '.join(shipped)})" if shipped else ""
    raise ModelError(path, reason, f"Give a model folder, or the run folder of a training{names}")


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, RuntimeError):  # load_state_dict names what does not fit in its second line
        return " ".join(" ".join(str(error).split("\n")[:2]).split())[:300]
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

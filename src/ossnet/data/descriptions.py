"""What a `dataset.json` says: channels, labels and, in some layouts, which files there are."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ossnet.errors import DatasetError
from ossnet.files.containers import composed, is_image, nifti_first, stem


@dataclass(frozen=True)
class Description:
    """What a `dataset.json` says."""

    channel_names: tuple[str, ...] = ()
    label_names: Mapping[int, str] = field(default_factory=dict)
    listed: tuple[tuple[str, tuple[str, ...], str], ...] | None = None
    """(case, image files, label file), relative to the folder, where the description lists them."""
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Name → the label values that it stands for together."""


def read_description(root: Path) -> Mapping[str, Any] | None:
    path = root / "dataset.json"
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(path, f"cannot be read ({error.strerror})", "Check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(path, f"is not valid JSON ({error})", "Correct it") from error
    if not isinstance(value, Mapping):
        raise DatasetError(path, "is not a JSON object", "See nnU-Net's or the Decathlon's dataset.json")
    return value


def nnunet(value: Mapping[str, Any], path: Path) -> Description:
    """nnU-Net raw, version 2: `channel_names`, `labels` name → value, optionally `dataset` case → files."""
    ending = str(value.get("file_ending", ".nii.gz"))
    if not is_image(Path(f"case{ending}")) or ".hdr" in ending:
        raise DatasetError(path, f"images are {ending} files, which are not read", "Convert them to .nii.gz")
    listed = None
    if isinstance(value.get("dataset"), Mapping):
        listed = tuple(
            (composed(str(name)), tuple(str(i) for i in entry["images"]), str(entry["label"]))
            for name, entry in value["dataset"].items()
        )
    labels = value["labels"]
    regions = {str(k): tuple(sorted({int(n) for n in v})) for k, v in labels.items() if _is_region(v)}
    return Description(channels_of(value["channel_names"]), _named(labels, path), listed, regions)


def decathlon(value: Mapping[str, Any], path: Path) -> Description:
    """Decathlon (and nnU-Net version 1): `modality`, `labels` value → name, `training` pairs."""
    listed = []
    numbered: dict[Path, dict[str, list[Path]]] = {}
    for entry in value["training"]:
        image, label = str(entry["image"]), str(entry["label"])
        files = [image]
        if not (path.parent / image).exists():
            # nnU-Net version 1 lists case.nii.gz and stores case_0000.nii.gz, case_0001.nii.gz, …
            base = path.parent / image
            if base.parent not in numbered:
                numbered[base.parent] = _numbered_images(base.parent)
            found = nifti_first(numbered[base.parent].get(stem(base), []))
            files = [str(f.relative_to(path.parent)) for f in found] or files
        listed.append((stem(label), tuple(files), label))
    if len({name for name, _, _ in listed}) < len(listed):
        # One name in many folders: the folders name the cases.
        listed = [(composed(Path(label).parent.name) or name, files, label) for name, files, label in listed]
    return Description(
        channels_of(value.get("modality") or value.get("channel_names") or {}),
        _named(value["labels"], path),
        tuple(listed),
    )


def _numbered_images(folder: Path) -> dict[str, list[Path]]:
    """Images of a folder that end in four digits, by what stands before these."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*")):
        if is_image(file) and (match := re.fullmatch(r"(.+)_\d{4}", stem(file))):
            found.setdefault(match[1], []).append(file)
    return found


def channels_of(value: Mapping[str, Any]) -> tuple[str, ...]:
    """Names in order, of numbers → names."""
    return tuple(str(value[key]) for key in sorted(value, key=int))


def _is_region(number: Any) -> bool:
    return isinstance(number, list) and len(number) != 1


def _named(value: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Value → name, from either direction in which `labels` is written."""
    if all(str(key).isdecimal() for key in value):
        return _numbered([(int(key), str(name)) for key, name in value.items()], path)
    named: list[tuple[int, str]] = []
    alone: list[tuple[int, str]] = []
    parts: set[int] = set()
    for name, number in value.items():
        if name == "ignore":
            raise DatasetError(
                path,
                "declares an 'ignore' label, which is not supported",
                "Give these voxels a class, or remove it",
            )
        if _is_region(number):
            parts |= {int(n) for n in number}
        elif isinstance(number, list):
            alone.append((int(number[0]), str(name)))
        else:
            named.append((int(number), str(name)))
    # A region of one label is its name where it has no other.
    named += [(n, name) for n, name in alone if n not in {n for n, _ in named}]
    named += [(n, f"label {n}") for n in parts - {n for n, _ in named}]
    return dict(sorted(_numbered(named, path).items()))


def _numbered(named: Sequence[tuple[int, str]], path: Path) -> dict[int, str]:
    """Value → name; each value has one."""
    names: dict[int, str] = {}
    for number, name in named:
        if number < 0:
            raise DatasetError(path, f"gives {name!r} the label {number}", "Labels are 0 and above")
        if names.setdefault(number, name) != name:
            raise DatasetError(
                path,
                f"gives {names[number]!r} and {name!r} the same label {number}",
                "Give each structure a label of its own",
            )
    return names

"""Folders of images and labels as people have them, opened.

`open_dataset` finds out which layout (`ossnet.data.naming`) a folder follows and lists its cases; `images_in`
lists scans to segment.
"""

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ossnet.data.cases import Case, Dataset, Problem, name_key, nameless
from ossnet.data.descriptions import Description, channels_of, read_description
from ossnet.data.naming import LAYOUTS, Files, Found, Layout, names_labels, patient_of
from ossnet.errors import DatasetError, OssnetError
from ossnet.files.containers import composed, is_slicer_segmentation, stem, without_copies
from ossnet.files.dicom import dicom_folders
from ossnet.files.header import VolumeWarning
from ossnet.files.reading import Nonfinite, origin_of, read_header, read_image, read_labels
from ossnet.volume import MARK

__all__ = ["LAYOUTS", "Case", "Dataset", "Layout", "Problem", "consecutive", "images_in", "open_dataset"]


_MANY = 30
"""Structures; with more of them it is asked whether labels are images."""

_PATIENT = ("patient", "patient_id", "subject", "subject_id", "group")
"""What facts about a case call the patient, in letters of any size."""


def open_dataset(path: Path | str, layout: str | None = None, *, nonfinite: Nonfinite = "refuse") -> Dataset:
    """List the cases of a folder.

    Args:
        path: The folder of the data set.
        layout: Name of a layout in `LAYOUTS`; found by itself otherwise: by `dataset.json` where there is
            one, else the layout that explains most cases.
        nonfinite: "replace" reads images with NaN or infinite voxels instead of refusing them.

    Returns:
        The complete cases. Cases with missing or contradicting files are not among them and are named in
        `problems` (`require_complete` refuses them). Where nothing says what labels mean, the label files are
        read and their values become classes in ascending order, so that masks of 0 and 255 work.

    Raises:
        DatasetError: The folder does not exist or follows no known layout, or its description is damaged.
    """
    root = Path(path)
    if not root.is_dir():
        reason = "this is a file, not a folder" if root.exists() else "there is no such folder"
        raise DatasetError(root, reason, "Name the folder that holds the data set")
    known = {candidate.name: candidate for candidate in LAYOUTS}
    if layout is not None and layout not in known:
        raise DatasetError(root, f"there is no layout {layout!r}", f"Use one of {', '.join(known)}")
    files = Files(root)
    description = read_description(root)
    chosen = known[layout] if layout else _detect(files, description)
    if chosen is None and not len(files):
        raise DatasetError(root, *files.none())
    if chosen is None and (inner := sorted(path.parent for path in root.glob("*/dataset.json"))):
        names = ", ".join(path.name for path in inner[:3]) + (", …" if len(inner) > 3 else "")
        many = f"{len(inner)} data sets" if len(inner) > 1 else "a data set"
        raise DatasetError(
            root, f"it holds {many} ({names}) and is none itself", f"Name {inner[0].as_posix()}"
        )
    if chosen is None:
        raise DatasetError(
            root,
            f"no cases with image and label were found among {len(files)} image{'' if len(files) == 1 else 's'}",
            "Name them images/CASE.nii.gz and labels/CASE.nii.gz, or as another layout that "
            "ossnet check --help shows",
        )
    return replace(_assemble(root, chosen, files, description), nonfinite=nonfinite)


def images_in(path: Path | str, channels: int | None = None) -> tuple[Case, ...]:
    """The scans to segment in a folder of any layout, or in a single file; labels are not needed.

    A folder with `imagesTs` gives these. Files `CASE_0000`, `CASE_0001`, … are the channels of one case, where no
    case has more of them than there can be; otherwise the digits number the cases. A folder of DICOM files is a scan,
    and so is each such folder below the given one; results of ours are none. Images that are left out beside scans are
    told by a warning.

    Args:
        channels: Most channels of a scan.

    Raises:
        DatasetError: There is no such path, it holds no images, or a case lacks a channel.
    """
    root = Path(path)
    if root.is_file():
        return (Case(stem(root), (root,), group=patient_of(stem(root))),)
    if not root.is_dir():
        raise DatasetError(root, "there is no such file or folder", "Check the path")
    root = Path(os.path.abspath(root))  # "." has no name
    files = Files(root)
    folders = dicom_folders(root)
    within = (root.name,) if root in folders else ()
    series = tuple(Case("_".join((*within, *s.relative_to(root).parts)), (s,)) for s in folders)
    if root in folders:
        # An image beside its slices was made from them; with several it is not clear what is meant.
        if len(files) > 1:
            _tell_left_out(root, files.all(), "its slices are segmented")
        return series
    for found in _unlabelled(root, files, channels):
        cases, problems = _cases(found, None, need_labels=False)
        if problems:
            raise DatasetError(problems[0].where, problems[0].reason, problems[0].fix)
        scans = tuple(c for c in cases if not any(origin_of(f).startswith(MARK) for f in c.images))
        if cases and not (scans or series):
            raise DatasetError(
                root, "it holds results of ossnet and no scans", "Name the folder of the scans"
            )
        return (*scans, *series)
    if series:
        return series
    raise DatasetError(root, *files.none())


def described_channels(path: Path | str) -> tuple[str, ...]:
    """What a `dataset.json` in a folder, or beside it, calls the channels of scans; nothing where there is none.

    A damaged one is the matter of whoever needs it.
    """
    for folder in (Path(path), Path(os.path.abspath(path)).parent):
        with suppress(DatasetError, TypeError, ValueError):
            if (value := read_description(folder)) is not None:
                return channels_of(value.get("channel_names") or value.get("modality") or {})
    return ()


def _unlabelled(root: Path, files: Files, channels: int | None) -> Iterator[Found]:
    """Readings of a folder as images without labels, the most telling first."""
    description = read_description(root)
    nnunet = description is not None and "channel_names" in description

    def described(labelled: bool) -> Iterator[Found]:
        for layout in LAYOUTS:
            found = layout.find(files, labelled=labelled) if layout.describe else None
            # The Decathlon's cases may end in four digits too.
            if found and found.images and (nnunet or not _number_cases(found.images.values(), channels)):
                yield found

    yield from described(labelled=False)
    if (fixed := _fixed(files, channels)) is not None:
        yield fixed
    if description is not None:
        yield from described(labelled=True)
    labelled = [
        (layout.find(files)) for layout in LAYOUTS if not layout.describe and not layout.channel_names
    ]
    pairs = max(labelled, key=lambda f: f.pairs)
    if pairs.pairs:
        yield pairs
    if description is not None:
        return  # it says where images are, and there are none: what is left are its labels
    # Any folder of images: those directly in it, else in folders below that are not named after labels.
    flat = files.flat()
    images = _plain(flat or _below(files), channels)
    if any(len(paths) > 1 for by_channel in images.values() for paths in by_channel.values()):
        # One name in many folders: the folders name the cases.
        for layout in LAYOUTS:
            if layout.name == "case-folders" and (found := layout.find(files, labelled=False)).images:
                yield found
        images = images if flat else _by_folders(root, _below(files), channels)
    if images:
        if flat:
            _tell_left_out(root, set(_below(files)) - set(flat), "the images directly in it are segmented")
        yield Found(images, {})


def _by_folders(root: Path, files: Sequence[Path], channels: int | None) -> dict[str, dict[int, list[Path]]]:
    """As `_plain`, for names that say something together with their folders."""
    images: dict[str, dict[int, list[Path]]] = {}
    for folder in sorted({file.parent for file in files}):
        place = folder.relative_to(root).parts
        inside = _plain([file for file in files if file.parent == folder], channels)
        for name, by_channel in inside.items():
            known = images.setdefault("_".join((*place, name)), {})
            for channel, paths in by_channel.items():
                known.setdefault(channel, []).extend(paths)
    return images


def _tell_left_out(root: Path, images: Collection[Path], instead: str) -> None:
    """Warn of images that are not among the scans; results of ours are none."""
    left = sorted(f for f in images if not origin_of(f).startswith(MARK))
    if left:
        some = ", ".join(str(f.relative_to(root)) for f in left[:2]) + (", …" if len(left) > 2 else "")
        warnings.warn(
            f"{root}: {instead}, {len(left)} more images are not ({some}); name their folder for these.",
            VolumeWarning,
            stacklevel=3,
        )


def _fixed(files: Files, channels: int | None) -> Found | None:
    """The reading by names that a layout fixes, if most of its cases are whole and the model can take them.

    A few names may end like those of BraTS, or be those of LiTS, by chance. Beside scans of one channel all other
    images are scans as well.
    """
    best, most = None, 0
    for layout in LAYOUTS:
        count = len(layout.images)
        if layout.channel_names and count <= (channels or count):
            found = layout.find(files, labelled=False)
            whole = sum(len(by_channel) == count for by_channel in found.images.values())
            if 2 * whole > len(found.images) and whole > most:
                best, most = (found, count), whole
    if best is None or best[1] > 1:
        return best and best[0]
    found = best[0]
    known = [path for by_channel in found.images.values() for paths in by_channel.values() for path in paths]
    taken = {*known, *(path for paths in found.labels.values() for path in paths)}
    others = _plain([path for path in _below(files) if path not in taken], channels)
    return Found({**others, **found.images}, found.labels)


def _below(files: Files) -> list[Path]:
    """All images but those in folders that are named after labels, and segmentations of 3D Slicer."""
    return [f for f in files.all() if not names_labels(f.parent) and not is_slicer_segmentation(f)]


def _plain(files: Sequence[Path], channels: int | None) -> dict[str, dict[int, list[Path]]]:
    """Images as cases, by their names; four digits at the end number channels or cases."""
    files = without_copies(files)
    images: dict[str, dict[int, list[Path]]] = {}
    for file in files:
        match = re.fullmatch(r"(.+)_(\d{4})", stem(file))
        name, channel = (match[1], int(match[2])) if match else (stem(file), 0)
        images.setdefault(name, {}).setdefault(channel, []).append(file)
    numbered = [c for name, c in images.items() if any(stem(f[0]) != name for f in c.values())]
    if numbered and _number_cases(numbered, channels):
        images = {}
        for file in files:
            images.setdefault(stem(file), {}).setdefault(0, []).append(file)
    return images


def _number_cases(images: Collection[Mapping[int, Any]], channels: int | None) -> bool:
    """Four digits number channels, from 0 on and no more than there can be, or else the cases."""
    return not any(0 in c for c in images) or max(map(len, images)) > (channels or math.inf)


def _detect(files: Files, description: Mapping[str, Any] | None) -> Layout | None:
    if description is not None:
        described = [c for c in LAYOUTS if c.describe]
        if "labels" in description:
            name = "nnunet" if "channel_names" in description else "decathlon"
            if name == "nnunet" or "training" in description:
                return next(c for c in described if c.name == name)
    found = [(c.find(files).pairs, -i, c) for i, c in enumerate(LAYOUTS) if not c.describe]
    pairs, _, best = max(found, key=lambda f: f[:2])
    return best if pairs else None


def _assemble(root: Path, layout: Layout, files: Files, value: Mapping[str, Any] | None) -> Dataset:
    description = Description(layout.channel_names, layout.label_names, regions=layout.regions)
    if layout.describe:
        path = root / "dataset.json"
        if value is None:
            raise DatasetError(path, "there is no such file", f"The layout {layout.name} needs it")
        try:
            description = layout.describe(value, path)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, OssnetError):
                raise
            what = f"{error} is missing" if isinstance(error, KeyError) else "is not as the format wants it"
            raise DatasetError(path, what, f"Write it as {layout.name} describes it") from error
    if description.listed is not None:
        cases, problems = _listed_cases(root, description.listed)
    else:
        channels = len(description.channel_names) or None
        cases, problems = _cases(layout.find(files), channels, need_labels=True)
    if not cases and not problems:
        raise DatasetError(
            root, f"no cases of the layout {layout.name} are in it", f"It has {layout.example}"
        )
    cases = _grouped(cases, root / "cases.json")
    names, mapping = dict(description.label_names), dict(layout.label_map)
    by_name: dict[str, int] = {}
    if not names:
        names, mapping, by_name, more = _found_labels(cases)
        problems += more
    elif layout.describe:
        names, mapping = consecutive(names)
    regions = description.regions
    if layout.describe:
        regions = {name: tuple(mapping.get(n, n) for n in values) for name, values in regions.items()}
    dataset = Dataset(
        root=root,
        layout=layout.name,
        cases=cases,
        channel_names=description.channel_names or _channel_names(cases),
        label_names=names,
        label_map=mapping,
        by_name=by_name,
        regions=regions,
        problems=tuple(problems),
    )
    splits = root / "splits_final.json"
    return dataset.with_splits(splits) if splits.exists() else dataset


def _cases(
    found: Found, channels: int | None, *, need_labels: bool
) -> tuple[tuple[Case, ...], list[Problem]]:
    """Complete cases, and what is wrong with the others."""
    cases, problems = [], []
    count = channels or max((max(c) + 1 for c in found.images.values()), default=1)
    for name, by_channel in sorted(found.images.items()):
        wrong = list(_wrong_images(name, by_channel, count))
        labels = found.labels.get(name, [])
        some = next(iter(by_channel.values()))[0]
        if need_labels and not labels:
            wrong.append(
                Problem(str(some), "has no label", "Add its label file, or move the image elsewhere")
            )
        if len(labels) > 1:
            wrong.append(
                Problem(
                    str(labels[1]), f"a second label for case {name}", f"Keep one, {labels[0].name} or it"
                )
            )
        problems += wrong
        if not wrong:
            images = tuple(by_channel[channel][0] for channel in sorted(by_channel))
            cases.append(Case(name, images, labels[0] if labels else None, patient_of(name)))
    if need_labels:
        for name in sorted(found.labels.keys() - found.images.keys()):
            problems.append(
                Problem(str(found.labels[name][0]), "has no image", "Add its image, or remove the label")
            )
    return tuple(cases), problems


def _wrong_images(name: str, by_channel: Mapping[int, Sequence[Path]], count: int) -> Iterator[Problem]:
    some = next(iter(by_channel.values()))[0]
    missing = [c for c in range(count) if c not in by_channel]
    # One file may hold all channels along its fourth axis; whether it does is seen when it is read.
    if missing and not (
        list(by_channel) == [0] and not re.search(r"_\d{4}$|_flair$|-t2f$", stem(some), re.I)
    ):
        yield Problem(
            str(some),
            f"case {name} lacks channel {', '.join(map(str, missing))} of {count}",
            "Add the missing file",
        )
    for channel in sorted(by_channel):
        if channel >= count:
            yield Problem(
                str(by_channel[channel][0]),
                f"is channel {channel}, but only {count} are declared",
                "Remove it, or declare it",
            )
        if len(by_channel[channel]) > 1:
            first, second = by_channel[channel][:2]
            yield Problem(str(second), f"a second image for case {name}", f"Keep one, {first.name} or it")


def _listed_cases(
    root: Path, listed: Iterable[tuple[str, tuple[str, ...], str]]
) -> tuple[tuple[Case, ...], list[Problem]]:
    """Cases that `dataset.json` names file by file."""
    cases: dict[str, Case] = {}
    problems = []
    description = root / "dataset.json"
    for name, images, label in listed:
        paths = [root / file for file in (*images, label)]
        missing = [p for p in paths if not p.is_file()]
        if missing:
            problems.append(
                Problem(
                    str(missing[0]),
                    f"dataset.json lists it for case {name}, but there is no such file",
                    "Add it",
                )
            )
        elif name in cases:
            problems.append(Problem(str(description), f"lists case {name} twice", "Keep one entry"))
        else:
            cases[name] = Case(name, tuple(paths[:-1]), paths[-1], patient_of(name))
    return tuple(cases[name] for name in sorted(cases)), problems


def _grouped(cases: tuple[Case, ...], path: Path) -> tuple[Case, ...]:
    """Patients from a `cases.json`: case → patient, or case → facts, of which one of `_PATIENT` is used."""
    if not path.exists():
        return cases
    try:
        facts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(path, f"cannot be read ({error})", "Correct or remove it") from error

    known = {case.name for case in cases}
    named = {}
    for written, told in facts.items() if isinstance(facts, Mapping) else ():
        name = composed(written)
        named[name if name in known else stem(name)] = told
    if known and facts != {} and not known & set(named):
        # Passed over, it would leave scans of a patient on both sides of a fold.
        fix = 'Write {"CASE": {"patient": "P1"}, …}, or give it another name'
        raise DatasetError(path, "names no case of the data set", fix)

    def patient(case: Case) -> str | None:
        told = named.get(case.name)
        if isinstance(told, Mapping):
            told = next((value for key, value in told.items() if key.lower() in _PATIENT), None)
        return case.group if told is None else str(told)

    return tuple(replace(case, group=patient(case)) for case in cases)


def consecutive(names: Mapping[int, str]) -> tuple[dict[int, str], dict[int, int]]:
    """Classes 0 … K-1 for the values in ascending order, and the map from those that moved."""
    values = sorted({0, *names})
    mapping = {value: number for number, value in enumerate(values) if value != number}
    return {number: names.get(value, "background") for number, value in enumerate(values)}, mapping


def _found_labels(
    cases: Sequence[Case],
) -> tuple[dict[int, str], dict[int, int], dict[str, int], list[Problem]]:
    """Classes from what label files hold, for data sets that nothing describes.

    Returns:
        Class → name, value → class where they differ, and name → class where files number structures differently.
    """

    def values(case: Case) -> tuple[bool, set[int], dict[int, str]]:
        try:
            labels = read_labels(case.label) if case.label else None
        except OssnetError:
            labels = None  # the case is read again, and its error told, by whoever uses it
        if labels is None:
            return True, set(), {}
        present = {int(v) for v in np.unique(labels.data)}
        return labels.holds_classes, present, {v: n for v, n in labels.names.items() if v in present and v}

    with ThreadPoolExecutor() as pool:
        each = list(pool.map(values, cases))
    # Results of ours that hold classes count where there is nothing else.
    if any(v for ours, v, _ in each if not ours):
        each = [(ours, set(), {}) if ours else (ours, v, names) for ours, v, names in each]
    found = set().union(*(v for _, v, _ in each))
    if len(found) > _MANY and (len(found) > 256 or _shows_fewer(cases[0], len(found))):
        example = str(cases[0].label)
        return (
            {0: "background"},
            {},
            {},
            [Problem(example, f"label files hold {len(found)} values", "Are images and labels swapped?")],
        )
    told, problem = _told_names({case.label: names for case, (_, _, names) in zip(cases, each, strict=True)})
    if problem and all(v - {0} <= set(names) for _, v, names in each):
        by_name = _by_name([names for _, _, names in each])
        if by_name:
            return {0: "background", **by_name}, {}, {name_key(n): c for c, n in by_name.items()}, []
    names = {v: "background" if v == 0 else told.get(v, nameless(v)) for v in found}
    return (*consecutive(names), {}, [] if problem is None else [problem])


def _by_name(files: Sequence[Mapping[int, str]]) -> dict[int, str]:
    """Class → name, in the order in which label files name structures; nothing where names are no better than numbers.

    That is where one file has a name twice, or where every name has one number: then it is a name that is written in
    several ways ("tumor", "tumour").
    """
    first: dict[str, str] = {}
    numbers: dict[str, set[int]] = {}
    for names in files:
        if len({name_key(name) for name in names.values()}) < len(names):
            return {}
        for value, name in sorted(names.items()):
            first.setdefault(name_key(name), name.strip())
            numbers.setdefault(name_key(name), set()).add(value)
    return dict(enumerate(first.values(), 1)) if any(len(n) > 1 for n in numbers.values()) else {}


def _told_names(files: Mapping[Path | None, Mapping[int, str]]) -> tuple[dict[int, str], Problem | None]:
    """Value → name, from label files that name their values; and the first that names one otherwise than others do.

    3D Slicer numbers the segments of each file anew.
    """
    told: dict[int, tuple[str, Path | None]] = {}
    problem = None
    for file, names in files.items():
        for value, name in names.items():
            first, where = told.setdefault(value, (name, file))
            if name.casefold() != first.casefold() and problem is None:
                problem = Problem(
                    str(file),
                    f"label {value} is named {name!r}, and {first!r} in {where and where.name}",
                    "Give each structure one number in all label files, or name all that are there",
                )
    count = Counter(name for name, _ in told.values())
    return {v: name if count[name] == 1 else f"{name} {v}" for v, (name, _) in told.items()}, problem


def _shows_fewer(case: Case, values: int) -> bool:
    """Whether an image has fewer values than label files have."""
    try:
        return len(np.unique(read_image(case.images[0]).data)) < values
    except OssnetError:
        return False


def _channel_names(cases: Sequence[Case]) -> tuple[str, ...]:
    """Names for channels that nothing describes; one file may hold several."""
    if not cases:
        return ("image",)
    count = len(cases[0].images)
    if count == 1:
        try:
            count = read_header(cases[0].images[0]).channels
        except OssnetError:
            count = 1
    return ("image",) if count == 1 else tuple(f"channel {i}" for i in range(count))

"""Folders of images and labels as people have them, opened.

`open_dataset` finds out which layout (`ossnet.data.naming`) a folder follows and lists its cases.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ossnet.data.cases import Case, Dataset, Problem
from ossnet.data.descriptions import Description, read_description
from ossnet.data.naming import LAYOUTS, Files, Found, Layout, patient_of
from ossnet.data.undescribed import consecutive, found_labels
from ossnet.errors import DatasetError, OssnetError
from ossnet.files.containers import composed, stem
from ossnet.files.reading import Nonfinite, read_header

_PATIENT = ("patient", "patient_id", "subject", "subject_id", "group")
"""What facts about a case call the patient, in letters of any size; the first that is there counts."""


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
        cases, problems = complete_cases(layout.find(files), channels, need_labels=True)
    if not cases and not problems:
        raise DatasetError(
            root, f"no cases of the layout {layout.name} are in it", f"It has {layout.example}"
        )
    cases = _grouped(cases, root / "cases.json")
    names, mapping = dict(description.label_names), dict(layout.label_map)
    by_name: dict[str, int] = {}
    if not names:
        names, mapping, by_name, more = found_labels(cases)
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


def complete_cases(
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
            facts_of = {key.lower(): value for key, value in told.items()}
            told = next((facts_of[key] for key in _PATIENT if facts_of.get(key) is not None), None)
        return case.group if told is None else str(told)

    return tuple(replace(case, group=patient(case)) for case in cases)


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

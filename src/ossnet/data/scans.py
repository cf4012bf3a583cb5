"""Scans to segment: those of a file or a folder, whatever they are called; labels are not needed."""

import math
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ossnet.data.cases import Case
from ossnet.data.descriptions import channels_of, read_description
from ossnet.data.layouts import complete_cases
from ossnet.data.naming import LAYOUTS, Files, Found, names_labels, patient_of
from ossnet.errors import DatasetError
from ossnet.files.containers import is_slicer_segmentation, stem, without_copies
from ossnet.files.dicom import dicom_folders
from ossnet.files.header import VolumeWarning
from ossnet.files.reading import origin_of
from ossnet.volume import MARK


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
        cases, problems = complete_cases(found, None, need_labels=False)
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

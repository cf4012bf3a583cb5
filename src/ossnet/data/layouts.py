"""Folders of images and labels as people have them.

A layout is a declaration: what the file of each channel and of the label is called. `open_dataset` finds out
which one a folder follows and lists its cases; files are only named here, not read.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ossnet.data.splits import Split, read_splits
from ossnet.errors import DatasetError, InputError, OssnetError, VolumeError
from ossnet.files.containers import is_image, stem
from ossnet.files.nifti import Nonfinite, read_header, read_labels, read_volume
from ossnet.volume import LabelMap, Volume, same_place

NII = r"\.nii(?:\.gz)?"
_DEPTH = 4  # folders below the given one that are searched


@dataclass(frozen=True)
class Problem:
    """Something that keeps a case from being used: which file, why, and what to do."""

    where: str
    reason: str
    fix: str

    @classmethod
    def of(cls, error: InputError) -> "Problem":
        """The same, from an error."""
        return cls(error.where, error.reason, error.fix)


@dataclass(frozen=True)
class Case:
    """One scan and what is known of it.

    Attributes:
        name: Unique in its data set; results are named after it.
        images: One file with all channels, or one file for each channel.
        label: The reference segmentation.
        group: The patient. Their cases belong on the same side of a split; None: a patient of its own.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    group: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Cases with labels, ready to be read.

    Attributes:
        root: The folder.
        layout: Name of the layout.
        cases: Complete cases, sorted by name.
        channel_names: Channels in the order in which networks get them.
        label_names: Class → name, background 0 included; classes are 0 … K-1.
        label_map: Value in the file → class, for the values that differ (BraTS stores class 3 as 4).
        splits: Folds of `splits_final.json`, or None.
        problems: What keeps other cases from being used.
        nonfinite: Whether NaN and infinite voxels of images are refused or replaced (see `read_volume`).
    """

    root: Path
    layout: str
    cases: tuple[Case, ...]
    channel_names: tuple[str, ...]
    label_names: Mapping[int, str]
    label_map: Mapping[int, int] = field(default_factory=dict)
    splits: tuple[Split, ...] | None = None
    problems: tuple[Problem, ...] = ()
    nonfinite: Nonfinite = "refuse"

    def __getitem__(self, name: str) -> Case:
        """The case of this name."""
        for case in self.cases:
            if case.name == name:
                return case
        raise DatasetError(
            self.root, f"there is no case {name}", "Check the name, or the split that names it"
        )

    def __len__(self) -> int:
        """Number of complete cases."""
        return len(self.cases)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the cases, sorted."""
        return tuple(case.name for case in self.cases)

    @property
    def classes(self) -> int:
        """Number of classes K, background included."""
        return max(self.label_names, default=0) + 1

    def require_complete(self) -> None:
        """Refuse a data set with problems.

        Raises:
            DatasetError: The first problem, and how many there are.
        """
        if self.problems:
            first, more = self.problems[0], len(self.problems) - 1
            reason = first.reason + (
                f" (and {more} more problems: run ossnet check {self.root})" if more else ""
            )
            raise DatasetError(first.where, reason, first.fix)

    def image(self, case: Case) -> Volume:
        """Read the scan of a case: (C, X, Y, Z), channels in the order of `channel_names`.

        Raises:
            VolumeError: A file cannot be trusted, or the number of channels is another.
        """
        volume = read_volume(case.images, nonfinite=self.nonfinite)
        if volume.channels != len(self.channel_names):
            raise VolumeError(
                case.images[0],
                f"has {volume.channels} channels, the data set has {len(self.channel_names)}",
                "Correct the file, or the channel names in dataset.json",
            )
        return volume

    def labels(self, case: Case) -> LabelMap:
        """Read the labels of a case (X, Y, Z) as classes 0 … K-1.

        Raises:
            VolumeError: The case has no label, the file cannot be trusted, or holds a value that is no class.
        """
        if case.label is None:
            raise DatasetError(case.images[0], "has no label", "Add its label file")
        labels = read_labels(case.label)
        return LabelMap(
            data=self._classes(labels.data, case.label),
            affine=labels.affine,
            source=labels.source,
            header=labels.header,
            names=dict(self.label_names),
        )

    def read(self, case: Case) -> tuple[Volume, LabelMap]:
        """Read the scan and the labels of a case.

        Raises:
            VolumeError: As `image` and `labels`, or the two do not lie on each other.
        """
        volume, labels = self.image(case), self.labels(case)
        if reason := same_place(volume, labels):
            raise VolumeError(
                str(case.label), f"does not lie on its image: {reason}", "Resample the label onto the image"
            )
        return volume, labels

    def _classes(self, data: np.ndarray, where: Path) -> np.ndarray:
        values = np.flatnonzero(np.bincount(data.ravel())) if data.dtype.itemsize == 1 else np.unique(data)
        found = [int(v) for v in values]
        unknown = [v for v in found if self.label_map.get(v, v) not in self.label_names]
        if unknown:
            raise VolumeError(
                where,
                f"holds label {unknown[0]}, which the data set does not declare",
                f"Declare it, or correct the file; declared are {_ranges(self._values())}",
            )
        if not any(v in self.label_map for v in found):
            return data
        table = np.arange(max(found) + 1)
        for value, target in self.label_map.items():
            if value < len(table):
                table[value] = target
        return np.asarray(table.astype(np.min_scalar_type(self.classes - 1))[data])

    def _values(self) -> list[int]:
        """All values that label files may hold."""
        hidden = {target for value, target in self.label_map.items() if value != target}
        return sorted(set(self.label_map) | {v for v in self.label_names if v not in hidden} | hidden)


@dataclass(frozen=True)
class Description:
    """What a `dataset.json` says."""

    channel_names: tuple[str, ...] = ()
    label_names: Mapping[int, str] = field(default_factory=dict)
    listed: tuple[tuple[str, tuple[str, ...], str], ...] | None = None
    """(case, image files, label file), relative to the folder, where the description lists them."""


@dataclass(frozen=True)
class Layout:
    """How one kind of data set names its files.

    Patterns are regular expressions for the whole path, `/` between folders, beginning with the name of the
    data set's own folder; upper and lower case are the same. The group `case` is the name of the case.

    Attributes:
        name: As `--layout` takes it.
        example: An image and its label, for people.
        images: One pattern a channel; or a single one, whose group `channel` (if any) numbers the channels.
        label: Patterns of the label files.
        unlabelled: Patterns of images without labels, where they are named or kept otherwise.
        case_name: The name of a case made from what `case` caught.
        channel_names, label_names: Where the layout fixes them.
        label_map: Value in the file → class.
        describe: Reads `dataset.json`; layouts with it need the file.
    """

    name: str
    example: str
    images: tuple[str, ...]
    label: tuple[str, ...]
    unlabelled: tuple[str, ...] = ()
    case_name: str = "{}"
    channel_names: tuple[str, ...] = ()
    label_names: Mapping[int, str] = field(default_factory=dict)
    label_map: Mapping[int, int] = field(default_factory=dict)
    describe: Callable[[Mapping[str, Any], Path], Description] | None = None

    def find(self, files: "Files", *, labelled: bool = True) -> "Found":
        """The images and labels among `files`."""
        patterns = self.images if labelled else (self.unlabelled or self.images)
        images: dict[str, dict[int, list[Path]]] = {}
        for number, pattern in enumerate(patterns):
            for match, path in files.matching(pattern):
                channel = int(match.groupdict().get("channel") or number)
                name = self.case_name.format(match["case"])
                images.setdefault(name, {}).setdefault(channel, []).append(path)
        labels: dict[str, list[Path]] = {}
        for pattern in self.label:
            for match, path in files.matching(pattern):
                labels.setdefault(self.case_name.format(match["case"]), []).append(path)
        return Found(images, labels)


class Files:
    """The image files in a folder, some folders deep; hidden ones are left out."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._files: list[tuple[str, Path]] = []
        for folder, names, files in os.walk(root, followlinks=True):
            place = Path(folder)
            depth = len(place.relative_to(root).parts)
            names[:] = sorted(n for n in names if not n.startswith(".")) if depth < _DEPTH else []
            for name in sorted(files):
                if is_image(place / name):
                    relative = (place / name).relative_to(root)
                    self._files.append((f"{self.root.name}/{relative.as_posix()}", root / relative))

    def __len__(self) -> int:
        return len(self._files)

    def matching(self, pattern: str) -> Iterator[tuple[re.Match[str], Path]]:
        """Files whose whole path, from the name of the folder on, fits the pattern."""
        compiled = re.compile(pattern, re.IGNORECASE)
        for name, path in self._files:
            if match := compiled.fullmatch(name):
                yield match, path

    def all(self) -> list[Path]:
        """All of them."""
        return [path for _, path in self._files]

    def flat(self) -> list[Path]:
        """Those directly in the folder."""
        return [path for name, path in self._files if name.count("/") == 1]


@dataclass(frozen=True)
class Found:
    """Files of a folder, sorted into cases: case → channel → files, and case → label files."""

    images: dict[str, dict[int, list[Path]]]
    labels: dict[str, list[Path]]

    @property
    def pairs(self) -> int:
        """Cases with an image and a label."""
        return len(self.images.keys() & self.labels.keys())


_GLIOMA = {0: "background", 1: "necrotic core", 2: "edema", 3: "enhancing tumour"}
_FOUR = ("flair", "t1", "t1ce", "t2")
_FOUR_2023 = ("t2f", "t1n", "t1c", "t2w")  # the same sequences in the same order
# BraTS 2020 gave out the label of training case 355 under another name.
_CASE_355 = rf"(?:.*/)?(?P<case>[^/]+)/W39_1998\.09\.19_Segm{NII}"


def _described_nnunet(value: Mapping[str, Any], path: Path) -> Description:
    """nnU-Net raw, version 2: `channel_names`, `labels` name → value, optionally `dataset` case → files."""
    ending = str(value.get("file_ending", ".nii.gz"))
    if ending not in (".nii.gz", ".nii"):
        raise DatasetError(
            path, f"images are {ending} files, and only NIfTI is read", "Convert them to .nii.gz"
        )
    listed = None
    if isinstance(value.get("dataset"), Mapping):
        listed = tuple(
            (str(name), tuple(str(i) for i in entry["images"]), str(entry["label"]))
            for name, entry in value["dataset"].items()
        )
    return Description(_channels(value["channel_names"]), _named(value["labels"], path), listed)


def _described_decathlon(value: Mapping[str, Any], path: Path) -> Description:
    """Decathlon (and nnU-Net version 1): `modality`, `labels` value → name, `training` pairs."""
    listed = []
    for entry in value["training"]:
        image, label = str(entry["image"]), str(entry["label"])
        files = [image]
        if not (path.parent / image).exists():
            # nnU-Net version 1 lists case.nii.gz and stores case_0000.nii.gz, case_0001.nii.gz, …
            base = path.parent / image
            found = sorted(base.parent.glob(f"{stem(base)}_[0-9][0-9][0-9][0-9].nii*"))
            files = [str(f.relative_to(path.parent)) for f in found] or files
        listed.append((stem(label), tuple(files), label))
    return Description(
        _channels(value.get("modality") or value.get("channel_names") or {}),
        _named(value["labels"], path),
        tuple(listed),
    )


_FIRST = r"(?:(?:img|image|volume|scan|label|mask|seg|segmentation)[_-]?)?"
_LAST = r"(?:[_-](?:img|image|ct|mri?|volume|scan|labels?|mask|seg|segmentation|gt))?"
_CHANNEL = r"(?:_(?P<channel>\d{4}))?"
_IMAGE_WORDS = r"(?:images?|imgs?|ct|mri?|scans?|volumes?)"
_LABEL_WORDS = r"(?:labels?|masks?|segs?|segmentations?|annotations?|gt|ground_?truth)"

LAYOUTS = (
    Layout(
        name="nnunet",
        example="dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz",
        images=(rf"[^/]+/imagesTr/(?P<case>[^/]+)_(?P<channel>\d{{4}}){NII}",),
        unlabelled=(rf"[^/]+/imagesTs/(?P<case>[^/]+)_(?P<channel>\d{{4}}){NII}",),
        label=(rf"[^/]+/labelsTr/(?P<case>[^/]+){NII}",),
        describe=_described_nnunet,
    ),
    Layout(
        name="decathlon",
        example="dataset.json with training pairs, imagesTr/CASE.nii.gz, labelsTr/CASE.nii.gz",
        images=(rf"[^/]+/imagesTr/(?P<case>[^/]+){NII}",),
        unlabelled=(rf"[^/]+/imagesTs/(?P<case>[^/]+){NII}",),
        label=(rf"[^/]+/labelsTr/(?P<case>[^/]+){NII}",),
        describe=_described_decathlon,
    ),
    Layout(
        name="brats2020",
        example="CASE/CASE_flair.nii.gz (and _t1, _t1ce, _t2), CASE/CASE_seg.nii.gz",
        images=tuple(rf"(?:.*/)?(?P<case>[^/]+)_{c}{NII}" for c in _FOUR),
        label=(rf"(?:.*/)?(?P<case>[^/]+)_seg{NII}", _CASE_355),
        channel_names=_FOUR,
        label_names=_GLIOMA,
        label_map={4: 3},
    ),
    Layout(
        name="brats2023",
        example="CASE/CASE-t2f.nii.gz (and -t1n, -t1c, -t2w), CASE/CASE-seg.nii.gz",
        images=tuple(rf"(?:.*/)?(?P<case>[^/]+)-{c}{NII}" for c in _FOUR_2023),
        label=(rf"(?:.*/)?(?P<case>[^/]+)-seg{NII}",),
        channel_names=_FOUR,
        label_names=_GLIOMA,
    ),
    Layout(
        name="brats",
        example="BraTS cases of 2020, 2021 and 2023 together",
        images=tuple(
            rf"(?:.*/)?(?P<case>[^/]+)(?:_{old}|-{new}){NII}"
            for old, new in zip(_FOUR, _FOUR_2023, strict=True)
        ),
        label=(rf"(?:.*/)?(?P<case>[^/]+)[_-]seg{NII}", _CASE_355),
        channel_names=_FOUR,
        label_names=_GLIOMA,
        label_map={4: 3},
    ),
    Layout(
        name="lits",
        example="volume-N.nii, segmentation-N.nii",
        images=(rf"(?:.*/)?volume-(?P<case>\d+){NII}",),
        unlabelled=(rf"(?:.*/)?(?:test-)?volume-(?P<case>\d+){NII}",),
        label=(rf"(?:.*/)?segmentation-(?P<case>\d+){NII}",),
        case_name="volume-{}",
        channel_names=("CT",),
        label_names={0: "background", 1: "liver", 2: "tumour"},
    ),
    Layout(
        name="folders",
        example="images/CASE.nii.gz, labels/CASE.nii.gz",
        images=(rf"[^/]+/{_IMAGE_WORDS}(?:Tr)?/{_FIRST}(?P<case>[^/]+?){_LAST}{_CHANNEL}{NII}",),
        label=(rf"[^/]+/{_LABEL_WORDS}(?:Tr)?/{_FIRST}(?P<case>[^/]+?){_LAST}{NII}",),
    ),
    Layout(
        name="case-folders",
        example="CASE/image.nii.gz, CASE/label.nii.gz",
        images=(rf"(?:.*/)?(?P<case>[^/]+)/{_IMAGE_WORDS}{_CHANNEL}{NII}",),
        label=(rf"(?:.*/)?(?P<case>[^/]+)/{_LABEL_WORDS}{NII}",),
    ),
    Layout(
        name="suffix",
        example="CASE.nii.gz, CASE_seg.nii.gz (or _label, _mask)",
        images=(rf"(?:.*/)?(?P<case>(?!{_LABEL_WORDS}\.)(?![^/]+_{_LABEL_WORDS}\.)[^/]+?){_CHANNEL}{NII}",),
        label=(rf"(?:.*/)?(?P<case>[^/]+?)_{_LABEL_WORDS}{NII}",),
    ),
)
"""Known layouts. Of those that explain equally many cases, the first is taken."""

_GROUPS = (
    re.compile(r"(patient\d+)_(?:frame\d+|ED|ES)", re.IGNORECASE),  # ACDC: two phases of one heart
    re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d+", re.IGNORECASE),  # BraTS 2023: time points of one patient
)


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
    description = _read_description(root)
    chosen = known[layout] if layout else _detect(files, description)
    if chosen is None:
        raise DatasetError(
            root,
            f"no cases with image and label were found among {len(files)} NIfTI files"
            if len(files)
            else "there are no NIfTI files in it",
            "Name them images/CASE.nii.gz and labels/CASE.nii.gz, or as another layout that "
            "ossnet check --help shows",
        )
    return replace(_assemble(root, chosen, files, description), nonfinite=nonfinite)


def images_in(path: Path | str) -> tuple[Case, ...]:
    """The scans to segment in a folder of any layout, or in a single file; labels are not needed.

    A folder with `imagesTs` gives these. Files `CASE_0000`, `CASE_0001`, … are the channels of one case.

    Raises:
        DatasetError: There is no such path, it holds no images, or a case lacks a channel.
    """
    root = Path(path)
    if root.is_file():
        return (Case(stem(root), (root,), group=_group(stem(root))),)
    if not root.is_dir():
        raise DatasetError(root, "there is no such file or folder", "Check the path")
    files = Files(root)
    for found in _unlabelled(root, files):
        cases, problems = _cases(found, None, need_labels=False)
        if problems:
            raise DatasetError(problems[0].where, problems[0].reason, problems[0].fix)
        return cases
    raise DatasetError(root, "there are no NIfTI images in it", "Name a folder with .nii or .nii.gz files")


def _unlabelled(root: Path, files: Files) -> Iterator[Found]:
    """Readings of a folder as images without labels, the most telling first."""
    for layout in LAYOUTS:
        if layout.describe and (found := layout.find(files, labelled=False)).images:
            yield found
    fixed = [layout.find(files, labelled=False) for layout in LAYOUTS if layout.channel_names]
    complete = [f for f in fixed if f.images]
    if complete:
        yield max(complete, key=lambda f: len(f.images))
    if (root / "dataset.json").exists():
        for layout in LAYOUTS:
            if layout.describe and (found := layout.find(files)).images:
                yield found
    labelled = [
        (layout.find(files)) for layout in LAYOUTS if not layout.describe and not layout.channel_names
    ]
    pairs = max(labelled, key=lambda f: f.pairs)
    if pairs.pairs:
        yield pairs
    if (root / "dataset.json").exists():
        return  # it says where images are, and there are none: what is left are its labels
    # Any folder of images: those directly in it, else in folders below that are not named after labels.
    labels = re.compile(rf"{_LABEL_WORDS}(?:Tr|Ts)?", re.IGNORECASE)
    below = [f for f in files.all() if not labels.fullmatch(f.parent.name)]
    images: dict[str, dict[int, list[Path]]] = {}
    for file in files.flat() or below:
        match = re.fullmatch(r"(.+)_(\d{4})", stem(file))
        name, channel = (match[1], int(match[2])) if match else (stem(file), 0)
        images.setdefault(name, {}).setdefault(channel, []).append(file)
    if images:
        yield Found(images, {})


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


def _read_description(root: Path) -> Mapping[str, Any] | None:
    path = root / "dataset.json"
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(path, f"cannot be read ({error.strerror})", "Check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(path, f"is not valid JSON ({error})", "Correct it") from error
    if not isinstance(value, Mapping):
        raise DatasetError(path, "is not a JSON object", "See nnU-Net's or the Decathlon's dataset.json")
    return value


def _assemble(root: Path, layout: Layout, files: Files, value: Mapping[str, Any] | None) -> Dataset:
    description = Description(layout.channel_names, layout.label_names)
    if layout.describe:
        path = root / "dataset.json"
        if value is None:
            raise DatasetError(path, "there is no such file", f"The layout {layout.name} needs it")
        try:
            description = layout.describe(value, path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
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
    if not names:
        names, mapping, more = _found_labels(cases)
        problems += more
    elif layout.describe:
        names, mapping = _consecutive(names)
    split_file = root / "splits_final.json"
    return Dataset(
        root=root,
        layout=layout.name,
        cases=cases,
        channel_names=description.channel_names or _channel_names(cases),
        label_names=names,
        label_map=mapping,
        splits=read_splits(split_file) if split_file.exists() else None,
        problems=tuple(problems),
    )


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
            cases.append(Case(name, images, labels[0] if labels else None, _group(name)))
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
            str(some), f"case {name} lacks channel {_ranges(missing)} of {count}", "Add the missing file"
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
            cases[name] = Case(name, tuple(paths[:-1]), paths[-1], _group(name))
    return tuple(cases[name] for name in sorted(cases)), problems


def _grouped(cases: tuple[Case, ...], path: Path) -> tuple[Case, ...]:
    """Patients from a `cases.json` (case → facts, of which `patient`, `subject` or `group` is used)."""
    if not path.exists():
        return cases
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(path, f"cannot be read ({error})", "Correct or remove it") from error

    def patient(case: Case) -> str | None:
        known = facts.get(case.name) if isinstance(facts, Mapping) else None
        for key in ("patient", "subject", "group"):
            if isinstance(known, Mapping) and known.get(key) is not None:
                return str(known[key])
        return case.group

    return tuple(replace(case, group=patient(case)) for case in cases)


def _group(name: str) -> str | None:
    for pattern in _GROUPS:
        if match := pattern.fullmatch(name):
            return match[1]
    return None


def _channels(value: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(value[key]) for key in sorted(value, key=int))


def _named(value: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Value → name, from either direction in which `labels` is written."""
    if all(str(key).isdigit() for key in value):
        return {int(key): str(name) for key, name in value.items()}
    names: dict[int, str] = {}
    parts: set[int] = set()
    for name, number in value.items():
        if name == "ignore":
            raise DatasetError(
                path,
                "declares an 'ignore' label, which is not supported",
                "Give these voxels a class, or remove it",
            )
        if isinstance(number, list):  # regions: several labels together
            parts |= {int(n) for n in number}
        else:
            names[int(number)] = str(name)
    return {n: names.get(n, f"label {n}") for n in sorted(parts | set(names))}


def _consecutive(names: Mapping[int, str]) -> tuple[dict[int, str], dict[int, int]]:
    """Classes 0 … K-1 for the values in ascending order, and the map from those that moved."""
    values = sorted({0, *names})
    mapping = {value: number for number, value in enumerate(values) if value != number}
    return {number: names.get(value, "background") for number, value in enumerate(values)}, mapping


def _found_labels(cases: Sequence[Case]) -> tuple[dict[int, str], dict[int, int], list[Problem]]:
    """Classes from what label files hold, for data sets that nothing describes."""

    def values(case: Case) -> set[int] | None:
        try:
            return {int(v) for v in np.unique(read_labels(case.label).data)} if case.label else None
        except OssnetError:
            return None  # the case is read again, and its error told, by whoever uses it

    with ThreadPoolExecutor() as pool:
        found = set().union(*(v for v in pool.map(values, cases) if v))
    if len(found) > 256:
        example = str(cases[0].label)
        return (
            {0: "background"},
            {},
            [Problem(example, f"label files hold {len(found)} values", "Are they images? Give label maps")],
        )
    names = {v: "background" if v == 0 else f"label {v}" for v in found}
    return (*_consecutive(names), [])


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


def _ranges(numbers: Sequence[int]) -> str:
    return ", ".join(str(n) for n in numbers)

"""How data sets name their files: a layout is a declaration.

Patterns are matched against names only; images are looked into only where results of ours may lie among them.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ossnet.data import descriptions
from ossnet.data.descriptions import Description
from ossnet.files.containers import composed, is_image, is_slicer_segmentation, nifti_first
from ossnet.files.reading import origin_of
from ossnet.volume import MARK

_SLICER = r"\.seg\.n(?:rrd|hdr)"
"""How 3D Slicer's segmentations end."""
IMAGE = r"(?:\.nii(?:\.gz)?|\.mha|\.mhd|(?<!\.seg)\.n(?:rrd|hdr))"
LABEL = rf"(?:{IMAGE}|{_SLICER})"
_DEPTH = 4  # folders below the given one that are searched


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
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    describe: Callable[[Mapping[str, Any], Path], Description] | None = None

    def find(self, files: "Files", *, labelled: bool = True) -> "Found":
        """The images and labels among `files`."""
        labels: dict[str, list[Path]] = {}
        for pattern in self.label:
            for match, path in files.matching(pattern):
                labels.setdefault(self.case_name.format(match["case"]), []).append(path)
        labels = {name: nifti_first(paths) for name, paths in labels.items()}
        patterns = self.images if labelled else (self.unlabelled or self.images)
        images: dict[str, dict[int, list[Path]]] = {}
        for number, pattern in enumerate(patterns):
            for match, path in files.matching(pattern):
                channel = int(match.groupdict().get("channel") or number)
                name = self.case_name.format(match["case"])
                images.setdefault(name, {}).setdefault(channel, []).append(path)
        images = {n: {c: nifti_first(paths) for c, paths in found.items()} for n, found in images.items()}
        return Found(images if self.describe else _by_case(images, labels), labels)


def _by_case(
    images: Mapping[str, Mapping[int, list[Path]]], labels: Mapping[str, object]
) -> dict[str, dict[int, list[Path]]]:
    """Images whose four digits number the cases and no channels, as their labels show, each as a case."""
    numbered = {name: {f"{name}_{c:04d}": {0: p} for c, p in found.items()} for name, found in images.items()}
    if not any(case in labels for cases in numbered.values() for case in cases):
        return {name: dict(found) for name, found in images.items()}
    out: dict[str, dict[int, list[Path]]] = {}
    for name, found in images.items():
        digits = re.compile(rf"_\d{{4}}{IMAGE}$", re.IGNORECASE)
        split = name not in labels and all(
            digits.search(path.name) for paths in found.values() for path in paths
        )
        out |= numbered[name] if split else {name: dict(found)}
    return out


class Files:
    """The image files in a folder, some folders deep; hidden ones are left out, and in folders below what a training or
    `segment` wrote, unless it is there to train on (`labelsTr`)."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._files: list[tuple[str, Path]] = []
        self._others: Counter[str] = Counter()
        for folder, names, files in os.walk(root, followlinks=True):
            place = Path(folder)
            depth = len(place.relative_to(root).parts)
            names[:] = sorted(n for n in names if not n.startswith(".")) if depth < _DEPTH else []
            if depth and _is_run(files):
                names[:] = []
                continue
            labels = names_labels(place)
            if depth and not labels and _has_report(place, files, "report"):
                continue
            # Labels may have been drawn by a model, and corrected since or not.
            among = depth > 0 and labels and place.name.lower() != "labelstr"
            results = among and _has_report(place, files, "(.+_)?report")
            for name in sorted(files):
                if results and is_image(place / name) and origin_of(place / name).startswith(MARK):
                    continue
                if is_image(place / name):
                    relative = (place / name).relative_to(root)
                    name_here = composed(f"{self.root.name}/{relative.as_posix()}")
                    self._files.append((name_here, root / relative))
                elif suffix := (place / name).suffix.lower():
                    self._others[suffix] += 1

    def __len__(self) -> int:
        return len(self._files)

    def none(self) -> tuple[str, str]:
        """Reason and fix where there are no images, from what is there instead."""
        reason = "there are no images in it"
        if self._others[".dcm"] or self._others[".ima"]:
            return f"{reason}, but DICOM files that are not a readable scan", (
                "Convert them first, for example with dcm2niix"
            )
        kinds = (".mgz", ".mgh", ".mnc", ".gipl")
        if other := [ending for ending in kinds if self._others[ending]]:
            return f"{reason}, but {' and '.join(other)} files", "Convert them to .nii.gz first"
        return reason, "Name a folder with .nii.gz, .nii, .nrrd or .mha files"

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
        """Those directly in the folder that may be scans."""
        flat = [path for name, path in self._files if name.count("/") == 1]
        return [path for path in flat if not is_slicer_segmentation(path)]


def _is_run(files: Sequence[str]) -> bool:
    """Whether these are those of a training, whose label maps are named after cases."""
    return {"settings.json", "splits.json"} <= set(files)


def names_labels(folder: Path) -> bool:
    """Whether a folder is named after labels."""
    return re.fullmatch(rf"{LABEL_WORDS}(?:Tr|Ts)?", folder.name, re.IGNORECASE) is not None


def _has_report(folder: Path, files: Sequence[str], stem: str) -> bool:
    """Whether a report says that segmentations lie there: they are named after cases, as scans and labels are.

    Args:
        stem: Pattern of its name: that of a whole folder, or of a single file too, which may lie beside its scan.
    """
    for name in files:
        if re.fullmatch(rf"{stem}(\.\d+)?\.json", name):
            try:
                value = json.loads((folder / name).read_text(encoding="utf-8"))
                return "fingerprint" in value["model"]
            except (OSError, ValueError, TypeError, KeyError):
                pass
    return False


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
_TUMOUR = {"whole tumour": (1, 2, 3), "tumour core": (1, 3)}
"""What BraTS judges beside enhancing tumour."""
_ENHANCING = {4: 3, 3: 3}
"""Up to 2021 enhancing tumour is 4 in files, since then 3."""
_FOUR = ("flair", "t1", "t1ce", "t2")
_FOUR_2023 = ("t2f", "t1n", "t1c", "t2w")  # the same sequences in the same order
# BraTS 2020 gave out the label of training case 355 under another name.
_CASE_355 = rf"(?:.*/)?(?P<case>[^/]+)/W39_1998\.09\.19_Segm{LABEL}"


_FIRST = r"(?:(?:img|image|volume|scan|label|mask|seg|segmentation)[_-]?)?"
_LAST = r"(?:[_-](?:img|image|ct|mri?|volume|scan|labels?|mask|seg|segmentation|gt))?"
_CHANNEL = r"(?:_(?P<channel>\d{4}))?"
_IMAGE_WORDS = r"(?:images?|imgs?|ct|mri?|scans?|volumes?)"
LABEL_WORDS = r"(?:labels?|masks?|segs?|segmentations?|annotations?|gt|ground_?truth)"

LAYOUTS = (
    Layout(
        name="nnunet",
        example="dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz",
        images=(rf"[^/]+/imagesTr/(?P<case>[^/]+)_(?P<channel>\d{{4}}){IMAGE}",),
        unlabelled=(rf"[^/]+/imagesTs/(?P<case>[^/]+)_(?P<channel>\d{{4}}){IMAGE}",),
        label=(rf"[^/]+/labelsTr/(?P<case>[^/]+){LABEL}",),
        describe=descriptions.nnunet,
    ),
    Layout(
        name="decathlon",
        example="dataset.json with training pairs, imagesTr/CASE.nii.gz, labelsTr/CASE.nii.gz",
        images=(rf"[^/]+/imagesTr/(?P<case>[^/]+){IMAGE}",),
        unlabelled=(rf"[^/]+/imagesTs/(?P<case>[^/]+){IMAGE}",),
        label=(rf"[^/]+/labelsTr/(?P<case>[^/]+){LABEL}",),
        describe=descriptions.decathlon,
    ),
    Layout(
        name="brats2020",
        example="CASE/CASE_flair.nii.gz (and _t1, _t1ce, _t2), CASE/CASE_seg.nii.gz",
        images=tuple(rf"(?:.*/)?(?P<case>[^/]+)_{c}{IMAGE}" for c in _FOUR),
        label=(rf"(?:.*/)?(?P<case>[^/]+)_seg{LABEL}", _CASE_355),
        channel_names=_FOUR,
        label_names=_GLIOMA,
        regions=_TUMOUR,
        label_map=_ENHANCING,
    ),
    Layout(
        name="brats2023",
        example="CASE/CASE-t2f.nii.gz (and -t1n, -t1c, -t2w), CASE/CASE-seg.nii.gz",
        images=tuple(rf"(?:.*/)?(?P<case>[^/]+)-{c}{IMAGE}" for c in _FOUR_2023),
        label=(rf"(?:.*/)?(?P<case>[^/]+)-seg{LABEL}",),
        channel_names=_FOUR,
        label_names=_GLIOMA,
        regions=_TUMOUR,
    ),
    Layout(
        name="brats",
        example="BraTS cases of 2020, 2021 and 2023 together",
        images=tuple(
            rf"(?:.*/)?(?P<case>[^/]+)(?:_{old}|-{new}){IMAGE}"
            for old, new in zip(_FOUR, _FOUR_2023, strict=True)
        ),
        label=(rf"(?:.*/)?(?P<case>[^/]+)[_-]seg{LABEL}", _CASE_355),
        channel_names=_FOUR,
        label_names=_GLIOMA,
        regions=_TUMOUR,
        label_map=_ENHANCING,
    ),
    Layout(
        name="lits",
        example="volume-N.nii, segmentation-N.nii",
        images=(rf"(?:.*/)?volume-(?P<case>\d+){IMAGE}",),
        unlabelled=(rf"(?:.*/)?(?:test-)?volume-(?P<case>\d+){IMAGE}",),
        label=(rf"(?:.*/)?segmentation-(?P<case>\d+){LABEL}",),
        case_name="volume-{}",
        channel_names=("CT",),
        label_names={0: "background", 1: "liver", 2: "tumour"},
    ),
    Layout(
        name="folders",
        example="images/CASE.nii.gz, labels/CASE.nii.gz",
        images=(rf"[^/]+/{_IMAGE_WORDS}(?:Tr)?/{_FIRST}(?P<case>[^/]+?){_LAST}{_CHANNEL}{IMAGE}",),
        label=(rf"[^/]+/{LABEL_WORDS}(?:Tr)?/{_FIRST}(?P<case>[^/]+?){_LAST}{LABEL}",),
    ),
    Layout(
        name="case-folders",
        example="CASE/image.nii.gz, CASE/label.nii.gz",
        images=(rf"(?:.*/)?(?P<case>[^/]+)/{_IMAGE_WORDS}{_CHANNEL}{IMAGE}",),
        label=(rf"(?:.*/)?(?P<case>[^/]+)/{LABEL_WORDS}{LABEL}",),
    ),
    Layout(
        name="suffix",
        example="CASE.nii.gz, CASE_seg.nii.gz (or _label, _mask, or CASE.seg.nrrd)",
        images=(rf"(?:.*/)?(?P<case>(?!{LABEL_WORDS}\.)(?![^/]+_{LABEL_WORDS}\.)[^/]+?){_CHANNEL}{IMAGE}",),
        label=(
            rf"(?:.*/)?(?P<case>[^/]+?)_{LABEL_WORDS}{LABEL}",
            rf"(?:.*/)?(?P<case>(?![^/]+_{LABEL_WORDS}\.)[^/]+?){_SLICER}",
        ),
    ),
    Layout(
        name="slicer",
        example="CASE/SCAN.nrrd, CASE/Segmentation.seg.nrrd",
        images=(rf"[^/]+/(?:.*/)?(?P<case>[^/]+)/[^/]+{IMAGE}",),
        label=(rf"[^/]+/(?:.*/)?(?P<case>[^/]+)/[^/]+{_SLICER}",),
    ),
)
"""Known layouts. Of those that explain equally many cases, the first is taken."""

_GROUPS = (
    re.compile(r"(patient\d+)_(?:frame\d+|ED|ES)", re.IGNORECASE),  # ACDC: two phases of one heart
    re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d+", re.IGNORECASE),  # BraTS 2023: time points of one patient
    re.compile(r"(sub-[A-Za-z0-9]+)_.+"),  # BIDS: sessions and runs of one subject
)


def patient_of(name: str) -> str | None:
    """The patient that a case name tells, or None."""
    for pattern in _GROUPS:
        if match := pattern.fullmatch(name):
            return match[1]
    return None

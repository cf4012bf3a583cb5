"""A data set: its cases, what their channels and labels mean, and reading them."""

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from ossnet.data.splits import Split, read_splits
from ossnet.errors import DatasetError, InputError, VolumeError
from ossnet.files.reading import Nonfinite, read_labels, read_volume
from ossnet.volume import LabelMap, Volume, same_names, same_place


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


def joined_name(structures: Iterable[str]) -> str:
    """The name of structures that are learnt as one."""
    return " and ".join(structures) or "foreground"


def nameless(value: int) -> str:
    """The name of a structure that nothing names."""
    return f"label {value}"


def values_told(names: Mapping[int, str]) -> dict[int, int]:
    """Value in label files → class, where that is what all names of classes tell (`nameless`); otherwise nothing."""
    told = {c: re.fullmatch(r"label (\d+)", name) for c, name in names.items() if c}
    return {int(m[1]): c for c, m in told.items() if m} if all(told.values()) else {}


def values_in_files(names: Mapping[int, str], label_map: Mapping[int, int]) -> set[int]:
    """The values that label files may hold.

    Args:
        names: Class → name.
        label_map: Value → class where they differ; the number of such a class is no value itself.
    """
    return set(label_map) | (set(names) - set(label_map.values()))


def name_key(name: str) -> str:
    """Alike for names that mean one structure."""
    return name.strip().casefold()


def named_classes(names: Mapping[int, str], by_name: Mapping[str, int]) -> dict[int, int]:
    """Value in a label file → class, by the names that the file gives (`Dataset.by_name`)."""
    return {value: by_name[name_key(name)] for value, name in names.items() if name_key(name) in by_name}


def values_of(data: Integer[np.ndarray, "X Y Z"]) -> list[int]:
    """The values in a label map, ascending; plane by plane, which takes hardly any memory beside it."""
    found: set[int] = set()
    for plane in np.moveaxis(data, int(np.argmax(np.abs(data.strides))), 0):
        few = plane.dtype.itemsize == 1
        found.update((np.flatnonzero(np.bincount(plane.ravel())) if few else np.unique(plane)).tolist())
    return sorted(found)


def relabelled(
    data: Integer[np.ndarray, "X Y Z"], label_map: Mapping[int, int]
) -> Integer[np.ndarray, "X Y Z"]:
    """A label map with classes for values, in the smallest type that holds them; values not named stay."""
    values = values_of(data)
    targets = np.array([label_map.get(v, v) for v in values])
    targets = targets.astype(np.min_scalar_type(int(targets.max(initial=0))))
    if not values or values[-1] > np.iinfo(np.uint16).max:
        return np.asarray(targets[np.searchsorted(values, data)])
    table = np.zeros(values[-1] + 1, targets.dtype)
    table[values] = targets
    return np.asarray(table[data.view(np.uint8) if data.dtype == bool else data])


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
        by_name: Name of a structure (`name_key`) → class, where each label file numbers structures in its own way and
            names them, as 3D Slicer's segmentations may; empty where numbers count.
        splits: Folds of `splits_file`, or None.
        splits_file: A `splits_final.json` (`with_splits`).
        regions: Name → classes, for what the data set names of several labels together. The labels are learnt one by
            one, and judged one by one and together.
        problems: What keeps other cases from being used.
        nonfinite: Whether NaN and infinite voxels of images are refused or replaced (see `read_volume`).
    """

    root: Path
    layout: str
    cases: tuple[Case, ...]
    channel_names: tuple[str, ...]
    label_names: Mapping[int, str]
    label_map: Mapping[int, int] = field(default_factory=dict)
    by_name: Mapping[str, int] = field(default_factory=dict)
    splits: tuple[Split, ...] | None = None
    splits_file: Path | None = None
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    nonfinite: Nonfinite = "refuse"

    def with_splits(self, path: Path) -> "Dataset":
        """The same cases, in the folds of a file (errors as of `read_splits`)."""
        return replace(self, splits=read_splits(path), splits_file=path)

    def __getitem__(self, name: str) -> Case:
        """The case of this name."""
        if name not in self._by_name:
            raise DatasetError(
                self.root, f"there is no case {name}", "Check the name, or the split that names it"
            )
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Case]:
        return {case.name: case for case in self.cases}

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
        """Read the labels of a case (X, Y, Z) as classes 0 … K-1, which results of ours may hold already.

        Raises:
            VolumeError: The case has no label, the file cannot be trusted, or holds a value that is no class.
        """
        if case.label is None:
            raise DatasetError(case.images[0], "has no label", "Add its label file")
        labels = read_labels(case.label)
        if self.by_name:
            label_map: Mapping[int, int] = named_classes(labels.names, self.by_name)
            declared = {0, *label_map}
        else:
            label_map = {} if labels.holds_classes else self.label_map
            declared = values_in_files(self.label_names, label_map)
            self._require_same_names(labels, case.label, label_map)
        return replace(
            labels,
            data=_as_classes(labels.data, case.label, label_map, declared),
            names=dict(self.label_names),
            origin="",  # of the file as it was
        )

    def _require_same_names(self, labels: LabelMap, where: Path, classes: Mapping[int, int]) -> None:
        """Refuse a label file whose own names say that it numbers structures otherwise than the data set."""
        ours = {v: self.label_names.get(classes.get(v, v), "").casefold() for v in labels.names}
        theirs = {v: name.casefold() for v, name in labels.names.items()}
        if reason := same_names(theirs, ours):
            raise VolumeError(
                where,
                f"numbers structures otherwise than the data set: {reason}",
                "Give each structure its number",
            )

    def read(self, case: Case) -> tuple[Volume, LabelMap]:
        """Read the scan and the labels of a case, in the voxel order of the scan.

        Raises:
            VolumeError: As `image` and `labels`, or the two do not lie on each other.
        """
        volume = self.image(case)
        labels = self.labels(case).in_order_of(volume)
        if reason := same_place(volume, labels):
            raise VolumeError(
                str(case.label),
                f"does not lie on its image: {reason}",
                "Resample the label onto the image, or export it on the image's grid",
            )
        return volume, labels


def _as_classes(
    data: np.ndarray, where: Path, label_map: Mapping[int, int], declared: Set[int]
) -> np.ndarray:
    found = values_of(data)
    unknown = [v for v in found if v not in declared]
    if unknown:
        raise VolumeError(
            where,
            f"holds label {unknown[0]}, which the data set does not declare",
            f"Declare it, or correct the file; declared are {', '.join(map(str, sorted(declared)))}",
        )
    if all(label_map.get(v, v) == v for v in found):
        return data
    return relabelled(data, label_map)

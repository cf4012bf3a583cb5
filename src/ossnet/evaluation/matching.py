"""Which prediction belongs to which label, and what the numbers in both mean."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ossnet.data.cases import (
    Dataset,
    joined_name,
    name_key,
    named_classes,
    relabelled,
    values_in_files,
    values_of,
    values_told,
)
from ossnet.data.layouts import open_dataset
from ossnet.data.naming import names_labels, patient_of
from ossnet.errors import DatasetError, SettingsError, VolumeError
from ossnet.files.containers import is_image, stem, without_copies
from ossnet.files.reading import origin_of, read_labels
from ossnet.volume import MARK, LabelMap

SUFFIXES = ("", "_seg", "-seg", "_pred", "_prediction", "_label", "_labels", "_mask", "_segmentation")
"""What may follow the name of a case in the name of its prediction, in order of preference."""


_MANY = 32
"""With more values than these a map must look like one of labels."""


@dataclass(frozen=True)
class Pair:
    """A prediction and the label that it is judged by; `patient`: whose they are, where others may be of the same."""

    case: str
    prediction: Path
    label: Path
    patient: str | None = None


@dataclass(frozen=True)
class Matched:
    """Pairs with what is known about their labels.

    Attributes:
        pairs: Sorted by case.
        names: Class → name; empty where nothing names them.
        values: Value in a label file → class, for those that differ.
        regions: Name → classes, for what is judged as one structure beside its parts.
        as_in_files: Predictions that do not say what made them hold the values of label files, not classes.
        by_name: Name → class, where label files number structures each in its own way (`Dataset.by_name`).
        described: A data set says what `values` mean; otherwise they lead to the numbers that results have.
    """

    pairs: tuple[Pair, ...]
    names: dict[int, str] = field(default_factory=dict)
    values: dict[int, int] = field(default_factory=dict)
    as_in_files: bool = True
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    described: bool = False
    by_name: Mapping[str, int] = field(default_factory=dict)

    def reference(self, pair: Pair) -> LabelMap:
        """The label, as classes.

        Raises:
            VolumeError: The file cannot be trusted, or holds a value that is no class.
        """
        return self._read(pair.label, as_in_file=True)

    def prediction(self, pair: Pair) -> LabelMap:
        """The prediction, as classes (errors as for `reference`)."""
        return self._read(pair.prediction, as_in_file=self.as_in_files)

    def with_regions(self, more: Mapping[str, Sequence[int]]) -> "Matched":
        """Further regions, of values in label files.

        Raises:
            SettingsError: The data set has no such label.
        """
        known = values_in_files(self.names, self.values) - {0}
        regions = dict(self.regions)
        for name, values in more.items():
            if self.names and (unknown := set(values) - known):
                raise SettingsError(
                    "region",
                    f"{name} has label {min(unknown)}, which the data set does not declare",
                    f"Declared are {', '.join(map(str, sorted(known)))}",
                )
            regions[name] = tuple(sorted({self.values.get(value, value) for value in values}))
        return replace(self, regions=regions)

    def as_one(self, prediction: LabelMap) -> str | None:
        """The name of all structures together, where the prediction is of a model that learnt them as one."""
        structures = [name for number, name in sorted(self.names.items()) if number]
        names = [name for number, name in prediction.names.items() if number]
        joined = joined_name(structures)
        # Weights of the authors tell no names of structures.
        return joined if len(structures) > 1 and names in ([joined], [joined_name(())]) else None

    def _read(self, file: Path, *, as_in_file: bool) -> LabelMap:
        labels = read_labels(file)
        if labels.origin.startswith(MARK):
            as_in_file = self.described and labels.holds_values
        values = self.values if as_in_file else {}
        known = values_in_files(self.names, values)
        by_name = self.by_name
        if labels.holds_values and self.described:
            # Values of another data set, perhaps, which numbers the same structures in another way.
            by_name = {name_key(name): label for label, name in self.names.items() if label}
        named = named_classes(labels.names, by_name)
        whole = named.keys() == labels.names.keys() - {0}
        if labels.names and (whole if labels.holds_values else by_name) and self.as_one(labels) is None:
            values, known = named, {0, *named}
        found = {int(v) for v in np.unique(labels.data)}
        if len(found) > _MANY and not self.names and not _in_pieces(labels):
            raise VolumeError(
                file,
                f"holds {len(found)} values that change from voxel to voxel, as the grey values of a scan do",
                "Give the label map",
            )
        if self.names and (unknown := found - {0} - known):
            raise VolumeError(
                file,
                f"holds label {min(unknown)}, which the data set does not declare",
                f"Check that it belongs to this data set; declared are {sorted(known - {0})}",
            )
        labels = replace(labels, names={values.get(k, k): name for k, name in labels.names.items()})
        if not found & set(values):
            return labels
        return replace(labels, data=relabelled(labels.data, values))


def match(predictions: Path, labels: Path, *, only_predicted: bool = False) -> Matched:
    """Find the label of each prediction.

    Args:
        predictions: A file, or a folder with files named after the cases (`CASE.nii.gz`,
            `CASE_seg.nii.gz`, …).
        labels: A file for a file; a data set in any layout, or a folder of label files named after the cases,
            for a file or a folder.
        only_predicted: Leave out labels without a prediction instead of refusing; so they are for a file.

    Raises:
        DatasetError: A path does not exist, a folder is to be compared with a file, predictions are missing or
            ambiguous, or nothing matches.
    """
    for path in (predictions, labels):
        if not path.exists():
            raise DatasetError(path, "there is no such file or folder", "Check the path")
    if labels.is_file() and not predictions.is_file():
        raise DatasetError(
            labels,
            "is a file, and is to be compared with a folder",
            "Give one prediction, or the folder that holds the labels of all",
        )
    if labels.is_file():
        only = (Pair(stem(predictions), predictions, labels),)
        return Matched(only, _names_of_all(only[0]), _values_of_undescribed(only))

    references, dataset = _references(labels)
    if dataset is not None and dataset.problems:
        first, more = dataset.problems[0], len(dataset.problems) - 1
        also = f" ({more} more: ossnet check {labels})" if more else ""
        warnings.warn(f"{first.where} {first.reason}{also}", stacklevel=2)
    found = _predictions(predictions, references.keys())
    missing = [case for case in references if case not in found]
    if not references:
        raise DatasetError(labels, "has no labels that can be used", f"Look at it with ossnet check {labels}")
    if not found:
        raise DatasetError(
            predictions,
            f"{'is not' if predictions.is_file() else 'no file is'} named after a case of {labels}",
            f"Name predictions after the cases, for example {missing[0]}.nii.gz"
            + (f"; for test cases give {labels / 'labelsTs'}" if (labels / "labelsTs").is_dir() else ""),
        )
    if missing and not only_predicted and not predictions.is_file():
        raise DatasetError(
            predictions,
            f"{len(missing)} of {len(references)} cases have no prediction: {listed(missing)}",
            "Segment them, or add --only-predicted to leave them out",
        )
    whose = {case: patient_of(case) for case in found}
    if dataset is not None:
        whose |= {case.name: case.group for case in dataset.cases}
    pairs = tuple(Pair(case, found[case], references[case], whose[case]) for case in sorted(found))
    if dataset is None:
        return Matched(pairs, values=_values_of_undescribed(pairs))
    names, values = dict(dataset.label_names), dict(dataset.label_map)
    as_in_files = not values or _hold_file_values(pairs, names, values)
    return Matched(pairs, names, values, as_in_files, dataset.regions, True, dataset.by_name)


def _names_of_all(pair: Pair) -> dict[int, str]:
    """What a reference calls the structures of a pair; nothing where it leaves one without a name, as 3D Slicer may."""
    reference, prediction = read_labels(pair.label), read_labels(pair.prediction)
    held = {*values_of(reference.data), *values_of(prediction.data)} - {0}
    return dict(reference.names) if held <= set(reference.names) else {}


def _values_of_undescribed(pairs: Sequence[Pair]) -> dict[int, int]:
    """Value → number in results of ossnet, for label files that nothing describes.

    Where names of structures tell their values, these count. Otherwise numbers are taken in ascending order, as in
    training, unless those of one side are all on the other: then equal ones are compared.

    Raises:
        DatasetError: There are more or fewer values than the model has structures, so that the order says nothing.
    """
    ours = next((p.prediction for p in pairs if origin_of(p.prediction).startswith(MARK)), None)
    names = {} if ours is None else read_labels(ours).names
    structures = set(names) - {0}
    if not structures:
        return {}
    values: set[int] = set()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        values.update(*pool.map(_values_in, {pair.label for pair in pairs}))
    told = values_told(names)
    if told and values <= set(told):
        moved = {value: number for value, number in told.items() if value != number}
        if moved and values and values <= structures:
            alike = ", ".join(f"{v} for {names[told[v]]}" for v in sorted(values))
            warnings.warn(f"labels are taken for what the model's names tell ({alike})", stacklevel=3)
        return moved
    if not values or values <= structures or structures <= values:
        return {}
    if len(values) != len(structures):
        raise DatasetError(
            pairs[0].label,
            f"label files hold {listed([str(v) for v in sorted(values)])}, the model has {len(structures)} "
            "structures: nothing says which is which",
            "Give the folder of the data set, with its dataset.json, instead of single labels",
        )
    if values & structures:
        alike = ", ".join(f"{v} for {k}" for v, k in zip(sorted(values), sorted(structures), strict=True))
        warnings.warn(
            f"labels are taken in ascending order for the model's classes ({alike}), as in training; if they mean "
            "other things, give the folder of the data set",
            stacklevel=3,
        )
    return {v: k for v, k in zip(sorted(values), sorted(structures), strict=True) if v != k}


def _values_in(file: Path) -> set[int]:
    """Labels of a reference; none of a result of ossnet that holds classes."""
    labels = read_labels(file)
    return set() if labels.holds_classes else {int(v) for v in np.unique(labels.data)} - {0}


def _hold_file_values(pairs: Sequence[Pair], names: Mapping[int, str], values: Mapping[int, int]) -> bool:
    """Whether predictions of other programs hold values as in label files, and not classes 0 … K-1.

    One answer for all of them; with values that fit both they are taken for those of the files.
    """
    in_files = values_in_files(names, values)
    for pair in pairs:
        labels = read_labels(pair.prediction)
        found = {int(v) for v in np.unique(labels.data)}
        if not labels.origin.startswith(MARK) and found - in_files and found <= set(names):
            return False
    return True


def _in_pieces(labels: LabelMap) -> bool:
    """Whether most labelled voxels have a neighbour of their own label, along the axis with the most voxels."""
    data = np.moveaxis(labels.data, int(np.argmax(labels.data.shape)), 0)
    labelled = data[1:] > 0
    return bool((data[1:] == data[:-1])[labelled].mean() > 0.5) if labelled.any() else True


def _references(folder: Path) -> tuple[dict[str, Path], Dataset | None]:
    """Case → label file, and the data set if the folder is one, or holds labels of one (nnU-Net's `labelsTs`)."""
    try:
        dataset = open_dataset(folder)
    except DatasetError:
        files = _images(folder)
        if not files:
            raise
        return _named_alike(files), _described_beside(folder)
    return {case.name: case.label for case in dataset.cases if case.label}, dataset


def _described_beside(folder: Path) -> Dataset | None:
    """The data set whose labels a folder beside its description holds, which need not be those of its cases."""
    if not (names_labels(folder) and (folder.parent / "dataset.json").is_file()):
        return None
    try:
        return replace(open_dataset(folder.parent), problems=())
    except DatasetError as error:
        warnings.warn(f"what {folder.parent / 'dataset.json'} says is left out: {error}", stacklevel=4)
        return None


def _named_alike(files: Sequence[Path]) -> dict[str, Path]:
    """Label files by the cases that they are named after, each without its suffix (`CASE_seg.nii.gz`) unless that makes
    two of them one."""
    names = [stem(file) for file in files]
    suffixes = [next((s for s in SUFFIXES if s and n.endswith(s) and n != s), "") for n in names]
    cases = [name.removesuffix(suffix) for name, suffix in zip(names, suffixes, strict=True)]
    return dict(zip(cases if len(set(cases)) == len(cases) else names, files, strict=True))


def _predictions(given: Path, cases: Iterable[str]) -> dict[str, Path]:
    """Case → prediction, of a folder or a file; files that fit no case are named in a warning."""
    names = set(cases)
    found: dict[str, tuple[int, Path]] = {}
    strangers = []
    for file in [given] if given.is_file() else _images(given):
        fits = [
            (rank, stem(file).removesuffix(suffix))
            for rank, suffix in enumerate(SUFFIXES)
            if stem(file).endswith(suffix) and stem(file).removesuffix(suffix) in names
        ]
        if not fits:
            strangers.append(file.name)
            continue
        rank, case = fits[0]
        if case in found and found[case][0] == rank:
            raise DatasetError(
                file, f"is a second prediction for {case}, beside {found[case][1].name}", "Keep one"
            )
        if case not in found or rank < found[case][0]:
            found[case] = (rank, file)
    if strangers and found:
        warnings.warn(
            f"{given} holds files that belong to no case, and are left out: {listed(strangers)}",
            stacklevel=3,
        )
    return {case: file for case, (_, file) in found.items()}


def _images(folder: Path) -> list[Path]:
    return without_copies(sorted(f for f in folder.iterdir() if f.is_file() and is_image(f)))


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

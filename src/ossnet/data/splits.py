"""Which cases train and which validate: always the same ones for the same data set.

A `splits_final.json` beside the cases is honoured; otherwise folds are drawn as nnU-Net draws them (sorted
names, shuffled k-fold, seed 12345), with all cases of a patient on one side.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np

from ossnet.errors import DatasetError, SettingsError
from ossnet.files.containers import composed

if TYPE_CHECKING:
    from ossnet.data.cases import Dataset

T = TypeVar("T")

SEED = 12345
"""nnU-Net's seed."""

_PAPER = {"brats": (320, 45), "lits": (111, 20)}
"""Cases for training and validation in the paper (SPEC §3)."""


class Split(NamedTuple):
    """Names of the cases on either side, sorted."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def folds(
    names: Sequence[str], k: int = 5, seed: int = SEED, groups: Mapping[str, str | None] | None = None
) -> tuple[Split, ...]:
    """Shuffled k-fold over sorted names, equal to nnU-Net's (scikit-learn's `KFold(k, shuffle=True)`).

    Args:
        names: Case names in any order.
        k: Number of folds.
        seed: Seed of the shuffle.
        groups: Case → patient. Folds are drawn over patients, so that no patient is on both sides; cases that
            are missing or None are patients of their own.

    Raises:
        DatasetError: There are fewer patients than folds.
        SettingsError: `k` is below 2.
    """
    if k < 2:
        raise SettingsError("folds", f"{k} folds cannot train and validate", "Use 2 or more")
    patient = {name: (groups or {}).get(name) or name for name in sorted(set(names))}
    patients = sorted(set(patient.values()))
    if len(patients) < k:
        raise DatasetError(
            "data set",
            f"{len(patients)} patient{'' if len(patients) == 1 else 's'} cannot make {k} folds",
            "Add cases, name the cases of each fold in a splits_final.json, or train on all of them with --fold all",
        )
    order = _shuffled(len(patients), seed)
    return tuple(_divide(patient, {patients[i] for i in part}) for part in np.array_split(order, k))


def split(dataset: "Dataset", fold: int | Literal["paper", "all"] = 0, k: int = 5, seed: int = SEED) -> Split:
    """The cases of one fold.

    Args:
        dataset: An opened data set.
        fold: A number: this fold of the data set's `splits_final.json`, or of `folds` where it has none.
            "paper": 320/45 cases for BraTS, 111/20 for LiTS, drawn with `seed`. The lists that the authors
            used are not available here, so the sizes are theirs and the names are not; with more cases (BraTS
            2020 has 369) the rest is left out. "all": every case trains, none validates.

    Raises:
        SettingsError: There is no such fold.
        DatasetError: The split file contradicts the data set, or cases are too few for the paper's split.
    """
    names = tuple(case.name for case in dataset.cases)
    groups = {case.name: case.group for case in dataset.cases}
    if fold == "all":
        return Split(tuple(sorted(names)), ())
    if fold == "paper":
        return _paper(dataset, groups, seed)
    if dataset.splits is not None:
        require_fitting(dataset)
    splits = dataset.splits if dataset.splits is not None else folds(names, k, seed, groups)
    if not isinstance(fold, int) or not 0 <= fold < len(splits):
        raise SettingsError(
            "fold", f"there is no fold {fold}", f"Use 0 to {len(splits) - 1}, 'paper' or 'all'"
        )
    return splits[fold]


def spread(cases: Sequence[T], count: int) -> list[T]:
    """So many of them, at most, evenly spread over all.

    >>> spread("abcdefg", 3)
    ['a', 'c', 'e']
    """
    count = min(count, len(cases))
    return [cases[index * len(cases) // count] for index in range(count)]


def read_splits(path: Path) -> tuple[Split, ...]:
    """Read nnU-Net's `splits_final.json`: a list of {"train": [names], "val": [names]}.

    Raises:
        DatasetError: The file is no such list.
    """
    fix = 'Write a list of {"train": [names], "val": [names]}, or remove the file'
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        found = tuple(Split(_names(f["train"]), _names(f["val"])) for f in value)
    except OSError as error:
        raise DatasetError(path, f"cannot be read ({error.strerror})", "Check its permissions") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(path, "is not a list of folds", fix) from error
    if not found:
        raise DatasetError(path, "is not a list of folds", fix)
    return found


def _names(given: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({composed(name) for name in given}))


def shared_patients(part: Split, groups: Mapping[str, str | None]) -> tuple[str, ...]:
    """Patients with cases on both sides of a split: validation then flatters."""
    train, validation = ({groups.get(n) or n for n in side} for side in part)
    return tuple(sorted(train & validation))


def _shuffled(count: int, seed: int) -> np.ndarray:
    order = np.arange(count)
    # The legacy generator, because nnU-Net's folds come from it.
    np.random.RandomState(seed).shuffle(order)
    return order


def _divide(patient: Mapping[str, str], validation: set[str]) -> Split:
    return Split(
        tuple(name for name, p in patient.items() if p not in validation),
        tuple(name for name, p in patient.items() if p in validation),
    )


def _paper(dataset: "Dataset", groups: Mapping[str, str | None], seed: int) -> Split:
    family = next((f for f in _PAPER if dataset.layout.startswith(f)), None)
    if family is None:
        raise SettingsError(
            "fold",
            f"the paper has no split for the layout {dataset.layout}",
            "Use a fold number, for example 0",
        )
    train, validation = _PAPER[family]
    members: dict[str, list[str]] = {}
    for name in sorted(groups):
        members.setdefault(groups[name] or name, []).append(name)
    patients = sorted(members)
    taken: list[list[str]] = [[], []]
    for index in _shuffled(len(patients), seed):
        cases = members[patients[index]]
        # Validation is filled first. A patient goes to one side whole, or nowhere.
        for side, size in ((1, validation), (0, train)):
            if len(taken[side]) + len(cases) <= size:
                taken[side] += cases
                break
    if (len(taken[0]), len(taken[1])) != (train, validation):
        raise DatasetError(
            dataset.root,
            f"the paper's split takes {train} + {validation} cases, here: {len(groups)}",
            "Use --fold 0 for a fold of your cases, or --fold all to train on all of them",
        )
    return Split(tuple(sorted(taken[0])), tuple(sorted(taken[1])))


def require_fitting(dataset: "Dataset") -> None:
    """Refuse folds that do not fit the cases.

    Raises:
        DatasetError: A case that is not there, or on both sides.
    """
    known = {case.name for case in dataset.cases}
    for number, part in enumerate(dataset.splits or ()):
        where = f"{dataset.splits_file or dataset.root}, fold {number}"
        if both := set(part.train) & set(part.validation):
            raise DatasetError(where, f"{min(both)} trains and validates", "Keep each case on one side")
        if missing := sorted({*part.train, *part.validation} - known):
            raise DatasetError(
                where,
                f"{missing[0]} is not in the data set ({len(missing)} such names)",
                "Add the cases, or do without the file",
            )

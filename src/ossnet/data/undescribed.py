"""Structures of a data set that nothing describes: what its label files hold, and how they name it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ossnet.data.cases import Case, Problem, name_key, nameless
from ossnet.errors import OssnetError
from ossnet.files.reading import read_image, read_labels

_MANY = 30
"""Structures; with more of them it is asked whether labels are images."""


def consecutive(names: Mapping[int, str]) -> tuple[dict[int, str], dict[int, int]]:
    """Classes 0 … K-1 for the values in ascending order, and the map from those that moved."""
    values = sorted({0, *names})
    mapping = {value: number for number, value in enumerate(values) if value != number}
    return {number: names.get(value, "background") for number, value in enumerate(values)}, mapping


def found_labels(
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

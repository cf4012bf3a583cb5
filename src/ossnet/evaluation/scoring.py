"""Scores of predictions that belong to labels, case by case."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ossnet.data.cases import nameless
from ossnet.errors import VolumeError
from ossnet.evaluation.matching import Matched, Pair, listed, match
from ossnet.evaluation.metrics import Label, compare
from ossnet.evaluation.tables import Row, label_order, label_text, summarise, to_json
from ossnet.files.memory import beside_others
from ossnet.volume import LabelMap, same_names, same_place


def evaluate(
    predictions: Path | str,
    labels: Path | str,
    *,
    tolerance_mm: float = 1.0,
    only_predicted: bool = False,
    regions: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Compare segmentations with reference labels, as `ossnet evaluate` does.

    Args:
        predictions: A label map, or a folder of them, named after the cases.
        labels: The reference: a label map, a data set in any layout, or a folder of label maps.
        tolerance_mm: Of the surface Dice.
        only_predicted: Skip cases without a prediction instead of failing.
        regions: Name → labels, as label files have them, that are judged as one too.

    Returns:
        What `ossnet evaluate --json` prints: `cases` (a row for each case and structure), `summary` (means with
        intervals), `rules`, `tolerance_mm`.

    Raises:
        DatasetError, VolumeError, SettingsError: As `match`, `score` and `Matched.with_regions`.
    """
    matched = match(Path(predictions), Path(labels), only_predicted=only_predicted).with_regions(
        regions or {}
    )
    rows = score(matched, tolerance_mm)
    return to_json(rows, summarise(rows), tolerance_mm)


def score(
    matched: Matched,
    tolerance_mm: float = 1.0,
    done: Callable[[int], None] = lambda count: None,
) -> list[Row]:
    """Scores of every class in every case, cases in order.

    Args:
        tolerance_mm: Of the surface Dice.
        done: Told the number of cases finished.

    Raises:
        VolumeError: A file cannot be trusted, or a prediction does not lie on its label, or names and numbers
            structures otherwise.
    """
    judge = partial(_score_pair, matched, tolerance_mm=tolerance_mm)
    judged: dict[Pair, list[Row]] = {}
    # Decompressing and nearest-neighbour search run outside of Python's lock.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            found = pool.map(partial(beside_others, judge), matched.pairs)
            for pair, rows in zip(matched.pairs, found, strict=True):
                if rows is not None:
                    judged[pair] = rows
                    done(len(judged))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for pair in matched.pairs:
        if pair not in judged:  # there was no room beside others
            judged[pair] = judge(pair)
            done(len(judged))
    known = [row for pair in matched.pairs for row in judged[pair]]
    _tell_other_names(known)
    out = _complete(known, matched.pairs)
    if not out:
        warnings.warn("no file holds a structure: there is nothing to judge", stacklevel=2)
    _tell_strangers(out)
    if not matched.names:  # nothing declares labels: those that were met are known now
        met = {row.label for row in out}
        for name, parts in matched.regions.items():
            if unknown := set(parts) - met:
                warnings.warn(f"region {name}: no file holds label {min(unknown)}", stacklevel=2)
    return out


def _tell_other_names(rows: Sequence[Row]) -> None:
    """Warn where one number has several names, as where 3D Slicer numbered the segments of each file anew."""
    told: dict[Label, Row] = {}
    for row in rows:
        if not row.name or (not isinstance(row.label, tuple) and row.name == nameless(row.label)):
            continue
        first = told.setdefault(row.label, row)
        if first.name.casefold() != row.name.casefold():
            warnings.warn(
                f"label {label_text(row.label)} is {first.name} in {first.case}, and {row.name} in {row.case}: they "
                "are judged as one; give each structure one number in all files",
                stacklevel=3,
            )
            return


def _tell_strangers(rows: Sequence[Row]) -> None:
    """Warn where no label is in a prediction and in a reference, of all cases: masks of 1 and of 255 for example."""
    alone = [row for row in rows if not isinstance(row.label, tuple)]
    predicted, drawn = (
        {row.label for row in alone if row.scores.outcome in ("scored", only)}
        for only in ("invented", "missed")
    )
    if predicted and drawn and not predicted & drawn:
        held, asked = (listed([label_text(label) for label in sorted(s)]) for s in (predicted, drawn))
        warnings.warn(
            f"predictions hold {held}, and references {asked}: no label is in both, so nothing can agree; "
            "give structures the same numbers in both",
            stacklevel=3,
        )


def _score_pair(matched: Matched, pair: Pair, tolerance_mm: float) -> list[Row]:
    reference, prediction = matched.reference(pair), matched.prediction(pair)
    if reference.cropped:
        reference = reference.in_order_of(prediction)
    # Programs may store what they segmented with axes reversed or swapped.
    prediction = prediction.in_order_of(reference)
    if reason := same_place(prediction, reference):
        raise VolumeError(
            pair.prediction,
            f"does not lie on its label {pair.label.name}: {reason}",
            "Segment the scan that the label was drawn on, or resample one onto the other",
        )
    names = matched.names or dict(reference.names) or dict(prediction.names)
    if reason := same_names(prediction.names, names):
        raise VolumeError(
            pair.prediction,
            f"numbers structures otherwise than its reference: {reason}",
            "Correct the numbers or the names of one of them",
        )
    regions = matched.regions
    classes = sorted(set(matched.names) - {0}) or _values(prediction, reference)
    if joined := matched.as_one(prediction):
        if regions:
            warnings.warn(f"predictions show {joined} as one: regions are left out", stacklevel=2)
        names, classes, regions = {1: joined}, [1], {}
        reference = replace(reference, data=(reference.data > 0).astype(np.uint8))
    named: dict[Label, str] = {label: names.get(label, "") for label in classes}
    for name, parts in regions.items():
        named[parts] = name
    scores = compare(prediction.data, reference.data, reference.affine, named, tolerance_mm)
    return [Row(pair.case, label, name, scores[label], pair.patient) for label, name in named.items()]


def _values(*maps: LabelMap) -> list[int]:
    return sorted({int(v) for labels in maps for v in np.unique(labels.data)} - {0})


def _complete(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[Row]:
    """Without a list of classes, each case was scored for what it holds: add what others hold, as absent."""
    labels = {row.label: row.name for row in rows}
    grid = np.zeros((1, 1, 1), np.uint8)
    absent = compare(grid, grid, np.eye(4), [1])[1]
    known = {(row.case, row.label): row for row in rows}
    return [
        known.get((pair.case, label), Row(pair.case, label, labels[label], absent, pair.patient))
        for pair in pairs
        for label in sorted(labels, key=label_order)
    ]

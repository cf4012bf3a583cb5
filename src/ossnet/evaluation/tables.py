"""From scores per case to means with confidence intervals, as a table on screen, CSV and JSON."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ossnet.errors import DatasetError
from ossnet.evaluation.metrics import DISTANCE_RULE, EMPTY_RULE, Label, Scores

RESAMPLES = 10_000
SEED = 0
INTERVAL_RULE = (
    f"Intervals are 95 % percentile bootstrap intervals of the mean over cases ({RESAMPLES} resamples of patients, "
    f"seed {SEED}); they say nothing about another training run, and are too narrow below about ten patients."
)

METRICS: dict[str, str] = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95_mm": "HD95 mm",
    "assd_mm": "ASSD mm",
    "surface_dice": "surface Dice",
    "volume_difference_ml": "volume ml",
    "volume_difference_percent": "volume %",
}
"""What is summarised: field of `Scores` → heading."""


def label_text(label: Label) -> str:
    """`3`, or `1+2+3` for a region."""
    return "+".join(map(str, label)) if isinstance(label, tuple) else str(label)


def label_of(text: str) -> Label:
    """The inverse of `label_text`."""
    first, *more = (int(part) for part in text.split("+"))
    return (first, *more) if more else first


def label_order(label: Label) -> tuple[bool, Label]:
    """Classes first, then regions."""
    return isinstance(label, tuple), label


@dataclass(frozen=True)
class Row:
    """Scores of one class or region of one case; `patient`: whose it is, where others may be of the same."""

    case: str
    label: Label
    name: str
    scores: Scores
    patient: str | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` cases with its 95 % confidence interval; None where too few cases define it."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class ClassSummary:
    """One class or region over all cases; `label` is None for the mean over classes of each case.

    Attributes:
        cases: Number of cases looked at.
        absent: Of these, cases with the structure in neither map (left out of the means).
        missed: Cases whose prediction is empty though the reference is not.
        invented: Cases whose reference is empty though the prediction is not.
        estimates: Key of `METRICS` → estimate.
    """

    label: Label | None
    name: str
    cases: int
    absent: int
    missed: int
    invented: int
    estimates: dict[str, Estimate]


@dataclass(frozen=True)
class Summary:
    """All classes, regions, then (with more than one class) the mean of classes, and the rules that were applied."""

    classes: tuple[ClassSummary, ...]
    rules: tuple[str, ...] = (INTERVAL_RULE, EMPTY_RULE, DISTANCE_RULE)

    def of(self, label: Label | None) -> ClassSummary:
        """The summary of one class (None: the mean over classes); KeyError when there is none."""
        for entry in self.classes:
            if entry.label == label:
                return entry
        raise KeyError(label)


def estimate(values: Sequence[float | None], patients: Sequence[str] | None = None) -> Estimate:
    """Mean of the values that are defined, with a 95 % percentile bootstrap interval.

    Patients are resampled with all their cases (a cluster bootstrap): two scans of one heart are alike. Fewer than two
    of them have no interval.

    Args:
        values: One a case.
        patients: Whose each case is; None: each is of another.
    """
    whose = range(len(values)) if patients is None else patients
    defined = [(who, value) for who, value in zip(whose, values, strict=True) if value is not None]
    if not defined:
        return Estimate(None, None, None, 0)
    of_patients: dict[object, list[float]] = {}
    for who, value in defined:
        of_patients.setdefault(who, []).append(value)
    sums = np.array([sum(found) for found in of_patients.values()])
    counts = np.array([len(found) for found in of_patients.values()])
    mean = float(np.mean([value for _, value in defined]))
    if len(sums) == 1:
        return Estimate(mean, None, None, len(defined))
    # One generator a call: the interval depends on these values alone, not on what was computed before.
    draws = np.random.default_rng(SEED).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.percentile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), (2.5, 97.5))
    return Estimate(mean, float(low), float(high), len(defined))


def summarise(rows: Sequence[Row]) -> Summary:
    """Means over cases of every class; with more than one class also of each case's mean over classes.

    Args:
        rows: Any number of cases and classes, in any order.

    Returns:
        Classes by label, then regions, the mean over classes last.
    """
    labels = sorted({row.label for row in rows}, key=label_order)
    classes = [_of_class(label, [row for row in rows if row.label == label]) for label in labels]
    alone = [row for row in rows if not isinstance(row.label, tuple)]
    if len({row.label for row in alone}) > 1:
        classes.append(_mean_over_classes(alone))
    return Summary(tuple(classes))


def pooled(tables: Mapping[str, str]) -> tuple[list[Row], Summary]:
    """The rows of several tables together, by case, and their summary.

    Args:
        tables: Where each comes from → what `to_csv` wrote.

    Raises:
        DatasetError: One is no such table, a case is in two of them, or a class has two names.
    """
    rows: list[Row] = []
    owner: dict[str, str] = {}
    names: dict[Label, str] = {}
    for where, text in tables.items():
        try:
            found = from_csv(text)
        except (KeyError, ValueError, csv.Error) as error:
            raise DatasetError(
                where, f"its scores cannot be read ({error})", "Let the run write them again"
            ) from error
        for row in found:
            if owner.setdefault(row.case, where) != where:
                raise DatasetError(
                    where,
                    f"case {row.case} was judged by {owner[row.case]} too",
                    "Name one run for each fold",
                )
            if names.setdefault(row.label, row.name) != row.name:
                raise DatasetError(
                    where,
                    f"structure {label_text(row.label)} is {row.name}, and {names[row.label]} in other runs",
                    "Name runs of one data set",
                )
        rows += found
    rows.sort(key=lambda row: (row.case, label_order(row.label)))
    return rows, summarise(rows)


def _defined(scores: Scores, key: str) -> float | None:
    """A score that counts in means: that there is no volume where there is none says nothing."""
    return None if scores.outcome == "absent" else getattr(scores, key)


def _patients(rows: Sequence[Row]) -> list[str]:
    return [row.case if row.patient is None else row.patient for row in rows]


def _of_class(label: Label, rows: Sequence[Row]) -> ClassSummary:
    return ClassSummary(
        label,
        rows[0].name,
        len(rows),
        *_outcomes(rows),
        {key: estimate([_defined(row.scores, key) for row in rows], _patients(rows)) for key in METRICS},
    )


def _mean_over_classes(rows: Sequence[Row]) -> ClassSummary:
    """A case counts once, with the mean of the classes that are defined for it."""
    cases: dict[str, list[Scores]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row.scores)
    patients = _patients(list({row.case: row for row in rows}.values()))
    estimates = {}
    for key in METRICS:
        defined = [[v for s in scores if (v := _defined(s, key)) is not None] for scores in cases.values()]
        estimates[key] = estimate([float(np.mean(v)) if v else None for v in defined], patients)
    return ClassSummary(None, "mean", len(cases), *_outcomes(rows), estimates)


def _outcomes(rows: Sequence[Row]) -> tuple[int, int, int]:
    found = [row.scores.outcome for row in rows]
    return found.count("absent"), found.count("missed"), found.count("invented")


def format_estimate(key: str, value: Estimate) -> str:
    """`0.853 [0.841, 0.864]` with the digits that suit the metric; a dash where nothing is defined."""
    mean, interval = _formatted(key, value)
    return f"{mean} [{interval}]" if interval else mean


def _formatted(key: str, value: Estimate) -> tuple[str, str]:
    """The mean and its interval, each empty where it is not defined."""
    if value.mean is None:
        return "–", ""
    digits = 3 if key in ("dice", "iou", "surface_dice") else 1 if key.endswith("percent") else 2
    sign = "+" if key.startswith("volume") else ""
    if value.low is None or value.high is None:
        return f"{value.mean:{sign}.{digits}f}", ""
    return f"{value.mean:{sign}.{digits}f}", f"{value.low:{sign}.{digits}f}, {value.high:{sign}.{digits}f}"


def to_screen(summary: Summary, tolerance_mm: float) -> Table:
    """The summary as a table for `rich`, intervals below the means, with the rules at its foot."""
    table = Table(
        box=SIMPLE_HEAD,
        caption="\n".join(summary.rules),
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("structure", min_width=8)
    table.add_column("cases", justify="right", no_wrap=True)
    for key, heading in METRICS.items():
        unit = f" {tolerance_mm:g} mm" if key == "surface_dice" else ""
        table.add_column(heading.replace("surface Dice", "s. Dice") + unit, justify="right")
    for entry in summary.classes:
        name = entry.name if entry.label is None else f"{label_text(entry.label)} {entry.name}".rstrip()
        cells = [_formatted(key, entry.estimates[key]) for key in METRICS]
        table.add_row(Text(name), _counts(entry), *(f"{m}\n[dim]{i}[/]" for m, i in cells))
    return table


def _counts(entry: ClassSummary) -> str:
    """`16`, with what was empty below it."""
    remarks = [(entry.absent, "absent"), (entry.missed, "missed"), (entry.invented, "invented")]
    return "\n".join([str(entry.cases), *(f"{n} {what}" for n, what in remarks if n)])


def to_csv(rows: Sequence[Row]) -> str:
    """One line a case and class or region (label `1+2`), header first; an empty cell where a score is not defined."""
    columns = [f.name for f in fields(Scores)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["case", "label", "name", *columns, "patient"])
    for row in rows:
        scores = (_cell(getattr(row.scores, c)) for c in columns)
        writer.writerow([row.case, label_text(row.label), row.name, *scores, _cell(row.patient)])
    return out.getvalue()


def from_csv(text: str) -> list[Row]:
    """The inverse of `to_csv`, to six digits.

    Raises:
        KeyError, ValueError, csv.Error: It is another table, or was changed so that it has no meaning.
    """
    rows: dict[tuple[str, Label], Row] = {}
    table = csv.DictReader(io.StringIO(text))
    for line in table:
        if None in line or None in line.values():
            raise ValueError(f"line {table.line_num} has another number of cells than the first")
        values = {f.name: line[f.name] for f in fields(Scores)}
        numbers = {k: float(v) if v else None for k, v in values.items() if k != "outcome"}
        if not all(v is None or math.isfinite(v) for v in numbers.values()):
            raise ValueError(f"line {table.line_num} holds a number that is not finite")
        scores = Scores(**numbers, outcome=values["outcome"])  # type: ignore[arg-type]
        patient = line.get("patient") or None  # which earlier tables do not have
        row = Row(line["case"], label_of(line["label"]), line["name"], scores, patient)
        if rows.setdefault((row.case, row.label), row) is not row:
            raise ValueError(f"line {table.line_num} judges structure {line['label']} of {row.case} again")
    return list(rows.values())


def _cell(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def to_json(rows: Sequence[Row], summary: Summary, tolerance_mm: float) -> dict[str, Any]:
    """`tolerance_mm`, `rules`, `summary` (by class) and `cases`; null where a score is not defined."""
    return {
        "tolerance_mm": tolerance_mm,
        "rules": list(summary.rules),
        "summary": [asdict(entry) for entry in summary.classes],
        "cases": [
            {"case": r.case, "patient": r.patient, "label": r.label, "name": r.name, **asdict(r.scores)}
            for r in rows
        ],
    }

"""What a finished run is worth on the cases that it was not trained on: whole scans, segmented and compared."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from ossnet.data.cache import CachedCase
from ossnet.evaluation.metrics import Label, Scores, compare
from ossnet.evaluation.tables import (
    Row,
    Summary,
    format_estimate,
    label_of,
    label_text,
    summarise,
    to_csv,
    to_json,
)
from ossnet.field.model import Model, model_folder
from ossnet.files.atomic import write_json, write_text
from ossnet.networks.variants import PAPER_VARIANTS
from ossnet.training.calibration import Answers, asked, calibrate
from ossnet.volume import MARK

_SHOWN = ("dice", "hd95_mm", "assd_mm")
"""In the model's card."""


def judge(
    run: Path,
    cases: Sequence[CachedCase],
    say: Callable[[str], None],
    tolerance_mm: float = 1.0,
    device: torch.device | str = "auto",
) -> Summary:
    """Segment whole scans with the best model of a run and compare; a case that is done is not done again.

    Regions that the data set names (`Dataset.regions`) are judged too.

    Writes `validation/CASE.nii.gz` in the voxel order of the label files, `validation.csv` and `validation.json`, and
    the scores and what calibrates probabilities into the model's description and card.
    """
    model = Model.load(run)
    classes = max(model.classes, 2)
    names: dict[Label, str] = {label: model.label_names[label] for label in range(1, classes)}
    for name, parts in model.metadata.get("regions", {}).items():
        names[tuple(parts)] = name
    done_file = run / "validation_rows.json"
    stamp = str(model.metadata.get("metrics"))
    done: dict[str, Any] = {"model": stamp, "cases": {}}
    with suppress(OSError, ValueError, AttributeError):  # missing, or damaged: then all is done again
        known = json.loads(done_file.read_text(encoding="utf-8"))
        if known.get("model") == stamp:
            done = known
    files = {case.name: run / "validation" / f"{case.name}.nii.gz" for case in cases}
    # A label file may be corrected before a run is resumed; rows of earlier versions do not say which they saw.
    references = {case.name: crc32(case.reference().tobytes()) for case in cases}
    undone = {
        name
        for name, file in files.items()
        if name not in done["cases"]
        or done["cases"][name].get("reference", references[name]) != references[name]
        or not file.is_file()
    }
    # The paper's answer as they answer.
    calibrated = model.variant not in PAPER_VARIANTS and (bool(undone) or "temperature" not in model.metadata)
    rows: list[Row] = []
    answers: list[Answers] = []
    for number, case in enumerate(cases, 1):
        field = None  # and the maps of the case before with it
        if case.name in undone or calibrated:
            field = model.field(case.volume(), device=device)
        if field and case.name in undone:
            found = field.segment()
            compared = compare(found.data, case.reference(), case.affine, names, tolerance_mm)
            mine = replace(case.as_in_file(found), origin=f"{MARK} {model.fingerprint()}")
            mine.save(files[case.name])
            done["cases"][case.name] = {
                "reference": references[case.name],
                "scores": {label_text(k): asdict(v) for k, v in compared.items()},
                "evaluated": found.evaluated,
                "seconds": found.seconds,
            }
            write_json(done_file, done)
            dice = [scores.dice for scores in compared.values() if scores.dice is not None]
            told = ", ".join(f"{value:.3f}" for value in dice) or "undefined"
            say(f"{number}/{len(cases)} {case.name}: Dice {told}")
        if field and calibrated:
            answers.append(asked(field, case, len(cases)))
        for label, scores in done["cases"][case.name]["scores"].items():
            rows.append(
                Row(case.name, label_of(label), names[label_of(label)], Scores(**scores), case.patient)
            )
    summary = summarise(rows)
    model.metadata["whole_scans"] = {
        f"{entry.name}, whole scans of {len(cases)} cases left out": {
            key.replace("_", " "): format_estimate(key, entry.estimates[key]) for key in _SHOWN
        }
        for entry in summary.classes
    }
    write_text(run / "validation.csv", to_csv(rows))
    write_json(run / "validation.json", to_json(rows, summary, tolerance_mm))
    if calibrated:
        calibrate(model, answers)
    model.describe(model_folder(run))
    return summary

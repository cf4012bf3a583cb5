"""From a data set to a run folder: plan, load, train, and judge the result on whole scans."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from lightning_fabric import Fabric

from ossnet.data.cache import CachedCase, CaseCache, load_case
from ossnet.data.cases import Case, Dataset
from ossnet.data.layouts import open_dataset
from ossnet.data.pieces import pieces_of, small_extent
from ossnet.data.splits import Split, shared_patients, split, spread
from ossnet.errors import SettingsError
from ossnet.evaluation.tables import format_estimate
from ossnet.field.model import Model
from ossnet.files.atomic import clear_unfinished, require_folder, write_json, write_text
from ossnet.files.lock import alone_in
from ossnet.training.judging import judge
from ossnet.training.loop import Listener, State, Trainer
from ossnet.training.planning import make_plan
from ossnet.training.processes import computes_on, ending_together, make_fabric, waits_for, with_processes
from ossnet.training.run_folder import (
    PLAN,
    SETTINGS,
    SPLITS,
    STATE,
    from_anywhere,
    known_already,
    require_apart,
    require_no_run,
    require_same_split,
    settings_of,
)
from ossnet.training.settings import Settings, on_machine
from ossnet.volume import LabelMap

Say = Callable[[str], None]

_EARLY, _WORSE, _LEARNT = 0.6, 0.01, 0.2
"""A best model in this part of a training, by this much in IoU better than the last: it was too long. But not where
nothing was learnt."""

_MEASURED = 50
"""Training cases whose surfaces are measured: `field.forecast` expects their median."""


def train(
    data: Path | str,
    out: Path | str,
    settings: Settings,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    say: Say | None = None,
) -> Path:
    """Train a model.

    Args:
        data: A data set in any known layout.
        out: The run folder: `model/` (best), `last/`, `plan.txt` (what was picked, and why), `log.csv`,
            `settings.json`, `splits.json`, pictures; at the end `validation/`, `validation.csv`, `validation.json`.
        settings: All settings; when resuming, those of the run are used instead, but for the machine's (`MACHINE`).
        resume: Continue a run that was stopped, bit for bit (same data, devices and threads; with a time limit the
            schedule follows the clock; a GPU adds up in an order of its own).
        listener: Told of steps and validations.
        say: Told in words what was decided.

    Returns:
        The run folder.

    Raises:
        OssnetError: Anything a user can mend, also that another process trains in the folder.
    """
    data, out = Path(data), Path(out)
    say = say or (lambda text: None)
    if resume:
        settings = on_machine(settings_of(out), settings)
    else:
        require_no_run(out)
    require_folder(out)
    settings = from_anywhere(with_processes(settings))
    if settings.runtime.threads is not None:
        torch.set_num_threads(settings.runtime.threads)
    fabric = make_fabric(settings)
    if waiting := waits_for(settings):
        say(waiting)
    fabric.launch()
    with ending_together(fabric), alone_in(out) if fabric.is_global_zero else nullcontext():
        if not fabric.is_global_zero:
            listener, say = None, lambda text: None
        torch.manual_seed(settings.seed)
        validation_cases = _train(data, out, settings, resume, fabric, listener, say)
    if not fabric.is_global_zero:
        return out
    if settings.validation.dense and len(validation_cases):
        say("Segmenting the validation cases with the best model")
        chosen = spread(validation_cases, settings.validation.dense_cases or len(validation_cases))
        with alone_in(out):
            summary = judge(out, chosen, say, device=fabric.device)
        for entry in summary.classes:
            dice, hd95 = (format_estimate(key, entry.estimates[key]) for key in ("dice", "hd95_mm"))
            say(f"{entry.name}, whole scans: Dice {dice}, HD95 {hd95} mm")
    return out


def planned(data: Path | str, settings: Settings) -> tuple[str, ...]:
    """What a training would pick, and why, a line each; nothing is trained or written (errors as of `train`)."""
    dataset, parts = opened(Path(data), settings)
    plan = make_plan(dataset, [dataset[name] for name in parts.train], settings)
    known = known_already(settings, dataset.root.name, parts.validation)
    return (_sizes(dataset, parts), *plan.reasons, *_shared(dataset, parts), *known)


def opened(data: Path, settings: Settings) -> tuple[Dataset, Split]:
    """The data set, and which of its cases train and validate (errors as of `train`)."""
    nonfinite: Literal["refuse", "replace"] = "replace" if settings.data.replace_nan else "refuse"
    dataset = open_dataset(data, settings.data.layout, nonfinite=nonfinite)
    dataset.require_complete()
    if settings.data.splits is not None:
        if settings.data.fold in ("all", "paper"):
            raise SettingsError(
                "data.splits", f"--fold {settings.data.fold} takes none of its folds", "Leave one of them out"
            )
        dataset = dataset.with_splits(Path(settings.data.splits))
    parts = split(dataset, settings.data.fold)
    if not parts.train:
        raise SettingsError("data.fold", "it has no training cases", "Choose another fold")
    return dataset, parts


def _sizes(dataset: Dataset, parts: Split) -> str:
    return f"{len(parts.train)} training and {len(parts.validation)} validation cases of {dataset.root.name}"


def _shared(dataset: Dataset, parts: Split) -> tuple[str, ...]:
    """What to say of patients with scans on both sides."""
    both = shared_patients(parts, {case.name: case.group for case in dataset.cases})
    told = f"beware: scans of {both[0]} are on both sides of the fold" if both else ""
    return (f"{told}, and validation will look better than it is",) if both else ()


def _train(
    data: Path,
    out: Path,
    settings: Settings,
    resume: bool,
    fabric: Fabric,
    listener: Listener | None,
    say: Say,
) -> Sequence[CachedCase]:
    """What all processes do together; returns the validation cases."""
    dataset, parts = opened(data, settings)
    require_apart(out, dataset)
    train_cases = [dataset[name] for name in parts.train]
    validation_cases = [dataset[name] for name in parts.validation]
    # A run that ended before its first state starts again, from the model that it was to start from.
    goes_on = resume and (out / STATE).exists()
    plan = make_plan(dataset, train_cases, settings, resumed=out if goes_on else None)
    reasons = [*plan.reasons, *_shared(dataset, parts)]
    if not goes_on:
        reasons += known_already(settings, dataset.root.name, parts.validation)
    for line in (_sizes(dataset, parts), *reasons, computes_on(fabric)):
        say(line)
    used = {"data": str(data.resolve()), "train": list(parts.train), "val": list(parts.validation)}
    if resume:
        require_same_split(out / SPLITS, used, data)
    # What a killed process left is of no use.
    if fabric.is_global_zero and (out / SPLITS).exists():
        clear_unfinished(out)
    mapped = out / "cache" / str(fabric.global_rank)
    _remove_cache(mapped)
    if fabric.is_global_zero:
        # Of a killed run with more processes.
        for left in mapped.parent.glob("*"):
            if left.name.isdigit() and int(left.name) >= fabric.world_size:
                _remove_cache(left)

    def load(case: Case) -> CachedCase:
        return load_case(
            dataset,
            case,
            plan.model.preparation,
            plan.classes,
            settings.sampling.border_kernel,
            settings.sampling.border_width_mm,
        )

    def cache(cases: Sequence[Case], limit: int) -> CaseCache:
        return CaseCache(cases, load, limit, mapped, jobs=min(4, os.cpu_count() or 1))

    try:
        # What is drawn from in every step comes first.
        limit = int(settings.data.cache_gb * 1e9 / settings.runtime.devices)
        train = cache(train_cases, limit)
        validation = cache(validation_cases, limit - train.held_bytes)
        if mapped_bytes := train.mapped_bytes + validation.mapped_bytes:
            say(f"{mapped_bytes / 1e9:.1f} GB of cases are kept in {mapped}: beyond data.cache_gb")
        _learn_sizes(train, plan.model, say)
        trainer = Trainer(plan.model, plan.recipe, settings, train, validation, out, fabric, listener)
        if fabric.is_global_zero:
            # Not before every case was read: a refusal leaves nothing behind. What a kill left unwritten follows.
            if not resume:
                write_json(out / SETTINGS, settings.model_dump(mode="json"))
            if not resume or not (out / SPLITS).exists():
                write_json(out / SPLITS, used)
            if not resume or not (out / PLAN).exists():
                write_text(out / PLAN, "\n".join(reasons) + "\n")
        if remark := learnt_early(trainer.run(resume)):
            say(remark)
    finally:
        # Mapped files stay readable until they are closed.
        _remove_cache(mapped)
    return validation


def _learn_sizes(train: CaseCache, model: Model, say: Say) -> None:
    """Write down how large the structures of the training cases are, and tell which are missing or small."""
    surfaces = [_surface_mm2(case) for case in train[:_MEASURED]]
    if not any(surfaces):
        say(f"beware: the first {len(surfaces)} training cases hold no structure: there is nothing to learn")
    # Of scans that hold something: more is expected than to be found, never less.
    model.metadata["surface_mm2"] = round(median([s for s in surfaces if s] or [0.0]), 2)
    for label in _never_seen(train, model):
        say(f"beware: no training case of this fold holds {label}: it cannot be learnt")
    pieces = [p for c in train[:_MEASURED] for p in pieces_of(c.labels, c.classes, c.spacing)]
    if (extent := small_extent(pieces)) is not None:
        model.metadata["piece_mm"] = round(extent, 2)
    if (gap := model.piece_gap_mm) is not None:
        say(
            "structures are small compared with the network's coarse cells: segmentation starts by evaluating "
            f"every {gap:.1f} mm"
        )


def _never_seen(cases: CaseCache, model: Model) -> list[str]:
    """Names of structures that no case holds; empty where none holds any, which is told otherwise."""
    missing = dict(model.label_names)
    for case in cases:
        for label in {min(value, 1) for value in case.present} if case.classes == 1 else case.present:
            missing.pop(label, None)
        if not missing:
            break
    return list(missing.values()) if len(missing) < len(model.label_names) else []


def _surface_mm2(case: CachedCase) -> float:
    """Of what the model draws: all labels as one structure where it is binary."""
    return LabelMap(case.reference(), case.affine).surface_mm2()


def learnt_early(state: State) -> str | None:
    """What to tell a user whose training was longer than its cases are good for."""
    rows = [row for row in state.rows if "iou" in row]
    best = next((row for row in rows if row["step"] == state.best_step), None)
    if best is None or best["step"] > _EARLY * state.step or best["iou"] < _LEARNT:
        return None
    if best["iou"] - rows[-1]["iou"] < _WORSE:
        return None
    minutes, all_minutes = best["seconds"] / 60, rows[-1]["seconds"] / 60
    return (
        f"the best model, which is kept, came after {minutes:.0f} of {all_minutes:.0f} minutes (IoU {best['iou']:.3f}, "
        f"at the end {rows[-1]['iou']:.3f}): the network knows these cases; more of them help now, more time does not"
    )


def _remove_cache(folder: Path) -> None:
    for file in folder.glob("*.npy"):
        with suppress(OSError):
            file.unlink()
    for empty in (folder, folder.parent):  # the parent goes with the last process
        with suppress(OSError):
            empty.rmdir()

"""The folder of a training: which files say what was chosen, and whether a training may begin or go on there."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ossnet.data.cases import Dataset
from ossnet.errors import SettingsError
from ossnet.field.model import Model
from ossnet.files.containers import composed
from ossnet.training.settings import Settings, parse_settings

SETTINGS, SPLITS, PLAN = "settings.json", "splits.json", "plan.txt"
"""Files of a run: what was chosen, which cases are on which side, and why."""

STATE = "state.safetensors"
"""Where the training stands; `--resume` goes on from there."""


def settings_of(out: Path) -> Settings:
    """The settings of a run.

    Raises:
        SettingsError: There is no run, or its file is damaged.
    """
    file = out / SETTINGS
    if not file.is_file():
        raise SettingsError(out, "there is no run to resume", "Start the training without --resume")
    return parse_settings(_read(file), str(file))


def data_of(out: Path) -> Path:
    """The data set that a run was started with.

    Raises:
        SettingsError: The run does not say.
    """
    file = out / SPLITS
    known = _read(file) if file.is_file() else {}
    if "data" not in known:
        raise SettingsError(out, "it does not say which data set it was started with", "Give --data")
    return Path(known["data"])


def from_anywhere(settings: Settings) -> Settings:
    """The model that a training starts from, if it is a folder, and its folds by whole paths: resuming may happen
    elsewhere."""
    network, data = settings.network, settings.data
    if network.init is not None and Path(network.init).is_dir():
        network = network.model_copy(update={"init": str(Path(network.init).resolve())})
    if data.splits is not None:
        data = data.model_copy(update={"splits": str(Path(data.splits).resolve())})
    return settings.model_copy(update={"network": network, "data": data})


def require_no_run(out: Path) -> None:
    """Refuse a folder with a run, or with files of something else where those of a run would be.

    Raises:
        SettingsError: So.
    """
    if (out / STATE).exists() or (out / "model").exists():
        raise SettingsError(out, "there is a run already", "Give --resume to continue it, or another folder")
    there = [
        out / name for name in (SETTINGS, SPLITS, PLAN, "log.csv", "losses.csv") if (out / name).exists()
    ]
    if there:
        # Those of a training that was killed before its first state are of no use.
        try:
            settings_of(out)
        except SettingsError:
            raise SettingsError(
                there[0], "it is there and does not belong to a training", "Name another folder for the run"
            ) from None


def require_apart(out: Path, dataset: Dataset) -> None:
    """Refuse a run folder in which the data set would find pictures and label maps.

    Raises:
        SettingsError: So.
    """
    files = [path for case in dataset.cases for path in (*case.images, case.label) if path is not None]
    if out.resolve() in {dataset.root.resolve(), *(path.parent.resolve() for path in files)}:
        raise SettingsError(out, "the data set lies in it", "Name another folder for the run")


def require_same_split(file: Path, used: Mapping[str, Any], data: Path) -> None:
    """Refuse to go on with other cases than those that a run was started with.

    Raises:
        SettingsError: So.
    """
    known = _read(file) if file.is_file() else used
    # The folder may have moved.
    if any([composed(name) for name in known.get(part, ())] != used[part] for part in ("train", "val")):
        raise SettingsError(
            data, "it no longer has the cases that the run was started with", "Resume with the same data set"
        )


def known_already(settings: Settings, name: str, validation: Sequence[str]) -> tuple[str, ...]:
    """What to say where the model that a training starts from has seen cases that are left out here.

    Args:
        name: Of the data set.
        validation: Names of the cases left out.
    """
    source = settings.network.init
    if source is None or not validation:
        return ()
    # A shipped model is no folder, and what lies in the current one is not its.
    for folder in (Path(source), Path(source).parent) if Path(source).is_dir() else ():
        if (folder / SPLITS).is_file():
            try:
                used = _read(folder / SPLITS)
            except SettingsError:
                continue
            if "train" not in used:
                continue  # of another program
            if Path(used.get("data", "")).name != name:
                return ()
            seen = len({*used["train"]} & {*validation})
            told = f"{seen} of {len(validation)} cases left out were trained on by {source}"
            return (f"beware: {told}, so their scores will look better than they are",) if seen else ()
    if Model.load(source).metadata.get("data", {}).get("name") == name:
        told = f"{source} was trained on cases of a data set of this name"
        return (
            f"beware: {told}: if cases left out are among them, their scores will look better than they are",
        )
    return ()


def _read(file: Path) -> dict[str, Any]:
    """What a file of a run says.

    Raises:
        SettingsError: It is damaged.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise SettingsError(file, "it is damaged: not valid JSON", "Start another run")
    return value

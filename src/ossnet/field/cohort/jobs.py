"""Which files become which: scans paired with targets, and what is in the way."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ossnet.data.scans import described_channels, images_in
from ossnet.errors import DatasetError, SettingsError
from ossnet.field.binding import precision_of
from ossnet.field.model import Model
from ossnet.field.provenance import look_of, made_by, origin, was_changed
from ossnet.files.atomic import clear_unfinished, require_folder
from ossnet.files.containers import FILE_ENDINGS, SLICER, is_slicer_segmentation, scan_name, stem
from ossnet.files.dicom import is_dicom
from ossnet.files.dicom_seg import require_highdicom
from ossnet.files.header import VolumeWarning
from ossnet.files.reading import origin_of
from ossnet.volume import MARK


@dataclass(frozen=True)
class Options:
    """How every scan is segmented; see `Field`, `Field.segment` and `without_islands`."""

    strategy: str = "auto"
    spacing: float | tuple[float, float, float] | None = None
    region: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    probabilities: bool = False
    dicom_seg: bool = False
    seg_nrrd: bool = False
    largest: bool = False
    smallest_ml: float = 0.0
    device: str = "auto"
    precision: str = "auto"
    memory: str | int | None = None
    chunk: int | None = None
    replace_nan: bool = False
    overwrite: bool = False

    def deciding(self, model: Model) -> dict[str, Any]:
        """Those that decide which label map comes out; devices (but for what they compute in) and grants do not."""
        return {
            "strategy": "octree" if self.strategy == "auto" else self.strategy,
            "spacing": self.spacing,
            "region": self.region,
            "largest": self.largest,
            "smallest_ml": self.smallest_ml,
            "replace_nan": self.replace_nan,
            "precision": precision_of(model, self.precision, self.device),  # type: ignore[arg-type]
            **({"values": {str(k): v for k, v in model.moved_values.items()}} if model.moved_values else {}),
        }


@dataclass(frozen=True)
class Job:
    """One scan: its files (channels in order) and where its label map goes.

    Attributes:
        alone: The target was named as a file: it may lie among others.
    """

    name: str
    files: tuple[Path, ...]
    target: Path
    alone: bool = False

    @property
    def probabilities(self) -> Path:
        """Where probabilities go."""
        return self.target.with_name(f"{stem(self.target)}_probabilities.nii.gz")

    @property
    def dicom_seg(self) -> Path:
        """Where the DICOM segmentation goes."""
        return self.target.with_name(f"{stem(self.target)}.dcm")

    @property
    def seg_nrrd(self) -> Path:
        """Where the segmentation for 3D Slicer goes."""
        return self.target.with_name(f"{stem(self.target)}{SLICER}")

    def results(self, options: Options) -> tuple[Path, ...]:
        """All that is written."""
        more = (
            (options.probabilities, self.probabilities),
            (options.dicom_seg, self.dicom_seg),
            (options.seg_nrrd, self.seg_nrrd),
        )
        return (self.target, *(file for wanted, file in more if wanted))


class Origins(dict[str, tuple[str, ...]]):
    """What finished results may say of their making, by names of scans: first what new ones say, then what is as good.

    Worked out when it is asked for: all of a scan is read for it.

    Attributes:
        fingerprint: The model's.
    """

    def __init__(self, jobs: Sequence[Job], model: Model, options: Options) -> None:
        self.fingerprint = model.fingerprint()
        self._temperature = model.temperature
        self._files = {job.name: job.files for job in jobs}
        self._looks: dict[str, str] = {}
        known = options.deciding(model)
        self._kinds = [known]
        # Nothing that asking everywhere finds is missed.
        if known["strategy"] == "octree":
            self._kinds.append(known | {"strategy": "dense"})
        # Who leaves it to the machine may go on with a folder on another one.
        if options.precision == "auto":
            other = "fp32" if known["precision"] == "bf16" else "bf16"
            self._kinds += [kind | {"precision": other} for kind in self._kinds]

    def __missing__(self, name: str) -> tuple[str, ...]:
        self[name] = self._made({}, name)
        return self[name]

    def of_probabilities(self, name: str) -> tuple[str, ...]:
        """Of maps of probabilities, which the temperature changes."""
        return self[name] if self._temperature == 1 else self._made({"temperature": self._temperature}, name)

    def _made(self, more: Mapping[str, float], name: str) -> tuple[str, ...]:
        if name not in self._looks:
            self._looks[name] = look_of(self._files[name])
        return tuple(origin(self.fingerprint, self._looks[name], {**kind, **more}) for kind in self._kinds)


def plan_jobs(
    images: Sequence[Path],
    out: Path | None,
    *,
    channels_together: bool = False,
    most_channels: int | None = None,
    channel_names: Sequence[str] = (),
) -> list[Job]:
    """Pair scans with targets.

    Args:
        images: Files, or folders in any layout.
        out: A file for one scan, otherwise a folder; None where nothing will be written.
        channels_together: The files are the channels of one scan.
        most_channels: Those that the model takes: with more files of one name and four digits these are scans.
        channel_names: What the model calls them, in order; another order in the data set's description is warned of.

    Raises:
        DatasetError: A path that is not there, or a folder without scans; results of ours are none.
        SettingsError: One file as target for several scans, two scans with the same name, or results that would
            replace scans or be taken for them.
    """
    single = out is not None and out.name.lower().endswith((".nii", ".nii.gz"))
    scans: list[tuple[str, tuple[Path, ...]]] = []
    if channels_together:
        scans.append((scan_name(images[0]), tuple(images)))
    else:
        for path in images:
            if path.is_dir():
                _tell_other_order(path, channel_names)
                found = [(case.name, case.images) for case in images_in(path, most_channels)]
                # One target for a series: not for others that lie below it.
                own = [scan for scan in found if scan[1] == (Path(os.path.abspath(path)),)]
                scans += own if own and single else found
            elif is_slicer_segmentation(path):
                raise DatasetError(path, "a segmentation of 3D Slicer, not a scan", "Leave it out")
            elif path.exists():
                scans.append((scan_name(path), (path,)))
            else:
                raise DatasetError(path, "there is no such file or folder", "Check the path")
    folder = out if out is not None else Path()
    if single and len(scans) > 1:
        raise SettingsError("--out", f"{out} is one file for {len(scans)} scans", "Name a folder")
    names = [name for name, _ in scans]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        one, two = [files[0] for name, files in scans if name == twice][:2]
        raise SettingsError(
            "segment",
            f"two scans are named {twice}: {one} and {two}",
            "Segment them one by one, into different folders",
        )
    jobs = [
        Job(name, files, folder if single else folder / f"{name}.nii.gz", single) for name, files in scans
    ]
    if out is not None:
        if not single and out.suffix.lower() in FILE_ENDINGS and not out.is_dir():
            fix = "End it in .nii.gz" + (", and add --seg-nrrd" if is_slicer_segmentation(out) else "")
            raise SettingsError("--out", f"{out} is neither NIfTI nor a folder", fix)
        require_folder(out.parent if single else out)
        holding = {path.resolve() for path in images if path.is_dir()}
        holding |= {file.resolve().parent for job in jobs for file in job.files}
        if not single and folder.resolve() in holding:
            raise SettingsError(
                "--out", f"{out} holds the scans, results would be taken for scans", "Name another folder"
            )
        if inside := next((job for job in jobs if job.target.parent.resolve() in _folders(job)), None):
            raise SettingsError("--out", f"{inside.target} would lie among the slices", "Name another folder")
        if directory := next((job.target for job in jobs if job.target.is_dir()), None):
            raise SettingsError("--out", f"{directory} is a folder", "Name a file that is not there yet")
    return jobs


def _tell_other_order(path: Path, names: Sequence[str]) -> None:
    """Warn where scans have the model's channels in another order, which no file shows."""
    theirs = described_channels(path)
    if [n.casefold() for n in theirs] == [n.casefold() for n in names]:
        return
    if sorted(n.casefold() for n in theirs) == sorted(n.casefold() for n in names):
        warnings.warn(
            f"{path}: dataset.json calls the channels {', '.join(theirs)}, and the model takes {', '.join(names)}: "
            "in another order it answers nonsense.",
            VolumeWarning,
            stacklevel=3,
        )


def _folders(job: Job) -> set[Path]:
    """Those that are a scan."""
    return {file.resolve() for file in job.files if file.is_dir()}


def require_replaceable(jobs: Sequence[Job], origins: Origins, options: Options) -> None:
    """Refuse where files are in the way: those that are no results (any more), and results of something else."""
    there = [(job, file, origin_of(file)) for job in jobs for file in job.results(options) if file.is_file()]
    foreign = [file for _, file, line in there if not line.startswith(MARK)]
    changed = [file for _, file, line in there if was_changed(file, line)]
    others = [
        file
        for job, file, line in there
        if made_by(line)
        not in (origins.of_probabilities(job.name) if file == job.probabilities else origins[job.name])
    ]
    if foreign:
        raise SettingsError(
            "--out",
            f"{_first(foreign)} and is not a result of ossnet",
            "Name another output, or move it away: it may be a reference",
        )
    if changed:
        raise SettingsError(
            "--out",
            f"{_first(changed)} and was changed since ossnet made it",
            "Name another output, or move it away: it may be corrected by hand",
        )
    if others and not options.overwrite:
        raise SettingsError(
            "--out",
            f"{_first(others)}, made by another model or an earlier ossnet, from another scan or with other options",
            "Name another output, or replace it with --overwrite",
        )


def require_own_files(jobs: Sequence[Job], options: Options) -> None:
    """Refuse results that would replace a scan or each other.

    Args:
        jobs: All of them, also those of other processes.
    """
    scans = {file.resolve() for job in jobs for file in job.files}
    taken: dict[Path, str] = {}
    for job in jobs:
        for target in job.results(options):
            if target.resolve() in scans:
                raise SettingsError(
                    "--out", f"{target} is one of the scans and would be replaced", "Name another folder"
                )
            if (other := taken.setdefault(target.resolve(), job.name)) != job.name:
                raise SettingsError(
                    "--out",
                    f"{target} would be a result of {other} and of {job.name}",
                    "Segment them into different folders",
                )


def require_series(jobs: Sequence[Job], options: Options) -> None:
    """Refuse DICOM segmentations of other scans than DICOM series, on another grid, or without highdicom."""
    if not options.dicom_seg:
        return
    require_highdicom()
    if options.spacing is not None or options.region is not None:
        raise SettingsError(
            "--dicom-seg",
            "a DICOM segmentation lies on the grid of its series",
            "Leave out --spacing and --region",
        )
    if other := next((job for job in jobs if not is_dicom(job.files[0])), None):
        raise SettingsError(
            "--dicom-seg", f"{other.files[0]} is not a DICOM series", "Leave it out for other scans"
        )


def _first(targets: Sequence[Path]) -> str:
    more = f" (and {len(targets) - 1} more)" if len(targets) > 1 else ""
    return f"{targets[0]} already exists{more}"


def finished(job: Job, options: Options) -> bool:
    """All that is wanted of a scan is there."""
    return all(file.is_file() for file in job.results(options))


def clear(jobs: Sequence[Job]) -> None:
    """Remove what killed processes left of these scans' files, and of no others."""
    for folder in {job.target.parent for job in jobs}:
        if any(folder.glob(".writing-*")):
            for job in jobs:
                for file in (job.target, job.probabilities, job.dicom_seg, job.seg_nrrd):
                    clear_unfinished(file)

"""Many scans: which files become which, each finished file final, several processes sharing the work."""

import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ossnet.data.layouts import images_in
from ossnet.errors import (
    DatasetError,
    InputError,
    OssnetError,
    ResourceError,
    SettingsError,
    is_out_of_memory,
)
from ossnet.field.components import island_bytes, without_islands
from ossnet.field.field import Field
from ossnet.field.forecast import forecast
from ossnet.field.likeness import unlike_training
from ossnet.field.memory import LIBRARIES, parse_size, require
from ossnet.field.model import Model, versions
from ossnet.field.provenance import look_of, origin
from ossnet.files.atomic import clear_unfinished, require_folder, write_json
from ossnet.files.containers import stem
from ossnet.files.nifti import origin_of, read_labels, read_volume
from ossnet.files.validate import VolumeWarning, read_header
from ossnet.volume import MARK, LabelMap, Volume

_REPORT_SECONDS = 10.0

_ATTEMPTS = 3
"""To enter what was done into a report that others write as well."""

# Endings of files that people may hope for; a folder with such a name is a mistake.
_NO_FOLDERS = {
    ".gz",
    ".img",
    ".hdr",
    ".mha",
    ".mhd",
    ".nrrd",
    ".npy",
    ".npz",
    ".png",
    ".txt",
    ".json",
    ".stl",
}


@dataclass(frozen=True)
class Options:
    """How every scan is segmented; see `Field`, `Field.segment` and `without_islands`."""

    strategy: str = "auto"
    spacing: float | tuple[float, float, float] | None = None
    region: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    probabilities: bool = False
    largest: bool = False
    smallest_ml: float = 0.0
    device: str = "auto"
    precision: str = "auto"
    memory: str | None = None
    chunk: int | None = None
    replace_nan: bool = False
    overwrite: bool = False

    def deciding(self) -> dict[str, Any]:
        """Those that decide which label map comes out; devices and grants do not."""
        return {
            "strategy": "octree" if self.strategy == "auto" else self.strategy,
            "spacing": self.spacing,
            "region": self.region,
            "largest": self.largest,
            "smallest_ml": self.smallest_ml,
            "replace_nan": self.replace_nan,
        }


@dataclass(frozen=True)
class Job:
    """One scan: its files (channels in order) and where its label map goes."""

    name: str
    files: tuple[Path, ...]
    target: Path

    @property
    def probabilities(self) -> Path:
        """Where probabilities go."""
        return self.target.with_name(f"{stem(self.target)}_probabilities.nii.gz")

    def results(self, options: Options) -> tuple[Path, ...]:
        """All that is written."""
        return (self.target, self.probabilities) if options.probabilities else (self.target,)

    def origins(self, model: str, options: Options) -> tuple[str, ...]:
        """What results that are finished may say of their making: first what new ones say, then what is as good.

        Args:
            model: Its fingerprint.
        """
        scan, known = look_of(self.files), options.deciding()
        # Nothing that asking everywhere finds is missed.
        kinds = [known, known | {"strategy": "dense"}] if known["strategy"] == "octree" else [known]
        return tuple(origin(model, scan, kind) for kind in kinds)


def plan_jobs(
    images: Sequence[Path],
    out: Path | None,
    *,
    channels_together: bool = False,
    most_channels: int | None = None,
) -> list[Job]:
    """Pair scans with targets.

    Args:
        images: Files, or folders in any layout.
        out: A file for one scan, otherwise a folder; None where nothing will be written.
        channels_together: The files are the channels of one scan.
        most_channels: Those that the model takes: with more files of one name and four digits these are scans.

    Raises:
        DatasetError: A path that is not there, or a folder without scans.
        SettingsError: One file as target for several scans, two scans with the same name, or results that would
            replace scans or be taken for them.
    """
    scans: list[tuple[str, tuple[Path, ...]]] = []
    if channels_together:
        scans.append((re.sub(r"_0000$", "", stem(images[0])), tuple(images)))
    else:
        for path in images:
            if path.is_dir():
                scans += [(case.name, case.images) for case in images_in(path, most_channels)]
            elif path.exists():
                scans.append((re.sub(r"_0000$", "", stem(path)), (path,)))
            else:
                raise DatasetError(path, "there is no such file or folder", "Check the path")
    folder = out if out is not None else Path()
    single = out is not None and out.name.endswith((".nii", ".nii.gz"))
    if single and len(scans) > 1:
        raise SettingsError("--out", f"{out} is one file for {len(scans)} scans", "Name a folder")
    names = [name for name, _ in scans]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise SettingsError("segment", f"two scans are named {twice}", "Segment them into different folders")
    jobs = [Job(name, files, folder if single else folder / f"{name}.nii.gz") for name, files in scans]
    if out is not None:
        if not single and out.suffix.lower() in _NO_FOLDERS and not out.is_dir():
            raise SettingsError("--out", f"{out} is neither NIfTI nor a folder", "End it in .nii.gz")
        if any(path.is_dir() and path.resolve() == out.resolve() for path in images):
            raise SettingsError(
                "--out", f"{out} holds the scans, results would be taken for scans", "Name another folder"
            )
        require_folder(out.parent if single else out)
        _require_other_files(jobs)
        if not single and folder.resolve() in {file.resolve().parent for job in jobs for file in job.files}:
            raise SettingsError(
                "--out", f"{out} holds the scans, results would be taken for scans", "Name another folder"
            )
        if directory := next((job.target for job in jobs if job.target.is_dir()), None):
            raise SettingsError("--out", f"{directory} is a folder", "Name a file that is not there yet")
    return jobs


def _require_other_files(jobs: Sequence[Job]) -> None:
    scans = {file.resolve() for job in jobs for file in job.files}
    for job in jobs:
        for target in (job.target, job.probabilities):
            if target.resolve() in scans:
                raise SettingsError(
                    "--out", f"{target} is one of the scans and would be replaced", "Name another folder"
                )


def segment_all(
    model: Model,
    jobs: Sequence[Job],
    options: Options,
    *,
    say: Callable[[str], None] | None = None,
    done: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Segment scans; what is finished is not done again, a scan that cannot be used does not stop the others.

    The next scan is read and the last one written while the current one is answered. Under torchrun or SLURM each
    process takes its share. Only the label maps decide what is finished: two processes never write the same one.

    Returns:
        The report, also written as `report.json` beside the label maps (`NAME.json` for a single file,
        `report.RANK.json` by each of several processes). It is up to date to about ten seconds, also after an
        interrupt.

    Raises:
        InputError: After all others were done, the first scan that could not be segmented.
        ResourceError: The disk is full; finished scans are kept.
    """
    say = say or (lambda text: None)
    rank, world = _processes()
    share = list(jobs)[rank::world]
    made_by = model.fingerprint()
    origins = {job.name: job.origins(made_by, options) for job in share}
    _require_replaceable(share, origins, options)
    todo = [job for job in share if options.overwrite or not _finished(job, options)]
    _clear(todo)
    if world > 1:
        if options.device != "cpu":
            _take_gpu()
        say(f"process {rank + 1} of {world} takes {len(share)} of {len(jobs)}")
    if len(todo) < len(share):
        say(f"{len(share) - len(todo)} of {len(share)} are finished already")
    report = _Report(_report_file(jobs, rank, world), model, made_by, options, origins)
    report.complete([job for job in share if job not in todo])
    failed: list[OssnetError] = []
    count = len(share) - len(todo)
    try:
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            # So many label maps may wait for the disk; a grant of memory is for one scan.
            waiting = 1 if options.memory is None else 0
            written: list[tuple[Job, dict[str, Any], Future[None]]] = []
            try:
                scans = _Reader(todo, reader, options)
                for index, job in enumerate(todo):
                    while len(written) > waiting:
                        report.collect(written.pop(0))
                    try:
                        if not options.overwrite and _finished(job, options):
                            say(f"{job.name} was finished by another process")
                        else:
                            with _memory_told(job):
                                made_by = origins[job.name][0]
                                entry, save = _segment(model, job, scans.take(index), options, made_by)
                            written.append((job, entry, writer.submit(save)))
                            say(f"{job.name}: {_told(entry)} → {job.target}")
                            del save  # and the maps with it, once they are written
                    except (InputError, ResourceError) as error:
                        # With its traceback it would keep the scan and its field.
                        error.__cause__ = error.__context__ = None
                        failed.append(error.with_traceback(None))
                        report.refuse(job, error)
                    count += 1
                    if done:
                        done(count)
            finally:
                while written:
                    report.collect(written.pop(0))
    finally:
        report.write()
    if failed:
        raise _summed_up(failed)
    return report.content()


def forecast_all(model: Model, jobs: Sequence[Job], options: Options) -> list[dict[str, Any]]:
    """What each scan would take, from its header; with a region it takes less."""
    out = []
    for job in jobs:
        header = read_header(job.files[0])
        expected = forecast(
            model,
            header.shape,
            header.affine,
            memory=options.memory,
            device=options.device,
            spacing=options.spacing,
            dense=options.strategy == "dense" or options.probabilities,
            probabilities=options.probabilities,
            precision=options.precision,  # type: ignore[arg-type]
            chunk=options.chunk,
        )
        out.append({"scan": job.name, **asdict(expected)})
    return out


def _require_replaceable(jobs: Sequence[Job], origins: Mapping[str, Sequence[str]], options: Options) -> None:
    """Refuse where files are in the way: those that are no results at all, and results of something else."""
    there = [(job, file, origin_of(file)) for job in jobs for file in job.results(options) if file.is_file()]
    foreign = [file for _, file, line in there if not line.startswith(MARK)]
    others = [file for job, file, line in there if line not in origins[job.name]]
    if foreign:
        raise SettingsError(
            "--out",
            f"{_first(foreign)} and is no result of ossnet",
            "Name another output, or move it away: it may be a reference",
        )
    if others and not options.overwrite:
        raise SettingsError(
            "--out",
            f"{_first(others)}, made by another model, from another scan or with other options",
            "Name another output, or replace it with --overwrite",
        )


def _first(targets: Sequence[Path]) -> str:
    more = f" (and {len(targets) - 1} more)" if len(targets) > 1 else ""
    return f"{targets[0]} is there{more}"


def _told(entry: Mapping[str, Any]) -> str:
    """What a user wants to see of a scan, in a line."""
    volumes = [f"{name} {ml:.2f} ml" for name, ml in entry["volumes_ml"].items()]
    shown = volumes if len(volumes) <= 4 else [f"{len(volumes)} structures"]
    return f"{', '.join(shown) or 'no structure'}; {entry['locations']:,} locations, {entry['seconds']:.2f} s"


def _segment(
    model: Model, job: Job, volume: Volume, options: Options, made_by: str
) -> tuple[dict[str, Any], Callable[[], None]]:
    started = time.perf_counter()
    field = Field(
        model,
        volume,
        device=options.device,
        memory=options.memory,
        precision=options.precision,  # type: ignore[arg-type]
        chunk=options.chunk,
    )
    if note := unlike_training(model, field.grid):
        warnings.warn(f"{job.files[0]}: {note}.", VolumeWarning, stacklevel=2)
    labels = field.segment(
        strategy=options.strategy,  # type: ignore[arg-type]
        spacing=options.spacing,
        region=options.region,
    )
    maps = None
    if options.probabilities:
        maps = field.probability_map(
            spacing=options.spacing, region=options.region, beside=labels.data.nbytes
        )
    encoder_seconds = field.encoder_seconds
    del field  # its maps, before islands are looked for
    if options.largest or options.smallest_ml:
        if options.memory is not None:
            held = labels.data.nbytes + (0 if maps is None else maps.data.nbytes)
            needed = LIBRARIES + held + island_bytes(labels)
            require(parse_size(options.memory), needed, "looking for islands")
        labels = without_islands(labels, largest=options.largest, smallest_ml=options.smallest_ml)
    labels = replace(labels, origin=made_by)
    maps = maps and replace(maps, origin=made_by)
    entry = {
        "files": [str(f) for f in job.files],
        "options": {k: v for k, v in options.deciding().items() if v not in (None, False, 0.0)},
        **_found(job, labels),
        "strategy": labels.strategy,
        "locations": labels.evaluated,
        "encoder_seconds": round(encoder_seconds, 4),
        "octree_seconds": round(labels.seconds, 4),
        "seconds": round(time.perf_counter() - started, 4),
    }

    def save() -> None:
        if maps is not None:
            maps.save(job.probabilities)
        labels.save(job.target)  # last: its presence means finished

    return entry, save


def _found(job: Job, labels: LabelMap) -> dict[str, Any]:
    """Of a scan's entry, what its label map says."""
    return {
        "result": str(job.target),
        "origin": labels.origin,
        "shape": list(labels.shape),
        "spacing_mm": [round(s, 4) for s in labels.spacing],
        "volumes_ml": {labels.names.get(k, str(k)): round(v, 3) for k, v in labels.volumes_ml().items()},
    }


@contextmanager
def _memory_told(job: Job) -> Iterator[None]:
    """Memory that ran out is a matter of this scan."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"{job.files[0]}: memory ran out. Bound it with --memory, or ask for fewer voxels."
        ) from error


class _Reader:
    """Reads each scan while the one before is answered; with a grant of memory, which is for one scan, after it."""

    def __init__(self, jobs: Sequence[Job], pool: ThreadPoolExecutor, options: Options) -> None:
        self._jobs, self._pool, self._options = jobs, pool, options
        self._ahead: tuple[int, Future[Volume]] | None = None

    def take(self, index: int) -> Volume:
        """The scan of a job; that of the next one is read from now on.

        Raises:
            InputError: The files cannot be trusted.
            ResourceError: Memory does not hold the scan alone.
        """
        try:
            if self._ahead is not None and self._ahead[0] == index:
                with suppress(ResourceError, MemoryError):
                    return self._ahead[1].result()
                # There was no room beside the scan before, which is gone by now.
                self._ahead = None
            return self._read(self._jobs[index])
        finally:
            following = index + 1
            self._ahead = None
            if self._options.memory is None and following < len(self._jobs):
                self._ahead = following, self._pool.submit(self._read, self._jobs[following])

    def _read(self, job: Job) -> Volume:
        return read_volume(job.files, nonfinite="replace" if self._options.replace_nan else "refuse")


def _clear(jobs: Sequence[Job]) -> None:
    """Remove what killed processes left of these scans' files, and of no others."""
    for folder in {job.target.parent for job in jobs}:
        if any(folder.glob(".writing-*")):
            for job in jobs:
                clear_unfinished(job.target)
                clear_unfinished(job.probabilities)


def _summed_up(failed: Sequence[OssnetError]) -> OssnetError:
    """One error for all."""
    first, more = failed[0], len(failed) - 1
    if not more:
        return first
    if not isinstance(first, InputError):
        return type(first)(f"{first} {more} more could not be segmented either.")
    reason = f"{first.reason} ({more} more could not be segmented either)"
    return type(first)(first.where, reason, first.fix)


def _finished(job: Job, options: Options) -> bool:
    return all(file.is_file() for file in job.results(options))


def _processes() -> tuple[int, int]:
    """This process and how many there are, as torchrun or SLURM say."""
    kinds = [("RANK", "WORLD_SIZE")]
    # A batch script or a shell has these too, of all tasks of its job; `srun` alone starts as many processes.
    if os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        kinds.append(("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    for rank, world in kinds:
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def _take_gpu(environment: Mapping[str, str] = os.environ) -> None:
    """Give each of several processes on a machine a GPU of its own, as far as there are so many."""
    count = torch.cuda.device_count()
    local = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID")
    if count > 1 and local is not None:
        torch.cuda.set_device(int(local) % count)


def _report_file(jobs: Sequence[Job], rank: int, world: int) -> Path | None:
    if not jobs:
        return None
    target = jobs[0].target
    if len(jobs) == 1 and target.name != f"{jobs[0].name}.nii.gz":
        return target.with_name(f"{stem(target)}_report.json")
    return target.with_name("report.json" if world == 1 else f"report.{rank}.json")


class _Report:
    """`report.json`; entries of scans that were finished earlier are kept.

    Nothing is written as long as nothing was segmented: a refused scan leaves no files.
    """

    def __init__(
        self,
        file: Path | None,
        model: Model,
        fingerprint: str,
        options: Options,
        origins: Mapping[str, Sequence[str]],
    ) -> None:
        self.file, self.model, self.fingerprint, self.options = file, model, fingerprint, options
        self.origins = origins
        self.scans: dict[str, Any] = {}
        """Entries of this process."""
        self._written = time.monotonic()
        self._known()

    def _known(self) -> dict[str, Any]:
        """Entries in the file: of earlier runs, and of processes that work on the same folder."""
        if self.file is None or not self.file.is_file():
            return {}
        try:
            return dict(json.loads(self.file.read_text(encoding="utf-8"))["scans"])
        except (ValueError, TypeError, KeyError):
            raise SettingsError(
                self.file, "it is there and is no report of ossnet", "Move it away, or name another output"
            ) from None

    def complete(self, finished: Sequence[Job]) -> None:
        """Enter what is finished and was not entered, as after a kill: what its label map says."""
        known = self._known()
        for job in finished:
            if "error" in known.get(job.name, ("error",)):
                labels = read_labels(job.target)
                self.scans[job.name] = {"files": [str(f) for f in job.files], **_found(job, labels)}

    def collect(self, item: tuple[Job, dict[str, Any], Future[None]]) -> None:
        """Wait until a label map is on the disk, then enter it."""
        job, entry, future = item
        future.result()
        self.scans[job.name] = entry
        if time.monotonic() - self._written > _REPORT_SECONDS:
            self.write()

    def refuse(self, job: Job, error: OssnetError) -> None:
        """Enter why a scan was not segmented."""
        self.scans[job.name] = {"error": str(error)}

    def content(self) -> dict[str, Any]:
        """What the file holds, or will hold."""
        return {
            "model": {
                "variant": self.model.variant,
                "labels": self.model.label_names,
                "fingerprint": self.fingerprint,
            },
            "options": {k: v for k, v in asdict(self.options).items() if v is not None},
            "versions": versions(),
            "scans": self._all(),
        }

    def _all(self) -> dict[str, Any]:
        """Entries of all; what failed here may have been done by others."""
        known = self._known()

        def done(name: str) -> bool:
            entry = known.get(name, {})
            return entry.get("origin") in self.origins[name] and Path(entry["result"]).is_file()

        return known | {k: v for k, v in self.scans.items() if "error" not in v or not done(k)}

    def write(self) -> None:
        """Bring the file up to date."""
        self._written = time.monotonic()
        if self.file is None or all("error" in entry for entry in self.scans.values()):
            return
        # Another process may write at the same time: then what it read was without these entries.
        for _ in range(_ATTEMPTS):
            write_json(self.file, self.content())
            if self._all() == self._known():
                return

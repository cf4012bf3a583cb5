"""Many scans: which files become which, each finished file final, several processes sharing the work."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ossnet.data.layouts import images_in
from ossnet.errors import InputError, SettingsError
from ossnet.field.field import Field
from ossnet.field.forecast import forecast
from ossnet.field.model import Model, versions
from ossnet.files.atomic import clear_unfinished, write_json
from ossnet.files.containers import stem
from ossnet.files.nifti import read_volume
from ossnet.files.validate import read_header
from ossnet.volume import Volume


@dataclass(frozen=True)
class Options:
    """How every scan is segmented; see `Field` and `Field.segment`."""

    strategy: str = "auto"
    spacing: float | None = None
    region: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    probabilities: bool = False
    device: str = "auto"
    precision: str = "auto"
    memory: str | None = None
    chunk: int | None = None
    overwrite: bool = False


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


def plan_jobs(images: Sequence[Path], out: Path | None, *, channels_together: bool = False) -> list[Job]:
    """Pair scans with targets.

    Args:
        images: Files, or folders in any layout.
        out: A file for one scan, otherwise a folder; None where nothing will be written.
        channels_together: The files are the channels of one scan.

    Raises:
        SettingsError: One file as target for several scans, or two scans with the same name.
    """
    scans: list[tuple[str, tuple[Path, ...]]] = []
    if channels_together:
        scans.append((re.sub(r"_0000$", "", stem(images[0])), tuple(images)))
    else:
        for path in images:
            if path.is_dir():
                scans += [(case.name, case.images) for case in images_in(path)]
            else:
                scans.append((re.sub(r"_0000$", "", stem(path)), (path,)))
    folder = out if out is not None else Path()
    single = out is not None and out.name.endswith((".nii", ".nii.gz"))
    if single and len(scans) > 1:
        raise SettingsError("--out", f"{out} is one file for {len(scans)} scans", "Name a folder")
    names = [name for name, _ in scans]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise SettingsError("segment", f"two scans are named {twice}", "Segment them into different folders")
    return [Job(name, files, folder if single else folder / f"{name}.nii.gz") for name, files in scans]


def segment_all(
    model: Model,
    jobs: Sequence[Job],
    options: Options,
    *,
    say: Callable[[str], None] | None = None,
    done: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Segment scans; what is finished is not done again, a scan that cannot be read does not stop the others.

    The next scan is read and the last one written while the current one is answered. Under torchrun or SLURM each
    process takes its share.

    Returns:
        The report, also written as `report.json` beside the label maps.

    Raises:
        InputError: After all others were done, the first scan that could not be segmented.
    """
    say = say or (lambda text: None)
    rank, world = _processes()
    share = list(jobs)[rank::world]
    todo = [job for job in share if options.overwrite or not _finished(job, options)]
    for job in todo:
        clear_unfinished(job.target)
        clear_unfinished(job.probabilities)
    if len(todo) < len(share):
        say(f"{len(share) - len(todo)} of {len(share)} are finished already")
    entries: dict[str, Any] = {}
    failed: list[InputError] = []
    count = len(share) - len(todo)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        written: list[tuple[Job, dict[str, Any], Future[None]]] = []
        for job, scan in _read_ahead(todo, reader):
            while len(written) > 1:  # at most two label maps wait for the disk
                _collect(written.pop(0), entries)
            try:
                volume = scan.result()
                entry, save = _segment(model, job, volume, options)
            except InputError as error:
                failed.append(error)
                entries[job.name] = {"error": str(error)}
                say(str(error))
            else:
                written.append((job, entry, writer.submit(save)))
                say(f"{job.name}: {entry['locations']:,} locations, {entry['seconds']:.2f} s")
            count += 1
            if done:
                done(count)
        for item in written:
            _collect(item, entries)
    report = _write_report(model, jobs, options, entries, rank, world)
    if failed:
        raise failed[0]
    return report


def forecast_all(model: Model, jobs: Sequence[Job], options: Options) -> list[dict[str, Any]]:
    """What each scan would take, from its header."""
    out = []
    for job in jobs:
        header = read_header(job.files[0])
        expected = forecast(model, header.shape, header.affine, memory=options.memory, device=options.device)
        out.append({"scan": job.name, **asdict(expected)})
    return out


def _segment(
    model: Model, job: Job, volume: Volume, options: Options
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
    labels = field.segment(
        strategy=options.strategy,  # type: ignore[arg-type]
        spacing=options.spacing,
        region=options.region,
    )
    maps = field.probability_map() if options.probabilities else None
    entry = {
        "files": [str(f) for f in job.files],
        "shape": list(labels.shape),
        "spacing_mm": [round(s, 4) for s in labels.spacing],
        "strategy": labels.strategy,
        "locations": labels.evaluated,
        "encoder_seconds": round(field.encoder_seconds, 4),
        "octree_seconds": round(labels.seconds, 4),
        "seconds": round(time.perf_counter() - started, 4),
        "volumes_ml": {labels.names.get(k, str(k)): round(v, 3) for k, v in labels.volumes_ml().items()},
    }

    def save() -> None:
        if maps is not None:
            maps.save(job.probabilities)
        labels.save(job.target)  # last: its presence means finished

    return entry, save


def _read_ahead(jobs: Sequence[Job], reader: ThreadPoolExecutor) -> Iterator[tuple[Job, Future[Volume]]]:
    following = reader.submit(_read, jobs[0]) if jobs else None
    for index, job in enumerate(jobs):
        current = following
        following = reader.submit(_read, jobs[index + 1]) if index + 1 < len(jobs) else None
        if current is not None:
            yield job, current


def _read(job: Job) -> Volume:
    return read_volume(job.files)


def _collect(item: tuple[Job, dict[str, Any], Future[None]], entries: dict[str, Any]) -> None:
    job, entry, future = item
    future.result()
    entries[job.name] = entry


def _finished(job: Job, options: Options) -> bool:
    return job.target.is_file() and (not options.probabilities or job.probabilities.is_file())


def _processes() -> tuple[int, int]:
    """This process and how many there are, as torchrun or SLURM say."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def _write_report(
    model: Model, jobs: Sequence[Job], options: Options, entries: dict[str, Any], rank: int, world: int
) -> dict[str, Any]:
    """`report.json`; entries of scans finished earlier are kept."""
    folder = jobs[0].target.parent if jobs else Path()
    single = len(jobs) == 1 and jobs[0].target.name != f"{jobs[0].name}.nii.gz"
    name = (
        f"{stem(jobs[0].target)}.json" if single else "report.json" if world == 1 else f"report.{rank}.json"
    )
    file = folder / name
    earlier: dict[str, Any] = {}
    with suppress(OSError, ValueError, AttributeError):
        earlier = json.loads(file.read_text()).get("scans", {})
    report = {
        "model": {"variant": model.variant, "labels": model.label_names},
        "options": {k: v for k, v in asdict(options).items() if v is not None},
        "versions": versions(),
        "scans": {**earlier, **entries},
    }
    if jobs:
        write_json(file, report)
    return report

"""Scans one after the other: the next one is read and the last one written while one is answered."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from ossnet.errors import InputError, OssnetError, ResourceError, SettingsError, is_out_of_memory
from ossnet.field.binding import chosen_device
from ossnet.field.cohort.jobs import (
    Job,
    Options,
    Origins,
    clear,
    finished,
    plan_jobs,
    require_own_files,
    require_replaceable,
    require_series,
)
from ossnet.field.cohort.report import Report, report_file, said_by
from ossnet.field.cohort.sharing import processes, take_gpu
from ossnet.field.components import check_smallest, without_islands
from ossnet.field.field import Field
from ossnet.field.forecast import Forecast, forecast
from ossnet.field.labelling import check_strategy
from ossnet.field.likeness import unlike_training
from ossnet.field.memory import format_size, free_bytes, parse_size
from ossnet.field.model import Model, versions
from ossnet.field.provenance import signed
from ossnet.files.dicom_seg import require_source, write_dicom_seg
from ossnet.files.header import VolumeWarning
from ossnet.files.reading import look_at_channels, read_volume
from ossnet.volume import Volume


def segment_folder(
    model: Model | Path | str, images: Path | str | Sequence[Path | str], out: Path | str, **options: Any
) -> dict[str, Any]:
    """Segment scans into a folder, as `ossnet segment` does: what is finished there is not done again.

    Args:
        model: A model, or what `Model.load` takes.
        images: A scan or a folder of scans in any layout, or several.
        out: The folder, or a `.nii.gz` file for one scan.
        options: Of `Options`, such as `memory="2GB"`, `largest=True`, `device="cuda"`, `overwrite=True`.

    Returns:
        The report, as `report.json` has it.

    Raises:
        SettingsError: There is no such option, or files are in the way.
        DatasetError: There are no scans.
        InputError: After all others were done, the first scan that could not be segmented.
        ResourceError: The disk is full; finished scans are kept.
    """
    known = {field.name for field in fields(Options)}
    if unknown := options.keys() - known:
        raise SettingsError(
            "segment_folder", f"there is no option {min(unknown)}", f"Choose of {', '.join(sorted(known))}"
        )
    loaded = model if isinstance(model, Model) else Model.load(model)
    given = [images] if isinstance(images, (str, Path)) else images
    jobs = plan_jobs(
        [Path(path) for path in given],
        Path(out),
        most_channels=loaded.channels,
        channel_names=loaded.channel_names,
    )
    return segment_all(loaded, jobs, Options(**{name: _plain(value) for name, value in options.items()}))


def _plain(value: Any) -> Any:
    """What JSON has for what `Field` takes as well: numbers and arrays of numpy, and devices."""
    if isinstance(value, torch.device):
        return str(value)
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def segment_all(
    model: Model,
    jobs: Sequence[Job],
    options: Options,
    *,
    say: Callable[[str], None] | None = None,
    done: Callable[[int], None] | None = None,
    reported: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Segment scans; what is finished is not done again, a scan that cannot be used does not stop the others.

    The next scan is read and the last one written while the current one is answered. Under torchrun or SLURM each
    process takes its share. Only the label maps decide what is finished: of two processes that were started on the
    same folder each goes through all of it, and leaves out what the other has finished meanwhile.

    Args:
        say: Told a line about each scan.
        done: Told the number of scans that are behind it.
        reported: Given the report at the end, also where scans could not be segmented: their entries have `error`.

    Returns:
        The report, also written as `report.json` beside the label maps (`NAME_report.json` for a target named as a
        file, `report.RANK.json` by each of several processes). It is up to date to about ten seconds, also after an
        interrupt.

    Raises:
        InputError: After all others were done, the first scan that could not be segmented.
        ResourceError: The disk is full; finished scans are kept.
    """
    say = say or (lambda text: None)
    require_own_files(jobs, options)
    rank, world = processes()
    share = list(jobs)[rank::world]
    origins, todo = _begun(model, share, options)
    clear(todo)
    if world > 1:
        if options.device != "cpu":
            take_gpu()
        say(f"process {rank + 1} of {world} takes {len(share)} of {len(jobs)}")
    if options.memory is not None and todo:
        granted, free = parse_size(options.memory), free_bytes(chosen_device(options.device))
        if granted > free:
            say(f"beware: the memory limit is {format_size(granted)}, and {format_size(free)} are free")
    if len(todo) < len(share):
        say(f"{len(share) - len(todo)} of {len(share)} are finished already")
    report = Report(report_file(jobs, rank, world), model, options, origins)
    report.complete([job for job in share if job not in todo])
    failed: list[OssnetError] = []
    count = len(share) - len(todo)
    try:
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            # So many label maps may wait for the disk; a grant of memory is for one scan.
            waiting = 1 if options.memory is None else 0
            written: list[tuple[Job, dict[str, Any], Future[None]]] = []

            def refuse(job: Job, error: OssnetError) -> None:
                # With its traceback it would keep the scan and its field.
                error.__cause__ = error.__context__ = None
                failed.append(error.with_traceback(None))
                report.refuse(job, error)

            def collect() -> None:
                """Wait until the oldest of them is on the disk; what the disk has no room for stops everything."""
                job, entry, _ = item = written.pop(0)
                try:
                    report.collect(item)
                except InputError as error:
                    refuse(job, error)
                else:
                    say(f"{job.name}: {_told(entry)} → {job.target}")

            try:
                scans = _Reader(todo, reader, options)
                for index, job in enumerate(todo):
                    while len(written) > waiting:
                        collect()
                    try:
                        if not options.overwrite and finished(job, options):
                            require_replaceable([job], origins, options)
                            say(f"{job.name} was finished by another process")
                        else:
                            with _memory_told(job):
                                entry, save = _segment(model, job, scans.take(index), options, origins)
                            written.append((job, entry, writer.submit(save)))
                            del save  # and the maps with it, once they are written
                    except (InputError, ResourceError) as error:
                        refuse(job, error)
                    count += 1
                    if done:
                        done(count)
            finally:
                while written:
                    collect()
    finally:
        report.write()
    content = report.content()
    if reported:
        reported(content)
    if failed:
        raise summed_up(failed)
    return content


def forecast_all(
    model: Model, jobs: Sequence[Job], options: Options, *, with_targets: bool = False
) -> tuple[list[dict[str, Any]], list[InputError | ResourceError]]:
    """What each scan would take, from its header; with a region it takes less. What `segment_all` refuses is refused.

    Args:
        with_targets: The targets are meant: what is finished there takes nothing, and nothing may be in the way.

    Returns:
        An entry a scan, and what is wrong with those that cannot be segmented: their entries say it as `error`.
    """
    targets = jobs if with_targets else []
    require_own_files(targets, options)
    origins, todo = _begun(model, targets, options)
    if with_targets:
        Report(report_file(jobs, 0, 1), model, options, origins)
    out: list[dict[str, Any]] = []
    failed: list[InputError | ResourceError] = []
    for job in jobs:
        if with_targets and job not in todo:
            out.append({"scan": job.name, "finished": True, **asdict(Forecast(0, 0.0, 0, 0))})
            continue
        try:
            expected = _forecast(model, job, options)
        except (InputError, ResourceError) as error:
            failed.append(error)
            out.append({"scan": job.name, "finished": False, "error": str(error)})
        else:
            out.append({"scan": job.name, "finished": False, **asdict(expected)})
    return out, failed


def _forecast(model: Model, job: Job, options: Options) -> Forecast:
    header, *_ = headers = look_at_channels(job.files)
    model.require_channels(sum(one.channels for one in headers), header.path)
    if options.dicom_seg:
        require_source(job.files[0])
    return forecast(
        model,
        header.shape,
        header.affine,
        memory=options.memory,
        device=options.device,
        spacing=options.spacing,
        region=options.region,
        dense=options.strategy == "dense" or options.probabilities,
        probabilities=options.probabilities,
        precision=options.precision,  # type: ignore[arg-type]
        chunk=options.chunk,
    )


def _begun(model: Model, jobs: Sequence[Job], options: Options) -> tuple[Origins, list[Job]]:
    """What finished results may say, and the scans that are left to do.

    Raises:
        SettingsError: Options that no scan can be segmented with, or files that are in the way.
    """
    own_grid = options.spacing is None and options.region is None
    check_strategy(options.strategy, model.classes, own_grid)
    check_smallest(options.smallest_ml)
    require_series(jobs, options)
    origins = Origins(jobs, model, options)
    require_replaceable(jobs, origins, options)
    return origins, [job for job in jobs if options.overwrite or not finished(job, options)]


def _told(entry: Mapping[str, Any]) -> str:
    """What a user wants to see of a scan, in a line."""
    volumes = [f"{name} {ml:.2f} ml" for name, ml in entry["volumes_ml"].items() if ml]
    shown = volumes if len(volumes) <= 4 else [f"{len(volumes)} structures"]
    return f"{', '.join(shown) or 'no structure'}; {entry['locations']:,} locations, {entry['seconds']:.2f} s"


def _segment(
    model: Model, job: Job, volume: Volume, options: Options, origins: Origins
) -> tuple[dict[str, Any], Callable[[], None]]:
    started, made_by = time.perf_counter(), origins[job.name][0]
    if options.dicom_seg:
        require_source(job.files[0])
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
        labels = without_islands(labels, largest=options.largest, smallest_ml=options.smallest_ml, reuse=True)
    maps = maps and replace(maps, origin=origins.of_probabilities(job.name)[0])
    entry = {
        "files": [str(f) for f in job.files],
        "model": origins.fingerprint,
        "options": {k: v for k, v in options.deciding(model).items() if v not in (None, False, 0.0)},
        **said_by(job, labels),
        "strategy": labels.strategy,
        "locations": labels.evaluated,
        "encoder_seconds": round(encoder_seconds, 4),
        "octree_seconds": round(labels.seconds, 4),
        "seconds": round(time.perf_counter() - started, 4),
    }

    def save() -> None:
        result = signed(labels, made_by)
        entry["origin"] = result.origin
        try:
            if options.dicom_seg:
                own = replace(result, origin=made_by)
                write_dicom_seg(own, job.files[0], job.dicom_seg, version=versions()["ossnet"])
            if maps is not None:
                maps.save(job.probabilities)
            if options.seg_nrrd:
                result.save(job.seg_nrrd)
        except InputError:
            # It is not lost where another file of the scan cannot be written.
            result.save(job.target)
            raise
        result.save(job.target)  # last: its presence means finished

    return entry, save


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


def summed_up(failed: Sequence[OssnetError]) -> OssnetError:
    """One error for all."""
    first, more = failed[0], len(failed) - 1
    if not more:
        return first
    if not isinstance(first, InputError):
        return type(first)(f"{first} {more} more could not be segmented either.")
    reason = f"{first.reason} ({more} more could not be segmented either)"
    return type(first)(first.where, reason, first.fix)

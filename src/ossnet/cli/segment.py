"""`ossnet segment`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ossnet.cli.common import print_json, progress, say
from ossnet.cli.options import AsJson, Device, Largest, Memory, Mirror, Models, ReplaceNan, SmallestMl


def command(
    images: Annotated[
        list[Path],
        typer.Argument(
            help="Scans (NIfTI, NRRD or MetaImage files, or folders with a DICOM series), or folders of scans in any "
            "known layout."
        ),
    ],
    model: Models,
    out: Annotated[Path | None, typer.Option(help="A .nii.gz file for one scan, otherwise a folder.")] = None,
    channels: Annotated[
        bool, typer.Option("--channels", help="The files given are the channels of one scan, in order.")
    ] = False,
    spacing: Annotated[
        str | None, typer.Option(help="Voxel size of the answer in mm, if not the scan's: 0.5 or 0.5,0.5,2.")
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(help="Only this box of voxels of the answer: x0,y0,z0,x1,y1,z1 (ends excluded)."),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="auto, octree (asks near surfaces) or dense (asks every voxel). For the paper's networks also "
            "original, released or paper: the first inference of the authors' code, its improved one, and the improved "
            "one as the paper words it."
        ),
    ] = "auto",
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write probabilities (evaluates every voxel).")
    ] = False,
    dicom_seg: Annotated[
        bool, typer.Option("--dicom-seg", help="Also write DICOM segmentations; for DICOM series only.")
    ] = False,
    seg_nrrd: Annotated[
        bool, typer.Option("--seg-nrrd", help="Also write segmentations for 3D Slicer (.seg.nrrd).")
    ] = False,
    largest: Largest = False,
    smallest_ml: SmallestMl = 0.0,
    mirror: Mirror = True,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    memory: Memory = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Locations per batch (default: automatic).")
    ] = None,
    replace_nan: ReplaceNan = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the time and memory that it will take and what is finished, then stop."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Segment scans with a trained model.

    **Example:** `ossnet segment scan.nii.gz --model runs/hippocampus --out scan_seg.nii.gz`

    Folders resume: what this model made of this scan with these options is kept and not recomputed. Files that are
    something else are never replaced by accident. Next to the label maps lies `report.json` (`NAME_report.json` for
    one file, `report.RANK.json` of several processes): volumes, times, locations asked, versions.
    """
    from ossnet.errors import SettingsError
    from ossnet.field.cohort.jobs import Options, plan_jobs
    from ossnet.field.cohort.run import forecast_all, segment_all, summed_up
    from ossnet.field.model import Model
    from ossnet.field.octree.released_stages import START_STATES

    if out is None and not dry_run:
        raise SettingsError("segment", "--out is needed", "Name a file or a folder for the label maps")
    if precision not in ("auto", "fp32", "bf16"):
        raise SettingsError("--precision", f"{precision!r} is unknown", "Use auto, fp32 or bf16")
    if region is not None:
        try:
            x0, y0, z0, x1, y1, z1 = (int(n) for n in region.split(","))
        except ValueError:
            raise SettingsError(
                "--region", f"{region!r} is not six numbers", "Write x0,y0,z0,x1,y1,z1"
            ) from None
    options = Options(
        strategy=strategy,
        spacing=None if spacing is None else _spacing(spacing),
        region=((x0, y0, z0), (x1, y1, z1)) if region is not None else None,
        probabilities=probabilities,
        dicom_seg=dicom_seg,
        seg_nrrd=seg_nrrd,
        largest=largest,
        smallest_ml=smallest_ml,
        device=device,
        precision=precision,
        memory=memory,
        chunk=chunk,
        replace_nan=replace_nan,
        overwrite=overwrite,
    )
    loaded = Model.load(*model, mirror=mirror)
    jobs = plan_jobs(
        images,
        out,
        channels_together=channels,
        most_channels=loaded.channels,
        channel_names=loaded.channel_names,
    )
    if dry_run:
        forecasts, failed = forecast_all(loaded, jobs, options, with_targets=out is not None)
        if as_json:
            print_json(forecasts)
        elif len(failed) < len(forecasts):
            by = (
                f", asked as --strategy octree does instead of {strategy}" if strategy in START_STATES else ""
            )
            _tell(forecasts, " without --region" if region else by)
        if failed:
            raise summed_up(failed)
        return
    with progress("Segmenting", len(jobs)) as done:
        segment_all(loaded, jobs, options, say=say, done=done, reported=print_json if as_json else None)


def _tell(forecasts: Sequence[Mapping[str, Any]], however: str) -> None:
    """What each scan would take, in a line, and all of them together."""
    known = [entry for entry in forecasts if "error" not in entry]
    for entry in forecasts:
        if "error" in entry:
            typer.echo(f"{entry['scan']}: {entry['error']}")
        elif entry["finished"]:
            typer.echo(f"{entry['scan']}: finished already")
        else:
            typer.echo(
                f"{entry['scan']}: about {entry['locations']:,} locations, {entry['seconds']:.1f} s, "
                f"{entry['memory_bytes'] / 1e9:.2f} GB above the scan{however}"
            )
    if len(known) > 1:
        seconds, most = sum(f["seconds"] for f in known), max(f["memory_bytes"] for f in known)
        typer.echo(f"all {len(known)}: about {seconds:.0f} s, at most {most / 1e9:.2f} GB at a time")


def _spacing(text: str) -> float | tuple[float, float, float]:
    """One voxel size, or one for each axis as the scan is stored."""
    from ossnet.errors import SettingsError

    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        return values[0]
    if len(values) == 3:
        return values[0], values[1], values[2]
    raise SettingsError("--spacing", f"{text!r} is not one number or three", "Write 0.5 or 0.5,0.5,2")

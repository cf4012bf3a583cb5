"""`ossnet train`."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ossnet.cli.common import is_first_process, lines_above, say, stderr, stdout
from ossnet.cli.options import ReplaceNan

if TYPE_CHECKING:
    from ossnet.training.settings import Settings


_UNTIMED, _TIMED = 5, 20
"""First steps that are not timed, and those that are before it is said how long a training will take."""

_PATIENCE = 60.0
"""Seconds after which it is said with fewer steps than these."""

_FEW_STEPS = 500
"""A training of fewer steps learns little: its batches are too large for the time."""


def command(
    data: Annotated[
        Path | None,
        typer.Option(help="Data set in any layout that `ossnet check` knows; --resume knows it already."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to create, or to go on with.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="multiscale (default), O-Net, A, B, C, D, unet3d, unet2d, monai-unet.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="brats2020 or lits: the paper's experiments.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON or TOML file with settings.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="One setting: group.key=value, or seed=1.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Train for this long; the schedule fits itself. Not given: 60 for multiscale and monai-unet, "
            "the others train for epochs."
        ),
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(
            help="Fold that is left out for validation: 0 (default) to 4, or those of splits_final.json; all: train on "
            "every case; paper: the paper's split."
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Start from the stages and weights of this run or model; scans and structures may differ."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    devices: Annotated[int | None, typer.Option(help="How many processes or GPUs.")] = None,
    replace_nan: ReplaceNan = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be picked for --data and why, then stop.")
    ] = False,
    help_settings: Annotated[
        bool,
        typer.Option(
            "--help-settings",
            help="List every setting that --variant, --preset or --config uses, with its values.",
        ),
    ] = False,
) -> None:
    """Train a network on a data set.

    Stop it with Ctrl-C at any time and go on with `--resume`: nothing is lost, by a kill a minute. On a CPU a training
    by epochs (`--set schedule.epochs=…`) then ends the same to the last bit; one by minutes follows the clock.

    **Example:** `ossnet train --data Dataset004_Hippocampus --out runs/hippocampus --minutes 30`
    """
    from ossnet.errors import ResourceError, SettingsError, is_out_of_memory
    from ossnet.training.settings import (
        MACHINE,
        describe_settings,
        given_keys,
        make_settings,
        on_machine,
    )

    if help_settings:
        of = make_settings(variant, preset, config).variant
        table = Table("setting", f"in {of}", "meaning")
        for row in describe_settings(of, preset, config):
            table.add_row(*row)
        stdout().print(table)
        return
    if dry_run and (data is None or resume):
        raise SettingsError(
            "--dry-run", "it is for new runs", "Name the data set with --data, without --resume"
        )
    if out is None and resume:
        raise SettingsError("train", "--out is needed", "Name the run folder that goes on")
    if not dry_run and (out is None or (data is None and not resume)):
        raise SettingsError("train", "--data and --out are needed", "Name the data set and a run folder")
    from ossnet.training.processes import with_processes
    from ossnet.training.run_folder import STATE, data_of, from_anywhere, settings_of
    from ossnet.training.train import planned, train

    chosen = list(changes or ())
    if minutes is not None:
        chosen.append(f"schedule.minutes={minutes}")
    if init is not None:
        chosen.append(f"network.init={json.dumps(init)}")
    if fold is not None:
        chosen.append(f"data.fold={fold}")
    if device is not None:
        chosen.append(f"runtime.accelerator={device}")
    if devices is not None:
        chosen.append(f"runtime.devices={devices}")
    if replace_nan:
        chosen.append("data.replace_nan=true")
    if dry_run and data is not None:
        for line in planned(data, make_settings(variant, preset, config, chosen)):
            typer.echo(line)
        return
    assert out is not None
    if resume:
        settings = settings_of(out)
        named = given_keys(preset, config, chosen) | ({"variant"} if variant else set())
        given = make_settings(variant or settings.variant, preset, config, chosen)
        # As `train` wrote them down.
        require_unchanged(settings, from_anywhere(with_processes(given)), named - MACHINE)
        settings = on_machine(settings, given, named)
    else:
        settings = make_settings(variant, preset, config, chosen)
    try:
        with Watcher(settings.schedule.batch_size if settings.schedule.minutes else 1) as watcher:
            train(data or data_of(out), out, settings, resume=resume, listener=watcher, say=say)
    except (KeyboardInterrupt, ResourceError, MemoryError, RuntimeError) as error:
        stopped = isinstance(error, (KeyboardInterrupt, ResourceError)) or is_out_of_memory(error)
        if stopped and is_first_process() and (out / STATE).exists():
            say(f"go on with: ossnet train --resume --out {out}")
        raise
    if is_first_process():
        say(f"finished: {out}")


def require_unchanged(used: "Settings", given: "Settings", named: set[str]) -> None:
    """Refuse to resume with other settings than those of the run.

    Args:
        named: Those that the user gave; others stay as they are.

    Raises:
        SettingsError: The first that differs.
    """
    from ossnet.errors import SettingsError

    flat = [_flat(settings.model_dump(mode="json")) for settings in (used, given)]
    for key, value in flat[0].items():
        if key in named and flat[1][key] != value:
            raise SettingsError(
                f"--resume: {key}",
                f"{flat[1][key]} is given, the run was started with {value}",
                "Resume without settings, or start another run",
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


class Watcher:
    """Shows a training: a bar with the time left on a terminal, a line for every validation anywhere.

    Args:
        batch_size: Scans a step of a training whose time is limited, which could be fewer.
    """

    def __init__(self, batch_size: int = 1) -> None:
        console = stderr()
        self._batch_size = batch_size
        columns = (
            TextColumn("step {task.fields[step]}  loss {task.fields[loss]}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        self._above = lines_above(console)
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task: TaskID | None = None
        self.smooth: float | None = None
        self.begun: float | None = None
        """Seconds of the training when this run had done its first step."""
        self.first: tuple[int, float, float] | None = None
        """Step, seconds and fraction where timing begins: the first steps set libraries and the GPU up."""
        self.steps = 0
        """Steps of this run."""
        self.forecast = False

    def __enter__(self) -> "Watcher":
        self._above.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._above.__exit__(None, None, None)
        self.bar.stop()

    def step(self, state: Any, loss: float, fraction: float) -> None:
        """Move the bar."""
        if self.task is None:
            self.bar.start()
            self.task = self.bar.add_task("", total=1.0, step=0, loss="")
        if math.isfinite(loss):  # a few that are not are forgiven
            self.smooth = loss if self.smooth is None else 0.98 * self.smooth + 0.02 * loss
        shown = "" if self.smooth is None else f"{self.smooth:.4f}"
        self.bar.update(self.task, completed=fraction, step=state.step, loss=shown)
        self.steps += 1
        if self.begun is None:
            self.begun = state.seconds
        if self.first is None:
            if self.steps > _UNTIMED or state.seconds - self.begun > _PATIENCE / 2:
                self.first = state.step, state.seconds, fraction
            return
        timed, seconds, share = (
            now - then for now, then in zip((state.step, state.seconds, fraction), self.first, strict=True)
        )
        if not self.forecast and share > 0 and (timed >= _TIMED or seconds > _PATIENCE):
            self.forecast = True
            self._say_forecast(state.step, seconds / timed, (1 - fraction) * timed / share)

    def _say_forecast(self, done: int, each: float, left: float) -> None:
        """Steps done and left, and the seconds of each."""
        steps, minutes = done + left, left * each / 60
        say(f"{each:.3g} s a step: about {steps:,.0f} steps in all, {minutes:.0f} minutes to go")
        if steps < _FEW_STEPS and self._batch_size > 1:
            say(
                f"only about {steps:,.0f} steps will fit; with fewer than {self._batch_size} scans a step "
                "(--set schedule.batch_size=1) there are more"
            )

    def validated(self, row: dict[str, Any]) -> None:
        """Say a line with step, loss and scores."""
        scores = "".join(f"  {k} {v:.4f}" for k, v in row.items() if k.startswith(("dice", "iou")))
        scores = f"  sampled:{scores}" if scores else ""
        minutes = row["seconds"] / 60
        say(f"{minutes:7.1f} min  step {row['step']:6d}  loss {row['loss']:.4f}{scores}")

"""What all commands share: where messages go, and what becomes of errors.

Answers go to stdout, everything else (progress, warnings, errors) to stderr, so that `ossnet … --json | jq`
always works.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ossnet.errors import OssnetError, is_out_of_memory

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
REFUSED = 2
"""Exit code after bad input."""


def stdout() -> Console:
    """For answers; colours and boxes on a terminal, plain text in a pipe."""
    return _console(sys.stdout)


def stderr() -> Console:
    """For messages."""
    return _console(sys.stderr)


def _console(file: Any) -> Console:
    # Made anew each time, so that redirected streams (tests, notebooks) are seen. Files and pipes are no
    # terminals with a width: 120 columns keep tables whole there.
    return Console(file=file, highlight=False, width=None if file.isatty() else 120)


def print_json(value: Any) -> None:
    """An answer for programs: one JSON document on stdout, in letters that it knows."""
    known = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(
        json.dumps(value, indent=1, ensure_ascii=not known, allow_nan=False, default=_plain) + "\n"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy numbers and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def say(message: str, kind: str = "") -> None:
    """One line on stderr, for example `say("3 files are finished", "note")`."""
    colours = {"error": "bold red", "warning": "yellow", "note": "cyan"}
    console = _live[-1] if _live else stderr()
    prefix = (Text(f"{kind}: ", colours.get(kind, "bold")),) if kind else ()
    # Not wrapped: a path broken over two lines cannot be copied.
    console.print(Text.assemble(*prefix, message), soft_wrap=True)


def is_first_process() -> bool:
    """True in the one process that speaks, where several work together (torchrun, SLURM, Fabric)."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar with the time left on a terminal, silence elsewhere. Yields a function: number done so far.

    Example:
        with progress("Reading", len(cases)) as done:
            for number, case in enumerate(cases): ...; done(number + 1)
    """
    console = stderr()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar, lines_above(console):
        task = bar.add_task(description, total=total)
        yield lambda count: bar.update(task, completed=count)


_live: list[Console] = []


@contextmanager
def lines_above(console: Console) -> Iterator[None]:
    """What is said meanwhile goes above the bar on this console, not through it."""
    _live.append(console)
    try:
        yield
    finally:
        _live.remove(console)


@contextmanager
def told() -> Iterator[None]:
    """Errors that a user can act on become one message and an exit code; warnings become one line each.

    OssnetError, disk errors, out of memory: exit code 2. Ctrl-C: 130. A closed pipe (`ossnet … | head`): 0.
    With OSSNET_DEBUG=1 in the environment the traceback is shown as well.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # of a notebook, for example
            # Names of files may hold what a terminal's alphabet has not, or no letters at all.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
            sys.stdout.flush()  # a closed pipe is told here, or nowhere
    except (KeyboardInterrupt, typer.Abort):
        if is_first_process():
            say("interrupted; what was finished is kept")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Nobody reads the answer any more. Point stdout elsewhere, or Python complains when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OssnetError as error:
        if os.environ.get("OSSNET_DEBUG"):
            raise
        say(str(error), "error")
        raise typer.Exit(REFUSED) from None
    except OSError as error:
        # What a disk or a permission says is for the user as well: a missing folder, a full disk.
        if os.environ.get("OSSNET_DEBUG") or error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        say(f"{where}{error.strerror}.", "error")
        raise typer.Exit(REFUSED) from None
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("OSSNET_DEBUG") or not is_out_of_memory(error):
            raise
        say(
            "memory ran out. Close other programs, or lower --memory; for a training schedule.batch_size, "
            "sampling.crop_voxels or sampling.locations.",
            "error",
        )
        raise typer.Exit(REFUSED) from None


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    say(str(message), "warning")

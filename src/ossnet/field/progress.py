"""`progress=True`: a bar on a terminal, silence elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, int], None]
"""Takes the locations asked so far and those known to follow."""


@contextmanager
def reporting(progress: Report | bool | None) -> Iterator[Report | None]:
    """What is to be called on the way: what was given, a bar for True, nothing for False and None."""
    if not isinstance(progress, bool):
        yield progress
        return
    console = Console(stderr=True)
    if not progress or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("Locations"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        yield lambda asked, pending: bar.update(task, completed=asked, total=asked + pending)

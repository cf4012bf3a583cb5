"""Where scores go: a table on the screen, JSON, files. Shared by the commands that judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ossnet.cli.common import print_json, say, stdout

if TYPE_CHECKING:
    from ossnet.evaluation.tables import Row, Summary

TABLES = (".csv", ".json")

Out = Annotated[
    Path | None,
    typer.Option(
        help="FILE.csv (one line a case and class), FILE.json (everything), or a folder for both.",
        show_default=False,
    ),
]


def require_table(out: Path | None) -> None:
    """Refuse a place where scores cannot be written, before any are computed.

    Raises:
        InputError: It is neither a table nor a folder, or may not be written to.
    """
    from ossnet.errors import SettingsError
    from ossnet.files.atomic import require_folder
    from ossnet.files.containers import FILE_ENDINGS

    if out is None:
        return
    if out.suffix.lower() in FILE_ENDINGS - set(TABLES) and not out.is_dir():
        raise SettingsError("--out", f"{out} is neither a folder nor a table", "End it in .csv or .json")
    if out.suffix.lower() in TABLES and out.is_dir():
        raise SettingsError("--out", f"{out} is a folder", "Name a file, or a folder that does not end so")
    require_folder(out.parent if out.suffix.lower() in TABLES else out)


def give(
    rows: Sequence["Row"], summary: "Summary", tolerance_mm: float, out: Path | None, as_json: bool
) -> None:
    """Write scores where they were asked for, and show them."""
    from ossnet.evaluation.tables import to_csv, to_json, to_screen
    from ossnet.files.atomic import write_json, write_text

    everything = to_json(rows, summary, tolerance_mm)
    if out is not None:
        kind = out.suffix.lower()
        if kind not in TABLES:
            write_text(out / "scores.csv", to_csv(rows))
            write_json(out / "scores.json", everything)
        elif kind == ".csv":
            write_text(out, to_csv(rows))
        else:
            write_json(out, everything)
        say(f"written: {out}")
    if as_json:
        print_json(everything)
    else:
        stdout().print(to_screen(summary, tolerance_mm))

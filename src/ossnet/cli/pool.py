"""`ossnet pool`."""

from pathlib import Path
from typing import Annotated

import typer

from ossnet.cli.common import print_json, say, stdout


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, such as the folds of a cross-validation.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="FILE.csv (one line a case and class) or FILE.json (everything).", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Put the validation scores of several runs together, every case judged by the run that was not trained on it.

    **Example:** `for f in 0 1 2 3 4; do ossnet train --data DATA --out runs/f$f --fold $f; done; ossnet pool runs/f*`
    """
    from ossnet.errors import DatasetError, SettingsError
    from ossnet.evaluation.tables import pooled, to_csv, to_json, to_screen
    from ossnet.files.atomic import require_folder, write_json, write_text

    if out is not None:
        if out.suffix.lower() not in (".csv", ".json"):
            raise SettingsError("--out", f"{out} is no table", "End it in .csv or .json")
        require_folder(out.parent)
    tables = {}
    for run in runs:
        file = run / "validation.csv"
        if not file.is_file():
            raise DatasetError(
                run, "has no validation.csv", "Name runs that are finished and had validation cases"
            )
        tables[str(run)] = file.read_text(encoding="utf-8")
    rows, summary = pooled(tables)
    everything = to_json(rows, summary, 1.0)
    if out is not None:
        if out.suffix.lower() == ".csv":
            write_text(out, to_csv(rows))
        else:
            write_json(out, everything)
        say(f"written: {out}")
    if as_json:
        print_json(everything)
    else:
        stdout().print(to_screen(summary, 1.0))

"""`ossnet pool`."""

from pathlib import Path
from typing import Annotated

import typer

from ossnet.cli.options import AsJson
from ossnet.cli.scores import Out, give, require_table


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, such as the folds of a cross-validation.", show_default=False),
    ],
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Put the validation scores of several runs together, every case judged by the run that was not trained on it.

    **Example:** `for f in 0 1 2 3 4; do ossnet train --data DATA --out runs/f$f --fold $f; done; ossnet pool runs/f*`
    """
    from ossnet.errors import DatasetError
    from ossnet.evaluation.tables import pooled

    require_table(out)
    tables = {}
    for run in runs:
        file = run / "validation.csv"
        if not file.is_file():
            raise DatasetError(
                run, "has no validation.csv", "Name runs that are finished and had validation cases"
            )
        try:
            tables[str(run)] = file.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before it
        except UnicodeDecodeError as error:
            raise DatasetError(
                file, "is not UTF-8 text", "Save it as such, or let the run write it"
            ) from error
    rows, summary = pooled(tables)
    give(rows, summary, 1.0, out, as_json)

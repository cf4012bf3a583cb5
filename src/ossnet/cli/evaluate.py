"""`ossnet evaluate`: how well predictions agree with labels."""

from pathlib import Path
from typing import Annotated

import typer

from ossnet.cli.common import progress
from ossnet.cli.options import AsJson
from ossnet.cli.scores import Out, give, require_table


def command(
    predictions: Annotated[
        Path, typer.Argument(help="A label map, or a folder of them.", show_default=False)
    ],
    labels: Annotated[
        Path,
        typer.Argument(
            help="The reference: a label map, a data set in any layout, or a folder of label maps.",
            show_default=False,
        ),
    ],
    out: Out = None,
    tolerance: Annotated[float, typer.Option(help="Tolerance of the surface Dice in mm.", min=0.0)] = 1.0,
    only_predicted: Annotated[
        bool,
        typer.Option(
            "--only-predicted",
            help="Skip cases without a prediction instead of failing. Always so where PREDICTIONS is a single file.",
        ),
    ] = False,
    region: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=1,2: labels, as label files have them, that are judged as one too, beside the regions of the "
            "data set. Repeat for more.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare segmentations with reference labels.

    Dice, IoU, HD95, average symmetric surface distance, surface Dice and volume difference, for each class
    and case, with means and 95 % confidence intervals; also for regions of several classes that the data set
    names (nnU-Net) or that BraTS judges (whole tumour, tumour core). Predictions are found by the names of the cases
    (`CASE.nii.gz`, `CASE_seg.nii.gz` and the like, in any format that is read).

    **Example:** `ossnet evaluate results Dataset004_Hippocampus --only-predicted --out scores`
    """
    from ossnet.evaluation.matching import match
    from ossnet.evaluation.scoring import score
    from ossnet.evaluation.tables import summarise

    require_table(out)
    more = _regions(region or [])
    matched = match(predictions, labels, only_predicted=only_predicted)
    matched = matched.with_regions(more)
    with progress("Comparing", len(matched.pairs)) as done:
        rows = score(matched, tolerance, done)
    give(rows, summarise(rows), tolerance, out, as_json)


def _regions(given: list[str]) -> dict[str, tuple[int, ...]]:
    """Name → classes, from `NAME=1,2`.

    Raises:
        SettingsError: It is written otherwise.
    """
    from ossnet.errors import SettingsError

    found = {}
    for text in given:
        name, _, values = text.partition("=")
        numbers = {v.strip() for v in values.split(",")}
        if not name.strip() or len(numbers) < 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise SettingsError(
                "--region",
                f"{text!r} is not a name with several labels above 0",
                'Write for example --region "whole tumour=1,2,3"',
            )
        if name.strip() in found:
            raise SettingsError("--region", f"{name.strip()} is given twice", "Give each its own name")
        found[name.strip()] = tuple(sorted(int(n) for n in numbers))
    return found

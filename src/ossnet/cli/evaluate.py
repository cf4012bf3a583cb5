"""`ossnet evaluate`: how well predictions agree with labels."""

from pathlib import Path
from typing import Annotated

import typer

from ossnet.cli.common import progress
from ossnet.cli.scores import AsJson, Out, give, require_table


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
    tolerance: Annotated[float, typer.Option(help="Of the surface Dice, in mm.", min=0.0)] = 1.0,
    only_predicted: Annotated[
        bool,
        typer.Option(
            "--only-predicted", help="Leave out cases without a prediction, do not refuse (as for a file)."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare segmentations with reference labels.

    Dice, IoU, HD95, average symmetric surface distance, surface Dice and volume difference, for each class
    and case, with means and 95 % confidence intervals. Predictions are found by the names of the cases
    (`CASE.nii.gz` or `CASE_seg.nii.gz`).

    **Example:** `ossnet evaluate results Dataset004_Hippocampus --only-predicted --out scores`
    """
    from ossnet.evaluation.cases import match, score
    from ossnet.evaluation.tables import summarise

    require_table(out)
    matched = match(predictions, labels, only_predicted=only_predicted)
    with progress("Comparing", len(matched.pairs)) as done:
        rows = score(matched, tolerance, done)
    give(rows, summarise(rows), tolerance, out, as_json)

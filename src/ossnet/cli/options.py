"""Options that several commands have, declared once."""

from typing import Annotated

import typer

Models = Annotated[
    list[str],
    typer.Option(
        "--model",
        help="Run or model folder, or the name of a model that is shipped. Given several times, for folds as an "
        "example: the mean of their probabilities.",
    ),
]
Mirror = Annotated[
    bool,
    typer.Option(
        "--mirror/--no-mirror",
        help="Ask models that were trained on mirrored scans mirrored as well; or once only, in half the time for one "
        "axis.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help='Memory limit above the loaded scan and the model, such as "2GB"; on a GPU, its memory is meant.'
    ),
]
ReplaceNan = Annotated[
    bool, typer.Option("--replace-nan", help="Replace NaN and infinite voxels instead of refusing them.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]

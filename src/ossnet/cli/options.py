"""Options that several commands have, declared once."""

from typing import Annotated

import typer

Models = Annotated[
    list[str],
    typer.Option(
        "--model",
        help="Run folder, model folder, or name of a shipped model. Repeat it to average the probabilities of several, "
        "such as the folds of a cross-validation.",
    ),
]
Mirror = Annotated[
    bool,
    typer.Option(
        "--mirror/--no-mirror",
        help="For models that were trained on mirrored scans: average over mirrored copies too; --no-mirror: once, in "
        "half the time for each axis.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help='Memory limit beyond the loaded scan and the model, such as "2GB"; on a GPU, of GPU memory.'
    ),
]
Largest = Annotated[
    bool, typer.Option("--largest", help="Keep only the largest component of each structure.")
]
SmallestMl = Annotated[float, typer.Option(min=0.0, help="Remove components below this volume in ml.")]
ReplaceNan = Annotated[
    bool, typer.Option("--replace-nan", help="Replace NaN and infinite voxels instead of refusing them.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]

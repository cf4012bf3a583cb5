"""`ossnet import-weights`."""

from pathlib import Path
from typing import Annotated

import typer

from ossnet.cli.common import say


def command(
    file: Annotated[Path, typer.Argument(help="Weight file of the authors, oss_net_*.pt.")],
    out: Annotated[Path, typer.Option(help="Model folder to make.")],
    output_shape: Annotated[
        str | None, typer.Option(help="Low-resolution grid such as 8,8,5, where it cannot be inferred.")
    ] = None,
    large_pool: Annotated[
        str,
        typer.Option(
            help="How B and D pool large patches: avg (the paper), or released (the authors' inference)."
        ),
    ] = "avg",
) -> None:
    """Turn released OSS-Net weights into a model.

    **Example:** `ossnet import-weights oss_net_c_bra_ts.pt --out models/brats`
    """
    from ossnet.errors import SettingsError
    from ossnet.field.imported import import_released
    from ossnet.files.atomic import require_folder

    if any((out / name).exists() for name in ("model.json", "model", "settings.json")):
        raise SettingsError("--out", f"{out} holds a model or a run already", "Name another folder")

    grid = None
    if output_shape is not None:
        try:
            x, y, z = (int(n) for n in output_shape.replace("x", ",").split(","))
        except ValueError:
            raise SettingsError(
                "--output-shape", f"{output_shape!r} is not three numbers", "Write for example 8,8,5"
            ) from None
        grid = (x, y, z)
    model = import_released(file, grid, large_pool)  # type: ignore[arg-type]  # which it checks
    require_folder(out)
    model.save(out)
    say(f"variant {model.variant}, {model.channels} channel(s), {model.preparation.shape} voxels: {out}")

"""`ossnet mesh`."""

from pathlib import Path
from typing import Annotated

import typer

from ossnet.cli.common import say


def command(
    image: Annotated[list[Path], typer.Argument(help="One scan: a file, or its channels in order.")],
    model: Annotated[
        list[str],
        typer.Option(
            help="Run or model folder, or the name of a model that is shipped. Given several times, for folds as an "
            "example: the mean of their probabilities."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Mesh file: .stl, .ply, .obj or .glb.")],
    structure: Annotated[str, typer.Option(help="Name or label of the structure.")] = "1",
    faces: Annotated[int | None, typer.Option(help="Simplify to about this many triangles.")] = None,
    smooth: Annotated[int, typer.Option(help="Rounds of smoothing.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    memory: Annotated[
        str | None, typer.Option(help='Memory limit, the loaded scan not counted, such as "2GB".')
    ] = None,
    replace_nan: Annotated[
        bool,
        typer.Option("--replace-nan", help="Replace NaN and infinite voxels instead of refusing them."),
    ] = False,
) -> None:
    """Write the surface of a structure, watertight, in world millimetres.

    **Example:** `ossnet mesh scan.nii.gz --model runs/liver --structure liver --out liver.stl`
    """
    from ossnet.errors import SettingsError
    from ossnet.field.mesh.extract import MESH_FORMATS, save_mesh
    from ossnet.field.model import Model
    from ossnet.files.atomic import require_folder
    from ossnet.files.nifti import read_volume

    if out.suffix.lower().lstrip(".") not in MESH_FORMATS:
        raise SettingsError("--out", f"{out} is no mesh file", f"End it in .{', .'.join(MESH_FORMATS)}")
    require_folder(out.parent)
    if smooth < 0:
        raise SettingsError("--smooth", f"{smooth} is below 0", "Give a number of rounds")
    loaded = Model.load(*model)
    volume = read_volume(image, nonfinite="replace" if replace_nan else "refuse")
    field = loaded.field(volume, device=device, memory=memory)
    chosen: int | str = int(structure) if structure.isdigit() else structure
    mesh = field.mesh(chosen, faces=faces, smooth=smooth)
    if len(mesh.faces) == 0:
        raise SettingsError(
            "structure", f"{structure} was not found in this scan", "Look at `ossnet segment` first"
        )
    save_mesh(mesh, out)
    say(
        f"{loaded.label_names.get(chosen, chosen) if isinstance(chosen, int) else chosen}: "
        f"{len(mesh.faces):,} triangles, {mesh.volume / 1000:.2f} ml, "
        f"{'watertight' if mesh.is_watertight else 'not watertight'} → {out}"
    )

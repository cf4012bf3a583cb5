"""`ossnet mesh`."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ossnet.cli.common import print_json, say
from ossnet.cli.options import AsJson, Device, Largest, Memory, Mirror, Models, ReplaceNan, SmallestMl


def command(
    image: Annotated[
        list[Path],
        typer.Argument(help="One scan: a file or a folder with a DICOM series, or its channels in order."),
    ],
    model: Models,
    out: Annotated[
        Path,
        typer.Option(
            help="A .stl, .ply, .obj or .glb file for one structure, or a folder for SCAN_STRUCTURE.stl of each."
        ),
    ],
    structure: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or label of a structure; repeat for more. All of the model's when not given.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option("--format", help="File format when --out is a folder: stl, ply, obj or glb.")
    ] = "stl",
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A label map of the scan with the model's labels, corrected by hand for example: its structures are "
            "drawn, smooth where the model agrees. The scan is segmented when not given.",
            show_default=False,
        ),
    ] = None,
    faces: Annotated[int | None, typer.Option(help="Simplify to about this many triangles.")] = None,
    smooth: Annotated[int, typer.Option(help="Rounds of smoothing.")] = 0,
    largest: Largest = False,
    smallest_ml: SmallestMl = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    mirror: Mirror = True,
    device: Device = "auto",
    memory: Memory = None,
    replace_nan: ReplaceNan = False,
    as_json: AsJson = False,
) -> None:
    """Write the surfaces of structures, watertight, in world millimetres.

    **Example:** `ossnet mesh scan.nii.gz --model runs/liver --structure liver --out liver.stl`

    **Example:** `ossnet mesh scan.nii.gz --model runs/heart --out surfaces --format ply`
    """
    from dataclasses import replace

    import numpy as np

    from ossnet.errors import SettingsError, VolumeError
    from ossnet.field.components import check_smallest, without_islands
    from ossnet.field.mesh.extract import MESH_FORMATS, check_mesh_options, save_mesh
    from ossnet.field.model import Model
    from ossnet.files.atomic import require_folder
    from ossnet.files.containers import FILE_ENDINGS, scan_name
    from ossnet.files.reading import read_labels, read_volume

    endings = f".{', .'.join(MESH_FORMATS)}"
    single = out.suffix.lower().lstrip(".") in MESH_FORMATS and not out.is_dir()
    if not single and out.suffix.lower() in FILE_ENDINGS and not out.is_dir():
        raise SettingsError("--out", f"{out} is neither a mesh file nor a folder", f"End it in {endings}")
    if kind not in MESH_FORMATS:
        raise SettingsError("--format", f"{kind!r} is unknown", f"Use one of {', '.join(MESH_FORMATS)}")
    check_mesh_options(faces, smooth)
    check_smallest(smallest_ml)
    require_folder(out.parent if single else out)
    loaded = Model.load(*model, mirror=mirror)
    wanted = list(dict.fromkeys(loaded.label_of(given) for given in structure or loaded.label_names))
    if single and len(wanted) > 1:
        raise SettingsError(
            "--out",
            f"{out.name} is one file, and there are {len(wanted)} structures",
            "Name a folder, or one structure with --structure",
        )
    single_kind = None if single else kind
    files = _files(
        out, scan_name(image[0]), {label: loaded.label_names[label] for label in wanted}, single_kind
    )
    if not overwrite and (there := [file for file in files.values() if file.exists()]):
        raise SettingsError(
            "--out", f"{there[0]} already exists", "Name another output, or replace it with --overwrite"
        )
    volume = read_volume(image, nonfinite="replace" if replace_nan else "refuse")
    drawn = None
    if labels is not None:
        # From now on with the model's numbers, also where islands were all that told which these are.
        drawn = replace(loaded.as_classes(read_labels(labels)), values=loaded.moved_values)
        if unknown := set(np.unique(drawn.data).tolist()) - {0, *loaded.label_names}:
            raise VolumeError(
                labels,
                f"holds label {min(unknown)}, which the model does not have",
                f"It has {loaded.structures()}",
            )
    field = loaded.field(volume, device=device, memory=memory)
    if drawn is None and (len(wanted) > 1 or largest or smallest_ml):
        drawn = field.segment()
    if drawn is not None and (largest or smallest_ml):
        drawn = without_islands(drawn, largest=largest, smallest_ml=smallest_ml)
    missing = []
    written = {}
    for label in wanted:
        name = loaded.label_names[label]
        mesh = field.mesh(label, faces=faces, smooth=smooth, labels=drawn)
        if len(mesh.faces) == 0:
            missing.append(name)
            continue
        file = files[label]
        save_mesh(mesh, file)
        written[name] = {
            "file": str(file),
            "label": loaded.label_values[label],
            "triangles": len(mesh.faces),
            "volume_ml": round(float(mesh.volume) / 1000, 3),
            "watertight": bool(mesh.is_watertight),
        }
        say(
            f"{name}: {len(mesh.faces):,} triangles, {mesh.volume / 1000:.2f} ml, "
            f"{'watertight' if mesh.is_watertight else 'not watertight'} → {file}"
        )
    if as_json:
        print_json({"scan": [str(file) for file in image], "meshes": written, "missing": missing})
    if not written:
        raise SettingsError(
            "--structure" if structure else image[0],
            f"{', '.join(missing)} was not found in {'this scan' if labels is None else labels}",
            "Segment the scan and look at the result, or choose another structure"
            if labels is None
            else "Draw it there, or choose another structure",
        )
    if missing:
        say(f"not in this scan: {', '.join(missing)}")


def _files(out: Path, scan: str, names: Mapping[int, str], kind: str | None) -> dict[int, Path]:
    """Label → file; in a folder named after scan and structure (scan_left_ventricle.stl), each another.

    Args:
        kind: Of files in a folder; None: `out` is the file.
    """
    if kind is None:
        return dict.fromkeys(names, out)
    plain = {
        label: re.sub(r"[^\w.-]+", "_", name).strip("_.") or "structure" for label, name in names.items()
    }
    alike = Counter(name.casefold() for name in plain.values())
    return {
        label: out / f"{scan}_{name if alike[name.casefold()] == 1 else f'{name}_{label}'}.{kind}"
        for label, name in plain.items()
    }

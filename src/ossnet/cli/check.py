"""`ossnet check`: a data set's fingerprint and its problems."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ossnet.cli.common import print_json, progress, stdout
from ossnet.cli.options import AsJson, ReplaceNan

if TYPE_CHECKING:
    from ossnet.data.cases import Problem
    from ossnet.data.fingerprint import CaseFacts, Fingerprint

Number = int | float  # for the checks in tests, where an int is no float

_SHOWN = 20  # kinds of problems that are printed; --json has all
_FILES = 5  # files of each kind


def command(
    data: Annotated[Path, typer.Argument(help="Folder of the data set.", show_default=False)],
    layout: Annotated[
        str | None,
        typer.Option(
            help="How files are named (see above), detected when not given; for training use --set data.layout=…",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Cases read at a time.", show_default="processors"),
    ] = None,
    replace_nan: ReplaceNan = False,
    cases: Annotated[bool, typer.Option("--cases", help="Print a line for each case as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a data set: what is in it, and what is wrong with it.

    Reads every image and label. Exit code 0: sound; 1: there are problems; 2: it cannot be read at all.

    **Example:** `ossnet check Dataset004_Hippocampus`

    **Layouts:**

    - `nnunet`: dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz
    - `decathlon`: dataset.json with training pairs, 4D files
    - `brats2020` (also 2021): CASE/CASE_flair.nii.gz, _t1, _t1ce, _t2, _seg
    - `brats2023`: CASE/CASE-t2f.nii.gz, -t1n, -t1c, -t2w, -seg
    - `brats`: both together
    - `lits`: volume-N.nii, segmentation-N.nii
    - `folders`: images/CASE.nii.gz, labels/CASE.nii.gz
    - `case-folders`: CASE/image.nii.gz, CASE/label.nii.gz
    - `suffix`: CASE.nii.gz, CASE_seg.nii.gz (or _label, _mask, or CASE.seg.nrrd)
    - `slicer`: CASE/SCAN.nrrd, CASE/Segmentation.seg.nrrd
    """
    from ossnet.data.fingerprint import fingerprint
    from ossnet.data.layouts import open_dataset

    dataset = open_dataset(data, layout, nonfinite="replace" if replace_nan else "refuse")
    with progress("Reading cases", len(dataset)) as done:
        found = fingerprint(dataset, jobs, done)
    if as_json:
        print_json(found.to_json())
    else:
        show(found, stdout(), cases=cases)
    raise typer.Exit(1 if found.problems else 0)


def show(found: "Fingerprint", console: Console, *, cases: bool = False) -> None:
    """Print a fingerprint for people."""
    data = found.dataset
    structures = [f"{name}" for number, name in data.label_names.items() if number]
    console.print(f"[bold]{escape(data.root.resolve().name)}[/]  layout {data.layout}", soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("Cases", _cases_line(found))
    facts.add_row("Channels", Text(f"{len(data.channel_names)}: {', '.join(data.channel_names)}"))
    facts.add_row("Structures", Text(f"{len(structures)}: {', '.join(structures)}" if structures else "none"))
    moved = [
        f"{value} in files is class {number}" for value, number in data.label_map.items() if value != number
    ]
    if data.by_name:
        facts.add_row("Label values", "differ between files, which name them: names count")
    if moved:
        facts.add_row("Label values", ", ".join(moved))
    facts.add_row("Splits", _splits_line(found))
    _block(console, facts)
    if found.cases:
        if cases:
            _block(console, _each_case(found))
        _block(console, _geometry(found.cases))
        codes, types = (Counter(getattr(c, key) for c in found.cases) for key in ("orientation", "dtype"))
        _remark(console, f"axes as stored; they point to {_counted(codes)}; voxel type {_counted(types)}")
        _block(console, _grey_values(found))
        _remark(console, "0.5 % … std: medians over cases")
        if len(found.dataset.label_names) > 1:
            _block(console, _structures(found))
            console.print()
        _fit(found, console)
    if found.notes:
        _list(console, "[bold cyan]Worth knowing[/]", found.notes)
    _problems(found.problems, console)


def _cases_line(found: "Fingerprint") -> str:
    count = len(found.cases)
    patients = {case.group or case.name for case in found.dataset.cases}
    text = str(count)
    if 0 < len(patients) < len(found.dataset):
        text += f" of {len(patients)} patients"
    broken = {p.where for p in found.problems}
    return text if not broken else f"{text} sound, problems with {len(broken)} {_plural('file', len(broken))}"


def _splits_line(found: "Fingerprint") -> str:
    splits = found.dataset.splits
    if splits is None:
        patients = {case.group or case.name for case in found.dataset.cases}
        few = len(patients) < 5
        return "none given" if few else "none given; five folds are drawn with a fixed seed"
    sizes = sorted({(len(s.train), len(s.validation)) for s in splits})
    shown = " or ".join(f"{train} + {validation}" for train, validation in sizes[:3])
    return f"{len(splits)} in splits_final.json (training + validation: {shown})"


def _geometry(cases: Sequence["CaseFacts"]) -> Table:
    alone = len(cases) == 1
    table = _table("Geometry", "", *([""] if alone else ["smallest", "median", "largest"]))
    table.show_header = not alone
    axes = range(3)

    def row(name: str, values: Sequence[Sequence[Number]], form: Callable[[Number], str]) -> None:
        columns = [sorted(v[a] for v in values) for a in axes]
        picks = [[median(c) for c in columns]]
        if not alone:  # each axis on its own
            picks = [[c[0] for c in columns], *picks, [c[-1] for c in columns]]
        table.add_row(name, *(" × ".join(form(x) for x in pick) for pick in picks))

    row("voxels", [c.shape for c in cases], lambda x: f"{x:.0f}")
    row("voxel size, mm", [c.spacing for c in cases], lambda x: f"{x:.4g}")
    row(
        "extent, mm",
        [[n * s for n, s in zip(c.shape, c.spacing, strict=True)] for c in cases],
        lambda x: f"{x:.0f}",
    )
    return table


def _grey_values(found: "Fingerprint") -> Table:
    table = _table(
        "Grey values",
        "channel",
        "where",
        "0.5 %",
        "median",
        "99.5 %",
        "mean",
        "std",
        "min … max over all cases",
    )
    for index, name in enumerate(found.dataset.channel_names):
        everywhere = [c.intensities[index] for c in found.cases]
        inside = [c.foreground[index] for c in found.cases if c.foreground]
        for where, values in (("scan", everywhere), ("structures", inside)):
            if values:
                middle = [
                    _number(median([getattr(v, key) for v in values]))
                    for key in ("low", "median", "high", "mean", "std")
                ]
                span = (
                    f"{_number(min(v.minimum for v in values))} … {_number(max(v.maximum for v in values))}"
                )
                table.add_row(Text(name if where == "scan" else ""), where, *middle, span)
    return table


def _each_case(found: "Fingerprint") -> Table:
    structures = [number for number in found.dataset.label_names if number]
    table = _table(
        "Cases", "case", "voxels", "voxel size, mm", "axes", *(f"label {n}, ml" for n in structures)
    )
    for case in found.cases:
        table.add_row(
            Text(case.name),
            " × ".join(map(str, case.shape)),
            " × ".join(f"{s:.4g}" for s in case.spacing),
            case.orientation,
            *(_number(case.volumes_ml.get(n, 0.0)) for n in structures),
        )
    return table


def _structures(found: "Fingerprint") -> Table:
    table = _table("Structures", "label", "cases", "min ml", "median ml", "max ml", "median share of scan")
    for number, name in found.dataset.label_names.items():
        if not number:
            continue
        present = [c for c in found.cases if number in c.volumes_ml]
        if not present:
            table.add_row(Text(f"{number} {name}"), f"0 of {len(found.cases)}", "", "", "", "")
            continue
        volumes = sorted(c.volumes_ml[number] for c in present)
        share = median([c.voxels[number] / sum(c.voxels.values()) for c in present])
        table.add_row(
            Text(f"{number} {name}"),
            f"{len(present)} of {len(found.cases)}",
            *(_number(v) for v in (volumes[0], median(volumes), volumes[-1])),
            f"{100 * share:.2g} %",
        )
    return table


def _fit(found: "Fingerprint", console: Console) -> None:
    fit = found.fit
    if fit is None:
        return
    how = "padded with zeros" if fit.kind == "pad" else "resized"
    size, grid = (" × ".join(map(str, n)) for n in (fit.shape, fit.grid))
    _list(
        console,
        "[bold]For the paper's variants[/]",
        [
            f"scans {how} to {size} (fit {fit.kind}), {fit.blocks} encoder {_plural('block', fit.blocks)}",
            f"low-resolution grid {grid}, latent length {fit.latent}",
            *_preset_line(found.dataset.layout),
        ],
    )


def _preset_line(layout: str) -> list[str]:
    """The paper's own settings, for data sets that are named as the paper's are."""
    presets = {
        "brats": ("brats2020", "256 × 256 × 160, padded"),
        "lits": ("lits", "512 × 512 × 512, resized"),
    }
    for family, (preset, size) in presets.items():
        if layout.startswith(family):
            return [f"the paper's own settings for such data: --preset {preset} ({size})"]
    return []


def _problems(problems: Sequence["Problem"], console: Console) -> None:
    if not problems:
        console.print("[bold green]No problems.[/]")
        return
    console.print(f"[bold red]{len(problems)} {_plural('problem', len(problems))}[/]")
    alike: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        alike.setdefault((problem.reason, problem.fix), []).append(problem.where)
    shown = sorted(alike.items(), key=lambda item: item[1][0])[:_SHOWN]
    for (reason, fix), files in shown:
        # Paths are not wrapped, so that they can be copied.
        for file in files[:_FILES]:
            console.print(f"  {file}", style="bold", markup=False, soft_wrap=True)
        if len(files) > _FILES:
            console.print(f"  … and {len(files) - _FILES} more")
        console.print(f"    {reason}.", markup=False, soft_wrap=True)
        console.print(f"    Fix: {fix}.", style="cyan", markup=False, soft_wrap=True)
    if len(alike) > _SHOWN:
        console.print(f"  … and {len(alike) - _SHOWN} more kinds; --json lists all.")


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        header_style="dim",
        padding=(0, 2, 0, 0),
    )
    for index, column in enumerate(columns):
        text = index == 0 or column == "where"
        table.add_column(column, justify="left" if text else "right", overflow="fold" if text else "ellipsis")
    return table


def _block(console: Console, table: Table) -> None:
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    if not table.title:
        console.print()


def _remark(console: Console, text: str) -> None:
    console.print(f"  {text}", style="dim", markup=False)
    console.print()


def _list(console: Console, title: str, lines: Sequence[str]) -> None:
    console.print(title)
    table = Table.grid(padding=(0, 1))
    for line in lines:
        table.add_row("  •", Text(line))
    console.print(table)
    console.print()


def _number(value: Number) -> str:
    """Four digits that count."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _counted(counter: Counter[str]) -> str:
    pairs = counter.most_common()
    return pairs[0][0] if len(pairs) == 1 else ", ".join(f"{name} ({count})" for name, count in pairs)


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"

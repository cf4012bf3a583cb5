"""All variants trained on one data set under the same wall-clock, and their scores on whole scans side by side.

    python benchmarks/accuracy.py DATA runs --minutes 60 --set runtime.threads=1 --only default --only monai-unet-muon
    python benchmarks/accuracy.py --table

Each training is `ossnet train` as a user calls it, one after the other. What is finished is not done again, what was
stopped goes on; results go to `benchmarks/results/DATA_VARIANT_MINUTES.json`. `--table` lists what is recorded there.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import machine, write
from record_run import RESULTS, read

from ossnet.field.model import versions
from ossnet.training.run_folder import STATE

_OURS = ("optimiser.name=muon", "optimiser.lr=2e-3", "schedule.kind=root")
_CROPS = (
    "optimiser.weight_decay=0.01",
    "optimiser.clip_norm=5",
    "optimiser.ema=0.995",
    "schedule.batch_size=1",
    "loss.kind=dice",
    "augmentation.flip_axes=[]",
)
RIVALS: dict[str, tuple[str, Sequence[str]]] = {
    "default": ("multiscale", ()),
    "monai-unet": ("monai-unet", ()),
    "monai-unet-muon": ("monai-unet", _OURS),
    # The paper's U-Net on patches, with all that is not the network as the default variant has it.
    "unet3d": ("unet3d", (*_OURS, *_CROPS)),
    # With 2^14 locations a volume, as in the paper, an hour of a core holds some fifty steps.
    "C": ("C", ("sampling.locations=1024", "augmentation.flip_axes=[]", "runtime.precision=bf16-mixed")),
}
PATCHES = {"hippocampus": "32,48,32", "acdc": "160,160,8", "left_atrium": "144,96,64"}
"""Of the paper's U-Net, which halves every axis alike."""


def arguments(data: Path, out: Path, rival: str, minutes: float, changes: Sequence[str]) -> list[str]:
    """What follows `ossnet`."""
    variant, own = RIVALS[rival]
    settings = [*own, *changes]
    if variant == "unet3d":
        settings.append(f"network.patch_shape={PATCHES[_short(data)]}")
    single = [part for setting in settings for part in ("--set", setting)]
    head = ["train", "--data", str(data), "--out", str(out), "--minutes", f"{minutes:g}"]
    return [*head, *(() if rival == "default" else ("--variant", variant)), *single]


def _short(data: Path) -> str:
    """Dataset101_LeftAtrium: left_atrium."""
    name = data.name.partition("_")[2] or data.name
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def train(data: Path, runs: Path, rival: str, minutes: float, changes: Sequence[str], note: str) -> None:
    """One training to its end, and its record."""
    name = f"{_short(data)}_{rival.replace('-', '_').lower()}_{minutes:g}"
    out = runs / name
    asked = arguments(data, out, rival, minutes, changes)
    if not (out / "validation.json").exists():
        resume = ["--resume"] if (out / STATE).exists() else []
        subprocess.run([sys.executable, "-m", "ossnet", *asked, *resume], check=True)
    told = " ".join(["ossnet", *asked]).replace(str(data), data.name).replace(str(out), "RUN")
    about = {"command": told, "note": note, "machine": machine(), "versions": versions()}
    write(RESULTS / f"{name}.json", about | read(out))


def table() -> None:
    """Every recorded training: data and time from its command, scores of the mean of its structures."""
    lines = []
    for file in sorted(RESULTS.glob("*.json")):
        record: dict[str, Any] = json.loads(file.read_text())
        if not record.get("dense") or "--minutes" not in record.get("command", ""):
            continue
        words = record["command"].split()
        scores = record["dense"][-1]["estimates"]
        dice, hd95, assd = (scores[key] for key in ("dice", "hd95_mm", "assd_mm"))
        lines.append(
            f"{file.stem:34s} {words[words.index('--minutes') + 1]:>4s} min {record['curve'][-1]['step']:7.0f} steps  "
            f"Dice {dice['mean']:.3f} [{dice['low']:.3f}, {dice['high']:.3f}]  HD95 {hd95['mean']:6.2f} mm  "
            f"ASSD {assd['mean']:.2f} mm"
        )
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", action="append", choices=RIVALS)
    parser.add_argument("--set", action="append", dest="changes", default=[])
    parser.add_argument("--note", default="")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        table()
        return
    if given.data is None or given.runs is None:
        parser.error("name a data set and a folder for the runs")
    wanted = given.only or [*RIVALS]
    if "unet3d" in wanted and _short(given.data.resolve()) not in PATCHES:
        parser.error(f"{given.data.name}: add the patches of unet3d to PATCHES, or choose others with --only")
    for rival in wanted:
        train(given.data.resolve(), given.runs, rival, given.minutes, given.changes, given.note)


if __name__ == "__main__":
    main()

"""What the parts of the default network are worth: short trainings with one change each, one seed.

    python benchmarks/ablation.py Dataset101_LeftAtrium runs/ablation --minutes 5 --output FILE.json

Each training is that of `ossnet train` with its whole schedule inside the time given, one after the other; what is
finished is not done again. Differences below about 0.01 Dice mean nothing with one seed. `--steps 1000` in place of the
minutes compares parts at equal steps, where other work on the machine changes nothing but the time it takes.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from measuring import machine, write
from record_run import read

from ossnet.data.crops import CropSettings
from ossnet.field.model import versions
from ossnet.networks.multiscale import MultiscaleSpec, offsets_in_cells
from ossnet.networks.multiscale_plan import MultiscalePlan
from ossnet.networks.multiscale_plan import plan as full_plan
from ossnet.training.recipes.multiscale import crop_settings as full_crops
from ossnet.training.settings import make_settings
from ossnet.training.train import train


@dataclass(frozen=True)
class Change:
    """One difference from the default."""

    settings: tuple[str, ...] = ()
    spec: Callable[[MultiscaleSpec], MultiscaleSpec] = lambda spec: spec
    crops: Callable[[CropSettings], CropSettings] = lambda crops: crops
    offsets: bool = True


CHANGES: dict[str, Change] = {
    "default": Change(),
    "AdamW 1e-3 for all weights": Change(("optimiser.name=adamw", "optimiser.lr=1e-3")),
    "AdamW 2e-3 for all weights": Change(("optimiser.name=adamw", "optimiser.lr=2e-3")),
    "AdamW 4e-3 for all weights": Change(("optimiser.name=adamw", "optimiser.lr=4e-3")),
    "no augmentation": Change(("augmentation.spatial=false", "augmentation.intensity=0")),
    "locations near surfaces count in full": Change(("sampling.importance=0",)),
    "half of the weights' logarithm": Change(("sampling.importance=0.5",)),
    "no raw patch": Change(spec=lambda spec: replace(spec, patch=(1, 1, 1), patch_features=0)),
    "no offsets": Change(offsets=False),
    "decoder of width 64": Change(spec=lambda spec: replace(spec, decoder_width=64)),
    "hard targets": Change(crops=lambda crops: replace(crops, soft=False)),
    "no top-down path": Change(spec=lambda spec: replace(spec, top_down=False)),
    "a quarter of soft Dice": Change(("loss.dice=0.25",)),
    "no deep supervision": Change(("loss.aux=0",)),
    "cosine": Change(("schedule.kind=cosine",)),
}


def run(data: Path, out: Path, change: Change, length: Sequence[str], threads: int) -> None:
    """One training; `out` is left alone when it is finished."""
    if (out / "validation.json").is_file():
        return

    def plan(*args: object, **options: object) -> MultiscalePlan:
        chosen = full_plan(*args, **options)  # type: ignore[arg-type]
        return replace(chosen, spec=change.spec(chosen.spec))

    def crops(*args: object) -> CropSettings:
        return change.crops(full_crops(*args))  # type: ignore[arg-type]

    def offsets(locations: torch.Tensor, spec: MultiscaleSpec) -> torch.Tensor:
        found = offsets_in_cells(locations, spec)
        return found if change.offsets else torch.zeros_like(found)

    settings = make_settings(
        changes=[
            *length,
            f"runtime.threads={threads}",
            "runtime.tensorboard=false",
            "validation.picture=false",
            *change.settings,
        ]
    )
    with (
        mock.patch("ossnet.training.planning.plan", plan),
        mock.patch("ossnet.training.recipes.multiscale.crop_settings", crops),
        mock.patch("ossnet.networks.multiscale.offsets_in_cells", offsets),
        mock.patch("ossnet.field.engine.blockwise.answer.offsets_in_cells", offsets),
    ):
        resume = (out / "settings.json").is_file()
        train(data, out, settings, resume=resume, say=lambda text: print(text, flush=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--steps", type=int, help="in place of minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", choices=list(CHANGES))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    length = [f"schedule.minutes={given.minutes}"]
    if given.steps:
        length = ["schedule.minutes=none", "schedule.epochs=1", f"schedule.steps_per_epoch={given.steps}"]
    results = {}
    for name, change in CHANGES.items():
        if given.only and name not in given.only:
            continue
        out = given.runs / name.replace(" ", "_")
        print(name, flush=True)
        run(given.data, out, change, length, given.threads)
        found = read(out)
        mean = found["dense"][-1]["estimates"]
        results[name] = {
            "steps": found["curve"][-1]["step"],
            **{key: mean[key] for key in ("dice", "hd95_mm", "assd_mm")},
        }
        print(json.dumps(results[name]), flush=True)
        write(
            given.output,
            {
                "what": "Short trainings of the default network with one change each; dense, no component filter",
                "data": given.data.name,
                "minutes": None if given.steps else given.minutes,
                "seed": 0,
                "threads": given.threads,
                "runs": results,
                "machine": machine(),
                "versions": versions(),
            },
        )


if __name__ == "__main__":
    main()

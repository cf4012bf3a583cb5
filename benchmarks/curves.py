"""Dice over time of the trainings that the README compares, from their records, as a picture.

    python benchmarks/curves.py docs/curves.png

Sampled Dice: at locations of the cases left out, half of them near structures. Slow networks are judged on fewer cases
while they train; whole scans decide (`accuracy.py --table`).
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from record_run import RESULTS

DATA = {
    "left_atrium": ("left atrium", (0.75, 0.94)),
    "hippocampus": ("hippocampus", (0.75, 0.91)),
    "acdc": ("heart (ACDC)", (0.5, 0.92)),
}
CURVES = {
    "default": ("tab:blue", ("acdc_default_60", "{}_default")),
    "MONAI's UNet": ("tab:orange", ("{}_monai_unet_muon_60", "{}_monai_unet_muon")),
    "the paper's U-Net": ("tab:green", ("{}_unet3d_60",)),
    "variant C, reduced": ("tab:red", ("{}_c_60", "{}_c_20")),
}
"""Colour, and where the record is; the first of those that there are."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    figure, axes = plt.subplots(1, len(DATA), figsize=(11, 3.4), layout="constrained")
    for axis, (data, (title, limits)) in zip(axes, DATA.items(), strict=True):
        for name, (colour, places) in CURVES.items():
            files = [RESULTS / f"{place.format(data)}.json" for place in places if data in place.format(data)]
            record = json.loads(next(file for file in files if file.exists()).read_text())
            rows = record["curve"]
            axis.plot(
                [r["seconds"] / 60 for r in rows], [r["dice"] for r in rows], ".-", color=colour, label=name
            )
        axis.set(title=title, xlabel="minutes of one core", ylim=limits, xlim=(0, 62))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("sampled Dice")
    axes[1].legend(loc="lower right")  # where no curve runs
    figure.savefig(given.output, dpi=110)


if __name__ == "__main__":
    main()

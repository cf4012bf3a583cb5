"""Put the model of a training run into the package, in 16 bits, with its dense figures in the card.

    python benchmarks/ship.py runs/hippocampus --name hippocampus

Rounding is judged: the shipped model segments the validation cases again, and its figures are those of the card.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ossnet.data.cache import load_case
from ossnet.data.layouts import open_dataset
from ossnet.evaluation.metrics import compare
from ossnet.evaluation.tables import Row, format_estimate, summarise
from ossnet.field.model import SHIPPED, Model
from ossnet.training.calibration import asked, calibrate

ABOUT: dict[str, dict[str, str]] = {
    "hippocampus": {
        "Source of the data": "Medical Segmentation Decathlon, task 4, Antonelli et al., Nature Communications 13 "
        "(2022) 4128; Vanderbilt University Medical Center",
        "Licence of the data and of these weights": "CC-BY-SA 4.0",
        "Scans": "T1-weighted MRI of adults, 1 mm, cut out around one hippocampus (about 35 × 50 × 35 voxels)",
        "Trained with": "ossnet train --data Dataset004_Hippocampus --out RUN --minutes 60 "
        '--set "augmentation.flip_axes=[0]" --set runtime.threads=1 --set runtime.workers=1',
    }
}
USE = {
    "hippocampus": "To try ossnet at once, and to outline anterior and posterior hippocampus in a 1 mm T1-weighted "
    "MRI that is cut out around one hippocampus as the training scans are. A whole head must be cropped first: "
    "the network has never seen what lies further away."
}


def judged(model: Model, data: Path, names: list[str]) -> dict[str, Any]:
    """Dense scores of validation cases: one line a structure and measure."""
    dataset = open_dataset(data)
    rows = []
    for name in names:
        volume, labels = dataset.read(dataset[name])
        found = model.field(volume, device="cpu").segment()
        scores = compare(found.data, labels.data, labels.affine, model.label_names, 1.0)
        rows += [Row(name, label, model.label_names[label], value) for label, value in scores.items()]
    summary = summarise(rows)
    out: dict[str, Any] = {}
    for entry in summary.classes:
        shown = {key: format_estimate(key, entry.estimates[key]) for key in ("dice", "hd95_mm", "assd_mm")}
        out[f"{entry.name}, {len(names)} validation cases"] = {
            k.replace("_", " "): v for k, v in shown.items()
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True, choices=sorted(ABOUT))
    parser.add_argument("--data", required=True, type=Path)
    given = parser.parse_args()
    model = Model.load(given.run)
    folder = SHIPPED / given.name
    model.metadata.pop("whole_scans", None)  # of weights that are not rounded
    model.metadata |= {"about": ABOUT[given.name], "use": USE[given.name]}
    model.save(folder, half=True)
    shipped = Model.load(folder)
    validation = json.loads((given.run / "splits.json").read_text())["val"]
    shipped.metadata["metrics"] = judged(shipped, given.data, validation)
    dataset = open_dataset(given.data)
    cases = [load_case(dataset, dataset[n], shipped.preparation, shipped.classes) for n in validation]
    calibrate(shipped, (asked(shipped.field(case.volume()), case) for case in cases))
    shipped.save(folder, half=True)
    size = (folder / "weights.safetensors").stat().st_size
    print(f"{folder}: {size / 1e6:.2f} MB\n{shipped.card()}")


if __name__ == "__main__":
    main()

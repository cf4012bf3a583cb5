"""The demo: train on the back of a real brain scan, segment its front, judge the result.

The scan is the MNI152 template, a T1-weighted average of 152 adults (Fonov et al. 2009), with its maps of
grey and white matter, as the package nilearn ships them. The template is symmetric: its right half is the
mirror image of the left, voxel by voxel. A split into hemispheres would therefore test on what was trained
on; front and back share no voxel and no mirror image.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from ossnet.colours import colour
from ossnet.errors import SettingsError
from ossnet.evaluation.metrics import Scores, compare
from ossnet.evaluation.tables import Row, summarise, to_csv, to_json
from ossnet.experiments.hippocampi import CENTRES, MODEL, Hippocampi, segment_hippocampi
from ossnet.field.field import Field
from ossnet.field.model import Model
from ossnet.files.atomic import write_json, write_text
from ossnet.reports.render import Surface, simplified, surface_of
from ossnet.training.loop import Listener, State
from ossnet.training.settings import make_settings
from ossnet.training.train import train
from ossnet.volume import Affine, LabelMap, Volume

NAMES = {1: "grey matter", 2: "white matter"}
PARTS = {"back": (24, 96), "middle": (98, 118), "front": (122, 212)}
"""Name → voxels along the template's second axis (posterior to anterior): training, validation, test."""
_BOX = (slice(20, 177), slice(0, 160))
"""Voxels along the other two axes that hold the brain and a margin."""
_MARKER = "demo.json"
TOLERANCE_MM = 1.0
_SLAB = 8
"""Coronal slices that are also asked everywhere, for comparison: all would take longer than the demo."""
_SETTINGS = (
    # All parts come from one image, so fixed grey values suit them better than each part's own statistics,
    # which follow how much background it has.
    "data.normalise=window",
    # Small crops: more steps in a minute.
    "sampling.crop_voxels=150000",
    "validation.dense=false",
    "runtime.tensorboard=false",
)


@dataclass(frozen=True)
class Part:
    """One part of the template.

    Attributes:
        image: (X, Y, Z) grey values 0 … 255.
        labels: (X, Y, Z) 0 background, 1 grey matter, 2 white matter.
        affine: 4×4 voxel index → MNI mm.
    """

    image: UInt8[np.ndarray, "X Y Z"]
    labels: UInt8[np.ndarray, "X Y Z"]
    affine: Affine


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        volume: The part that was held out.
        prediction: Its segmentation.
        reference: Its labels.
        scores: Class → scores of the prediction.
        thresholds: Two grey values fitted on the training part, for comparison.
        threshold_scores: Class → scores of what these two values give.
        losses: (seconds, loss) of every step.
        validations: Rows of the training log.
        surfaces: The predicted surfaces in MNI mm.
        hippocampi: What the shipped model says of this brain.
        evaluated: Locations asked.
        checked: Voxels of a slab that was also asked everywhere.
        differing: Voxels that differ there.
        seconds: Wall-clock time of `training`, `segmenting`, `surfaces`, `dense` (asking everywhere in that slab) and
            `whole`.
        parameters: Trainable numbers in the network.
        model_bytes: Size of the weights on disk.
        metadata: Of the model: settings, versions.
    """

    volume: Volume
    prediction: LabelMap
    reference: LabelMap
    scores: dict[int, Scores]
    thresholds: tuple[int, int]
    threshold_scores: dict[int, Scores]
    losses: list[tuple[float, float]]
    validations: list[dict[str, Any]]
    surfaces: tuple[Surface, ...]
    hippocampi: Hippocampi
    evaluated: int
    checked: int
    differing: int
    seconds: dict[str, float]
    parameters: int
    model_bytes: int
    metadata: dict[str, Any]


@dataclass
class _Recorder:
    """Keeps the learning curve and passes everything on."""

    then: Listener | None
    losses: list[tuple[float, float]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def step(self, state: State, loss: float, fraction: float) -> None:
        """After each step."""
        self.losses.append((state.seconds, loss))
        if self.then is not None:
            self.then.step(state, loss, fraction)

    def validated(self, row: dict[str, Any]) -> None:
        """After each validation."""
        self.rows.append(row)
        if self.then is not None:
            self.then.validated(row)


def run_demo(
    out: Path,
    minutes: float = 1.0,
    *,
    listener: Listener | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> DemoResult:
    """Make the data set, train, segment the part that was held out, and judge it.

    Args:
        out: Folder for `data/`, `run/`, the segmentation and its scores. An earlier demo there is replaced.
        minutes: Training time.
        listener: Told of steps and validations.
        say: Told in words what happens.

    Raises:
        SettingsError: nilearn is not installed, or `out` holds something else.
    """
    started = time.perf_counter()
    template = load_template()
    parts = cut_parts(template)
    _clear(out)
    write_dataset(parts, out / "data")
    say(f"data set written: {out / 'data'}")

    recorder = _Recorder(listener)
    changes = [f"schedule.minutes={minutes}", *_SETTINGS]
    begun = time.perf_counter()
    run = train(out / "data", out / "run", make_settings(changes=changes), listener=recorder, say=say)
    seconds = {"training": time.perf_counter() - begun}

    front = parts["front"]
    volume = Volume(front.image[None], front.affine)
    model = Model.load(run)
    begun = time.perf_counter()
    bound = model.field(volume)
    found = bound.segment()
    seconds["segmenting"] = time.perf_counter() - begun
    found.save(out / "front_seg.nii.gz")
    begun = time.perf_counter()
    surfaces = _surfaces(bound, found)
    seconds["surfaces"] = time.perf_counter() - begun
    begun = time.perf_counter()
    x, y, z = volume.shape
    slab = ((0, y // 2 - _SLAB // 2, 0), (x, y // 2 - _SLAB // 2 + _SLAB, z))
    dense = bound.segment(strategy="dense", region=slab).data
    seconds["dense"] = time.perf_counter() - begun
    differing = int((dense != found.data[:, slab[0][1] : slab[1][1]]).sum())

    say(f"hippocampi, with the model that is shipped: {MODEL}")
    hippocampi = segment_hippocampi(template.brain)
    hippocampi.labels.save(out / "hippocampi_seg.nii.gz")
    for side, crop in hippocampi.crops.items():
        crop.save(out / _crop_name(side))

    def judged(labels: Integer[np.ndarray, "X Y Z"]) -> dict[int, Scores]:
        scores = compare(labels, front.labels, front.affine, NAMES, TOLERANCE_MM)
        return {label: scores[label] for label in NAMES}

    scores = judged(found.data)
    rows = [Row("front", label, NAMES[label], value) for label, value in scores.items()]
    write_text(out / "scores.csv", to_csv(rows))
    write_json(out / "scores.json", to_json(rows, summarise(rows), TOLERANCE_MM))
    thresholds = fit_thresholds(parts["back"].image, parts["back"].labels)
    simple = np.digitize(front.image, thresholds).astype(np.uint8)
    seconds["whole"] = time.perf_counter() - started
    return DemoResult(
        volume=volume,
        prediction=LabelMap(found.data, found.affine, names=NAMES),
        reference=LabelMap(front.labels, front.affine, names=NAMES),
        scores=scores,
        thresholds=thresholds,
        threshold_scores=judged(simple),
        losses=recorder.losses,
        validations=recorder.rows,
        surfaces=surfaces,
        hippocampi=hippocampi,
        evaluated=found.evaluated,
        checked=dense.size,
        differing=differing,
        seconds=seconds,
        parameters=sum(p.numel() for p in model.network.parameters()),
        model_bytes=sum(f.stat().st_size for f in (run / "model").glob("*.safetensors")),
        metadata=dict(model.metadata),
    )


def _surfaces(bound: Field, found: LabelMap) -> tuple[Surface, ...]:
    """White matter by the field's values between the voxels, grey matter around its voxels.

    A surface of the field asks a few hundred thousand points more; of one structure this shows as much as of
    two, and vertices are not moved further onto the surface, for the sake of the clock.
    """
    mesh = bound.mesh(2, refine_steps=0, labels=found)
    vertices = np.asarray(mesh.vertices, dtype=np.float64)
    white = None
    if len(vertices):
        white = Surface(NAMES[2], *simplified(vertices, np.asarray(mesh.faces), 60_000), colour(2))
    grey = surface_of(found, 1, NAMES[1], colour(1), 40_000)
    return tuple(surface for surface in (white, grey) if surface is not None)


@dataclass(frozen=True)
class Template:
    """The MNI152 template.

    Attributes:
        brain: (1, X, Y, Z) grey values 0 … 255, 1 mm.
        labels: (X, Y, Z) 0 background, 1 grey matter, 2 white matter.
    """

    brain: Volume
    labels: UInt8[np.ndarray, "X Y Z"]


def load_template() -> Template:
    """Read the template and its tissue maps; nothing is downloaded.

    Raises:
        SettingsError: nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError:
        raise SettingsError(
            "demo",
            "the package nilearn, which ships the scan, is not installed",
            'pip install "ossnet[demo]"',
        ) from None
    scan, grey, white = (
        getattr(datasets, f"load_mni152_{name}")(resolution=1)
        for name in ("template", "gm_template", "wm_template")
    )
    image = np.round(scan.get_fdata() * 255).clip(0, 255).astype(np.uint8)
    brain = Volume(image[None], np.array(scan.affine, dtype=np.float64))
    return Template(brain, tissue_labels(grey.get_fdata(), white.get_fdata()))


def cut_parts(template: Template) -> dict[str, Part]:
    """The template cut into `PARTS`."""
    parts = {}
    for name, (low, high) in PARTS.items():
        box = (_BOX[0], slice(low, high), _BOX[1])
        affine = template.brain.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ [b.start for b in box]
        image, labels = template.brain.data[0][box], template.labels[box]
        parts[name] = Part(np.ascontiguousarray(image), np.ascontiguousarray(labels), affine)
    return parts


def tissue_labels(grey: np.ndarray, white: np.ndarray) -> UInt8[np.ndarray, "X Y Z"]:
    """0, 1 or 2: the tissue that is more probable than one half, grey matter where both are exactly so."""
    labels = np.zeros(grey.shape, np.uint8)
    labels[(grey >= 0.5) & (grey >= white)] = 1
    labels[(white >= 0.5) & (white > grey)] = 2
    return labels


def write_dataset(parts: dict[str, Part], folder: Path) -> None:
    """Write a data set in nnU-Net's layout: `back` trains, `middle` validates, `front` is the test."""
    for name, part in parts.items():
        kind = "Ts" if name == "front" else "Tr"
        Volume(part.image[None], part.affine).save(folder / f"images{kind}" / f"{name}_0000.nii.gz")
        LabelMap(part.labels, part.affine, names=NAMES).save(folder / f"labels{kind}" / f"{name}.nii.gz")
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, **{name: label for label, name in NAMES.items()}},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "reference": "MNI152 2009a symmetric (Fonov et al.), shipped by nilearn; tissue maps cut at one half",
    }
    write_json(folder / "dataset.json", description)
    write_json(folder / "splits_final.json", [{"train": ["back"], "val": ["middle"]}])


def fit_thresholds(
    image: UInt8[np.ndarray, "X Y Z"], labels: Integer[np.ndarray, "X Y Z"]
) -> tuple[int, int]:
    """The two grey values whose three ranges have the best mean Dice: background, grey, white matter."""
    counts = np.stack([np.bincount(image[labels == k], minlength=256) for k in range(3)])
    # below[k, t]: voxels of class k darker than t
    below = np.concatenate([np.zeros((3, 1), int), np.cumsum(counts, axis=1)], axis=1)
    total, all_below = counts.sum(axis=1), below.sum(axis=0)
    low, high = np.meshgrid(np.arange(257), np.arange(257), indexing="ij")
    grey = 2 * (below[1, high] - below[1, low]) / (all_below[high] - all_below[low] + total[1])
    white = 2 * (total[2] - below[2, high]) / (all_below[256] - all_below[high] + total[2])
    mean = np.where(low <= high, grey + white, -1)
    best = np.unravel_index(int(mean.argmax()), mean.shape)
    return int(best[0]), int(best[1])


def _crop_name(side: str) -> str:
    """Of what is cut out around a hippocampus, to try the shipped model on."""
    return f"hippocampus_{side}.nii.gz"


def _clear(out: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / _MARKER).is_file():
            raise SettingsError(out, "the folder holds other files", "Choose another folder for --out")
        for name in ("data", "run"):
            shutil.rmtree(out / name, ignore_errors=True)
        crops = [_crop_name(side) for side in CENTRES]
        written = ("front_seg.nii.gz", "hippocampi_seg.nii.gz", "scores.csv", "scores.json", "index.html")
        for name in (*written, *crops):
            (out / name).unlink(missing_ok=True)
    write_text(out / _MARKER, json.dumps({"made by": "ossnet demo"}) + "\n")

"""What the demo says about itself."""

from collections.abc import Mapping
from typing import Any

from ossnet.evaluation.metrics import DISTANCE_RULE, Scores
from ossnet.experiments.demo import NAMES, TOLERANCE_MM, DemoResult
from ossnet.experiments.hippocampi import Hippocampi
from ossnet.reports.charts import Line, line_chart, smoothed
from ossnet.reports.figures import overlay
from ossnet.reports.page import Chart, Headline, Page, Section, SliceView, SurfaceView, Table, Text


def demo_page(result: DemoResult) -> Page:
    """The page of one run of the demo."""
    voxels = result.prediction.data.size
    mean = _mean_dice(result.scores)
    seconds = result.seconds
    return Page(
        title="A network that answers at any point of a brain scan",
        summary="A small network was trained here, just now, on the back of a brain scan. It then segmented "
        "the front, which it had never seen, by asking only near the surfaces.",
        headlines=(
            Headline(f"{mean:.3f}", "mean Dice", "on the part that was held out"),
            Headline(_time(seconds["training"]), "training", "from random weights, on this machine"),
            Headline(f"{seconds['segmenting']:.1f} s", "segmenting", f"{voxels / 1e6:.1f} million voxels"),
            Headline(
                f"{100 * result.evaluated / voxels:.0f} %",
                "of the voxels asked",
                f"{result.evaluated:,} of {voxels:,}",
            ),
            Headline(f"{result.model_bytes / 1e6:.1f} MB", "model", f"{result.parameters:,} parameters"),
        ),
        sections=(
            Section("The part it had never seen", (_slices(result),)),
            Section("The surface", (_surfaces(result),)),
            Section("How good it is", _quality(result)),
            Section("What this shows, and what it does not", (_honesty(result),)),
            Section("How it learned", _learning(result)),
            Section("Asking near surfaces against asking everywhere", _asking(result)),
            Section("A trained model, tried on this brain: hippocampus", _hippocampi(result.hippocampi)),
        ),
        footer="Scan: MNI152 2009a symmetric template, V. S. Fonov et al., NeuroImage 47 (2009) S102, as "
        "shipped by nilearn. © 1993–2004 Louis Collins, McConnell Brain Imaging Centre, Montreal "
        "Neurological Institute, McGill University. Hippocampus model: trained on the Medical Segmentation "
        "Decathlon, task 4 (Antonelli et al., Nature Communications 13 (2022) 4128), CC-BY-SA 4.0.",
        details=_details(result),
    )


def _slices(result: DemoResult) -> SliceView:
    picture = overlay(result.volume, result.prediction, result.reference)
    return SliceView(
        result.volume,
        result.prediction,
        result.reference,
        picture,
        "Slices of the front of the brain in three planes with outlines of grey and white matter",
        "Drag in any plane to move through the scan. “Difference” marks every voxel where prediction and "
        "reference disagree.",
    )


def _surfaces(result: DemoResult) -> SurfaceView | Text:
    if not result.surfaces:
        return Text(("Nothing was found in it, so there is no surface: train for longer (--minutes).",))
    return SurfaceView(
        result.surfaces,
        "White matter: the surface on which the network finds it as likely as not, between the voxels. Grey "
        "matter is drawn around its voxels. Drag to turn, pinch or Ctrl + wheel to zoom; hide grey matter to "
        "see what lies below it. The flat side is where the scan was cut.",
    )


_COLUMNS = (
    "",
    "Dice",
    "IoU",
    "HD95",
    "mean distance",
    f"surface Dice at {TOLERANCE_MM:g} mm",
    "volume difference",
)


def _quality(result: DemoResult) -> tuple[Table | Text, ...]:
    low, high = result.thresholds
    rows = [(NAMES[label], *_cells(scores)) for label, scores in result.scores.items()]
    simple = [
        (f"{NAMES[label]}, by two thresholds", *_cells(scores))
        for label, scores in result.threshold_scores.items()
    ]
    return (
        Table(_COLUMNS, (*rows, *simple), DISTANCE_RULE, strong=tuple(range(len(rows)))),
        Text(
            (
                f"For comparison, what two grey values give ({low} and {high} of 255, fitted on the "
                f"training part): {_mean_dice(result.threshold_scores):.3f} on average. The template is so "
                "clean that brightness alone says nearly everything about tissue, so a high figure here is "
                "no feat, and a minute of training may not beat it. Organs and tumours cannot be found "
                "this way.",
            )
        ),
    )


def _mean_dice(scores: Mapping[int, Scores]) -> float:
    return sum(s.dice or 0.0 for s in scores.values()) / len(scores)


def _cells(scores: Scores) -> tuple[str, ...]:
    def number(value: float | None, pattern: str, unit: str = "") -> str:
        return "–" if value is None else format(value, pattern) + unit

    return (
        number(scores.dice, ".3f"),
        number(scores.iou, ".3f"),
        number(scores.hd95_mm, ".2f", " mm"),
        number(scores.assd_mm, ".2f", " mm"),
        number(scores.surface_dice, ".3f"),
        number(scores.volume_difference_percent, "+.1f", " %"),
    )


def _honesty(result: DemoResult) -> Text:
    return Text(
        (
            "Held out: the front of the brain. Training saw only the back; a strip between the two served to "
            "draw the learning curve and to pick the best state, and a few millimetres on either side of it "
            "were left out. The template is exactly symmetric, so a split into left and right would have "
            "tested on mirror images of the training data.",
            "It shows that everything works on this machine, from files through training to a segmentation and "
            "its surface, and that the network learned a rule that carries over to anatomy it had not seen.",
            "It does not show how well any of this works on other people, scanners or diseases: the scan is "
            "one smooth average of 152 healthy adults, all parts come from that same image, and the "
            "reference was computed from it by a program. One scan gives no confidence interval.",
        ),
        emphasis=True,
    )


def _learning(result: DemoResult) -> tuple[Chart | Text, ...]:
    blocks: list[Chart | Text] = []
    loss = line_chart(
        [Line("loss", smoothed([v for _, v in result.losses], [t for t, _ in result.losses]))],
        "seconds of training",
        "training loss",
    )
    structures = [
        Line(name, [(row["seconds"], row[f"dice {name}"]) for row in result.validations], series, dots=True)
        for (label, name), series in zip(NAMES.items(), (2, 1), strict=True)
        if all(f"dice {name}" in row for row in result.validations)
    ]
    if loss:
        blocks.append(Chart(loss, f"{len(result.losses):,} steps."))
    dice = line_chart(structures, "seconds of training", "Dice", y_range=(0.0, 1.0))
    if dice:
        blocks.append(
            Chart(dice, "Dice at random locations of the strip between the two parts, while training.")
        )
    return tuple(blocks)


def _asking(result: DemoResult) -> tuple[Table | Text, ...]:
    voxels = result.prediction.data.size
    seconds = result.seconds
    return (
        Text(
            (
                "The answer at one point does not need the answers around it. So the network is asked on a "
                "coarse lattice first, then only where the label changes, until every surface is enclosed by "
                "answers. What comes out is what asking everywhere gives; only a structure that no question "
                "happened to hit could be missing, as a whole.",
            )
        ),
        Table(
            ("", "locations asked", "share", "time"),
            (
                (
                    "near surfaces",
                    f"{result.evaluated:,}",
                    f"{100 * result.evaluated / voxels:.1f} %",
                    f"{seconds['segmenting']:.1f} s with the encoder",
                ),
                (
                    "everywhere",
                    f"{voxels:,}",
                    "100 %",
                    f"about {seconds['dense'] * voxels / result.checked:.0f} s",
                ),
            ),
            f"Asking everywhere was done in one slab, its time scaled up: {result.differing:,} of "
            f"{result.checked:,} voxels differ there. The folded cortex is nearly all surface, a hard case "
            "for this idea; compact organs need far less.",
            strong=(0,),
        ),
    )


def _hippocampi(found: Hippocampi) -> tuple[Text | SliceView | SurfaceView | Table, ...]:
    names = tuple(found.labels.names.values())
    scored = "; ".join(f"{name}: Dice {dice}" for name, dice in found.validation.items())
    rows = tuple((side, *(f"{ml[name]:.2f} ml" for name in names)) for side, ml in found.volumes_ml.items())
    blocks: list[Text | SliceView | SurfaceView | Table] = [
        Text(
            (
                "A model of the two parts of the hippocampus comes with the package: --model hippocampus.",
                "It learned from scans of patients that were cut out around one hippocampus, and has never seen "
                f"this brain. Both sides were cut out of it in the same way and answered in {found.seconds:.1f} s "
                f"({found.evaluated:,} of {found.asked:,} voxels asked).",
            )
        ),
        SliceView(
            found.volume,
            found.labels,
            None,
            overlay(found.volume, found.labels),
            "Slices through both hippocampi with outlines of their anterior and posterior parts",
            "The middle of the brain, both results in one picture. Drag to move through it.",
        ),
    ]
    if found.surfaces:
        blocks.append(
            SurfaceView(found.surfaces, "Left and right, anterior and posterior.", view=(150.0, 35.0))
        )
    blocks += [
        Table(("", *names), rows, "Volumes on the template, which averages 152 heads."),
        Text(
            (
                "Nobody outlined the hippocampi of this template in the way of the training data, so there is no "
                "score here, only the picture and the volumes. On scans of its own data that were held out: "
                f"{scored}.",
            ),
            emphasis=True,
        ),
    ]
    return tuple(blocks)


def _details(result: DemoResult) -> dict[str, str]:
    metadata: dict[str, Any] = result.metadata
    x, y, z = result.volume.shape
    found = {
        "Variant": str(metadata.get("variant", "")),
        "Held-out part": f"{x} × {y} × {z} voxels of {result.volume.spacing[0]:g} mm",
        "Whole demo": _time(result.seconds["whole"]),
    }
    versions = metadata.get("versions", {})
    if versions:
        found["Versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
    return found


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"

"""The card of a model, for people."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ossnet.data.preparation import Preparation
from ossnet.networks.registry import family_of

if TYPE_CHECKING:
    from ossnet.field.model import Model


def card(model: "Model") -> str:
    """`MODEL_CARD.md`: what it is, from what, how good, and what it is not for."""
    data = model.metadata.get("data", {})
    scores = {**model.metadata.get("whole_scans", {}), **model.metadata.get("metrics", {})}
    parameters = sum(p.numel() for p in model.network.parameters())
    lines = [
        f"# {data.get('name', 'Segmentation')} model, variant {model.variant}",
        "",
        f"- Structures: {', '.join(f'{model.label_values[k]} {v}' for k, v in model.label_names.items())}",
        f"- Input: {model.channels} channel(s) {', '.join(model.channel_names)}".rstrip(),
        f"- Network: {family_of(model.network)}, {parameters:,} parameters",
        f"- Preparation: {_preparation(model.preparation)}",
    ]
    if data:
        lines += [f"- Training data: {', '.join(f'{k} {v}' for k, v in data.items() if k != 'name')}"]
    lines += _training_lines(model.metadata.get("settings", {}))
    if model.mirror:
        count, axes = 2 ** len(model.mirror), _axes(model.mirror)
        lines += [f"- In use: the mean of {count} answers, also mirrored along {axes}"]
    else:
        lines += ["- In use: asked once"]
    if "temperature" in model.metadata:
        lines += [
            f"- Probabilities: calibrated on the cases left out (logits divided by {model.temperature:g})"
        ]
    if "source" in model.metadata:
        lines += [f"- Source: {model.metadata['source']}"]
    lines += [f"- {k}: {v}" for k, v in model.metadata.get("about", {}).items()]
    if scores:
        lines += ["", "## Figures", "", *(f"- {k}: {_number(v)}" for k, v in scores.items())]
    judged = (
        "It was judged on the data named above and on nothing else"
        if scores
        else "It has not been judged on cases that it was not trained on"
    )
    lines += [
        "",
        "## Use",
        "",
        *([model.metadata["use"], ""] if "use" in model.metadata else []),
        f"For research only: this is not a medical device. {judged}.",
        "",
        "## Versions",
        "",
        *(f"- {k} {v}" for k, v in model.metadata.get("versions", {}).items()),
    ]
    return "\n".join(lines) + "\n"


def _preparation(preparation: Preparation) -> str:
    """What happens to a scan first, in words; all numbers are in `model.json`."""
    size = " × ".join(f"{n:g}" for n in preparation.shape or preparation.spacing or ())
    fit = {
        "none": "kept as it is",
        "pad": f"padded with zeros to {size} voxels",
        "resize": f"resized to {size} voxels",
        "spacing": f"resampled to {size} mm",
    }[preparation.fit]
    values = {
        "zscore": "each channel brought to mean 0 and standard deviation 1",
        "window": "each channel clipped to a window of the training's foreground and scaled",
        "none": "grey values as they are",
    }[preparation.normalise]
    axes = "" if preparation.orientation == "canonical" else ", axes in the order of the file"
    return f"{fit}, {values}{axes}"


def _training_lines(settings: Mapping[str, Any]) -> list[str]:
    """What decided the training, from the settings that `training.settings` wrote."""
    schedule, optimiser = settings.get("schedule", {}), settings.get("optimiser", {})
    if not schedule or not optimiser:
        return []
    minutes = schedule.get("minutes")
    length = f"{minutes:g} minutes" if minutes else f"{schedule.get('epochs')} epochs"
    flips = settings.get("augmentation", {}).get("flip_axes", [])
    mirrored = f"mirrored along {_axes(flips)}" if flips else "not mirrored"
    return [
        f"- Training: {length}, {optimiser.get('name')}, batches of {schedule.get('batch_size')}, {mirrored}, "
        f"fold {settings.get('data', {}).get('fold')}, seed {settings.get('seed')}; all settings in model.json"
    ]


def _axes(axes: Sequence[int]) -> str:
    return f"{'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))}"


def _number(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_number(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)

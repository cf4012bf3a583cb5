"""How the channels of a data set are normalised: fixed windows for CT, scan by scan for everything else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ossnet.data.cases import Case, Dataset
from ossnet.data.preparation import ChannelWindow
from ossnet.errors import SettingsError
from ossnet.networks.variants import PAPER_VARIANTS
from ossnet.training.settings import Settings

_LOOKED_AT = 5
"""Scans whose darkest voxels say whether they are CT."""

_AIR, _PADDING = -500, -3100
"""Hounsfield units: CT holds darker voxels than the first (air is -1000), and none darker than the second."""

_WINDOWED = 50
"""Scans with a structure that CT windows are made from."""


@dataclass(frozen=True)
class Intensities:
    """What `Preparation` is told about intensities, and why."""

    normalise: Literal["zscore", "window", "none"]
    windows: tuple[ChannelWindow | None, ...]
    """One a channel for `window`; None for a channel that is normalised scan by scan."""
    reasons: tuple[str, ...]


def choose_intensities(dataset: Dataset, train: Sequence[Case], settings: Settings) -> Intensities:
    """Window the channels that are CT and bring the others to mean 0 and deviation 1, unless told otherwise.

    The paper's variants normalise CT as MRI (SPEC §3); only the default variant and the U-Nets choose by themselves.

    Raises:
        SettingsError: Windows are wanted and no training case has foreground.
        VolumeError: A scan that cannot be read.
    """
    if settings.data.normalise == "none":
        return Intensities("none", (), ("intensities taken as they are",))
    reasons: list[str] = []
    ct = _are_ct(dataset, train, settings, reasons)
    match settings.data.normalise:
        case "window":
            windowed = [True] * len(ct)
        case "auto" if settings.variant not in PAPER_VARIANTS:
            windowed = ct
        case _:
            windowed = [False] * len(ct)
    windows: list[ChannelWindow | None] = [None] * len(ct)
    if any(windowed):
        windows = _windows(dataset, train, windowed, settings.seed)
        listed = ", ".join(
            f"{w.low:.0f} to {w.high:.0f}" + (f" ({name})" if len(ct) > 1 else "")
            for w, name in zip(windows, dataset.channel_names, strict=True)
            if w is not None
        )
        reasons.append(f"intensities clipped to {listed}: percentiles 0.5 and 99.5 of the foreground")
    scaled = [name for name, window in zip(dataset.channel_names, windows, strict=True) if window is None]
    if scaled:
        what = f" ({', '.join(scaled)})" if any(windowed) else ""
        why = "" if any(windowed) or all(ct) else ", since they have no unit"
        reasons.append(f"intensities of every scan{what} brought to mean 0 and deviation 1{why}")
    if any(windowed):
        return Intensities("window", tuple(windows), tuple(reasons))
    return Intensities("zscore", (), tuple(reasons))


def _are_ct(dataset: Dataset, train: Sequence[Case], settings: Settings, reasons: list[str]) -> list[bool]:
    """Whether each channel is CT, as the data set says; where nothing says what they are, as they look."""
    if dataset.channel_names != ("image",) or settings.variant in PAPER_VARIANTS:
        return [name.strip().lower() == "ct" for name in dataset.channel_names]
    some = train[:: max(1, -(-len(train) // _LOOKED_AT))]
    lowest = [float(dataset.image(case).data.min()) for case in some]
    if not lowest or max(lowest) > _AIR or min(lowest) < _PADDING:
        return [False]
    reasons.append(f"taken for CT in Hounsfield units: voxels go down to {min(lowest):.0f} (data.normalise)")
    return [True]


def _windows(
    dataset: Dataset, train: Sequence[Case], windowed: Sequence[bool], seed: int
) -> list[ChannelWindow | None]:
    """Intensity windows over the foreground, as nnU-Net defines them, of the channels that are to have one."""
    kept: list[list[np.ndarray]] = [[] for _ in windowed]
    rng = np.random.default_rng(seed)
    found = 0
    for index in rng.permutation(len(train)):
        volume, labels = dataset.read(train[index])
        inside = np.flatnonzero(labels.data.reshape(-1) > 0)
        found += len(inside) > 0
        if len(inside) > 10_000:
            inside = rng.choice(inside, 10_000, replace=False)
        for channel, values in enumerate(volume.data):
            kept[channel].append(values.reshape(-1)[inside].astype(np.float64))
        if found == _WINDOWED:
            break
    if not found:
        raise SettingsError("data.normalise", "no training case has foreground", "Use data.normalise=zscore")
    return [
        _window(np.concatenate(parts)) if wanted else None
        for parts, wanted in zip(kept, windowed, strict=True)
    ]


def _window(values: np.ndarray) -> ChannelWindow:
    low, high = (float(v) for v in np.percentile(values, [0.5, 99.5]))
    clipped = values.clip(low, high)
    return ChannelWindow(low=low, high=high, mean=float(clipped.mean()), std=max(float(clipped.std()), 1e-6))

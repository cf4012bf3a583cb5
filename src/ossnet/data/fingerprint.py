"""What is in a data set, and what is wrong with it.

Each file is read once, by several threads (decompression and numpy let each other run). A case that cannot be
read becomes a problem with file, reason and fix; the others are described.
"""

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Integer

from ossnet.data.cases import Case, Dataset, Problem
from ossnet.data.grey_values import Intensities, intensities
from ossnet.data.naming import Files
from ossnet.data.splits import require_fitting, shared_patients
from ossnet.errors import InputError
from ossnet.files.header import VolumeWarning
from ossnet.files.memory import available_memory, beside_others
from ossnet.files.reading import read_header
from ossnet.volume import Affine, Orientation, Shape, Volume, closest_canonical


@dataclass(frozen=True)
class CaseFacts:
    """One case as it was found.

    Attributes:
        name: Name of the case.
        shape: Voxels along X, Y, Z, in the order of the file.
        spacing: Voxel size in mm, in the same order.
        orientation: Where the voxel axes point to, nearest: RAS is right, anterior, superior.
        tilt: Largest angle between a voxel axis and its nearest world axis, in degrees.
        dtype: Voxel type as read.
        intensities: Each channel over the whole scan.
        foreground: Each channel where the label is not 0; None where the label is empty.
        voxels: Class → number of voxels, for the classes present, background included.
        volumes_ml: Class → volume in ml, background left out.
        warnings: Customary readings of unclear files.
    """

    name: str
    shape: Shape
    spacing: tuple[float, float, float]
    orientation: str
    tilt: float
    dtype: str
    intensities: tuple[Intensities, ...]
    foreground: tuple[Intensities, ...] | None
    voxels: Mapping[int, int]
    volumes_ml: Mapping[int, float]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class FitProposal:
    """How the paper's variants would see the scans of a data set.

    Attributes:
        kind: "pad" with zeros where scans are about one size, otherwise "resize".
        shape: The full-resolution shape S of the network.
        blocks: Encoder blocks.
    """

    kind: Literal["pad", "resize"]
    shape: Shape
    blocks: int

    @property
    def grid(self) -> Shape:
        """Cells of the low-resolution grid: S / 2 / 2^blocks."""
        x, y, z = (n // 2 ** (self.blocks + 1) for n in self.shape)
        return x, y, z

    @property
    def latent(self) -> int:
        """Length L of the latent: cells of the grid."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Fingerprint:
    """A data set in figures.

    Attributes:
        dataset: What was looked at.
        cases: Facts of each case that could be read, sorted by name.
        problems: What must be mended; a case may have several.
        notes: What may be as intended, but is worth knowing.
        fit: Proposal for the paper's variants; None without a readable case.
    """

    dataset: Dataset
    cases: tuple[CaseFacts, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    fit: FitProposal | None

    @property
    def median_shape(self) -> Shape:
        """Median voxels along each axis of the files; right, anterior, superior where their orders differ."""
        x, y, z = (round(float(n)) for n in np.median([c.shape for c in _alike(self.cases)], axis=0))
        return x, y, z

    @property
    def median_spacing(self) -> tuple[float, float, float]:
        """Median voxel size in mm, along the axes of `median_shape`."""
        x, y, z = (float(n) for n in np.median([c.spacing for c in _alike(self.cases)], axis=0))
        return x, y, z

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        data = self.dataset
        return {
            "dataset": str(data.root),
            "layout": data.layout,
            "channels": list(data.channel_names),
            "labels": {str(k): v for k, v in data.label_names.items()},
            "label_map": {str(k): v for k, v in data.label_map.items()},
            "folds": len(data.splits) if data.splits is not None else None,
            "cases": len(self.cases),
            "median_shape": list(self.median_shape) if self.cases else None,
            "median_spacing_mm": list(self.median_spacing) if self.cases else None,
            "fit": {**asdict(self.fit), "grid": list(self.fit.grid)} if self.fit else None,
            "problems": [asdict(p) for p in self.problems],
            "notes": list(self.notes),
            "case": {c.name: _case_json(c) for c in self.cases},
        }


def fingerprint(
    dataset: Dataset, jobs: int | None = None, progress: Callable[[int], None] | None = None
) -> Fingerprint:
    """Read every image and label of a data set and describe them.

    Args:
        dataset: An opened data set.
        jobs: Threads; by default as many as there are processors and as fit into memory.
        progress: Called with the number of cases done.

    Raises:
        ResourceError: A single case does not fit into memory.
    """
    facts: list[CaseFacts] = []
    problems = list(dataset.problems)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VolumeWarning)  # told in `notes`, once for all files
        for done, (fact, found) in enumerate(_looks(dataset, jobs or _jobs(dataset)), start=1):
            problems += found
            if fact:
                facts.append(fact)
            if progress:
                progress(done)
    facts.sort(key=lambda f: f.name)
    problems.sort(key=lambda p: p.where)
    if not dataset.problems:  # a case that is incomplete is told of already
        try:
            require_fitting(dataset)
        except InputError as error:
            problems.append(Problem.of(error))
    return Fingerprint(
        dataset=dataset,
        cases=tuple(facts),
        problems=tuple(problems),
        notes=(*_replaced(caught), *_notes(dataset, facts)),
        fit=propose_fit([f.shape for f in _alike(facts)]) if facts else None,
    )


def _alike(facts: Sequence[CaseFacts]) -> list[CaseFacts]:
    """Facts as stored, or with shape and spacing along right, anterior, superior where orders differ."""
    if len({f.orientation for f in facts}) == 1:
        return list(facts)
    turned = []
    for fact in facts:
        x, y, z = sorted(range(3), key=lambda axis: "LRPAIS".index(fact.orientation[axis]) // 2)
        order = Orientation((x, y, z))
        turned.append(replace(fact, shape=order.moved(fact.shape), spacing=order.moved(fact.spacing)))
    return turned


def propose_fit(shapes: Sequence[Shape], kind: Literal["auto", "pad", "resize"] = "auto") -> FitProposal:
    """How the paper's variants should see scans of these shapes (the paper's two ways, on other data).

    Scans of about one size (no axis varies more than twofold) are padded to the smallest S that holds them
    all; others are resized to their median shape. S is a multiple of 2^(blocks+1) along each axis, and blocks
    are chosen so that the grid S / 2 / 2^blocks has 4 to 8 cells along each axis, or comes nearest to it.
    BraTS (240, 240, 155) gives the paper's (256, 256, 160) with 4 blocks, a 512³ scan its 512³ with 5.

    Args:
        kind: One of the two ways, if it is chosen already.
    """
    sizes = np.array(shapes)
    alike = kind == "pad" or (kind == "auto" and bool((sizes.max(axis=0) <= 2 * sizes.min(axis=0)).all()))
    wanted = sizes.max(axis=0) if alike else np.ceil(np.median(sizes, axis=0)).astype(int)

    def off(blocks: int) -> float:
        # Distance from 4 … 8 cells, in doublings.
        cells = np.log2(_multiple(wanted, 2 ** (blocks + 1)) / 2 ** (blocks + 1))
        return float((np.maximum(2 - cells, 0) + np.maximum(cells - 3, 0)).sum())

    blocks = min(range(1, 8), key=lambda b: (round(off(b), 9), b))
    x, y, z = (int(n) for n in _multiple(wanted, 2 ** (blocks + 1)))
    return FitProposal("pad" if alike else "resize", (x, y, z), blocks)


def _multiple(sizes: Integer[np.ndarray, "3"], of: int) -> Integer[np.ndarray, "3"]:
    return -(-sizes // of) * of


def _jobs(dataset: Dataset) -> int:
    """As many threads as processors, fewer when scans are large beside the memory that is free."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    largest = 1
    for case in dataset.cases[:: max(1, len(dataset.cases) // 8)]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VolumeWarning)
                headers = [read_header(path) for path in case.images]
        except InputError:
            continue  # told when the case is read
        # As stored, as float32, the labels and what is computed from them.
        largest = max(largest, sum(h.voxels for h in headers) * 16)
    return max(1, min(processors, len(dataset.cases), available_memory() // (2 * largest)))


def _looks(dataset: Dataset, jobs: int) -> Iterator[tuple[CaseFacts | None, list[Problem]]]:
    """What `_look` says of each case, as it is found; those without room beside others are looked at after them."""
    alone: list[Case] = []
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        look = partial(beside_others, partial(_look, dataset))
        futures = {pool.submit(look, case): case for case in dataset.cases}
        try:
            for future in as_completed(futures):
                if (found := future.result()) is not None:
                    yield found
                else:
                    alone.append(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    yield from (_look(dataset, case) for case in alone)


def _look(dataset: Dataset, case: Case) -> tuple[CaseFacts | None, list[Problem]]:
    """One case: its facts, if image and label can be read and belong together, and its problems."""
    problems = []
    volume = labels = None
    try:
        volume, labels = dataset.read(case)
    except InputError as error:
        problems.append(Problem.of(error))
        # One report for both files, so that mending one does not only show the next problem.
        if case.label is not None and str(error.where) != str(case.label):
            try:
                dataset.labels(case)
            except InputError as second:
                problems.append(Problem.of(second))
    if volume is None or labels is None:
        return None, problems
    inside = labels.data != 0
    overall = tuple(intensities(channel) for channel in volume.data)
    files = case.images if len(case.images) == len(overall) else case.images[:1] * len(overall)
    for file, name, channel in zip(files, dataset.channel_names, overall, strict=True):
        if channel.minimum == channel.maximum:
            problems.append(
                Problem(
                    str(file),
                    f"{name} is {channel.minimum:g} everywhere",
                    "Export the image again, or leave the case out",
                )
            )
    values, counts = np.unique(labels.data, return_counts=True)
    voxels = {int(v): int(n) for v, n in zip(values, counts, strict=True)}
    voxel_ml = abs(float(np.linalg.det(labels.affine[:3, :3]))) / 1000
    return (
        CaseFacts(
            name=case.name,
            shape=volume.shape,
            spacing=volume.spacing,
            orientation=orientation_code(volume.affine),
            tilt=_tilt(volume.affine),
            dtype=str(volume.data.dtype),
            intensities=overall,
            foreground=_foreground(volume, inside),
            voxels=voxels,
            volumes_ml={v: n * voxel_ml for v, n in voxels.items() if v},
            warnings=tuple(dict.fromkeys(w for path in _files(case) for w in read_header(path).warnings)),
        ),
        problems,
    )


def _files(case: Case) -> tuple[Path, ...]:
    return case.images if case.label is None else (*case.images, case.label)


def _foreground(volume: Volume, inside: Bool[np.ndarray, "X Y Z"]) -> tuple[Intensities, ...] | None:
    if not inside.any():
        return None
    return tuple(intensities(channel[inside]) for channel in volume.data)


def orientation_code(affine: Affine) -> str:
    """Where the voxel axes point to, nearest: for example LPS for left, posterior, superior."""
    orientation = closest_canonical(affine)
    letters = [""] * 3
    for world, (voxel, flip) in enumerate(zip(orientation.axes, orientation.flips, strict=True)):
        letters[voxel] = ("LR", "PA", "IS")[world][0 if flip else 1]
    return "".join(letters)


def _tilt(affine: Affine) -> float:
    orientation = closest_canonical(affine)
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = [abs(columns[world, voxel]) for world, voxel in enumerate(orientation.axes)]
    return float(np.degrees(np.arccos(np.clip(min(cosines), 0.0, 1.0))))


def _replaced(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """What was replaced on request, which no header says."""
    found = sorted({str(w.message).rstrip(".") for w in caught if "they are replaced" in str(w.message)})
    if not found:
        return []
    more = f" (and {len(found) - 1} more {'file' if len(found) == 2 else 'files'})" if len(found) > 1 else ""
    return [found[0] + more]


def _notes(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[str]:
    """What a first-time user should know before training."""
    if not facts:
        return []
    unclear = Counter(w for f in facts for w in f.warnings)
    notes = [
        f"{_cases(n)} (for example {next(f.name for f in facts if note in f.warnings)}): {note}"
        for note, n in unclear.items()
    ]
    codes = Counter(f.orientation for f in facts)
    if len(codes) > 1:
        listed = ", ".join(f"{code} {n}" for code, n in codes.most_common())
        notes.append(
            f"voxel axes point in different directions ({listed}); scans are turned to one before training"
        )
    if tilted := [f for f in facts if f.tilt > 1]:
        worst = max(tilted, key=lambda f: f.tilt)
        notes.append(
            f"{_cases(len(tilted))} {_is(len(tilted))} oblique or sheared "
            f"(up to {worst.tilt:.0f}°, {worst.name}); positions are exact nevertheless"
        )
    spacing = np.array([f.spacing for f in _alike(facts)])
    if (spacing.max(axis=0) > 1.5 * spacing.min(axis=0)).any():
        notes.append("voxel sizes differ by more than half between scans")
    flat = np.median(spacing, axis=0)
    if flat.max() > 3 * flat.min():
        notes.append(
            f"slices lie {flat.max():.3g} mm apart, {flat.max() / flat.min():.2g} times the voxel size in them"
        )
    for index, name in enumerate(dataset.channel_names):
        brightest = sorted(f.intensities[index].high for f in facts)
        if brightest[0] > 0 and brightest[-1] > 20 * brightest[0]:
            notes.append(
                f"channel {name}: the brightest voxels reach {_grey(brightest[0])} in one case and "
                f"{_grey(brightest[-1])} in another; normalise each scan by itself"
            )
    for number, name in dataset.label_names.items():
        without = [f.name for f in facts if number and number not in f.voxels]
        if len(without) == len(facts):
            notes.append(f"no case has label {number} ({name}), so it cannot be learnt")
    if empty := [f.name for f in facts if f.foreground is None]:
        notes.append(f"{_cases(len(empty))} {_has(len(empty))} an empty label, for example {empty[0]}")
    if dataset.regions:
        notes.append(
            f"{', '.join(dataset.regions)}: of several labels each, which are learnt one by one, and judged together "
            "as well"
        )
    groups = {c.name: c.group for c in dataset.cases}
    for number, part in enumerate(dataset.splits or ()):
        if both := shared_patients(part, groups):
            notes.append(f"fold {number} has {both[0]} on both sides: validation will look better than it is")
    if strangers := _strangers(dataset):
        notes.append(
            f"{len(strangers)} image{'' if len(strangers) == 1 else 's'} in the folder belong"
            f"{'s' if len(strangers) == 1 else ''} to no case, for example {strangers[0]}; "
            "name the folder of one data set if they should"
        )
    if len(facts) < 5:
        notes.append(f"{_cases(len(facts))}: too few for five folds; train on all of them with --fold all")
    return notes


def _strangers(dataset: Dataset) -> list[Path]:
    """Images that the layout does not explain, where nothing says which files count."""
    if dataset.problems or (dataset.root / "dataset.json").exists():
        return []
    known = {path for case in dataset.cases for path in _files(case)}
    return [path for path in Files(dataset.root).all() if path not in known]


def _grey(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cases(count: int) -> str:
    return f"{count} case{'' if count == 1 else 's'}"


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def _has(count: int) -> str:
    return "has" if count == 1 else "have"


def _case_json(facts: CaseFacts) -> dict[str, Any]:
    value = asdict(facts)
    del value["name"]
    for key in ("voxels", "volumes_ml"):
        value[key] = {str(k): v for k, v in value[key].items()}
    return value

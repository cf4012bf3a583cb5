"""Cases as training wants them: read once, oriented, kept in their file's type, in memory or mapped from disk."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import Integer, Num

from ossnet.data.cases import Case, Dataset, values_of
from ossnet.data.preparation import Fit, Preparation, Spacing, Statistics, oriented_labels
from ossnet.data.sampling import border_voxels
from ossnet.errors import ResourceError
from ossnet.volume import Affine, FileHeader, LabelMap, Orientation, Volume

_FILES = 1 << 16
"""Open at a time: two a case that is mapped."""

_NUMBERS = count()
"""Of mapped cases: several caches share a folder."""


@dataclass(frozen=True)
class CachedCase:
    """One training case.

    Attributes:
        image: (C, X, Y, Z) in the file's type, oriented.
        labels: (X, Y, Z) uint8 or uint16, oriented.
        statistics: What normalising takes.
        affine: Oriented voxel index → world mm.
        spacing: mm, oriented axes.
        fit: How the scan lies on the network's grid.
        orientation: What was done to the stored axes.
        classes: 1 for binary, otherwise the number of classes including background.
        border_kernel, border_width_mm: The border band, `sampling.border_voxels`.
        present: The labels that it holds, background too.
        patient: Whose it is, where other cases may be of the same (`Case.group`).
    """

    name: str
    image: Num[np.ndarray, "C X Y Z"]
    labels: Integer[np.ndarray, "X Y Z"]
    statistics: Statistics
    affine: Affine
    spacing: Spacing
    fit: Fit
    orientation: Orientation
    classes: int = 1
    border_kernel: int = 13
    border_width_mm: float | None = None
    header: FileHeader = field(default_factory=FileHeader)
    present: frozenset[int] = frozenset()
    patient: str | None = None

    @cached_property
    def border(self) -> list[Integer[np.ndarray, " _"]]:
        """Flat indices of the border band of each structure; found on first use, then kept."""
        return border_voxels(
            self.labels, self.spacing, self.classes, self.border_kernel, self.border_width_mm
        )

    def volume(self) -> Volume:
        """The (oriented) scan."""
        return Volume(self.image, self.affine, header=self.header)

    def reference(self) -> Integer[np.ndarray, "X Y Z"]:
        """The labels as a network answers them: any of them is 1 where it is binary."""
        return (self.labels > 0).astype(np.uint8) if self.classes == 1 else self.labels

    def as_in_file(self, labels: LabelMap) -> LabelMap:
        """A label map on the oriented grid, in the voxel order of the files."""
        stored = self.orientation.undo(labels.data)
        x, y, z = stored.shape
        back = np.linalg.inv(self.orientation.matrix((x, y, z)))
        affine = labels.affine @ back
        return LabelMap(stored, affine, header=self.header, names=labels.names, values=labels.values)


def load_case(
    dataset: Dataset,
    case: Case,
    preparation: Preparation,
    classes: int,
    border_kernel: int = 13,
    border_width_mm: float | None = None,
) -> CachedCase:
    """Read one labelled case.

    Raises:
        VolumeError: A file cannot be trusted, or image and label do not lie on each other.
    """
    volume, labels = dataset.read(case)
    orientation = preparation.orient(volume.affine)
    oriented = volume.reoriented(orientation)
    image = np.ascontiguousarray(oriented.data)
    return CachedCase(
        name=case.name,
        image=image,
        labels=oriented_labels(labels, orientation),
        statistics=preparation.statistics(image),
        affine=oriented.affine,
        spacing=oriented.spacing,
        fit=preparation.fit_for(oriented.shape, oriented.spacing, case.name),
        orientation=orientation,
        classes=classes,
        border_kernel=border_kernel,
        border_width_mm=border_width_mm,
        header=volume.header,
        present=frozenset(values_of(labels.data)),
        patient=case.group,
    )


class CaseCache(Sequence[CachedCase]):
    """All cases, loaded in parallel; those beyond `limit_bytes` are mapped from files in `folder`.

    The mapped files are a cache and nothing else: they are removed with the folder and made anew when wanted.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        load: Callable[[Case], CachedCase],
        limit_bytes: int,
        folder: Path,
        jobs: int = 2,
    ) -> None:
        self._cases: list[CachedCase] = []
        self.held_bytes = self.mapped_bytes = 0
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for case in _in_order(pool, load, cases, ahead=2 * jobs):
                    self._cases.append(self._kept(case, limit_bytes, folder))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _kept(self, case: CachedCase, limit_bytes: int, folder: Path) -> CachedCase:
        size = case.image.nbytes + case.labels.nbytes
        if self.held_bytes + size > limit_bytes:
            self.mapped_bytes += size
            return _mapped(case, folder)
        self.held_bytes += size
        return case

    def __len__(self) -> int:
        return len(self._cases)

    @overload
    def __getitem__(self, index: int) -> CachedCase: ...
    @overload
    def __getitem__(self, index: slice) -> list[CachedCase]: ...
    def __getitem__(self, index: int | slice) -> CachedCase | list[CachedCase]:
        return self._cases[index]


def _in_order(
    pool: ThreadPoolExecutor, load: Callable[[Case], CachedCase], cases: Sequence[Case], ahead: int
) -> Iterator[CachedCase]:
    # A bounded look-ahead: `pool.map` would hold every loaded case before the first could be mapped.
    waiting = [pool.submit(load, case) for case in cases[:ahead]]
    for index in range(len(cases)):
        yield waiting.pop(0).result()
        if index + ahead < len(cases):
            waiting.append(pool.submit(load, cases[index + ahead]))


def _mapped(case: CachedCase, folder: Path) -> CachedCase:
    folder.mkdir(parents=True, exist_ok=True)
    _allow_many_files()
    arrays, number = {}, next(_NUMBERS)
    for kind in ("image", "labels"):
        # Not by name, which may be a path.
        file = folder / f"{number}.{os.getpid()}.{kind}.npy"
        try:
            np.save(file, getattr(case, kind), allow_pickle=False)
            arrays[kind] = np.load(file, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise ResourceError(
                f"{folder}: cases beyond data.cache_gb are kept here, which failed ({error.strerror or error}). "
                "Free some space, allow more open files (ulimit -n), or raise data.cache_gb."
            ) from error
    return replace(case, image=arrays["image"], labels=arrays["labels"])


def _allow_many_files() -> None:
    """A mapped file counts as open as long as it is; of thousands systems allow few before they are asked."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _FILES if most == resource.RLIM_INFINITY else min(most, _FILES)
        if now != resource.RLIM_INFINITY and now < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))

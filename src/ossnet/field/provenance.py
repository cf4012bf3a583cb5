"""What made a result: a line in the file itself, so that it is known wherever the file goes."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ossnet.errors import VolumeError
from ossnet.files.reading import files_of, read_labels
from ossnet.volume import MARK, VALUES, LabelMap


def origin(model: str, scan: str, options: Mapping[str, Any]) -> str:
    """Alike for results that are the same: of one model, one scan, and the same options.

    Args:
        model: `Model.fingerprint`.
        scan: `look_of`.
        options: Those that decide what the result is; values that JSON has.
    """
    made = json.dumps([model, scan, options], sort_keys=True).encode()
    return f"{MARK} {hashlib.sha256(made).hexdigest()[:16]}"


def look_of(files: Sequence[Path]) -> str:
    """A digest of a scan's files, wherever they lie: their names and all that is in them.

    Scans that another program wrote into the same name and grid have equal names and sizes, and a scan that was
    changed in place may differ in a few voxels only. Files that cannot be read are refused when they are.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(Path(os.path.abspath(file)).name))  # which may be no text
        with suppress(OSError, VolumeError):
            for part in files_of(file):
                with part.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def signed(labels: LabelMap, made_by: str) -> LabelMap:
    """Labels that say what made them (`origin`), and by a digest of their values whether they were changed since.

    Both stand in the line that other programs keep; in a comment of its own the digest would be lost with them.

    Returns:
        The label map as files have it (`LabelMap.as_in_files`); the one given must not be used any more.
    """
    stored = replace(labels, origin=made_by).as_in_files(reuse=True)
    line = [made_by, _digest(stored), *stored.origin.removeprefix(made_by).split()]
    return replace(stored, origin=" ".join(line))


def made_by(line: str) -> str:
    """What made a result, of all that it says (`LabelMap.origin`)."""
    return " ".join(line.split()[:2])


def was_changed(file: Path, line: str) -> bool:
    """Whether a label map is another one than was signed, or damaged; what says no digest is not looked at.

    Args:
        line: What it says.
    """
    digest = [word for word in line.split()[2:] if word != VALUES]
    try:
        return bool(digest) and digest != [_digest(read_labels(file))]
    except VolumeError:
        return True


def _digest(labels: LabelMap) -> str:
    """Alike for equal labels of a grid, in whatever type and packing."""
    dtype = np.min_scalar_type(int(labels.data.max(initial=0)))
    total = hashlib.blake2b(str(labels.shape).encode(), digest_size=8)
    for plane in np.moveaxis(labels.data, -1, 0):
        total.update(plane.astype(dtype.newbyteorder("<")).tobytes(order="F"))
    return total.hexdigest()

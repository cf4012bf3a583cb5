"""What made a result: a line in the file itself, so that it is known wherever the file goes."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ossnet.errors import VolumeError
from ossnet.files.containers import locate
from ossnet.files.dicom import marked_in
from ossnet.volume import MARK

_BLOCK = 4096
"""Bytes that are looked at in one place of a file."""

_BLOCKS = 256
"""Places of a file that are looked at, the header among them."""


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
    """A digest of a scan's files, wherever they lie: names, sizes, headers and voxels from all over them.

    Scans that another program wrote into the same name and grid have equal names and sizes: their voxels tell them
    apart. Files that cannot be read are refused when they are.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(os.path.abspath(file)).name.encode())
        with suppress(OSError, VolumeError):
            parts = marked_in(file) if file.is_dir() else list(dict.fromkeys(locate(file)))
            places = max(_BLOCKS // max(len(parts), 1), 2)
            for part in parts:
                size = part.stat().st_size
                digest.update(str(size).encode())
                with part.open("rb") as stream:
                    for place in range(0, size, max(size // places, _BLOCK)):
                        stream.seek(place)
                        digest.update(stream.read(_BLOCK))
    return digest.hexdigest()

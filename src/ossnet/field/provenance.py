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
        digest.update(Path(os.path.abspath(file)).name.encode())
        with suppress(OSError, VolumeError):
            for part in marked_in(file) if file.is_dir() else dict.fromkeys(locate(file)):
                with part.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()

"""What made a result: a line in the file itself, so that it is known wherever the file goes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def origin(model: str, files: Sequence[Path], options: Mapping[str, Any]) -> str:
    """Alike for results that are the same: of one model, one scan, and the same options.

    Args:
        model: `Model.fingerprint`.
        files: Of the scan; known by their names and sizes, wherever they lie.
        options: Those that decide what the result is; values that JSON has.
    """
    scan = [(file.name, file.stat().st_size) for file in files]
    made = json.dumps([model, scan, options], sort_keys=True).encode()
    return f"{MARK} {hashlib.sha256(made).hexdigest()[:16]}"


MARK = "ossnet"
"""How the line begins."""

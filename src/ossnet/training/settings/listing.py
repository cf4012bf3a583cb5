"""All settings as a table, for `ossnet train --help-settings`."""

import json
from operator import attrgetter
from pathlib import Path
from typing import Any

from ossnet.training.settings.presets import unused
from ossnet.training.settings.sources import make_settings
from ossnet.training.settings.tree import meaning, setting_fields


def describe_settings(
    variant: str | None = None, preset: str | None = None, config: Path | None = None
) -> list[tuple[str, str, str]]:
    """(key, value, meaning) of every setting that a variant heeds; of all settings where nothing is given.

    Args:
        variant, preset, config: See `make_settings`: values are those with which nothing else is set.
    """
    chosen = make_settings(variant, preset, config)
    left_out: frozenset[str] = frozenset()
    if variant or preset or config:
        left_out = unused(chosen.variant, scheme=chosen.validation.scheme)
    return [
        (name, _shown(attrgetter(name)(chosen)), meaning(field))
        for name, field in setting_fields().items()
        if name not in left_out
    ]


def _shown(value: Any) -> str:
    """As it may be written after `--set`."""
    if isinstance(value, tuple):
        return json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)

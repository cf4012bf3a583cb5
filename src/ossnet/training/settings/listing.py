"""All settings as a table, for `ossnet train --help-settings`."""

import json
from operator import attrgetter
from typing import Any

from ossnet.training.settings.presets import unused
from ossnet.training.settings.sources import make_settings
from ossnet.training.settings.tree import meaning, setting_fields


def describe_settings(variant: str | None = None) -> list[tuple[str, str, str]]:
    """(key, value that a variant has when nothing is set, meaning) of every setting that it heeds."""
    chosen = make_settings(variant)
    left_out = unused(chosen.variant, scheme=chosen.validation.scheme) if variant else frozenset()
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

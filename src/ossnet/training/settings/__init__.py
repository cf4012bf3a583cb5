"""Settings of a training: one tree; presets are named parts of it, files and `--set` change it."""

from ossnet.training.settings.listing import describe_settings
from ossnet.training.settings.presets import PRESETS, UNUSED, unused
from ossnet.training.settings.sources import given_keys, make_settings, parse_settings
from ossnet.training.settings.tree import MACHINE, ScheduleSettings, Settings, on_machine

__all__ = [
    "MACHINE",
    "PRESETS",
    "UNUSED",
    "ScheduleSettings",
    "Settings",
    "describe_settings",
    "given_keys",
    "make_settings",
    "on_machine",
    "parse_settings",
    "unused",
]

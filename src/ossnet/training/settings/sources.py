"""Settings put together from a recipe, a preset, a file and `--set`; one readable message for what is wrong."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ossnet.errors import SettingsError
from ossnet.training.settings.presets import (
    PAPER_BASELINES,
    PRESETS,
    VARIANT_RECIPES,
    Changes,
    canonical_variant,
    unused,
)
from ossnet.training.settings.tree import Settings, meaning, setting_fields, words

_ALSO = {"learning_rate": "lr", "batch": "batch_size", "patch_size": "patch_shape", "mirror": "flip_axes"}
"""Names that settings have elsewhere."""

_SET = "--set "
"""How messages name single changes."""


def make_settings(
    variant: str | None = None,
    preset: str | None = None,
    config: Path | None = None,
    changes: Sequence[str] = (),
) -> Settings:
    """Put settings together; later ones win: variant's recipe, preset, file, then single changes.

    Args:
        config: JSON or TOML file with any part of the tree.
        changes: `group.key=value`, values as in JSON; bare words are strings.

    Raises:
        SettingsError: Unknown keys (with the nearest known name), values without meaning, and changes that the
            variant does not heed.
    """
    layers: list[tuple[str, Changes]] = []
    if preset is not None:
        if preset not in PRESETS:
            raise SettingsError("--preset", f"{preset!r} is unknown", f"Choose one of {', '.join(PRESETS)}")
        layers.append((f"preset {preset}", PRESETS[preset]))
    given: list[tuple[str, Changes]] = [(str(config), _read_config(config))] if config is not None else []
    given += [_parse_change(change) for change in changes]
    layers += given
    if variant is not None:
        layers.append(("--variant", {"variant": variant}))
    chosen = next(
        (str(values["variant"]) for _, values in reversed(layers) if "variant" in values), "multiscale"
    )
    chosen = canonical_variant(chosen)
    recipe = VARIANT_RECIPES.get(chosen, {})
    tree: dict[str, Any] = {}
    for where, values in [("recipe", recipe), *layers]:
        _check_keys(where, values)
        tree = _merged(tree, values)
        if where == f"preset {preset}":
            tree = _merged(tree, PAPER_BASELINES.get((str(preset), chosen), {}))
    tree["variant"] = chosen
    _require_used(chosen, parse_settings({**recipe, "variant": chosen}), parse_settings(tree), given)
    if _means_epochs(layers):
        tree["schedule"] = {**tree["schedule"], "minutes": None}
    return parse_settings(tree)


def _means_epochs(layers: Sequence[tuple[str, Changes]]) -> bool:
    """Whether who speaks last of a training's length, a preset, a file or the command line, names epochs alone."""
    said: dict[str, set[str]] = {}
    for where, values in layers:
        said.setdefault(_SET if where.startswith(_SET) else where, set()).update(values.get("schedule", {}))
    lengths = [names & {"epochs", "minutes"} for names in said.values()]
    return next((names for names in reversed(lengths) if names), set()) == {"epochs"}


def _require_used(
    variant: str, default: Settings, made: Settings, layers: Sequence[tuple[str, Changes]]
) -> None:
    """Refuse what the user gave and the variant does not heed.

    A file may name it with the value that it has anyway: the settings of a run do.
    """
    ignored = unused(variant, made.network.patch_shape is not None, made.validation.scheme)
    for where, values in layers:
        for group, part in values.items():
            for key in part if isinstance(part, Mapping) else ():
                name = f"{group}.{key}"
                same = attrgetter(name)(made) == attrgetter(name)(default)
                if name in ignored and (where == f"{_SET}{name}" or not same):
                    raise SettingsError(
                        where if where.startswith(_SET) else f"{where}: {name}",
                        f"variant {variant} does not use it",
                        "Leave it out; see `ossnet train --help-settings`",
                    )


def given_keys(preset: str | None, config: Path | None, changes: Sequence[str]) -> set[str]:
    """Settings that a user named, `group.key` each (errors as for `make_settings`)."""
    layers: list[Changes] = [PRESETS.get(preset or "", {}), _read_config(config) if config else {}]
    layers += [values for _, values in map(_parse_change, changes)]
    keys = set()
    for values in layers:
        for group, value in values.items():
            keys |= {f"{group}.{key}" for key in value} if isinstance(value, Mapping) else {group}
    return keys


def parse_settings(tree: Mapping[str, Any], where: str = "settings") -> Settings:
    """Settings from plain values, with one readable message for whatever is wrong."""
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise _readable(error, tree, where) from None


def _readable(error: ValidationError, tree: Mapping[str, Any], where: str) -> SettingsError:
    """The first wrong setting: its own name and value, without the ways in which pydantic tried to read it."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][:2]]
    name, value, group = ".".join(path), first["input"], tree.get(path[0])
    if len(path) == 2 and isinstance(group, Mapping):
        value = group.get(path[1])
    field = setting_fields().get(name)
    # Beyond the setting's own name: members of a union as words, places in a tuple as numbers.
    union = any(isinstance(part, str) for part in first["loc"][2:])
    reason = f"{value!r} is not an allowed value" if union else f"{value!r}: {first['msg']}"
    told = meaning(field) if field is not None else ""
    fix = f"Its meaning: {told}" if told else "See `ossnet train --help-settings`"
    return SettingsError(f"{where}: {name}", reason, fix)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        values = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise SettingsError(file, f"cannot be read ({error.strerror})", "Check the path") from error
    except ValueError as error:
        raise SettingsError(file, f"is not valid JSON or TOML ({error})", "Correct the file") from error
    if not isinstance(values, dict):
        raise SettingsError(file, "holds no settings", "Write an object with groups such as schedule")
    return values


def _parse_change(change: str) -> tuple[str, Changes]:
    key, equals, text = change.partition("=")
    if not equals:
        raise SettingsError("--set", f"{change!r} has no =", "Write --set group.key=value")
    try:
        value = json.loads(text)
    except ValueError:
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
        field = setting_fields().get(key.strip())
        if value is None and field is not None and text.lower() in words(field):
            value = text.lower()
        if isinstance(value, str) and "," in value:
            try:
                value = json.loads(f"[{value}]")
            except ValueError:
                value = value.split(",")
    tree: Any = value
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return f"{_SET}{key.strip()}", tree


def _check_keys(where: str, values: Changes) -> None:
    """Refuse names that no setting has."""
    groups = {name.partition(".")[0] for name in setting_fields() if "." in name}
    for key, value in values.items():
        if key not in groups:
            _require_known(where, key)
        elif not isinstance(value, Mapping):
            raise SettingsError(where, f"{key} is a group of settings", f"Set one of them: {key}.name=value")
        else:
            for inner in value:
                _require_known(where, f"{key}.{inner}")


def _require_known(where: str, name: str) -> None:
    every = list(setting_fields())
    if name in every:
        return
    last = name.rpartition(".")[2]
    near = [known for known in every if known.rpartition(".")[2] == _ALSO.get(last, last)]
    near = near or difflib.get_close_matches(name, every, 1, 0.5)
    fix = f"Perhaps {near[0]} is meant" if near else "See `ossnet train --help-settings`"
    raise SettingsError(where, f"the setting {name} is unknown", fix)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = (
            _merged(out[key], value)
            if isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
            else value
        )
    return out

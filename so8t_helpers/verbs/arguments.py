"""What the words of a command line mean: a profile with its `--set`, a run by its name, stages, a grid."""

from __future__ import annotations

import re
from typing import Any

import yaml

from so8t_helpers.run.stage import STAGES, stage_name
from so8t_helpers.settings import PARAMS_DIR, Settings, SettingsError, load_settings, resolve


def parse_assignment(text: str) -> dict[str, Any]:
    """Turn `section.key=value` (value in YAML) into a nested override, or raise SettingsError."""
    key, separator, value = text.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) != 2 or not all(parts):
        raise SettingsError(f"--set {text!r}: expected section.key=value, e.g. training.max_steps=20")
    try:
        return {parts[0]: {parts[1]: yaml.safe_load(value)}}
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {text!r}: the value is not valid YAML: {error}") from error


def parse_assignments(texts: list[str]) -> dict[str, Any]:
    """Turn several of them into one nested override, a later one over an earlier."""
    overrides: dict[str, Any] = {}
    for text in texts:
        for section, values in parse_assignment(text).items():
            overrides.setdefault(section, {}).update(values)
    return overrides


def parse_grid(texts: list[str]) -> dict[str, list[Any]]:
    """Turn `section.key=1,2` (values in YAML) into {"section.key": [1, 2]}.

    Raises SettingsError: a text is not of that form or names a key twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, separator, values = text.partition("=")
        key = key.strip()
        if not separator or not re.fullmatch(r"\w+\.\w+", key) or key in grid:
            raise SettingsError(f"--grid {text!r}: expected section.key=value,value once for each key")
        try:
            grid[key] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError as error:
            raise SettingsError(f"--grid {text!r}: the values are not valid YAML: {error}") from error
        if not grid[key]:
            raise SettingsError(f"--grid {text!r}: no values")
    return grid


def profile_settings(profile: str, assignments: list[str]) -> Settings:
    """Return a profile with assignments laid over it, a later one over an earlier."""
    return load_settings(profile, parse_assignments(assignments))


def run_settings(name: str, assignments: list[str]) -> Settings:
    """Return a run's settings, by its name or a profile's. Raises SettingsError, which names the runs."""
    area = profile_settings("demo", assignments).run
    root = resolve(area.root)
    path = root / name / "params.yaml"
    if path.is_file():
        place = area.model_dump(include={"root", "reports_root"})
        return load_settings(path, {"run": place | {"name": name}})
    if name.endswith((".yaml", ".yml")) or (PARAMS_DIR / f"{name}.yaml").is_file():
        return profile_settings(name, assignments)
    known = sorted(path.parent.name for path in root.glob("*/params.yaml"))
    raise SettingsError(f"no run {name!r} in {root}; runs there: {', '.join(known) or 'none'}")


def stage_range(first: str, last: str) -> tuple[str, ...]:
    """Return the stages from one to another, each by any of its names."""
    start, end = (STAGES.index(stage_name(text)) for text in (first, last))
    if end < start:
        raise SettingsError(f"--from {STAGES[start]} comes after --to {STAGES[end]}")
    return STAGES[start : end + 1]

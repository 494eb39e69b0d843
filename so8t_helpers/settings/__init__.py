"""The typed profile: read from YAML and overrides, checked, and what is wrong with a bad one in one line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from so8t_helpers.settings.inputs import ENTRY, PLAIN, InputEntry
from so8t_helpers.settings.sections import (
    PROJECT_ROOT,
    BakeSettings,
    CacheSettings,
    Count,
    DatasetSettings,
    EvalSettings,
    GateSettings,
    GgufSettings,
    LoraSettings,
    ModelSettings,
    PetSettings,
    RunSettings,
    Section,
    ServeSettings,
    Settings,
    TrainingSettings,
    resolve,
)

__all__ = [
    "PARAMS_DIR",
    "PROJECT_ROOT",
    "BakeSettings",
    "CacheSettings",
    "Count",
    "DatasetSettings",
    "EvalSettings",
    "GateSettings",
    "GgufSettings",
    "InputEntry",
    "LoraSettings",
    "ModelSettings",
    "PetSettings",
    "RunSettings",
    "Section",
    "ServeSettings",
    "Settings",
    "SettingsError",
    "TrainingSettings",
    "load_settings",
    "merge",
    "resolve",
    "validate",
    "yaml_path",
]

PARAMS_DIR = PROJECT_ROOT / "params"


class SettingsError(ValueError):
    """A profile or an override that cannot be used; the message names file, key, expectation and remedy."""


def load_settings(profile: str | Path, overrides: dict[str, Any] | None = None) -> Settings:
    """Read a profile, a name in `params/` or a YAML file, and lay `{"section": {"key": value}}` over it.

    Raises:
        SettingsError: missing file, unknown key (with the nearest known one), wrong type or value.
    """
    path = yaml_path(profile, PARAMS_DIR, "profile", "profiles")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise SettingsError(f"{path}: expected sections such as `dataset:`, got {type(data).__name__}")
    data.setdefault("profile", path.stem)
    return validate(_merge(data, overrides or {}), source=str(path))


def validate(data: dict[str, Any], source: str) -> Settings:
    """Check a nested dict against the model; `source` names it in errors."""
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise SettingsError("\n".join(f"{source}: {_explain(item)}" for item in error.errors())) from error


def merge(settings: Settings, overrides: dict[str, Any]) -> Settings:
    """Return `settings` with nested overrides laid over it, checked again."""
    return validate(_merge(settings.model_dump(), overrides), source="override")


def yaml_path(name: str | Path, folder: Path, one: str, many: str) -> Path:
    """Return the YAML file of that path, or of that name in `folder`; `one` and `many` say what it is."""
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = folder / f"{name}.yaml"
    elif not path.is_file():
        path = resolve(path)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise SettingsError(f"{one} {str(name)!r}: no file {path}; known {many}: {known}")
    return path


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = base | over
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _merge(base[key], value)
    return merged


def _explain(item: Any) -> str:
    """One line for one pydantic error: key, what was expected, what to do."""
    parts = [str(part) for part in item["loc"] if part not in {PLAIN, ENTRY}]
    key = ".".join(parts)
    if item["type"] == "extra_forbidden":
        parent: Any = Settings
        for part in item["loc"][:-1]:
            if not (isinstance(part, int) or part == PLAIN):
                parent = InputEntry if part == ENTRY else parent.model_fields[part].annotation
        near = difflib.get_close_matches(parts[-1], parent.model_fields, n=1, cutoff=0.0)
        return f"unknown key `{key}`; did you mean `{'.'.join([*parts[:-1], *near])}`?"
    as_text = isinstance(item["input"], str) and item["type"] in {"float_type", "int_type"}
    hint = " (YAML reads 1e-4 as text: write 1.0e-4, without quotes)" if as_text else ""
    return f"`{key}`: {item['msg'].lower()}, got {item['input']!r}{hint}"

"""The run folder: where stages leave their artefacts, and how a stage proves that it happened.

Stages talk through files alone. A stage writes `manifest.json` last, with the hashes of what it read and
wrote; without that file it did not happen, and with other hashes or settings it is stale.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from so8t_helpers.run.files import HashCache, StageError, write_json, write_yaml
from so8t_helpers.settings import Settings, SettingsError, resolve

STAGES = ("01_dataset", "02_train", "03_bake", "04_gguf", "05_ollama_eval")

# The settings that a stage depends on: whole sections or single keys.
STAGE_SETTINGS: dict[str, tuple[str, ...]] = {
    "01_dataset": ("dataset", "model.base", "model.revision", "training.sequence_length", "run.seed"),
    "02_train": ("model", "so8t", "pet", "lora", "training", "run.seed"),
    "03_bake": ("model.base", "model.revision", "bake", "so8t.enabled", "training.dataset_dir"),
    "04_gguf": ("gguf", "run.seed"),
    "05_ollama_eval": ("eval", "dataset.think_command", "dataset.think_format", "run.seed"),
}

_VERSIONED = ("so8t-workbench", "torch", "transformers", "peft", "bitsandbytes", "gguf", "xllamacpp")


@dataclass
class Stage:
    """One stage of one run: its folder, what it read, what it wrote.

    Attributes:
        settings: the whole profile.
        name: one of `STAGES`.
        inputs: files read, by a stable label ("01_dataset/train.jsonl", "base/config.json").
        facts: key figures for the index of reports, e.g. {"train records": 1320}.
    """

    settings: Settings
    name: str
    inputs: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return self.settings.run_dir / self.name

    @property
    def manifest_path(self) -> Path:
        return self.directory / "manifest.json"

    def read_file(self, label: str, path: Path, made_by: str = "") -> Path:
        """Register an input file and return it.

        Raises:
            StageError: if the file does not exist; `made_by` says what makes it.
        """
        if not path.is_file():
            hint = f"; {made_by}" if made_by else ""
            raise StageError(f"{self.name}: missing input {label}: no file {path}{hint}")
        self.inputs[label] = path
        return path


@contextmanager
def open_stage(settings: Settings, name: str) -> Iterator[Stage]:
    """Carry out a stage: the old manifest goes first, the new one is written last and only on success."""
    stage = Stage(settings, name)
    stage.directory.mkdir(parents=True, exist_ok=True)
    stage.manifest_path.unlink(missing_ok=True)
    write_yaml(settings.run_dir / "params.yaml", settings.model_dump())
    started = time.time()
    yield stage
    cache = HashCache(settings.run_dir / ".hashes.json")
    outputs = {
        p.relative_to(stage.directory).as_posix(): cache.sha256(p)
        for p in sorted(stage.directory.rglob("*"))
        if p.is_file() and p.name != "manifest.json" and not _scratch(p, stage.directory)
    }
    manifest = {
        "stage": name,
        "inputs": {label: {"sha256": cache.sha256(p), "path": str(p)} for label, p in stage.inputs.items()},
        "outputs": outputs,
        "settings": stage_settings(settings, name),
        "facts": stage.facts,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - started, 2),
    }
    cache.save()
    write_json(stage.manifest_path, manifest)


def read_manifest(settings: Settings, name: str) -> dict[str, Any] | None:
    """Return a stage's manifest, or None where the stage did not happen."""
    path = settings.run_dir / name / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def stale_reason(settings: Settings, name: str) -> str | None:
    """Say why a stage must run (again); None when its settings, inputs and outputs are as recorded."""
    manifest = read_manifest(settings, name)
    if manifest is None:
        return "has not been completed"
    wanted, had = stage_settings(settings, name), manifest["settings"]
    for key in wanted:
        if wanted[key] != had.get(key):
            return f"setting {key} changed"
    cache = HashCache(settings.run_dir / ".hashes.json")
    try:
        for label, entry in manifest["inputs"].items():
            path = Path(entry["path"])
            if not path.is_file():
                return f"input {label} is gone"
            if cache.sha256(path) != entry["sha256"]:
                return f"input {label} changed"
        for relative, digest in manifest["outputs"].items():
            path = settings.run_dir / name / relative
            if not path.is_file():
                return f"output {relative} is gone"
            if cache.sha256(path) != digest:
                return f"output {relative} changed"
    finally:
        cache.save()
    return None


def stage_settings(settings: Settings, name: str) -> dict[str, Any]:
    """Return the settings that a stage depends on, flat: {"lora.r": 64, ...}."""
    data = settings.model_dump(mode="json")
    flat: dict[str, Any] = {}
    for entry in STAGE_SETTINGS[name]:
        section, _, key = entry.partition(".")
        for k in [key] if key else data[section]:
            flat[f"{section}.{k}"] = data[section][k]
    return flat


def stage_input(settings: Settings, chosen: str | None, stage: str, part: str = "") -> Path:
    """Return the folder a stage reads: the one a setting names, else that of the stage before it."""
    if chosen is None:
        return settings.run_dir / stage / part
    path = resolve(chosen)
    if not path.is_dir():
        raise SettingsError(f"no folder {path}; name one that exists, or null for this run's {stage}")
    return path


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version(), "system": platform.system()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _scratch(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return any(part.startswith(".") for part in parts) or parts[0] == "checkpoints"

"""The run folder: where stages leave their artefacts, and how a stage proves that it happened.

Stages talk through files alone. A stage writes `manifest.json` last, with the hashes of what it read and
wrote; without that file it did not happen, and with other hashes or settings it is stale.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from so8t_helpers.run.files import (
    HashCache,
    StageError,
    read_json,
    remove,
    run_hashes,
    write_json,
    write_yaml,
)
from so8t_helpers.run.machine import machine_errors
from so8t_helpers.run.patterns import changed, matching
from so8t_helpers.settings import Settings, SettingsError, resolve

STAGE_TITLES = {
    "01_dataset": "Dataset",
    "02_train": "Training",
    "03_bake": "Baking",
    "04_gguf": "GGUF files",
    "05_ollama_eval": "Evaluation",
}
STAGES = tuple(STAGE_TITLES)
MANIFEST = "manifest.json"

# The settings that a stage depends on: whole sections or single keys.
STAGE_SETTINGS: dict[str, tuple[str, ...]] = {
    "01_dataset": ("dataset", "model.base", "model.revision", "training.sequence_length", "run.seed"),
    "02_train": ("model", "so8t", "pet", "lora", "training", "run.seed"),
    "03_bake": ("model.base", "model.revision", "bake", "so8t.enabled", "training.dataset_dir"),
    "04_gguf": ("gguf", "run.seed"),
    "05_ollama_eval": ("eval", "dataset.think_command", "dataset.think_format", "run.seed"),
}

# The setting that names another input than the stage before it.
OTHER_INPUT = {
    "02_train": ("training", "dataset_dir"),
    "03_bake": ("bake", "adapter_dir"),
    "04_gguf": ("gguf", "model_dir"),
    "05_ollama_eval": ("eval", "gguf_dir"),
}

_VERSIONED = ("so8t-workbench", "torch", "transformers", "peft", "bitsandbytes", "gguf", "xllamacpp")


def stage_name(text: str) -> str:
    """Return the stage that a full name, number or short name means ("02_train", "2", "02", "train").

    Raises SettingsError, which names the nearest stage.
    """
    short = {"eval": STAGES[4], "ollama": STAGES[4]}
    for number, stage in enumerate(STAGES, start=1):
        short |= {stage: stage, str(number): stage, stage[:2]: stage, stage[3:]: stage}
    if text not in short:
        near = difflib.get_close_matches(text, short, n=1, cutoff=0.0)[0]
        raise SettingsError(
            f"unknown stage {text!r}; did you mean {short[near]}? Stages: {', '.join(STAGES)}"
        )
    return short[text]


def manifest_path(settings: Settings, stage: str) -> Path:
    """Where a stage proves that it happened."""
    return settings.run_dir / stage / MANIFEST


def executed_path(settings: Settings, stage: str) -> Path:
    """Where a stage's executed notebook is kept."""
    return settings.run_dir / "notebooks" / f"{stage}.ipynb"


def record_path(settings: Settings, stage: str) -> Path:
    """Where the batch keeps what became of a stage's notebook."""
    return settings.run_dir / "notebooks" / f"{stage}.json"


def report_path(settings: Settings, stage: str) -> Path:
    """Where a stage's report goes."""
    return settings.reports_dir / f"{stage}.html"


@dataclass
class Stage:
    """One stage of one run: what it read, and what is said of it."""

    settings: Settings
    name: str
    # Files read, by a stable label ("01_dataset/train.jsonl", "base/config.json").
    inputs: dict[str, Path] = field(default_factory=dict)
    # The files that a path, glob or folder of a setting named.
    patterns: dict[str, list[str]] = field(default_factory=dict)
    # Key figures for the index of reports, e.g. {"train records": 1320}.
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return self.settings.run_dir / self.name

    def read_file(self, label: str, path: Path, made_by: str = "") -> Path:
        """Register an input file and return it. Raises StageError: no file; `made_by` says what makes it."""
        if not path.is_file():
            hint = f"; {made_by}" if made_by else ""
            raise StageError(f"{self.name}: missing input {label}: no file {path}{hint}")
        self.check_made(label, path)
        self.inputs[label] = path
        return path

    def look_for(self, *patterns: str) -> None:
        """Remember which files the patterns name: with another one among them the stage is stale."""
        self.patterns |= {pattern: [str(path) for path in matching(pattern)] for pattern in patterns}

    def check_made(self, label: str, path: Path) -> None:
        """Raise StageError: a file under a stage's label ("04_gguf/x.gguf") is not as that stage left it."""
        stage, _, name = label.partition("/")
        manifest = manifest_in(maker(label, path)) if stage in STAGES else None
        if manifest is not None and (made := manifest["outputs"].get(name)) is not None:
            with run_hashes(self.settings) as cache:
                if cache.sha256(path) != made:
                    raise StageError(
                        f"{self.name}: {path} is not as {stage} left it (its {MANIFEST} has another hash); "
                        f"run {stage} again, or lay the file into a folder of its own and name that"
                    )


@contextmanager
def open_stage(settings: Settings, name: str) -> Iterator[Stage]:
    """Carry out a stage: the old manifest goes first, the new one is written last and only on success.

    Raises:
        MachineError: a disk that is full, a refused permission, a card without memory, in the block too.
    """
    stage = Stage(settings, name)
    stage.directory.mkdir(parents=True, exist_ok=True)
    remove(manifest_path(settings, name))
    write_yaml(settings.run_dir / "params.yaml", settings.model_dump())
    started = time.time()
    with machine_errors(f"{name} in {stage.directory}"):
        yield stage
        _write_manifest(stage, started)


def _write_manifest(stage: Stage, started: float) -> None:
    settings, name = stage.settings, stage.name
    with run_hashes(settings) as cache:
        outputs = {
            path.relative_to(stage.directory).as_posix(): cache.sha256(path)
            for path in sorted(stage.directory.rglob("*"))
            if path.is_file() and path.name != MANIFEST and not _scratch(path, stage.directory)
        }
        inputs = {k: {"sha256": cache.sha256(path), "path": str(path)} for k, path in stage.inputs.items()}
    manifest = {
        "stage": name,
        "inputs": inputs,
        "patterns": stage.patterns,
        "outputs": outputs,
        "settings": stage_settings(settings, name),
        "facts": stage.facts,
        "versions": versions(),
        "finished": utc_now(),
        "seconds": round(time.time() - started, 2),
    }
    write_json(manifest_path(settings, name), manifest)


def utc_now() -> str:
    """The time as manifests and records write it, e.g. "2026-11-26T15:00:00Z"."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_manifest(settings: Settings, name: str) -> dict[str, Any] | None:
    """Return a stage's manifest, or None where the stage did not happen."""
    return manifest_in(settings.run_dir / name)


def manifest_in(folder: Path) -> dict[str, Any] | None:
    """Return the manifest in a stage's folder, None where there is none that can be read."""
    path = folder / MANIFEST
    with suppress(StageError):  # broken or not there, both mean that the stage did not happen
        data = read_json(path)
        return data if {"inputs", "outputs", "settings", "facts"} <= data.keys() else None
    return None


def maker(label: str, path: Path) -> Path:
    """Return the stage folder that a file was read from: `path` without what the label adds to the stage."""
    return path.parents[label.count("/") - 1]


def stale_reason(settings: Settings, name: str) -> str | None:
    """Say why a stage must run (again); None when its settings, inputs and outputs are as recorded."""
    manifest = read_manifest(settings, name)
    if manifest is None:
        return "has not been completed"
    for key, value in stage_settings(settings, name).items():
        if value != manifest["settings"].get(key):
            return f"setting {key} changed"
    for pattern, before in manifest.get("patterns", {}).items():
        if other := changed(pattern, before):
            return f"of {pattern} {other}"
    return artefact_fault(settings, name)


def artefact_fault(settings: Settings, name: str, outputs_alone: bool = False) -> str | None:
    """Say which file that a stage's manifest names is gone or changed; None when all are as recorded."""
    manifest = read_manifest(settings, name)
    if manifest is None:
        return f"{MANIFEST} cannot be read" if manifest_path(settings, name).exists() else None
    with run_hashes(settings) as cache:
        for label, entry in () if outputs_alone else manifest["inputs"].items():
            if fault := _fault(cache, Path(entry["path"]), entry["sha256"]):
                return f"input {label} {fault}"
        for relative, digest in manifest["outputs"].items():
            if fault := _fault(cache, settings.run_dir / name / relative, digest):
                return f"output {relative} {fault}"
    return None


def _fault(cache: HashCache, path: Path, digest: str) -> str | None:
    if not path.is_file():
        return "is gone"
    return None if cache.sha256(path) == digest else "changed"


def stage_settings(settings: Settings, name: str) -> dict[str, Any]:
    """Return the settings that a stage depends on, flat: {"lora.r": 64, ...}."""
    data = settings.model_dump(mode="json")
    flat: dict[str, Any] = {}
    for entry in STAGE_SETTINGS[name]:
        section, _, key = entry.partition(".")
        for k in [key] if key else data[section]:
            flat[f"{section}.{k}"] = data[section][k]
    flat.pop("training.trackers", None)  # who is told of a training changes nothing of it
    return flat


def stage_input(settings: Settings, chosen: str | None, stage: str, part: str = "") -> Path:
    """Return the folder a stage reads: the one a setting names, else that of the stage before it."""
    if chosen is None:
        return settings.run_dir / stage / part
    path = resolve(chosen)
    if not path.is_dir():
        raise SettingsError(f"no folder {path}; name one that exists, or null for this run's {stage}")
    return path


def other_input(settings: Settings, name: str) -> Path | None:
    """Return the folder that a setting names for a stage to read; None where it reads the stage before it.

    A folder inside that of this run's stage before it is no other input: it need not have been made yet.

    Raises:
        SettingsError: there is no such folder.
    """
    section, key = OTHER_INPUT[name]
    chosen = getattr(getattr(settings, section), key)
    previous = settings.run_dir / STAGES[STAGES.index(name) - 1]
    if chosen is None or resolve(chosen).is_relative_to(previous):
        return None
    if not resolve(chosen).is_dir():
        raise SettingsError(f"{section}.{key}: no folder {resolve(chosen)}; name one that exists, or null")
    return resolve(chosen)


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version(), "system": platform.system()}
    for name in _VERSIONED:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _scratch(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    hidden = any(part.startswith(".") for part in parts)
    return hidden or path.suffix == ".lock" or parts[0] == "checkpoints"

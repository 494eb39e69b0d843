"""Where a run's reports and the records of its notebooks are, and what they say about each stage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8t_helpers.run.stage import STAGES, read_manifest
from so8t_helpers.settings import Settings, SettingsError, load_settings, resolve


@dataclass(frozen=True)
class StageRecord:
    """What became of one stage's notebook.

    Attributes:
        state: "done", "failed" or "interrupted".
        error: one line; empty when done.
        manifest: SHA-256 of the manifest that this notebook's run wrote; empty unless done.
    """

    stage: str
    state: str
    error: str
    seconds: float
    finished: str
    manifest: str


def read_record(settings: Settings, stage: str) -> StageRecord | None:
    """Return what became of a stage's last notebook, None where there was none."""
    data = record_data(settings, stage)
    return StageRecord(**data) if data else None


STAGE_TITLES = {
    "01_dataset": "Dataset",
    "02_train": "Training",
    "03_bake": "Baking",
    "04_gguf": "GGUF files",
    "05_ollama_eval": "Evaluation",
}


@dataclass(frozen=True)
class StageState:
    """What an index shows of a stage.

    Attributes:
        state: "done", "failed", "interrupted" or "not run".
        facts: key figures of its manifest.
        link: file name of its report, None where there is none.
    """

    name: str
    title: str
    state: str
    error: str
    seconds: float | None
    finished: str
    facts: dict[str, Any]
    link: str | None


def record_path(settings: Settings, stage: str) -> Path:
    """Where the batch keeps what became of a stage's notebook."""
    return settings.run_dir / "notebooks" / f"{stage}.json"


def record_data(settings: Settings, stage: str) -> dict[str, Any] | None:
    """Return the record as a dict, None where there is none."""
    path = record_path(settings, stage)
    if not path.is_file():
        return None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def stage_path(settings: Settings, stage: str) -> Path:
    """Where a stage's report goes."""
    return settings.reports_dir / f"{stage}.html"


def stage_states(settings: Settings) -> list[StageState]:
    """Return the state of all five stages of a run, judged by manifests and records."""
    states = []
    for name in STAGES:
        manifest, record = read_manifest(settings, name), record_data(settings, name)
        if record is not None:
            state, error = record["state"], record["error"]
        else:
            state, error = ("done" if manifest else "not run"), ""
        source = record or manifest or {}
        states.append(
            StageState(
                name=name,
                title=STAGE_TITLES[name],
                state=state,
                error=error,
                seconds=source.get("seconds"),
                finished=source.get("finished", ""),
                facts=manifest["facts"] if manifest else {},
                link=f"{name}.html" if stage_path(settings, name).is_file() else None,
            )
        )
    return states


def known_runs(settings: Settings) -> list[Settings]:
    """Return the settings of every run in the same run area, by name; those of another layout left out."""
    runs = []
    place = {"root": settings.run.root, "reports_root": settings.run.reports_root}
    for path in sorted(resolve(settings.run.root).glob("*/params.yaml")):
        try:
            runs.append(load_settings(path, {"run": place | {"name": path.parent.name}}))
        except SettingsError:
            continue
    return runs


def flat(settings: Settings) -> dict[str, Any]:
    """Return the settings as {"lora.r": 64, ...} without where things lie."""
    data = settings.model_dump(mode="json")
    sections = {
        name: section for name, section in data.items() if name not in {"profile", "run", "cache", "serve"}
    }
    return {"run.seed": settings.run.seed} | {
        f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()
    }

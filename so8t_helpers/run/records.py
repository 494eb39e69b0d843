"""What a run's folder says of its stages: what became of each, which runs there are, and what is at work."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from so8t_helpers.run.files import StageError, read_json, write_json, write_text
from so8t_helpers.run.stage import STAGE_TITLES, read_manifest, record_path, report_path
from so8t_helpers.settings import Settings, SettingsError, load_settings, resolve

STATUS_NAME = ".status.json"


@dataclass(frozen=True)
class StageRecord:
    """What became of one stage's notebook."""

    stage: str
    state: str  # "done", "failed" or "interrupted"
    error: str  # one line; empty when done
    seconds: float
    finished: str
    manifest: str  # SHA-256 of the manifest that this notebook's run wrote; empty unless done


def read_record(settings: Settings, stage: str) -> StageRecord | None:
    """Return what became of a stage's last notebook, None where there was none."""
    with suppress(StageError, TypeError):  # a broken one says as much as none
        return StageRecord(**read_json(record_path(settings, stage)))
    return None


def write_record(settings: Settings, record: StageRecord) -> None:
    """Keep what became of a stage's notebook."""
    write_json(record_path(settings, record.stage), asdict(record))


@dataclass(frozen=True)
class StageState:
    """What an index shows of a stage."""

    title: str
    state: str  # "done", "failed", "interrupted" or "not run"
    error: str
    seconds: float | None
    finished: str
    facts: dict[str, Any]  # key figures of its manifest
    link: str | None  # file name of its report


def stage_states(settings: Settings) -> list[StageState]:
    """Return the state of all five stages of a run, judged by manifests and records."""
    states = []
    for name, title in STAGE_TITLES.items():
        manifest, record = read_manifest(settings, name), read_record(settings, name)
        source = asdict(record) if record else {"state": "done", **manifest} if manifest else {}
        report = report_path(settings, name)
        states.append(
            StageState(
                title=title,
                state=source.get("state", "not run"),
                error=source.get("error", ""),
                seconds=source.get("seconds"),
                finished=source.get("finished", ""),
                facts=manifest["facts"] if manifest else {},
                link=report.name if report.is_file() else None,
            )
        )
    return states


@dataclass
class Status:
    """How far a run at work is, as its status file tells other terminals."""

    stage: str
    what: str  # part of the stage's work; "" for all of it
    state: str  # "running", "done" or "failed"; a run that was killed stays "running"
    done: int
    total: int
    unit: str
    seconds_left: float | None  # None before the first unit is done
    latest: dict[str, float]  # such as the last losses
    pid: int
    time: float  # when this was written, in seconds since 1970

    def at_work(self) -> bool:
        """Whether the process still works: a killed one is gone, or another one has its number."""
        if self.state != "running":
            return False
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() <= self.time) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def read_status(run_dir: Path) -> Status | None:
    """Return what a run's status file says, None where there is none (yet)."""
    try:
        return Status(**json.loads((run_dir / STATUS_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_status(run_dir: Path, status: Status) -> None:
    """Write a run's status file; where that cannot be, the last one stays: no run ends for want of it."""
    with suppress(OSError, StageError):
        write_text(run_dir / STATUS_NAME, json.dumps(asdict(status), ensure_ascii=False) + "\n")


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
    left_out = {"profile", "run", "cache", "serve"}
    sections = settings.model_dump(mode="json", exclude=left_out)
    return {"run.seed": settings.run.seed} | {
        f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()
    }

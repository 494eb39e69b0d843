"""Many runs from one profile: a grid of settings, each point a run with notebooks and reports of its own.

Stage by stage: of the points that would compute the same stage one does, the others take it over. A point
that fails stops alone. Killed at any moment, the same command goes on where it was, since every finished
stage is fresh.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from so8t_helpers.report.index import write_run_index
from so8t_helpers.report.stage import write_stage
from so8t_helpers.run.files import atomic_directory, sha256_file, write_json, write_yaml
from so8t_helpers.run.records import read_record, write_record
from so8t_helpers.run.stage import (
    MANIFEST,
    STAGES,
    executed_path,
    manifest_path,
    read_manifest,
    stage_settings,
    stale_reason,
)
from so8t_helpers.settings import PROJECT_ROOT, Settings, SettingsError, merge
from so8t_helpers.verbs import batch

LINK_BYTES = 2**20  # smaller files are copied: a program may append to a log, never to a weights file
Task = tuple[list[str], str]  # a command, and the file its output is appended to
Mapper = Callable[[list[Task]], Iterable[int]]


@dataclass
class Point:
    """One point of the grid: its run, what stopped it ("" while nothing did), and each stage's state."""

    settings: Settings
    stopped: str = ""
    states: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Say what became of each stage."""
        states = ", ".join(f"{stage[:2]} {state}" for stage, state in self.states.items())
        return f"{self.settings.run.name}: {states}{'; ' + self.stopped if self.stopped else ''}"

    def ended(self, stage: str, status: int) -> None:
        """Take up the exit status of the command that carried a stage out."""
        self.states[stage] = "failed" if status else "done"
        self.stopped = f"{stage} ended with {status}" if status else ""


def points(settings: Settings, grid: dict[str, list[Any]]) -> list[Point]:
    """Return one point for each combination, named after the profile's run and its values."""
    if not grid:
        raise SettingsError("a sweep needs at least one --grid section.key=value,value")
    found = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        overrides: dict[str, Any] = {"run": {"name": _name(settings.run.name, chosen)}}
        for key, value in chosen.items():
            section, _, inner = key.partition(".")
            overrides.setdefault(section, {})[inner] = value
        found.append(Point(merge(settings, overrides)))
    return found


def carry_out(swept: list[Point], stages: tuple[str, ...] = STAGES, mapper: Mapper | None = None) -> None:
    """Carry out all points, stage by stage; the outcome is left in each point.

    `stages` have no gap. The mapper carries out commands and gives their exit statuses in order; default:
    `processes()`.
    """
    mapper = mapper or processes()
    for point in swept:
        batch.preflight(point.settings, stages)
        write_yaml(point.settings.run_dir / "params.yaml", point.settings.model_dump())
    for stage in stages:
        groups: dict[str, list[Point]] = {}
        for point in swept:
            if not point.stopped:
                groups.setdefault(_settings_key(point.settings, stage), []).append(point)
        # Of each group, the point that has the stage already, else the first.
        leaders = [
            next((p for p in group if batch.due_reason(p.settings, stage) is None), group[0])
            for group in groups.values()
        ]
        due = [point for point in leaders if batch.due_reason(point.settings, stage) is not None]
        for point, status in zip(due, mapper([_task(point, stage) for point in due]), strict=True):
            point.ended(stage, status)
        for leader, group in zip(leaders, groups.values(), strict=True):
            if leader.states.setdefault(stage, "fresh") == "fresh":
                batch.complete_report(leader.settings, stage)
            for point in group:
                if point is not leader:
                    _follow(point, leader, stage)
    for point in swept:
        write_run_index(point.settings)


def processes(count: int | None = None) -> Mapper:
    """Return a mapper that carries out `count` commands at once on this machine, which share out its cores.

    Two trainings do not fit on one card, so the default is one where there is a GPU, else two. Threads of two
    processes on the same cores would wait for each other: OMP_NUM_THREADS (or the cores) is divided.
    """
    most = count or (1 if shutil.which("nvidia-smi") else 2)
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(allowed) if allowed.isdecimal() else os.cpu_count() or 1

    def carry_out_here(tasks: list[Task]) -> Iterable[int]:
        at_once = max(1, min(most, len(tasks)))
        share = {"OMP_NUM_THREADS": str(max(1, threads // at_once))}
        with ThreadPoolExecutor(at_once) as pool:
            try:
                return list(pool.map(lambda task: run_command(task, share), tasks))
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in psutil.Process().children():
                    child.terminate()  # each ends its own stage; the pool waits for them
                raise

    return carry_out_here


def ray_cluster() -> Mapper:
    """Return a mapper that hands commands to the Ray cluster at RAY_ADDRESS, or to one it starts here.

    Each takes one GPU where there is any. All hosts must see run area and checkout at the same path.
    """
    try:
        import ray  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError(
            f'--engine ray needs Ray: "{sys.executable}" -m pip install -e ".[ray]"'
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus)(run_command)

    def carry_out_there(tasks: list[Task]) -> Iterable[int]:
        statuses: list[int] = ray.get([remote.remote(task) for task in tasks])
        return statuses

    return carry_out_there


def run_command(task: Task, environment: dict[str, str] | None = None) -> int:
    """Carry out one command with its output in its log, `environment` over ours; return its exit status."""
    command, log = task
    with open(log, "a", encoding="utf-8") as output:  # noqa: PTH123  # a str travels between hosts
        return subprocess.run(
            command,
            cwd=PROJECT_ROOT,
            env=os.environ | (environment or {}),
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            check=False,
        ).returncode


def _follow(point: Point, leader: Point, stage: str) -> None:
    if batch.due_reason(point.settings, stage) is None:
        point.states[stage] = "fresh"
        batch.complete_report(point.settings, stage)
    elif leader.stopped:
        point.stopped = f"{stage} failed in {leader.settings.run.name}, which computes the same"
        point.states[stage] = "failed"
    elif adopt(point.settings, stage, leader.settings):
        point.states[stage] = "shared"
    else:
        point.ended(stage, run_command(_task(point, stage)))


def _task(point: Point, stage: str) -> Task:
    profile = point.settings.run_dir / "params.yaml"
    command = [sys.executable, "-m", "so8t_helpers", "run", str(profile), "--only", stage]
    return command, str(point.settings.run_dir / "log.txt")


def _name(run: str, chosen: dict[str, Any]) -> str:
    """The run's name with its values, in letters that every file system takes.

    Cut to 64 of them: Ollama allows 80 for a model's name, Windows 260 for a whole path.
    """
    name = run
    for key, value in chosen.items():
        text = re.sub(r"[^A-Za-z0-9.]+", "_", str(value)).strip("_") or "none"
        name += f"-{key.partition('.')[2]}-{text}"
    return name if len(name) <= 64 else f"{name[:55]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _settings_key(settings: Settings, stage: str) -> str:
    """All settings that a stage and those before it depend on; with equal ones runs compute the same."""
    return json.dumps([stage_settings(settings, name) for name in STAGES[: STAGES.index(stage) + 1]])


def adopt(settings: Settings, stage: str, donor: Settings) -> bool:
    """Take over a donor's finished stage, its notebook and its record; False where it would not be the same.

    The same means: equal settings of the stage, and equal hashes of every input. Large files are hard links
    where the disk allows.
    """
    manifest, record = read_manifest(donor, stage), read_record(donor, stage)
    executed = executed_path(donor, stage)
    if manifest is None or record is None or record.state != "done" or not executed.is_file():
        return False
    if stale_reason(donor, stage) is not None or stage_settings(settings, stage) != manifest["settings"]:
        return False
    if (inputs := _own_inputs(settings, donor, manifest)) is None:
        return False
    with atomic_directory(settings.run_dir / stage) as folder:
        for relative in manifest["outputs"]:
            _link_or_copy(donor.run_dir / stage / relative, folder / relative)
        write_json(folder / MANIFEST, manifest | {"inputs": inputs, "adopted_from": donor.run.name})
    target = executed_path(settings, stage)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(executed, target)
    write_record(settings, replace(record, manifest=sha256_file(manifest_path(settings, stage))))
    write_stage(settings, stage)
    return True


def _own_inputs(settings: Settings, donor: Settings, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The donor's inputs as this run would read them, None where one is missing or differs."""
    inputs = {}
    for label, entry in manifest["inputs"].items():
        path = Path(entry["path"])
        if path.is_relative_to(donor.run_dir):
            path = settings.run_dir / path.relative_to(donor.run_dir)
            if not path.is_file() or sha256_file(path) != entry["sha256"]:
                return None
        inputs[label] = entry | {"path": str(path)}
    return inputs


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size >= LINK_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another disk, or one without hard links
    shutil.copy2(source, target)

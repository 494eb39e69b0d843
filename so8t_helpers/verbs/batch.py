"""Unattended runs: papermill over the five notebooks, judged by facts and never by papermill's metadata.

A stage counts as done when its manifest is new and in order, and its notebook ended without an error. What
happened is kept next to the executed notebook in `runs/<name>/notebooks/<stage>.json`.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from so8t_helpers.phi3.source import base_folder
from so8t_helpers.report import index
from so8t_helpers.report.stage import write_stage
from so8t_helpers.run.files import MachineError, StageError, read_json, replace, sha256_file, write_yaml
from so8t_helpers.run.machine import machine_errors
from so8t_helpers.run.origin import llama_source
from so8t_helpers.run.records import StageRecord, read_record, read_status, write_record
from so8t_helpers.run.stage import (
    OTHER_INPUT,
    STAGES,
    artefact_fault,
    executed_path,
    manifest_path,
    other_input,
    read_manifest,
    report_path,
    stale_reason,
    utc_now,
)
from so8t_helpers.settings import PARAMS_DIR, Settings, SettingsError, resolve
from so8t_helpers.verbs.kernel import kernel_place, time_limit
from so8t_helpers.verbs.needs import check_places, check_room, check_stage
from so8t_helpers.verbs.status import ProgressLine


@dataclass(frozen=True)
class Outcome:
    """One line of the summary of a run: the stage, "fresh", "done", "failed" or "interrupted", and why."""

    stage: str
    state: str
    detail: str


def run_stages(settings: Settings, stages: tuple[str, ...] = STAGES, force: bool = False) -> list[Outcome]:
    """Carry out the stages that are not fresh (with `force` all), in order, up to the first that fails.

    Raises SettingsError or StageError for what can be known before any long work.
    """
    preflight(settings, stages, force)
    with _alone(settings), machine_errors(f"run {settings.run.name} in {settings.run_dir}"):
        write_yaml(settings.run_dir / "params.yaml", settings.model_dump())
        source = llama_source(settings.model.base)
        if source is not None and source.exists():
            base_folder(settings)  # an import that was tidied away would make a finished training stale
        outcomes: list[Outcome] = []
        for stage in stages:
            reason = "asked for" if force else due_reason(settings, stage)
            if reason is None:
                complete_report(settings, stage)
                outcomes.append(Outcome(stage, "fresh", "nothing changed"))
                continue
            outcomes.append(run_notebook(settings, stage, reason))
            if outcomes[-1].state == "done" and stage == STAGES[0]:
                outcomes += _stopped_later(settings, stages[1:])
            if outcomes[-1].state != "done":
                break
        index.write_run_index(settings)
        index.write_index(settings)
    return outcomes


def summary(settings: Settings, outcomes: list[Outcome]) -> list[str]:
    """Say what became of each stage of a run, and of the run."""
    lines = [f"{outcome.stage}: {outcome.state} ({outcome.detail})" for outcome in outcomes]
    last, report = outcomes[-1], settings.reports_dir / "index.html"
    if last.state in {"failed", "interrupted"}:
        text = f"stage {last.stage} {last.state}: {last.detail}; report: {report}"
    else:
        count = sum(outcome.state == "done" for outcome in outcomes)
        text = f"{count} stages carried out, {len(outcomes) - count} fresh; reports: {report}"
    return [*lines, f"{settings.run.name}: {text}"]


def due_reason(settings: Settings, stage: str) -> str | None:
    """Say why a stage is to be carried out; None when it is fresh and its notebook ended well."""
    if reason := stale_reason(settings, stage):
        return reason
    record = read_record(settings, stage)
    if record is None or not executed_path(settings, stage).is_file():
        return "has no executed notebook"
    if record.state != "done":
        return f"its notebook {record.state}"
    if not _is_json(executed_path(settings, stage)):
        return "its notebook cannot be read"
    if record.manifest != sha256_file(manifest_path(settings, stage)):
        return "was carried out elsewhere since its report"
    return None


def run_notebook(settings: Settings, stage: str, reason: str) -> Outcome:
    """Execute one stage's notebook; keep it, its report and the record whatever happens."""
    # papermill and its kernel client take a second to import; a fresh run does without them.
    import papermill  # noqa: PLC0415

    for name in ("papermill", "traitlets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    notebook, manifest = _notebook_path(settings, stage), manifest_path(settings, stage)
    before = _identity(manifest)
    started, state, error = time.time(), "done", ""
    executed = executed_path(settings, stage)
    executed.parent.mkdir(parents=True, exist_ok=True)
    # papermill writes its output in place, again and again; what is kept appears whole.
    scratch = executed.with_name(f".{stage}.running.ipynb")
    scratch.write_bytes(notebook.read_bytes())
    try:
        with kernel_place(settings, settings.run_dir), ProgressLine(settings, stage, reason):
            papermill.execute_notebook(
                notebook,
                scratch,
                parameters=parameters(settings),
                kernel_name="python3",
                progress_bar=False,
                # Each start would warn that it listens on this machine's loopback, each end by Ctrl-C that
                # it was interrupted; what a cell raises is in the notebook.
                extra_arguments=["--log-level=CRITICAL"],
                start_timeout=settings.run.kernel_start_seconds,
                cwd=notebook.parent,
                timeout_func=time_limit(settings),
            )
    except KeyboardInterrupt:
        state, error = "interrupted", f"interrupted by the user; {how_to_go_on(settings, stage)}"
    except Exception as exception:
        state, error = "failed", one_line(exception)
    if not _is_json(scratch):  # the disk was full while papermill wrote; it may still be
        scratch.write_bytes(notebook.read_bytes())
    replace(scratch, executed)
    if state == "done" and _identity(manifest) in {before, None}:
        state, error = "failed", f"the notebook ended, but stage {stage} left no new manifest"
    if state == "done" and (fault := stale_reason(settings, stage)) is not None:
        state, error = "failed", f"the notebook ended, but {fault}"
    seconds = time.time() - started
    digest = sha256_file(manifest) if state == "done" else ""
    write_record(settings, StageRecord(stage, state, error, round(seconds, 2), utc_now(), digest))
    write_stage(settings, stage)
    return Outcome(stage, state, error or f"{reason}; {seconds:.0f} s")


def preflight(settings: Settings, stages: tuple[str, ...], force: bool = False) -> None:
    """Raise before any long work what would stop the run later; the first stage that is due brings the rest.

    Raises:
        StageError: a missing notebook or stage before the first, or one that was changed since.
        MachineError: another process carries the run out, a folder cannot be written, too little room.
        SettingsError, StageError: what a stage that is due, or may become so, finds in its `check`.
    """
    refuse_second(settings)
    check_places(settings)
    check_notebooks(settings, stages)
    for stage in (stage for stage in stages if stage in OTHER_INPUT):
        section, key = OTHER_INPUT[stage]
        chosen, previous = other_input(settings, stage), STAGES[STAGES.index(stage) - 1]
        if chosen is None and previous not in stages and read_manifest(settings, previous) is None:
            raise StageError(
                f"{stage} reads {previous}, which has not been completed in {settings.run_dir}; "
                f"run it first, or name a folder in {section}.{key}"
            )
        own = chosen is None and previous not in stages
        if own and (fault := artefact_fault(settings, previous, outputs_alone=True)):
            raise StageError(f"{stage} reads {previous}, whose {fault}; run {previous} again")
    first = next((i for i, stage in enumerate(stages) if force or due_reason(settings, stage)), len(stages))
    for stage in stages[first:]:
        check_stage(settings, stage)
    check_room(settings, stages)


def check_notebooks(settings: Settings, stages: tuple[str, ...]) -> None:
    """Raise StageError where a stage has no notebook to be executed."""
    for stage in stages:
        notebook = _notebook_path(settings, stage)
        if not notebook.is_file():
            raise StageError(f"{stage}: missing notebook {notebook}; see run.notebooks")


def _stopped_later(settings: Settings, stages: tuple[str, ...]) -> list[Outcome]:
    """Return the outcome of the stage that the finished data set would stop, after a training; none else."""
    for stage in stages:
        try:
            check_stage(settings, stage)
        except (SettingsError, StageError) as error:
            return [Outcome(stage, "failed", str(error))]
    return []


def how_to_go_on(settings: Settings, stage: str) -> str:
    """Say what the same command will do after an interruption."""
    steps = sorted((settings.run_dir / stage / "checkpoints").glob("step-*"))
    where = f"from the checkpoint of step {int(steps[-1].name.removeprefix('step-'))}" if steps else "here"
    return f"the same command goes on {where}"


def parameters(settings: Settings) -> dict[str, Any]:
    """Return what papermill injects: the profile and every section as a dict."""
    values: dict[str, Any] = settings.model_dump(mode="json")
    if not (PARAMS_DIR / f"{settings.profile}.yaml").is_file():
        values["profile"] = str(settings.run_dir / "params.yaml")
    return values


def complete_report(settings: Settings, stage: str) -> None:
    """Make a fresh stage's report again where someone removed it; the executed notebook has it all."""
    if not report_path(settings, stage).is_file():
        write_stage(settings, stage)


def _notebook_path(settings: Settings, stage: str) -> Path:
    return resolve(settings.run.notebooks) / f"{stage}.ipynb"


def _is_json(path: Path) -> bool:
    try:
        return bool(read_json(path))
    except StageError:
        return False


def _identity(path: Path) -> tuple[int, int] | None:
    """Inode and time of change: another file at the same path has another one."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def one_line(exception: Exception) -> str:
    """The error of a notebook's cell, or of the kernel, in one line."""
    name = getattr(exception, "ename", type(exception).__name__)
    if name == "DeadKernelError":
        return "the kernel died (killed, or out of memory: `so8t doctor` says what a training takes)"
    if name == "CellTimeoutError":
        return "ended by run.stage_timeout; raise it, or set it to null"
    text = str(getattr(exception, "evalue", exception)).strip()
    return f"{name}: {text.splitlines()[0] if text else 'no message'}"


def _alone(settings: Settings) -> AbstractContextManager[object]:
    """Take the run's lock, which the system releases when its holder dies.

    Raises:
        MachineError: another process has it; two would write over each other.
    """
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.run_dir / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        status = read_status(settings.run_dir)
        who = f", process {status.pid} in {status.stage}" if status and status.at_work() else ""
        raise MachineError(
            f"run {settings.run.name}: another process carries it out{who}; wait for it (`so8t status`), end "
            "it, or choose another run.name"
        ) from None


def refuse_second(settings: Settings) -> None:
    """Raise MachineError at once where another process carries the run out; nothing is made."""
    if (settings.run_dir / ".lock").is_file():
        with _alone(settings):
            pass

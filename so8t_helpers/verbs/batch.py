"""Unattended runs: papermill over the five notebooks, judged by facts and never by papermill's metadata.

A stage counts as done when its manifest is new and in order, and its notebook ended without an error. What
happened is kept next to the executed notebook in `runs/<name>/notebooks/<stage>.json`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from so8t_helpers.phi3.source import base_folder
from so8t_helpers.report import index
from so8t_helpers.report.stage import write_stage
from so8t_helpers.run.files import StageError, replace, sha256_file, write_yaml
from so8t_helpers.run.origin import llama_source
from so8t_helpers.run.records import StageRecord, read_record, write_record
from so8t_helpers.run.stage import (
    OTHER_INPUT,
    STAGES,
    executed_path,
    manifest_path,
    other_input,
    read_manifest,
    report_path,
    stale_reason,
    utc_now,
)
from so8t_helpers.settings import PARAMS_DIR, Settings, resolve
from so8t_helpers.verbs.needs import check_room, check_stage
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
    with _alone(settings):
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
        with kernel_environment(settings), ProgressLine(settings, stage, reason):
            papermill.execute_notebook(
                notebook,
                scratch,
                parameters=parameters(settings),
                kernel_name="python3",
                progress_bar=False,
                # Each kernel start would warn that it listens on this machine's loopback.
                extra_arguments=["--log-level=ERROR"],
                start_timeout=settings.run.kernel_start_seconds,
                cwd=notebook.parent,
            )
    except KeyboardInterrupt:
        state, error = "interrupted", "interrupted by the user"
    except Exception as exception:
        state, error = "failed", one_line(exception)
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
        StageError: a missing notebook or stage before the first; too little room on a disk.
        SettingsError, StageError: what a stage that is due, or may become so, finds in its `check`.
    """
    for stage in stages:
        notebook = _notebook_path(settings, stage)
        if not notebook.is_file():
            raise StageError(f"{stage}: missing notebook {notebook}; see run.notebooks")
    for stage in (stage for stage in stages if stage in OTHER_INPUT):
        section, key = OTHER_INPUT[stage]
        chosen, previous = other_input(settings, stage), STAGES[STAGES.index(stage) - 1]
        if chosen is None and previous not in stages and read_manifest(settings, previous) is None:
            raise StageError(
                f"{stage} reads {previous}, which has not been completed in {settings.run_dir}; "
                f"run it first, or name a folder in {section}.{key}"
            )
    first = next((i for i, stage in enumerate(stages) if force or due_reason(settings, stage)), len(stages))
    for stage in stages[first:]:
        check_stage(settings, stage)
    check_room(settings, stages)


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


def _identity(path: Path) -> tuple[int, int] | None:
    """Inode and time of change: another file at the same path has another one."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def one_line(exception: Exception) -> str:
    """The error of a notebook's cell, or of the kernel, in one line."""
    name = getattr(exception, "ename", type(exception).__name__)
    if name == "DeadKernelError":
        return "the kernel died (killed, or out of memory)"
    text = str(getattr(exception, "evalue", exception)).strip()
    return f"{name}: {text.splitlines()[0] if text else 'no message'}"


def _alone(settings: Settings) -> AbstractContextManager[object]:
    """Take the run's lock, which the system releases when its holder dies; wait for whoever has it."""
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.run_dir / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"{settings.run.name}: waiting for the process that carries this run out", file=sys.stderr)  # noqa: T201
        return lock.acquire()


@contextmanager
def kernel_environment(settings: Settings) -> Iterator[None]:
    """Set for the kernel: cache folders of the profile, and the kernel spec of this very Python."""
    cache = settings.cache
    folders = {
        "HF_HOME": cache.hf_home,
        "TORCHINDUCTOR_CACHE_DIR": cache.torchinductor_dir,
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), cache.temp_dir),
    }
    before = dict(os.environ)
    for name, value in folders.items():
        if value is not None:
            resolve(value).mkdir(parents=True, exist_ok=True)
            os.environ[name] = str(resolve(value))
    # A kernel named python3 in the user's folders may belong to another environment.
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

"""The index of one run and the index of all runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from so8t_helpers.report.page import write_page
from so8t_helpers.report.study import STUDIES
from so8t_helpers.run.records import flat, known_runs, stage_states
from so8t_helpers.run.stage import STAGES, read_manifest
from so8t_helpers.settings import Settings, resolve
from so8t_helpers.thinking.audit import service_log
from so8t_helpers.thinking.audit_lines import published_head

COMPARISONS = "compare"  # folder of the pages that compare runs


def _served(settings: Settings) -> str:
    """The model whose answers stand for a run: the last that was asked."""
    return (settings.eval.models or ["baked"])[-1]


def key_figures(settings: Settings) -> tuple[str, ...]:
    """What the list of all runs shows: how much it learned from, how well, and whether that survived."""
    served = _served(settings)
    return (
        "train lines",
        "last task loss",
        "kept held-out loss",
        "logit difference of baking",
        f"{settings.gguf.types[-1]} KL from F16",
        "format baked",
        "answer baked",
        f"format {served}",
        f"answer {served}",
    )


def index_path(settings: Settings) -> Path:
    """Where the index of all runs of an area goes."""
    return resolve(settings.run.reports_root) / "index.html"


def stage_rows(settings: Settings) -> list[dict[str, str]]:
    """Return a table's rows: every run of the area (the profile's alone where there is none), its stages."""
    runs = known_runs(settings) or [settings]
    return [{"run": run.run.name} | {s.title: s.state for s in stage_states(run)} for run in runs]


def write_run_index(settings: Settings) -> Path:
    """Write `reports/<run>/index.html`: every stage's state, key figures, time and report."""
    manifests = [manifest for stage in STAGES if (manifest := read_manifest(settings, stage))]
    default = flat(Settings())
    evaluation = settings.run_dir / "05_ollama_eval" / "audit.jsonl"
    logs = {"Evaluation": evaluation, "/think service": service_log(settings)}
    return write_page(
        settings.reports_dir / "index.html",
        "run.html.j2",
        settings,
        title=settings.run.name,
        run=settings.run.name,
        profile=settings.profile,
        stages=stage_states(settings),
        versions=manifests[-1]["versions"] if manifests else {},
        # A log whose tail is cut later no longer fits its head.
        heads={name: head for name, path in logs.items() if (head := published_head(path))},
        chosen=[(key, value, default[key]) for key, value in flat(settings).items() if value != default[key]],
    )


def write_index(settings: Settings) -> Path:
    """Write `reports/index.html`: all runs of the same run area, newest first."""
    runs = [run for run in known_runs(settings) if (run.reports_dir / "index.html").is_file()]
    values = [flat(run) for run in runs]
    differing = [key for key in flat(settings) if len({repr(value[key]) for value in values}) > 1]
    rows: list[dict[str, Any]] = []
    for run, value in zip(runs, values, strict=True):
        stages = stage_states(run)
        facts = {name: fact for state in stages for name, fact in state.facts.items()}
        rows.append(
            {
                "run": run,
                "stages": stages,
                "figures": {name: facts[name] for name in key_figures(run) if name in facts},
                "differing": {key: value[key] for key in differing},
                "finished": max(state.finished for state in stages),
                "seconds": sum(state.seconds or 0.0 for state in stages),
            }
        )
    rows.sort(key=lambda row: row["finished"], reverse=True)
    path = index_path(settings)
    return write_page(
        path,
        "index.html.j2",
        settings,
        title="Runs",
        rows=rows,
        comparisons=sorted(page.stem for page in (path.parent / COMPARISONS).glob("*.html")),
        studies=sorted(page.stem for page in (path.parent / STUDIES).glob("*.html")),
        finding=_finding(rows),
    )


def _finding(rows: list[dict[str, Any]]) -> str:
    """How many runs there are, how many came to their end, and which answers best."""
    done = sum(all(state.state == "done" for state in row["stages"]) for row in rows)
    count = f"{len(rows)} runs" if len(rows) != 1 else "1 run"
    text = f"{count}, newest first; {done} with all five stages done."
    scored = [
        (share, row["run"].run.name, served)
        for row in rows
        if (share := row["figures"].get(f"answer {(served := _served(row['run']))}")) is not None
    ]
    if len(scored) > 1:
        share, name, served = max(scored)
        text += f" Most answers right: {name} with {share:.1%} ({served})."
    return text

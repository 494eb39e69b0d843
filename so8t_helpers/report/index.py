"""The index of one run and the index of all runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from so8t_helpers.audit import published_head, service_log
from so8t_helpers.report.page import render
from so8t_helpers.report.records import flat, known_runs, stage_states
from so8t_helpers.run_folder import STAGES, read_manifest, write_text
from so8t_helpers.settings import Settings, resolve

# What the list of all runs shows of a run: how much it learned from, how well, and whether that survived.
FIGURES = (
    "train lines",
    "last task loss",
    "logit difference of baking",
    "q4_k_m KL from F16",
    "format baked",
    "answer baked",
    "format q4_k_m",
    "answer q4_k_m",
)


def write_run_index(settings: Settings) -> Path:
    """Write `reports/<run>/index.html`: every stage's state, key figures, time and report."""
    manifests = [manifest for stage in STAGES if (manifest := read_manifest(settings, stage))]
    default = flat(Settings())
    text = render(
        "run.html.j2",
        settings,
        title=settings.run.name,
        run=settings.run.name,
        profile=settings.profile,
        stages=stage_states(settings),
        versions=manifests[-1]["versions"] if manifests else {},
        heads=_audit_heads(settings),
        chosen=[(key, value, default[key]) for key, value in flat(settings).items() if value != default[key]],
    )
    path = settings.reports_dir / "index.html"
    write_text(path, text)
    return path


def _audit_heads(settings: Settings) -> dict[str, str]:
    """The audit logs of a run, each with its head: a log whose tail is cut later no longer fits it."""
    logs = {
        "Evaluation": settings.run_dir / "05_ollama_eval" / "audit.jsonl",
        "/think service": service_log(settings),
    }
    return {name: head for name, path in logs.items() if (head := published_head(path))}


def write_index(settings: Settings) -> Path:
    """Write `reports/index.html`: all runs of the same run area, newest first."""
    runs = [run for run in known_runs(settings) if (run.reports_dir / "index.html").is_file()]
    values = [flat(run) for run in runs]
    differing = [key for key in flat(settings) if len({repr(value[key]) for value in values}) > 1]
    rows: list[dict[str, Any]] = []
    for run, value in zip(runs, values, strict=True):
        stages = stage_states(run)
        facts = {name: fact for state in stages for name, fact in state.facts.items()}
        figures = {name: facts[name] for name in FIGURES if name in facts}
        changed = {key: value[key] for key in differing}
        rows.append({"run": run, "stages": stages, "figures": figures, "differing": changed})
    rows.sort(key=lambda row: max(state.finished for state in row["stages"]), reverse=True)
    folder = resolve(settings.run.reports_root)
    comparisons = sorted(path.stem for path in (folder / "compare").glob("*.html"))
    text = render("index.html.j2", settings, title="Runs", rows=rows, comparisons=comparisons)
    path = folder / "index.html"
    write_text(path, text)
    return path

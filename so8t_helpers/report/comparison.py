"""A page that compares runs: curves over each other, settings and figures that differ, changed answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from so8t_helpers.report.index import COMPARISONS
from so8t_helpers.report.page import write_page
from so8t_helpers.report.svg import slim_svg
from so8t_helpers.run.files import StageError, read_jsonl
from so8t_helpers.run.records import StageState, flat, stage_states
from so8t_helpers.run.stage import read_manifest
from so8t_helpers.settings import Settings, resolve
from so8t_helpers.show import style

MOST_ANSWERS = 40  # changed answers shown; the page says how many there are


def comparison_path(settings: Settings, name: str) -> Path:
    """Where a comparison's page goes."""
    return resolve(settings.run.reports_root) / COMPARISONS / f"{name}.html"


def write_comparison(runs: list[Settings], name: str, notes: dict[str, str] | None = None) -> Path:
    """Write `reports/compare/<name>.html`, which measures runs against the first of them.

    `notes` say for a run that was stopped what stopped it. Raises StageError: fewer than two runs, or one
    that does not exist.
    """
    for run in runs:
        if not (run.run_dir / "params.yaml").is_file():
            raise StageError(f"no run {run.run.name} in {run.run_dir.parent}")
    if len(runs) < 2:
        raise StageError("a comparison needs two runs or more")
    names = [run.run.name for run in runs]
    figures = _figures(runs)
    alt = f"one colour for each of {', '.join(names)}"
    states = {run.run.name: stage_states(run) for run in runs}
    shown, total = _changed_answers(runs)
    return write_page(
        comparison_path(runs[0], name),
        "compare.html.j2",
        runs[0],
        [slim_svg(style.to_svg(figure, f"{title}, {alt}")) for title, figure in figures.items()],
        title=name,
        names=names,
        notes=notes or {},
        finding=_answer(runs, states),
        differing=_differing([flat(run) for run in runs]),
        figure_titles=list(figures),
        facts=_facts(states),
        states=states,
        answers=shown,
        total=total,
    )


def _answer(runs: list[Settings], states: dict[str, list[StageState]]) -> str:
    """The page's finding in a sentence: which run answers best and which has the lowest loss."""
    parts = []
    models = [model for model in reversed(runs[0].eval.models) if model != "base"]
    facts = {name: {k: v for stage in of for k, v in stage.facts.items()} for name, of in states.items()}
    for key, what, best, form in (
        *((f"answer {model}", f"correct answers of {model}", max, "{:.1%}") for model in models[:1]),
        ("last task loss", "last task loss", min, "{:.3f}"),
        ("held-out loss", "kept held-out loss", min, "{:.3f}"),
    ):
        found = {name: value for name, of in facts.items() if isinstance(value := of.get(key), int | float)}
        if len(found) == len(runs):
            top = best(found, key=lambda name: found[name])
            others = ", ".join(f"{name} {form.format(value)}" for name, value in found.items() if name != top)
            parts.append(f"{what}: {top} is best with {form.format(found[top])} ({others})")
    text = "; ".join(parts)
    if not text:
        return "Not all of these runs have been trained and evaluated yet."
    asked = [run.eval.prompts for run in runs]
    caution = " They were not asked the same number of prompts." if len(set(asked)) > 1 else ""
    return f"{text[0].upper()}{text[1:]}.{caution}"


def _differing(values: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Keys whose values are not all the same, with the value of each run."""
    keys = dict.fromkeys(key for value in values for key in value)
    rows = {key: [value.get(key) for value in values] for key in keys}
    return {key: row for key, row in rows.items() if any(item != row[0] for item in row[1:])}


def _facts(states: dict[str, list[StageState]]) -> dict[str, dict[str, list[Any]]]:
    """Key figures of each stage that differ, by name, with the value of each run (None where it has none)."""
    stages = zip(*states.values(), strict=True)
    return {of[0].title: _differing([s.facts for s in of]) for of in stages if any(s.facts for s in of)}


def _figures(runs: list[Settings]) -> dict[str, Figure]:
    """The page's figures by their titles; without those of stages that no run carried out."""
    metrics = _read(runs, "02_train", "metrics.parquet", pd.read_parquet)
    angles = _read(runs, "02_train", "angles.safetensors", load_file)
    scores = _read(
        runs, "05_ollama_eval", "scores.json", lambda path: json.loads(path.read_bytes())["models"]
    )
    found: dict[str, Figure] = {}
    if metrics:
        found["Losses"] = losses(metrics)
    if angles:
        ways = {name: (of["steps"], of["angles"]) for name, of in angles.items()}
        found["Drift of the rotations"] = drift(ways)
    if scores:
        found["Correct answers"] = shares(scores, "answer", "answers correct")
        found["Format"] = shares(scores, "format", "answers in the right format")
    return found


def _read(runs: list[Settings], stage: str, name: str, read: Callable[[Path], Any]) -> dict[str, Any]:
    """What a stage left, read, by the names of the runs that carried it out."""
    paths = {run.run.name: run.run_dir / stage / name for run in runs if read_manifest(run, stage)}
    return {run: read(path) for run, path in paths.items() if path.is_file()}


def _changed_answers(runs: list[Settings]) -> tuple[list[dict[str, Any]], int]:
    """Final answers that are not the same in all runs, for the smallest file that all of them asked.

    Only the final part of an answer is ever on the disk, so no thinking can come into the page.
    """
    files = _read(runs, "05_ollama_eval", "answers.jsonl", read_jsonl).values()
    models = [{row["model"] for row in rows} for rows in files]
    common = [model for model in reversed(runs[0].eval.models) if all(model in found for found in models)]
    if len(files) != len(runs) or not common:
        return [], 0
    answers = [{row["id"]: row for row in rows if row["model"] == common[0]} for rows in files]
    in_all = [key for key in answers[0] if all(key in found for found in answers)]
    changed = [
        {"prompt": rows[0]["prompt"], "model": common[0], "rows": rows}
        for rows in ([found[key] for found in answers] for key in in_all)
        if len({row["final"] for row in rows}) > 1
    ]
    # Those that turned right or wrong come first.
    changed.sort(key=lambda item: len({bool(row["correct"]) for row in item["rows"]}), reverse=True)
    return changed[:MOST_ANSWERS], len(changed)


def run_colors(names: list[str]) -> dict[str, str]:
    """Return a colour for each run, the same in all figures of one page."""
    return {name: style.SERIES[i % len(style.SERIES)] for i, name in enumerate(names)}


def losses(metrics: Mapping[str, pd.DataFrame]) -> Figure:
    """Task loss and PET loss over the optimizer steps, one line a run: the median of a twentieth of it."""
    fig, axes = style.new_figure(height=3.4, ncols=2)
    colors = run_colors(list(metrics))
    columns = {"task_loss": "task loss (nats a token)", "pet_loss": "PET loss"}
    for ax, (column, label) in zip(axes, columns.items(), strict=True):
        for name, frame in metrics.items():
            window = max(1, len(frame) // 20)
            smooth = frame[column].rolling(window, center=True, min_periods=1).median()
            ax.plot(frame["step"], smooth, color=colors[name], label=name)
        ax.set(xlabel="optimizer step", title=label)
    style.log_where_wide(axes[0], [frame["task_loss"] for frame in metrics.values()])
    _name_runs(fig, axes[0])
    return fig


def drift(angles: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Mean distance of the principal angles from their start, in radians, over the steps.

    `angles`: for each run its steps (S,) and angles (S, layers, blocks, 4).
    """
    fig, ax = style.new_figure(height=3.2)
    colors = run_colors(list(angles))
    for name, (steps, theta) in angles.items():
        moved = np.abs(theta - theta[:1]).mean(axis=(1, 2, 3))
        ax.plot(steps, moved, color=colors[name], label=name)
    ax.set(xlabel="optimizer step", ylabel="mean |θ − θ at the start| (rad)")
    _name_runs(fig, ax)
    return fig


def shares(scores: Mapping[str, Mapping[str, Mapping[str, float]]], key: str, label: str) -> Figure:
    """One share of the evaluation, `scores[run][model][key]`, as dots: a row a model, a colour a run."""
    models = list(dict.fromkeys(model for run in scores.values() for model in run))
    fig, ax = style.new_figure(height=0.9 + 0.42 * len(models))
    colors = run_colors(list(scores))
    spread = np.linspace(-0.22, 0.22, len(scores)) if len(scores) > 1 else [0.0]
    for offset, (name, run) in zip(spread, scores.items(), strict=True):
        rows = [i for i, model in enumerate(models) if run.get(model, {}).get(key) is not None]
        values = [100 * run[models[i]][key] for i in rows]
        ax.plot(values, np.array(rows) + offset, "o", color=colors[name], label=name)
    ax.set(yticks=range(len(models)), yticklabels=models, xlabel=f"{label} (%)", xlim=(-3, 103))
    ax.set_ylim(len(models) - 0.5, -0.5)
    _name_runs(fig, ax)
    return fig


def _name_runs(fig: Figure, ax: Axes) -> None:
    """One legend above all panels: lines of several runs end too near each other for labels of their own."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper left", ncols=min(3, len(labels)))

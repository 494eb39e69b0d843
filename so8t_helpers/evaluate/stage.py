"""The stage: open one model after another, let it answer all prompts, judge, write down."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from so8t_helpers.engines.base import Completion, Engine
from so8t_helpers.engines.host import GgufHost, modelfile_of
from so8t_helpers.engines.transformers_engine import open_transformers
from so8t_helpers.evaluate.calibration import Stated, calibrate, find_stated
from so8t_helpers.evaluate.checks import TokenParity, check_native
from so8t_helpers.evaluate.harness import check_harness, run_harness
from so8t_helpers.evaluate.judge import score
from so8t_helpers.evaluate.prompts import Prompt, choose_prompts
from so8t_helpers.evaluate.summary import compare, pairs, summarise
from so8t_helpers.phi3.source import base_folder
from so8t_helpers.run.files import StageError, write_json, write_jsonl, write_text
from so8t_helpers.run.progress import Progress, progress
from so8t_helpers.run.stage import Stage, open_stage, stage_input
from so8t_helpers.settings import Settings
from so8t_helpers.thinking.audit import AuditLog
from so8t_helpers.thinking.format import parse

STAGE = "05_ollama_eval"
_FOLDERS = ("base", "baked")


def evaluate(settings: Settings) -> dict[str, Any]:
    """Evaluate `eval.models` on the held-out prompts and return what goes into scores.json.

    Writes answers.jsonl, scores.json and Modelfile; checks that every model is given the same token ids.

    Raises:
        StageError: a model, a file or the held-out records are missing, or token ids differ.
        EngineError: an engine cannot load a model or breaks off.
    """
    check_harness(settings)
    with open_stage(settings, STAGE) as stage:
        prompts = choose_prompts(stage)
        audit = AuditLog(stage.directory / "audit.jsonl")
        sources = {name: _source(stage, name) for name in settings.eval.models}
        answers: dict[str, pd.DataFrame] = {}
        scores: dict[str, Any] = {"models": {}}
        parity = TokenParity(prompts)
        total = len(prompts) * len(sources)
        samples, seed = settings.eval.bootstrap_samples, settings.run.seed
        with GgufHost(settings) as host, progress(settings, STAGE, total, "answers") as tracker:
            for name, source in sources.items():
                tracker.status.what = name
                with open_source(settings, host, name, source) as engine:
                    parity.check(name, engine)
                    completions, seconds = _answer(settings, engine, prompts, tracker)
                    rows = _judge(settings, name, prompts, completions, audit)
                    if name == _tuned(settings):
                        stated = _stated(prompts, rows, completions)
                        scores["calibration"] = calibrate(engine, stated, samples, seed)
                    if name == _served(settings):
                        scores["native"] = check_native(settings, engine, prompts, rows)
                        _log(audit, engine, rows)
                        if settings.eval.harness_tasks:
                            scores["harness"] = run_harness(settings, engine)
                answers[name] = pd.DataFrame(rows)
                scores["models"][name] = summarise(answers[name], seconds, samples, seed)
            scores["engine"] = {"name": host.name, "version": host.version, "description": host.description}
        scores["pairs"] = [
            {"before": a, "after": b, **compare(answers[a], answers[b], samples, seed)}
            for a, b in pairs(list(answers))
        ]
        scores["parity"] = parity.found
        scores["audit_head"] = audit.head
        _write(stage, answers, scores)
        served = sources.get(_served(settings) or "")
        if served is not None:
            text = modelfile_of(settings, served).text(f"../04_gguf/{served.name}")
            write_text(stage.directory / "Modelfile", text)
    return scores


def _source(stage: Stage, name: str) -> Path:
    """The folder or file of a model, its files registered as inputs of the stage."""
    settings = stage.settings
    if name in _FOLDERS:
        folder = (
            base_folder(settings)
            if name == "base"
            else stage_input(settings, settings.gguf.model_dir, "03_bake", "model")
        )
        stage.read_file(f"{name}/config.json", folder / "config.json", "run stage 03_bake first")
        for weights in sorted(folder.glob("*.safetensors")):
            stage.read_file(f"{name}/{weights.name}", weights)
        return folder
    folder = stage_input(settings, settings.eval.gguf_dir, "04_gguf")
    found = sorted(folder.glob(f"*-{name}.gguf")) or sorted(folder.glob(f"*-{name.upper()}.gguf"))
    if len(found) > 1:
        raise StageError(
            f"eval.models: several files for {name} in {folder}: {', '.join(p.name for p in found)}"
        )
    path = found[0] if found else folder / f"{settings.gguf.name}-{name}.gguf"
    hint = "run stage 04_gguf first, with this type in gguf.types, or take it out of eval.models"
    return stage.read_file(f"04_gguf/{path.name}", path, hint)


def open_source(settings: Settings, host: GgufHost, name: str, source: Path) -> Engine:
    """Load a model of `eval.models`: a folder in transformers, a file in the host; its way there has a bar.

    Raises:
        EngineError: the engine cannot load it.
    """
    if name in _FOLDERS:
        return open_transformers(source, think_command=settings.dataset.think_command)
    if host.server is None:
        return host.open(source, name)
    # A file of some gigabytes takes a while to Ollama; one that is there already is not sent again.
    size = source.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"{name} to Ollama", leave=False) as bar:
        return host.open(source, name, bar.update)


def _served(settings: Settings) -> str | None:
    """The model that the service would serve, where it is among those evaluated, else the last file."""
    files = [name for name in settings.eval.models if name not in _FOLDERS]
    return settings.serve.model if settings.serve.model in files else files[-1] if files else None


def _tuned(settings: Settings) -> str | None:
    """The tuned model in full precision: its confidence is measured, undisturbed by quantisation."""
    return next((name for name in settings.eval.models if name != "base"), None)


def _answer(
    settings: Settings, engine: Engine, prompts: list[Prompt], tracker: Progress
) -> tuple[list[Completion], float]:
    """Let a model answer all prompts; return the answers and the seconds that they took."""

    def count(completion: Completion) -> None:
        tracker.update(1, tokens=completion.tokens)

    started = time.perf_counter()
    completions = engine.complete_many(
        [prompt.text for prompt in prompts],
        max_tokens=settings.eval.max_new_tokens,
        temperature=settings.eval.temperature,
        seed=settings.run.seed,
        on_done=count,
    )
    return completions, time.perf_counter() - started


def _judge(
    settings: Settings, name: str, prompts: list[Prompt], completions: list[Completion], audit: AuditLog
) -> list[dict[str, Any]]:
    rows = [_row(name, prompt, done, audit) for prompt, done in zip(prompts, completions, strict=True)]
    if settings.eval.show_thinking:
        for row, done in zip(rows, completions, strict=True):
            row["thinking"] = parse(done.text).thinking
    return rows


def _stated(prompts: list[Prompt], rows: list[dict[str, Any]], completions: list[Completion]) -> list[Stated]:
    """The decisions that stand in the answers."""
    found = [
        find_stated(prompt.text, done.text, row["decision"], row["label"])
        for prompt, row, done in zip(prompts, rows, completions, strict=True)
    ]
    return [stated for stated in found if stated is not None]


def _row(name: str, prompt: Prompt, done: Completion, audit: AuditLog) -> dict[str, Any]:
    """One line of answers.jsonl: the released part, what it is worth, and of the thinking its HMAC alone."""
    record, judged = prompt.row, score(done.text, prompt.row)
    return {
        "id": record["id"],
        "model": name,
        "prompt": record["prompt"],
        "label": record["label"],
        "task": record["task"] or "",
        "final": judged.final,
        "well_formed": judged.well_formed,
        "separated": judged.separated,
        "correct": judged.correct,
        "decision": judged.decision,
        "refused": judged.refused,
        "leaked": judged.leaked,
        "tokens": done.tokens,
        "prompt_tokens": done.prompt_tokens,
        "first_token_s": done.first_token_s,
        "seconds": done.seconds,
        "stopped": done.stopped,
        "text_hmac": audit.code(done.text.strip()),
        "thinking_hmac": audit.code(judged.thinking),
    }


def _log(audit: AuditLog, engine: Engine, rows: list[dict[str, Any]]) -> None:
    """Enter the served model's answers into the audit log, as the service does with its own."""
    kept = ("id", "decision", "thinking_hmac", "tokens", "seconds")
    for row in rows:
        entry = {"event": "evaluated", "model": row["model"], "engine": engine.name}
        audit.append(entry | {key: row[key] for key in kept})


def _write(stage: Stage, answers: dict[str, pd.DataFrame], scores: dict[str, Any]) -> None:
    frame = pd.concat(answers.values(), ignore_index=True)
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    write_jsonl(stage.directory / "answers.jsonl", ({str(k): v for k, v in row.items()} for row in rows))
    write_json(stage.directory / "scores.json", scores)
    stage.facts["engine"] = f"{scores['engine']['name']} {scores['engine']['version']}"
    stage.facts["prompts"] = len(next(iter(answers.values())))
    for name in answers:
        stage.facts[f"format {name}"] = scores["models"][name]["format"]
        stage.facts[f"answer {name}"] = scores["models"][name]["answer"]

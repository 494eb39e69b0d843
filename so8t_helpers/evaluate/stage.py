"""The stage: open one model after another, let it answer all prompts, judge, write down."""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from so8t_helpers.engines.base import Completion, Engine
from so8t_helpers.engines.host import GgufHost, check_engine, find_gguf, missing_gguf, modelfile_of
from so8t_helpers.engines.transformers_engine import open_transformers
from so8t_helpers.evaluate.calibration import calibrate, find_stated
from so8t_helpers.evaluate.checks import TokenParity, check_native
from so8t_helpers.evaluate.harness import check_harness, run_harness
from so8t_helpers.evaluate.judge import score
from so8t_helpers.evaluate.prompts import Prompt, choose_rows, write_prompts
from so8t_helpers.evaluate.summary import compare, pairs, summarise
from so8t_helpers.phi3.chat import Dialect
from so8t_helpers.phi3.folder import check_folder
from so8t_helpers.phi3.source import base_folder, check_base
from so8t_helpers.phi3.template import read_dialect
from so8t_helpers.run.files import StageError, replace, write_json, write_jsonl, write_text
from so8t_helpers.run.progress import Progress
from so8t_helpers.run.stage import Stage, open_stage, other_input, stage_input
from so8t_helpers.settings import Settings
from so8t_helpers.thinking.audit import AuditLog, verify_audit
from so8t_helpers.thinking.audit_lines import sibling

STAGE = "05_ollama_eval"
log = logging.getLogger(__name__)
_FOLDERS = ("base", "baked")


def check(settings: Settings) -> None:
    """Look at harness, engine and the models that are to be evaluated; nothing is made or started.

    Raises:
        SettingsError, StageError: a model that no stage makes, or a folder or program that is not there.
    """
    check_harness(settings)
    check_engine(settings)
    elsewhere = other_input(settings, STAGE) is not None
    if "base" in settings.eval.models and (base := check_base(settings)) is not None:
        check_folder(base)
    if "baked" in settings.eval.models and (baked := other_input(settings, "04_gguf")) is not None:
        check_folder(baked)
    for name in (name for name in settings.eval.models if name not in _FOLDERS):
        if elsewhere:
            find_gguf(settings, name)
        elif name not in settings.gguf.types:
            raise missing_gguf(settings, name, f"gguf.types has {', '.join(settings.gguf.types)}")


def evaluate(settings: Settings) -> dict[str, Any]:
    """Evaluate `eval.models` on the held-out prompts and return what goes into scores.json.

    Writes answers.jsonl, scores.json and Modelfile; checks that every model is given the same token ids.

    Raises:
        StageError: a model, a file or the held-out records are missing, or token ids differ.
        EngineError: an engine cannot load a model or breaks off.
    """
    check(settings)
    with open_stage(settings, STAGE) as stage:
        records = choose_rows(stage)
        sources = {name: _source(stage, name) for name in settings.eval.models}
        prompts = write_prompts(records, _dialect(sources))
        audit = _audit_log(stage.directory / "audit.jsonl")
        if set_aside := sorted(path.name for path in stage.directory.glob("audit-broken-*.jsonl")):
            stage.facts["audit logs set aside"] = ", ".join(set_aside)
        answers: dict[str, pd.DataFrame] = {}
        lines: list[dict[str, Any]] = []
        scores: dict[str, Any] = {"models": {}}
        parity = TokenParity(prompts)
        total = len(prompts) * len(sources)
        samples, seed = settings.eval.bootstrap_samples, settings.run.seed
        served = _served(settings)
        # The tuned model in full precision: its confidence is measured, undisturbed by quantisation.
        tuned = next((name for name in sources if name != "base"), None)
        with GgufHost(settings) as host, Progress(settings, STAGE, total, "answers") as tracker:
            for name, source in sources.items():
                tracker.status.what = name
                with open_source(settings, host, name, source) as engine:
                    parity.check(name, engine)
                    completions, seconds = _answer(settings, engine, prompts, tracker)
                    rows = [
                        _row(name, prompt, done, audit, settings.eval.show_thinking)
                        for prompt, done in zip(prompts, completions, strict=True)
                    ]
                    if name == tuned:
                        found = (
                            find_stated(prompt.text, done.text, row["decision"], row["label"])
                            for prompt, done, row in zip(prompts, completions, rows, strict=True)
                        )
                        stated = [decision for decision in found if decision is not None]
                        scores["calibration"] = calibrate(engine, stated, samples, seed)
                    if name == served:
                        scores["native"] = check_native(settings, engine, prompts, rows)
                        _log(audit, engine, rows)
                        if settings.eval.harness_tasks:
                            scores["harness"] = run_harness(settings, engine)
                lines += rows
                answers[name] = pd.DataFrame(rows)
                scores["models"][name] = summarise(answers[name], seconds, samples, seed)
            scores["engine"] = {"name": host.name, "version": host.version, "description": host.description}
        scores["pairs"] = [
            {"before": a, "after": b, **compare(answers[a], answers[b], samples, seed)}
            for a, b in pairs(list(answers))
        ]
        scores["parity"] = parity.found
        scores["audit_head"] = audit.head
        write_jsonl(stage.directory / "answers.jsonl", lines)
        write_json(stage.directory / "scores.json", scores)
        if served is not None:
            text = modelfile_of(settings, sources[served]).text(f"../04_gguf/{sources[served].name}")
            write_text(stage.directory / "Modelfile", text)
        stage.facts["engine"] = f"{scores['engine']['name']} {scores['engine']['version']}"
        stage.facts["prompts"] = len(prompts)
        for name, entry in scores["models"].items():
            stage.facts |= {f"format {name}": entry["format"], f"answer {name}": entry["answer"]}
    return scores


def _audit_log(path: Path) -> AuditLog:
    """Open the log of this stage's answers; one that does not verify is set aside, and a new one begun.

    A power cut may leave its head empty; an evaluation that can be done again must not fail of it for good.
    """
    if path.exists() and not (verdict := verify_audit(path)).ok:
        number = next(n for n in itertools.count(1) if not path.with_stem(f"audit-broken-{n}").exists())
        aside = path.with_stem(f"audit-broken-{number}")
        log.warning(
            "%s: line %s: %s; it is kept as %s, and a new log begins",
            path,
            verdict.line,
            verdict.problem,
            aside.name,
        )
        for old, new in ((path, aside), (sibling(path, "head"), sibling(aside, "head"))):
            if old.exists():
                replace(old, new)
    return AuditLog(path)


def _source(stage: Stage, name: str) -> Path:
    """The folder or file of a model, its files registered as inputs of the stage."""
    settings = stage.settings
    if name in _FOLDERS:
        if name == "base":
            folder = base_folder(settings)
        else:
            folder = stage_input(settings, settings.gguf.model_dir, "03_bake", "model")
        stage.read_file(f"{name}/config.json", folder / "config.json", "run stage 03_bake first")
        for weights in sorted(folder.glob("*.safetensors")):
            if name == "baked":
                stage.check_made(f"03_bake/model/{weights.name}", weights)
            stage.read_file(f"{name}/{weights.name}", weights)
        return folder
    path = find_gguf(settings, name)
    return stage.read_file(f"04_gguf/{path.name}", path)


def _dialect(sources: dict[str, Path]) -> Dialect:
    """The dialect that all models write, or an error that names the first that writes another."""
    dialects = {name: read_dialect(source) for name, source in sources.items()}
    first = next(iter(dialects))
    for name, dialect in dialects.items():
        if dialect.joints != dialects[first].joints:
            raise StageError(
                f"eval.models: the chat templates of {first} ({sources[first]}) and {name} ({sources[name]}) "
                "write chats differently; evaluate models of one base"
            )
    return dialects[first]


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


def _answer(
    settings: Settings, engine: Engine, prompts: list[Prompt], tracker: Progress
) -> tuple[list[Completion], float]:
    """Let a model answer all prompts; return the answers and the seconds that they took."""
    started = time.perf_counter()
    completions = engine.complete_many(
        [prompt.text for prompt in prompts],
        max_tokens=settings.eval.max_new_tokens,
        temperature=settings.eval.temperature,
        seed=settings.run.seed,
        on_done=lambda completion: tracker.update(1, tokens=completion.tokens),
    )
    return completions, time.perf_counter() - started


def _row(name: str, prompt: Prompt, done: Completion, audit: AuditLog, show: bool) -> dict[str, Any]:
    """One line of answers.jsonl; of the thinking an HMAC alone, its text only where `show` is set."""
    record, judged = prompt.row, asdict(score(done.text, prompt.row))
    thinking = judged.pop("thinking")
    return {
        "id": record["id"],
        "model": name,
        "prompt": record["prompt"],
        "label": record["label"],
        "task": record["task"] or "",
        **judged,
        "tokens": done.tokens,
        "prompt_tokens": done.prompt_tokens,
        "first_token_s": done.first_token_s,
        "seconds": done.seconds,
        "stopped": done.stopped,
        "text_hmac": audit.code(done.text.strip()),
        "thinking_hmac": audit.code(thinking),
        **({"thinking": thinking} if show else {}),
    }


def _log(audit: AuditLog, engine: Engine, rows: list[dict[str, Any]]) -> None:
    """Enter the served model's answers into the audit log, as the service does with its own."""
    kept = ("id", "decision", "thinking_hmac", "tokens", "seconds")
    for row in rows:
        entry = {"event": "evaluated", "model": row["model"], "engine": engine.name}
        audit.append(entry | {key: row[key] for key in kept})

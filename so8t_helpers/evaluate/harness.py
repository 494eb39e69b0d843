"""Standard tasks: lm-evaluation-harness against the server that runs the GGUF, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from so8t_helpers.engines.base import Engine
from so8t_helpers.engines.http_engine import HttpEngine
from so8t_helpers.run.files import StageError
from so8t_helpers.settings import Settings, SettingsError, resolve


def check_harness(settings: Settings) -> None:
    """Raise SettingsError, before any long work, where tasks are asked for and cannot run."""
    if not settings.eval.harness_tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise SettingsError(
            "eval.harness_tasks: lm-evaluation-harness is not installed; "
            f"`{sys.executable} -m pip install --constraint constraints.txt lm-eval`, or leave the list empty"
        )
    folder = settings.eval.harness_dir
    if folder is not None and not resolve(folder).is_dir():
        raise SettingsError(f"eval.harness_dir: no folder {resolve(folder)}; it holds the tasks' YAML files")


def run_harness(settings: Settings, engine: Engine) -> dict[str, dict[str, float]]:
    """Run `eval.harness_tasks` on a served model, without the think command; return each task's figures.

    The OpenAI-compatible endpoint that Ollama and llama.cpp both have gives no log-probabilities of a given
    text, so only tasks of output type `generate_until` can run. `eval.harness_dir` may hold further tasks;
    their `data_files` are relative to it.

    Raises:
        StageError: the harness fails; the message ends with its last words.
    """
    assert isinstance(engine, HttpEngine), "standard tasks need a server"
    scheme = engine.client.headers.get("Authorization", "")
    endpoint = {
        "base_url": f"{engine.url}/v1/chat/completions",
        "model": engine.model,
        "num_concurrent": engine.parallel,
        "max_retries": 1,
        "timeout": int(engine.timeout),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve(settings.eval.harness_dir) if settings.eval.harness_dir else Path(scratch)
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions"]
        command += ["--model_args", ",".join(f"{key}={value}" for key, value in endpoint.items())]
        command += ["--tasks", ",".join(settings.eval.harness_tasks), "--include_path", str(folder)]
        command += ["--apply_chat_template", "--output_path", str(Path(scratch) / "out")]
        # Ollama thinks unless told otherwise; llama.cpp does not know the key and passes over it.
        command += ["--gen_kwargs", f"temperature=0,reasoning_effort=none,seed={settings.run.seed}"]
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "OPENAI_API_KEY": scheme.removeprefix("Bearer ") or "none", "PYTHONUTF8": "1"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        found = sorted((Path(scratch) / "out").rglob("results*.json"))
        if done.returncode != 0 or not found:
            last = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise StageError(f"lm-evaluation-harness ended with status {done.returncode}: {last}")
        return _figures(json.loads(found[-1].read_text(encoding="utf-8")))


def _figures(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Numbers alone, their names without the harness's filter suffix where it is the default one."""
    return {
        task: {
            key.removesuffix(",none"): float(value)
            for key, value in entry.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, entry in results["results"].items()
    }

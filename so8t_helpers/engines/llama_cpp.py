"""Embedded llama.cpp: a GGUF in a subprocess of its own, asked over HTTP on loopback.

A subprocess, because a process that had also imported transformers hung, and because a crash or a hang of
llama.cpp then costs one model and not the notebook.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from so8t_helpers.engines.base import (
    EngineError,
    EngineTimeoutError,
    Piece,
    Pieces,
    child_environment,
    threads_for,
)
from so8t_helpers.engines.http_engine import HttpEngine
from so8t_helpers.phi3.template import read_dialect
from so8t_helpers.settings import PROJECT_ROOT


class LlamaCpp(HttpEngine):
    """One GGUF in llama.cpp; see `open_llama_cpp`."""

    def __init__(self, process: _Process, gguf: Path, timeout: float, parallel: int, think_command: str):
        self.process, self.think_command = process, think_command
        self.dialect = read_dialect(gguf)
        version = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
        super().__init__("llama.cpp", version, gguf.name, process.url, timeout, parallel)
        self.client.headers["Authorization"] = f"Bearer {process.secret}"

    def complete(self, prompt: str, *, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> Pieces:
        started, first = time.perf_counter(), None
        body = {"prompt": prompt, "n_predict": max_tokens, "temperature": temperature, "seed": seed}
        # Without the cache an answer does not depend on what was asked before it.
        body |= {"stream": True, "stop": list(self.dialect.stops), "cache_prompt": False}
        for data in self.lines("/completion", body):
            now = time.perf_counter() - started
            if first is None and data.get("tokens_predicted"):
                first = now
            tokens, prompt_tokens = data["tokens_predicted"], data["tokens_evaluated"]
            if not data.get("stop"):
                yield Piece(data["content"], "", tokens, prompt_tokens)
                continue
            stopped = data.get("stop_type") in {"eos", "word"}
            yield Piece(data["content"], "", tokens, prompt_tokens, first, now, stopped)

    def tokenize(self, text: str) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": True}
        return [int(token) for token in self.post("/tokenize", body)["tokens"]]

    def score(self, text: str, start: int = 1) -> list[float]:
        """Log-probability of each token from `start` on; the server gives one position a request.

        The prefix stays in the slot's cache, so that each request costs one new token. The candidates that
        come back are the 64 likeliest; only where the text's own token is none of them, all are asked for.
        """
        ids = self.tokenize(text)
        return [self._log_probability(ids[:i], ids[i]) for i in range(start, len(ids))]

    def _log_probability(self, prefix: list[int], token: int) -> float:
        body: dict[str, Any] = {"prompt": prefix, "n_predict": 1, "temperature": 0.0, "id_slot": 0}
        # The server tells nothing where it would write an end or half a character: it is made to write "a".
        # The bias is the sampler's; the probabilities told are those before it.
        body["logit_bias"] = [[self.tokenize("a")[-1], 1e6]]
        for count in (64, 1 << 20):
            data = self.post("/completion", {**body, "cache_prompt": True, "n_probs": count})
            for candidate in data["completion_probabilities"][0]["top_logprobs"]:
                if candidate["id"] == token:
                    return float(candidate["logprob"])
        raise EngineError(
            f"llama.cpp ({self.model}): no probability for token {token}; is it in the vocabulary?"
        )

    def failure(self, error: httpx.HTTPError) -> EngineError:
        """End a hanging subprocess with its request; add a dead one's last words."""
        found = super().failure(error)
        if isinstance(found, EngineTimeoutError):
            self.process.stop()
            return found
        return EngineError(f"{found}; last lines of its log: {self.process.log_tail()}")

    def close(self) -> None:
        """Close the connections and end the subprocess."""
        super().close()
        self.process.stop()


class _Process:
    """The subprocess `llama_server` with its log."""

    def __init__(self, options: dict[str, Any], timeout: float):
        self.secret = secrets.token_urlsafe(24)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        path = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "so8t_helpers.engines.llama_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**child_environment(), "PYTHONPATH": os.pathsep.join(path), "PYTHONUTF8": "1"},
            encoding="utf-8",
        )
        self.url = self._start({**options, "secret": self.secret}, timeout)

    def _start(self, options: dict[str, Any], timeout: float) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        # Reading a pipe has no time-out on Windows: the process is killed instead, which ends the pipe.
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(options) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        timed_out = not timer.is_alive()
        timer.cancel()
        answer = json.loads(line) if line else {}
        if "url" in answer:
            return str(answer["url"])
        self.stop()
        if timed_out:
            raise EngineTimeoutError(f"llama.cpp did not load {options['model']} within {timeout:g} s")
        why = answer.get("error", f"it ended with status {self.process.returncode}")
        raise EngineError(
            f"llama.cpp could not load {options['model']}: {why}; last lines of its log: {self.log_tail()}"
        )

    def log_tail(self) -> str:
        """The last lines that llama.cpp wrote, on one line."""
        self.log.seek(0)
        lines = self.log.read().decode("utf-8", "replace").strip().splitlines()
        return " | ".join(lines[-8:]) or "(empty)"  # why a file does not load is some lines from the end

    def stop(self) -> None:
        """End the process: kindly, then by force; safe to call twice."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def open_llama_cpp(
    gguf: Path, *, num_ctx: int = 4096, timeout: float = 600, parallel: int = 4, think_command: str = "/think"
) -> LlamaCpp:
    """Load a GGUF into llama.cpp in a subprocess of its own.

    Args:
        num_ctx: tokens of context for each prompt; over 4096 llama.cpp takes the long rope factors.
        timeout: seconds for loading, and to wait for the next piece of an answer.

    Raises:
        EngineError: no such file, not a GGUF that llama.cpp loads, not enough memory.
        EngineTimeoutError: not loaded in time.
    """
    if not gguf.is_file():
        raise EngineError(f"llama.cpp: no file {gguf}; 04_gguf makes it")
    options = {"model": str(gguf), "num_ctx": num_ctx, "parallel": parallel, "threads": threads_for(gguf)}
    return LlamaCpp(_Process(options, timeout), gguf, timeout, parallel, think_command)

"""A GGUF in Ollama: imported through its HTTP API, asked through it, taken out again."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from so8t_helpers.engines.base import Chat, EngineError, Piece, Pieces
from so8t_helpers.engines.http_engine import HttpEngine
from so8t_helpers.engines.ollama_server import OllamaServer
from so8t_helpers.phi3.chat import ASK, BEGIN, Dialect
from so8t_helpers.run.files import sha256_file
from so8t_helpers.thinking.format import PARTED

_CHUNK = 1 << 20
_MEMORY_WORDS = ("more system memory", "signal: killed", "out of memory", "cudaMalloc", "failed to allocate")


class Ollama(HttpEngine):
    """One model of an Ollama server; see `open_ollama`."""

    can_score = False
    separates = True

    def __init__(
        self, server: OllamaServer, model: str, dialect: Dialect, timeout: float, parallel: int, keep: bool
    ):
        super().__init__("Ollama", server.version, model, server.url, timeout, parallel)
        self.dialect, self.keep = dialect, keep
        self.where = f"; its log: {server.log}" if server.log else ""

    def generate(
        self, messages: Chat, *, max_tokens: int, temperature: float = 0.0, seed: int = 0, think: bool = True
    ) -> Pieces:
        """Answer a chat, streamed; with `think` the server puts the command and parts off the thinking."""
        options = {"num_predict": max_tokens, "temperature": temperature, "seed": seed}
        # The server renders the chat: what our renderer does to a content is done here.
        turns = [{**turn, "content": self.dialect.neutral(turn["content"])} for turn in messages]
        return self._stream("/api/chat", {"messages": turns, "think": think, "options": options})

    def complete(self, prompt: str, *, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> Pieces:
        """Go on after a rendered prompt, streamed; `think: false` keeps Ollama from parting the text."""
        stops = list(self.dialect.stops)
        options = {"num_predict": max_tokens, "temperature": temperature, "seed": seed, "stop": stops}
        body = {"prompt": prompt, "raw": True, "think": False, "options": options}
        return self._stream("/api/generate", body)

    def _stream(self, path: str, body: dict[str, Any]) -> Pieces:
        started, first = time.perf_counter(), None
        # A prompt that does not fit must be an error: Ollama would cut its head off in silence.
        common = {"model": self.model, "stream": True, "truncate": False, "shift": False}
        for data in self.lines(path, {**common, **body}):
            now = time.perf_counter() - started
            message = data.get("message", data)
            text = message.get("content", message.get("response", ""))
            thinking = message.get("thinking", "")
            if first is None and (text or thinking):
                first = now
            if not data["done"]:
                yield Piece(text, thinking)
                continue
            tokens, prompt_tokens = data.get("eval_count", 0), data.get("prompt_eval_count", 0)
            stopped = data.get("done_reason") == "stop"
            yield Piece(text, thinking, tokens, prompt_tokens, first, now, stopped)

    def tokenize(self, text: str) -> list[int]:
        """Token ids as Ollama sees the text.

        Ollama has no call for it, but gives back the ids of prompt and answer as `context`. An end mark set
        after the text keeps the answer's first token from growing into the text's last one.
        """
        body = {
            "model": self.model,
            "prompt": text + self.dialect.end,
            "template": "{{ .Prompt }}",
            "think": False,
            "stream": False,
            "truncate": False,
            "options": {"num_predict": 1, "temperature": 0.0},
        }
        data = self.post("/api/generate", body)
        if "context" not in data:
            raise EngineError(f"Ollama {self.version} tells no token ids (no `context` in /api/generate)")
        return [int(token) for token in data["context"][: data["prompt_eval_count"] - 1]]

    def score(self, text: str, start: int = 1) -> list[float]:
        """Not possible: Ollama's API gives log-probabilities of what it writes, not of what it is given."""
        raise EngineError("Ollama gives no log-probabilities of a given text; use llama.cpp or transformers")

    def show(self) -> dict[str, Any]:
        """What /api/show says: capabilities, template, parameters."""
        return dict(self.post("/api/show", {"model": self.model}))

    def failure(self, error: httpx.HTTPError) -> EngineError:
        """Say where a server of our own has its log."""
        found = super().failure(error)
        return type(found)(f"{found}{self.where}")

    def explain(self, message: str) -> EngineError:
        """Add what to do to Ollama's own words."""
        if any(word in message for word in _MEMORY_WORDS):
            return EngineError(
                f"Ollama ({self.model}): not enough memory: {message}; take a smaller quantisation or "
                "eval.num_ctx, or end other programs"
            )
        if "running the model" in message:  # so it calls a runner of its own that is gone
            return EngineError(
                f"Ollama ({self.model}): {message}: the process of the model crashed or was ended; the same "
                f"command asks it again{self.where}"
            )
        return super().explain(message)

    def close(self) -> None:
        """Unload the model, and take it out unless it is to be kept."""
        if self.client.is_closed:
            return
        # A server that is gone holds nothing in memory any more.
        with contextlib.suppress(httpx.HTTPError):
            self.client.post("/api/generate", json={"model": self.model, "keep_alive": 0})
            if not self.keep:
                self.client.request("DELETE", "/api/delete", json={"model": self.model})
        super().close()


def open_ollama(
    server: OllamaServer,
    gguf: Path,
    name: str,
    modelfile: Modelfile,
    *,
    timeout: float = 600.0,
    parallel: int = 4,
    keep: bool = False,
    on_bytes: Callable[[int], object] | None = None,
) -> Ollama:
    """Import a finished GGUF into Ollama and return it ready to answer.

    Args:
        gguf: the file; it is sent to the server once and known by its digest.
        name: of the model in Ollama, e.g. "so8t-demo:q4_k_m".
        timeout: seconds to wait for the next piece of an answer.
        keep: leave the model in Ollama at the end.
        on_bytes: told how many more bytes were sent, for a progress bar.

    Raises:
        EngineError: Ollama refuses the file, or its version does not part thinking.
    """
    engine = Ollama(server, name, modelfile.dialect, timeout, parallel, keep)
    try:
        digest = f"sha256:{sha256_file(gguf)}"
        _send_blob(engine, gguf, digest, on_bytes)
        body = {
            "model": name,
            "files": {gguf.name: digest},
            "template": modelfile.template,
            "parameters": modelfile.parameters,
            **({"system": modelfile.system} if modelfile.system else {}),
        }
        for _ in engine.lines("/api/create", body):
            pass
        if "thinking" not in engine.show().get("capabilities", []):
            raise EngineError(
                f"Ollama {server.version} does not see that {name} thinks; update Ollama to 0.9.0 or later"
            )
    except BaseException:
        engine.close()
        raise
    return engine


def _send_blob(engine: Ollama, gguf: Path, digest: str, on_bytes: Callable[[int], object] | None) -> None:
    def chunks() -> Iterator[bytes]:
        with gguf.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
                if on_bytes is not None:
                    on_bytes(len(chunk))

    try:
        if engine.client.head(f"/api/blobs/{digest}").status_code == httpx.codes.OK:
            return
        response = engine.client.post(f"/api/blobs/{digest}", content=chunks())
    except httpx.HTTPError as error:
        raise engine.failure(error) from error
    if response.is_error:
        raise engine.refusal(response)


# The dialect's template in Go's language. A chat that ends with the assistant's own turn is gone on with.
_TEMPLATE = """\
{{- $before := "" }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if eq .Role "system" }}BEGIN_SYSTEM{{ .Content }}
{{- else if eq .Role "user" }}{{ if eq $before "" }}BEGIN_USER{{ else }}NEXT_USER{{ end }}\
{{ COMMAND }}{{ .Content }}
{{- else if eq .Role "assistant" }}ANSWER{{ if .Thinking }}OPEN{{ .Thinking }}CLOSE{{ end }}{{ .Content }}
{{- end }}
{{- if and $last (eq .Role "user") }}ANSWER{{ end }}
{{- $before = .Role }}
{{- end }}"""


@dataclass(frozen=True)
class Modelfile:
    """What Ollama is told about a GGUF.

    Attributes:
        dialect: how the model writes chats.
        style: the think format that Ollama is to part, one of `format.STYLES`.
        think_command: put before the last question unless `think` is false.
        num_ctx: tokens of context; over 4096 llama.cpp takes the long rope factors.
        system: system turn for chats that bring none.
        threads: of the CPU; None leaves the choice to Ollama.
    """

    dialect: Dialect
    style: str = "seed"
    think_command: str = "/think"
    num_ctx: int = 4096
    system: str | None = None
    temperature: float = 0.0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("think_command", "system"):
            value = getattr(self, name) or ""
            if "{{" in value or '"""' in value:
                raise EngineError(f'Modelfile: {name} {value!r} must not contain {{{{ or """')
        for joint in self.dialect.joints.values():
            if "{{" in joint or '"""' in joint:
                raise EngineError(f'Modelfile: the chat template writes {joint!r}, which holds {{{{ or """')

    @property
    def template(self) -> str:
        """The chat template in Go's language."""
        opening, closing, _ = PARTED[self.style]
        command = f"if and $.Think $last }}}}{self.think_command} {{{{ end" if self.think_command else '""'
        joints = self.dialect.joints
        texts = {
            "BEGIN_SYSTEM": joints.get((BEGIN, "system"), ""),
            "BEGIN_USER": joints[BEGIN, "user"],
            "NEXT_USER": joints["assistant", "user"],
            "ANSWER": joints["user", ASK],
            "COMMAND": command,
            "OPEN": opening,
            "CLOSE": closing,
        }
        return re.sub("|".join(texts), lambda name: texts[name[0]], _TEMPLATE)

    @property
    def parameters(self) -> dict[str, Any]:
        """Stops and sampling; Ollama's own repeat penalty of 1.1 would make greedy answers differ."""
        _, _, end = PARTED[self.style]
        return {
            "stop": [*self.dialect.stops, *filter(None, [end])],
            "num_ctx": self.num_ctx,
            "temperature": self.temperature,
            "repeat_penalty": 1.0,
        } | ({"num_thread": self.threads} if self.threads else {})

    def text(self, gguf_name: str) -> str:
        """The same as a Modelfile for `ollama create`, for a GGUF of that path."""
        lines = [f"FROM {gguf_name}", f'TEMPLATE """{self.template}"""']
        for key, value in self.parameters.items():
            values = value if isinstance(value, list) else [value]
            lines += [f"PARAMETER {key} {json.dumps(v, ensure_ascii=False)}" for v in values]
        if self.system:
            lines.append(f'SYSTEM """{self.system}"""')
        return "\n".join(lines) + "\n"

"""What every engine can do; the evaluation and the /think service know this interface alone."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from so8t_helpers.phi3.chat import Dialect
from so8t_helpers.run.files import MachineError
from so8t_helpers.thinking.audit_key import KEY_VARIABLE

Chat = list[dict[str, str]]
TOKEN_VARIABLE = "SO8T_TOKEN"  # of the /think service
_SMALL_FILE = 64 << 20  # bytes


class EngineError(MachineError):
    """An engine cannot start, load or answer; the message says which, why and what to do."""


class EngineTimeoutError(EngineError):
    """An engine did not answer in time."""


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed answer; the counts and times come with the last one.

    Attributes:
        text: new visible text; in raw mode the model's own text, markers and all.
        thinking: new thinking text, where the engine itself keeps it apart from `text` (Ollama).
        tokens: generated in all, the one that ended the turn included where the engine counts it.
        first_token_s, seconds: from the request to the first token, and to the end.
        stopped: the model ended by itself; `max_tokens` did not cut it.
    """

    text: str = ""
    thinking: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    first_token_s: float | None = None
    seconds: float = 0.0
    stopped: bool = False


Pieces = Iterator[Piece]


@dataclass(frozen=True)
class Completion(Piece):
    """A whole answer: the pieces put together, with `token_ids` where the engine tells them."""

    token_ids: list[int] = field(default_factory=list)


class Closing:
    """What is closed at the end of its `with` block."""

    def close(self) -> None:
        """Free what is held; safe to call twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Engine(Closing, ABC):
    """One loaded model in one program: transformers in this process, llama.cpp in a subprocess, or Ollama.

    Attributes:
        name, version: of the program.
        model: what it has loaded.
        parallel: prompts it works on at once.
        dialect: how the model writes chats.
        think_command: what stands before a question that is to be thought about.
        can_score: whether `score` works; Ollama gives no log-probabilities of a given text.
        separates: whether `generate` keeps the thinking out of `Piece.text`; `complete` never does.
    """

    name: str
    version: str
    model: str
    parallel: int
    dialect: Dialect
    think_command: str
    can_score = True
    separates = False

    def generate(
        self, messages: Chat, *, max_tokens: int, temperature: float = 0.0, seed: int = 0, think: bool = True
    ) -> Pieces:
        """Answer a chat, streamed; `think` puts the think command before the last question.

        Closing the iterator early ends the generation.
        """
        prompt = self.dialect.prompt(messages, self.think_command if think else "")
        return self.complete(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)

    @abstractmethod
    def complete(self, prompt: str, *, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> Pieces:
        """Go on after a rendered prompt whose special tokens count as such, streamed."""

    def complete_many(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        on_done: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Go on after many prompts, `parallel` at once; answers in their order. An error ends the rest."""

        def answer(prompt: str) -> Completion:
            return collect(self.complete(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed))

        with ThreadPoolExecutor(self.parallel) as pool:
            futures = [pool.submit(answer, prompt) for prompt in prompts]
            try:
                for future in as_completed(futures):
                    if on_done is not None:
                        on_done(future.result())
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Token ids of a rendered text, special tokens parsed, nothing added."""

    @abstractmethod
    def score(self, text: str, start: int = 1) -> list[float]:
        """Natural-log probability of each token of `text` from position `start` on, given those before it."""


def child_environment() -> dict[str, str]:
    """Return this process's environment for an engine's: without the service's secrets."""
    return {key: value for key, value in os.environ.items() if key not in {KEY_VARIABLE, TOKEN_VARIABLE}}


def threads_for(gguf: Path) -> int:
    """CPU threads for a file: one for a small model, else all.

    llama.cpp's threads wait for each other after every operation by spinning. A model of a few million
    parameters is done sooner than that; on 2 busy cores one thread wrote 2,663 tokens/s and two wrote 233.
    """
    return 1 if gguf.stat().st_size < _SMALL_FILE else os.cpu_count() or 1


def collect(pieces: Pieces) -> Completion:
    """Put a streamed answer together."""
    found = list(pieces)
    last = vars(found[-1]) if found else {}
    texts = {name: "".join(getattr(piece, name) for piece in found) for name in ("text", "thinking")}
    return Completion(**{**last, **texts})

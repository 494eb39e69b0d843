"""One answer while it is written: what the scanner releases, until the model or the asker's stop ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from so8t_helpers.engines.base import Engine, Piece
from so8t_helpers.engines.host import parted_style
from so8t_helpers.settings import Settings
from so8t_helpers.thinking.format import parse, rejoin
from so8t_helpers.thinking.redaction import REFUSAL_TEXT, StreamingFinal, longest_shared

Decision = Literal["ALLOW", "ESCALATION", "DENY", "REFUSE"]
Finish = Literal["stop", "length", "content_filter"]


class AnswerError(RuntimeError):
    """A question that got no answer; status, short code and message hold no content."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after
        self.headers = headers or {}


@dataclass(frozen=True)
class Asked:
    """What a client wants, whatever dialect it said it in.

    Attributes:
        user: a name that the client chose: for the log, never for a limit.
        turns: `role` and `content`; the last one is the user's.
        stops: texts that end the final part, and are not part of it.
        counted: whether the answer must tell the prompt's tokens, which may cost a call to the engine.
    """

    dialect: str
    user: str
    turns: Sequence[dict[str, str]]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    counted: bool = False


@dataclass
class Question:
    """One accepted request on its way.

    Attributes:
        deadline, accepted: by `time.monotonic`.
        release: called with each piece of released text, in the engine's thread.
        dropped: set when nobody waits for the answer any more.
    """

    request_id: str
    asked: Asked
    deadline: float
    release: Callable[[str], None]
    accepted: float = field(default_factory=time.monotonic)
    dropped: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Answer:
    """What leaves, for a dialect to write down; `tokens` are all that were written, thinking included."""

    request_id: str
    text: str
    decision: Decision
    finish: Finish
    prompt_tokens: int
    tokens: int


class Draft:
    """An answer in the making.

    Attributes:
        outcome: "answered", or the code of what came in between.
        stated: the label in the thinking, None where none is stated.
        denied: `serve.deny_text` left in the place of an answer to which the model stated DENY.
    """

    def __init__(self, question: Question, settings: Settings) -> None:
        self.outcome = "failed"
        self.tokens = self.prompt_tokens = 0
        self.stated: str | None = None
        self.denied = False
        self._question, self._serve = question, settings.serve
        self._style = parted_style(settings)
        self._stream = StreamingFinal(self._style, self._serve.most_shared)
        self._stop = _Stop(question.asked.stops)
        self._text: list[str] = []
        self._parted: list[str] = []
        self._released: list[str] = []
        self._begun = self._limited = False

    @property
    def answer(self) -> str:
        return "".join(self._released)

    @property
    def thinking(self) -> str:
        return "".join(self._parted) or parse("".join(self._text)).thinking

    @property
    def refused(self) -> bool:
        """Whether the fixed refusal stands in the place of a final part."""
        return self.answer == REFUSAL_TEXT

    @property
    def cut(self) -> bool:
        """Whether something that might be a mark, or a repetition, ended the final part before its end."""
        return self._stream.cut and not (self.denied or self._stop.met)

    @property
    def shared(self) -> int:
        """Characters of the longest text that the answer repeats of the thinking; of a fixed text none."""
        fixed = self.refused or self.denied
        return 0 if fixed else longest_shared(self.thinking, self.answer)

    @property
    def decision(self) -> Decision:
        """The label stated in the thinking; without one, a person should look at the answer."""
        if self.denied:
            return "REFUSE" if self._serve.on_deny == "refuse" else "ESCALATION"
        return cast(Decision, self.stated or ("REFUSE" if self.refused else "ESCALATION"))

    @property
    def finish(self) -> Finish:
        """Why the text ends, as OpenAI's dialect says it."""
        if self._limited and not self.denied:
            return "length"
        return "content_filter" if self.denied or self.refused or self.cut else "stop"

    def write(self, engine: Engine, prompt: str) -> None:
        """Let the engine write until the final part is over.

        Raises:
            AnswerError: nobody waits any more, or the time is up.
            EngineError: from the engine.
        """
        self._check()
        asked, piece = self._question.asked, Piece()
        pieces = engine.complete(
            prompt, max_tokens=asked.max_tokens, temperature=asked.temperature, seed=asked.seed
        )
        try:
            for piece in pieces:
                self._check()
                self.tokens = piece.tokens or self.tokens + 1
                self.prompt_tokens = piece.prompt_tokens or self.prompt_tokens
                self._text.append(piece.text)
                self._parted.append(piece.thinking)
                self._release(self._stream.feed(piece.text, piece.thinking))
                if self._stream.ended or self._stop.met or self.denied:
                    break
            else:
                self._limited = not piece.stopped and self.tokens >= asked.max_tokens
        finally:
            # Closing the iterator ends the generation in the engine.
            if isinstance(pieces, Generator):
                pieces.close()
        if not (self._stop.met or self.denied):
            self._release(self._stream.close())
            if not (self._stop.met or self.denied):
                self._send(self._stop.close())
        if asked.counted and not self.prompt_tokens:  # an engine that was broken off may not have told
            self.prompt_tokens = len(engine.tokenize(prompt))
        self.outcome = "answered"

    def _check(self) -> None:
        if self._question.dropped.is_set():
            raise AnswerError(503, "dropped", "the client has gone")
        if time.monotonic() > self._question.deadline:
            raise AnswerError(504, "timeout", "the model did not answer in time")

    def _release(self, text: str) -> None:
        if not text:
            return
        # The fixed refusal is whole: an asker's stop is for what the model writes, were it the same words.
        fixed = text == REFUSAL_TEXT and not self._begun
        if not self._begun:
            # The thinking is over where a final part begins: what it decided on is known before any leaves.
            self._begun = True
            parted = "".join(self._parted)
            written = rejoin(parted, text, self._style) if parted else "".join(self._text)
            self.stated = parse(written).decision
            if self.stated == "DENY" and self._serve.on_deny != "answer":
                self.denied = True
                self._send(self._serve.deny_text)
        if not self.denied:
            self._send(text if fixed else self._stop.feed(text))

    def _send(self, text: str) -> None:
        if text:
            self._released.append(text)
            self._question.release(text)


class _Stop:
    """End a stream before the first of some texts; what may yet become one is held back."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.met = False
        self._texts, self._held = texts, ""

    def feed(self, text: str) -> str:
        """Take more of the stream; return what may leave now."""
        if self.met:
            return ""
        text = self._held + text
        # Of several the one that is whole first, as every chunking finds it.
        found = [(place + len(stop), place) for stop in self._texts if (place := text.find(stop)) >= 0]
        if found:
            self.met, self._held = True, ""
            return text[: min(found)[1]]
        # From each place on, could the rest be the beginning of one of them?
        longest = max(map(len, self._texts), default=1)
        first = max(0, len(text) - longest + 1)
        held = next(
            (i for i in range(first, len(text)) if any(s.startswith(text[i:]) for s in self._texts)),
            len(text),
        )
        self._held = text[held:]
        return text[:held]

    def close(self) -> str:
        """Return what was held back: no more text will come."""
        held, self._held = self._held, ""
        return held

"""From a question to an audited answer: the engine writes, the scanner releases, the log remembers.

The engine is asked for raw text, not for its own parting of thinking and content: then our scanner sees every
mark as the model wrote it, and releases the final part while it is being written.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

from so8t_helpers.engines.base import Engine, EngineError, EngineTimeoutError
from so8t_helpers.engines.host import parted_style
from so8t_helpers.service.metrics import Metrics
from so8t_helpers.service.schema import Decision, ThinkAnswer, ThinkQuestion
from so8t_helpers.settings import Settings
from so8t_helpers.thinking.audit import AuditLog
from so8t_helpers.thinking.format import decision_of, parse
from so8t_helpers.thinking.redaction import REFUSAL_TEXT, StreamingFinal

# What begins a control token of the tokenizer; in a question it must stay ordinary text.
_CONTROL_TOKEN = re.compile(r"<(?=\||/?s>|unk>)")
_INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# Tokens that the chat template itself and the think command need, with room to spare.
_TEMPLATE_TOKENS = 32


class AnswerError(RuntimeError):
    """A question that got no answer; status, short code and message hold no content."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


@dataclass
class Question:
    """One accepted request on its way.

    Attributes:
        max_tokens: of the answer, the service's own limit where the body names none.
        deadline, accepted: by `time.monotonic`.
        release: called with each piece of released text, in the engine's thread.
        dropped: set when nobody waits for the answer any more.
    """

    request_id: str
    body: ThinkQuestion
    max_tokens: int
    deadline: float
    release: Callable[[str], None]
    accepted: float = field(default_factory=time.monotonic)
    dropped: threading.Event = field(default_factory=threading.Event)


class Answering:
    """A bounded queue: `engine.parallel` questions at work, `serve.queue_length` waiting.

    Attributes:
        pending: questions at work and waiting.
        failing: whether the engine broke off at the last question that it was asked.
    """

    def __init__(
        self, settings: Settings, engine: Engine, audit: AuditLog, metrics: Metrics, model_sha256: str
    ) -> None:
        self.settings, self.engine, self.audit, self.metrics = settings, engine, audit, metrics
        self.model_sha256 = model_sha256
        self.pending = 0
        self.failing = False
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(engine.parallel, thread_name_prefix="so8t-answer")

    def submit(self, question: Question) -> Future[ThinkAnswer]:
        """Queue a question.

        Raises:
            AnswerError: 503, the queue is full.
        """
        with self._lock:
            if self.pending >= self.engine.parallel + self.settings.serve.queue_length:
                wait = self.metrics.mean_seconds * self.pending / self.engine.parallel
                raise AnswerError(503, "busy", "the queue is full; try again later", max(1.0, wait))
            self.pending += 1
        future = self._pool.submit(self._answer, question)
        future.add_done_callback(self._done)
        return future

    def close(self) -> None:
        """Wait for the questions at work; those in the queue are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _done(self, future: Future[ThinkAnswer]) -> None:
        with self._lock:
            self.pending -= 1

    def _answer(self, question: Question) -> ThinkAnswer:
        """Write, release and audit one answer, in a thread of the pool."""
        started = time.monotonic()
        self._audit_asked(question)
        draft = _Draft(question, parted_style(self.settings))
        try:
            draft.write(self.engine, self._prompt(question))
        except AnswerError as error:
            draft.outcome = error.code
            raise
        except EngineTimeoutError as error:
            draft.outcome = "timeout"
            raise AnswerError(504, "timeout", "the model did not answer in time") from error
        except EngineError as error:
            self.failing = True
            raise AnswerError(502, "engine", "the engine could not answer; see /healthz") from error
        else:
            self.failing = False
        finally:
            self._audit_outcome(question, draft, started)
        return ThinkAnswer(request_id=question.request_id, answer=draft.answer, decision=draft.decision)

    def _prompt(self, question: Question) -> str:
        """Render the question as the model was trained; control tokens in it become ordinary text.

        Raises:
            AnswerError: 413, it does not fit into the context.
        """
        system = self.settings.dataset.system_prompt
        query = _CONTROL_TOKEN.sub("< ", _INVISIBLE.sub("", question.body.query))
        query = self.engine.dialect.neutral(query)
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": query})
        prompt = self.engine.dialect.prompt(turns, self.settings.dataset.think_command)
        room = self.settings.eval.num_ctx - question.max_tokens - _TEMPLATE_TOKENS
        # A token is at least one byte: only a long question needs to be counted.
        if len(prompt.encode()) > room and len(self.engine.tokenize(prompt)) > room:
            raise AnswerError(
                413, "too_long", f"the question is longer than the {room} tokens there is room for"
            )
        return prompt

    def _audit_asked(self, question: Question) -> None:
        entry = {
            "event": "asked",
            "request_id": question.request_id,
            "user": question.body.user_id,
            "query_hmac": self.audit.code(question.body.query),
            "model": self.engine.model,
            "model_sha256": self.model_sha256,
            "engine": f"{self.engine.name} {self.engine.version}",
        }
        if self.settings.serve.log_queries:
            entry["query"] = question.body.query
        self.audit.append(entry)

    def _audit_outcome(self, question: Question, draft: _Draft, started: float) -> None:
        ended, answered = time.monotonic(), draft.outcome == "answered"
        decision, refused = draft.decision if answered else None, draft.answer == REFUSAL_TEXT
        self.metrics.answer(draft.outcome, decision, ended - started, draft.tokens, refused)
        self.audit.append(
            {
                "event": "answered" if answered else "not answered",
                "outcome": draft.outcome,
                "request_id": question.request_id,
                "user": question.body.user_id,
                "decision": decision,
                "thinking_hmac": self.audit.code(draft.thinking),
                "answer_hmac": self.audit.code(draft.answer),
                "fixed_refusal": refused,
                "tokens": draft.tokens,
                "waited_ms": round((started - question.accepted) * 1000),
                "worked_ms": round((ended - started) * 1000),
            }
        )


class _Draft:
    """One answer while it is written."""

    def __init__(self, question: Question, style: str) -> None:
        self.outcome = "failed"
        self.tokens = 0
        self._question = question
        self._style, self._stream = style, StreamingFinal(style)
        self._text: list[str] = []
        self._parted: list[str] = []
        self._released: list[str] = []

    @property
    def answer(self) -> str:
        return "".join(self._released)

    @property
    def thinking(self) -> str:
        return "".join(self._parted) or parse("".join(self._text)).thinking

    @property
    def decision(self) -> Decision:
        """The label stated in the thinking; without one, a person should look at the answer."""
        parted = "".join(self._parted)
        stated = decision_of(parted, self._style) if parted else parse("".join(self._text)).decision
        return cast(Decision, stated or ("REFUSE" if self.answer == REFUSAL_TEXT else "ESCALATION"))

    def write(self, engine: Engine, prompt: str) -> None:
        """Let the engine write until the final part is over.

        Raises:
            AnswerError: nobody waits any more, or the time is up.
            EngineError: from the engine.
        """
        self._check()
        limit, options = self._question.max_tokens, self._question.body.options
        pieces = engine.complete(prompt, max_tokens=limit, temperature=options.temperature, seed=options.seed)
        try:
            for piece in pieces:
                self._check()
                self.tokens = piece.tokens or self.tokens + 1
                self._text.append(piece.text)
                self._parted.append(piece.thinking)
                self._release(self._stream.feed(piece.text, piece.thinking))
                if self._stream.ended:
                    break
        finally:
            # Closing the iterator ends the generation in the engine.
            if isinstance(pieces, Generator):
                pieces.close()
        self._release(self._stream.close())
        self.outcome = "answered"

    def _check(self) -> None:
        if self._question.dropped.is_set():
            raise AnswerError(503, "dropped", "the client has gone")
        if time.monotonic() > self._question.deadline:
            raise AnswerError(504, "timeout", "the model did not answer in time")

    def _release(self, text: str) -> None:
        if text:
            self._released.append(text)
            self._question.release(text)

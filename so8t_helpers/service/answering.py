"""From a question to an audited answer: the engine writes, the scanner releases, the log remembers.

The engine is asked for raw text, not for its own parting of thinking and content: then our scanner sees every
mark as the model wrote it, and releases the final part while it is being written. No dialect is known here:
`Asked` goes in, `Answer` comes out.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from so8t_helpers.engines.base import Engine, EngineError, EngineTimeoutError
from so8t_helpers.service.draft import Answer, AnswerError, Draft, Question
from so8t_helpers.service.metrics import Metrics
from so8t_helpers.settings import Settings
from so8t_helpers.thinking.audit import AuditLog
from so8t_helpers.thinking.audit_key import AuditError
from so8t_helpers.thinking.audit_lines import canonical

log = logging.getLogger("so8t.serve")

_INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# Tokens that the chat template itself and the think command need, with room to spare.
_TEMPLATE_TOKENS = 32


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

    def submit(self, question: Question) -> Future[Answer]:
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

    def _done(self, future: Future[Answer]) -> None:
        with self._lock:
            self.pending -= 1

    def _answer(self, question: Question) -> Answer:
        """Write, release and audit one answer, in a thread of the pool."""
        started = time.monotonic()
        self._audit_asked(question)
        draft = Draft(question, self.settings)
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
        counts = draft.prompt_tokens, draft.tokens
        return Answer(question.request_id, draft.answer, draft.decision, draft.finish, *counts)

    def _prompt(self, question: Question) -> str:
        """Render the chat as the model was trained; control tokens in it become ordinary text.

        Raises:
            AnswerError: 413, it does not fit into the context; 422, no chat that the template can write.
        """
        dialect, system = self.engine.dialect, self.settings.dataset.system_prompt or ""
        turns = [{**turn, "content": _INVISIBLE.sub("", turn["content"])} for turn in question.asked.turns]
        if turns[0]["role"] == "system":
            system = "\n\n".join(filter(None, [system, turns.pop(0)["content"]]))
        try:
            prompt = dialect.prompt(
                [{"role": "system", "content": system}, *turns], self.settings.dataset.think_command
            )
        except ValueError as error:
            raise AnswerError(422, "turns", str(error)) from error
        room = self.settings.eval.num_ctx - question.asked.max_tokens - _TEMPLATE_TOKENS
        # A token is at least one byte: only a long question needs to be counted.
        if len(prompt.encode()) > room and len(self.engine.tokenize(prompt)) > room:
            raise AnswerError(
                413, "too_long", f"the question is longer than the {room} tokens there is room for"
            )
        return prompt

    def _audit_asked(self, question: Question) -> None:
        asked = question.asked
        # Of a chat the last question is what one question is; the turns before it have a code of their own.
        query, before = asked.turns[-1]["content"], asked.turns[:-1]
        entry: dict[str, Any] = {
            "event": "asked",
            "request_id": question.request_id,
            "dialect": asked.dialect,
            "user": asked.user,
            "query_hmac": self.audit.code(query),
            "model": self.engine.model,
            "model_sha256": self.model_sha256,
            "engine": f"{self.engine.name} {self.engine.version}",
        }
        if before:
            entry["before_hmac"] = self.audit.code(canonical({"turns": before}))
        if self.settings.serve.log_queries:
            entry |= {"query": query, **({"before": before} if before else {})}
        self._write(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        try:
            self.audit.append(entry)
        except AuditError as error:
            log.error("the audit log: %s", error)  # it quotes nothing of the entry
            raise AnswerError(500, "audit", "the audit log cannot be written") from error

    def _audit_outcome(self, question: Question, draft: Draft, started: float) -> None:
        ended, answered = time.monotonic(), draft.outcome == "answered"
        decision = draft.decision if answered else None
        self.metrics.answer(draft.outcome, decision, ended - started, draft.tokens, draft.refused)
        self._write(
            {
                "event": "answered" if answered else "not answered",
                "outcome": draft.outcome,
                "request_id": question.request_id,
                "user": question.asked.user,
                "decision": decision,
                "stated": draft.stated,
                "on_deny": self.settings.serve.on_deny if draft.denied else None,
                "thinking_hmac": self.audit.code(draft.thinking),
                "answer_hmac": self.audit.code(draft.answer),
                "fixed_refusal": draft.refused,
                "cut": draft.cut,
                "shared": draft.shared,
                "finish": draft.finish if answered else None,
                "tokens": draft.tokens,
                "waited_ms": round((started - question.accepted) * 1000),
                "worked_ms": round((ended - started) * 1000),
            }
        )

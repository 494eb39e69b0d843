"""Counters of the service for Prometheus; nothing in them comes from a question or an answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counts of requests, decisions and seconds, in a registry of their own: one for each application."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("so8t_requests", "Requests by HTTP status.", ["status"], registry=registry)
        self._decisions = Counter("so8t_decisions", "Stated decisions.", ["decision"], registry=registry)
        self._outcomes = Counter("so8t_answers", "Questions by outcome.", ["outcome"], registry=registry)
        self._refused = Counter("so8t_fixed_refusals", "Answers that were withheld.", registry=registry)
        self._tokens = Counter("so8t_tokens", "Tokens written.", registry=registry)
        self._seconds = Histogram(
            "so8t_answer_seconds", "Seconds of an answer.", buckets=BUCKETS, registry=registry
        )

    def request(self, status: int) -> None:
        self._requests.labels(status).inc()

    def answer(self, outcome: str, decision: str | None, seconds: float, tokens: int, refused: bool) -> None:
        """Count what the engine did for one question."""
        self._outcomes.labels(outcome).inc()
        if decision is not None:
            self._decisions.labels(decision).inc()
        self._seconds.observe(seconds)
        self._tokens.inc(tokens)
        self._refused.inc(refused)

    def watch(self, pending: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Add gauges of the questions in hand, read whenever the text is asked for."""
        gauge = partial(Gauge, registry=self.registry)
        gauge("so8t_questions_pending", "Questions at work and waiting.").set_function(pending)
        gauge("so8t_questions_waiting", "Questions waiting.").set_function(waiting)

    @property
    def mean_seconds(self) -> float:
        """Mean seconds of an answer so far; one second before the first."""
        count = self.registry.get_sample_value("so8t_answer_seconds_count")
        total = self.registry.get_sample_value("so8t_answer_seconds_sum")
        return (total or 0.0) / count if count else 1.0

    def text(self) -> bytes:
        return generate_latest(self.registry)

"""Counters of the service in the Prometheus text format (version 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counts of requests, decisions and seconds; nothing in them comes from a question or an answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._decisions: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._seconds: Counter[float] = Counter()
        self._sum = 0.0
        self._tokens = 0
        self._refused = 0

    def request(self, status: int) -> None:
        """Count a request by its HTTP status."""
        with self._lock:
            self._requests[status] += 1

    def answer(self, outcome: str, decision: str | None, seconds: float, tokens: int, refused: bool) -> None:
        """Count what the engine did for one question."""
        with self._lock:
            self._outcomes[outcome] += 1
            if decision is not None:
                self._decisions[decision] += 1
            self._seconds[next((edge for edge in BUCKETS if seconds <= edge), float("inf"))] += 1
            self._sum += seconds
            self._tokens += tokens
            self._refused += refused

    @property
    def mean_seconds(self) -> float:
        """Mean seconds of an answer so far; one second before the first."""
        with self._lock:
            count = self._seconds.total()
            return self._sum / count if count else 1.0

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return all counters, and the gauges given, as text."""
        lines: list[str] = []

        def metric(name: str, kind: str, values: dict[str, float]) -> None:
            lines.append(f"# TYPE so8t_{name} {kind}")
            lines.extend(f"so8t_{name}{label} {value}" for label, value in values.items())

        with self._lock:
            metric("requests_total", "counter", {f'{{status="{s}"}}': n for s, n in self._requests.items()})
            metric(
                "decisions_total", "counter", {f'{{decision="{d}"}}': n for d, n in self._decisions.items()}
            )
            metric("answers_total", "counter", {f'{{outcome="{o}"}}': n for o, n in self._outcomes.items()})
            metric("fixed_refusals_total", "counter", {"": self._refused})
            metric("tokens_total", "counter", {"": self._tokens})
            lines.append("# TYPE so8t_answer_seconds histogram")
            below = 0
            for edge in (*BUCKETS, float("inf")):
                below += self._seconds[edge]
                name = "+Inf" if edge == float("inf") else f"{edge:g}"
                lines.append(f'so8t_answer_seconds_bucket{{le="{name}"}} {below}')
            lines += [f"so8t_answer_seconds_sum {self._sum:.6f}", f"so8t_answer_seconds_count {below}"]
        for name, value in gauges.items():
            metric(name, "gauge", {"": value})
        return "\n".join(lines) + "\n"

"""What a person sees in the terminal while a notebook works: one line, fed by the run's status file."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from so8t_helpers.progress import STATUS_NAME, read_status
from so8t_helpers.run_folder import STAGES
from so8t_helpers.settings import Settings

QUIET_SECONDS = 30.0  # between lines where the output is no terminal, such as in a log file


class ProgressLine:
    """Context manager that shows a stage's progress on stderr while its notebook runs elsewhere."""

    def __init__(self, settings: Settings, stage: str, reason: str):
        self.status_path = settings.run_dir / STATUS_NAME
        self.title = f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {settings.run.name} {stage}"
        self.reason, self.started = reason, time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._tty = sys.stderr.isatty()

    def __enter__(self) -> ProgressLine:
        print(f"{self.title}: {self.reason}", file=sys.stderr, flush=True)  # noqa: T201
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._tty:
            sys.stderr.write("\r\x1b[2K")

    def _watch(self) -> None:
        while not self._stop.wait(0.5 if self._tty else QUIET_SECONDS):
            status = read_status(self.status_path)
            fresh = status is not None and status["time"] >= self.started
            text = f"{self.title}: {describe(status) if status and fresh else 'starting'}"
            text += f" ({clock(time.time() - self.started)})"
            sys.stderr.write(f"\r\x1b[2K{text[:150]}" if self._tty else f"{text}\n")
            sys.stderr.flush()


def describe(status: dict[str, Any]) -> str:
    """Put a status into words: what, how far, last figures, time left."""
    parts = [f"{status['what'] or status['stage']} {status['done']}/{status['total']} {status['unit']}"]
    parts += [f"{name} {value:.4g}" for name, value in status["latest"].items()]
    if status["state"] == "running" and status["seconds_left"] is not None:
        parts.append(f"{clock(status['seconds_left'])} left")
    elif status["state"] != "running":
        parts.append(status["state"])
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 3:05:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

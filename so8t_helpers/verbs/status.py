"""Runs at work as a terminal shows them: the stage, the step, the time left and the last losses of each."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from so8t_helpers.run.records import STATUS_NAME, Status, read_status
from so8t_helpers.run.stage import STAGES
from so8t_helpers.settings import Settings, resolve

QUIET_SECONDS = 30.0  # between lines where the output is no terminal, such as in a log file


def print_status(settings: Settings, watch: bool = False, every: float = 2.0) -> int:
    """Print a line for each run of the area that has worked; with `watch` again and again until Ctrl-C."""
    while True:
        lines = status_lines(resolve(settings.run.root))
        # Clear the screen and go home, so that the lines stay in place.
        print("\x1b[2J\x1b[H" if watch else "", end="")  # noqa: T201
        print("\n".join(lines) or f"no run has worked in {resolve(settings.run.root)}", flush=True)  # noqa: T201
        if not watch:
            return 0
        time.sleep(every)


def status_lines(root: Path) -> list[str]:
    """Return one line a run, those at work first."""
    found = [(path.parent.name, read_status(path.parent)) for path in root.glob(f"*/{STATUS_NAME}")]
    runs = [(name, status, status.at_work()) for name, status in found if status is not None]
    runs.sort(key=lambda run: (not run[2], -run[1].time))
    width = max((len(name) for name, _, _ in runs), default=0)
    return [f"{name:<{width}}  {_line(status, at_work)}" for name, status, at_work in runs]


def _line(status: Status, at_work: bool) -> str:
    if at_work:
        return f"{status.stage}: {describe(status)}"
    state = "died" if status.state == "running" else status.state
    ago = clock(time.time() - status.time)
    return f"{status.stage}: {state} {ago} ago at {status.done}/{status.total} {status.unit}"


class ProgressLine:
    """Context manager that shows a stage's progress on stderr while its notebook runs elsewhere."""

    def __init__(self, settings: Settings, stage: str, reason: str):
        self.run_dir, self.reason = settings.run_dir, reason
        self.title = f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {settings.run.name} {stage}"
        self.started = time.time()
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
            status = read_status(self.run_dir)
            work = describe(status) if status and status.time >= self.started else "starting"
            text = f"{self.title}: {work} ({clock(time.time() - self.started)})"
            sys.stderr.write(f"\r\x1b[2K{text[:150]}" if self._tty else f"{text}\n")
            sys.stderr.flush()


def describe(status: Status) -> str:
    """Put a status into words: what, how far, last figures, time left."""
    parts = [f"{status.what or status.stage} {status.done}/{status.total} {status.unit}"]
    parts += [f"{name} {value:.4g}" for name, value in status.latest.items()]
    if status.state != "running":
        parts.append(status.state)
    elif status.seconds_left is not None:
        parts.append(f"{clock(status.seconds_left)} left")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 3:05:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

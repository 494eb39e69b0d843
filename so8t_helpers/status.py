"""Watching runs from another terminal: the stage, the step, the time left and the last losses of each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil

from so8t_helpers.progress import STATUS_NAME, read_status
from so8t_helpers.settings import Settings, resolve
from so8t_helpers.terminal import clock, describe


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
    found = [(path.parent.name, read_status(path)) for path in root.glob(f"*/{STATUS_NAME}")]
    runs = [(name, status, _at_work(status)) for name, status in found if status is not None]
    runs.sort(key=lambda run: (not run[2], -run[1]["time"]))
    width = max((len(name) for name, _, _ in runs), default=0)
    return [f"{name:<{width}}  {_line(status, at_work)}" for name, status, at_work in runs]


def _line(status: dict[str, Any], at_work: bool) -> str:
    if at_work:
        return f"{status['stage']}: {describe(status)}"
    ago = clock(time.time() - status["time"])
    state = "died" if status["state"] == "running" else status["state"]
    return f"{status['stage']}: {state} {ago} ago at {status['done']}/{status['total']} {status['unit']}"


def _at_work(status: dict[str, Any]) -> bool:
    """A run that was killed leaves "running" behind; its process is gone, or another has its number."""
    if status["state"] != "running":
        return False
    try:
        process = psutil.Process(status["pid"])
        return bool(process.create_time() <= status["time"]) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

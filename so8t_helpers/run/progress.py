"""Progress of a stage: a bar in the notebook or terminal, and a small file that other terminals can watch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from so8t_helpers.run.files import write_text
from so8t_helpers.settings import Settings

STATUS_NAME = ".status.json"


class Progress:
    """Counts work done; writes the run's status file at most once a second.

    Attributes:
        done, total: in `unit`s.
        shown: False for the second and further workers of a stage, of whom nobody must hear.
        latest: figures shown beside the bar, such as the last losses.
    """

    def __init__(
        self, settings: Settings, stage: str, total: int, unit: str, what: str = "", shown: bool = True
    ):
        self.shown = shown
        self.path = settings.run_dir / STATUS_NAME
        self.stage, self.total, self.unit, self.what = stage, total, unit, what
        self.done, self.latest = 0, dict[str, float]()
        self.started = self._written = time.time()
        self._resumed_at = self._bytes = 0
        hidden: dict[str, Any] = {} if shown else {"disable": True}
        self.bar = tqdm(total=total, unit=unit, desc=what or stage, mininterval=1.0, smoothing=0.05, **hidden)
        self._write("running")

    def skip(self, count: int) -> None:
        """Count work that an earlier try already did; it does not enter the time left."""
        self.bar.update(count)
        self.done += count
        self._resumed_at += count

    def update(self, count: int = 1, **latest: float) -> None:
        """Count `count` more units done and keep `latest` figures for whoever watches."""
        self.done += count
        self.latest = latest or self.latest
        self.bar.update(count)
        now = time.time()
        if now - self._written >= 1.0:
            if latest:
                self.bar.set_postfix({k: f"{v:.4g}" for k, v in latest.items()}, refresh=False)
            self._write("running")

    def update_bytes(self, count: int) -> None:
        """Count bytes done, where the unit is MiB."""
        mebibytes, self._bytes = divmod(self._bytes + count, 2**20)
        self.update(mebibytes)

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end, None before the first unit is done."""
        fresh = self.done - self._resumed_at
        if fresh <= 0:
            return None
        return (time.time() - self.started) / fresh * (self.total - self.done)

    def _write(self, state: str) -> None:
        self._written = time.time()
        if not self.shown:
            return
        status: dict[str, Any] = {
            "stage": self.stage,
            "what": self.what,
            "state": state,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "seconds_left": self.seconds_left(),
            "latest": self.latest,
            "pid": os.getpid(),
            "time": self._written,
        }
        write_text(self.path, json.dumps(status, ensure_ascii=False) + "\n")

    def close(self, state: str = "done") -> None:
        """Close the bar and leave the final state in the status file."""
        self.bar.close()
        self._write(state)


def read_status(path: Path) -> dict[str, Any] | None:
    """Return what a run's status file says, None where there is none (yet)."""
    try:
        status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status


@contextmanager
def progress(
    settings: Settings, stage: str, total: int, unit: str, what: str = "", shown: bool = True
) -> Iterator[Progress]:
    """A `Progress` that is closed at the end, with state "failed" when an exception passes through."""
    tracker = Progress(settings, stage, total, unit, what, shown)
    try:
        yield tracker
    except BaseException:
        tracker.close("failed")
        raise
    tracker.close()

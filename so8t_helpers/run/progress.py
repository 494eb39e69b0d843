"""Progress of a stage: a bar in the notebook or terminal, and the status file that other terminals watch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from so8t_helpers.run.records import Status, write_status
from so8t_helpers.settings import Settings


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
        self.shown, self.run_dir = shown, settings.run_dir
        self.stage, self.total, self.unit, self.what = stage, total, unit, what
        self.done, self.latest = 0, dict[str, float]()
        self.started = self._written = time.time()
        self._resumed_at = 0
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

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end, None before the first unit is done."""
        fresh = self.done - self._resumed_at
        if fresh <= 0:
            return None
        return (time.time() - self.started) / fresh * (self.total - self.done)

    def _write(self, state: str) -> None:
        self._written = time.time()
        if self.shown:
            status = Status(
                stage=self.stage,
                what=self.what,
                state=state,
                done=self.done,
                total=self.total,
                unit=self.unit,
                seconds_left=self.seconds_left(),
                latest=self.latest,
                pid=os.getpid(),
                time=self._written,
            )
            write_status(self.run_dir, status)

    def close(self, state: str = "done") -> None:
        """Close the bar and leave the final state in the status file."""
        self.bar.close()
        self._write(state)


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

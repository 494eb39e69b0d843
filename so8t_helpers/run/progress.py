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
        status: what the file says: how much is done of how much, and figures such as the last losses.
        shown: False for the second and further workers of a stage, of whom nobody must hear.
    """

    def __init__(
        self, settings: Settings, stage: str, total: int, unit: str, what: str = "", shown: bool = True
    ):
        self.shown, self.run_dir = shown, settings.run_dir
        self.started, self._resumed_at, self._bytes = time.time(), 0, 0
        self.status = Status(stage, what, "running", 0, total, unit, None, {}, os.getpid(), self.started)
        hidden: dict[str, Any] = {} if shown else {"disable": True}
        self.bar = tqdm(total=total, unit=unit, desc=what or stage, mininterval=1.0, smoothing=0.05, **hidden)
        self._write("running")

    @property
    def done(self) -> int:
        return self.status.done

    def skip(self, count: int) -> None:
        """Count work that an earlier try already did; it does not enter the time left."""
        self.bar.update(count)
        self.status.done += count
        self._resumed_at += count

    def update(self, count: int = 1, **latest: float) -> None:
        """Count `count` more units done and keep `latest` figures for whoever watches."""
        self.status.done += count
        self.status.latest = latest or self.status.latest
        self.bar.update(count)
        if time.time() - self.status.time >= 1.0:
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
        return (time.time() - self.started) / fresh * (self.status.total - self.done)

    def _write(self, state: str) -> None:
        self.status.state, self.status.time = state, time.time()
        self.status.seconds_left = self.seconds_left()
        if self.shown:
            write_status(self.run_dir, self.status)

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

"""Progress of a stage: a bar in the notebook or terminal, and the status file that other terminals watch."""

from __future__ import annotations

import os
import time
from typing import Any

from tqdm.auto import tqdm

from so8t_helpers.run.records import Status, write_status
from so8t_helpers.settings import Settings


class Progress:
    """Context manager that counts work done and writes the run's status file at most once a second.

    `shown` is False for the second and further workers of a stage, of whom nobody must hear.
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

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        self._write("failed" if kind else "done")

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

    def _write(self, state: str) -> None:
        status = self.status
        status.state, status.time = state, time.time()
        if fresh := status.done - self._resumed_at:
            status.seconds_left = (status.time - self.started) / fresh * (status.total - status.done)
        if self.shown:
            write_status(self.run_dir, status)

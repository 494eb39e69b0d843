"""Bringing a large file to the disk while it is being written.

Left to the end, one fsync would wait for gigabytes; in the thread that writes, each would hold up the work.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundSync:
    """Counts what is written and has it synced every so many bytes, one sync at a time.

    `pool` is one thread that waits for the disk; several files may share it.
    """

    def __init__(self, pool: ThreadPoolExecutor, every: int):
        self._pool, self._every = pool, every
        self._waiting = 0
        self._running: Future[None] | None = None

    def wrote(self, size: int) -> None:
        """Count bytes that were written."""
        self._waiting += size

    def due(self) -> bool:
        """Return whether enough waits to be synced, and the disk has kept up.

        Raises:
            OSError: what the disk refused in the sync before.
        """
        if self._waiting < self._every or (self._running is not None and not self._running.done()):
            return False
        self.settle()
        return True

    def start(self, sync: Callable[[], None]) -> None:
        """Have `sync` bring all that was counted to the disk; to be called when it is due."""
        self._waiting, self._running = 0, self._pool.submit(sync)

    def settle(self) -> None:
        """Wait for the sync under way. Raises OSError: what the disk refused."""
        if self._running is not None:
            self._running.result()

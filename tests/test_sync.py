"""One sync at a time beside the writing, and no refusal of the disk is lost."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from so8t_helpers.run.sync import BackgroundSync


def test_a_sync_is_due_after_enough_bytes_and_once_the_one_before_is_through() -> None:
    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        sync = BackgroundSync(pool, every=10)
        sync.wrote(9)
        assert not sync.due()
        sync.wrote(1)
        assert sync.due()
        sync.start(lambda: wait_for(release))
        assert not sync.due()  # counted anew
        sync.wrote(25)
        assert not sync.due()  # the first one still runs
        release.set()
        sync.settle()
        assert sync.due()


def wait_for(event: threading.Event) -> None:
    assert event.wait(60)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("asks", ["due", "settle"])
def test_what_the_disk_refused_reaches_the_writer(asks: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        sync = BackgroundSync(pool, every=10)
        sync.start(full_disk)
        pool.submit(int).result()  # the sync is through
        sync.wrote(10)
        with pytest.raises(OSError, match="No space left"):
            getattr(sync, asks)()

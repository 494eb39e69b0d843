"""Writing large files past the system's cache, where the system lets it.

A model of 7 GiB would push all else out of a laptop's memory, the base that is being read too, and each of
its pages costs the system time, on a virtual machine more than the arithmetic. Whole pages go to the disk as
they are (Linux's O_DIRECT); both ends of a piece, and all where the system refuses, go the usual way.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

PAGE = 4096


class DirectWriter:
    """Open files, which exist with their final size; several threads write their pieces at once."""

    def __init__(self, paths: Iterable[Path]):
        self._direct = {path: _open_direct(path) for path in paths}

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._direct.values():
            if descriptor is not None:
                os.close(descriptor)

    def write(self, path: Path, offset: int, data: Tensor) -> int:
        """Write (n,) uint8 at an offset of the file; return how many of them the system's cache holds now.

        What lies at a multiple of PAGE in the file must do so in memory, too.
        """
        head = min(-offset % PAGE, len(data))
        pages = data[head : len(data) - (offset + len(data)) % PAGE]
        descriptor, body = self._direct[path], 0
        if sys.platform == "linux" and descriptor is not None and len(pages):
            # Some file systems open such files and then refuse; what a full disk refuses fails below, too.
            with suppress(OSError):
                body = os.pwrite(descriptor, pages.numpy().data, offset + head)
        if len(data) == body:
            return 0
        with path.open("rb+") as file:
            for start, stop in ((0, head), (head + body, len(data))):
                file.seek(offset + start)
                file.write(data[start:stop].numpy().data)
        return len(data) - body


def aligned_buffer(size: int) -> Tensor:
    """Return (size,) uint8 at a multiple of PAGE, in memory that goes back to the system with the tensor."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def _open_direct(path: Path) -> int | None:
    if sys.platform == "linux":
        with suppress(OSError):  # a file system that refuses the flag
            return os.open(path, os.O_WRONLY | os.O_DIRECT)
    return None

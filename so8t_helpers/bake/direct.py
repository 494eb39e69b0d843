"""Writing large files past the system's cache, where the system lets it.

A model of 7 GiB would push all else out of a laptop's memory, the base that is being read too, and each of
its pages costs the system time, on a virtual machine more than the arithmetic. Whole pages of memory go to
the disk as they are (Linux's O_DIRECT); what is left at both ends of a piece, and everything on other systems
and on file systems that refuse, goes the usual way. The two never touch the same page of the file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

PAGE = 4096


class DirectWriter:
    """Open files that several threads write at once, each its own pieces.

    Args:
        paths: files that exist, with their final size.
    """

    def __init__(self, paths: Iterable[Path]):
        self._direct = {path: _open_direct(path) for path in paths}

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._direct.values():
            if descriptor is not None:
                os.close(descriptor)

    def write(self, path: Path, offset: int, data: Tensor) -> int:
        """Write bytes at an offset of the file; return how many of them the system's cache holds now.

        Args:
            data: (n,) uint8. What lies at a multiple of PAGE in the file must do so in memory, too.
        """
        head = min(-offset % PAGE, len(data))
        body = self._write_pages(path, offset + head, data[head : len(data) - (offset + len(data)) % PAGE])
        if len(data) == body:
            return 0
        with path.open("rb+") as file:
            for start, stop in ((0, head), (head + body, len(data))):
                file.seek(offset + start)
                file.write(data[start:stop].numpy().data)
        return len(data) - body

    def _write_pages(self, path: Path, offset: int, pages: Tensor) -> int:
        """Write whole pages past the cache; return how many bytes went that way."""
        descriptor = self._direct[path]
        if descriptor is None or not len(pages):
            return 0
        try:
            return os.pwrite(descriptor, pages.numpy().data, offset)
        except OSError:  # a file system that opens such files and then refuses; a full disk fails below, too
            return 0


def aligned_buffer(size: int) -> Tensor:
    """Return (size,) uint8 whose first byte lies at a multiple of PAGE in memory.

    It goes back to the system with the tensor; the allocator would keep it for the process.
    """
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def _open_direct(path: Path) -> int | None:
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None

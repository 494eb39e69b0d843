"""Packed files: gzip, zstd, bzip2 and xz, told by their first bytes; a cut one is an error, never an end."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import IO, Any, cast

import zstandard

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
# Read at once of a zstd file: what comes of it is held whole, some tens of times as much.
_ZSTD_BLOCK = 2**16


def packing_of(path: Path) -> str:
    """Return "gzip", "zstd", "bzip2", "xz" or "none"."""
    with path.open("rb") as raw:
        head = raw.read(8)
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "none")


def open_bytes(path: Path, packing: str) -> IO[bytes]:
    """Open a file's bytes as they were before it was packed.

    Reading raises EOFError, or an error of the packing's own, where the file is cut or damaged.
    """
    if packing == "zstd":
        return cast(IO[bytes], io.BufferedReader(_Frames(path), 2**20))
    if packing == "none":
        return path.open("rb", buffering=2**20)
    openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    return cast(IO[bytes], openers[packing](path, "rb"))


class _Frames(io.RawIOBase):
    """The bytes in a file's zstd frames: zstandard's own reader takes the end of a cut file for its end."""

    def __init__(self, path: Path):
        self._raw = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False  # of a frame
        self._waiting = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._waiting:
            if not (block := self._raw.read(_ZSTD_BLOCK)):
                if self._inside:
                    raise EOFError("its last frame is cut")
                return 0
            self._waiting = memoryview(b"".join(self._unpack(block)))
        count = min(len(buffer), len(self._waiting))
        buffer[:count], self._waiting = self._waiting[:count], self._waiting[count:]
        return count

    def _unpack(self, block: bytes) -> list[bytes]:
        unpacked = []
        while block:
            unpacked.append(self._frame.decompress(block))
            self._inside, block = not self._frame.eof, self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        return unpacked

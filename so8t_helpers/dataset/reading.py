"""The lines of the input files, in constant memory.

Plain files are read in byte ranges, so that several processes share one file; a packed file is one range.
The ranges depend on the input alone, so the output does not depend on how many processes worked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from so8t_helpers.dataset.inputs.files import InputFile, whole
from so8t_helpers.dataset.inputs.kinds import BOM
from so8t_helpers.dataset.inputs.packing import open_bytes

CHUNK_BYTES = 4 * 2**20
MAX_LINE_BYTES = 10 * 2**20


@dataclass(frozen=True)
class Chunk:
    """A range of a file's bytes: the lines that start in [start, end), the first being `first_line`."""

    index: int
    file: InputFile
    start: int
    end: int
    first_line: int
    lines: int


def split(files: list[InputFile]) -> list[Chunk]:
    """Cut the files into chunks and count their lines.

    A last line without a line end counts; an empty file has no line.

    Raises:
        StageError: a packed file that is cut or damaged.
    """
    chunks: list[Chunk] = []
    for file in files:
        line = 1
        for start, end, lines in _ranges(file):
            chunks.append(Chunk(len(chunks), file, start, end, line, lines))
            line += lines
    return chunks


def read_lines(chunk: Chunk) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, bytes without the line end); None stands for a line over `MAX_LINE_BYTES`."""
    with _open(chunk.file) as file:
        if chunk.start:
            file.seek(chunk.start)
        for number in range(chunk.first_line, chunk.first_line + chunk.lines):
            raw = _limited_line(file)
            if number == 1 and raw is not None:
                raw = raw.removeprefix(BOM)
            yield number, raw


@contextmanager
def _open(file: InputFile) -> Iterator[IO[bytes]]:
    """Open a file's lines of JSON."""
    where, packing = (file.path, file.compression) if file.lines is None else (file.lines, "none")
    with whole(file), open_bytes(where, packing) as stream:
        yield stream


def _limited_line(file: IO[bytes]) -> bytes | None:
    raw = file.readline(MAX_LINE_BYTES + 2)
    if len(raw) < MAX_LINE_BYTES + 2 or raw.endswith(b"\n"):
        line = raw.rstrip(b"\r\n")
        return line if len(line) <= MAX_LINE_BYTES else None
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(2**20)
    return None


def _ranges(file: InputFile) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, lines) of one file; chunks begin at line starts."""
    start = position = lines = 0
    last = b"\n"
    one_range = file.compression != "none" and file.lines is None
    with _open(file) as stream:
        while block := stream.read(min(CHUNK_BYTES, 2**20)):
            full = not one_range and position + len(block) - start >= CHUNK_BYTES
            if full and (cut := block.rfind(b"\n") + 1):
                yield start, position + cut, lines + block.count(b"\n", 0, cut)
                start, lines = position + cut, -block.count(b"\n", 0, cut)
            lines += block.count(b"\n")
            position += len(block)
            last = block[-1:]
    lines += last != b"\n"
    if lines:
        yield start, position, lines

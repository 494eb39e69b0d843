"""Input files: which ones, how they are compressed and encoded, and their lines, in constant memory.

Plain files are read in byte ranges, so that several processes share one file; a compressed file is one
range. The ranges depend on the input alone, so the output does not depend on how many processes worked.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import zstandard

from so8t_helpers.run.files import demo_folder, reading
from so8t_helpers.settings import Settings, SettingsError, resolve

CHUNK_BYTES = 4 * 2**20
MAX_LINE_BYTES = 10 * 2**20
SAMPLE_BYTES = 2**20
BOM = b"\xef\xbb\xbf"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# A part of the path of a public data set's own folder, and how that folder is fetched.
_HOW_TO_GET = {
    "gsm8k/grade_school_math/": "; this command fetches it, in the project's folder: "
    "git clone --depth 1 https://github.com/openai/grade-school-math data/gsm8k"
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class InputFile:
    """One input file: `name` is how rows and reports call it; `encoding` is "utf-8" or "cp932"."""

    path: Path
    name: str
    compression: str
    encoding: str
    bom: bool


@dataclass(frozen=True)
class Chunk:
    """A range of a file's bytes: the lines that start in [start, end), the first being `first_line`."""

    index: int
    file: InputFile
    start: int
    end: int
    first_line: int
    lines: int


def matching(pattern: str) -> list[Path]:
    """Return the files that a path, glob or folder names, sorted; none is no error."""
    path = resolve(pattern)
    if path.is_file():
        return [path]
    anchor = Path(path.anchor)
    matches = path.rglob("*.jsonl*") if path.is_dir() else anchor.glob(str(path.relative_to(anchor)))
    return sorted(match for match in matches if match.is_file())


def find_files(patterns: list[str], key: str) -> list[Path]:
    """Return the files that the patterns of a setting name, each once, in the patterns' order.

    Raises:
        SettingsError: where a pattern matches nothing; it names `key`.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        if not (matches := matching(pattern)):
            hint = next((how for part, how in _HOW_TO_GET.items() if part in pattern), "")
            raise SettingsError(f"{key}: no file matches {pattern!r} (looked for {resolve(pattern)}){hint}")
        found |= dict.fromkeys(matches)
    return list(found)


def input_files(settings: Settings) -> list[Path]:
    """Return the files of `dataset.inputs`; the word "demo" stands for the demo's records."""
    patterns = settings.dataset.inputs
    if "demo" in patterns:
        demo = str(demo_folder(settings, "records") / "records.jsonl")
        patterns = [demo if pattern == "demo" else pattern for pattern in patterns]
    return find_files(patterns, "dataset.inputs")


def inspect(paths: list[Path]) -> list[InputFile]:
    """Look at the head of every file: its compression, and UTF-8 or Shift_JIS (as Microsoft's cp932).

    Raises:
        SettingsError: for UTF-16, which is not read.
        StageError: a compressed file whose beginning is damaged.
    """
    files = []
    for path, name in zip(paths, _short_names(paths), strict=True):
        with path.open("rb") as raw:
            magic = raw.read(4)
        compression = "gzip" if magic[:2] == _GZIP else "zstd" if magic == _ZSTD else "none"
        with reading(path, compression), open_bytes(path, compression) as file:
            sample = file.read(SAMPLE_BYTES)
        if len(sample) == SAMPLE_BYTES:  # a cut inside a character would make the last line invalid
            sample = sample[: sample.rfind(b"\n") + 1] or sample
        if sample[:2] in _UTF16:
            raise SettingsError(f"{path}: UTF-16 is not read; save the file as UTF-8")
        files.append(InputFile(path, name, compression, detect_encoding(sample), sample.startswith(BOM)))
    return files


def check_whole(files: list[InputFile]) -> None:
    """Raise StageError for a compressed file that is cut or damaged; zstandard's reader just ends there."""
    for file in files:
        with reading(file.path, f"a whole {file.compression} file"), file.path.open("rb") as raw:
            if file.compression == "gzip":
                with gzip.open(raw, "rb") as unpacked:
                    while unpacked.read(2**20):
                        pass
            elif file.compression == "zstd":
                _walk_frames(raw)


def _walk_frames(raw: IO[bytes]) -> None:
    frame, inside = zstandard.ZstdDecompressor().decompressobj(), False
    while block := raw.read(2**20):
        while block:
            frame.decompress(block)
            inside, block = not frame.eof, frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
    if inside:
        raise EOFError("its last frame is cut")


def detect_encoding(sample: bytes) -> str:
    """Return "cp932" where more of the sample's non-ASCII lines are Shift_JIS than UTF-8, else "utf-8"."""
    votes = {"utf-8": 0, "cp932": 0}
    for line in sample.removeprefix(BOM).splitlines()[:2000]:
        # Many UTF-8 lines are also valid cp932 by chance, hardly any the other way round.
        for encoding in votes if not line.isascii() else ():
            with suppress(UnicodeDecodeError):
                line.decode(encoding)
                votes[encoding] += 1
                break
    return "cp932" if votes["cp932"] > votes["utf-8"] else "utf-8"


def open_bytes(path: Path, compression: str) -> IO[bytes]:
    """Open a file's decompressed bytes for reading."""
    if compression == "gzip":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == "zstd":
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
        return io.BufferedReader(cast(io.RawIOBase, reader), 2**20)
    return path.open("rb", buffering=2**20)


def split(files: list[InputFile]) -> list[Chunk]:
    """Cut the files into chunks and count their lines.

    A last line without a line end counts; an empty file has no line.
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
    with open_bytes(chunk.file.path, chunk.file.compression) as file:
        if chunk.start:
            file.seek(chunk.start)
        for number in range(chunk.first_line, chunk.first_line + chunk.lines):
            raw = _limited_line(file)
            if number == 1 and raw is not None and chunk.file.bom:
                raw = raw.removeprefix(BOM)
            yield number, raw


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
    with open_bytes(file.path, file.compression) as stream:
        while block := stream.read(min(CHUNK_BYTES, 2**20)):
            full = file.compression == "none" and position + len(block) - start >= CHUNK_BYTES
            if full and (cut := block.rfind(b"\n") + 1):
                yield start, position + cut, lines + block.count(b"\n", 0, cut)
                start, lines = position + cut, -block.count(b"\n", 0, cut)
            lines += block.count(b"\n")
            position += len(block)
            last = block[-1:]
    lines += last != b"\n"
    if lines:
        yield start, position, lines


def _short_names(paths: list[Path]) -> list[str]:
    """Names without the machine's folders: the file name, or as many parents as tell files apart."""
    depth = 1
    while len(set(names := ["/".join(path.parts[-depth:]) for path in paths])) < len(set(paths)):
        depth += 1
    return names

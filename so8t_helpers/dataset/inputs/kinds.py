"""What a file is, by its first bytes: its format and encoding, and what to say of one that is not read."""

from __future__ import annotations

import codecs
import json
import re
from contextlib import suppress
from pathlib import Path

from so8t_helpers.run.patterns import data_name
from so8t_helpers.settings import InputEntry, SettingsError

BOM = codecs.BOM_UTF8
BINARY = {"parquet", "arrow", "xlsx"}
HEADLESS = {"csv", "tsv", "xlsx"}  # which may have no names of columns
TABLES = {*HEADLESS, *BINARY}
_BY_MAGIC = {b"PAR1": "parquet", b"ARROW1\0\0": "arrow", b"\xff\xff\xff\xff": "arrow"}
_BY_NAME = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".xlsx": "xlsx"}
# First bytes -> what such a file is, and what to do with it.
_OTHERS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`"),
    b"%PDF": ("a PDF document", "take its text out into JSON lines or CSV"),
    b"\xd0\xcf\x11\xe0": ("an old Office file, such as .xls", "save it as .xlsx or CSV"),
    b"PK\x03\x04": ("a zip archive", "unpack it and name the files in it"),
    b"7z\xbc\xaf": ("a 7-Zip archive", "unpack it and name the files in it"),
    b"Rar!": ("a RAR archive", "unpack it and name the files in it"),
    b"SQLite format 3": ("an SQLite database", "export its table as CSV"),
    b"\x89HDF": ("an HDF5 file", "export its table as Parquet or CSV"),
    b"\x93NUMPY": ("a NumPy array", "export it as Parquet or CSV"),
    b"\x80\x04": ("a Python pickle, which may run anything when it is opened", "export it as Parquet"),
    b"\x80\x05": ("a Python pickle, which may run anything when it is opened", "export it as Parquet"),
    b"Obj\x01": ("an Avro file", "export it as Parquet or JSON lines"),
    b"ORC": ("an ORC file", "export it as Parquet or JSON lines"),
    b"<": ("an HTML or XML page", "fetch the data set itself; it may be the page of a failed download"),
}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_NAMES = {"shift_jis": "cp932", "utf-8-sig": "utf-8"}  # Windows' characters, and a mark that we look for
_ENCODINGS = ("utf-8", "cp932", "euc_jp")
_SAMPLED_LINES = 2000


def encoding_of(sample: bytes, entry: InputEntry) -> str:
    """Return a text file's encoding, as Python names it: the entry's, else what its first bytes say.

    Raises:
        SettingsError: the entry names an encoding that there is none of.
    """
    if entry.encoding is not None:
        try:
            name = codecs.lookup(entry.encoding).name
        except LookupError as error:
            said = f"dataset.inputs: {entry.path}: encoding {entry.encoding!r} is none that Python knows"
            raise SettingsError(said) from error
        return _NAMES.get(name, name)
    if sample.startswith(_UTF16):
        return "utf-16"
    head = sample[:1000]
    if (zeros := head.count(0)) > len(head) // 4:  # UTF-16 without a mark: half of ASCII are zeros
        return "utf-16-le" if head[1::2].count(0) * 2 > zeros else "utf-16-be"
    return "iso2022_jp" if b"\x1b$" in sample else detect_encoding(sample)


def detect_encoding(sample: bytes) -> str:
    """Return "cp932" (Shift_JIS) or "euc_jp" where more of the non-ASCII lines are so than "utf-8"."""
    votes = dict.fromkeys(_ENCODINGS, 0.0)
    for line in sample.removeprefix(BOM).splitlines()[:_SAMPLED_LINES]:
        if line.isascii():
            continue
        # Many UTF-8 lines are also valid in another by chance, hardly any the other way round.
        with suppress(UnicodeDecodeError):
            line.decode("utf-8")
            votes["utf-8"] += 1
            continue
        japanese = {name: _japanese(line, name) for name in _ENCODINGS[1:]}
        best = max(japanese, key=lambda name: japanese[name])
        votes[best] += japanese[best] > 0
    return max(votes, key=lambda name: votes[name])


def _japanese(line: bytes, encoding: str) -> float:
    """Return the share of kana and kanji among a line's characters beyond ASCII; 0 where it is invalid.

    EUC-JP read as Shift_JIS is mostly half-width katakana.
    """
    with suppress(UnicodeDecodeError):
        wide = [letter for letter in line.decode(encoding) if letter > "\x7f"]
        return sum("぀" <= letter <= "ヿ" or "一" <= letter <= "鿿" for letter in wide) / len(wide)
    return 0.0


def format_of(path: Path, sample: bytes, encoding: str, entry: InputEntry) -> str:
    """Return a file's format.

    Raises:
        SettingsError: none that is read; it says what the file looks like and what would make it readable.
    """
    if entry.format is not None:
        return entry.format
    name = data_name(path.name)
    by_name = next((kind for end, kind in _BY_NAME.items() if name.endswith(end)), None)
    if by_name == "xlsx" and sample.startswith(b"PK"):
        return by_name
    if kind := next((kind for magic, kind in _BY_MAGIC.items() if sample.startswith(magic)), None):
        return kind
    if by_name in {"csv", "tsv"} and _other(sample) is None:
        return str(by_name)
    text = sample.decode(encoding, "replace").lstrip("\ufeff")
    if kind := _json_kind(text, name):
        return kind
    raise SettingsError(_not_read(path, sample, text, entry))


def _json_kind(text: str, name: str) -> str | None:
    """Return "jsonl" or "json" (an array, or objects over several lines); None for a text that is neither."""
    lines = [line.strip() for line in text.splitlines()[:_SAMPLED_LINES] if line.strip()][:100]
    if not lines:
        return "jsonl"
    objects, by_line = sum(map(_is_object, lines)), name.endswith((".jsonl", ".ndjson"))
    if lines[0].startswith("["):  # an array's objects end with a comma, all but the last
        return "jsonl" if objects > 1 else "json"
    if lines[0] == "{" and lines[1:] and lines[1].startswith('"'):
        return "json"
    if lines[0].startswith("{"):
        return "jsonl" if by_line or (objects and len(lines) > 1) else "json"
    return "jsonl" if any(line.startswith(("{", "[")) for line in lines) else None


def _is_object(line: str) -> bool:
    with suppress(ValueError, RecursionError):
        return type(json.loads(line)) is dict
    return False


def _other(sample: bytes) -> tuple[str, str] | None:
    """Return what a file that is never read is, and what to do with it."""
    if sample[257:262] == b"ustar":
        return "a tar archive", "unpack it and name the files in it"
    head = sample.removeprefix(BOM).lstrip()[:32]
    return next((said for magic, said in _OTHERS.items() if head.startswith(magic)), None)


def _not_read(path: Path, sample: bytes, text: str, entry: InputEntry) -> str:
    begins = f"it begins with {sample[:16]!r}"
    if other := _other(sample):
        return f"{path}: {other[0]} ({begins}), which is not read; {other[1]}"
    if "\0" in text or text[:1000].count("\ufffd") > len(text[:1000]) // 10:
        return f"{path}: a file of an unknown kind ({begins}); {suggestion(path, entry, 'format: csv')}"
    lines = text.splitlines()[:5]
    kind = "tsv" if all("\t" in line for line in lines) else "csv"
    commas = "a table with commas" if all("," in line for line in lines) else "plain text, not JSON"
    looks = "a table with tabs" if kind == "tsv" else commas
    line = suggestion(path, entry, f"format: {kind}", "columns: [question, answer, label]")
    return f"{path}: looks like {looks} ({begins}); {line} (`columns` names them in order)"


def suggestion(path: Path, entry: InputEntry, *more: str) -> str:
    """Return the line of YAML that would have a file read."""
    own = "*" not in entry.path and Path(entry.path).name == path.name
    said = [f"path: {quoted(entry.path if own else path.as_posix())}", *more]
    return f"to have it read, write in dataset.inputs: `- {{{', '.join(said)}}}`"


def quoted(text: str) -> str:
    """Return a text as YAML has it within braces."""
    return (
        text
        if re.fullmatch(r"[^\W\d_][\w./ -]*(?<! )|/[\w./-]+", text)
        else json.dumps(text, ensure_ascii=False)
    )

"""The lines of an audit log and its head file: how they are written, and what is wrong with a bad one."""

from __future__ import annotations

import hmac
import json
import os
import re
from pathlib import Path
from typing import IO, Any

from so8t_helpers.run.files import write_text
from so8t_helpers.thinking.audit_key import AuditError, hmac_code, key_name

NO_LINE = "0" * 64
_BLOCK = 65536


def canonical(data: dict[str, Any]) -> str:
    """Return the one JSON text of a dict: sorted keys, no spaces, ASCII."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """Return a line, without its newline, as a dict; None where no log wrote it so."""
    try:
        line = json.loads(raw)
        same = isinstance(line, dict) and canonical(line).encode("ascii") == raw
    except (ValueError, RecursionError):
        return None
    # Other text than ASCII `hmac.compare_digest` does not compare.
    return line if same and isinstance(line.get("mac"), str) and line["mac"].isascii() else None


def line_problem(line: dict[str, Any] | None, number: int, previous: str, key: bytes | None) -> str | None:
    """Return what is wrong with line `number`, counted from 1, as `parse_line` gives it; None if nothing is.

    Without the key its code stays unchecked: number and place in the chain are all that can be.
    """
    if line is None:
        return "not a line that this log writes: edited"
    if number == 1 and line.get("version") != 2:
        return (
            "not the first line of a log of version 2; one of version 1 cannot be gone on with: keep it, "
            "verify it with the so8t that wrote it, and name a new file in serve.audit_log"
        )
    if key is not None:
        if number == 1 and line.get("key") != key_name(key):
            return f"written with another key ({line.get('key')}); this one is {key_name(key)}"
        rest = {name: value for name, value in line.items() if name != "mac"}
        if not hmac.compare_digest(line["mac"], hmac_code(key, "line", canonical(rest))):
            return "edited: its code does not fit its text"
    if line.get("seq") != number - 1 or line.get("previous") != previous:
        return f"line number {line.get('seq')} stands in the place of {number - 1}: deleted or reordered"
    return None


def last_line(file: IO[bytes]) -> tuple[int, bytes, bytes]:
    """Return where the last whole line ends, that line without its newline, and what stands after it."""
    size = file.seek(0, os.SEEK_END)
    start, block = size, b""
    while start and block.count(b"\n") < 2:
        start = max(0, start - _BLOCK)
        file.seek(start)
        block = file.read(size - start)
    whole, newline, torn = block.rpartition(b"\n")
    return (size - len(torn), whole.rpartition(b"\n")[2], torn) if newline else (0, b"", torn)


def sibling(path: Path, suffix: str) -> Path:
    """Return a file that lies next to a log."""
    return path.with_name(f"{path.name}.{suffix}")


def head_text(seq: int, mac: str) -> str:
    """Return a head as it is published."""
    return f"{seq}:{mac}"


def parse_head(head: str) -> tuple[int, str]:
    """Return number and code of a head as it is published.

    Raises:
        AuditError: it is none.
    """
    seq, colon, mac = head.strip().partition(":")
    if not colon or not re.fullmatch("-?[0-9]{1,18}", seq):
        raise AuditError(f"head {head!r}: expected NUMBER:CODE as the service and the report print it")
    return int(seq), mac


def write_head(path: Path, seq: int, mac: str, key: bytes) -> None:
    """Write a log's head file: the head, and a code of it, since each line tells what would be its head."""
    head = head_text(seq, mac)
    write_text(sibling(path, "head"), f"{head} {hmac_code(key, 'head', head)}\n")


def published_head(path: Path) -> str | None:
    """Return the head that lies next to a log, for a report to print; None where there is no log yet."""
    file = sibling(path, "head")
    return (file.read_text("ascii", errors="replace").split() or [""])[0] if file.is_file() else None


def read_head(path: Path, key: bytes | None) -> tuple[int, str]:
    """Return number and code from a log's head file; without the key its own code stays unchecked.

    Raises:
        AuditError: there is no head file, or another one than the log's writer left.
    """
    file = sibling(path, "head")
    remedy = "keep log and head as evidence, and start a new log elsewhere"
    if not file.is_file():
        raise AuditError(f"the head file {file} is missing: without it a cut tail cannot be seen; {remedy}")
    parts = file.read_text("ascii", errors="replace").split()
    if len(parts) != 2 or not parts[1].isascii():
        raise AuditError(f"{file}: expected a head and its code (older versions wrote no code); {remedy}")
    if key is not None and not hmac.compare_digest(parts[1], hmac_code(key, "head", parts[0])):
        raise AuditError(f"{file}: its code does not fit: edited, or of another key; {remedy}")
    return parse_head(parts[0])

"""The audit log: who asked what and what was decided, in a file that shows every change made to it later.

One canonical JSON object a line, numbered, with the authentication code (HMAC-SHA256, RFC 2104) of the line
before and its own. A chain alone cannot show that its tail was cut: the head ("12:9f3c…", number and code of
the last line) is kept next to the log and published by the service and the report. Of the thinking only the
HMAC is written, so that a text shown later can be proven to be the one that was thought.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from so8t_helpers.run.files import write_text
from so8t_helpers.settings import Settings, resolve
from so8t_helpers.thinking.audit_key import AuditError, hmac_code, key_name, load_key

NO_LINE = "0" * 64
_POLL_SECONDS = 0.002  # between two looks at a lock that another process holds: a line takes about as long
_OWN_FIELDS = frozenset({"seq", "time", "previous", "mac"})


@dataclass(frozen=True)
class Verdict:
    """What `verify_audit` found: how many `lines` hold, the `head` of the last ("seq:mac"), the bad `line`.

    Lines count from 1; `ok` says that nothing was edited, taken out, put in, reordered or cut.
    """

    ok: bool
    lines: int
    head: str
    line: int | None = None
    problem: str | None = None


class AuditLog:
    """An append-only log with its `*.head` and `*.lock`; threads and processes may write to the same one.

    Raises:
        AuditError: another key wrote the log, or its tail was cut.
    """

    def __init__(self, path: Path, key: bytes | None = None) -> None:
        self.path = path
        self._key = key or load_key()
        self._threads = threading.Lock()
        self._processes = FileLock(_sibling(path, "lock"), poll_interval=_POLL_SECONDS)
        self._size = -1
        self._last: tuple[int, str] = (-1, NO_LINE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # it names users, and by setting holds what they asked
        with self._threads, self._processes:
            self._catch_up()
            if self._last[0] < 0:
                self._write({"event": "log", "version": 1, "key": key_name(self._key)})
            with path.open("rb") as file:
                problem = _line_problem(file.readline()[:-1], 1, NO_LINE, self._key)
            if problem:
                hint = "bring the key that wrote it, or start a new log"
                raise AuditError(f"{path}: line 1: {problem}; {hint}")

    @property
    def head(self) -> str:
        """Number and code of the last line: publish it, since it alone shows a cut tail."""
        return _head(*self._last)

    def append(self, entry: dict[str, Any]) -> str:
        """Write one entry, on the disk when this returns; give back the new head.

        Raises:
            AuditError: the entry uses a field of the chain, or cannot be written; no part of it is left.
        """
        if used := _OWN_FIELDS & entry.keys():
            raise AuditError(f"audit entry: {', '.join(sorted(used))} belong to the chain")
        with self._threads, self._processes:
            self._catch_up()
            self._write(entry)
            return self.head

    def code(self, text: str) -> str:
        """Return the HMAC-SHA256 of a text that must not itself be written (the thinking)."""
        return hmac_code(self._key, "text", text)

    def _catch_up(self) -> None:
        """Take in what another process wrote, and mend a last line that a killed one left half written."""
        size = self.path.stat().st_size
        if size == self._size:
            return
        with self.path.open("ab+") as file:
            end, last, torn = _tail(file)
            if torn:
                file.truncate(end)
                _flush(file)
            seq, mac = (last["seq"], last["mac"]) if last else (-1, NO_LINE)
            self._last, self._size = (seq, mac), end
        if (kept := _read_head(self.path)) is not None and kept[0] > seq:
            raise AuditError(
                f"{self.path}: its last line is number {seq}, but {_sibling(self.path, 'head')} knows "
                f"{kept[0]}: the tail was cut; keep both files as evidence and start a new log elsewhere"
            )
        if torn:
            digest = hashlib.sha256(torn).hexdigest()
            self._write({"event": "recovered", "bytes": len(torn), "sha256": digest})

    def _write(self, entry: dict[str, Any]) -> None:
        seq, previous = self._last
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {**entry, "seq": seq + 1, "time": stamp, "previous": previous}
        line["mac"] = hmac_code(self._key, "line", canonical(line))
        data = canonical(line).encode("ascii") + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    if file.write(data) != len(data):
                        raise OSError("short write")
                    _flush(file)
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise AuditError(f"{self.path}: could not be written ({error}); is the disk full?") from error
        self._last, self._size = (seq + 1, line["mac"]), before + len(data)
        write_text(_sibling(self.path, "head"), self.head + "\n")


def verify_audit(path: Path, head: str | None = None, key: bytes | None = None) -> Verdict:
    """Check every line of a log, and its end against a head.

    Args:
        head: as published ("seq:mac", or the code alone); older ones hold too. The file next to the log is
            checked in any case, but whoever cuts the log can cut that too.
        key: by default from the environment or the user's key file.

    Raises:
        AuditError: no such log, or no key.
    """
    if not path.is_file():
        raise AuditError(f"{path}: no such audit log")
    key = key or load_key(create=False)
    codes: list[str] = []
    torn = False
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if torn := not raw.endswith(b"\n"):
                break
            if problem := _line_problem(raw[:-1], number, codes[-1] if codes else NO_LINE, key):
                return _verdict(codes, number, problem)
            codes.append(json.loads(raw)["mac"])
    kept = _read_head(path)
    heads = {str(_sibling(path, "head")): kept, "the head given": _parse_head(head, codes)}
    for source, published in heads.items():
        if published is None:
            continue
        seq, mac = published
        if seq >= len(codes):
            return _verdict(codes, len(codes) + 1, f"the tail was cut: {source} names line {seq + 1}")
        if codes[seq] != mac:
            return _verdict(codes, seq + 1, f"another line than the one that {source} names")
    if not codes or (torn and kept is None):
        return _verdict(codes, len(codes) + 1, "the log ends in the middle of a line, and there is no head")
    # Beyond the head, half a line is what a killed writer leaves: nobody was given that answer.
    return _verdict(codes, None, None)


def published_head(path: Path) -> str | None:
    """Return the head that lies next to a log, for a report to print; None where there is no log yet."""
    file = _sibling(path, "head")
    return file.read_text("ascii").strip() if file.is_file() else None


def service_log(settings: Settings) -> Path:
    """Return where the /think service's log lies: outside of the stages, which a later run makes anew."""
    chosen = settings.serve.audit_log
    return resolve(chosen) if chosen else settings.run_dir / "serve" / "audit.jsonl"


def canonical(data: dict[str, Any]) -> str:
    """Return the one JSON text of a dict: sorted keys, no spaces, ASCII."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _line_problem(raw: bytes, number: int, previous: str, key: bytes) -> str | None:
    try:
        line = json.loads(raw)
        same = isinstance(line, dict) and canonical(line).encode("ascii") == raw
    except ValueError:
        return "not JSON"
    if not same or not isinstance(line.get("mac"), str):
        return "not a line that this log writes: edited"
    if number == 1 and line.get("key") != key_name(key):
        return f"written with another key ({line.get('key')}); this one is {key_name(key)}"
    mac = line.pop("mac")
    if not hmac.compare_digest(mac, hmac_code(key, "line", canonical(line))):
        return "edited: its code does not fit its text"
    if line.get("seq") != number - 1 or line.get("previous") != previous:
        return f"line number {line.get('seq')} stands in the place of {number - 1}: deleted or reordered"
    return None


def _verdict(codes: list[str], line: int | None, problem: str | None) -> Verdict:
    head = _head(len(codes) - 1, codes[-1] if codes else NO_LINE)
    return Verdict(problem is None, len(codes), head, line, problem)


def _head(seq: int, mac: str) -> str:
    return f"{seq}:{mac}"


def _parse_head(head: str | None, codes: list[str]) -> tuple[int, str] | None:
    if head is None:
        return None
    seq, colon, mac = head.strip().partition(":")
    if not colon:
        return (codes.index(seq), seq) if seq in codes else (len(codes), seq)
    if not seq.isdigit():
        raise AuditError(f"head {head!r}: expected NUMBER:CODE as the service and the report print it")
    return int(seq), mac


def _read_head(path: Path) -> tuple[int, str] | None:
    return _parse_head(published_head(path), [])


def _tail(file: IO[bytes]) -> tuple[int, dict[str, Any] | None, bytes]:
    """Return where the last whole line ends, that line, and what stands after it."""
    size = file.seek(0, os.SEEK_END)
    start, block = size, b""
    while start and block.count(b"\n") < 2:
        start = max(0, start - 65536)
        file.seek(start)
        block = file.read(size - start)
    whole, newline, torn = block.rpartition(b"\n")
    if not newline:
        return 0, None, torn
    return size - len(torn), json.loads(whole.rpartition(b"\n")[2]), torn


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())

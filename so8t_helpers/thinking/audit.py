"""The audit log: who asked what and what was decided, in a file that shows every change made to it later.

One canonical JSON object a line, numbered, with the authentication code (HMAC-SHA256, RFC 2104) of the line
before and its own. A chain alone cannot show that its tail was cut: the head ("12:9f3c…", number and code of
the last line) is kept next to the log and published by the service and the report. Of the thinking only the
HMAC is written, so that a text shown later can be proven to be the one that was thought. Checkpoints are
signed, for those who are to verify and not to write (`audit_checkpoint`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from so8t_helpers.run.files import StageError
from so8t_helpers.settings import Settings, resolve
from so8t_helpers.thinking.audit_checkpoint import EVERY, Checkpoints, checkpoint, load_public_key, public_key
from so8t_helpers.thinking.audit_key import AuditError, hmac_code, key_name, load_key
from so8t_helpers.thinking.audit_lines import (
    NO_LINE,
    canonical,
    head_text,
    last_line,
    line_problem,
    parse_head,
    parse_line,
    read_head,
    sibling,
    write_head,
)

_POLL_SECONDS = 0.002  # between two looks at a lock that another process holds: a line takes about as long
_PATIENCE = 10.0  # seconds to wait for the lock; whoever holds it for longer hangs
_OWN_FIELDS = frozenset({"seq", "time", "previous", "mac"})


@dataclass(frozen=True)
class Verdict:
    """What `verify_audit` found: how many `lines` hold, the `head` of the last ("seq:mac"), the bad `line`.

    Lines count from 1; `ok` says that nothing was edited, taken out, put in, reordered or cut; `signed` lines
    are covered by a signature.
    """

    ok: bool
    lines: int
    head: str
    line: int | None = None
    problem: str | None = None
    signed: int = 0


class AuditLog:
    """An append-only log with its `*.head` and `*.lock`; threads and processes may write to the same one.

    Raises:
        AuditError: another key wrote the log, its last line or head was edited, or its tail was cut.
    """

    def __init__(self, path: Path, key: bytes | None = None) -> None:
        self.path = path
        self._key = key or load_key()
        self._threads = threading.Lock()
        lock = sibling(path, "lock")
        # 0600: whoever may open the lock may hold it.
        self._processes = FileLock(lock, timeout=_PATIENCE, mode=0o600, poll_interval=_POLL_SECONDS)
        self._size = -1
        self._last: tuple[int, str] = (-1, NO_LINE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # it names users, and by setting holds what they asked
        with self._locked():
            with path.open("rb") as file:
                first = file.readline()
            if first.endswith(b"\n"):
                problem = line_problem(parse_line(first[:-1]), 1, NO_LINE, self._key)
                if problem:
                    hint = "" if "version" in problem else "; bring the key that wrote it, or start a new log"
                    raise AuditError(f"{path}: line 1: {problem}{hint}")
            elif not sibling(path, "head").is_file():
                write_head(path, -1, NO_LINE, self._key)  # before the first line: a log without one is cut
            self._catch_up()
            if self._last[0] < 0:
                about = {"event": "log", "version": 2, "key": key_name(self._key)}
                self._write({**about, "public_key": self.public_key})

    @property
    def head(self) -> str:
        """Number and code of the last line: publish it, since it alone shows a cut tail."""
        return head_text(*self._last)

    @property
    def public_key(self) -> str:
        """What verifies the log's signatures, and can forge none."""
        return public_key(self._key)

    def append(self, entry: dict[str, Any]) -> str:
        """Write one entry, on the disk when this returns; give back the new head.

        Raises:
            AuditError: the entry uses a field of the chain, or cannot be written; no part of it is left.
        """
        if used := _OWN_FIELDS & entry.keys():
            raise AuditError(f"audit entry: {', '.join(sorted(used))} belong to the chain")
        with self._locked():
            self._catch_up()
            self._write(entry)
            return self.head

    def sign(self) -> None:
        """Sign all lines that there are, before the next checkpoint is due."""
        with self._locked():
            self._catch_up()
            self._write(checkpoint(self.path, self._last[0] + 1, self._key))

    def code(self, text: str) -> str:
        """Return the HMAC-SHA256 of a text that must not itself be written (the thinking)."""
        return hmac_code(self._key, "text", text)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep threads and processes out.

        Raises:
            AuditError: somebody else does not let go.
        """
        held = self._threads.acquire(timeout=_PATIENCE)
        try:
            if not held:
                raise Timeout(self._processes.lock_file)
            with self._processes:
                yield
        except Timeout as error:
            raise AuditError(
                f"{error.lock_file}: held by another for {_PATIENCE:g} s; does a process hang that writes to "
                "this log?"
            ) from error
        finally:
            if held:
                self._threads.release()

    def _catch_up(self) -> None:
        """Take in what another process wrote, and mend a last line that a killed one left half written.

        Raises:
            AuditError: the tail was cut, the last line was edited, or the file has gone.
        """
        try:
            if self.path.stat().st_size == self._size:
                return
        except FileNotFoundError as error:
            raise AuditError(
                f"{self.path}: it was moved or removed while it was written to; stop the service, bring it "
                "back, and name another file in serve.audit_log to begin a new log"
            ) from error
        with self.path.open("ab+") as file:
            end, raw, torn = last_line(file)
            try:
                kept_seq, kept_mac = read_head(self.path, self._key)
            except AuditError as error:
                raise AuditError(f"{self.path}: {error}") from error
            seq, mac = self._checked(raw) if end else (-1, NO_LINE)
            if kept_seq > seq or (kept_seq == seq and kept_mac != mac):
                raise AuditError(
                    f"{self.path}: its last line is number {seq}, but {sibling(self.path, 'head')} knows "
                    f"{kept_seq}: the tail was cut; keep both files as evidence and start a new log elsewhere"
                )
            if torn:
                file.truncate(end)
                _flush(file)
            self._last, self._size = (seq, mac), end
        if torn:
            digest = hashlib.sha256(torn).hexdigest()
            self._write({"event": "recovered", "bytes": len(torn), "sha256": digest})

    def _checked(self, raw: bytes) -> tuple[int, str]:
        """Return number and code of the last line."""
        line = parse_line(raw) or {}
        seq, previous = line.get("seq"), line.get("previous")
        number = seq + 1 if isinstance(seq, int) else 0
        if problem := line_problem(line or None, number, str(previous), self._key):
            with self.path.open("rb") as file:
                number = sum(one.endswith(b"\n") for one in file)
            raise AuditError(
                f"{self.path}: line {number}: {problem}; keep the log as evidence and start a new one"
            )
        return line["seq"], line["mac"]

    def _write(self, entry: dict[str, Any]) -> None:
        due = self._last[0] + 1
        if due and due % EVERY == 0 and entry["event"] != "checkpoint":
            self._write(checkpoint(self.path, due, self._key))
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
                    write_head(self.path, seq + 1, line["mac"], self._key)
                except (OSError, StageError):  # the latter where something on Windows holds the head's file
                    file.truncate(before)
                    raise
        except (OSError, StageError) as error:
            raise AuditError(f"{self.path}: could not be written ({error}); is the disk full?") from error
        self._last, self._size = (seq + 1, line["mac"]), before + len(data)


def verify_audit(
    path: Path, head: str | None = None, key: bytes | None = None, public: str | None = None
) -> Verdict:
    """Check every line of a log, and its end against a head.

    Args:
        head: as published ("seq:mac", or the code alone); older ones hold too. The file next to the log is
            checked in any case, but whoever cuts the log can take an older one of those too.
        key: by default from the environment or the user's key file.
        public: the public key instead, or a file with it: signatures are checked, and no line's own code.

    Raises:
        AuditError: no such log, or no key.
    """
    if not path.is_file():
        raise AuditError(f"{path}: no such audit log")
    key = None if public else key or load_key(create=False)
    checkpoints = Checkpoints(load_public_key(public or public_key(key or b"")))
    codes: list[str] = []

    def verdict(line: int | None = None, problem: str | None = None) -> Verdict:
        last = head_text(len(codes) - 1, codes[-1] if codes else NO_LINE)
        return Verdict(problem is None, len(codes), last, line, problem, checkpoints.signed)

    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                break  # beyond the head, half a line is what a killed writer leaves: nobody got that answer
            line = parse_line(raw[:-1])
            problem = line_problem(line, number, codes[-1] if codes else NO_LINE, key)
            if line and not problem:
                problem = checkpoints.problem(raw, line)
            if not line or problem:
                return verdict(number, problem)
            codes.append(line["mac"])
    if not codes:
        return verdict(1, "there is no whole line")
    try:
        heads = {str(sibling(path, "head")): read_head(path, key)}
    except AuditError as error:
        return verdict(len(codes) + 1, str(error))
    if head is not None:
        heads["the head given"] = parse_head(head) if ":" in head else _place(head.strip(), codes)
    for source, (seq, mac) in heads.items():
        if seq >= len(codes):
            return verdict(len(codes) + 1, f"the tail was cut: {source} names line {seq + 1}")
        if seq >= 0 and codes[seq] != mac:
            return verdict(seq + 1, f"another line than the one that {source} names")
    return verdict()


def _place(mac: str, codes: list[str]) -> tuple[int, str]:
    return (codes.index(mac) if mac in codes else len(codes)), mac


def service_log(settings: Settings) -> Path:
    """Return where the /think service's log lies: outside of the stages, which a later run makes anew."""
    chosen = settings.serve.audit_log
    return resolve(chosen) if chosen else settings.run_dir / "serve" / "audit.jsonl"


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())

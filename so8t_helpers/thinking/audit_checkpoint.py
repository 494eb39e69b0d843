"""Signed checkpoints of an audit log: who verifies with the public key alone cannot forge a line.

Every `EVERY` lines, and when the service stops, a line of the log signs (Ed25519, RFC 8032) the SHA-256 of
all bytes from the checkpoint before it, or the beginning, up to itself: so each signature covers all lines
before it. The signing key is derived from the log's key, the public one can be given to anybody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from so8t_helpers.thinking.audit_key import AuditError, hmac_code
from so8t_helpers.thinking.audit_lines import canonical, parse_line

EVERY = 100  # lines
_BLOCK = 65536


def signer(key: bytes) -> Ed25519PrivateKey:
    """Return the signing key that belongs to a log's key."""
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(hmac_code(key, "signing key", "")))


def public_key(key: bytes) -> str:
    """Return what verifies the signatures of a log's key, as 64 hexadecimal digits."""
    return signer(key).public_key().public_bytes_raw().hex()


def load_public_key(text: str) -> Ed25519PublicKey:
    """Return a public key given as 64 hexadecimal digits, or as a file that holds them.

    Raises:
        AuditError: it is neither.
    """
    path = Path(text)
    try:
        given = path.read_text("ascii").strip() if path.is_file() else text
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(given))
    except (ValueError, OSError) as error:
        raise AuditError(
            f"public key {text!r}: expected the 64 digits that so8t serve prints, or a file with them"
        ) from error


def checkpoint(path: Path, lines: int, key: bytes) -> dict[str, Any]:
    """Return the entry that signs the `lines` whole lines of a log."""
    since, covered = _since_last(path, lines)
    claim = {"lines": lines, "since": since, "sha256": hashlib.sha256(covered).hexdigest()}
    return {"event": "checkpoint", **claim, "signature": signer(key).sign(_message(claim)).hex()}


def _since_last(path: Path, lines: int) -> tuple[int, bytes]:
    """Return the number of the last checkpoint's line, or 0, and all bytes from there on."""
    with path.open("rb") as file:
        start = path.stat().st_size
        tail = b""
        while start:
            size = min(max(_BLOCK, len(tail)), start)  # twice as far each time
            start -= size
            file.seek(start)
            tail = file.read(size) + tail
            # Of the first line in the block the beginning may be missing.
            whole = tail if not start else tail.partition(b"\n")[2]
            seq, end = lines, len(whole)
            for raw in reversed(whole.splitlines()):
                seq, end = seq - 1, end - len(raw) - 1
                if b'"event":"checkpoint"' in raw and (parse_line(raw) or {}).get("event") == "checkpoint":
                    return seq, whole[end:]
    return 0, tail


def _message(claim: dict[str, Any]) -> bytes:
    return f"so8t checkpoint\n{canonical(claim)}".encode("ascii")


class Checkpoints:
    """Check the checkpoints of a log while its lines are read from first to last.

    Attributes:
        signed: lines that a good signature covers so far.
    """

    def __init__(self, public: Ed25519PublicKey) -> None:
        self.signed = 0
        self._verify: Callable[[bytes, bytes], None] = public.verify
        self._since, self._digest = 0, hashlib.sha256()

    def problem(self, raw: bytes, line: dict[str, Any]) -> str | None:
        """Take the next line, with its newline; return what is wrong with it."""
        lines = line["seq"]
        if line.get("event") == "checkpoint":
            claim = {"lines": lines, "since": self._since, "sha256": self._digest.hexdigest()}
            try:
                self._verify(bytes.fromhex(str(line.get("signature"))), _message(claim))
            except (InvalidSignature, ValueError):
                return f"its signature does not fit the lines {self._since + 1} to {lines}: edited or forged"
            self.signed, self._since, self._digest = lines, lines, hashlib.sha256()
        elif lines and lines % EVERY == 0:
            return "no checkpoint where the log's writer signs"
        self._digest.update(raw)
        return None

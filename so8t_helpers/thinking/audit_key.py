"""The key of the audit log: where it lies, and what is computed with it."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from so8t_helpers.run.files import StageError

KEY_VARIABLE = "SO8T_AUDIT_KEY"
KEY_BYTES = 32


class AuditError(StageError):
    """The log or its key cannot be used; the message names the file and what to do."""


def load_key(create: bool = True) -> bytes:
    """Return the key: the environment variable SO8T_AUDIT_KEY, else the user's key file, made on first use.

    Raises:
        AuditError: the key is too short, others may read its file, or there is none and `create` is false.
    """
    if (text := os.environ.get(KEY_VARIABLE)) is not None:
        if len(text) < KEY_BYTES:
            raise AuditError(f"{KEY_VARIABLE}: expected at least {KEY_BYTES} characters, got {len(text)}")
        return text.encode()
    path = key_file()
    if not path.exists():
        if not create:
            raise AuditError(f"no audit key: set {KEY_VARIABLE}, or bring the file {path} that wrote the log")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(KEY_BYTES))
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise AuditError(f"{path}: others may read the audit key; run `chmod 600 {path}`")
    key = path.read_text("ascii").strip().encode()
    if len(key) < KEY_BYTES:
        raise AuditError(f"{path}: expected a key of at least {KEY_BYTES} characters; move the file away")
    return key


def key_file() -> Path:
    """Return where the user's key lies: never in the project's folder."""
    if os.name == "nt":
        base = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "so8t" / "audit.key"


def key_name(key: bytes) -> str:
    """Return a short name by which a key is known without telling it."""
    return hmac_code(key, "name", "")[:16]


def hmac_code(key: bytes, purpose: str, text: str) -> str:
    """HMAC-SHA256 with a purpose before the text, so that a code for one thing never fits another."""
    message = f"so8t {purpose}\n{text}".encode("utf-8", "surrogatepass")
    return hmac.new(key, message, hashlib.sha256).hexdigest()

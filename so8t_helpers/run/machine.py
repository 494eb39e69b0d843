"""What the machine refuses, in one line: a full or read-only disk, a missing permission, a full card."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from so8t_helpers.run.files import MachineError, StageError
from so8t_helpers.settings import SettingsError

_REFUSALS = {
    errno.ENOSPC: "no room on the disk",
    errno.EDQUOT: "the quota on this disk is used up",
    errno.EFBIG: "the disk takes no file of this size",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the disk is read-only",
    errno.EMFILE: "too many open files",
}
_ON_DISK = "make room there, or set run.root to a folder that can be written; the same command goes on"


def refusal(error: BaseException) -> str | None:
    """Say in one line what the machine refused and what to do; None for an error of another kind."""
    if isinstance(error, StageError):  # has said it
        return None
    text = " ".join(str(error).split())[:200]
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return f"card full ({text}); free it (`nvidia-smi` shows who holds it) or lower training.memory_gib"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:  # torch's words
        return f"no memory left {text}; end other programs, or lower training.sequence_length or batch_size"
    number = error.errno if isinstance(error, OSError) else None
    if number is None and "No space left on device" in text:  # safetensors and pyarrow say it in words
        number = errno.ENOSPC
    return f"{_REFUSALS[number]} ({text}); {_ON_DISK}" if number in _REFUSALS else None


@contextmanager
def machine_errors(doing: str) -> Iterator[None]:
    """Turn what the machine refuses in the block into a MachineError; `doing` says in what."""
    try:
        yield
    except (StageError, SettingsError):
        raise
    except Exception as error:
        if (said := refusal(error)) is None:
            raise
        raise MachineError(f"{doing}: {said}") from error


def check_place(folder: Path, key: str) -> None:
    """Raise MachineError: no file can be made in a folder, or where it would have to be made."""
    there = folder
    try:
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        why = error.strerror or error
        raise MachineError(f"{key}: {folder} cannot be written ({why}); name a folder that can") from error

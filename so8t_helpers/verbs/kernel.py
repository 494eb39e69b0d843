"""A stage's kernel: its environment, its temporary folder, its time, and the end of all that it started."""

from __future__ import annotations

import getpass
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from so8t_helpers.run.files import remove, remove_scratch, write_text
from so8t_helpers.run.stage import STAGES
from so8t_helpers.settings import Settings, resolve

_NOTE = ".temp"  # says where the temporary folder is, for whoever comes after a kill
_PREFIX = "so8t-"


def time_limit(settings: Settings) -> Callable[[object], int] | None:
    """Return what gives a cell its seconds, those that are left of the stage's; None without a limit."""
    limit = settings.run.stage_timeout
    if limit is None:
        return None
    until = time.monotonic() + limit
    return lambda _: max(1, math.ceil(until - time.monotonic()))


@contextmanager
def kernel_place(settings: Settings, work: Path) -> Iterator[None]:
    """Set for the kernel: cache folders, the kernel spec of this very Python, and a temporary folder.

    In that folder are connection files and all that is made without a place of its own. It goes at the end,
    and with it every process that was started below the kernel and outlived it: a server, a worker. What a
    killed run left in `work`, a folder that no other process works in, is ended and removed first.
    """
    end_leftovers(work)
    # Of the stages alone: a service of this run, or another training of this study, may be writing elsewhere.
    for name in (*STAGES, "notebooks"):
        remove_scratch((work / name).rglob(".*.tmp"))
    cache, before, temp_before = settings.cache, dict(os.environ), tempfile.tempdir
    named = {"HF_HOME": cache.hf_home, "TORCHINDUCTOR_CACHE_DIR": cache.torchinductor_dir}
    folders = {name: resolve(value) for name, value in named.items() if value is not None}
    # Torch's own default is in the temporary folder, where it would not outlive the stage.
    user = "user"
    with suppress(KeyError, OSError):  # one without a name, as in a container
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR", Path(tempfile.gettempdir()) / f"torchinductor_{user}")
    parent = resolve(cache.temp_dir) if cache.temp_dir else Path(tempfile.gettempdir())
    for folder in (*folders.values(), parent):
        folder.mkdir(parents=True, exist_ok=True)
    temp = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    write_text(work / _NOTE, temp)
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(kept)} | {k: str(path) for k, path in folders.items()}
    os.environ |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), temp)
    # A kernel named python3 in the user's folders may belong to another environment.
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    tempfile.tempdir = temp  # connection files are written by this process
    try:
        yield
    finally:
        tempfile.tempdir = temp_before
        os.environ.clear()
        os.environ.update(before)
        end_leftovers(work)


def end_leftovers(work: Path) -> None:
    """End what still works in the temporary folder that `work` tells of, and remove it."""
    note = work / _NOTE
    if not note.is_file():
        return
    temp = Path(note.read_text(encoding="utf-8"))
    if temp.name.startswith(_PREFIX):  # the note may be broken
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):  # gone meanwhile, or another user's
                if process.environ().get("TMPDIR") == str(temp):
                    process.kill()
                    process.wait(10)
        shutil.rmtree(temp, ignore_errors=True)
    remove(note)

"""Windows' rules on Linux: what Windows refuses in a temporary or run folder is refused here, too.

- To remove, rename or replace a file that a process of this session has open or mapped, or a folder with such
  a file in it or in which a process stands; and to cut a mapped file short.
- Names and lengths that Windows does not take, and text in our own code without an encoding (where Python was
  started with `-X warn_default_encoding`).

The session is pytest and all that it starts: `enforce` is called by conftest.py, and by Python itself as it
starts in any other process of the session, since PYTHONPATH has this folder. An audit hook (PEP 578) sees
what Python does; what libraries in C or Rust open is found in /proc, what they remove is not seen.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

SESSION = "SO8T_WINDOWS_RULES"  # in the environment: the first process, and the folders with rules
LONGEST_FILE, LONGEST_FOLDER = 259, 247  # characters of a whole path, where long paths are off
BAD_NAME = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$|(?i:^(con|prn|aux|nul|com\d|lpt\d)(\.|$))')
_NOT_THERE = re.compile(r"\.lock$|/tmp[a-z0-9_]{8}\.(ptx|log|o)$")
IN_USE, NO_NAME, TOO_LONG = 32, 123, 206  # Windows' own numbers of these errors

_tree = threading.local()  # what was held in the tree that this thread removes


def enforce() -> None:
    """Keep to the rules from here on, in the folders that the environment names."""
    first, *folders = os.environ[SESSION].split(os.pathsep)
    roots = tuple(f"{os.path.realpath(folder)}/" for folder in folders)
    warnings.filterwarnings("error", category=EncodingWarning, module=r"so8t_helpers\.")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if rule := _RULES.get(event):
            rule(int(first), roots, *arguments)

    sys.addaudithook(hook)


def _open(first: int, roots: tuple[str, ...], path: Any, _mode: Any, flags: int) -> None:
    if flags & (os.O_CREAT | os.O_TRUNC) and (target := _inside(path, roots)):
        if flags & os.O_CREAT:
            _check_name(target, LONGEST_FILE)
        if flags & os.O_TRUNC and os.path.isfile(target):
            _check_file(first, target, opened=False)


def _mkdir(_first: int, roots: tuple[str, ...], path: Any, _mode: int, folder: int) -> None:
    if target := _inside(path, roots, folder):
        _check_name(target, LONGEST_FOLDER)


def _remove(first: int, roots: tuple[str, ...], path: Any, folder: int) -> None:
    target = _inside(path, roots, folder)
    if target is None:
        return
    root, held = getattr(_tree, "held", ("", {}))
    if folder < 0 or not target.startswith(f"{root}/"):  # shutil.rmtree alone goes by folders
        _check_file(first, target)
    elif target in held:
        _refuse(target, held[target])


def _rmtree(first: int, roots: tuple[str, ...], path: Any, folder: int | None) -> None:
    if target := _inside(path, roots, -1 if folder is None else folder):
        _tree.held = (target, dict(_held_in(first, target)))


def _rename(first: int, roots: tuple[str, ...], source: Any, target: Any, *folders: int) -> None:
    old, new = (_inside(path, roots, folder) for path, folder in zip((source, target), folders, strict=True))
    if old and os.path.isdir(old):
        for path, how in _held_in(first, old):
            _refuse(path, how)
    elif old:
        _check_file(first, old)
    if new:
        _check_name(new, LONGEST_FOLDER if old and os.path.isdir(old) else LONGEST_FILE)
        if os.path.isfile(new):
            _check_file(first, new)


_RULES: dict[str, Callable[..., None]] = {
    "open": _open,
    "os.mkdir": _mkdir,
    "os.remove": _remove,
    "os.rename": _rename,
    "shutil.rmtree": _rmtree,
}


def _inside(path: Any, roots: tuple[str, ...], folder: int = -1) -> str | None:
    """Return the whole path where it lies in a folder with rules.

    On Windows `filelock` has its own way, and Triton a build of its own; here that leaves files of ptxas.
    """
    if isinstance(path, int):
        return None
    text = os.fsdecode(path)
    if not os.path.isabs(text):
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd(), text)
    text = os.path.normpath(text)
    return text if text.startswith(roots) and not _NOT_THERE.search(text) else None


def _check_name(path: str, longest: int) -> None:
    if BAD_NAME.search(os.path.basename(path)):
        _refuse(path, "no name for a file there", errno.EINVAL, NO_NAME)
    if len(path) > longest:
        _refuse(path, f"{len(path)} characters, at most {longest}", errno.ENAMETOOLONG, TOO_LONG)


def _check_file(first: int, path: str, opened: bool = True) -> None:
    name = os.fsencode(path)
    for process in _session(first):
        if opened and path in _open_files(process):
            _refuse(path, f"process {process} has it open")
        if b" " + name + b"\n" in _maps(process):
            _refuse(path, f"process {process} has it mapped")


def _held_in(first: int, folder: str) -> Iterator[tuple[str, str]]:
    """Yield what is held in a folder, and how."""
    inside = re.compile(rb" (" + re.escape(os.fsencode(folder)) + rb"/.*)\n")
    for process in _session(first):
        for path in _open_files(process):
            if path.startswith(f"{folder}/") and not path.endswith(".lock") and os.path.isfile(path):
                yield path, f"process {process} has it open"
        for name in inside.findall(_maps(process)):
            if os.path.isfile(name):
                yield os.fsdecode(name), f"process {process} has it mapped"
        with suppress(OSError):
            where = os.readlink(f"/proc/{process}/cwd")
            if f"{where}/".startswith(f"{folder}/"):
                yield where, f"process {process} stands in it"


def _session(process: int) -> Iterator[int]:
    """Yield a process and all that come from it."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # its thread has ended
            for child in children.read_bytes().split():
                yield from _session(int(child))


def _open_files(process: int) -> list[str]:
    found = []
    with suppress(OSError):  # it has ended, or belongs to someone else
        for entry in os.listdir(f"/proc/{process}/fd"):
            with suppress(OSError):
                found.append(os.readlink(f"/proc/{process}/fd/{entry}"))
    return found


def _maps(process: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{process}/maps").read_bytes()
    return b""


def _refuse(path: str, why: str, number: int = errno.EACCES, windows: int = IN_USE) -> NoReturn:
    error = OSError(number, f"Windows would refuse this: {why}", path)
    error.winerror = windows  # type: ignore[attr-defined]  # as Windows' own errors have it
    raise error


if SESSION in os.environ and __name__ == "sitecustomize":
    enforce()

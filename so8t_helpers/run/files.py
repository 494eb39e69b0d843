"""Files: written whole or not at all, hashed once, and where the demo keeps what it makes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from so8t_helpers.settings import Settings, SettingsError, resolve

# There is no reading the umask without setting it for a moment: done here, before threads create files.
UMASK = os.umask(0o077)
os.umask(UMASK)

# How long Windows may refuse to rename or remove what somebody has open (a reader, a virus scanner).
PATIENCE_SECONDS = 5.0


class StageError(RuntimeError):
    """A stage cannot start or go on; the message names the file and what to do."""


class MachineError(StageError):
    """The machine refuses: no room, no permission, no memory, or another process has what is needed."""


class HashCache:
    """SHA-256 of files, remembered by path and by what an edit changes, so that a second look is instant."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError, AttributeError):
            found = json.loads(path.read_text(encoding="utf-8"))
            self.entries = {key: entry for key, entry in found.items() if isinstance(entry, list)}

    def sha256(self, path: Path) -> str:
        """Return the hex digest of a file's bytes."""
        stamp = _stamp(path)
        entry = self.entries.get(str(path), [])
        if entry[:-1] != stamp:
            entry = [*stamp, sha256_file(path)]
            self.entries[str(path)] = entry
        return str(entry[-1])

    def put(self, path: Path, digest: str) -> None:
        """Remember the digest of a file that was hashed while it was written."""
        self.entries[str(path)] = [*_stamp(path), digest]

    def save(self) -> None:
        """Write the cache to its file."""
        write_json(self.path, self.entries)


def _stamp(path: Path) -> list[int]:
    """Size, time, inode and change time: the last two tell of an edit that puts size and time back."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]


def hashes_path(settings: Settings) -> Path:
    """Where a run remembers hashes; without that file all are worked out anew."""
    return settings.run_dir / ".hashes.json"


@contextmanager
def run_hashes(settings: Settings) -> Iterator[HashCache]:
    """The hashes that a run remembers; kept when the work with them ends, also by an error."""
    cache = HashCache(hashes_path(settings))
    before = dict(cache.entries)
    try:
        yield cache
    finally:
        if cache.entries != before and settings.run_dir.is_dir():  # a refused run leaves nothing behind
            cache.save()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder, a file at `target` replaced. Raises StageError: it is held open."""
    _patiently(partial(source.replace, target), target)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it, where it is there. Raises StageError: it is held open."""
    if path.is_dir():
        _patiently(partial(shutil.rmtree, path), path)
    else:
        _patiently(partial(path.unlink, missing_ok=True), path)


def _patiently(act: Callable[[], object], path: Path) -> None:
    """Do it, and where Windows refuses, again and again for `PATIENCE_SECONDS`."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            act()
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) is None:  # no permission at all
                raise
            if time.monotonic() >= until:
                raise StageError(
                    f"{error.filename or path}: another program has it open (a notebook that still shows it, "
                    "a virus scanner); end that and give the same command again"
                ) from error
            time.sleep(0.05)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a scratch path next to `path`; on success it is fsynced and renamed, on failure removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        # mkstemp makes files private; an artefact gets the permissions of any other new file.
        scratch.chmod(0o666 & ~UMASK)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        replace(scratch, path)
    finally:
        remove(scratch)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a scratch folder next to `path`; on success it takes the place of `path`, on failure it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield scratch
        scratch.chmod(0o777 & ~UMASK)
        if path.exists():
            old = path.with_name(f".{path.name}.old.tmp")
            shutil.rmtree(old, ignore_errors=True)
            replace(path, old)
            replace(scratch, path)
            remove(old)
        else:
            replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_scratch(paths: Iterable[Path]) -> None:
    """Remove what a killed process had not finished; what another program has open stays until next time."""
    for path in list(paths):
        with suppress(StageError):
            remove(path)


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return the finished folder `target`; one process makes it, others that start meanwhile wait."""
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                remove_scratch(target.parent.glob(f".{escape(target.name)}.*.tmp"))
                with atomic_directory(target) as scratch:
                    make(scratch)
    return target


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, with LF line ends on every system."""
    with atomic_path(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, readable, with Japanese as it is."""
    write_text(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")


def write_yaml(path: Path, data: Any) -> None:
    """Write YAML atomically."""
    write_text(path, yaml.safe_dump(data, allow_unicode=True, sort_keys=False))


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn what a library raises over a file's content into a StageError with file, expectation and remedy.

    An error of the system, such as a refused permission, stays what it is: the content has no part in it.
    """
    try:
        yield
    except (StageError, SettingsError, MemoryError):
        raise
    except Exception as error:  # tokenizers and safetensors raise bare ones of their own
        if isinstance(error, OSError) and error.errno is not None:
            raise
        words = " ".join(str(error).split())[:200]
        found = f"{type(error).__name__}: {words}"
        raise StageError(
            f"{path}: expected {expected}, found {found}; fetch or make the file again"
        ) from error


class JsonObject(dict[str, Any]):
    """An object of a JSON file: a key that it lacks is a StageError that names file and key."""

    def __init__(self, path: Path, content: Mapping[str, Any]):
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise StageError(f"{self.path}: has no key `{key}`; fetch or make the file again")


def read_json(path: Path) -> JsonObject:
    """Read a JSON object; an empty one where there is no such file. Raises StageError: it is none."""
    if not path.is_file():
        return JsonObject(path, {})
    with reading(path, "a JSON object"):
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=partial(JsonObject, path))
        if not isinstance(found, JsonObject):
            raise TypeError(f"a {type(found).__name__}")
        return found


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_path(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Read a JSONL file that one of our stages wrote; with `keys` it has rows, and each of them has these.

    Raises:
        StageError: no row, a line that is no JSON object, or one without a key; it names the line.
    """
    again = "run 01_dataset again, or name another data set in training.dataset_dir"
    rows: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                missing = [key for key in keys if key not in row]
            except (ValueError, TypeError) as error:
                raise StageError(
                    f"{path}, line {number}: expected a JSON object ({error}); {again}"
                ) from error
            if missing:
                raise StageError(f"{path}, line {number}: has no key `{missing[0]}`; {again}")
            rows.append(row)
    if keys and not rows:
        none = "holds no row (all were quarantined, or dataset.eval_share leaves it none)"
        raise StageError(f"{path}: {none}; {again}")
    return rows


def free_bytes(path: Path) -> int:
    """Return the room on the disk that holds `path`, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_disk(path: Path, needed_bytes: int, what: str) -> None:
    """Raise MachineError when the disk that holds `path` has less room than `what` will take."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise MachineError(
            f"{what} needs {_size(needed_bytes)} on the disk of {path}, which has {_size(free)} free; "
            "make room or set run.root to a folder on a larger disk"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def demo_place(settings: Settings, name: str) -> Path:
    """Return where the demo's "base" or "records" lie, or will: named after the source that makes them."""
    digest = hashlib.sha256()
    for source in sorted((Path(__file__).parents[1] / "demo").glob("*.py")):
        digest.update(source.name.encode() + source.read_text(encoding="utf-8").encode())
    return resolve(settings.run.root) / ".demo" / digest.hexdigest()[:12] / name


def demo_folder(settings: Settings, name: str) -> Path:
    """Return the demo's finished folder `name`. Raises SettingsError: it has not been made."""
    folder = demo_place(settings, name)
    if not folder.is_dir():
        raise SettingsError(
            f"the demo's {name} is not there ({folder}); `python run.py demo` makes it, or in Python "
            "so8t_helpers.demo.prepare(settings)"
        )
    return folder

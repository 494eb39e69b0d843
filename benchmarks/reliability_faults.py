"""A run of reliability.py in a folder of its own, and what is done to it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from so8t_helpers.run.files import sha256_file, write_yaml
from so8t_helpers.run.records import read_record
from so8t_helpers.run.stage import MANIFEST, STAGES, read_manifest
from so8t_helpers.settings import PROJECT_ROOT, Settings, merge
from so8t_helpers.verbs.batch import due_reason
from so8t_helpers.verbs.verify import walk_back

LONGEST = 1800.0  # seconds for one call
KILLS, TRIES = 3, 5  # of a run, and to fill a disk in time, at most


@dataclass(frozen=True)
class Run:
    """A run in a folder of its own; what it leaves in the temporary folder is in `temp`."""

    folder: Path
    settings: Settings

    @classmethod
    def at(cls, folder: Path, settings: Settings) -> Run:
        """Return the run of these settings whose folders are in `folder`."""
        places = {key: str(folder / key) for key in ("root", "reports_root")}
        return cls(folder, merge(settings, {"run": places}))

    @property
    def temp(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-temp")

    def start(self, *options: str, verb: str = "run") -> subprocess.Popen[bytes]:
        """Start a verb as a person does, its words in log.txt."""
        profile = self.folder / "mine.yaml"
        write_yaml(profile, self.settings.model_dump())
        self.temp.mkdir(exist_ok=True)
        with (self.folder / "log.txt").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "so8t_helpers", verb, str(profile), *options],
                cwd=PROJECT_ROOT,
                env=os.environ | {"TMPDIR": str(self.temp)},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def finish(self, *options: str) -> None:
        """Carry out what is due; it has to succeed."""
        if self.start(*options).wait(LONGEST) != 0:
            raise RuntimeError(self.said()[-3000:])

    def said(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    def stage(self) -> str | None:
        """Return the stage that is, or was last, at work; None before the first."""
        return (re.findall(r"^\[./.\] \S+ (\w+):", self.said(), flags=re.MULTILINE) or [None])[-1]

    def seconds(self) -> float:
        """Return what the stages' notebooks took."""
        records = [read_record(self.settings, stage) for stage in STAGES]
        return sum(record.seconds for record in records if record)

    def artefacts(self) -> dict[str, str]:
        """Return the hash of every file that a stage's manifest names, as it lies there."""
        run, found = self.settings.run_dir, {}
        for stage in STAGES:
            for name in (read_manifest(self.settings, stage) or {"outputs": {}})["outputs"]:
                if (run / stage / name).is_file():
                    found[f"{stage}/{name}"] = sha256_file(run / stage / name)
        return found

    def differing(self, reference: dict[str, str]) -> list[str]:
        """Return the artefacts that are not those of `reference`."""
        found = self.artefacts()
        return [name for name, digest in reference.items() if found.get(name) != digest]

    def left(self) -> list[str]:
        """Return what is left half made, or in the temporary folder; a cache of compiled code may stay."""
        places = [*self.temp.iterdir(), *Path(self.settings.run.root).rglob(".*.tmp")]
        return [path.name for path in places if not path.name.startswith("torchinductor")]

    def remove(self) -> None:
        for folder in (self.folder, self.temp):
            shutil.rmtree(folder, ignore_errors=True)


def prepare(folder: Path, settings: Settings) -> Run:
    """Make a run in a new folder."""
    run = Run.at(folder, settings)
    run.remove()
    folder.mkdir(parents=True)
    return run


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all below it, without a word of warning."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def power_cut(folder: Path, draw: random.Random) -> int:
    """Cut the files that changed in the last seconds to half or to nothing; return how many.

    Harder than a power cut, since most were synced. What says where the temporary folder is remains: that
    folder itself outlives no power cut on most systems.
    """
    recent = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".temp" and time.time() - path.stat().st_mtime < 3
    ]
    for path in recent:
        os.truncate(path, draw.choice((0, path.stat().st_size // 2)))
    return len(recent)


def killed(run: Run, done: Run, reference: dict[str, str], seconds: float, seed: int) -> dict[str, Any]:
    """Kill a run at random moments of its `seconds`, and cut what it wrote last; then let it finish.

    What `verify` says is compared with what it says of `done`: small notebooks leave no whole chain.
    """
    draw = random.Random(seed)
    found: dict[str, Any] = {"killed_in": [], "files_cut": 0}
    for _ in range(KILLS):
        process = run.start()
        while run.stage() is None and process.poll() is None:
            time.sleep(0.05)  # the imports before that touch no file
        share = sum(not (run.settings.run_dir / stage / MANIFEST).is_file() for stage in STAGES) / len(STAGES)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, max(1.0, share * seconds)))
            break
        kill_tree(process)
        found["killed_in"].append(run.stage())
        found["files_cut"] += power_cut(run.settings.run_dir, draw)
    if not found["killed_in"]:  # the machine is faster than it was
        run.remove()
        run.folder.mkdir()
        return killed(run, done, reference, seconds / 2, seed)
    if run.start().wait(LONGEST) != 0:
        return found | {"failed": run.said()[-2000:]}
    broken, before = (walk_back(one.settings.run_dir).broken for one in (run, done))
    return found | {
        "differing": run.differing(reference),
        "broken_link": broken.name if broken and not before else None,
        "left": run.left(),
    }


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system of `size` bytes in memory, which takes root on Linux."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(filler: Path, room: int) -> None:
    """Fill the disk of `filler` but for `room` bytes, at once."""
    with filler.open("wb") as file:
        while (size := shutil.disk_usage(filler.parent).free - room) > 0:
            with contextlib.suppress(OSError):  # the stage has written meanwhile
                os.posix_fallocate(file.fileno(), 0, size)
                return


def bytes_in(folder: Path) -> int:
    """Return the bytes of all files in a folder; of one that goes meanwhile nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def full_disk(
    place: Path, done: Run, stage: str, share: float, writing: bool, reference: dict[str, str]
) -> dict[str, Any]:
    """Fill the disk while a stage works; then, with room again, the same command.

    Args:
        share: of what the stage has still to write that fits.
        writing: wait until it writes; else it is filled as it begins.
    """
    own, size = bytes_in(done.settings.run_dir / stage), bytes_in(done.folder)
    with disk(place, 2 * size + (64 << 20)):
        run = Run.at(place, done.settings)
        shutil.copytree(done.settings.run.root, run.settings.run.root)
        filler, folder = place / "filler", run.settings.run_dir / stage
        for _ in range(TRIES):
            for later in STAGES[STAGES.index(stage) :]:
                shutil.rmtree(run.settings.run_dir / later, ignore_errors=True)
            process = run.start("--to", stage)
            while process.poll() is None and not (list(folder.glob("*")) if writing else folder.is_dir()):
                time.sleep(0.001)
            fill(filler, int(share * max(0, own - bytes_in(folder))) // 4096 * 4096)
            if (status := process.wait(LONGEST)) != 0:
                break  # else all was written before the disk was full
            filler.unlink()
        filler.unlink(missing_ok=True)
        said = run.said()
        lines = [line for line in said.splitlines() if re.search("room|No space", line)]
        found = {"status": status, "clear": status in {1, 3} and bool(lines) and "Traceback" not in said}
        found["line"] = (lines or said.splitlines() or [""])[-1].replace(str(place), "")[:300]
        again = run.start("--to", stage).wait(LONGEST)
        due = {name: digest for name, digest in reference.items() if name[:2] <= stage[:2]}
        return found | {"recovered": again == 0 and run.differing(due) == []}


def _flipped(data: bytes) -> bytes:
    half = len(data) // 2
    return data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :] if data else b"\0"


# What becomes of a file's bytes, given those of another; None: it is removed.
SPOIL: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "a bit": lambda data, _: _flipped(data),
    "cut": lambda data, _: data[: len(data) // 2],
    "gone": lambda *_: None,
    "another": lambda _, other: other,
}


def _contents(run: Path, names: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
    """Return the bytes of each file, and those of the next one that has others."""
    data = {name: (run / name).read_bytes() for name in names}
    order = [*data.values(), *data.values()]
    return {
        name: (own, next((other for other in order[number:] if other != own), own * 2))
        for number, (name, own) in enumerate(data.items())
    }


def _spoil(path: Path, data: bytes, other: bytes, kind: str) -> bool:
    """Spoil a file; return whether that changed anything."""
    new = SPOIL[kind](data, other)
    if new is None:
        path.unlink()
    else:
        path.write_bytes(new)
    return new != data


def looked_at(done: Run) -> dict[str, Any]:
    """Spoil each artefact in every way, one after another: do `verify` and `run` see it?

    A manifest is spoilt as well. Of it `run` alone has to see a change: the record has its hash.
    """
    run, tried, unseen = done.settings.run_dir, 0, []
    names = [*done.artefacts(), *(f"{stage}/{MANIFEST}" for stage in STAGES)]
    for name, (data, other) in _contents(run, names).items():
        for kind in SPOIL:
            if _spoil(run / name, data, other, kind):
                tried += 1
                if not name.endswith(MANIFEST) and walk_back(run).broken is None:
                    unseen.append(f"verify: {name}, {kind}")
                if due_reason(done.settings, name.partition("/")[0]) is None:
                    unseen.append(f"run: {name}, {kind}")
            (run / name).write_bytes(data)
    return {"tried": tried, "unseen": unseen}


def redone(done: Run, reference: dict[str, str], kinds: Sequence[str]) -> dict[str, Any]:
    """Spoil all artefacts at once, each in the next of `kinds`; does a run make every one good?"""
    run = done.settings.run_dir
    contents = _contents(run, list(done.artefacts()))
    for number, (name, (data, other)) in enumerate(contents.items()):
        _spoil(run / name, data, other, kinds[number % len(kinds)])
    done.finish()
    return {"spoilt": len(contents), "differing": done.differing(reference)}


def swept(run: Run, *grid: str) -> dict[str, Any]:
    """Carry out a sweep; return by how much its process grew from its second quarter to its last.

    It is looked at while a point is at work: the comparison at the end, which is made once, is no growth.
    """
    process = run.start(
        *(part for axis in grid for part in ("--grid", axis)), "--processes", "1", verb="sweep"
    )
    seen: list[tuple[float, int]] = []
    begun = time.monotonic()
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            one = psutil.Process(process.pid)
            if one.children():
                seen.append((one.memory_info().rss / 2**20, one.num_fds()))
        time.sleep(0.2)
    if process.returncode != 0:
        raise RuntimeError(run.said()[-3000:])
    quarter = max(1, len(seen) // 4)
    memory, files = (
        max(row[i] for row in seen[-quarter:]) - max(row[i] for row in seen[quarter : 2 * quarter] or seen)
        for i in (0, 1)
    )
    return {
        "memory_mib": round(memory, 1),
        "open_files": files,
        "left": run.left(),
        "seconds": round(time.monotonic() - begun),
    }

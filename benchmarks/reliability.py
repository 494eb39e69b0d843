"""What a run survives: kills, power cuts, full disks, spoilt artefacts, bad input, a long sweep.

`python benchmarks/reliability.py [--kills 25] [--points 20] [--short]`. All through the verbs that a person
types, on the demo with a short training; `--short` takes five small notebooks in its place and fills one disk
a stage. Two undisturbed runs say which artefacts are a matter of bytes (the others hold times); every
disturbed run has to end with the same bytes.

- Kills: the whole process tree at random moments, up to three times a run; then the files that changed last
  are cut to half or to nothing, as a power cut leaves what was not synced; then the same command.
- Full disks: a file system of its own (which takes root on Linux) is filled while a stage works, so that a
  tenth, a half and nine tenths of what it will write fit.
- Spoilt artefacts: a bit, half the file, the file, another artefact in its place. Of a manifest `run` alone
  has to see it: its hash is in the record of its notebook.
- Bad input: the table of tests/bad_inputs.py.
- Soak: a sweep; memory and open files of its process, and what is left in the temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from claims import claim, write_claims

sys.path.insert(0, str(Path(__file__).parents[1]))

from so8t_helpers.run.files import sha256_file, write_yaml
from so8t_helpers.run.stage import MANIFEST, STAGES, read_manifest
from so8t_helpers.settings import PROJECT_ROOT, Settings, load_settings, merge
from so8t_helpers.verbs.batch import due_reason
from so8t_helpers.verbs.verify import walk_back
from tests.small_notebooks import code, write_notebook

DEMO = {
    "training": {"max_steps": 12, "checkpoint_steps": 3, "sequence_length": 256, "sample_steps": None},
    "gguf": {"types": ["q8_0"], "quality_tokens": 256, "o_proj_study": False},
    "eval": {"models": ["q8_0"], "prompts": 4, "max_new_tokens": 16, "engine": "llama_cpp"},
    "serve": {"model": "q8_0"},
}
LONGEST = 1800.0  # seconds for one call
SHARES = (0.1, 0.5, 0.9)  # of what a stage writes that the disk has room for


@dataclass(frozen=True)
class Work:
    """A run in a folder of its own."""

    folder: Path
    settings: Settings

    @property
    def profile(self) -> Path:
        return self.folder / "mine.yaml"

    def start(self, *options: str, verb: str = "run") -> subprocess.Popen[bytes]:
        """Start a verb as a person does, its words in log.txt."""
        command = [sys.executable, "-m", "so8t_helpers", verb, str(self.profile), *options]
        with (self.folder / "log.txt").open("wb") as log:
            return subprocess.Popen(
                command, cwd=PROJECT_ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def finish(self, *options: str) -> None:
        """Carry out what is due; it has to succeed."""
        if self.start(*options).wait(LONGEST) != 0:
            raise SystemExit(self.said()[-3000:])

    def said(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    def artefacts(self) -> dict[str, str]:
        """Return the hash of every file that a stage's manifest names, as it lies there."""
        run, found = self.settings.run_dir, {}
        for stage in STAGES:
            for name in (read_manifest(self.settings, stage) or {"outputs": {}})["outputs"]:
                found[f"{stage}/{name}"] = sha256_file(run / stage / name)
        return found


def prepare(folder: Path, short: bool, like: Work | None = None) -> Work:
    """Make a run; with `like` its finished stages, its base and its records are taken over."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {key: str(folder / key) for key in ("root", "reports_root")}
    settings = load_settings("demo", {"run": places} | ({} if short else DEMO))
    if short:
        settings = merge(settings, {"run": {"notebooks": str(folder / "notebooks")}})
        for stage in STAGES:  # a second of work in each, after the artefact and before the notebook's end
            write_notebook(folder / "notebooks", stage, code("import time; time.sleep(1)"))
    if like is not None:
        shutil.copytree(like.settings.run.root, settings.run.root)
    work = Work(folder, settings)
    write_yaml(work.profile, settings.model_dump())
    return work


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all below it, without a word of warning."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def power_cut(run: Path, draw: random.Random) -> int:
    """Cut the files that changed in the last seconds to half or to nothing; return how many."""
    recent = [path for path in run.rglob("*") if path.is_file() and time.time() - path.stat().st_mtime < 3]
    for path in recent:
        os.truncate(path, draw.choice((0, path.stat().st_size // 2)))
    return len(recent)


def kills(folder: Path, short: bool, reference: dict[str, str], seconds: float, count: int) -> dict[str, Any]:
    """Kill `count` runs at random moments and cut what they wrote last; compare each with `reference`."""
    draw, killed, cut, same = random.Random(0), 0, 0, 0
    for number in range(count):
        work = prepare(folder / f"kill-{number}", short)
        for _ in range(3):
            process = work.start()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(1, seconds))
                break
            kill_tree(process)
            killed, cut = killed + 1, cut + power_cut(work.settings.run_dir, draw)
        work.finish()
        same += differing(work, reference) == []
        shutil.rmtree(work.folder)
    return {"runs": count, "kills": killed, "files_cut": cut, "byte_identical": same}


def differing(work: Work, reference: dict[str, str]) -> list[str]:
    """Return the artefacts of a finished run that are not those of `reference`."""
    found = work.artefacts()
    return [name for name, digest in reference.items() if found.get(name) != digest]


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system of `size` bytes in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(filler: Path, room: int) -> None:
    """Fill the disk of `filler` but for `room` bytes."""
    with filler.open("wb", buffering=0) as file:
        for size in (2**20, 4096):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
        file.truncate(max(0, file.tell() - room))


def full_disks(folder: Path, short: bool, done: Work, reference: dict[str, str]) -> dict[str, Any]:
    """Fill the disk while each stage works; afterwards, with room again, the same command has to finish."""
    tried, clear, recovered, lines = 0, 0, 0, []
    size = sum(path.stat().st_size for path in Path(done.settings.run.root).rglob("*") if path.is_file())
    for stage in STAGES:
        writes = sum(path.stat().st_size for path in (done.settings.run_dir / stage).rglob("*"))
        for share in SHARES[:1] if short else SHARES:
            place = folder / f"disk-{tried}"
            with disk(place, 2 * size + (512 << 20)):
                work = prepare(place, short, like=done)
                for later in STAGES[STAGES.index(stage) :]:
                    shutil.rmtree(work.settings.run_dir / later)
                process, filler = work.start("--to", stage), place / "filler"
                while not (work.settings.run_dir / stage).is_dir() and process.poll() is None:
                    time.sleep(0.01)
                room = int(share * writes) // 4096 * 4096
                fill(filler, room)
                status = process.wait(LONGEST)
                filler.unlink()
                tried += 1
                words = [line for line in work.said().splitlines() if re.search("room|No space", line)]
                clear += status in {1, 3} and bool(words)
                lines.append(words[-1][:200].replace(str(folder), "") if words else f"{stage}: {status}")
                work.finish("--to", stage)
                recovered += differing(work, {k: v for k, v in reference.items() if k[:2] <= stage[:2]}) == []
    return {"tried": tried, "one_clear_line": clear, "recovered": recovered, "lines": lines}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SPOIL: dict[str, Callable[[Path, Path], object]] = {
    "a bit": lambda path, _: _flip(path),
    "cut": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "gone": lambda path, _: path.unlink(),
    "another": lambda path, other: shutil.copyfile(other, path),
}


def spoilt(done: Work, reference: dict[str, str]) -> dict[str, Any]:
    """Spoil every artefact in every way: `verify` and `run` have to see it, and `run` to make it good."""
    run, tried, verified, due = done.settings.run_dir, 0, 0, 0
    names = [*done.artefacts(), *(f"{stage}/{MANIFEST}" for stage in STAGES)]
    sizes = {name: (run / name).stat().st_size for name in names}
    for number, name in enumerate(names):
        path, kept = run / name, (run / name).read_bytes()
        other = next((o for o in names[number + 1 :] + names[:number] if sizes[o] != sizes[name]), name)
        for spoil in SPOIL.values() if sizes[name] else ():
            spoil(path, run / other)
            tried += 1
            verified += name.endswith(MANIFEST) or walk_back(run).broken is not None
            due += due_reason(done.settings, name.partition("/")[0]) is not None
            path.write_bytes(kept)
    for stage in STAGES:
        _flip(run / next(name for name in names if name.startswith(stage) and sizes[name]))
    done.finish()
    return {
        "tried": tried,
        "seen_by_verify": verified,
        "seen_by_run": due,
        "differ_after": differing(done, reference),
    }


def bad_inputs() -> dict[str, Any]:
    """Carry out the table of bad inputs; return how many are clear and before long work."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_bad_inputs.py"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed)", done.stdout)}
    return {
        "clear": counts.get("passed", 0) - 1,
        "unclear": counts.get("failed", 0),
    }  # one is the good folder


def soak(folder: Path, short: bool, points: int) -> dict[str, Any]:
    """Carry out a sweep; return by how much its process grew from its second quarter to its last."""
    work = prepare(folder / "soak", short)
    temp = work.folder / "temp"
    temp.mkdir()
    grid = ",".join(f"{1 + i / 100}" for i in range(points))
    os.environ["TMPDIR"] = str(temp)
    process = work.start("--grid", f"pet.huber_delta={grid}", "--processes", "1", verb="sweep")
    del os.environ["TMPDIR"]
    seen: list[tuple[float, int]] = []
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            one = psutil.Process(process.pid)
            seen.append((one.memory_info().rss / 2**20, one.num_fds()))
        time.sleep(0.2)
    if process.returncode != 0:
        raise SystemExit(work.said()[-3000:])
    quarter = max(1, len(seen) // 4)
    early, late = seen[quarter : 2 * quarter] or seen, seen[-quarter:]
    left = [path.name for path in temp.iterdir() if not path.name.startswith("torchinductor")]
    growth = [max(row[i] for row in late) - max(row[i] for row in early) for i in (0, 1)]
    return {"points": points, "memory_mib": round(growth[0], 1), "open_files": growth[1], "left": left}


def measure(folder: Path, short: bool, count: int, points: int) -> dict[str, Any]:
    """Return all figures; full disks are left out where no file system can be mounted."""
    begun = time.perf_counter()
    done = prepare(folder / "undisturbed", short)
    done.finish()
    seconds = time.perf_counter() - begun
    again = prepare(folder / "again", short)
    again.finish()
    twice = again.artefacts()
    reference = {name: digest for name, digest in done.artefacts().items() if twice[name] == digest}
    found: dict[str, Any] = {
        "form": "five small notebooks" if short else "the demo, 12 steps",
        "undisturbed_seconds": round(seconds, 1),
        "artefacts_compared": len(reference),
        "artefacts_with_times": sorted(twice.keys() - reference.keys()),
        "kills": kills(folder, short, reference, seconds, count),
        "soak": soak(folder, short, points),
    }
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
        found["full_disks"] = full_disks(folder, short, done, reference)
    return found | {"spoilt": spoilt(done, reference)}


def claims_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is claimed of the figures."""
    killed, soaked, bad, form = found["kills"], found["soak"], found["spoilt"], found["form"]
    unseen = 2 * bad["tried"] - bad["seen_by_verify"] - bad["seen_by_run"] + len(bad["differ_after"])
    made = [
        claim(
            f"killed and power-cut runs that end with the same bytes ({form})",
            killed["byte_identical"],
            killed["runs"],
            "runs",
            at_least=True,
        ),
        claim(f"of {bad['tried']} spoilt artefacts, not seen or not made good", unseen, 0, "artefacts"),
        claim("temporary folders and connection files that it leaves", len(soaked["left"]), 0, "files"),
    ]
    if soaked["points"] >= 8:  # of fewer the process's own start is most of what is seen
        made += [
            claim(
                f"memory that a sweep of {soaked['points']} points grows by", soaked["memory_mib"], 8, "MiB"
            ),
            claim("open files that it grows by", soaked["open_files"], 2, "files"),
        ]
    if disks := found.get("full_disks"):
        value = min(disks["one_clear_line"], disks["recovered"])
        made.append(
            claim(
                "full disks with one clear line and recovery", value, disks["tried"], "disks", at_least=True
            )
        )
    if inputs := found.get("bad_inputs"):
        made.append(claim("bad inputs without one clear line", inputs["unclear"], 0, "inputs"))
        made.append(
            claim("bad inputs that are clear before long work", inputs["clear"], 60, "inputs", at_least=True)
        )
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25, help="runs that are killed")
    parser.add_argument("--points", type=int, default=20, help="of the sweep")
    parser.add_argument("--short", action="store_true", help="five small notebooks in place of the demo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.short, options.kills, options.points)
    found["bad_inputs"] = bad_inputs()
    print(json.dumps(found, indent=2))
    return 0 if write_claims("reliability", found, claims_of(found)) else 1


if __name__ == "__main__":
    sys.exit(main())

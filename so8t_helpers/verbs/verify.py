"""The walk back from a GGUF file to the input lines: each link of the chain is checked by its hashes.

A model carries the hashes of `run.origin`; each stage's manifest has those of all that it read and wrote. A
file read under the label "02_train/adapter/x" was made by the stage folder that has "adapter/x" in it, in
this run or in another one that a setting named.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8t_helpers.dataset.inputs.files import inspect
from so8t_helpers.dataset.inputs.tables import as_lines
from so8t_helpers.dataset.reading import read_lines, split
from so8t_helpers.run.files import read_json, reading, sha256_file
from so8t_helpers.run.origin import FILE, GGUF_KEY, hashes
from so8t_helpers.run.stage import MANIFEST, STAGES, maker, manifest_in
from so8t_helpers.settings import InputEntry, SettingsError
from so8t_helpers.thinking.audit import verify_audit


@dataclass(frozen=True)
class Link:
    """One link of the chain: what was checked, whether it holds, and what was found."""

    name: str
    holds: bool
    found: str


@dataclass(frozen=True)
class Verification:
    """All links in the order they were walked, up to and with the first that does not hold."""

    target: Path
    links: list[Link]

    @property
    def broken(self) -> Link | None:
        """The first link that does not hold, None when all do."""
        return next((link for link in self.links if not link.holds), None)

    def summary(self) -> tuple[bool, str]:
        """Return whether all links hold, and what to say of them, a line a link."""
        lines = [f"{'holds ' if link.holds else 'BROKEN'}  {link.name}: {link.found}" for link in self.links]
        broken = self.broken
        result = f"broken at {broken.name}: {broken.found}" if broken else f"all {len(self.links)} links hold"
        return broken is None, "\n".join([*lines, f"{self.target}: {result}"])


def check_log(log: Path, head: str | None, public: str | None) -> tuple[bool, str]:
    """Return whether every line of an audit log holds, up to `head` ("SEQ:MAC"), and what to say of it.

    With the public key alone only the signed lines are proven; the others might be of anybody.
    """
    verdict = verify_audit(log, head, public=public)
    if verdict.ok:
        proven = f", {verdict.signed} of them signed" if public else ""
        return True, f"{log}: all {verdict.lines} lines hold{proven}; head {verdict.head}"
    return False, f"{log}: line {verdict.line}: {verdict.problem}"


def walk_back(target: Path) -> Verification:
    """Walk a run folder, or one of its GGUF files, back to the input lines; stop at the first broken link.

    The file lies where its run left it: a copy cannot be walked. Raises SettingsError: neither of both.
    """
    target = target.resolve()
    if target.is_dir() and (target / "params.yaml").is_file():
        walk = _Walk().from_run(target)
    elif target.suffix == ".gguf" and target.is_file():
        walk = _Walk().from_gguf(target)
    else:
        raise SettingsError(f"{target}: expected a run folder (with params.yaml) or a .gguf file")
    links: list[Link] = []
    for link in walk:
        links.append(link)
        if not link.holds:
            break
    return Verification(target, links)


class _Walk:
    """One verification: which stage folders are still to be looked at, and every file's hash.

    Files are hashed from their bytes, each once: a hash remembered from an earlier look would prove nothing.
    """

    def __init__(self) -> None:
        self.waiting: set[Path] = set()
        self.digests: dict[Path, str] = {}
        self.carried: dict[str, Any] | None = None

    def from_run(self, run: Path) -> Iterator[Link]:
        self.waiting = {run / stage for stage in STAGES if (run / stage / MANIFEST).exists()}
        yield Link(f"{run.name}: stages", bool(self.waiting), ", ".join(sorted(f.name for f in self.waiting)))
        yield from self._folders()

    def from_gguf(self, path: Path) -> Iterator[Link]:
        from gguf import GGUFReader  # noqa: PLC0415  (a run folder is verified without it)

        with reading(path, "a GGUF file"):
            field = GGUFReader(path).get_field(GGUF_KEY)
        self.carried = json.loads(field.contents()) if field is not None else None
        found = f"run {self.carried['run']}" if self.carried else f"no key {GGUF_KEY}: not made by a run"
        yield Link(f"{path.name}: carries its provenance", self.carried is not None, found)
        manifest = manifest_in(path.parent)
        if manifest is None or path.name not in manifest["outputs"]:
            where = f"{path.parent} has no manifest that names it; verify the file where 04_gguf left it"
            yield Link(f"{path.name}: made by a run", False, where)
            return
        yield self._file(f"{path.name}: as 04_gguf left it", path, manifest["outputs"][path.name])
        yield from self._inputs(path.parent, manifest)
        yield from self._folders()

    def _folders(self) -> Iterator[Link]:
        while self.waiting:
            folder = max(self.waiting, key=lambda f: (f.name, str(f)))
            self.waiting.remove(folder)
            manifest = manifest_in(folder)
            if manifest is None:
                yield Link(f"{folder.name}: manifest", False, f"no {folder / MANIFEST} that can be read")
                return
            for name, expected in manifest["outputs"].items():
                yield self._file(f"{folder.name}/{name}: as the stage left it", folder / name, expected)
            if folder.name == "03_bake":
                yield from self._hashes_carried(folder, manifest)
            if folder.name == "01_dataset":
                yield from self._lines(folder, manifest)
            yield from self._inputs(folder, manifest)

    def _inputs(self, folder: Path, manifest: dict[str, Any]) -> Iterator[Link]:
        for label, entry in manifest["inputs"].items():
            path = Path(entry["path"])
            yield self._file(f"{folder.name} read {label}: unchanged since", path, entry["sha256"])
            stage, _, name = label.partition("/")
            if stage in STAGES:
                source, expected = maker(label, path), entry["sha256"]
                made = (manifest_in(source) or {"outputs": {}})["outputs"].get(name)
                found = expected if made else f"{source} has no manifest that names it"
                yield Link(f"{folder.name} read {label}: what {stage} made", made == expected, found)
                self.waiting.add(source)

    def _file(self, name: str, path: Path, expected: str) -> Link:
        if not path.is_file():
            return Link(name, False, f"no file {path}")
        if path not in self.digests:
            self.digests[path] = sha256_file(path)
        found = self.digests[path]
        return Link(name, found == expected, found if found == expected else f"{found}, recorded {expected}")

    def _hashes_carried(self, folder: Path, manifest: dict[str, Any]) -> Iterator[Link]:
        """The hashes in the baked folder, and in the GGUF if one is verified, are those of the manifests."""
        inputs = manifest["inputs"]
        paths = {label: Path(entry["path"]) for label, entry in inputs.items()}
        expected = hashes({label: entry["sha256"] for label, entry in inputs.items()}, paths)
        sources: dict[str, Any] = {f"03_bake/model/{FILE}": read_json(folder / "model" / FILE)}
        if self.carried is not None:
            sources[f"GGUF key {GGUF_KEY}"] = self.carried
        for source, carried in sources.items():
            for key, value in expected.items():
                had = carried.get("sha256", {}).get(key)  # one without any says so for every hash
                found = str(value) if had == value else f"{had}, the manifests say {value}"
                yield Link(f"{source}: hash of {key}", had == value, found)

    def _lines(self, folder: Path, manifest: dict[str, Any]) -> Iterator[Link]:
        """Every row of the data set comes from the input line that it names."""
        named: dict[str, dict[int, bytes]] = defaultdict(dict)
        for name in ("train.jsonl", "eval.jsonl"):
            if not (folder / name).is_file():
                yield Link(f"{folder.name}: rows", False, f"{folder} has no {name}; run 01_dataset again")
                return
            with (folder / name).open(encoding="utf-8") as rows:
                for row in map(json.loads, rows):
                    source = row["source"]
                    named[source["file"]][source["line"]] = bytes.fromhex(source["sha256"])
        said = {file["name"]: file.get("entry") for file in read_json(folder / "card.json").get("inputs", [])}
        for name, lines in named.items():
            entry = manifest["inputs"].get(f"input/{name}")
            if entry is None or not Path(entry["path"]).is_file():
                yield Link(f"{name}: input file", False, "not among 01_dataset's inputs, or gone")
                return
            path = Path(entry["path"])
            how = InputEntry(**(said.get(name) or {"path": str(path)}))
            yield _lines_link(name, path, how, lines)


def _lines_link(name: str, path: Path, how: InputEntry, lines: dict[int, bytes]) -> Link:
    count = len(lines)
    with tempfile.TemporaryDirectory() as work:
        for chunk in split(as_lines(inspect([path], [how]), Path(work))):
            for number, raw in read_lines(chunk):
                expected = lines.pop(number, None)
                if expected is not None and (raw is None or hashlib.sha256(raw).digest() != expected):
                    return Link(f"{name}: input lines", False, f"line {number} is not the one that was read")
    if lines:
        return Link(f"{name}: input lines", False, f"has no line {min(lines)}, which a row names")
    return Link(f"{name}: input lines", True, f"{count} lines are those that the rows name")
